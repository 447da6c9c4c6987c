#!/usr/bin/python
"""Ansible module: what a host holds of a node service, and whether it can take what is wanted."""

DOCUMENTATION = r"""
module: stickyring_node_preflight
short_description: Look at a host before a node service is installed or changed
description:
  - Reads what is installed and what runs. Changes nothing.
  - Fails when the host cannot take the service, naming every cause, so that nothing running was touched by then.
options:
  service: {description: Name of the template unit, type: str, required: true}
  address: {description: Address that the instances listen on, type: str, required: true}
  ports: {description: "Port of instance 1, of instance 2, ...", type: list, elements: int, required: true}
  release: {description: Name of the release that is wanted, type: str, required: true}
  python: {description: Lowest version of /usr/bin/python3, type: str, required: true}
attributes:
  check_mode: {support: full}
author: stickyring
"""

RETURN = r"""
has_venv: {description: Whether python3 can make virtual environments, type: bool, returned: success}
release_requirements:
  description: SHA-256 of the requirements that the wanted release was completely installed from, or empty
  type: str
  returned: success
current: {description: Name of the release that is linked as current, or empty, type: str, returned: success}
known: {description: Instances that are configured, enabled or running, type: list, elements: int, returned: success}
enabled: {description: Instances that start at boot, type: list, elements: int, returned: success}
running: {description: Instances that run, type: list, elements: int, returned: success}
up_to_date:
  description: Instances that run and were started after the last change of their unit, environment and release
  type: list
  elements: int
  returned: success
"""

import errno
import os
import re
import socket
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

PROC = Path("/proc")
TCP_LISTEN = "0A"


def listeners(port):
    """Return ``{(process id, command, unit)}`` of everything that listens on a TCP port, on any address."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        path = PROC / "net" / table
        rows = path.read_text().splitlines()[1:] if path.exists() else []
        for _, local, _, state, _, _, _, _, _, inode, *_ in map(str.split, rows):
            if state == TCP_LISTEN and int(local.rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{inode}]")
    found = set()
    for process in PROC.glob("[0-9]*"):
        try:
            if any(os.readlink(fd) in inodes for fd in (process / "fd").iterdir()):
                cgroup = (process / "cgroup").read_text()
                unit = re.search(r"/([^/\n]+\.(?:service|scope))(?:/|$)", cgroup, re.MULTILINE)
                found.add((int(process.name), (process / "comm").read_text().strip(), unit[1] if unit else ""))
        except OSError:
            continue  # the process ended while we looked at it
    return found


def port_problem(address, port, own_unit):
    """Return what keeps ``own_unit`` from listening on the address and port, or nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        # As the server does: connections that linger from an earlier run are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return f"{address} is no address of this host: correct stickyring_node_address"
            if error.errno != errno.EADDRINUSE:
                return f"{own_unit} cannot listen on {address} port {port}: {error.strerror}"
        else:
            return None
    holders = listeners(port)
    if holders and all(unit == own_unit for _, _, unit in holders):
        return None
    names = ", ".join(f"{command} (process {pid}{', ' + unit if unit else ''})" for pid, command, unit in sorted(holders))
    return (
        f"port {port} on {address}, meant for {own_unit}, is in use by {names or 'a process that cannot be seen'}:"
        " stop that, or choose another stickyring_node_port"
    )


def units(module, service, instances):
    """Return ``{instance: properties}`` as systemd sees the instances given and all others of the service."""
    names = [f"{service}@{instance}.service" for instance in instances]
    properties = "Id,ActiveState,UnitFileState,MainPID,ExecMainStartTimestampMonotonic"
    command = ["systemctl", "show", f"--property={properties}", *names, f"{service}@*.service"]
    _, output, _ = module.run_command(command, check_rc=True)
    shown = {}
    for block in output.strip().split("\n\n"):
        unit = dict(line.split("=", 1) for line in block.splitlines())
        instance = re.fullmatch(re.escape(service) + r"@([0-9]+)\.service", unit.get("Id", ""))
        if instance:
            shown[int(instance[1])] = unit
    return shown


def changed_at(*paths):
    """Return when the youngest of the files (or links themselves) was written, in seconds; never, if one is missing."""
    return max(path.lstat().st_mtime if os.path.lexists(path) else float("inf") for path in paths)


def main():
    module = AnsibleModule(
        argument_spec={
            "service": {"type": "str", "required": True},
            "address": {"type": "str", "required": True},
            "ports": {"type": "list", "elements": "int", "required": True},
            "release": {"type": "str", "required": True},
            "python": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    service, address, ports = (module.params[name] for name in ("service", "address", "ports"))
    home, settings = Path("/opt") / service, Path("/etc") / service

    problems = [port_problem(address, port, f"{service}@{i}.service") for i, port in enumerate(ports, 1)]
    _, version, _ = module.run_command(["/usr/bin/python3", "-c", "import platform; print(platform.python_version())"])
    if not version or [int(part) for part in re.findall(r"\d+", version)[:2]] < [
        int(part) for part in module.params["python"].split(".")
    ]:
        problems.append(f"/usr/bin/python3 is {version.strip() or 'missing'}: {module.params['python']} or newer is needed")
    problems = sorted(filter(None, set(problems)))
    if problems:
        module.fail_json(msg="Nothing was changed. " + ". ".join(problems) + ".")

    no_venv, _, _ = module.run_command(["/usr/bin/python3", "-c", "import venv, ensurepip"])
    stamp = home / "releases" / module.params["release"] / ".complete"
    current = home / "current"
    configured = {int(path.stem) for path in settings.glob("*.env") if path.stem.isdigit()}
    shown = units(module, service, sorted(configured | set(range(1, len(ports) + 1))))
    running = {i for i, unit in shown.items() if unit["ActiveState"] == "active"}
    enabled = {i for i, unit in shown.items() if unit["UnitFileState"] == "enabled"}
    # Counted back from now, so that a clock that was set after the start does not matter.
    started = {
        i: time.time() - time.monotonic() + int(shown[i]["ExecMainStartTimestampMonotonic"]) / 1e6 for i in running
    }
    template = Path("/etc/systemd/system") / f"{service}@.service"
    module.exit_json(
        has_venv=no_venv == 0,
        release_requirements=stamp.read_text().strip() if stamp.is_file() else "",
        current=os.readlink(current).rpartition("/")[2] if current.is_symlink() else "",
        known=sorted(configured | running | enabled),
        enabled=sorted(enabled),
        running=sorted(running),
        up_to_date=sorted(i for i in running if started[i] > changed_at(template, current, settings / f"{i}.env")),
    )


if __name__ == "__main__":
    main()
