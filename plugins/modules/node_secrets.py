#!/usr/bin/python
"""Ansible module: writes a service's secrets where only root can read them, and shows them nowhere."""

from __future__ import annotations

DOCUMENTATION = r"""
module: node_secrets
short_description: Write a service's secrets for systemd
description:
  - Writes a folder that only root can read, with an environment file and a folder of credentials.
  - Replaces it as a whole, so removed secrets disappear. The folder that it replaces gets the suffix C(.former), unless
    there is such a folder already, from an interrupted run. The role removes it when the instances have the new ones.
  - Neither results nor differences contain secrets.
options:
  path: {description: "The folder, for example /etc/<service>/secrets; its parent exists", type: path, required: true}
  secrets: {description: "Each secret by its name, a text or number", type: dict, required: true}
attributes:
  check_mode: {description: "Only reports whether it would change something", support: full}
author:
  - The stickyring authors (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Write the secrets
  stickyring.fleet.node_secrets:
    path: /etc/chat/secrets
    secrets:
      DATABASE_PASSWORD: "{{ vault_database_password }}"
"""

RETURN = r"""
{}
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stickyring.fleet.plugins.module_utils.secrets import (
    CREDENTIALS,
    secret_files,
    secret_texts,
    secrets_in,
)

OPTIONS = {
    "path": {"type": "path", "required": True},
    "secrets": {"type": "dict", "required": True, "no_log": True},
}
OWNER = (0, 0)


def write(secrets: Mapping[str, object], folder: Path) -> None:
    """Replace the folder; what was there becomes the former one, unless a former one exists."""
    new, former = folder.with_name(f".{folder.name}.new"), folder.with_name(f"{folder.name}.former")
    shutil.rmtree(new, ignore_errors=True)
    for made in (new, new / CREDENTIALS):
        made.mkdir(mode=0o700)
        made.chmod(0o700)
        os.chown(made, *OWNER)
    for name, text in secret_files(secrets).items():
        descriptor = os.open(new / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)
            os.fchown(descriptor, *OWNER)
            file.write(text.encode())
            file.flush()
            os.fsync(descriptor)
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists() and former.exists():
        shutil.rmtree(folder)
    elif folder.exists():
        folder.rename(former)
    new.rename(folder)


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(argument_spec=OPTIONS, supports_check_mode=True)
    secrets = module.params["secrets"]
    folder = Path(module.params["path"])
    if secrets_in(folder, OWNER) == secret_texts(secrets):
        module.exit_json(changed=False)
    if not module.check_mode:
        try:
            write(secrets, folder)
        except OSError as error:
            module.fail_json(msg=f"Cannot write the secrets in {folder}: {error.strerror}")
    module.exit_json(changed=True)


if __name__ == "__main__":
    main()
