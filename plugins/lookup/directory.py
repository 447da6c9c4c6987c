"""Ansible lookup: the directory of this collection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible.plugins.lookup import LookupBase

DOCUMENTATION = r"""
name: directory
author: The stickyring authors
short_description: Directory of the collection stickyring.fleet on the controller
description:
  - Returns where the collection is installed, or the clone that it is used from.
  - A role's C(role_path) says it only inside of the role.
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


class LookupModule(LookupBase):
    """The lookup."""

    def run(self, terms: Sequence[object], variables: dict[str, Any] | None = None, **kwargs: object) -> list[str]:
        """Return the path; terms and options mean nothing."""
        return [str(Path(__file__).resolve().parents[2])]
