"""The load: Socket.IO sessions on one epoll loop, cheap enough that the servers are the limit.

It implements Engine.IO protocol 4 and Socket.IO protocol 5 on bytes: frames are built and masked beforehand, and
answers are compared as bytes. Sessions are generators that yield whenever they wait for bytes.
"""

import errno
import itertools
import json
import os
import re
import select
import socket
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter

Session = Generator[None, None, None]

PATH = "/socket.io/?EIO=4&transport="
SUBSCRIBE = (
    "GET {path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: c3RpY2t5cmluZyBiZW5jaA==\r\nSec-WebSocket-Version: 13\r\n"
    "{offer}{cookie}\r\n"
)
COMPRESSION = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
"""The compression that browsers and the JavaScript client offer; a server may accept it (RFC 7692)."""
OPENING = 50
"""Sessions that open at the same time, fewer than any server's backlog."""
PATIENCE = 20.0
"""Maximum seconds without progress in a phase; a server that needs longer has failed."""
ANSWER_SECONDS = 5.0
READ_SIZE = 4096
SMALL = 126
TEXT, CLOSE = 0x81, 0x88
COMPRESSED = 0x40
SET_COOKIE = re.compile(rb"(?i)\r\nset-cookie: *([^;\r]*)")
DEFLATE_TAIL = b"\x00\x00\xff\xff"  # RFC 7692, 7.2.2
MASK = b"\x37\xfa\x21\x3d"


class LoadError(Exception):
    """A server does not do what is measured; the text is one line."""


def masked(payload: bytes, opcode: int = TEXT) -> bytes:
    """Return a client's frame (RFC 6455, 5.2) of less than 126 bytes."""
    key = (MASK * (len(payload) // 4 + 1))[: len(payload)]
    body = int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")
    return bytes((opcode, 0x80 | len(payload))) + MASK + body.to_bytes(len(payload), "big")


def plain(payload: bytes) -> bytes:
    """Return a server's frame of less than 65536 bytes."""
    size = len(payload)
    return bytes((TEXT, size) if size < SMALL else (TEXT, SMALL, size >> 8, size & 0xFF)) + payload


BROADCAST = "an event for everybody that says this much"
WINDOW = 16
"""Broadcasts that are on their way at the same time."""
BYE = masked(b"\x03\xe8", CLOSE)
PONG = masked(b"3")
PING = plain(b"2")


@dataclass(frozen=True)
class Target:
    """A server to load: its port on loopback, and the node name that it puts before each echo.

    With `users`, every session is of the next user, with the id in `query`. `cookie` is the header line with a server's
    cookies, `offer` the header line that offers compression.
    """

    title: str
    port: int
    name: str
    users: Iterator[str] | None = None
    query: str = ""
    cookie: str = ""
    offer: str = COMPRESSION

    @property
    def messages(self) -> list[tuple[bytes, bytes]]:
        """Messages with their answers; several, so that an old answer is not taken for a new one."""
        texts = [f"message {number:02} of a user who says this much" for number in range(16)]
        return [(masked(_event(text).encode()), plain(_event(f"node#{self.name}: {text}").encode())) for text in texts]

    def of_next_user(self) -> "Target":
        """Return the target for the next user."""
        return self if self.users is None else replace(self, users=None, query=f"&client_id={next(self.users)}")

    def upgrade(self, sid: str = "") -> bytes:
        """Return the request for a WebSocket, of a new session or of an open one."""
        path, host = self._path("websocket", sid), f"127.0.0.1:{self.port}"
        return SUBSCRIBE.format(path=path, host=host, offer=self.offer, cookie=self.cookie).encode()

    def get(self, sid: str = "") -> bytes:
        """Return the request of a handshake, or of a poll."""
        return f"GET {self._path('polling', sid)} HTTP/1.1\r\n{self._headers}\r\n".encode()

    def post(self, sid: str, packet: str) -> bytes:
        """Return the request that carries a packet."""
        head = f"POST {self._path('polling', sid)} HTTP/1.1\r\n{self._headers}"
        return f"{head}Content-Type: text/plain\r\nContent-Length: {len(packet.encode())}\r\n\r\n{packet}".encode()

    def _path(self, transport: str, sid: str) -> str:
        return f"{PATH}{transport}{self.query}" + (f"&sid={sid}" if sid else "")

    @property
    def _headers(self) -> str:
        return f"Host: 127.0.0.1:{self.port}\r\n{self.cookie}"


def _event(text: str, kind: str = "42") -> str:
    return f'{kind}["message",{json.dumps(text, ensure_ascii=False)}]'


class Loop:
    """Reads data and passes it to the receiver of its descriptor; the end of a connection is passed as no bytes."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.receivers: dict[int, Callable[[bytes], object]] = {}

    def connect(self, target: Target) -> "Wire":
        """Open a connection; on loopback it is established when this returns."""
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error = connection.connect_ex(("127.0.0.1", target.port))
        if error not in (0, errno.EINPROGRESS):
            raise LoadError(f"{target.title} accepts no connections: {os.strerror(error)}")
        wire = Wire(self, connection, target.of_next_user())
        self.receivers[wire.fd] = wire.feed
        self._epoll.register(wire.fd, select.EPOLLIN)
        return wire

    def close(self) -> None:
        """Close everything."""
        self._epoll.close()
        for receiver in self.receivers.values():
            if isinstance(wire := getattr(receiver, "__self__", None), Wire):
                wire.connection.close()

    def forget(self, wire: "Wire") -> None:
        """Close a connection."""
        del self.receivers[wire.fd]
        wire.connection.close()

    def turn(self, timeout: float) -> None:
        """Handle what has arrived, waiting at most `timeout` seconds for something."""
        receivers, read = self.receivers, os.read
        for fd, _ in self._epoll.poll(timeout):
            try:
                data = read(fd, READ_SIZE)
            except ConnectionResetError:
                data = b""
            except OSError as error:
                # Another receiver of this turn may have closed the descriptor, and perhaps reused it.
                if error.errno not in (errno.EBADF, errno.EAGAIN):
                    raise
                continue
            receivers[fd](data)

    def run(self, seconds: float, busy: bool = False) -> None:
        """Handle data for so many seconds; `busy` polls without sleeping, so that wake-ups are not measured."""
        timeout = 0 if busy else 0.01
        end = perf_counter() + seconds
        while perf_counter() < end:
            self.turn(timeout)

    def until(self, done: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        """Handle what arrives until `done`; LoadError when it takes longer than `seconds`."""
        end = perf_counter() + seconds
        while not done():
            if perf_counter() > end:
                raise LoadError(f"{what} within {seconds:g} s")
            self.turn(0.01)


class Wire:
    """One connection of a session."""

    __slots__ = ("buffer", "connection", "ended", "fd", "inflating", "loop", "session", "target")

    def __init__(self, loop: Loop, connection: socket.socket, target: Target) -> None:
        self.loop = loop
        self.connection = connection
        self.fd = connection.fileno()
        self.target = target
        self.buffer = b""
        self.ended = False
        self.session: Session | None = None
        self.inflating = zlib.decompressobj(-zlib.MAX_WBITS)

    def send(self, data: bytes) -> None:
        """Write; messages are small, so a server that does not read them has failed."""
        try:
            os.write(self.fd, data)
        except OSError as error:
            raise LoadError(f"{self.target.title} reads nothing: {error.strerror}") from None

    def feed(self, data: bytes) -> None:
        """Add data to the buffer and continue the session."""
        self.buffer += data
        self.ended = not data
        if self.session is not None:
            go_on(self.session)

    def frame(self) -> tuple[int, bytes] | None:
        """Take the next frame, decompressed, as (first byte, payload); None if it is not complete."""
        buffer = self.buffer
        if len(buffer) < 2:
            return None
        begin, size = 2, buffer[1]
        if size == 126:
            begin, size = 4, int.from_bytes(buffer[2:4], "big")
        elif size == 127:
            begin, size = 10, int.from_bytes(buffer[2:10], "big")
        if len(buffer) < max(begin + size, begin):
            return None
        self.buffer = buffer[begin + size :]
        kind, payload = buffer[0], buffer[begin : begin + size]
        if kind & COMPRESSED:
            return kind ^ COMPRESSED, self.inflating.decompress(payload + DEFLATE_TAIL)
        return kind, payload

    def packet(self) -> bytes | None:
        """Take the next packet that is not a ping; pings are answered."""
        while frame := self.frame():
            kind, payload = frame
            if kind != TEXT:
                raise LoadError(f"{self.target.title} ends a connection: {payload!r}")
            if payload != b"2":
                return payload
            self.send(PONG)
        return None

    def heard(self, data: bytes, answer: bytes) -> bool:
        """Handle bytes that are not exactly the answer; return whether the answer is among them."""
        if not data:
            raise LoadError(f"{self.target.title} has closed a connection")
        self.buffer += data
        packet = self.packet()
        if packet is None:
            return False
        if plain(packet) != answer or self.buffer:
            raise LoadError(f"{self.target.title} does not echo: {packet[:80]!r} instead of {answer[:80]!r}")
        return True


def go_on(session: Session) -> None:
    """Run a session until it waits again or ends."""
    try:
        next(session)
    except StopIteration:
        return


def begin(session: Session, wire: Wire) -> None:
    """Begin a session on its first connection."""
    wire.session = session
    go_on(session)


def _lost(wire: Wire) -> LoadError:
    return LoadError(f"{wire.target.title} has closed a connection")


def _head(wire: Wire) -> Generator[None, None, bytes]:
    while b"\r\n\r\n" not in wire.buffer:
        if wire.ended:
            raise _lost(wire)
        yield
    head, _, wire.buffer = wire.buffer.partition(b"\r\n\r\n")
    if cookie := SET_COOKIE.search(head):
        wire.target = replace(wire.target, cookie=f"Cookie: {cookie[1].decode()}\r\n")
    return head


def _answer(wire: Wire) -> Generator[None, None, str]:
    """Wait for the answer to a request (RFC 9112), and return its body."""
    head = yield from _head(wire)
    if not head.startswith(b"HTTP/1.1 200 "):
        raise LoadError(f"{wire.target.title} answers {head.splitlines()[0].decode('latin-1')}")
    if length := re.search(rb"(?i)\ncontent-length: *(\d+)", head):
        size = int(length[1])
        while len(wire.buffer) < size:
            if wire.ended:
                raise _lost(wire)
            yield
        body, wire.buffer = wire.buffer[:size], wire.buffer[size:]
        return body.decode()
    chunks = []
    while True:
        while not (line := re.match(rb"([0-9a-fA-F]+)\r\n", wire.buffer)) or (
            len(wire.buffer) < line.end() + int(line[1], 16) + 2
        ):
            if wire.ended:
                raise _lost(wire)
            yield
        size = int(line[1], 16)
        chunks.append(wire.buffer[line.end() : line.end() + size])
        wire.buffer = wire.buffer[line.end() + size + 2 :]
        if not size:
            return b"".join(chunks).decode()


def _packet(wire: Wire) -> Generator[None, None, bytes]:
    while (packet := wire.packet()) is None:
        if wire.ended:
            raise _lost(wire)
        yield
    return packet


def _upgraded(wire: Wire, sid: str = "") -> Session:
    wire.send(wire.target.upgrade(sid))
    head = yield from _head(wire)
    if not head.startswith(b"HTTP/1.1 101 "):
        raise LoadError(f"{wire.target.title} answers {head.splitlines()[0].decode('latin-1')}")


def _check_joined(wire: Wire, packets: list[str]) -> None:
    """Check the acceptance of the namespace and the welcome, which come in either order."""
    accepted = [packet for packet in packets if packet.startswith('40{"sid":')]
    if len(accepted) != 1 or _event(f"node#{wire.target.name}: welcome") not in packets:
        raise LoadError(f"{wire.target.title} welcomes with {packets}")


def open_websocket(wire: Wire) -> Session:
    """Open a session with a WebSocket from the start."""
    yield from _upgraded(wire)
    opening = yield from _packet(wire)
    if not opening.startswith(b"0{"):
        raise LoadError(f"{wire.target.title} opens with {opening[:80]!r}")
    wire.send(masked(b"40"))
    first = yield from _packet(wire)
    second = yield from _packet(wire)
    _check_joined(wire, [first.decode(), second.decode()])


def open_polling(wire: Wire) -> Generator[None, None, str]:
    """Open a session over long polling, all on one connection that is kept alive; return its id."""
    wire.send(wire.target.get())
    opening = yield from _answer(wire)
    if not opening.startswith("0{"):
        raise LoadError(f"{wire.target.title} opens with {opening[:80]!r}")
    sid = str(json.loads(opening[1:])["sid"])
    wire.send(wire.target.post(sid, "40"))
    yield from _answer(wire)
    packets: list[str] = []
    while len(packets) < 2:
        wire.send(wire.target.get(sid))
        packets += (yield from _answer(wire)).split("\x1e")
    _check_joined(wire, packets)
    return sid


def _closed(wire: Wire) -> Session:
    """Close a WebSocket, and wait until the server has."""
    wire.send(BYE)
    while not wire.ended:
        wire.buffer = b""
        yield
    wire.loop.forget(wire)


def websocket_first(wire: Wire) -> Session:
    """Open a session with a WebSocket, and close it."""
    yield from open_websocket(wire)
    yield from _closed(wire)


def polling_only(wire: Wire) -> Session:
    """Open a session over long polling, and close it."""
    sid = yield from open_polling(wire)
    wire.send(wire.target.post(sid, "1"))
    yield from _answer(wire)
    wire.loop.forget(wire)


def polling_first(wire: Wire) -> Session:
    """Open a session as the JavaScript client does, over long polling and then an upgrade; and close it."""
    sid = yield from open_polling(wire)
    wire.send(wire.target.get(sid))
    other = wire.loop.connect(wire.target)
    other.session = wire.session
    yield from _upgraded(other, sid)
    other.send(masked(b"2probe"))
    if (packet := (yield from _packet(other))) != b"3probe":
        raise LoadError(f"{wire.target.title} answers the probe of an upgrade with {packet[:80]!r}")
    if (body := (yield from _answer(wire))) != "6":
        raise LoadError(f"{wire.target.title} ends the poll of an upgrade with {body[:80]!r}")
    other.send(masked(b"5"))
    yield from _closed(other)
    wire.loop.forget(wire)


def _attended(wire: Wire, opened: list[Wire]) -> Session:
    """Open a session that stays idle: it answers pings and accepts nothing else."""
    yield from open_websocket(wire)
    opened.append(wire)
    while True:
        packet = yield from _packet(wire)
        raise LoadError(f"{wire.target.title} says {packet[:80]!r} unasked")


def listening(wire: Wire, opened: list[Wire]) -> Session:
    """Open a session that gets no welcome; it answers pings and ignores everything else, its end too."""
    yield from _upgraded(wire)
    opening = yield from _packet(wire)
    wire.send(masked(b"40"))
    accepted = yield from _packet(wire)
    if not (opening.startswith(b"0{") and accepted.startswith(b'40{"sid":')):
        raise LoadError(f"{wire.target.title} opens with {opening[:80]!r} and {accepted[:80]!r}")
    opened.append(wire)
    while not wire.ended:
        wire.packet()
        yield
    wire.loop.forget(wire)


def open_sessions(
    loop: Loop,
    target: Target,
    wires: list[Wire],
    number: int,
    life: Callable[[Wire, list[Wire]], Session] = _attended,
) -> None:
    """Open WebSockets until there are `number`; they answer pings."""
    begun = len(wires)
    end = perf_counter() + max(PATIENCE, number / 100)
    while len(wires) < number:
        while begun < number and begun - len(wires) < OPENING:
            wire = loop.connect(target)
            begin(life(wire, wires), wire)
            begun += 1
        loop.turn(0.01)
        if perf_counter() > end:
            raise LoadError(f"{target.title} has opened {len(wires)} of {number} connections")


def close_sessions(loop: Loop, wires: list[Wire]) -> None:
    """Close all sessions, as a client does that leaves."""
    closing = list(wires)
    for at in range(0, len(closing), OPENING):
        batch = closing[at : at + OPENING]
        for wire in batch:
            begin(_closed(wire), wire)
        what = f"{batch[0].target.title} does not close its connections"
        loop.until(lambda batch=batch: not any(wire.fd in loop.receivers for wire in batch), what)  # type: ignore[misc]
    wires.clear()


@dataclass
class Sample:
    """The result of one measurement: `count` operations in `seconds`, with `cpu` CPU seconds of the server."""

    count: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    trips: list[float] = field(default_factory=list)
    """Seconds of each round trip."""


def echo(loop: Loop, target: Target, wires: Sequence[Wire], seconds: float, cpu_seconds: Callable[[], float]) -> Sample:
    """Each session sends its next message when the last one is echoed; the first fifth of the time is not counted."""
    trips: list[float] = []
    waiting = set(wires)
    over = False

    def echoing(wire: Wire, turn: int) -> Generator[None, bytes, None]:
        fd, write, record = wire.fd, os.write, trips.append
        messages = itertools.islice(itertools.cycle(target.messages), turn % 16, None)
        sent = perf_counter()
        for frame, answer in messages:
            try:
                write(fd, frame)
            except OSError as error:
                raise LoadError(f"{target.title} reads nothing: {error.strerror}") from None
            data = yield
            if data != answer:
                while not wire.heard(data, answer):
                    data = yield
            now = perf_counter()
            record(now - sent)
            sent = now
            if over:
                break
        waiting.discard(wire)
        loop.receivers[fd] = wire.feed
        yield

    for turn, wire in enumerate(wires):
        session = echoing(wire, turn)
        loop.receivers[wire.fd] = session.send
        next(session)
    loop.run(seconds / 5, busy=True)
    begun, first, cpu = perf_counter(), len(trips), cpu_seconds()
    loop.run(seconds, busy=True)
    missing = f"{target.title}: not every message comes back"
    loop.until(lambda: len(trips) > first, missing, ANSWER_SECONDS)
    ended, last, cpu = perf_counter(), len(trips), cpu_seconds() - cpu
    over = True
    loop.until(lambda: not waiting, missing, ANSWER_SECONDS)
    return Sample(last - first, ended - begun, cpu, trips[first:last])


def pace(
    loop: Loop,
    target: Target,
    wires: Sequence[Wire],
    cpu_seconds: Callable[[], float],
    *,
    seconds: float,
    rate: float,
) -> Sample:
    """Send at a steady rate, independent of the echoes; a round trip counts from when its message was due."""
    trips: list[float] = []
    free = deque(wires)
    messages = itertools.cycle(target.messages)

    def receive(wire: Wire, answer: bytes, due: float, data: bytes) -> None:
        if data == answer or wire.heard(data, answer):
            trips.append(perf_counter() - due)
            loop.receivers[wire.fd] = wire.feed
            free.append(wire)

    begun, cpu = perf_counter(), cpu_seconds()
    due = begun
    while due < begun + seconds:
        while free and due <= perf_counter():
            wire, (frame, answer) = free.popleft(), next(messages)
            loop.receivers[wire.fd] = partial(receive, wire, answer, due)
            wire.send(frame)
            due += 1 / rate
        loop.turn(0)
        if perf_counter() > begun + seconds + ANSWER_SECONDS:
            raise LoadError(f"{target.title} cannot take {rate:g} messages a second")
    loop.until(lambda: len(free) == len(wires), f"{target.title}: not every message comes back", ANSWER_SECONDS)
    return Sample(len(trips), perf_counter() - begun, cpu_seconds() - cpu, trips)


class _Broadcasts:
    """Events that one session publishes, numbered, and that all sessions have to get, each once and in order."""

    def __init__(self, wires: Sequence[Wire]) -> None:
        self._wires = wires
        self._known: dict[bytes, list[int]] = {}
        self._due: list[float] = []
        self._left: list[int] = []
        self.complete = 0
        self.trips: list[float] = []
        for wire in wires:
            hearing = self._hearing(wire)
            next(hearing)
            wire.loop.receivers[wire.fd] = hearing.send

    @property
    def published(self) -> int:
        """How many events have been published."""
        return len(self._due)

    def publish(self, due: float) -> None:
        """Publish the next event."""
        self._due.append(due)
        self._left.append(len(self._wires))
        self._wires[0].send(masked(f'42["publish","all",{len(self._due)},"{BROADCAST}"]'.encode()))

    def _hearing(self, wire: Wire) -> Generator[None, bytes, None]:
        known, due, left, record = self._known, self._due, self._left, self.trips.append
        expected = 0
        while True:
            data = yield
            numbers = known.get(data) if not wire.buffer else None
            if numbers is None:
                numbers = self._numbers(wire, data)
            now = perf_counter()
            for number in numbers:
                if number != expected + 1 or number > len(due):
                    raise LoadError(f"{wire.target.title} sends event {number} after {expected}")
                expected = number
                record(now - due[number - 1])
                left[number - 1] -= 1
                # In order for each session, so for all.
                self.complete += not left[number - 1]

    def _numbers(self, wire: Wire, data: bytes) -> list[int]:
        if not data:
            raise _lost(wire)
        whole = not wire.buffer
        wire.buffer += data
        numbers = []
        while (packet := wire.packet()) is not None:
            # A server that recovers connections adds an offset.
            event = json.loads(packet[2:]) if packet.startswith(b"42[") else []
            if len(event) not in (4, 5) or [*event[:2], event[3]] != ["numbered", "all", BROADCAST]:
                raise LoadError(f"{wire.target.title} sends {packet[:80]!r} instead of an event")
            numbers.append(event[2])
        if whole and not wire.buffer and PING not in data:
            self._known[data] = numbers
        return numbers

    def end(self) -> None:
        """Wait until everybody has everything."""
        what = f"{self._wires[0].target.title}: not everybody gets every event"
        self._wires[0].loop.until(lambda: self.complete == len(self._due), what, ANSWER_SECONDS)
        for wire in self._wires:
            wire.loop.receivers[wire.fd] = wire.feed


def broadcast(
    loop: Loop, wires: Sequence[Wire], cpu_seconds: Callable[[], float], *, seconds: float, rate: float = 0.0
) -> Sample:
    """Publish events for everybody, at a rate, or without one the next whenever everybody has all but WINDOW.

    An operation is one event that one session has got. At a rate, a trip counts from when the event was due. Without
    one, the first fifth of the time is not counted.
    """
    events = _Broadcasts(wires)
    begun = perf_counter()
    first, cpu = 0, cpu_seconds()
    if not rate:
        while perf_counter() < begun + seconds / 5:
            _fill(events)
            loop.turn(0)
        begun, first, cpu = perf_counter(), len(events.trips), cpu_seconds()
    while (now := perf_counter()) < begun + seconds:
        if not rate:
            _fill(events)
        elif now >= begun + events.published / rate:
            events.publish(begun + events.published / rate)
        loop.turn(0)
    if rate:
        events.end()
    ended, last, cpu = perf_counter(), len(events.trips), cpu_seconds() - cpu
    events.end()
    return Sample(last - first, ended - begun, cpu, events.trips[first:last])


def _fill(events: _Broadcasts) -> None:
    while events.published - events.complete < WINDOW:
        events.publish(perf_counter())


def handshakes(
    loop: Loop,
    target: Target,
    manner: Callable[[Wire], Session],
    cpu_seconds: Callable[[], float],
    *,
    together: int,
    seconds: float,
) -> Sample:
    """Open and close sessions for so many seconds, `together` at a time; the end of the last ones counts too."""
    done = running = 0
    over = False

    def slot() -> None:
        nonlocal running
        running += 1
        wire = loop.connect(target)
        begin(life(wire), wire)

    def life(wire: Wire) -> Session:
        nonlocal done, running
        yield from manner(wire)
        done += 1
        running -= 1
        if not over:
            slot()

    begun, cpu = perf_counter(), cpu_seconds()
    for _ in range(together):
        slot()
    loop.run(seconds)
    over = True
    loop.until(lambda: not running, f"{target.title}: not every session comes about", ANSWER_SECONDS)
    return Sample(done, perf_counter() - begun, cpu_seconds() - cpu)


def check(loop: Loop, target: Target) -> None:
    """Check that the server echoes: text of all kinds, and with an acknowledgement if one is asked for."""
    done = False
    text = 'straße, 100 % "of it" \\ and ✓'
    answer = f"node#{target.name}: {text}"

    def session(wire: Wire) -> Session:
        nonlocal done
        yield from open_websocket(wire)
        wire.send(masked(_event(text).encode()))
        packet = yield from _packet(wire)
        _compare(target, [packet], [("42", ["message", answer])])
        wire.send(masked(_event(text, kind="427").encode()))
        packets = [(yield from _packet(wire)), (yield from _packet(wire))]
        _compare(target, packets, [("42", ["message", answer]), ("437", [answer])])
        yield from _closed(wire)
        done = True

    wire = loop.connect(target)
    begin(session(wire), wire)
    loop.until(lambda: done, f"{target.title} does not echo", ANSWER_SECONDS)


def _compare(target: Target, packets: list[bytes], wanted: list[tuple[str, list[str]]]) -> None:
    found = []
    for packet in packets:
        kind, _, data = packet.decode().partition("[")
        found.append((kind, json.loads(f"[{data}")))
    if sorted(found) != sorted(wanted):
        raise LoadError(f"{target.title} does not echo: {found} instead of {wanted}")
