"""Socket.IO's connection state recovery: sessions are stored ahead, and any node goes on with them."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import redis
import socketio.packet

from stickyring.bus.connection import SAVE, end_of, parsed
from stickyring.bus.entry import MOVED, Entry
from stickyring.bus.kept import Kept, new_pid, recover
from stickyring.bus.offset import BEGIN, Offset, Position
from stickyring.bus.recent import MOST_ENTRIES, Recent
from stickyring.bus.waiting import Event, settle

if TYPE_CHECKING:
    from stickyring.bus.stream import Stream

log = logging.getLogger(__name__)

RECOVERED = "stickyring.recovered"
"""In the environ of a `connect` handler: whether its client goes on with the session that it had."""
REFRESH_SECONDS = 60.0
"""After so long a session is saved again, though nothing but its place in the stream has changed."""
MARGIN_SECONDS = 30.0
"""Events stay in the stream for the time of recovery, that of a refresh, and this."""
SAVED_SECONDS = 0.8
"""How long a client that connects, or a handler that enters a room, waits for the bus. python-socketio's client waits a
second for the answer when it reconnects."""
FAILOVER_SECONDS = 10.0
"""How long a client that comes back waits for a bus that went away, from then on: another host may take over."""
LOOK_SECONDS = 1.0
WAIT_SECONDS = 0.05
"""Until a process that has lost its place in the stream finds it again."""


@dataclass(frozen=True)
class Claim:
    """What a client sends with CONNECT to go on with its session (socket.io 4.6 and later).

    `offset` is that of the last event that it has got, None before the first one.
    """

    pid: str
    offset: Offset | None

    @classmethod
    def of(cls, data: Any) -> tuple[Claim | None, Any]:  # noqa: ANN401 - the client's
        """Return the claim in the data of a CONNECT, None without a valid one, and the data without it."""
        if not (isinstance(data, dict) and isinstance(data.get("pid"), str)):
            return None, data
        rest = {name: value for name, value in data.items() if name not in {"pid", "offset"}} or None
        offset = data.get("offset")
        try:
            return cls(data["pid"], None if offset is None else Offset.parse(offset)), rest
        except (TypeError, ValueError):
            return None, rest


@dataclass(eq=False)
class Saving:
    """A session to save: whether it has ended here, and whether it is taken from another process.

    `done` is set once `saved` says whether the bus has it. It stands also for those `replaced`.
    """

    kept: Kept
    done: Event
    gone: bool = False
    take: bool = False
    saved: bool = False
    replaced: list[Saving] = field(default_factory=list)

    def finish(self, *, saved: bool) -> None:
        """Note whether it was saved, for those that wait for it."""
        for one in (self, *self.replaced):
            one.saved = saved
            one.done.set()

    def replace(self, other: Saving) -> None:
        """Do what another one, which has failed, was to do."""
        self.gone |= other.gone
        self.take |= other.take
        self.replaced += [other, *other.replaced]


class _FasterError(Exception):
    """An older connection of the same client, which has left it, has got its session."""


class Recovery:
    """Goes on with sessions whose clients were away for at most so many `seconds`; with 0, with none."""

    def __init__(self, stream: Stream, seconds: float) -> None:
        self.seconds = seconds
        self._stream = stream
        self._router = stream.router
        self._unsaved = stream.wait.event()
        self._saving: dict[str, Saving] = {}
        self._offsets: dict[tuple[str, str], Offset | None] = {}
        self._claimed_offsets: dict[tuple[str, str], Offset] = {}
        self._by_pid: dict[str, Kept] = {}
        self._recent, self._reading = Recent(), stream.wait.lock()
        self._claiming: dict[str, str] = {}
        """The newest connection that claims a session: the client has left the others, which may not be known yet."""

    @property
    def kept_seconds(self) -> float:
        """For how long events stay in the stream."""
        return self.seconds + REFRESH_SECONDS + MARGIN_SECONDS

    def wrap(self, server: Any) -> None:  # noqa: ANN401 - untyped
        """Put recovery around what a server does when clients connect and leave, and when it stores their data."""
        if not self.seconds:
            return
        self._connect, self._disconnect = server._handle_connect, server._handle_disconnect
        self._send, self._save_session = server._send_packet, server.save_session
        function = self._stream.wait.function
        server._handle_connect, server._handle_disconnect = function(self._on_connect), function(self._on_disconnect)
        server._send_packet, server.save_session = function(self._on_send), function(self._on_data)

    # Sessions begin and end.

    def begin(self, eio_sid: str, sid: str | None, namespace: str) -> None:
        """Keep a session that has begun."""
        has = self._offsets.pop((eio_sid, namespace), None)
        claimed = self._claimed_offsets.pop((eio_sid, namespace), None)
        if sid is not None and self.seconds:
            kept = Kept(sid, namespace, self._router.now, self._router.epoch, has=has)
            if claimed is not None:
                # Its client goes on to say what it has got in the session before, until it gets something in this one.
                kept.sent, kept.had = str(claimed), claimed.position
            self._keep(kept)

    def go_on(self, eio_sid: str, namespace: str) -> str | None:
        """Return the sid of the session with which a client that connects goes on, None for a new one."""
        kept = self._router.arriving.pop((eio_sid, namespace), None)
        manager = self._stream.manager
        socket = manager.server.eio.sockets.get(eio_sid)
        if kept is None or socket is None or socket.closed:
            return None
        for room in (None, kept.sid, *kept.rooms):
            manager.basic_enter_room(kept.sid, namespace, room, eio_sid=eio_sid)
        manager.pending_connect.setdefault(namespace, []).append(kept.sid)
        socket.session[namespace] = kept.data
        self._keep(kept)
        return kept.sid

    def _keep(self, kept: Kept) -> None:
        self._router.kept[kept.namespace, kept.sid] = kept
        self._by_pid[kept.pid] = kept

    def forget(self, sid: str, namespace: str) -> None:
        """Keep a session that has ended here only for other nodes, and not at all if its client has left for good."""
        kept = self._router.kept.pop((namespace, sid), None)
        if kept is not None and self._by_pid.get(kept.pid) is kept:
            del self._by_pid[kept.pid]
            kept.ended = self._router.now
            self.save(kept, gone=True)

    def give_away(self, sid: str, namespace: str) -> None:
        """Send nothing more to a session with which another process goes on, and do not save it."""
        if (kept := self._router.kept.get((namespace, sid))) is not None:
            kept.given_up = True
            self._by_pid.pop(kept.pid, None)

    def give_up(self) -> None:
        """End all sessions: their clients, which may have missed events, get new ones, and know it."""
        for (namespace, sid), kept in [*self._router.kept.items()]:
            kept.given_up = True
            self.save(kept, gone=True)
            self._stream.wait.spawn(self._stream.end(sid, namespace))

    def is_saved(self, eio_sid: str) -> bool:
        """Return whether the bus has a session of this connection."""
        manager, kept = self._stream.manager, self._router.kept
        sessions = [kept.get((name, manager.sid_from_eio_sid(eio_sid, name))) for name in [*manager.get_namespaces()]]
        return any(one is not None and one.saved_at for one in sessions)

    def remember(self, position: Position, entry: Entry) -> None:
        """Keep an entry that this process has read, for those who come back."""
        if self.seconds:
            self._recent.add(position, entry)

    def begin_at(self, position: Position) -> None:
        """Note where this process begins to read."""
        self._recent.restart(position)

    def forget_before(self, floor: Position) -> None:
        """Forget what is only about events that the stream does not have any more."""
        for kept in self._router.kept.values():
            kept.forget_before(floor)

    async def _on_connect(self, eio_sid: str, namespace: str | None, data: Any) -> None:  # noqa: ANN401
        namespace = namespace or "/"
        claim, data = Claim.of(data)
        await self._stream.met.wait(SAVED_SECONDS)
        try:
            kept = None if claim is None else await self._claimed(claim, eio_sid, namespace)
            # From here to `go_on` or `begin`, no other task has a turn.
            environ = self._stream.manager.server.environ.get(eio_sid)
            if environ is None:
                # It has left meanwhile.
                return
            environ[RECOVERED] = kept is not None
            if kept is not None:
                self._router.arriving[eio_sid, namespace] = kept
            await settle(self._connect(eio_sid, namespace, data))
        finally:
            self._offsets.pop((eio_sid, namespace), None)
            self._claimed_offsets.pop((eio_sid, namespace), None)
            self._router.arriving.pop((eio_sid, namespace), None)

    async def _on_disconnect(self, eio_sid: str, namespace: str | None, reason: str | None = None) -> None:
        namespace = namespace or "/"
        manager = self._stream.manager
        kept = self._router.kept.get((namespace, manager.sid_from_eio_sid(eio_sid, namespace)))
        if kept is not None:
            # Only a DISCONNECT comes while the connection is open.
            socket = manager.server.eio.sockets.get(eio_sid)
            kept.leaves_for_good = socket is not None and not (socket.closing or socket.closed)
        await settle(self._disconnect(eio_sid, namespace, reason))

    async def _on_data(self, sid: str, session: dict[str, Any], namespace: str | None = None) -> None:
        await settle(self._save_session(sid, session, namespace))
        if (kept := self._router.kept.get((namespace or "/", sid))) is not None:
            kept.data = session
            await self.saved(sid, kept.namespace)

    async def _on_send(self, eio_sid: str, packet: Any) -> None:  # noqa: ANN401 - untyped
        """Send a packet; with a CONNECT, what its client needs to go on later, and what it has missed."""
        kept = None
        if packet.packet_type == socketio.packet.CONNECT:
            kept = self._router.kept.get((packet.namespace or "/", packet.data["sid"]))
        if kept is None:
            await settle(self._send(eio_sid, packet))
            return
        if await self._save_now(kept, take=kept.recovered):
            self._router.counts.recovered += kept.recovered
        elif kept.recovered:
            self._count_lost("bus")
            # What the bus has of it is out of date: by another secret, its client knows that it is another session.
            self._by_pid.pop(kept.pid, None)
            kept.pid = new_pid()
            self._keep(kept)
            self.save(kept)
        packet.data["pid"] = kept.pid
        # First, unlike Node.js: socket.io-client keeps events that come before it, and its offset is that of the last
        # one that it has handled. If the connection is lost in between, it would get and handle them twice.
        await settle(self._send(eio_sid, packet))
        for packets in kept.missed:
            await self._stream.send(eio_sid, packets)
        kept.missed.clear()
        while kept.held:
            await self._stream.send(eio_sid, kept.held.pop(0))
        kept.held = None

    # A client comes back.

    async def _claimed(self, claim: Claim, eio_sid: str, namespace: str) -> Kept | None:
        """Return the session that a client claims, with what it has missed; None if it cannot go on."""
        # A new session of this client does not get what it has, if the bus has that later.
        self._offsets[eio_sid, namespace] = claim.offset
        if claim.offset is not None:
            self._claimed_offsets[eio_sid, namespace] = claim.offset
        self._claiming[claim.pid] = eio_sid
        try:
            kept, reason = await self._find_in_time(claim, eio_sid, namespace)
        finally:
            if self._claiming.get(claim.pid) == eio_sid:
                del self._claiming[claim.pid]
        if kept is None:
            self._count_lost(reason)
        else:
            del self._offsets[eio_sid, namespace]
        return kept

    async def _find_in_time(self, claim: Claim, eio_sid: str, namespace: str) -> tuple[Kept | None, str]:
        """Return the claimed session, or None and the reason, also if the bus is away for a while."""
        until = (self._stream.away_since or time.monotonic()) + FAILOVER_SECONDS
        while True:
            try:
                return await self._find(claim, eio_sid, namespace)
            except _FasterError:
                pass
            except (redis.RedisError, OSError, TimeoutError):
                if time.monotonic() > until:
                    return None, "bus"
                await self._stream.wait.sleep(LOOK_SECONDS / 2)

    def _count_lost(self, reason: str) -> None:
        counts = self._router.counts.not_recovered
        counts[reason] = counts.get(reason, 0) + 1
        log.info("a session was not recovered", extra={"reason": reason})

    async def _find(self, claim: Claim, eio_sid: str, namespace: str) -> tuple[Kept | None, str]:
        """Return the claimed session, or None and the reason; nothing is waited for once its place is known."""
        stream, router = self._stream, self._router
        address = stream.address
        if not stream.met.is_set():
            raise redis.ConnectionError("this process has not reached the bus yet")
        if (old := self._by_pid.get(claim.pid)) is not None:
            # Its client has left without a word.
            await stream.end(old.sid, old.namespace)
        if (saving := self._saving.get(claim.pid)) is not None:
            await saving.done.wait(SAVED_SECONDS)
        pipeline = stream.redis.pipeline(transaction=True)
        pipeline.hget(address.session(claim.pid), "s")
        pipeline.get(address.epoch)
        pipeline.xrevrange(address.stream, count=1)
        text, epoch, last = await settle(pipeline.execute())
        if claim.offset is not None and claim.offset.position > end_of(last):
            # Of a stream that is lost.
            self._offsets[eio_sid, namespace] = Offset(BEGIN, claim.offset.ahead)
        if text is None:
            return None, "unknown"
        kept = recover(text, claim.pid, claim.offset, (epoch or b"").decode())
        if kept is None or kept.namespace != namespace:
            return None, "history"
        if (namespace, kept.sid) in router.kept:
            # Given away, and not ended yet.
            await stream.end(kept.sid, namespace)
        await stream.publish(MOVED, {"n": namespace, "s": kept.sid})
        if (reason := await self._catch_up(kept, eio_sid)) == "ended":
            await settle(stream.redis.delete(address.session(kept.pid)))
        return (None, reason) if reason else (kept, "")

    async def _catch_up(self, kept: Kept, eio_sid: str) -> str:
        """Give a session what its client has missed; return why that is not possible, or nothing."""
        stream, router = self._stream, self._router
        address = stream.address
        # Its rooms may have changed after what is known of them, and before what it has missed.
        begin, end = min(kept.start, kept.seen), kept.seen if kept.has is None else max(kept.has.position, kept.seen)
        entries = await self._remembered(begin)
        while True:
            reached = entries[-1][0] if entries else begin
            # In this order, what changes in between is seen. A server does not wait for replicas in a transaction.
            pipeline = stream.redis.pipeline(transaction=False)
            size = stream.page
            pipeline.get(address.written(stream.outbox.origin))
            pipeline.xrange(address.stream, f"({reached}", "+", count=size)
            pipeline.get(address.floor)
            pipeline.xrange(address.stream, count=1)
            pipeline.xrange(address.stream, str(end), str(end))
            pipeline.get(address.epoch)
            answers = await stream.replicated(pipeline, reached)
            written, page, floor, first, at_end, epoch = answers[:6]
            if floor is not None and begin < Position.parse(floor) and begin < end_of(first):
                return "trimmed"
            if not (at_end or end == BEGIN) or not (epoch or b"").decode() == kept.epoch == router.epoch:
                # The bus has lost what came there, or after it.
                return "history"
            entries += parsed(page)
            reached = max(end, entries[-1][0]) if entries else end
            if self._claiming.get(kept.pid) != eio_sid:
                return "taken"
            if kept.pid in self._by_pid:
                raise _FasterError
            if len(page) < size and reached >= router.now:
                router.go_on(kept, entries, reached, int(written or 0))
                return "ended" if kept.disconnected else ""
            if not page:
                await stream.wait.sleep(WAIT_SECONDS)

    async def _remembered(self, begin: Position) -> list[tuple[Position, Entry]]:
        """Return the first entries after a position, which this process has, or reads once for all who come back."""
        stream, recent = self._stream, self._recent
        async with self._reading:
            missing: list[tuple[Position, Entry]] = []
            while begin < (since := recent.since):
                if stream.away_since is not None:
                    # Else each of them would wait for it here, one after another.
                    raise redis.ConnectionError("the bus is away")
                reached, size = missing[-1][0] if missing else begin, stream.page
                read = stream.redis.xrange(stream.address.stream, f"({reached}", str(since), count=size)
                page = parsed(await settle(read))
                missing += page
                if len(missing) >= MOST_ENTRIES:
                    return missing
                if len(page) < size and recent.since == since and not recent.extend(begin, missing):
                    return missing + recent.after(since)
            return recent.after(begin)

    # Saving.

    def save(self, kept: Kept, *, gone: bool = False, take: bool = False) -> Saving:
        """Save a session soon."""
        saving = self._saving.get(kept.pid)
        if saving is None:
            saving = self._saving[kept.pid] = Saving(kept, self._stream.wait.event())
        saving.gone |= gone
        saving.take |= take
        self._unsaved.set()
        return saving

    async def saved(self, sid: str, namespace: str) -> None:
        """Save a session and wait for it; before its client is told that it is connected, it is saved anyway."""
        kept = self._router.kept.get((namespace, sid))
        if kept is not None and kept.held is None:
            await self._save_now(kept)

    async def _save_now(self, kept: Kept, *, take: bool = False) -> bool:
        """Save a session; return whether the bus has it."""
        saving = self.save(kept, take=take)
        if self._stream.away_since is None or take:
            await saving.done.wait(FAILOVER_SECONDS if take else SAVED_SECONDS)
        return saving.saved

    async def save_on(self) -> None:
        """Save sessions that have changed, and each from time to time."""
        while True:
            if await self._unsaved.wait(LOOK_SECONDS):
                self._unsaved = self._stream.wait.event()
            stale = time.monotonic() - REFRESH_SECONDS
            for kept in self._router.kept.values():
                if kept.held is None and kept.saved_at < stale:
                    self.save(kept)
            saving, self._saving = self._saving, {}
            try:
                if saving:
                    await self._write([*saving.values()])
            except BaseException:
                for pid, one in saving.items():
                    if (newer := self._saving.setdefault(pid, one)) is not one:
                        newer.replace(one)
                raise

    async def _write(self, saving: list[Saving]) -> None:
        stream, now = self._stream, time.monotonic()
        pipeline = stream.redis.pipeline(transaction=False)
        given_away = [one for one in saving if not one.gone and self._by_pid.get(one.kept.pid) is not one.kept]
        saving = [one for one in saving if one not in given_away]
        for one in given_away:
            one.finish(saved=False)
        for one in saving:
            seconds = self.seconds + (0.0 if one.gone else REFRESH_SECONDS)
            arguments = [stream.outbox.origin, self._text(one), int(seconds * 1000), int(one.take)]
            pipeline.eval(SAVE, 1, stream.address.session(one.kept.pid), *arguments)
        stream.address.add_wait(pipeline)
        answers = stream.address.confirmed(await settle(pipeline.execute()))
        for one, answer in zip(saving, answers, strict=True):
            one.kept.saved_at = now
            one.finish(saved=bool(answer))

    def _text(self, saving: Saving) -> str:
        """Return what is saved; nothing if the session is to be forgotten."""
        kept = saving.kept
        if kept.given_up or (saving.gone and kept.leaves_for_good):
            return ""
        try:
            return kept.to_json(kept.ended or self._router.now)
        except (TypeError, ValueError) as error:
            log.warning("a session cannot be recovered", extra={"sid": kept.sid, "error": repr(error)})
            return ""
