"""Thousands of clients that reconnect at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from faults import EDGE, NODE
from figures import keep
from residents import Connection, Residents

CLIENTS = 2000
PAUSE_SECONDS = 5.0
BACK_SECONDS = 20
TRIES = 3
GROWTH = 1.2
ERRORS_SHARE = 0.05


@pytest.fixture
def server_errors(ask_envoy: Any, edge: Any) -> Callable[[], int]:
    """How many requests the edge has answered with 5xx since it started."""
    counter = "stats?format=json&filter=^http.sticky.downstream_rq_5xx$"
    return lambda: int(ask_envoy(edge, counter)["stats"][0]["value"])


def come_back(residents: Residents, fault: str, affected: list[Connection], since: float) -> None:
    """Each client is connected again in time, with few tries, and no message is lost."""
    residents.wait(lambda: all(one.count("connect", since) for one in affected), 3 * BACK_SECONDS)
    back = [max(moment for moment, what in one.events if what == "connect") - since for one in affected]
    tries = [one.count("connect", since) + one.count("failed", since) for one in affected]
    residents.wait_for_answers(time.monotonic(), BACK_SECONDS)
    assert keep(f"{fault}, to connect again", back, BACK_SECONDS)["last"] <= BACK_SECONDS
    assert keep(f"{fault}, tries to connect again", tries, TRIES, "tries")["last"] <= TRIES
    assert not [one for one in residents if one.lost]


def test_all_are_back_soon_after_an_edge_has_restarted(
    edge_url: Any, machine: Any, edge: Any, memory: Any, server_errors: Any
) -> None:
    users = [f"user-{number}" for number in range(CLIENTS)]
    with Residents(edge_url("sticky"), users, PAUSE_SECONDS, (["websocket"],)) as residents:
        residents.settle(120)
        before = memory()
        since = time.monotonic()
        machine(edge.name).check_output(f"systemctl restart {EDGE}")
        come_back(residents, f"restarted edge of {CLIENTS} clients", residents.connections, since)
        residents.settle(BACK_SECONDS)
        after = memory()
        print(f"KiB {before}, {after}; {server_errors()} answers of 5xx")
        assert {name: size / before[name] <= GROWTH for name, size in after.items()} == dict.fromkeys(before, True)
        assert server_errors() <= CLIENTS * ERRORS_SHARE


def test_all_are_back_soon_after_a_node_has_died(edge_url: Any, machine: Any, server_errors: Any) -> None:
    """Half of them begin with polling, which costs more."""
    users = [f"user-{number}" for number in range(CLIENTS // 2)]
    both = (["websocket"], ["polling", "websocket"])
    with Residents(edge_url("sticky"), users, PAUSE_SECONDS, both) as residents:
        residents.settle(120)
        affected = [one for one in residents if one.node == "node1-1"]
        assert len(affected) > CLIENTS / 4
        before, since = server_errors(), time.monotonic()
        machine("node1").check_output(f"systemctl kill --signal=KILL --kill-whom=all {NODE}")
        come_back(residents, f"killed process of {CLIENTS} clients", affected, since)
        print(f"{server_errors() - before} answers of 5xx")
        assert server_errors() - before <= CLIENTS * ERRORS_SHARE
        assert not any(one.count("disconnect", since) for one in residents if one not in affected)
