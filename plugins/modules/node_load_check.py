#!/usr/bin/python
"""Ansible module: runs a command that loads an application, as the service's user, with its settings and secrets."""

from __future__ import annotations

DOCUMENTATION = r"""
module: node_load_check
short_description: Run a command as a service's user, with its environment and credentials
description:
  - Runs the command with exactly the given environment, and with the secrets as systemd passes them to the unit, as
    variables and as the files C(secret_NAME) in C($CREDENTIALS_DIRECTORY).
  - The secrets reach the process through a pipe and exist only in its memory and in a file system that ends with it.
  - Everything that the command starts ends with it. It changes nothing.
options:
  service: {description: "User that runs the command", type: str, required: true}
  python: {description: "Path of the Python that starts the command", type: path, required: true}
  command: {description: "The command, word by word", type: list, elements: str, required: true}
  environment: {description: "Environment variables of the command", type: dict, required: true}
  secrets: {description: "Each secret by its name, a text or number", type: dict, required: true}
  timeout: {description: "Seconds after which it is killed", type: int, required: true}
attributes:
  check_mode: {description: "Does nothing in check mode", support: full}
author:
  - The stickyring authors (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Try the application
  stickyring.fleet.node_load_check:
    service: chat
    python: /opt/chat/releases/1.4.2/bin/python
    command: [/opt/chat/releases/1.4.2/bin/stickyring, serve, --check, "chat:application"]
    environment: {PATH: /usr/bin, CHAT_ROOMS: "12"}
    secrets: {DATABASE_PASSWORD: "{{ vault_database_password }}"}
    timeout: 60
"""

RETURN = r"""
rc: {description: "Exit status of the command, 137 if it was killed", type: int, returned: always}
stdout: {description: "What it printed, secrets replaced", type: str, returned: always}
stderr: {description: "What it reported, secrets replaced", type: str, returned: always}
"""

import json
import os
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stickyring.fleet.plugins.module_utils.secrets import PREFIX, secret_texts

OPTIONS = {
    "service": {"type": "str", "required": True},
    "python": {"type": "path", "required": True},
    "command": {"type": "list", "elements": "str", "required": True},
    "environment": {"type": "dict", "required": True},
    "secrets": {"type": "dict", "required": True, "no_log": True},
    "timeout": {"type": "int", "required": True},
}
KILLED = 137

# The first process of the namespace, as root. Everything ends with it, as does the file system, which no other process
# sees. It waits, because the kernel gives it no default signal handlers. runuser asks for no password.
FIRST = """\
mount -t tmpfs -o "size=2m,mode=0700,uid=$(id -u "$1"),gid=$(id -g "$1")" tmpfs "$2" < /dev/null || exit
user=$1; shift 2
runuser -u "$user" -- "$@"
exit $?
"""

# As the service's user. It reads everything before it starts the command, which gets an empty input.
STARTER = """\
import json, os, sys
given = json.load(sys.stdin)
os.umask(0o077)
for name, value in given["credentials"].items():
    with open(os.path.join(given["folder"], name), "wb") as file:
        file.write(value.encode())
    os.chmod(file.name, 0o400)
os.chmod(given["folder"], 0o500)
os.umask(0o022)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.execve(sys.argv[1], sys.argv[1:], {name.encode(): value.encode() for name, value in given["environment"].items()})
"""


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(argument_spec=OPTIONS, supports_check_mode=True)
    wanted = module.params
    if module.check_mode:
        module.exit_json(changed=False, rc=0, stdout="", stderr="", skipped=True)
    secrets = secret_texts(wanted["secrets"])
    # Only a place for the mount: the secrets are never in this folder itself.
    folder = tempfile.mkdtemp(prefix=".stickyring-", dir="/run" if os.access("/run", os.W_OK) else None)
    try:
        given = {
            "folder": folder,
            "environment": {**wanted["environment"], **secrets, "CREDENTIALS_DIRECTORY": folder},
            "credentials": {f"{PREFIX}{name}": value for name, value in secrets.items()},
        }
        command = ["timeout", "--signal=KILL", str(wanted["timeout"]), "unshare", "--pid", "--fork", "--kill-child"]
        command += ["--mount-proc", "sh", "-c", FIRST, "-", wanted["service"], folder]
        command += [wanted["python"], "-I", "-c", STARTER, *wanted["command"]]
        code, output, errors = module.run_command(command, data=json.dumps(given), binary_data=True, cwd="/")
    finally:
        Path(folder).rmdir()
    if code in {KILLED, -9}:
        code = KILLED
        errors += (
            f"{wanted['command'][-1]} was not loaded within {wanted['timeout']} s (stickyring_node_start_timeout), or"
            " was killed.\n"
        )
    result = {"rc": code, "stdout": output, "stderr": errors, "changed": False}
    if code:
        module.fail_json(msg="The application cannot be loaded", **result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
