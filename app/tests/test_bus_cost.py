"""What is kept for recovery costs: bytes of a session and of an event, in a node and in Redis; prints the figures."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bus_fleet import Bus
from socketio.packet import Packet

from stickyring.bus.connection import APPEND, SAVE, Address, append_arguments
from stickyring.bus.entry import EVENT, encode, header_of
from stickyring.bus.kept import MOST_PAUSES, Kept
from stickyring.bus.offset import Position
from stickyring.bus.outbox import ENTRY_BYTES, Outbox

MANY = 5000
ORIGIN, EPOCH = "0123456789abcdef", "fedcba9876543210"
HERE = Position(1_796_000_000_000, 0)
TEXT = "x" * 200


@contextmanager
def cost(what: str, memory: Callable[[], int], figures: dict[str, float]) -> Iterator[None]:
    """Note and print how much memory one of `MANY` takes in the block, and how much time if nothing traces memory."""
    before, begun = memory(), time.perf_counter()
    yield
    seconds = time.perf_counter() - begun
    figures[what] = (memory() - before) / MANY
    took = "" if tracemalloc.is_tracing() else f", {seconds / MANY * 1e6:.0f} µs"
    print(f"\n{what}: {figures[what]:.0f} bytes{took}", end="")


def traced() -> int:
    return tracemalloc.get_traced_memory()[0]


def session(number: int) -> Kept:
    """One with three rooms, a little data of the application, and as many pauses as are noted."""
    kept = Kept(f"{number:020}", "/", HERE, EPOCH)
    for room in range(3):
        kept.enter(f"room {room}", HERE)
    kept.data = {"name": f"user {number}"}
    for pause in range(MOST_PAUSES):
        kept.sends(str(at := Position(HERE.ms + pause * 20_000, number)), at)
    return kept


def test_sessions_and_events_take_what_the_documentation_says(bus: Bus) -> None:
    client: Any = bus.client
    in_redis = lambda: int(client.info("memory")["used_memory"])  # noqa: E731
    address = Address(bus.url, "stickyring")
    append, header = client.register_script(APPEND), header_of("/", "club", None)
    figures: dict[str, float] = {}
    tracemalloc.start()
    try:
        with cost("a session in a node", traced, figures):
            kept = {("/", one.sid): one for one in map(session, range(MANY))}
            by_pid = {one.pid: one for one in kept.values()}
        outbox = Outbox(ORIGIN)
        with cost("an event of 200 bytes that waits in a node", traced, figures):
            for number in range(MANY):
                text, attachments = encode(["said", f"{TEXT}{number}"], Packet)
                outbox.put(EVENT, {**header}, text, attachments)
    finally:
        tracemalloc.stop()
    _, fields = outbox.unwritten()[0]
    counted = ENTRY_BYTES + sum(map(len, fields))
    print(f" (counted as {counted})", end="")
    with cost("a session in Redis", in_redis, figures):
        pipeline = client.pipeline(transaction=False)
        for one in by_pid.values():
            pipeline.eval(SAVE, 1, address.session(one.pid), ORIGIN, one.to_json(HERE), 180_000, 0)
        pipeline.execute()
    with cost("an event of 200 bytes in Redis", in_redis, figures):
        while entries := outbox.unwritten():
            append(keys=address.append_keys(ORIGIN), args=append_arguments(entries))
            outbox.wrote(entries[-1][0].number)
    assert client.xlen(address.stream) == MANY
    assert figures["a session in a node"] < 1600
    assert figures["a session in Redis"] < 950
    assert figures["an event of 200 bytes that waits in a node"] <= counted, "the bound of the outbox holds"
    assert figures["an event of 200 bytes in Redis"] < 400
