"""An emit without tasks reaches the same clients with the same packets as python-socketio's own."""

import asyncio
import time
from typing import Any

import pytest
import socketio
from engineio.exceptions import SocketIsClosedError

from stickyring.node.asgi.emit import TURN_BYTES, TURN_SECONDS, emit_without_tasks
from stickyring.node.sessions import TURN_PACKETS

GONE, FAULTY = "engine gone", "engine faulty"


class Sent:
    """A server with three clients in two rooms, and the packets that it sends."""

    def __init__(self, client_manager: socketio.AsyncManager | None = None) -> None:
        self.server = socketio.AsyncServer(async_mode="asgi", client_manager=client_manager)
        self.packets: list[tuple[str, str | bytes]] = []
        self.tasks = 0
        self.sids: dict[str, str] = {}
        self.server.eio.send_packet = self._send_packet

    async def fill(self) -> None:
        manager = self.server.manager
        for name in ("first", "second", "third"):
            self.sids[name] = sid = await manager.connect(f"engine {name}", "/")
            await manager.enter_room(sid, "/", "odd" if name != "second" else "even")

    async def _send_packet(self, engine_sid: str, packet: Any) -> None:
        self.tasks = max(self.tasks, len(asyncio.all_tasks()) - 1)
        if engine_sid == GONE:
            raise SocketIsClosedError
        if engine_sid == FAULTY:
            raise OverflowError
        self.packets.append((engine_sid, packet.encode()))


EMITS: list[tuple[dict[str, Any], int]] = [
    ({"data": "text"}, 3),
    ({"data": None}, 3),
    ({"data": ("several", {"arguments": 1})}, 3),
    ({"data": ["one list"], "room": "odd"}, 2),
    ({"data": 1, "to": "even"}, 1),
    ({"data": 1, "room": ["odd", "even", "nobody"]}, 3),
    ({"data": 1, "room": "nobody"}, 0),
    ({"data": 1, "skip_sid": "first"}, 2),
    ({"data": 1, "skip_sid": ["first", "second"]}, 1),
    ({"data": {"file": b"attached", "more": b"too"}, "room": "odd"}, 6),
    ({"data": 1, "namespace": "/unknown"}, 0),
    ({"data": 1, "to": "odd", "callback": print}, 2),
]


@pytest.mark.asyncio
@pytest.mark.parametrize(("options", "packets"), EMITS)
async def test_the_same_packets_go_to_the_same_clients(options: dict[str, Any], packets: int) -> None:
    theirs, ours = Sent(), Sent()
    emit_without_tasks(ours.server)
    for sent in (theirs, ours):
        await sent.fill()
        named = dict(options)
        if skipped := named.get("skip_sid"):
            named["skip_sid"] = (
                [sent.sids[name] for name in skipped] if isinstance(skipped, list) else sent.sids[skipped]
            )
        await sent.server.emit("said", **named)
    assert len(ours.packets) == packets
    assert ours.packets == theirs.packets
    if packets and "callback" not in options:
        assert (ours.tasks, theirs.tasks > 0) == (0, True)


@pytest.mark.asyncio
async def test_a_client_that_cannot_be_reached_does_not_keep_it_from_others(caplog: pytest.LogCaptureFixture) -> None:
    sent = Sent()
    emit_without_tasks(sent.server)
    for engine_sid in (GONE, FAULTY):
        await sent.server.manager.connect(engine_sid, "/")
    await sent.fill()
    await sent.server.emit("said", 1)
    assert len(sent.packets) == 3
    assert [record.message for record in caplog.records] == ["an event was not sent to a client"]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("data", "work", "most"),
    [("x", 0.0, TURN_PACKETS // 3 + 1), ("x" * (TURN_BYTES // 3), 0.0, 2), ("x", TURN_SECONDS, 1)],
    ids=["many packets", "large ones", "work in between"],
)
async def test_others_have_their_turn_while_an_application_emits(data: str, work: float, most: int) -> None:
    sent = Sent()
    emit_without_tasks(sent.server)
    await sent.fill()
    other = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(other.set_result, None)
    emits = 0
    while not other.done():
        time.sleep(work)
        await sent.server.emit("said", data)
        emits += 1
    assert emits <= most


@pytest.mark.asyncio
async def test_nothing_is_encoded_for_a_namespace_without_clients() -> None:
    sent = Sent()
    emit_without_tasks(sent.server)
    await sent.server.emit("tick", object())
    assert sent.packets == []


@pytest.mark.asyncio
async def test_another_emit_of_the_application_is_left_alone() -> None:
    class Manager(socketio.AsyncManager):  # type: ignore[misc]
        async def emit(self, *arguments: object, **options: object) -> None:
            pass

    sent = Sent(Manager())
    theirs = sent.server.manager.emit
    emit_without_tasks(sent.server)
    assert sent.server.manager.emit == theirs
