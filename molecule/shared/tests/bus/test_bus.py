"""Events between nodes: the bus as installed, and what users hear while nodes, edge and bus fail or change."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import redis
import redis.exceptions
from stickyring.bus.emitter import BusAwayError, Emitter

PROJECT = Path(__file__).parents[4]
sys.path.insert(0, str(PROJECT / "app" / "tests"))
from bus_crowd import Crowd  # noqa: E402 - of the application's tests

UNIT = "stickyring-bus.service"
USERS = 60
MOST_EXPOSED = 2.0
BACK_SECONDS = 40


def test_it_is_deployed_after_a_check_and_a_second_run_changes_nothing(fleet: Any) -> None:
    fleet.play("site.yml", "--check")
    fleet.play("site.yml")
    assert re.findall(r"changed=(\d+)", fleet.play("site.yml")) == ["0"] * 6


def test_its_service_is_sandboxed_and_serves_nobody_without_a_password(fleet: Any, on_bus: Any) -> None:
    assert on_bus("systemctl is-system-running") == "running"
    exposure = on_bus(f"systemd-analyze security --no-pager {UNIT}")
    assert float(re.findall(r"exposure level for \S+: ([\d.]+)", exposure)[0]) <= MOST_EXPOSED
    assert on_bus(f"systemd-analyze verify /etc/systemd/system/{UNIT} 2>&1") == ""
    anonymous = redis.Redis.from_url(re.sub("//.*@", "//", fleet.url("nodes")))
    with pytest.raises(redis.AuthenticationError):
        anonymous.ping()


def test_an_emitter_can_publish_and_nothing_else(fleet: Any) -> None:
    Emitter(fleet.url("emitter")).emit("said", "from a worker", room="nobody")
    worker = redis.Redis.from_url(fleet.url("emitter"))
    for forbidden in (lambda: worker.xrange("stickyring:events"), lambda: worker.set("other", 1), worker.flushall):
        with pytest.raises(redis.exceptions.NoPermissionError):
            forbidden()
    with pytest.raises(BusAwayError, match="NoPermissionError"):
        Emitter(fleet.url("emitter"), "another", timeout=0).emit("said", "to another application")


class Speaking:
    """Emits numbered events to everybody and to both rooms, twenty times a second."""

    def __init__(self, url: str) -> None:
        self._emitter = Emitter(url, timeout=30)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.number = 0

    def _run(self) -> None:
        while not self._ends.wait(0.05):
            self.number += 1
            self._emitter.emit("numbered", ("all", self.number))
            for room in ("0", "1"):
                self._emitter.emit("numbered", (room, self.number), room=f"room {room}")

    def __enter__(self) -> Speaking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()


def test_users_miss_nothing_unknowingly_whatever_fails_or_changes(
    fleet: Any, machine: Any, nodes: list[Any], edge: Any, edge_url: Any, on_bus: Any, javascript: Path
) -> None:
    def on_node(number: int, command: str) -> Callable[[], object]:
        return lambda: machine(nodes[number].name).check_output(command)

    crowd = Crowd(javascript, USERS, [edge_url("sticky")])
    wait_until_all_are_back(nodes)
    with Speaking(fleet.url("emitter")) as speaking:
        for change in (
            *(on_node(number, "systemctl kill --signal KILL stickyring-node@1") for number in range(len(nodes))),
            lambda: on_bus(f"systemctl restart {UNIT}"),
            lambda: on_bus(f"systemctl kill --signal KILL {UNIT}"),
            lambda: machine(edge.name).check_output("systemctl restart stickyring-edge"),
            on_node(0, "systemctl restart stickyring-node@1"),
            lambda: fleet.play("playbooks/rolling_update.yml", "-e", "stickyring_node_log_level=debug"),
        ):
            change()
            wait_until_all_are_back(nodes)
    history = crowd.end()
    assert history.faults == []
    assert history.recovered >= USERS
    assert history.not_recovered <= history.recovered / 100
    assert history.heard >= speaking.number * USERS


def wait_until_all_are_back(nodes: list[Any]) -> None:
    deadline = time.monotonic() + BACK_SECONDS
    while True:
        seen = [*map(metrics, nodes)]
        if sum(users for users, _ in seen) == USERS and all(up for _, up in seen):
            return
        assert time.monotonic() < deadline, seen
        time.sleep(0.2)


def metrics(node: Any) -> tuple[float, float]:
    """How many sessions a node has, and whether it reads from the bus."""
    try:
        with urlopen(f"http://{node.variables['stickyring_address']}:8001/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return 0, 0
    users = sum(float(found) for found in re.findall(r"^stickyring_connections{.*} (.*)$", text, re.MULTILINE))
    return users, float(re.findall(r"^stickyring_bus_up (.*)$", text, re.MULTILINE)[0])
