"""Connection state recovery: the official client goes on with its session, at this node or another."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bus_fleet
import pytest
import socketio
import socketio.packet
from bus_crowd import Crowd, History, Speaking
from bus_fleet import Bus, Client, Connect, Node, worker_of
from bus_trio import Trio, free_port
from conftest import ServeProcess, wait_until

from stickyring.bus import RECOVERY_SECONDS
from stickyring.bus.client import Recovering
from stickyring.bus.connection import TRIM, parsed
from stickyring.bus.emitter import BusAwayError, Emitter
from stickyring.bus.entry import CLOSE, DISCONNECT, ENTER, EVENT, MOVED, Entry
from stickyring.bus.kept import MOST_PAUSES, PAUSE_MILLISECONDS, Kept, Stay, recover
from stickyring.bus.offset import BEGIN, END, Offset, Position
from stickyring.bus.outbox import Outbox
from stickyring.bus.recent import MOST_ENTRIES, Recent
from stickyring.bus.router import Router
from stickyring.node.operate import ask


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


CUTTING = """
@server.event
def cut(sid, count):
    # The next connection is lost after so many packets.
    send, others, sent = server._send_eio_packet, set(server.eio.sockets), []
    def cutting(engine_sid, packet):
        if engine_sid not in others and len(sent) <= count:
            sent.append(packet)
            if len(sent) > count:
                server.sleep(0.2)
                server.eio.sockets[engine_sid].close(wait=False, abort=True, reason=server.reason.TRANSPORT_CLOSE)
                return
        send(engine_sid, packet)
    server._send_eio_packet = cutting
"""


@pytest.mark.eventlet
@pytest.mark.parametrize("packets", [1, 3, 5])
def test_a_client_that_is_lost_again_while_it_gets_what_it_missed_gets_it_once(
    node: Node, client: Connect, monkeypatch: pytest.MonkeyPatch, packets: int
) -> None:
    monkeypatch.setattr(bus_fleet, "APPLICATION", bus_fleet.APPLICATION + CUTTING)
    first = node("first")
    ann, bob = client(first), client(first)
    _, sid, _, pid = ann.until("connect")
    ann.away(first)
    for number in range(5):
        bob.ask("say", None, number)
    bob.ask("cut", packets)
    assert ann.back() == [sid, True, pid]
    bob.ask("say", None, "after")
    assert ann.said(6) == [*range(5), "after"]
    assert ann.until("connect")[1:] == [sid, True, pid]


@pytest.mark.eventlet
@pytest.mark.parametrize("before", [0, 1, 2], ids=["who had got none", "who had got some", "of another session"])
def test_a_quiet_user_misses_nothing_that_is_sent_before_the_node_notices_that_it_is_gone(
    bus: Bus, node: Node, client: Connect, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """What the bus had removed by then, the client did not need."""
    monkeypatch.setattr(bus_fleet, "APPLICATION", bus_fleet.APPLICATION + CUTTING)
    first = node("first", hello=False)
    bob = client(first)
    bob.until("connect")
    speaker = Emitter(bus.url)
    if before < 2:
        bob.ask("cut", before)
    ann = client(first)
    _, sid, _, pid = ann.until("connect")
    for _ in range(before):
        speaker.emit("said", "before", room=sid)
    assert ann.said(before) == ["before"] * before
    if before == 2:
        ann.away(first)
        stored = f"stickyring:session:{pid}"
        wait_until(lambda: 0 < bus.client.ttl(stored) <= RECOVERY_SECONDS, "its session is stored for the last time")
        bus.client.delete(stored)
        bob.ask("cut", 0)
        sid, recovered, pid = ann.back()
        assert not recovered

    def last() -> Position:
        speaker.emit("said", "something else", room="nobody")
        return parsed(bus.client.xrevrange("stickyring:events", count=1))[0][0]

    begun = last()
    wait_until(lambda: bus.client.time()[0] * 1000 - begun.ms > PAUSE_MILLISECONDS, "a pause", 20)
    bus.client.set("stickyring:floor", str(end := last()))
    bus.client.xtrim("stickyring:events", minid=str(end), approximate=False)
    speaker.emit("said", "missed", room=sid)
    assert ann.until("connect")[1:] == [sid, True, pid]
    assert ann.said(1) == ["missed"]


@pytest.mark.parametrize("same", [True, False], ids=["at the same node", "at another"])
def test_the_newest_of_several_connections_of_a_client_goes_on(
    bus: Bus, node: Node, client: Connect, *, same: bool
) -> None:
    first, second = node("first"), node("second")
    ann, bob = client(first), client(second)
    _, sid, _, pid = ann.until("connect")
    ann.away(first)
    bob.ask("say", None, "missed")
    assert bob.said(1) == ["missed"]
    bus.freeze()
    for one in (first, first, first if same else second):
        connect_again(ann, one)
    bus.freeze(frozen=False)
    assert ann.until("connect")[1:] == [sid, True, pid]
    assert ann.said(1) == ["missed"]


def connect_again(client: Client, node: ServeProcess) -> None:
    """Has a client lose its connection, which may not be complete, and waits until it has another one."""
    handshakes = 'stickyring_handshakes_accepted_total{transport="websocket"}'
    before = node.metric(handshakes)
    client.do("away", node.url)
    client.do("back")
    wait_until(lambda: node.metric(handshakes) > before, "it connects")


def test_a_client_that_has_got_no_event_goes_on_too(node: Node, client: Connect) -> None:
    first, second = node("first", hello=False), node("second", hello=False)
    ann, bob = client(first), client(first)
    sid = ann.until("connect")[1]
    ann.away(second)
    bob.ask("say", None, "while it was away")
    assert ann.back()[:2] == [sid, True]
    assert ann.said(1) == ["while it was away"]


def test_a_client_that_leaves_on_purpose_gets_a_new_session(node: Node, client: Connect) -> None:
    first = node("first")
    ann = client(first)
    _, sid, _, pid = ann.until("connect")
    ann.do("leave")
    ann.until("disconnect")
    new_sid, recovered, new_pid = ann.back()
    assert not recovered
    assert (new_sid, new_pid) != (sid, pid)


def test_a_node_that_stood_still_does_not_disturb_a_session_that_went_on_elsewhere(node: Node, client: Connect) -> None:
    first, second, third = (node(name) for name in ("first", "second", "third"))
    ann, bob = client(first), client(third)
    sid = ann.until("connect")[1]
    ann.ask("join", "club")
    worker = worker_of(first)
    os.kill(worker, signal.SIGSTOP)
    ann.away(second)
    assert ann.back()[:2] == [sid, True]
    ann.ask("join", "other")
    bob.ask("say", "club", 1)
    os.kill(worker, signal.SIGCONT)
    wait_until(lambda: connections(first) == 0, "the former node has ended it")
    bob.ask("say", "other", 2)
    ann.away(third)
    bob.ask("say", "other", 3)
    assert ann.back()[:2] == [sid, True]
    assert ann.said(3) == [1, 2, 3]


def test_a_client_of_a_node_that_is_stopped_goes_on_elsewhere(node: Node, client: Connect) -> None:
    first, second = node("first"), node("second")
    ann, bob = client(first), client(second)
    _, sid, _, pid = ann.until("connect")
    ann.ask("join", "club")
    ann.do("next", second.url)
    threading.Thread(target=first.stop).start()
    for number in range(30):
        bob.ask("say", "club", number)
    assert ann.until("connect")[1:] == [sid, True, pid]
    assert ann.said(30) == [*range(30)]
    assert second.metric("stickyring_sessions_recovered_total") == 1


@pytest.mark.parametrize("lost", ["trimmed", "forgotten"])
def test_a_client_that_was_away_for_too_long_is_told(bus: Bus, node: Node, client: Connect, lost: str) -> None:
    first = node("first")
    ann, bob = client(first), client(first)
    _, sid, _, pid = ann.until("connect")
    bob.until("connect")
    ann.ask("say", None, "before")
    assert ann.said(1) == ["before"]
    ann.away(first)
    wait_until(lambda: connections(first) == 1, "the node has noticed")
    bob.ask("say", None, "missed")
    bob.ask("say", None, "kept")
    assert bob.said(3) == ["before", "missed", "kept"]
    if lost == "trimmed":
        last = parsed(bus.client.xrevrange("stickyring:events", count=1))[0][0]
        bus.client.set("stickyring:floor", str(last))
        bus.client.xtrim("stickyring:events", minid=str(last), approximate=False)
    else:
        stored = f"stickyring:session:{pid}"
        wait_until(lambda: 0 < bus.client.ttl(stored) <= RECOVERY_SECONDS, "its session is stored for the last time")
        bus.client.delete(stored)
    new_sid, recovered, _ = ann.back()
    assert not recovered
    assert new_sid != sid
    bob.ask("say", None, "after")
    assert ann.said(1) == ["after"]


@pytest.mark.parametrize("missed", [300, 3000], ids=["in the bound", "beyond it"])
def test_what_is_kept_is_bounded_by_number(bus: Bus, node: Node, client: Connect, missed: int) -> None:
    first = node("first", "stickyring.bus.manager(recovery=setattr(stickyring.bus, 'MOST_ENTRIES', 1000) is None)")
    ann, bob = client(first), client(first)
    sid = ann.until("connect")[1]
    bob.until("connect")
    speaker = Emitter(bus.url)
    for _ in range(2000):
        speaker.emit("said", "before", room="nobody is here")
    wait_until(lambda: bus.client.xlen("stickyring:events") < 1200, "not many more are kept")
    ann.away(first)
    wait_until(lambda: connections(first) == 1, "the node has noticed")
    for number in range(missed):
        speaker.emit("said", number)
    bob.said(missed)
    wait_until(lambda: bus.client.xlen("stickyring:events") < 1200, "not many more are kept")
    assert (ann.back()[:2] == [sid, True]) == (missed == 300)
    assert ann.said(missed, 1) == ([*range(missed)] if missed == 300 else [])
    reason = 'stickyring_sessions_not_recovered_total{reason="trimmed"}'
    assert first.metric(reason) == (missed == 3000)


def test_users_who_come_back_at_a_time_share_what_the_node_reads(bus: Bus, node: Node, javascript: Path) -> None:
    first, port = node("first"), free_port()
    crowd = Crowd(javascript, 30, [first.url, f"http://127.0.0.1:{port}"])
    speaker = Emitter(bus.url)
    for number in range(1000):
        speaker.emit("numbered", ("all", number, "x" * 1000))
    second = node("second", port=port)
    before = bus.client.info()["total_net_output_bytes"]
    os.kill(worker_of(first), signal.SIGKILL)
    first.stop()
    wait_until(lambda: second.metric("stickyring_sessions_recovered_total") == 30, "all are back")
    # What each may have missed is 1 MB.
    assert 1e6 < bus.client.info()["total_net_output_bytes"] - before < 5e6
    assert crowd.end().faults == []


def test_what_a_process_has_read_is_kept_in_order_and_bounded() -> None:
    recent, numbers = Recent(), [*range(1, MOST_ENTRIES + 2)]
    for number in numbers:
        recent.add(*of_room(EVENT, number))
    kept = [at.ms for at, _ in recent.after(recent.since)]
    assert kept == numbers[-len(kept) :]
    assert recent.since == Position(kept[0] - 1, 0)
    assert 0 < len(numbers) - len(kept) < len(numbers) / 5
    assert [at.ms for at, _ in recent.after(Position(numbers[-3], 5))] == numbers[-2:]
    older = [of_room(EVENT, number) for number in range(1, kept[0])]
    assert not recent.extend(BEGIN, older)
    assert recent.extend(Position(kept[0] - 3, 0), older[-2:])
    assert [at.ms for at, _ in recent.after(recent.since)] == [kept[0] - 2, kept[0] - 1, *kept]


def test_a_process_that_lags_behind_does_not_hide_that_entries_were_removed(bus: Bus) -> None:
    client: Any = bus.client
    for number in range(1, 2001):
        client.xadd("events", {"any": "thing"}, id=f"{number}-0")

    for position, gone in (("0-0", 0), ("1001-0", 1000), ("500-0", 1000)):
        client.eval(TRIM, 2, "floor", "events", position, 5000)
        note, first = client.get("floor"), client.xrange("events", count=1)[0][0]
        assert note == (first if gone else None)
        assert gone - 100 <= int(first.partition(b"-")[0]) <= gone + 1


def test_without_recovery_clients_get_what_the_application_sends(node: Node, client: Connect) -> None:
    ann = client(node("first", "stickyring.bus.manager()"))
    assert ann.until("connect")[3] is None
    ann.ask("say", None, "text")
    assert ann.until("said") == ["said", "text"]


def test_an_operator_sees_which_sessions_the_bus_has(node: Node, client: Connect, tmp_path: Path) -> None:
    for one in (node("first"), node("second", "stickyring.bus.manager()")):
        client(one).until("connect")
    assert [kept_ones(tmp_path / name / "control") for name in ("first", "second")] == [[True], [False]]


def kept_ones(control: Path) -> list[bool]:
    return [session["kept"] for session in ask(control, "GET", "/sessions")["sessions"]]


@pytest.mark.parametrize("asyncio_client", [True, False], ids=["AsyncClient", "Client"])
def test_clients_of_python_socketio_go_on_with_the_helper(node: Node, client: Connect, *, asyncio_client: bool) -> None:
    first, second = node("first"), node("second")
    bob = client(second)
    script = (ASYNC_CLIENT if asyncio_client else SYNC_CLIENT).format(first=first.url, second=second.url)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as ann:
        assert ann.stdout is not None
        assert ann.stdin is not None
        lines = iter(ann.stdout.readline, "")
        assert next(line for line in lines if line.startswith("connect")) == "connect False\n"
        bob.ask("say", None, 1)
        assert next(line for line in lines if line.startswith("said")) == "said (1,)\n"
        print(file=ann.stdin, flush=True)
        assert next(line for line in lines if not line.startswith("hello")) == "disconnect\n"
        bob.ask("say", None, 2)
        print(file=ann.stdin, flush=True)
        # In this order, but the handlers of `Client` run in threads.
        assert {line for line in lines if line.startswith(("connect", "said"))} == {"connect True\n", "said (2,)\n"}


@pytest.mark.parametrize("recovering", [True, False], ids=["Recovering", "without"])
def test_a_poll_whose_answer_was_lost_is_not_repeated(*, recovering: bool) -> None:
    polls = 0

    async def answer(kind: str) -> str | None:
        nonlocal polls
        polls += kind == "poll"
        return ANSWERS[kind] if polls < 2 else None

    async def lose_an_answer() -> None:
        async with engineio_server(answer) as url:
            client = socketio.AsyncClient(reconnection=False)
            if recovering:
                Recovering(client)
            await client.connect(url, transports=["polling"])
            await asyncio.wait_for(client.wait(), 10)

    asyncio.run(lose_an_answer())
    assert polls == (2 if recovering else 3)


@pytest.mark.parametrize("recovering", [True, False], ids=["Recovering", "without"])
def test_a_client_that_loses_its_connection_while_it_reconnects_reconnects_again(*, recovering: bool) -> None:
    sessions = polls = 0
    client: Any = None

    async def answer(kind: str) -> str | None:
        nonlocal sessions, polls
        sessions += kind == "open"
        polls = polls + 1 if kind == "poll" else 0
        if kind == "post" and sessions == 2:
            return None
        if kind == "poll" and sessions == 2:
            while client.eio.write_loop_task is not None:
                await asyncio.sleep(0.01)
        while polls == 2 and sessions == 3 and client.eio.state == "connected":
            await asyncio.sleep(0.01)
        return ANSWERS[kind] if polls < 2 else None

    async def connect() -> None:
        nonlocal client
        client = socketio.AsyncClient(reconnection_delay=0.1, reconnection_delay_max=0.1)
        if recovering:
            Recovering(client)
        async with engineio_server(answer) as url, asyncio.timeout(10):
            await client.connect(url, transports=["polling"])
            while sessions < 2 or client._reconnect_task is not None:
                await asyncio.sleep(0.01)
            assert client.connected
            assert client.eio.state == ("connected" if recovering else "disconnected")
            await client.shutdown()

    asyncio.run(connect())
    assert sessions == (3 if recovering else 2)


def test_a_client_that_ends_itself_when_it_is_back_does_not_reconnect_again() -> None:
    sessions = polls = 0

    async def answer(kind: str) -> str | None:
        nonlocal sessions, polls
        sessions += kind == "open"
        polls = polls + 1 if kind == "poll" else 0
        return ANSWERS[kind] if polls < 2 else None

    async def connect() -> None:
        client = socketio.AsyncClient(reconnection_delay=0.1, reconnection_delay_max=0.1)
        recovering = Recovering(client)

        async def end_the_second_session() -> None:
            if sessions == 2:
                assert not recovering.recovered()
                await client.disconnect()

        client.on("connect", end_the_second_session)
        async with engineio_server(answer) as url, asyncio.timeout(10):
            await client.connect(url, transports=["polling"])
            while sessions < 2 or client._reconnect_task is not None:
                await asyncio.sleep(0.01)
            assert (client.connected, client.eio.state) == (False, "disconnected")

    asyncio.run(connect())
    assert sessions == 2


ANSWERS = {
    "open": '0{"sid":"session","upgrades":[],"pingInterval":25000,"pingTimeout":20000}',
    "post": "OK",
    "poll": '40{"sid":"any"}',
}


@contextlib.asynccontextmanager
async def engineio_server(answer: Callable[[str], Awaitable[str | None]]) -> AsyncIterator[str]:
    """Serves polls and POSTs by the kinds of `ANSWERS`; if there is no answer, the connection ends."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                kind = "post" if head.startswith(b"POST") else "poll" if b"sid=" in head else "open"
                if length := re.search(rb"Content-Length: (\d+)", head):
                    await reader.readexactly(int(length[1]))
                if (text := await answer(kind)) is None:
                    break
                writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield "http://{}:{}".format(*server.sockets[0].getsockname())


SYNC_CLIENT = """
import socketio
from stickyring.bus.client import Recovering

def say(*words):
    # In one piece, because handlers run in threads.
    print(" ".join(map(str, words)) + "\\n", end="", flush=True)

client = socketio.Client(reconnection=False)
recovering = Recovering(client)
client.on("connect", lambda: say("connect", recovering.recovered()))
client.on("disconnect", lambda reason: say("disconnect"))
client.on("*", lambda name, *data: say(name, data))
client.connect("{first}", transports=["websocket"])
input()
client.eio.ws.close()
client.wait()
input()
client.connect("{second}", transports=["websocket"])
client.call("noted")
client.disconnect()
"""
ASYNC_CLIENT = """
import asyncio
import socketio
from stickyring.bus.client import Recovering

def say(*words):
    print(*words, flush=True)

async def main():
    client = socketio.AsyncClient(reconnection=False)
    recovering = Recovering(client)
    client.on("connect", lambda: say("connect", recovering.recovered()))
    client.on("disconnect", lambda reason: say("disconnect"))
    client.on("*", lambda name, *data: say(name, data))
    await client.connect("{first}", transports=["websocket"])
    await asyncio.to_thread(input)
    await client.eio.ws.close()
    await client.wait()
    await asyncio.to_thread(input)
    await client.connect("{second}", transports=["websocket"])
    await client.call("noted")
    await client.disconnect()

asyncio.run(main())
"""


def test_the_checker_finds_gaps_and_repetitions() -> None:
    history = History()
    history.add([["connect", False], *numbered(1, 2, 4, 4, 3), ["connect", True], *numbered(5, 7)])
    history.add([["connect", False], *numbered(1), ["connect", False], *numbered(5, 6)])
    assert len(history.faults) == 4
    history.faults.clear()
    assert history == History(gaps=2, lost=1, told=3, repeated=1, disordered=1, heard=10, recovered=1, not_recovered=1)


def test_the_checker_finds_what_is_missed_before_the_first_event_and_after_the_last_one() -> None:
    history = History()
    history.add([["connect", False], *numbered(3, 4)], until=6)
    history.add([["connect", False], ["connect", False]], until=5)
    history.add([["connect", False], ["numbered", "all", 1, 10.0, "offset", 12.5]], until=1)
    assert (history.lost, history.told, history.heard, history.late) == (4, 5, 3, 2.5)


def numbered(*numbers: int) -> list[list[Any]]:
    return [["numbered", "all", number] for number in numbers]


ROOMS = {"all": None, "0": "0", "1": "1"}


def three_nodes_with_users(
    node: Node, client: Connect, javascript: Path, manager: str = "stickyring.bus.manager(recovery=True)"
) -> tuple[list[ServeProcess], Crowd]:
    """Starts three nodes, of which one emits numbered events too, and users."""
    nodes = [node(name, manager) for name in ("first", "second", "third")]
    crowd = Crowd(javascript, 24, [one.url for one in nodes], python=6)
    client(nodes[1]).do("emit", "begin_to_count")
    return nodes, crowd


def connections(node: ServeProcess) -> float:
    return node.metric('stickyring_connections{transport="websocket"}')


def kill_worker(_: Bus, node: ServeProcess) -> None:
    os.kill(worker_of(node), signal.SIGKILL)


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
    nodes, crowd = three_nodes_with_users(node, client, javascript)
    with Speaking(bus.url, ROOMS) as speaking:
        for step in range(3):
            time.sleep(1)
            fault(bus, nodes[step % 3])
            crowd.lose(5)
            time.sleep(1)
            crowd.lose(5)
    time.sleep(3)
    history = crowd.end()
    print(history)
    assert (history.gaps, history.repeated, history.disordered) == (0, 0, 0)
    # Each user those to all, and those to a room.
    assert history.heard >= 30 * speaking.number * (1 if fault is empty_bus else 2)
    if fault is not empty_bus:
        assert history.recovered > 0
        assert history.not_recovered <= history.recovered / 10


def test_without_recovery_the_checker_finds_what_users_have_missed(
    bus: Bus, node: Node, client: Connect, javascript: Path
) -> None:
    nodes, crowd = three_nodes_with_users(node, client, javascript, "stickyring.bus.manager()")
    with Speaking(bus.url, ROOMS) as speaking:
        wait_until(lambda: speaking.number > 20, "it emits")
        kill_worker(bus, nodes[0])
        wait_until(lambda: speaking.number > 80, "it emits")
    history = crowd.end()
    assert history.told > 0
    assert history.recovered == 0
    assert history.not_recovered > 0


def kill_primary(trio: Trio, primary: int) -> None:
    trio.signal(primary, signal.SIGKILL)


def freeze_primary(trio: Trio, primary: int) -> None:
    trio.signal(primary, signal.SIGSTOP)


def stop_primary(trio: Trio, primary: int) -> None:
    trio.signal(primary, signal.SIGTERM)


@pytest.mark.parametrize("fault", [kill_primary, freeze_primary, stop_primary])
def test_nobody_misses_an_event_when_another_host_of_the_bus_takes_over(
    trio: Trio, node: Node, client: Connect, javascript: Path, fault: Callable[[Trio, int], None]
) -> None:
    nodes, crowd = three_nodes_with_users(node, client, javascript)
    with Speaking(trio.url, ROOMS) as speaking:
        time.sleep(1)
        crowd.lose(5)
        primary = trio.primary()
        fault(trio, primary)
        wait_until(lambda: trio.primary() != primary, "another one has taken over", 20)
        crowd.lose(5)
        wait_until(lambda: all(one.metric("stickyring_bus_up") for one in nodes), "all nodes use it", 20)
        trio.signal(primary, signal.SIGCONT)
        time.sleep(1)
        crowd.lose(5)
        time.sleep(1)
    time.sleep(3)
    history = crowd.end()
    print(history)
    assert (history.gaps, history.repeated, history.not_recovered) == (0, 0, 0)
    assert history.recovered >= 5
    assert history.heard >= 30 * speaking.number * 2
    assert all(one.metric("stickyring_bus_holes_total") == 0 for one in nodes)


def test_a_client_that_comes_back_gets_nothing_that_the_bus_may_still_lose(
    trio: Trio, node: Node, client: Connect
) -> None:
    first = node("first", hello=False)
    ann = client(first)
    _, sid, _, pid = ann.until("connect")
    primary = trio.primary()
    bus, replicas = trio.client(primary), [port for port in trio.servers if port != primary]
    ann.away(first)
    for port in replicas:
        trio.signal(port, signal.SIGSTOP)
    bus.config_set("min-replicas-to-write", 0)
    bus.client_kill_filter(_type="replica")
    with pytest.raises(BusAwayError):
        Emitter(trio.url, timeout=0).emit("said", "lost with the primary")
    ann.do("back")
    wait_until(lambda: parsed(bus.xrevrange("stickyring:events", count=1))[0][1].kind == MOVED, "it comes back")
    trio.kill(primary)
    for port in replicas:
        trio.signal(port, signal.SIGCONT)
    assert ann.until("connect", 20)[1:] == [sid, True, pid]
    Emitter(trio.url, timeout=30).emit("said", "after")
    assert ann.said(1) == ["after"]


def test_a_session_that_began_before_the_bus_was_there_goes_on(bus: Bus, node: Node, client: Connect) -> None:
    bus.stop()
    first, second = node("first"), node("second")
    ann = client(first)
    _, sid, _, pid = ann.until("connect")
    ann.ask("say", None, "ahead")
    assert ann.said(1) == ["ahead"]
    bus.start()
    wait_until(lambda: first.metric("stickyring_bus_up") and second.metric("stickyring_bus_up"), "the bus is there")
    wait_until(lambda: bus.client.exists(f"stickyring:session:{pid}"), "its session is stored")
    ann.away(second)
    client(second).ask("say", None, "missed")
    assert ann.back() == [sid, True, pid]
    assert ann.said(1) == ["missed"]


def test_a_client_that_the_application_disconnected_while_it_was_away_gets_a_new_session(
    bus: Bus, node: Node, client: Connect
) -> None:
    first, second = node("first"), node("second")
    ann, bob = client(first), client(second)
    _, sid, _, pid = ann.until("connect")
    ann.away(second)
    bob.ask("bye", sid)
    # Its answer does not wait for the bus, and whoever is back before the bus has it is disconnected after that.
    last = partial(bus.client.xrevrange, "stickyring:events", count=3)
    wait_until(lambda: DISCONNECT in {entry.kind for _, entry in parsed(last())}, "the bus has it")
    new_sid, recovered, new_pid = ann.back()
    assert not recovered
    assert new_sid != sid
    assert new_pid != pid
    assert second.metric('stickyring_sessions_not_recovered_total{reason="ended"}') == 1


def test_a_client_whose_events_the_bus_has_lost_with_all_nodes_is_told(bus: Bus, node: Node, client: Connect) -> None:
    first = node("first", hello=False)
    ann, bob = client(first), client(first)
    ann.until("connect")
    for text in ("one", "two"):
        bob.ask("say", None, text)
    assert ann.said(2) == ["one", "two"]
    ann.do("away", "http://127.0.0.1:9")
    ann.until("disconnect")
    first.stop()
    # As if it had lost power, and with it the last second.
    last: Any = bus.client.xrevrange("stickyring:events", count=3)
    bus.client.xdel("stickyring:events", *[name for name, _ in last])
    second = node("second", hello=False)
    client(second).ask("say", None, "new")
    ann.node = second
    ann.do("away", second.url)
    assert ann.back()[1] is False


def test_a_node_that_was_busy_while_the_bus_was_replaced_tells_its_users_before_anything_else(
    bus: Bus, node: Node, client: Connect
) -> None:
    """Its connection to the bus is idle then, and redis-py replaces it without a word."""
    first = node("first", hello=False)
    ann = client(first)
    sid = ann.until("connect")[1]
    Emitter(bus.url).emit("said", "before")
    assert ann.said(1) == ["before"]
    worker = worker_of(first)
    os.kill(worker, signal.SIGSTOP)
    wait_until(lambda: bus.client.info("clients")["blocked_clients"] == 0, "the bus has answered")
    Emitter(bus.url).emit("said", "lost")
    empty_bus(bus, first)
    Emitter(bus.url).emit("said", "after")
    os.kill(worker, signal.SIGCONT)
    new_sid, recovered, _ = ann.until("connect")[1:]
    assert not recovered
    assert new_sid != sid
    assert ann.said(1, 0.5) == []


def of_room(kind: str, at: int, data: str = "", **header: str) -> tuple[Position, Entry]:
    return Position(at, 0), Entry(kind, "0" * 16, at, {"n": "/", "r": "club"} | header, data)


def test_rooms_are_those_that_are_known_and_what_came_after() -> None:
    """What is known of a session's rooms is newer than what its client has got, or older."""

    def kept(*stays: Stay, sent: str = "8-0") -> Kept:
        return Kept("s", "/", Position(1, 0), "epoch", stays=[*stays], sent=sent)

    def replayed(
        session: Kept, seen: int, offset: int, *entries: tuple[Position, Entry]
    ) -> tuple[list[str], list[Any]]:
        found = recover(session.to_json(Position(seen, 0)).encode(), "pid", Offset(Position(offset, 0)), "epoch")
        assert found is not None
        return [entry.data for at, entry in entries if found.replay(entry, at)], found.rooms

    left, again = Stay("club", Position(2, 0), Position(5, 0)), Stay("club", Position(6, 0))
    closed, event = of_room(CLOSE, 5), of_room(EVENT, 8, "event")
    assert replayed(kept(left, again), 9, 4, closed, event) == (["event"], ["club"])
    gone = Stay("club", Position(5, 0), Position(6, 0))
    entered = of_room(ENTER, 5, s="s")
    assert replayed(kept(gone), 8, 4, entered, of_room(EVENT, 9, "of a room that it has left")) == ([], [])
    assert replayed(kept(sent=""), 4, 7, entered, of_room(EVENT, 6, "got"), event) == (["event"], ["club"])


def test_after_a_pause_a_client_has_all_that_was_before_the_next_event() -> None:
    session, gap = Kept("s", "/", Position(1, 0), "epoch"), PAUSE_MILLISECONDS + 1
    sent = [Position(number * gap, 0) for number in range(1, MOST_PAUSES + 3)]
    sent[1] = Position(sent[0].ms + PAUSE_MILLISECONDS, 0)
    for one in sent:
        session.sends(str(one), one)
    stored = session.to_json(end := sent[-1]).encode()

    def start(got: Position | None) -> Position:
        found = recover(stored, "pid", None if got is None else Offset(got), "epoch")
        assert found is not None
        return found.start

    assert [start(one) for one in sent[1:-1]] == [one.before for one in sent[2:]]
    assert start(sent[-1]) == end
    assert start(sent[0]) == sent[0], "no pause"
    assert start(None) == Position(1, 0), "too many pauses ago"
    older = json.loads(stored)
    del older["pauses"]
    found = recover(json.dumps(older).encode(), "pid", Offset(sent[-2]), "epoch")
    assert found is not None
    assert found.start == sent[-2], "of an earlier release"


def test_own_events_that_a_recovered_session_has_got_from_the_bus_are_not_delivered_ahead_of_it_too() -> None:
    server = SimpleNamespace(packet_class=socketio.packet.Packet)
    manager, outbox = SimpleNamespace(server=server, get_participants=lambda *_: [("s", "e")]), Outbox("0" * 16)
    router = Router(manager, outbox, recovers=True)
    router.epoch, (begin, end) = "epoch", (Position(1, 0), Position(2, 0))
    router.position = begin
    for text in ("read by the client only", "new"):
        outbox.put(EVENT, {"n": "/"}, f'["said","{text}"]')
    first = next(outbox.after(0))
    stored = Kept("s", "/", begin, "epoch", sent=str(begin)).to_json(begin).encode()
    kept = recover(stored, "pid", Offset(begin), "epoch")
    assert kept is not None
    router.go_on(kept, [(end, first)], end, written=0)
    assert len(kept.missed) == 1
    router.kept["/", "s"], kept.held = kept, None
    delivered = [[*router.sendings(entry, None)] for entry in router.entries_ahead()]
    assert [len(one) for one in delivered] == [0, 1]


def test_what_was_read_before_the_stream_has_lost_it_is_not_delivered_twice() -> None:
    router = Router(SimpleNamespace(), Outbox("f" * 16), recovers=True)
    first, second, third = (of_room(EVENT, number) for number in (1, 2, 3))
    assert [router.arrives(*one) for one in (first, second)] == [True, True]
    router.go_on_at(Position(10, 0), "another")
    assert [router.arrives(Position(11, number), one[1]) for number, one in enumerate((second, third))] == [False, True]
    router.go_on_at(Position(20, 0), "a third")
    assert not router.arrives(Position(21, 0), first[1])
    router.go_on_at(Position(30, 0), "a fourth")
    assert not router.arrives(Position(31, 0), third[1])


def stored_as(outbox: Outbox, fields: list[str | bytes]) -> dict[bytes, bytes]:
    """What Redis has of an entry of an outbox."""
    values = [one if isinstance(one, bytes) else one.encode() for one in ("o", outbox.origin, "q", "1", *fields)]
    return dict(zip(values[::2], values[1::2], strict=True))


def test_what_the_bus_has_lost_says_where_it_was_for_those_who_had_it() -> None:
    """Its process writes it again; who has got it elsewhere gets it no more."""
    outbox = Outbox("0" * 16)
    for text in ("had by a user", "had by nobody", "not accepted yet"):
        outbox.put(EVENT, {"n": "/"}, f'["said","{text}"]')
    outbox.wrote(2, [b"5-0", b"6-0"])
    outbox.note_loss()
    outbox.rewrite()
    stored = [entry for _, entry in parsed([(b"9-0", stored_as(outbox, fields)) for _, fields in outbox.unwritten()])]
    assert [entry.lost_at for entry in stored] == [Position(5, 0), Position(6, 0), END]
    session = Kept("s", "/", BEGIN, "epoch", held=None, had=Position(5, 0))
    server = SimpleNamespace(packet_class=socketio.packet.Packet)
    router = Router(
        SimpleNamespace(server=server, get_participants=lambda *_: [("s", "e")]), Outbox("1" * 16), recovers=True
    )
    router.kept["/", "s"] = session
    assert [len([*router.sendings(entry, Position(9, 0))]) for entry in stored] == [0, 1, 1]
    found = recover(session.to_json(BEGIN).encode(), "pid", None, "epoch")
    assert found is not None
    assert [found.replay(entry, Position(9, 0)) for entry in stored] == [False, True, True]


def test_an_offset_of_many_parts_is_none() -> None:
    few, many = ("1-0" + "".join(f"+{number:016x}:1" for number in range(count)) for count in (16, 17))
    assert len(Offset.parse(few).ahead) == 16
    with pytest.raises(ValueError, match="not an offset"):
        Offset.parse(many)
