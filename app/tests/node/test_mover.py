"""The mover with sessions without a server: which are asked to reconnect, when and at what rate."""

import queue
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from stickyring.node import mover, sessions
from stickyring.node.mover import Move
from stickyring.node.sessions import SETTLING_SECONDS, Session

RATE = 100.0


class FakeSocket:
    """The part of python-engineio's socket that a session uses."""

    def __init__(self, sid: str, upgraded: bool, on_end: Callable[[], None]) -> None:
        self.sid = sid
        self.queue = queue.Queue[object]()
        self.upgraded = upgraded
        self.upgrading = self.closing = self.closed = False
        self._on_end = on_end

    def check_ping_timeout(self) -> bool:
        raise AssertionError("a session that moves is sent nothing")

    def close(self, wait: bool, abort: bool, reason: str) -> None:
        assert (wait, abort) == (False, True), "it must not send a CLOSE packet or wait for the client"
        self.closed = True
        self._on_end()


class Node:
    """Sessions of a node; users whose name begins with `away` should leave. `left` is (time, key) of those who did."""

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}
        self.sockets: dict[str, FakeSocket] = {}
        self.left: list[tuple[float, str | None]] = []
        self.counted = 0

    def connect(self, key: str | None, age: float = 2 * SETTLING_SECONDS, upgraded: bool = True) -> Session:
        sid = f"sid{len(self.sessions)}"
        socket: Any = FakeSocket(sid, upgraded, lambda: self.left.append((time.monotonic(), key)))
        self.sockets[socket.sid] = socket
        engine: Any = SimpleNamespace(sockets=self.sockets)
        session = Session(engine, socket, key, began=time.monotonic() - age)
        self.sessions[socket.sid] = session
        return session

    def move(self, rate: float = RATE) -> Move:
        return Move(self.sessions, lambda session: (session.key or "").startswith("away"), rate, self.count)

    def count(self) -> None:
        self.counted += 1


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setattr(mover, "RETURN_SECONDS", 0.0)
    return Node()


def test_only_those_who_should_leave_are_asked(node: Node) -> None:
    staying = [node.connect("home1"), node.connect(None)]
    leaving = [node.connect("away1"), node.connect("away2", upgraded=False)]
    move = node.move()
    assert (move.to_move, move.running) == (2, True)
    move.run()
    assert all(session.ended and session.moved for session in leaving)
    assert not any(session.ended or session.moved for session in staying)
    assert (move.asked, move.left, move.returned, move.running) == (2, 2, 0, False)
    assert node.counted == 2
    assert not {session.socket.sid for session in leaving} & node.sockets.keys(), "the engine must have forgotten them"


def test_the_rate_is_kept_in_small_batches(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover, "JITTER", 0.0)
    total, batch = 60, int(RATE * mover.BATCH_SECONDS)
    for number in range(total):
        node.connect(f"away{number}")
    node.move().run()
    times = [at for at, _ in node.left]
    assert len(times) == total
    assert times[-1] - times[0] > 0.95 * (total - batch) / RATE
    for first, following in zip(times, times[2 * batch :], strict=False):
        assert following - first > 0.9 * mover.BATCH_SECONDS, "more than two batches in the time of one"


def test_pauses_vary(node: Node) -> None:
    for number in range(6):
        node.connect(f"away{number}")
    node.move(rate=10).run()
    times = [at for at, _ in node.left]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert min(pauses) > 0.9 * (1 - mover.JITTER) / 10
    assert max(pauses) - min(pauses) > 0.001


def test_the_sessions_of_a_user_leave_together_and_users_in_random_order(node: Node) -> None:
    users = [f"away{number}" for number in range(8)]
    for _ in range(3):
        for user in users:
            node.connect(user)
    node.move(rate=30).run()
    order = [key for _, key in node.left]
    groups = [order[start : start + 3] for start in range(0, len(order), 3)]
    assert all(len(set(group)) == 1 for group in groups), groups
    assert sorted(group[0] or "" for group in groups) == users
    assert [group[0] for group in groups] != users


def test_each_session_without_a_key_is_a_user(node: Node) -> None:
    sessions = [node.connect(None) for _ in range(3)]
    move = Move(node.sessions, lambda session: True, RATE, node.count)
    move.run()
    assert (move.asked, move.returned) == (3, 0)
    assert all(session.ended for session in sessions)


def in_background(move: Move) -> threading.Thread:
    thread = threading.Thread(target=move.run)
    thread.start()
    return thread


def test_users_who_arrive_are_asked_and_those_who_come_back_counted(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mover, "RETURN_SECONDS", 0.5)
    node.connect("away1")
    move = node.move()
    thread = in_background(move)
    while not move.left:
        time.sleep(0.01)
    back, late = node.connect("away1", age=-0.01), node.connect("away2")
    thread.join()
    assert late.ended
    assert not back.ended, "a user who comes back must not be asked again"
    assert (move.to_move, move.asked, move.returned) == (2, 2, 1)


def test_a_session_ends_when_its_acknowledgement_is_sent(node: Node) -> None:
    session = node.connect("away1")
    assert session.takes(owing=True)
    move = node.move()
    thread = in_background(move)
    while not move.asked:
        time.sleep(0.01)
    time.sleep(2 * mover.TICK_SECONDS)
    assert not session.ended
    session.handled()
    thread.join()
    assert session.ended
    assert move.seconds < sessions.PATIENCE_SECONDS


def test_an_acknowledgement_that_never_comes_does_not_block_the_end(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "PATIENCE_SECONDS", 0.2)
    session = node.connect("away1")
    assert session.takes(owing=True)
    move = node.move()
    thread = in_background(move)
    while session.taking:
        time.sleep(0.01)
    assert not session.takes(owing=True), "meanwhile no event that asks for an acknowledgement is accepted"
    assert not session.ended
    thread.join()
    assert session.ended
    assert not session.takes(owing=True)


@pytest.mark.parametrize("unfinished", ["packet for the next poll", "upgrade", "connecting"])
def test_a_session_does_not_end_while_something_is_under_way(node: Node, unfinished: str) -> None:
    session = node.connect("away1", age=0.8 if unfinished == "connecting" else 5, upgraded=False)
    socket: Any = session.socket
    if unfinished == "packet for the next poll":
        socket.queue.put("packet")
    socket.upgrading = unfinished == "upgrade"
    move = node.move()
    thread = in_background(move)
    time.sleep(0.1)
    assert move.asked == 1
    assert not session.ended
    socket.upgrading = False
    if unfinished == "packet for the next poll":
        socket.queue.get()
    thread.join()
    assert session.ended
    assert move.seconds < sessions.PATIENCE_SECONDS


def test_sessions_that_leave_by_themselves_are_not_asked(node: Node) -> None:
    sessions = [node.connect(f"away{number}") for number in range(3)]
    move = node.move()
    socket: Any = sessions[0].socket
    socket.closed = True
    move.run()
    assert (move.to_move, move.asked, move.left) == (3, 2, 2)
    assert sessions[0].key not in {key for _, key in node.left}


def test_a_session_that_another_run_has_asked_is_not_asked_again(node: Node) -> None:
    """Both begin before either has asked anybody: an edge changes during a rebalance."""
    for number in range(4):
        node.connect(f"away{number}")
    first, second = node.move(), node.move()
    assert first.to_move == second.to_move == 4
    runs = [threading.Thread(target=move.run) for move in (first, second)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert first.asked + second.asked == first.left + second.left == node.counted == 4
