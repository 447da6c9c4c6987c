"""Ansible lookup: the directory of this collection."""

from __future__ import annotations

DOCUMENTATION = r"""
name: directory
author:
  - The stickyring authors (!UNKNOWN)
short_description: Directory of the collection stickyring.fleet on the controller
description:
  - Returns the directory of the installed collection, or of the clone.
  - C(role_path) is available only inside a role.
"""

EXAMPLES = r"""
- name: Show the lock of the node runtime
  ansible.builtin.debug:
    msg: "{{ lookup('stickyring.fleet.directory') }}/app/requirements.lock"
"""

RETURN = r"""
_raw:
  description: One absolute path without symbolic links.
  type: list
  elements: path
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible.plugins.lookup import LookupBase


class LookupModule(LookupBase):
    """The lookup."""

    def run(self, terms: Sequence[object], variables: dict[str, Any] | None = None, **kwargs: object) -> list[str]:
        """Return the path; terms and options are ignored."""
        return [str(Path(__file__).resolve().parents[2])]
