"""Connection state recovery: the official client goes on with its session, at this node or another."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bus_fleet import Bus, Connect, Crowd, Node
from bus_history import History
from conftest import ServeProcess

from stickyring.bus.emitter import Emitter


@pytest.mark.parametrize("transport", ["websocket", "polling"])
@pytest.mark.parametrize("same", [True, False], ids=["at the same node", "at another"])
def test_a_client_that_was_away_gets_what_it_missed_and_its_session(
    node: Node, client: Connect, transport: str, *, same: bool
) -> None:
    first, second = node("first"), node("second")
    ann, bob = client(first, transport), client(first)
    _, sid, recovered, pid = ann.until("connect")
    assert not recovered
    assert ann.until("hello")[1] == [False, None]
    ann.ask("join", "club")
    ann.ask("note", "mine")
    ann.ask("say", "club", "before")
    assert ann.said(1) == ["before"]
    ann.away(first if same else second)
    for number in range(5):
        bob.ask("say", ["club", "elsewhere", None][number % 3], number)
    assert ann.back() == [sid, True, pid]
    bob.ask("say", None, "after")
    assert ann.said(4) == [0, 2, 3, "after"]
    assert ann.until("hello")[1] == [True, None]
    assert sorted(ann.ask("join", "another")) == sorted([sid, "club", "another"])
    assert ann.ask("noted") == {"noted": "mine"}


def test_the_checker_finds_gaps_and_repetitions() -> None:
    history = History()
    history.add([["connect", False], *numbered(1, 2, 4, 4, 3), ["connect", True], *numbered(5, 7)])
    history.add([["connect", False], *numbered(1), ["connect", False], *numbered(5, 6)])
    assert history == History(gaps=2, repeated=2, heard=10, recovered=1, not_recovered=1)


def numbered(*numbers: int) -> list[list[Any]]:
    return [["numbered", "room", number] for number in numbers]


class Speaking:
    """Emits numbered events to everybody and to both rooms, from a process that is no node."""

    def __init__(self, url: str) -> None:
        self._emitter = Emitter(url, timeout=30)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        number = 0
        while not self._ends.wait(0.05):
            number += 1
            self._emitter.emit("numbered", ("all", number))
            for room in ("room 0", "room 1"):
                self._emitter.emit("numbered", (room, number), room=room)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()


def kill_worker(_: Bus, node: ServeProcess) -> None:
    found = subprocess.run(["pgrep", "-P", str(node.process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)


def stop_bus(bus: Bus, _: ServeProcess) -> None:
    bus.stop()
    time.sleep(2)
    bus.start()


def kill_bus(bus: Bus, _: ServeProcess) -> None:
    bus.stop(kill=True)
    bus.start()


def freeze_bus(bus: Bus, _: ServeProcess) -> None:
    bus.freeze()
    time.sleep(4)
    bus.freeze(frozen=False)


def empty_bus(bus: Bus, _: ServeProcess) -> None:
    bus.stop(kill=True)
    bus.remove_data()
    bus.start()


@pytest.mark.parametrize("fault", [kill_worker, stop_bus, kill_bus, freeze_bus, empty_bus])
def test_nobody_misses_an_event_unknowingly_whatever_fails(
    bus: Bus, node: Node, client: Connect, javascript: Path, fault: Callable[[Bus, ServeProcess], None]
) -> None:
    nodes = [node(name) for name in ("first", "second", "third")]
    crowd = Crowd(javascript, 30, nodes)
    client(nodes[1]).do("emit", "begin_to_count")
    with Speaking(bus.url):
        for step in range(4):
            time.sleep(1)
            fault(bus, nodes[step % 3])
            crowd.lose(5)
            time.sleep(1)
            crowd.lose(5)
    time.sleep(3)
    history = crowd.end()
    print(history)
    assert (history.gaps, history.repeated) == (0, 0)
    if fault is not empty_bus:
        assert history.not_recovered <= history.recovered * 0.01
