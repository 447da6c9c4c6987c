"""The server's side of a WebSocket (RFC 6455) for python-engineio, over the socket that gunicorn provides.

We have our own because the WebSockets of eventlet and simple-websocket take half of the time of an echo. It supports no
extensions: compression (RFC 7692) costs 90 KiB per connection and the deflating of small messages; socket.io has it off
by default too.
"""

import base64
import codecs
import contextlib
import hashlib
import math
import struct
import threading
import time
from collections.abc import Callable, Iterable
from socket import SHUT_RDWR, SHUT_WR
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

SOCKET_VARIABLE = "stickyring.socket"
"""The client's connection, in the WSGI environ."""
VERSION = "13"
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # section 1.3
READ_BYTES = 8192
CLOSING_SECONDS = 5.0
"""How long a client may take to close a connection after the server has closed it."""
FINAL, RESERVED, OPCODE, MASKED, LENGTH = 0x80, 0x70, 0x0F, 0x80, 0x7F
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
CONTROL = 0x8
LONGEST_OF_CONTROL = 125
NORMAL, PROTOCOL_ERROR, NOT_UTF8, POLICY_VIOLATION, TOO_BIG = 1000, 1002, 1007, 1008, 1009  # section 7.4.1
STATUSES = (range(1000, 1004), range(1007, 1015), range(3000, 5000))
"""Valid statuses of a closing frame (section 7.4)."""


class Server(Protocol):
    """The part of `engineio.Server` that is used."""

    max_http_buffer_size: float

    def start_background_task(self, target: Callable[..., object], *args: object) -> object:
        """Run `target` in a task of its own."""


class FailureError(Exception):
    """The client broke the protocol; `status` goes into the closing frame."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def frame(message: str | bytes) -> bytes:
    """Return a message as one unmasked frame (section 5.2): text for str, binary for bytes."""
    return encode(TEXT, message.encode()) if isinstance(message, str) else encode(BINARY, message)


def acceptance(key: str, *headers: str) -> bytes:
    """Return the answer that opens a WebSocket (section 4.2.2); `key` is the client's, `headers` are further lines."""
    accept = base64.b64encode(hashlib.sha1(f"{key}{GUID}".encode(), usedforsecurity=False).digest()).decode()
    head = ("HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade")
    return "\r\n".join([*head, f"Sec-WebSocket-Accept: {accept}", *headers, "", ""]).encode("latin-1")


def closing_frame(status: int | None) -> bytes:
    """Return a closing frame (section 5.5.1), without a status for None."""
    return encode(CLOSE, b"" if status is None else struct.pack("!H", status))


def encode(opcode: int, payload: bytes) -> bytes:
    """Return a final, unmasked frame."""
    size, first = len(payload), FINAL | opcode
    if size < 126:
        return bytes((first, size)) + payload
    if size < 65536:
        return struct.pack("!BBH", first, 126, size) + payload
    return struct.pack("!BBQ", first, 127, size) + payload


def refusal(environ: "WSGIEnvironment") -> tuple[str, list[tuple[str, str]]] | None:
    """Return status and headers to reject an invalid handshake (section 4.2); None for a valid one."""
    # Without it, python-engineio treats the handshake as a poll.
    if "upgrade" not in environ.get("HTTP_CONNECTION", "").lower().replace(" ", "").split(","):
        return "400 Bad Request", []
    if environ.get("HTTP_SEC_WEBSOCKET_VERSION") != VERSION:
        return "426 Upgrade Required", [("Sec-WebSocket-Version", VERSION)]
    if not environ.get("HTTP_SEC_WEBSOCKET_KEY"):
        return "400 Bad Request", []
    return None


class Reader:
    """The client's side of a connection, without input and output: `feed` takes bytes, `next` returns what is complete.

    A message has at most `longest` bytes. A text is rejected as soon as it cannot be valid UTF-8 any more.
    """

    __slots__ = ("_at", "_buffer", "_checker", "_frame", "_kind", "_longest", "_parts", "_size")

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._buffer = b""
        self._at = 0  # where the bytes begin that are not taken yet: removing them for each frame copies the others
        self._kind = CONTINUATION  # opcode of the message being received, if any
        self._parts: list[bytes] = []
        self._size = 0
        self._frame: tuple[int, int, bytes] | None = None  # first byte, missing bytes and mask of a frame begun
        self._checker: codecs.IncrementalDecoder | None = None

    def feed(self, received: bytes) -> None:
        """Add bytes of the connection."""
        self._buffer = self._buffer + received if self._buffer else received

    def next(self) -> tuple[int, bytes] | None:
        """Return the opcode and the payload of the next message or control frame; None if more bytes are needed.

        Raises:
            FailureError: the client broke the protocol.
        """
        found = self._next()
        if found is None and self._at:
            self._buffer, self._at = self._buffer[self._at :], 0
        return found

    def _next(self) -> tuple[int, bytes] | None:
        while self._frame is not None or self._begin():
            first, missing, key = self._frame  # type: ignore[misc]  # _begin has set it
            opcode = first & OPCODE
            if opcode & CONTROL:
                if len(self._buffer) - self._at < missing:
                    return None
                return opcode, self._take(missing, key)
            part = self._take(missing, key)
            text = (opcode or self._kind) == TEXT
            missing -= len(part)
            if text and (missing or self._checker is not None or first != FINAL | TEXT):
                self._check(part)
            self._parts.append(part)
            if missing:
                shift = len(part) % 4
                self._frame = first, missing, key[shift:] + key[:shift]
                return None
            if first & FINAL:
                kind, message = self._kind, b"".join(self._parts)
                self._kind, self._checker, self._parts, self._size = CONTINUATION, None, [], 0
                return kind, message
        return None

    def _begin(self) -> bool:
        """Read a frame's head into `_frame` (section 5.2); return whether it is complete."""
        buffer, at = self._buffer, self._at
        if len(buffer) < at + 2:
            return False
        first, size = buffer[at], buffer[at + 1] & LENGTH
        if first & RESERVED or not buffer[at + 1] & MASKED:
            raise FailureError(PROTOCOL_ERROR)
        opcode = first & OPCODE
        if opcode & CONTROL:
            if size > LONGEST_OF_CONTROL or not first & FINAL:
                raise FailureError(PROTOCOL_ERROR)
        elif (opcode == CONTINUATION) != bool(self._kind) or opcode > BINARY:
            raise FailureError(PROTOCOL_ERROR)
        mask = at + 2
        if size > 125:
            mask += 2 if size == 126 else 8
            if len(buffer) < mask:
                return False
            size = int.from_bytes(buffer[at + 2 : mask], "big")
            if size > self._longest:
                raise FailureError(TOO_BIG)
        if len(buffer) < mask + 4:
            return False
        if not opcode & CONTROL:
            self._kind = self._kind or opcode
            self._size += size
            # Empty fragments take memory too.
            if self._size + len(self._parts) > self._longest:
                raise FailureError(TOO_BIG)
        self._frame = first, size, buffer[mask : mask + 4]
        self._at = mask + 4
        return True

    def _take(self, most: int, key: bytes) -> bytes:
        """Return at most that much of the frame's payload without its mask, and end the frame."""
        payload = self._buffer[self._at : self._at + most]
        self._at += len(payload)
        self._frame = None
        return _unmasked(payload, key)

    def _check(self, part: bytes) -> None:
        """Reject a text as soon as it cannot be valid UTF-8 any more (section 8.1)."""
        if self._checker is None:
            self._checker = codecs.getincrementaldecoder("utf-8")()
        try:
            self._checker.decode(part)
        except UnicodeDecodeError:
            raise FailureError(NOT_UTF8) from None
        # Python's decoder waits for the third octet of a surrogate, which is never valid.
        if b"\xed\xa0" <= self._checker.getstate()[0] < b"\xee":
            raise FailureError(NOT_UTF8)


def status_of(payload: bytes) -> int:
    """Return the status of a closing frame (section 5.5.1).

    Raises:
        FailureError: it is not valid.
    """
    status = int.from_bytes(payload[:2], "big") if payload else NORMAL
    if len(payload) == 1 or not any(status in allowed for allowed in STATUSES):
        raise FailureError(PROTOCOL_ERROR)
    decoded(payload[2:])
    return status


class WebSocket:
    """One WebSocket, and the WSGI application that opens it; python-engineio makes one for each upgrade.

    `handler` is called with this object when the WebSocket is open. Only the handler may call `wait`; any green thread
    may call the other methods. A message has at most `server.max_http_buffer_size` bytes. The handshake must have
    passed `refusal`.
    """

    def __init__(self, handler: Callable[["WebSocket"], object], server: Server) -> None:
        self._handler = handler
        self._server = server
        self._reader = Reader(int(server.max_http_buffer_size))
        self._sending = threading.Lock()
        self._senders = 0  # including those waiting for the lock
        self._closing = False
        self._end = math.inf

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Open the WebSocket, run the handler, and close it; the returned body is empty.

        The request may end before (`Connection.hand_over`). Nothing else may read from the connection or write to it.
        """
        self.socket = environ[SOCKET_VARIABLE]
        self.socket.sendall(acceptance(environ["HTTP_SEC_WEBSOCKET_KEY"]))
        if hasattr(self.socket, "hand_over"):
            self.socket.watch()
            self.socket.hand_over(self._serve)
        else:
            self._serve()
        return ()

    def _serve(self) -> None:
        try:
            self._handler(self)
        finally:
            self.close()

    def wait(self) -> str | bytes | None:
        """Return the client's next message, str for text and bytes for binary; None when the connection has ended."""
        try:
            return self._message()
        except FailureError as failure:
            self.fail(failure.status)
        except OSError:
            pass
        return None

    def send(self, message: str | bytes) -> None:
        """Send a message.

        Raises:
            OSError: the connection has ended.
        """
        if self._closing:
            raise BrokenPipeError("the WebSocket is closed")
        self._send(frame(message))

    def send_at_once(self, message: str | bytes) -> bool:
        """Send a message without waiting, unless another one is being sent; return whether it is sent or under way."""
        if self._senders or self._closing or not hasattr(self.socket, "send_now"):
            return False
        data = frame(message)
        sent = self.socket.send_now(data)
        if 0 < sent < len(data):
            self._senders += 1
            self._sending.acquire()
            self._server.start_background_task(self._send_rest, data[sent:])
        return bool(sent)

    def close(self) -> None:
        """Send a closing frame, and give the client CLOSING_SECONDS to answer it.

        The connection stays readable meanwhile. Closing it while the client sends would reset it, and the last messages
        could be lost.
        """
        self._close()
        with self._sending, contextlib.suppress(OSError):
            self.socket.shutdown(SHUT_WR)
        self._end = min(self._end, time.monotonic() + CLOSING_SECONDS)
        with contextlib.suppress(OSError):
            self.socket.settimeout(CLOSING_SECONDS)

    def fail(self, status: int) -> None:
        """Close it with `status`, because the client broke the protocol; discard what the client still sends."""
        self._close(status)
        self.close()
        with contextlib.suppress(OSError):
            while self._read():
                pass

    def _send(self, data: bytes) -> None:
        self._senders += 1
        try:
            with self._sending:
                self.socket.sendall(data)
        finally:
            self._senders -= 1

    def _send_rest(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except OSError:
            # A frame is cut off, so nothing can be sent after it.
            with contextlib.suppress(OSError):
                self.socket.shutdown(SHUT_RDWR)
        finally:
            self._sending.release()
            self._senders -= 1

    def _close(self, status: int | None = None) -> None:
        if not self._closing:
            self._closing = True
            with contextlib.suppress(OSError):
                self._send(closing_frame(status))

    def _message(self) -> str | bytes | None:
        while True:
            while (found := self._reader.next()) is None:
                received = self._read()
                if not received:
                    return None
                self._reader.feed(received)
            kind, payload = found
            if not kind & CONTROL:
                return decoded(payload) if kind == TEXT else payload
            if not self._go_on_after(kind, payload):
                return None

    def _go_on_after(self, opcode: int, payload: bytes) -> bool:
        """Answer a control frame; return whether more frames can follow (section 5.5)."""
        if opcode == CLOSE:
            self._close(status_of(payload))
            return False
        if opcode == PING:
            with contextlib.suppress(OSError):
                self._send(encode(PONG, payload))
        elif opcode != PONG:
            raise FailureError(PROTOCOL_ERROR)
        return True

    def _read(self) -> bytes:
        return b"" if time.monotonic() > self._end else self.socket.recv(READ_BYTES)


def _unmasked(payload: bytes, key: bytes) -> bytes:
    """Return a payload without the client's mask (section 5.3), in one operation."""
    size = len(payload)
    mask = (key * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(mask, "little")).to_bytes(size, "little")


def decoded(payload: bytes) -> str:
    """Return a text message.

    Raises:
        FailureError: it is not UTF-8.
    """
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise FailureError(NOT_UTF8) from None
