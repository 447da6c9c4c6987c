"""Rooms and broadcasts over nodes, and what becomes of them when the bus is away."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from bus_fleet import Bus, Connect, Node, application, worker_of
from conftest import serving, wait_until

from stickyring.bus.connection import parsed
from stickyring.bus.emitter import Emitter
from stickyring.bus.presence import SIGN

RIGHTS = Path(__file__).parents[2] / "roles" / "stickyring_bus" / "vars" / "main.yml"


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


def test_who_is_in_a_room_of_all_nodes(bus: Bus, node: Node, client: Connect) -> None:
    first, second, third = (node(name) for name in ("first", "second", "third"))
    ann, bob, eve = client(first), client(second), client(second, "polling")
    ann_sid, bob_sid, eve_sid = (one.until("connect")[1] for one in (ann, bob, eve))
    wait_until(lambda: third.metric("stickyring_bus_up") == 1, "the node without users is at the bus, too")
    ann.ask("join", "club")
    bob.ask("join", "club")
    assert ann.ask("who", "club", 10) == bob.ask("who", "club", 10) == sorted([ann_sid, bob_sid])
    assert ann.ask("who", None, 10) == sorted([ann_sid, bob_sid, eve_sid])
    assert ann.ask("who", "nobody is here", 10) == []
    ann.ask("enter", eve_sid, "club")
    assert ann.ask("who", "club", 10) == sorted([ann_sid, bob_sid, eve_sid]), "it knows what was done before"
    bob.ask("leave", "club")
    eve.do("leave")
    wait_until(lambda: ann.ask("who", "club", 10) == [ann_sid], "its node has read that it leaves")
    assert third.stop() == 0
    assert bus.client.zcard("stickyring:processes") == 2, "a process that ends says so"
    assert bob.ask("who", "club", 1) == [ann_sid]


def test_many_can_ask_at_the_same_time(node: Node, client: Connect) -> None:
    ann, bob = client(node("first")), client(node("second"))
    sids = sorted(one.until("connect")[1] for one in (ann, bob))
    for _ in range(200):
        ann.do("emit", "who", None, 10)
    assert [ann.until("ack", 20)[1] for _ in range(200)] == [sids] * 200


def test_who_is_in_a_room_after_a_node_was_killed(node: Node, client: Connect) -> None:
    first, second = (node(name, "stickyring.bus.manager()") for name in ("first", "second"))
    ann, bob = client(first), client(second)
    ann_sid, bob_sid = (one.until("connect")[1] for one in (ann, bob))
    assert ann.ask("who", None, 10) == sorted([ann_sid, bob_sid])
    bob.do("next", first.url)
    os.kill(worker_of(second), signal.SIGKILL)
    new_sid = bob.until("connect")[1]
    # The process that the node starts instead sees that it has ended.
    assert ann.ask("who", None, 3) == sorted([ann_sid, new_sid])


def test_it_is_an_error_if_a_node_does_not_say_who_is_in_a_room(bus: Bus, node: Node, client: Connect) -> None:
    first, second = node("first"), node("second")
    ann, bob = client(first), client(second)
    sids = sorted(one.until("connect")[1] for one in (ann, bob))
    assert ann.ask("who", None, 10) == sids
    worker = worker_of(second)
    os.kill(worker, signal.SIGSTOP)
    told = "UnansweredError: 1 of 2 processes at the bus have not answered within 1 s"
    assert ann.ask("who", None, 1) == told
    os.kill(worker, signal.SIGCONT)
    assert ann.ask("who", None, 10) == sids
    # A host that has vanished, or that cannot reach the bus: nobody sees that its processes have ended.
    vanished = "0123456789abcdef 1 another-1/1"
    clock = bus.client.time()
    bus.client.zadd("stickyring:processes", {vanished: clock[0] * 1000 - 50_000})
    assert ann.ask("who", None, 1) == told.replace("2", "3")
    bus.client.zadd("stickyring:processes", {vanished: clock[0] * 1000 - 60_000})
    assert ann.ask("who", None, 1) == sids
    bus.stop()
    assert ann.ask("who", None, 1).startswith("UnansweredError: the bus is away")
    bus.start()
    wait_until(lambda: ann.ask("who", None, 10) == sids, "the bus is back")


def test_a_bus_that_has_lost_everything_knows_all_processes_before_it_answers(
    bus: Bus, node: Node, client: Connect
) -> None:
    first, second = (node(name, "stickyring.bus.manager()") for name in ("first", "second"))
    ann, bob = client(first), client(second)
    sids = sorted(one.until("connect")[1] for one in (ann, bob))
    assert ann.ask("who", None, 10) == sids
    os.kill(worker := worker_of(second), signal.SIGSTOP)
    bus.stop(kill=True)
    bus.remove_data()
    bus.start()
    wait_until(lambda: first.metric("stickyring_bus_holes_total") == 1, "the other node is back")
    assert ann.ask("who", None, 2) == "UnansweredError: the bus is back or new, and may not know all processes yet"
    os.kill(worker, signal.SIGCONT)
    assert ann.ask("who", None, 10) == sids


def test_signs_of_life_do_not_age_while_the_bus_is_away(bus: Bus) -> None:
    def sign(name: str) -> list[Any]:
        signed: list[Any] = bus.client.eval(SIGN, 2, "processes", "since", name, 60_000, 10_000)
        return signed

    sign("a")
    sign("b")
    for process in ("a", "b"):
        bus.client.zincrby("processes", -100_000, process)
    bus.client.decrby("since", 100_000)
    age, *processes = sign("c")
    assert (age, processes) == (0, [b"a", b"b", b"c"])
    bus.client.zincrby("processes", -59_000, "a")
    assert sign("c")[1:] == [b"a", b"b", b"c"]
    bus.client.zincrby("processes", -2_000, "a")
    assert sign("c")[1:] == [b"b", b"c"], "one that has ended alone"


def test_the_account_of_nodes_may_do_all_that_they_do(bus: Bus, node: Node, client: Connect) -> None:
    rights = yaml.safe_load(RIGHTS.read_text())["__stickyring_bus_rights"]["nodes"].partition("{{")[0]
    owner: Any = bus.client
    owner.execute_command("ACL", "SETUSER", "nodes", "on", ">of-the-nodes", *rights.split())
    bus.url = f"unix://nodes:of-the-nodes@{bus.folder}/bus.sock"
    first, second = node("first"), node("second")
    ann, bob = client(first), client(second)
    sids = {one: one.until("connect")[1] for one in (ann, bob)}
    ann.ask("enter", sids[bob], "club")
    ann.ask("say", "club", "text")
    assert bob.said(1) == ["text"]
    assert ann.ask("ask", sids[bob]) == f"who, answered by {sids[bob]}"
    assert ann.ask("who", "club", 10) == [sids[bob]]
    bob.away(first)
    assert bob.back()[:2] == [sids[bob], True]
    bob.do("leave")
    wait_until(lambda: "cmdstat_xtrim" in bus.client.info("commandstats"), "old entries are removed")
    second.stop()
    assert bus.client.acl_log() == []
    owner.execute_command("ACL", "SETUSER", "nodes", "-zadd")
    wait_until(bus.client.acl_log, "what it may not do is noticed")


def test_a_client_that_is_lost_while_it_connects_is_in_no_room(node: Node, client: Connect) -> None:
    first = node("first")
    ann = client(first)
    ann.until("connect")
    assert ann.ask("who", "slow", 10) == []
    path = "/socket.io/?EIO=4&transport=polling"
    path += "&sid=" + json.loads(first.get(path).read()[1:])["sid"]
    connecting = threading.Thread(target=first.get, args=(path,), kwargs={"method": "POST", "body": '40{"slow":true}'})
    connecting.start()
    wait_until(lambda: len(ann.ask("who", "slow", 10)) == 1, "its handler runs")
    first.get(path, method="POST", body="1")
    connecting.join()
    wait_until(lambda: ann.ask("who", "slow", 10) == [], "it is gone")


def test_who_is_in_a_room_without_a_bus_and_with_another_manager(client: Connect, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(application("stickyring.bus.manager()"))
    with serving(tmp_path, "app:application") as alone:
        ann, bob = client(alone), client(alone)
        sids = sorted(one.until("connect")[1] for one in (ann, bob))
        assert ann.ask("who", None, 1) == sids
        ann.ask("join", "club")
        assert bob.ask("who", "club", 1) in ([sids[0]], [sids[1]])


def test_the_manager_of_python_socketio_does_not_know_who_is_in_a_room(bus: Bus, node: Node, client: Connect) -> None:
    ann = client(node("first", f"(lambda url: socketio.RedisManager(url))('{bus.url}')"))
    assert ann.ask("who", None, 1).startswith("TypeError: ")


@pytest.mark.parametrize("away", [False, True], ids=["bus there", "bus away"])
def test_a_disconnect_handler_that_publishes_does_not_stop_the_node(
    bus: Bus, node: Node, client: Connect, *, away: bool
) -> None:
    """It runs when a broadcast finds that a polling client has vanished."""
    first, second = node("first", goodbye=True, pings=1), node("second")
    ann, bob, eve = client(first, "polling"), client(first), client(second)
    for one in (ann, bob, eve):
        one.until("connect")
        one.ask("join", "partners")
    (bob if away else eve).do("emit", "begin_to_count")
    bob.until("numbered")
    if away:
        bus.stop()
    ann.pause()
    wait_until(lambda: first.metric('stickyring_connections{transport="polling"}') == 0, "its session has ended")
    if away:
        bus.start()
    bob.ask("say", None, "after")
    assert bob.said(1) == ["after"]
    assert eve.said(1) == ["after"]
    ann.pause(ends=True)


def test_an_event_may_have_thousands_of_attachments(node: Node, client: Connect) -> None:
    ann, bob = client(node("first")), client(node("second"))
    for one in (ann, bob):
        one.until("connect")
    ann.ask("send_many", 1, 5000)
    ann.ask("say", None, "after")
    assert bob.said(1) == ["after"]


def test_a_backlog_beyond_what_the_bus_sends_at_once_is_read(bus: Bus, node: Node, client: Connect) -> None:
    bus.client.config_set("client-output-buffer-limit", "normal 4mb 4mb 0")
    second = node("second")
    ann, bob = client(node("first")), client(second)
    for one in (ann, bob):
        one.until("connect")
    worker = worker_of(second)
    os.kill(worker, signal.SIGSTOP)
    ann.ask("send_many", 20, 500_000)
    os.kill(worker, signal.SIGCONT)
    ann.ask("say", None, "after")
    assert bob.said(1, 20) == ["after"]


def test_an_emitter_that_was_made_before_a_fork_loses_nothing(bus: Bus, node: Node, client: Connect) -> None:
    ann = client(node("first"))
    ann.until("connect")
    emitter = Emitter(bus.url)
    emitter.emit("said", "parent")
    for number in range(2):
        child = os.fork()
        if not child:
            emitter.emit("said", f"child {number}")
            os._exit(0)
        os.waitpid(child, 0)
    assert ann.said(3) == ["parent", "child 0", "child 1"]
