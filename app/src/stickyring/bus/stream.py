"""A process at the stream: what it publishes, what it reads, and what it does to its sessions because of it."""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable
from functools import partial
from typing import Any

import redis

from stickyring.bus.check import explain
from stickyring.bus.connection import (
    APPEND,
    AT_ONCE,
    BLOCK_MILLISECONDS,
    SWAP,
    TRIM,
    Address,
    append_arguments,
    end_of,
    parsed,
)
from stickyring.bus.entry import (
    ANSWER,
    CALL,
    CLOSE,
    DISCONNECT,
    ENTER,
    EVENT,
    LEAVE,
    MOVED,
    WHO,
    Encoded,
    Entry,
    decode,
    encode,
)
from stickyring.bus.offset import BEGIN, Position
from stickyring.bus.outbox import BusFullError, Outbox
from stickyring.bus.presence import Presence
from stickyring.bus.recovery import Recovery
from stickyring.bus.router import AHEAD_SECONDS, Router
from stickyring.bus.waiting import Waiting, settle

log = logging.getLogger(__name__)

AWAY = (redis.RedisError, OSError, TimeoutError)
"""What is raised when the bus is away, or refuses."""
MOST_WAITING = 1000
"""A caller of `emit` waits while so many events are on the way to a bus that is there."""
CALLS_SECONDS = 600.0
"""How long an acknowledgement is expected."""
TICK_SECONDS = 0.2
TRIM_SECONDS = 5.0
RETRY_SECONDS = 0.5


class Stream:
    """The stream of Redis or Valkey, for the client manager of one Socket.IO server.

    Each process reads it by position: after a pause it goes on where it was, in order, each event once. What it
    publishes waits in a bounded outbox until it has read it back. If the bus is away, the process delivers its own
    events to its own sessions after AHEAD_SECONDS, and others get them when the bus is back.

    `page`: how many entries are read at a time. `away_since`: since when the bus is away, on the monotonic clock; None
    while it is there. `met` is set once this process has its place in the stream.
    """

    def __init__(self, manager: Any, address: Address, wait: Waiting, *, recovery: float, most_entries: int) -> None:  # noqa: ANN401 - untyped
        self.manager = manager
        self.address = address
        self.wait = wait
        self.redis = address.client(asyncio=wait.asyncio)
        self._append, self._swap, self._trim = map(self.redis.register_script, (APPEND, SWAP, TRIM))
        self._most_entries = most_entries
        self.outbox = Outbox("")
        self.router = Router(manager, self.outbox, recovers=recovery > 0)
        self.recovery = Recovery(self, recovery)
        self.presence = Presence(self)
        self.met = wait.event()
        self.away_since: float | None = None
        self._turn, self._meeting = wait.lock(), wait.lock()
        self._written, self._progress = wait.event(), wait.event()
        self._calls: dict[int, tuple[float, Callable[..., Any]]] = {}
        self.page = AT_ONCE
        self._outgoing: deque[tuple[str, list[Any]]] = deque()
        self._sender: object = None
        self._started = False

    def start(self) -> None:
        """Begin to read and write, once."""
        if not self._started:
            self._started = True
            # Not earlier: the application may be loaded before its process forks.
            self.outbox.origin = secrets.token_hex(8)
            for task in (self._read_on, self._write_on, *([self.recovery.save_on] if self.recovery.seconds else [])):
                self.wait.spawn(self._again_and_again(task, meets=True))
            for task in (self._go_ahead_on, self._tend_on):
                self.wait.spawn(self._again_and_again(task, meets=False))

    # Publishing.

    async def publish(
        self, kind: str, header: dict[str, Any], text: str = "", attachments: tuple[bytes, ...] = ()
    ) -> None:
        """Publish an entry.

        Raises:
            BusFullError: the bus is away, and too many entries wait for it.
        """
        self.start()
        if len(self.outbox) > MOST_WAITING and self.away_since is None:
            await self.deliver_own()
        try:
            self.outbox.put(kind, header, text, attachments)
        except BusFullError:
            self.router.counts.refused += 1
            raise
        self.router.counts.published += 1
        self._written.set()
        if self.router.alone:
            await self._go_ahead()

    async def deliver_own(self) -> None:
        """Wait until what this process has published is delivered to its own sessions."""
        number = self.outbox.last
        while self.router.delivered < number or self._sender not in {None, self.wait.current()}:
            await self._progress.wait(TICK_SECONDS)
            if self.router.alone:
                await self._go_ahead()

    async def _go_ahead(self) -> None:
        async with self._turn:
            for entry in self.router.entries_ahead():
                self._handle(entry, None)
        await self._send_out()

    async def _send_out(self) -> None:
        """Send what is to be sent, in order, by one task at a time.

        To find that a client has left, its connection is closed here, and the application's disconnect handler runs,
        which may publish something itself: that comes next.
        """
        if self._sender is None:
            self._sender = self.wait.current()
            try:
                while self._outgoing:
                    await self.send(*self._outgoing.popleft())
            finally:
                self._sender = None
        self._note_progress()

    def _note_progress(self) -> None:
        self._progress.set()
        self._progress = self.wait.event()

    def expect(self, callback: Callable[..., Any]) -> int:
        """Return the id of a call whose acknowledgement `callback` gets."""
        now = time.monotonic()
        while self._calls and self._calls[oldest := next(iter(self._calls))][0] < now:
            del self._calls[oldest]
        number = secrets.randbits(48)
        self._calls[number] = now + CALLS_SECONDS, callback
        return number

    # What runs all the time.

    async def _again_and_again(self, what: Callable[[], Awaitable[None]], *, meets: bool) -> None:
        """Do something for ever; after a failure with the bus, only once the bus is back, for those that `meets`."""
        while True:
            try:
                if meets:
                    await self._meet()
                await what()
            except AWAY as error:
                if self.away_since is None:
                    self.away_since = time.monotonic()
                    self.router.counts.outages += 1
                    log.warning("the bus is away", extra={"error": explain(error)})
                    await self._close_idle()
            except Exception:
                log.exception("the bus is not served because of an error here")
            await self.wait.sleep(RETRY_SECONDS * random.uniform(0.5, 1.0))

    async def _close_idle(self) -> None:
        """Close idle connections to a bus that is away: they are broken too, and each would fail once."""
        try:
            await settle(self.redis.connection_pool.disconnect(inuse_connections=False))
        except AWAY as error:
            # With TLS, a peer that does not answer does not close them either.
            log.debug("a connection was not closed in good order", extra={"error": repr(error)})

    async def _read_on(self) -> None:
        """Read the stream from where this process is, until the bus is away."""
        router, stream = self.router, self.address.stream
        while True:
            before = router.now
            # Fewer after a failure: the bus may send at most so many bytes at a time.
            count, self.page = self.page, max(1, self.page // 2)
            pipeline = self.redis.pipeline(transaction=False)
            pipeline.xread({stream: str(before)}, count=count, block=BLOCK_MILLISECONDS)
            pipeline.get(self.address.epoch)
            read, epoch = await settle(pipeline.execute())
            self.page = min(AT_ONCE, count * 2)
            if (epoch or b"").decode() != router.epoch:
                # The bus was replaced while this process was busy, and redis-py has connected again by itself.
                await self._meet()
                continue
            entries = parsed(read)
            if self.address.replicated:
                await self.replicated(self.redis.pipeline(transaction=False), entries[-1][0] if entries else before)
            for position, entry in entries:
                async with self._turn:
                    if router.now != before:
                        # Meanwhile, another task has found that the stream has lost entries.
                        break
                    before = position
                    self.recovery.remember(position, entry)
                    if router.arrives(position, entry):
                        self._handle(entry, position)
                await self._send_out()

    async def replicated(self, pipeline: Any, position: Position) -> list[Any]:  # noqa: ANN401 - one of two classes
        """Return the answers to a pipeline once a replica has all that it has read, if the bus has replicas.

        What nobody has read may be lost with the primary: it is still in the outbox of its process.

        Raises:
            redis.RedisError: this is no primary with a replica any more.
        """
        if self.address.replicated:
            # A server waits for the replication of what the same connection has written.
            pipeline.set(self.address.reached, str(position))
        self.address.add_wait(pipeline)
        answers: list[Any] = self.address.confirmed(await settle(pipeline.execute()))
        return answers

    async def _meet(self) -> None:
        """Find this process' place in the stream, and whether the stream has lost what it has not read."""
        router, address = self.router, self.address
        async with self._meeting:
            # The reader may go on meanwhile.
            asked, read_back = router.position, self.outbox.read
            pipeline = self.redis.pipeline(transaction=True)
            pipeline.set(address.epoch, secrets.token_hex(8), nx=True)
            pipeline.get(address.epoch)
            pipeline.xrange(address.stream, str(asked or BEGIN), str(asked or BEGIN))
            pipeline.xrevrange(address.stream, count=1)
            pipeline.get(address.written(self.outbox.origin))
            # Others wait for its answers to what they ask from here on.
            self.presence.sign(pipeline)
            _, epoch, place, last, written, signed = await settle(pipeline.execute())
            # Of what this process has read back, it has all: else others may have missed it.
            whole = written is None or int(written) >= read_back
            if asked is None:
                router.position, router.epoch = end_of(last), epoch.decode()
                self.recovery.begin_at(router.now)
                for kept in router.kept.values():
                    kept.began, kept.epoch = router.now, router.epoch
            elif epoch.decode() != router.epoch or (not place and asked != BEGIN) or not whole:
                await self._note_hole(end_of(last))
        await self.presence.forget_ended(signed)
        self.outbox.rewrite()
        self._written.set()
        self.met.set()
        if self.away_since is not None:
            log.warning("the bus is back", extra={"seconds": round(time.monotonic() - self.away_since, 1)})
            self.away_since = None

    async def _note_hole(self, end: Position) -> None:
        """Go on at the end of a stream that has lost entries; sessions here that may have missed some are to know."""
        router, address = self.router, self.address
        epoch = await settle(self._swap(keys=[address.epoch], args=[router.epoch, secrets.token_hex(8)]))
        router.counts.holes += 1
        log.error("the bus has lost events", extra={"position": str(router.now), "end": str(end)})
        router.go_on_at(end, epoch.decode())
        self.outbox.note_loss()
        self.recovery.begin_at(end)
        self.recovery.give_up()
        if self.manager.on_loss is not None:
            self.wait.spawn(self._tell_of_loss())

    async def _tell_of_loss(self) -> None:
        await settle(self.manager.on_loss())

    async def _write_on(self) -> None:
        while True:
            if entries := self.outbox.unwritten():
                keys = self.address.append_keys(self.outbox.origin)
                positions = await settle(self._append(keys=keys, args=append_arguments(entries)))
                self.outbox.wrote(entries[-1][0].number, positions)
            elif await self._written.wait(TICK_SECONDS):
                self._written = self.wait.event()

    async def _go_ahead_on(self) -> None:
        """Deliver own events if the bus is away."""
        while True:
            await self.wait.sleep(TICK_SECONDS)
            if self.outbox.age > AHEAD_SECONDS:
                await self._go_ahead()

    async def _tend_on(self) -> None:
        """Give signs of life, and look after the length and the history of the stream, also if its memory is full."""
        while True:
            await self.wait.sleep(TRIM_SECONDS)
            if self.met.is_set():
                await self._tend()

    async def _tend(self) -> None:
        router, address = self.router, self.address
        pipeline = self.redis.pipeline(transaction=True)
        pipeline.get(address.epoch)
        self.presence.sign(pipeline)
        epoch, signed = await settle(pipeline.execute())
        await self.presence.forget_ended(signed)
        if epoch is None or epoch.decode() != router.epoch:
            await self._meet()
        floor = Position(router.now.ms - int(self.recovery.kept_seconds * 1000), 0)
        if floor > BEGIN:
            await settle(self._trim(keys=[address.floor, address.stream], args=[str(floor), self._most_entries]))
            self.recovery.forget_before(floor)

    # Delivery.

    def _handle(self, entry: Entry, position: Position | None) -> None:
        """Do here what an entry says; `_send_out` sends, because handlers of the application may run then."""
        try:
            if entry.kind == EVENT:
                self._outgoing += self.router.sendings(entry, position)
            elif entry.kind == CALL:
                self._call(entry)
            elif entry.kind == WHO:
                self.presence.answer(entry)
            elif entry.kind == ANSWER:
                if entry.header["o"] == self.outbox.origin:
                    self.wait.spawn(self._answer(entry))
            else:
                self._do(entry)
        except Exception:
            log.exception("an entry of the bus was not handled", extra={"kind": entry.kind})

    async def send(self, engine_sid: str, packets: Iterable[Any]) -> None:
        """Send packets to a session, which may have just ended."""
        for packet in packets:
            try:
                await settle(self.manager.server._send_eio_packet(engine_sid, packet))
            except Exception as error:
                log.debug("not sent", extra={"sid": engine_sid, "error": repr(error)})
                break

    def _call(self, entry: Entry) -> None:
        manager, header = self.manager, entry.header
        event = Encoded(entry, manager.server.packet_class)
        for sid, engine_sid in [*manager.get_participants(header["n"], header["r"])]:
            kept = self.router.kept.get((header["n"], sid))
            if kept is not None and entry.lost_at <= kept.had:
                continue
            if sid not in header.get("x", ()):
                callback = partial(self.wait.function(self._answered), entry.origin, header["i"])
                self._outgoing.append((engine_sid, event.with_id(manager._generate_ack_id(sid, callback))))

    async def _answered(self, origin: str, number: int, *answer: object) -> None:
        text, attachments = encode([*answer], self.manager.server.packet_class)
        await self.publish(ANSWER, {"o": origin, "i": number}, text, attachments)

    async def _answer(self, entry: Entry) -> None:
        _, callback = self._calls.pop(entry.header["i"], (0, None))
        if callback is not None:
            await settle(callback(*decode(entry, self.manager.server.packet_class)))

    def _do(self, entry: Entry) -> None:
        header = entry.header
        namespace, sid, room = header["n"], header.get("s", ""), header.get("r")
        if entry.kind == CLOSE:
            for one, _ in [*self.manager.get_participants(namespace, room)]:
                self.leave(one, namespace, room)
        elif not self.is_here(sid, namespace):
            return
        elif entry.kind == DISCONNECT:
            self.wait.spawn(self._disconnect(sid, namespace))
        elif entry.kind == ENTER:
            self.enter(sid, namespace, room)
        elif entry.kind == LEAVE:
            self.leave(sid, namespace, room)
        elif entry.kind == MOVED and entry.origin != self.outbox.origin:
            self.recovery.give_away(sid, namespace)
            self.wait.spawn(self.end(sid, namespace))

    async def _disconnect(self, sid: str, namespace: str) -> None:
        await settle(self.manager.server.disconnect(sid, namespace=namespace, ignore_queue=True))

    def is_here(self, sid: str, namespace: str) -> bool:
        """Return whether a session is one of this process."""
        return bool(self.manager.is_connected(sid, namespace) or self.manager.is_pre_connected(sid, namespace))

    def enter(self, sid: str, namespace: str, room: Hashable, engine_sid: str | None = None) -> None:
        """Add a session of this process to a room."""
        self.manager.basic_enter_room(sid, namespace, room, eio_sid=engine_sid)
        if (kept := self.router.kept.get((namespace, sid))) is not None:
            kept.enter(room, self.router.now)
            self.recovery.save(kept)

    def leave(self, sid: str, namespace: str, room: Hashable) -> None:
        """Remove a session of this process from a room."""
        self.manager.basic_leave_room(sid, namespace, room)
        if (kept := self.router.kept.get((namespace, sid))) is not None:
            kept.leave(room, self.router.now)
            self.recovery.save(kept)

    async def end(self, sid: str, namespace: str) -> None:
        """End the connection of a session of this process, so that its client connects again."""
        socket = self.manager.server.eio.sockets.get(self.manager.eio_sid_from_sid(sid, namespace))
        if socket is not None:
            await settle(socket.close(wait=False, abort=True, reason=self.manager.server.reason.TRANSPORT_CLOSE))
