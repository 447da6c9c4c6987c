"""Names and ports of a node's instances, which are numbered from 1."""

from __future__ import annotations


def instance_name(node: str, instance: int) -> str:
    """The instance's name on the ring, `node1-2` for the second of node1."""
    return f"{node}-{instance}"


def instance_port(first: int | str, instance: int) -> int:
    """The instance's port, from that of instance 1."""
    return int(first) + instance - 1
