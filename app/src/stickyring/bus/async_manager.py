"""The bus of a `socketio.AsyncServer`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import redis
import socketio
import socketio.packet

from stickyring.bus.connection import (
    APPEND,
    AT_ONCE,
    BLOCK_MILLISECONDS,
    SAVE,
    SWAP,
    TIMEOUT_SECONDS,
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
    Entry,
    Event,
    decode,
    encode,
    event_of,
    header_of,
)
from stickyring.bus.kept import Kept, recover
from stickyring.bus.offset import BEGIN, Position
from stickyring.bus.outbox import Outbox
from stickyring.bus.router import AHEAD_SECONDS, Router
from stickyring.bus.settings import (
    CALLS_SECONDS,
    MARGIN_SECONDS,
    MOST_WAITING,
    RECOVERED,
    REFRESH_SECONDS,
    RETRY_SECONDS,
    SAVED_SECONDS,
    TICK_SECONDS,
    TRIM_SECONDS,
    Claim,
)

log = logging.getLogger(__name__)


@dataclass
class Saving:
    """A session to save: whether it has ended here, whether it is another process', and who waits for it."""

    kept: Kept
    gone: bool = False
    take: bool = False
    waiting: list[asyncio.Future[bool]] = field(default_factory=list)

    def text(self, router: Router) -> str:
        """Return what is saved; nothing if it is to be forgotten."""
        if self.gone and self.kept.leaves_for_good:
            return ""
        try:
            return self.kept.to_json(router.now, router.epoch)
        except (TypeError, ValueError) as error:
            log.warning("a session cannot be recovered", extra={"sid": self.kept.sid, "error": repr(error)})
            return ""


class AsyncManager(socketio.AsyncManager):
    """A client manager whose events reach the sessions of all nodes through a stream of Redis or Valkey.

    Each process reads the stream by position: after a pause it goes on where it was, in order, each event once. What it
    publishes waits in a bounded outbox until it has read it back. If the bus is away, it delivers its own events to its
    own sessions after AHEAD_SECONDS, and others get them when the bus is back.

    With `recovery`, a session whose client was away for at most so many seconds goes on at any node with its sid, rooms,
    data and the events that it has missed (Socket.IO's connection state recovery).
    """

    def __init__(self, address: Address, *, recovery: float = 0.0, most_entries: int) -> None:
        super().__init__()
        self._address = address
        self._recovery = recovery
        self._most_entries = most_entries
        self._redis = address.client(asyncio=True)
        self._append, self._swap = self._redis.register_script(APPEND), self._redis.register_script(SWAP)
        self.outbox = Outbox(secrets.token_hex(8))
        self.router = Router(self, self.outbox, recovers=recovery > 0)
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._wake, self._progress, self._ready, self._unsaved = (asyncio.Event() for _ in range(4))
        self._saving: dict[str, Saving] = {}
        self._calls: dict[int, tuple[float, Callable[..., Any]]] = {}
        self._away_since: float | None = None

    # What python-socketio calls.

    def set_server(self, server: Any) -> None:  # noqa: ANN401 - untyped
        """Take the server whose sessions these are."""
        super().set_server(server)
        if not self._recovery:
            return
        self._connect, self._disconnect = server._handle_connect, server._handle_disconnect
        self._send, self._save_session = server._send_packet, server.save_session
        server._handle_connect, server._handle_disconnect = self._handle_connect, self._handle_disconnect
        server._send_packet, server.save_session = self._send_packet, self._keep_session

    def initialize(self) -> None:
        """Start to read and write; python-socketio calls this before the first session."""
        super().initialize()
        self._start()

    async def emit(  # noqa: PLR0917 - as python-socketio's
        self,
        event: str,
        data: object,
        namespace: str | None = None,
        room: Any = None,  # noqa: ANN401 - as python-socketio's
        skip_sid: str | list[str] | None = None,
        callback: Callable[..., Any] | None = None,
        to: Any = None,  # noqa: ANN401 - as python-socketio's
        **more: Any,  # noqa: ANN401 - as python-socketio's
    ) -> None:
        """Send an event to the sessions of all nodes.

        Raises:
            BusFullError: the bus is away, and too many events wait for it.
        """
        room = to or room
        if more.get("ignore_queue"):
            await super().emit(event, data, namespace or "/", room, skip_sid, callback)
            return
        if callback is not None and room is None:
            raise ValueError("an acknowledgement is for one session: name its room")
        header = header_of(namespace, room, skip_sid)
        if callback is not None:
            header["i"] = self._expect(callback)
        text, attachments = encode(event_of(event, data), self.server.packet_class)
        await self._publish(EVENT if callback is None else CALL, header, text, attachments)

    async def can_disconnect(self, sid: str, namespace: str | None) -> bool:
        """Return whether a session is here; ask its node to disconnect it otherwise."""
        if self.is_connected(sid, namespace or "/"):
            await self._settle()
            return bool(self.is_connected(sid, namespace or "/"))
        await self._publish(DISCONNECT, {"n": namespace or "/", "s": sid})
        return False

    async def enter_room(self, sid: str, namespace: str, room: Hashable, eio_sid: str | None = None) -> None:
        """Add a session to a room, on whatever node it is."""
        if not self._is_here(sid, namespace):
            await self._publish(ENTER, {"n": namespace, "s": sid, "r": room})
            return
        await self._settle()
        self.basic_enter_room(sid, namespace, room, eio_sid=eio_sid)
        if (kept := self.router.kept.get((namespace, sid))) is not None:
            kept.enter(room, self.router.now)
            if kept.held is None:
                await self._saved(kept)

    async def leave_room(self, sid: str, namespace: str, room: Hashable) -> None:
        """Remove a session from a room, on whatever node it is."""
        if not self._is_here(sid, namespace):
            await self._publish(LEAVE, {"n": namespace, "s": sid, "r": room})
            return
        await self._settle()
        self._leave(sid, namespace, room)

    async def close_room(self, room: Hashable, namespace: str | None = None) -> None:
        """Remove all sessions of all nodes from a room."""
        await self._publish(CLOSE, {"n": namespace or "/", "r": room})

    async def pre_connect(self, eio_sid: str, namespace: str) -> str | None:
        """Begin a session, or go on with one."""
        kept = self.router.arriving.pop((eio_sid, namespace), None)
        if kept is None:
            sid: str | None = await super().pre_connect(eio_sid, namespace)
            if sid is not None and self._recovery and self._ready.is_set():
                self.router.kept[namespace, sid] = Kept(sid, namespace, self.router.now)
            return sid
        for room in (None, kept.sid, *kept.rooms):
            self.basic_enter_room(kept.sid, namespace, room, eio_sid=eio_sid)
        self.pending_connect.setdefault(namespace, []).append(kept.sid)
        self.server.eio.sockets[eio_sid].session[namespace] = kept.data
        self.router.kept[namespace, kept.sid] = kept
        return kept.sid

    def basic_disconnect(self, sid: str, namespace: str, **more: object) -> None:
        """Forget a session; keep what is needed to go on with it elsewhere, unless it has ended for good."""
        super().basic_disconnect(sid, namespace, **more)
        if (kept := self.router.kept.pop((namespace, sid), None)) is not None:
            self._save(kept, gone=True)

    # Publishing.

    async def _publish(
        self, kind: str, header: dict[str, Any], text: str = "", attachments: tuple[bytes, ...] = ()
    ) -> None:
        self._start()
        if len(self.outbox) > MOST_WAITING and self._away_since is None:
            await self._settle()
        try:
            self.outbox.put(kind, header, text, attachments)
        except Exception:
            self.router.counts.refused += 1
            raise
        self.router.counts.published += 1
        self._wake.set()
        if self.router.alone:
            await self._go_ahead()

    async def _settle(self) -> None:
        """Wait until what this process has published is delivered to its own sessions."""
        number = self.outbox.last
        while self.router.delivered < number:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._progress.wait(), TICK_SECONDS)
            if self.router.alone:
                await self._go_ahead()

    async def _go_ahead(self) -> None:
        async with self._turn:
            for entry in self.router.entries_ahead():
                await self._handle(entry, None)
        self._note_progress()

    def _note_progress(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()

    def _expect(self, callback: Callable[..., Any]) -> int:
        now = time.monotonic()
        for number in [number for number, (end, _) in self._calls.items() if end < now]:
            del self._calls[number]
        number = secrets.randbits(48)
        self._calls[number] = now + CALLS_SECONDS, callback
        return number

    # Tasks.

    def _start(self) -> None:
        if not self._tasks:
            for loop in (self._read, self._write, self._keep_sessions, self._watch):
                self._run(loop())

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _trying(self, what: Callable[[], Awaitable[None]]) -> None:
        """Do something with the bus for ever, again and again while it is away."""
        while True:
            try:
                await what()
            except (redis.RedisError, OSError, TimeoutError) as error:
                self._note_outage(error)
            except Exception:
                log.exception("the bus: an error of this process")
            await asyncio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.0))

    def _note_outage(self, error: Exception) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            self.router.counts.outages += 1
            log.warning("the bus is away", extra={"error": f"{type(error).__name__}: {error}"})

    def _note_return(self) -> None:
        if self._away_since is not None:
            log.warning("the bus is back", extra={"seconds": round(time.monotonic() - self._away_since, 1)})
            self._away_since = None

    async def _read(self) -> None:
        await self._trying(self._read_on)

    async def _read_on(self) -> None:
        """Read the stream from where this process is, until the bus is away."""
        await self._meet()
        router, stream = self.router, self._address.stream
        while True:
            reply = await self._redis.xread({stream: str(router.now)}, count=AT_ONCE, block=BLOCK_MILLISECONDS)
            for position, entry in parsed(reply):
                async with self._turn:
                    if router.arrives(position, entry):
                        await self._handle(entry, position)
                self._note_progress()

    async def _meet(self) -> None:
        """Find this process' place in the stream, and whether the stream has lost what was not read."""
        router, address = self.router, self._address
        _, epoch, place, last = await (
            self._redis.pipeline(transaction=True)
            .set(address.epoch, secrets.token_hex(8), nx=True)
            .get(address.epoch)
            .xrange(address.stream, str(router.now), str(router.now))
            .xrevrange(address.stream, count=1)
            .execute()
        )
        end = end_of(last)
        if router.position is None:
            router.position, router.epoch = end, epoch.decode()
        elif epoch.decode() != router.epoch or (not place and router.position != BEGIN):
            await self._note_hole(end)
        self.outbox.rewrite()
        self._wake.set()
        self._ready.set()
        self._note_return()

    async def _note_hole(self, end: Position) -> None:
        """The stream has lost entries: all sessions here may have missed some, and are to know."""
        router, address = self.router, self._address
        epoch = await self._swap(keys=[address.epoch], args=[router.epoch, secrets.token_hex(8)])
        router.counts.holes += 1
        log.error("the bus has lost events", extra={"position": str(router.now), "end": str(end)})
        router.position, router.epoch = end, epoch.decode()
        for (namespace, sid), kept in [*router.kept.items()]:
            kept.leaves_for_good = True
            del router.kept[namespace, sid]
            self._save(kept, gone=True)
            self._run(self._end(sid, namespace))

    async def _end(self, sid: str, namespace: str) -> None:
        """End the connection of a session, so that its client connects again."""
        engine_sid = self.eio_sid_from_sid(sid, namespace)
        socket = self.server.eio.sockets.get(engine_sid)
        if socket is not None:
            await socket.close(wait=False, abort=True, reason=self.server.reason.TRANSPORT_CLOSE)

    async def _write(self) -> None:
        await self._trying(self._write_on)

    async def _write_on(self) -> None:
        while True:
            self._wake.clear()
            if entries := self.outbox.unwritten():
                await self._append(keys=self._address.append_keys(self.outbox.origin), args=append_arguments(entries))
                self.outbox.wrote(entries[-1][0].number)
            else:
                await self._wake.wait()

    async def _watch(self) -> None:
        """Deliver own events if the bus is away; look after the stream's length and history."""
        trimmed = time.monotonic()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if self.outbox.age > AHEAD_SECONDS:
                await self._go_ahead()
            if time.monotonic() - trimmed > TRIM_SECONDS and self._away_since is None and self._ready.is_set():
                trimmed = time.monotonic()
                with contextlib.suppress(redis.RedisError, OSError, TimeoutError):  # the reader tells
                    await self._tend()

    async def _tend(self) -> None:
        router, address = self.router, self._address
        epoch, length = await self._redis.pipeline().get(address.epoch).xlen(address.stream).execute()
        if epoch is not None and epoch.decode() != router.epoch:
            await self._note_hole(router.now)
        share = min(1.0, self._most_entries / max(1, length))
        kept = (self._recovery + REFRESH_SECONDS + MARGIN_SECONDS) * 1000 * share
        floor = Position(max(0, router.now.ms - int(kept)), 0)
        if floor > BEGIN:
            await (
                self._redis.pipeline(transaction=True)
                .set(address.floor, str(floor))
                .xtrim(address.stream, minid=str(floor), approximate=True)
                .execute()
            )
        for one in router.kept.values():
            one.forget_before(floor)

    # Delivery.

    async def _handle(self, entry: Entry, position: Position | None) -> None:
        """Do here what an entry says; no handler of the application may run in this turn."""
        try:
            match entry.kind:
                case "event":
                    for engine_sid, packets in self.router.sendings(entry, position):
                        await self._send_all(engine_sid, packets)
                case "call":
                    await self._ask(entry)
                case "answer":
                    if entry.header["o"] == self.outbox.origin:
                        self._run(self._answer(entry))
                case _:
                    self._do(entry)
        except Exception:
            log.exception("an entry of the bus was not handled", extra={"kind": entry.kind})

    async def _send_all(self, engine_sid: str, packets: Iterable[Any]) -> None:
        for packet in packets:
            try:
                await self.server._send_eio_packet(engine_sid, packet)
            except Exception as error:  # its session has just ended
                log.debug("not sent", extra={"sid": engine_sid, "error": repr(error)})
                break

    async def _ask(self, entry: Entry) -> None:
        event, header = Event(entry, self.server.packet_class), entry.header
        for sid, engine_sid in [*self.get_participants(header["n"], header.get("r"))]:
            if sid not in header.get("x", ()):
                number = self._generate_ack_id(sid, partial(self._answered, entry.origin, header["i"]))
                await self._send_all(engine_sid, event.with_id(number))

    async def _answered(self, origin: str, number: int, *answer: object) -> None:
        text, attachments = encode([*answer], self.server.packet_class)
        await self._publish(ANSWER, {"o": origin, "i": number}, text, attachments)

    async def _answer(self, entry: Entry) -> None:
        _, callback = self._calls.pop(entry.header["i"], (0, None))
        if callback is not None:
            result = callback(*decode(entry, self.server.packet_class))
            if asyncio.iscoroutine(result):
                await result

    def _do(self, entry: Entry) -> None:
        header = entry.header
        namespace, sid, room = header["n"], header.get("s", ""), header.get("r")
        if entry.kind == CLOSE:
            for one, _ in [*self.get_participants(namespace, room)]:
                self._leave(one, namespace, room)
        elif not self._is_here(sid, namespace):
            return
        elif entry.kind == DISCONNECT:
            self._run(self.server.disconnect(sid, namespace=namespace, ignore_queue=True))
        elif entry.kind == ENTER:
            self.basic_enter_room(sid, namespace, room)
            if (kept := self.router.kept.get((namespace, sid))) is not None:
                kept.enter(room, self.router.now)
                self._save(kept)
        elif entry.kind == LEAVE:
            self._leave(sid, namespace, room)
        elif entry.kind == MOVED and entry.origin != self.outbox.origin:
            self.router.kept.pop((namespace, sid), None)
            self._run(self._end(sid, namespace))

    def _leave(self, sid: str, namespace: str, room: Hashable) -> None:
        self.basic_leave_room(sid, namespace, room)
        if (kept := self.router.kept.get((namespace, sid))) is not None:
            kept.leave(room, self.router.now)
            self._save(kept)

    def _is_here(self, sid: str, namespace: str) -> bool:
        return bool(self.is_connected(sid, namespace) or self.is_pre_connected(sid, namespace))

    # Recovery.

    async def _handle_connect(self, eio_sid: str, namespace: str | None, data: Any) -> None:  # noqa: ANN401
        namespace = namespace or "/"
        claim, data = Claim.of(data)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ready.wait(), SAVED_SECONDS)
        kept = await self._claim(claim, namespace) if claim is not None else None
        self.server.environ[eio_sid][RECOVERED] = kept is not None
        if kept is not None:
            self.router.arriving[eio_sid, namespace] = kept
        await self._connect(eio_sid, namespace, data)

    async def _claim(self, claim: Claim, namespace: str) -> Kept | None:
        """Return the session that a client claims, with what it has missed; None if it cannot go on."""
        try:
            # Not wait_for(), after which others would have a turn.
            async with asyncio.timeout(TIMEOUT_SECONDS):
                kept, reason = await self._find(claim, namespace)
        except (redis.RedisError, OSError, TimeoutError):
            kept, reason = None, "bus"
        counts = self.router.counts
        if kept is None:
            counts.not_recovered[reason] = counts.not_recovered.get(reason, 0) + 1
        else:
            counts.recovered += 1
        return kept

    async def _find(self, claim: Claim, namespace: str) -> tuple[Kept | None, str]:
        """Return the claimed session; else None and the reason. Nothing is waited for after its place is known."""
        address, router = self._address, self.router
        for (_, sid), old in [*router.kept.items()]:
            if old.pid == claim.pid:
                # Its client has left without a word.
                await self._end(sid, namespace)
        if (saving := self._saving.get(claim.pid)) is not None:
            await self._saved(saving.kept, gone=saving.gone)
        text, epoch = await (
            self._redis.pipeline(transaction=True).hget(address.session(claim.pid), "s").get(address.epoch).execute()
        )
        if text is None:
            return None, "unknown"
        found = recover(text, claim.pid, claim.offset, (epoch or b"").decode())
        if found is None or found[0].namespace != namespace:
            return None, "history"
        kept, start = found
        reached, missed = start, []
        await self._publish(MOVED, {"n": namespace, "s": kept.sid})
        while True:
            page, floor, first, last = await (
                self._redis.pipeline(transaction=True)
                .xrange(address.stream, f"({reached}", "+", count=AT_ONCE)
                .get(address.floor)
                .xrange(address.stream, count=1)
                .xrevrange(address.stream, count=1)
                .execute()
            )
            if floor is not None and start < Position.parse(floor) and start < end_of(first):
                return None, "trimmed"
            if end_of(last) < start:
                return None, "history"
            for reached, entry in parsed(page):
                router.saw(entry)
                if kept.replay(entry, reached):
                    missed.append((reached, entry))
            if len(page) < AT_ONCE and reached >= router.now:
                router.go_on(kept, missed, reached)
                return kept, ""

    async def _send_packet(self, eio_sid: str, packet: Any) -> None:  # noqa: ANN401 - untyped
        """Send a packet; with a CONNECT, what its client needs to go on, and what it has missed."""
        kept = None
        if packet.packet_type == socketio.packet.CONNECT:
            kept = self.router.kept.get((packet.namespace or "/", packet.data["sid"]))
        if kept is None:
            await self._send(eio_sid, packet)
            return
        if await self._saved(kept, take=kept.recovered):
            packet.data["pid"] = kept.pid
        for packets in kept.missed:
            await self._send_all(eio_sid, packets)
        kept.missed.clear()
        await self._send(eio_sid, packet)
        while kept.held:
            await self._send_all(eio_sid, kept.held.pop(0))
        kept.held = None

    async def _handle_disconnect(self, eio_sid: str, namespace: str | None, reason: str | None = None) -> None:
        namespace = namespace or "/"
        kept = self.router.kept.get((namespace, self.sid_from_eio_sid(eio_sid, namespace)))
        if kept is not None:
            # Only a DISCONNECT comes while the connection is open.
            socket = self.server.eio.sockets.get(eio_sid)
            kept.leaves_for_good = socket is not None and not (socket.closing or socket.closed)
        await self._disconnect(eio_sid, namespace, reason)

    async def _keep_session(self, sid: str, session: dict[str, Any], namespace: str | None = None) -> None:
        await self._save_session(sid, session, namespace)
        if (kept := self.router.kept.get((namespace or "/", sid))) is not None:
            kept.data = session
            if kept.held is None:
                await self._saved(kept)

    def _save(self, kept: Kept, *, gone: bool = False, take: bool = False) -> Saving:
        saving = self._saving.setdefault(kept.pid, Saving(kept))
        saving.gone |= gone
        saving.take |= take
        self._unsaved.set()
        return saving

    async def _saved(self, kept: Kept, *, gone: bool = False, take: bool = False) -> bool:
        """Save a session; return whether the bus has it."""
        saving = self._save(kept, gone=gone, take=take)
        if self._away_since is not None:
            return False
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        saving.waiting.append(done)
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(done, SAVED_SECONDS)
        return False

    async def _keep_sessions(self) -> None:
        await self._trying(self._keep_on)

    async def _keep_on(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._unsaved.wait(), 1.0)
            self._unsaved.clear()
            stale = time.monotonic() - REFRESH_SECONDS
            for kept in self.router.kept.values():
                if kept.held is None and kept.saved_at < stale:
                    self._save(kept)
            saving, self._saving = self._saving, {}
            try:
                await self._write_sessions([*saving.values()])
            except BaseException:
                self._saving = saving | self._saving
                raise

    async def _write_sessions(self, saving: list[Saving]) -> None:
        router, pipeline, now = self.router, self._redis.pipeline(transaction=False), time.monotonic()
        if not saving:
            return
        for one in saving:
            text = one.text(router)
            seconds = self._recovery + (0 if one.gone else REFRESH_SECONDS)
            arguments = [self.outbox.origin, text, int(seconds * 1000), int(one.take)]
            pipeline.eval(SAVE, 1, self._address.session(one.kept.pid), *arguments)
        for one, answer in zip(saving, await pipeline.execute(), strict=True):
            one.kept.saved_at = now
            for done in one.waiting:
                if not done.done():
                    done.set_result(bool(answer))
