"""Thousands of clients who come back at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from residents import Residents

CLIENTS = 2000
PAUSE_SECONDS = 5.0
BACK_SECONDS = 20
TRIES = 3
GROWTH = 1.2
EDGE = "stickyring-edge.service"
NODE = "stickyring-node@1.service"


@pytest.fixture
def memory(machine: Any, edge: Any, nodes: Any) -> Callable[[], dict[str, int]]:
    """KiB that the processes of edge and nodes take, by host."""
    resident = "main=$(systemctl show --property=MainPID --value %s); ps -o rss= --pid $main --ppid $main"
    units = {edge.name: EDGE, **{node.name: NODE for node in nodes}}

    def read() -> dict[str, int]:
        return {name: sum(map(int, machine(name).check_output(resident, unit).split())) for name, unit in units.items()}

    return read


def test_all_are_back_soon_after_an_edge_has_restarted(edge_url: Any, machine: Any, edge: Any, memory: Any) -> None:
    users = [f"user-{number}" for number in range(CLIENTS)]
    with Residents(edge_url("sticky"), users, PAUSE_SECONDS, (["websocket"],)) as residents:
        residents.settle(120)
        before = memory()
        since = time.monotonic()
        machine(edge.name).check_output(f"systemctl restart {EDGE}")
        residents.wait(lambda: all(one.count("connect", since) for one in residents), 3 * BACK_SECONDS)
        took = max(moment for one in residents for moment, what in one.events if what == "connect") - since
        tries = max(one.count("connect", since) + one.count("failed", since) for one in residents)
        residents.settle(BACK_SECONDS)
        after = memory()
        print(f"{CLIENTS} clients were back after {took:.1f} s with {tries} tries at most; KiB {before}, {after}")
        assert took <= BACK_SECONDS
        assert tries <= TRIES
        assert not [one for one in residents if one.lost]
        assert {name: size / before[name] <= GROWTH for name, size in after.items()} == dict.fromkeys(before, True)
