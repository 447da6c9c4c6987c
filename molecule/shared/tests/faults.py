"""Faults of hosts, each for a block: at its end the host is as before."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

NODE = "stickyring-node@1.service"
EDGE = "stickyring-edge.service"
EXHAUSTED_SECONDS = 60
REFILL_SECONDS = 5
SETTLED_SECONDS = 60


def listens_at(node: Any) -> tuple[str, int]:
    """The address and port of a node's first instance."""
    return node.variables["stickyring_address"], node.variables["stickyring_node_port"]


@contextmanager
def cut_off(machine: Any, node: Any, edge: Any) -> Iterator[None]:
    """Packets from the edge reach the node, but none comes back, not even TCP acknowledgements.

    The fault is over when the last attempt to connect that began during the cut has ended: where one times out, Envoy
    sends all requests that wait for the node to others.
    """
    route = f"blackhole {edge.variables['stickyring_address']}/32"
    host, address = machine(node.name), listens_at(node)[0]
    host.check_output(f"ip route add {route}")
    try:
        yield
    finally:
        host.check_output(f"ip route del {route}")
        deadline = time.monotonic() + SETTLED_SECONDS
        pending = f"ss --no-header --tcp --numeric state syn-sent dst {address}"
        while attempts := machine(edge.name).check_output(pending):
            assert time.monotonic() < deadline, attempts


@contextmanager
def clients_cut_off(machine: Any, edge: Any) -> Iterator[None]:
    """No packet from the port of the edge's first listener reaches its clients."""
    # 6 is TCP: not every host has /etc/protocols.
    rule = f"ipproto 6 sport {edge.url('sticky').rpartition(':')[2]} blackhole"
    host = machine(edge.name)
    host.check_output(f"ip rule add {rule}")
    try:
        yield
    finally:
        host.check_output(f"ip rule del {rule}")


@contextmanager
def exhausted(machine: Any, node: Any) -> Iterator[str]:
    """The instance has as many descriptors as are in use, and none is left; the block gets its answer then."""
    host = machine(node.name)
    worker = f"$(pgrep --parent $(systemctl show {NODE} --property=MainPID --value))"
    limit = host.check_output(f"prlimit --pid {worker} --nofile --noheadings --output=SOFT,HARD").split()
    highest = host.check_output(f"ls /proc/{worker}/fd | sort --numeric-sort | tail --lines=1")
    host.check_output(f"prlimit --pid {worker} --nofile={int(highest) + 1}:{limit[1]}")
    try:
        with ExitStack() as held, ThreadPoolExecutor() as pool:
            refusal = _use_up(held, listens_at(node))
            ended = threading.Event()
            again = pool.submit(_use_up_again, held, listens_at(node), ended)
            try:
                yield refusal
            finally:
                ended.set()
                again.result()
    finally:
        host.check_output(f"prlimit --pid {worker} --nofile={limit[0]}:{limit[1]}")


def _use_up(held: ExitStack, address: tuple[str, int]) -> str:
    deadline = time.monotonic() + EXHAUSTED_SECONDS
    while time.monotonic() < deadline:
        connection = held.enter_context(socket.create_connection(address, timeout=0.5))
        with suppress(TimeoutError, ConnectionResetError):
            return connection.recv(4096).decode()
    raise AssertionError(f"it still accepts connections after {EXHAUSTED_SECONDS} s")


def _use_up_again(held: ExitStack, address: tuple[str, int], ended: threading.Event) -> None:
    """Others may end their connections, and the node closes those that stay silent."""
    while not ended.wait(REFILL_SECONDS):
        _use_up(held, address)
