"""Rooms and broadcasts over nodes, and what becomes of them when the bus is away."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from bus_fleet import Bus, Connect, Node, worker_of
from conftest import serving, wait_until

from stickyring.bus.connection import parsed
from stickyring.bus.emitter import Emitter


def test_an_event_reaches_rooms_and_all_on_every_node_in_order(node: Node, client: Connect) -> None:
    first, second = node("first"), node("second")
    ann, bob, eve = client(first), client(second, "polling"), client(second)
    for one in (ann, bob, eve):
        one.until("connect")
    assert bob.ask("join", "club")
    assert ann.ask("join", "club")
    for number in range(20):
        ann.do("emit", "say", "club", number)
    ann.do("emit", "say", None, "all")
    assert ann.said(21) == bob.said(21) == [*range(20), "all"]
    assert eve.said(1) == ["all"]


def test_what_an_application_does_to_sessions_of_another_node(node: Node, client: Connect) -> None:
    first, second = node("first"), node("second")
    ann, bob = client(first), client(second, "polling")
    sids = {one: one.until("connect")[1] for one in (ann, bob)}
    ann.ask("enter", sids[bob], "club")
    ann.ask("others", "not to me")
    ann.ask("say", "club", "to the club")
    assert bob.said(2) == ["not to me", "to the club"]
    assert ann.ask("ask", sids[bob]) == f"who, answered by {sids[bob]}"
    bob.ask("close", "club")
    ann.ask("say", "club", "to nobody")
    ann.ask("bye", sids[bob])
    assert bob.said(1) == ["bye"], "what was emitted before the disconnect arrives"
    assert bob.until("disconnect")[1] == "io server disconnect"
    ann.do("emit", "say", None, "last")
    assert ann.said(1) == ["last"], "nothing else was for this client"


def test_binary_events_and_other_serializers(node: Node, client: Connect) -> None:
    ann, bob = client(node("first")), client(node("second"), "polling")
    for one in (ann, bob):
        one.until("connect")
    ann.ask("file", [1, 2, 255])
    assert bob.until("file")[1] == ann.until("file")[1] == {"bytes": [1, 2, 255]}


def test_while_the_bus_is_away_local_users_get_events_and_others_get_them_later(
    bus: Bus, node: Node, client: Connect
) -> None:
    ann, bob = client(node("first")), client(node("second"))
    for one in (ann, bob):
        one.until("connect")
    ann.do("emit", "say", None, "before")
    assert ann.said(1) == bob.said(1) == ["before"]
    bus.stop()
    for number in range(5):
        ann.do("emit", "say", None, f"ann {number}")
        bob.do("emit", "say", None, f"bob {number}")
    assert ann.said(5) == [f"ann {number}" for number in range(5)]
    assert bob.said(5) == [f"bob {number}" for number in range(5)]
    bus.start()
    assert ann.said(5) == [f"bob {number}" for number in range(5)]
    assert bob.said(5) == [f"ann {number}" for number in range(5)]
    ann.do("emit", "say", None, "after")
    assert ann.said(1) == bob.said(1) == ["after"], "each event once"


def test_a_frozen_bus_is_as_one_that_is_away_and_repeats_nothing(bus: Bus, node: Node, client: Connect) -> None:
    ann, bob = client(node("first")), client(node("second"))
    for one in (ann, bob):
        one.until("connect")
    bus.freeze()
    for number in range(5):
        ann.do("emit", "say", None, number)
    assert ann.said(5) == [*range(5)]
    # Longer than a client of redis-py waits for an answer: the events are written again.
    wait_until(lambda: "the bus is away" in str(bob.node.log()), "the other node has noticed")
    wait_until(lambda: "the bus is away" in str(ann.node.log()), "the node has noticed")
    bus.freeze(frozen=False)
    ann.do("emit", "say", None, "after")
    assert bob.said(6) == [*range(5), "after"]
    assert ann.said(1) == ["after"]
    entries = [(entry.origin, entry.number) for _, entry in parsed(bus.client.xrange("stickyring:events"))]
    assert len(entries) == len(set(entries)), "written once"


def test_users_of_a_node_that_stood_still_miss_nothing(node: Node, client: Connect) -> None:
    first, second = node("first"), node("second")
    ann, bob = client(first), client(second)
    for one in (ann, bob):
        one.until("connect")
    os.kill(worker_of(second), signal.SIGSTOP)
    for number in range(200):
        ann.do("emit", "say", None, number)
    assert ann.said(200) == [*range(200)]
    os.kill(worker_of(second), signal.SIGCONT)
    assert bob.said(200) == [*range(200)]


def test_the_manager_of_python_socketio_loses_events_when_the_queue_is_away(
    bus: Bus, node: Node, client: Connect
) -> None:
    """The negative control of the test above: it would notice."""
    theirs = f"(lambda url: socketio.RedisManager(url))('{bus.url}')"
    first, second = node("first", theirs), node("second", theirs)
    ann, bob = client(first), client(second)
    for one in (ann, bob):
        one.until("connect")
    ann.do("emit", "say", None, "before")
    assert bob.said(1) == ["before"]
    bus.stop()
    for number in range(5):
        ann.do("emit", "say", None, number)
    assert ann.said(6) == ["before", *range(5)]
    bus.start()

    def arrived() -> bool:
        ann.do("emit", "say", None, "after")
        return bool(bob.said(1, 0.2))

    wait_until(arrived, "the other node has subscribed again", 30)
    assert not {*bob.said(1, 0.5)} & {*range(5)}


@pytest.mark.eventlet
def test_flask_socketio_takes_the_manager(bus: Bus, tmp_path: Path, client: Connect) -> None:
    (tmp_path / "flask_app.py").write_text(FLASK)
    with serving(tmp_path, "flask_app:app", STICKYRING_BUS_URL=bus.url) as first:
        ann = client(first)
        sid = ann.until("connect")[1]
        ann.ask("join", "club")
        Emitter(bus.url).emit("said", "from a worker", room="club")
        assert ann.said(1) == ["from a worker"]
        ann.away(first)
        Emitter(bus.url).emit("said", "missed", room="club")
        assert ann.back()[:2] == [sid, True]
        assert ann.said(1) == ["missed"]


FLASK = """
import flask
import flask_socketio
import stickyring.bus

app = flask.Flask(__name__)
server = flask_socketio.SocketIO(app, client_manager=stickyring.bus.manager(recovery=True))

@server.on("join")
def join(room):
    flask_socketio.join_room(room)
"""


def test_a_node_reads_from_the_bus_before_it_has_users(node: Node) -> None:
    first = node("first")
    assert first.get("/healthz").status == 200
    wait_until(lambda: first.metric("stickyring_bus_up") == 1, "it reads")


def test_what_the_bus_does_is_counted(bus: Bus, node: Node, client: Connect) -> None:
    first = node("first")
    ann = client(first)
    ann.until("connect")
    wait_until(lambda: first.metric("stickyring_bus_up") == 1, "the bus is there")
    ann.ask("say", None, "text")
    assert ann.said(1) == ["text"]
    assert first.metric("stickyring_bus_published_total") == first.metric("stickyring_bus_read_total") >= 2
    assert first.metric("stickyring_bus_waiting") == 0
    bus.stop()
    ann.ask("say", None, "later")
    assert ann.said(1) == ["later"]
    assert (first.metric("stickyring_bus_up"), first.metric("stickyring_bus_outages_total")) == (0, 1)
    assert first.metric("stickyring_bus_ahead_total") == first.metric("stickyring_bus_waiting") == 1
    assert first.metric("stickyring_bus_waiting_seconds") > 0


def test_the_application_is_told_that_the_bus_has_lost_events(bus: Bus, node: Node, client: Connect) -> None:
    first = node("first", "stickyring.bus.manager()")
    ann = client(first)
    ann.until("connect")
    ann.ask("say", None, "text")
    assert ann.said(1) == ["text"]
    bus.stop(kill=True)
    bus.remove_data()
    bus.start()
    assert ann.until("loss")
    assert first.metric("stickyring_bus_holes_total") == 1


def test_a_bus_whose_memory_was_full_is_used_again(bus: Bus, node: Node, client: Connect) -> None:
    first, second = node("first"), node("second")
    ann, bob = client(first), client(second)
    for one in (ann, bob):
        one.until("connect")
    bus.client.config_set("maxmemory", "1mb")
    ann.ask("say", None, "full")
    assert ann.said(1) == ["full"], "local users are served on"
    assert first.metric("stickyring_bus_up") == 0
    bus.client.config_set("maxmemory", "0")
    assert bob.said(1) == ["full"]
    wait_until(lambda: first.metric("stickyring_bus_up") == 1, "it is used again")


def test_a_loss_that_another_node_has_noticed_is_noticed_by_all(bus: Bus, node: Node, client: Connect) -> None:
    first = node("first")
    ann = client(first)
    sid = ann.until("connect")[1]
    wait_until(lambda: first.metric("stickyring_bus_up") == 1, "it reads")
    bus.client.set("stickyring:epoch", "0123456789abcdef")
    ann.until("disconnect")
    assert ann.until("connect")[1:3] != [sid, True]
    assert first.metric("stickyring_bus_holes_total") == first.metric("stickyring_bus_up") == 1


def test_what_cannot_wait_for_the_bus_any_more_is_refused(bus: Bus, node: Node, client: Connect) -> None:
    first = node("first")
    ann = client(first)
    ann.until("connect")
    bus.stop()
    assert ann.ask("fill") == "BusFullError"
    assert first.metric("stickyring_bus_refused_total") == 1
    bus.start()
    wait_until(lambda: first.metric("stickyring_bus_waiting") == 0, "the bus has all of it")
    assert ann.ask("say", None, "again") is None
    assert ann.said(1) == ["again"]
