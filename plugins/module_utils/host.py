"""What a host does not allow a unit of these roles."""

from __future__ import annotations

import re
from pathlib import Path

PROC = Path("/proc")
CAP_NET_BIND_SERVICE = 1 << 10
"""With it, a process can listen on ports below FIRST_FREE_PORT."""
CAP_SYS_RESOURCE = 1 << 24
"""With it, systemd can raise the limit above its own."""
FIRST_FREE_PORT = 1024


def has_capability(process: str, capability: int) -> bool:
    """Return whether a process, by its id, has one of the capabilities above."""
    status = (PROC / process / "status").read_text()
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return bool(found and int(found[1], 16) & capability)


def namespace_problem() -> str | None:
    """Return why systemd could not start a unit with PrivateUsers, and the remedy; or None."""
    allowed = PROC / "sys/user/max_user_namespaces"
    if not allowed.is_file() or allowed.read_text().strip() != "0":
        return None
    return (
        "user.max_user_namespaces is 0 on this host, so systemd cannot start a unit with PrivateUsers: raise it,"
        " for example with sysctl -w user.max_user_namespaces=10000, and permanently in /etc/sysctl.d"
    )


def tracking_problem(variable: str, clients: int) -> str | None:
    """Return why connections of so many clients of a proxy would be lost, which only the kernel's log reports; or None.

    A firewall's rules, or those of a container engine, make the kernel keep a record of each connection.
    """
    most = PROC / "sys/net/netfilter/nf_conntrack_max"
    if not most.is_file():
        return None
    tracked, needed = int(most.read_text()), 2 * clients
    if not 0 < tracked < needed:
        return None
    return (
        f"net.netfilter.nf_conntrack_max is {tracked} on this host, but {variable} is {clients}, and each client takes"
        " two connections: lower it, or raise the other, for example with"
        f" sysctl -w net.netfilter.nf_conntrack_max={2 * needed}, and permanently in /etc/sysctl.d"
    )


def files_problem(variable: str, files: int) -> str | None:
    """Return why a unit with LimitNOFILE=`files` would get fewer, which systemd does not report; or None."""
    limits = PROC / "1/limits"
    if not ((PROC / "1/status").is_file() and limits.is_file()):
        return None
    hard = re.search(r"^Max open files\s+\S+\s+([0-9]+)\s", limits.read_text(), re.MULTILINE)
    if hard is None or files <= int(hard[1]) or has_capability("1", CAP_SYS_RESOURCE):
        return None
    return f"systemd on this host can give a service at most {hard[1]} open files, but {variable} is {files}: lower it"


def watching_problem(needed: int) -> str | None:
    """Return why Envoys that take so many inotify instances in all, one for each file, could not run; or None."""
    most = PROC / "sys/fs/inotify/max_user_instances"
    if not most.is_file() or int(most.read_text()) >= needed:
        return None
    return (
        f"fs.inotify.max_user_instances is {most.read_text().strip()} on this host, and the Envoys that serve and that"
        f" leave would need {needed}: raise it, for example with"
        f" sysctl -w fs.inotify.max_user_instances={2 * needed}, and permanently in /etc/sysctl.d"
    )
