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
NORMAL, PROTOCOL_ERROR, NOT_UTF8, TOO_BIG = 1000, 1002, 1007, 1009  # section 7.4.1
STATUSES = (range(1000, 1004), range(1007, 1015), range(3000, 5000))
"""Valid statuses of a closing frame (section 7.4)."""


class Server(Protocol):
    """The part of `engineio.Server` that is used."""

    max_http_buffer_size: float

    def start_background_task(self, target: Callable[..., object], *args: object) -> object:
        """Run `target` in a task of its own."""


class _FailureError(Exception):
    """The client broke the protocol; `status` goes into the closing frame."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def frame(message: str | bytes) -> bytes:
    """Return a message as one unmasked frame (section 5.2): text for str, binary for bytes."""
    return _frame(TEXT, message.encode()) if isinstance(message, str) else _frame(BINARY, message)


def _frame(opcode: int, payload: bytes) -> bytes:
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


class WebSocket:
    """One WebSocket, and the WSGI application that opens it; python-engineio makes one for each upgrade.

    `handler` is called with this object when the WebSocket is open. Only the handler may call `wait`; any green thread
    may call the other methods. A message has at most `server.max_http_buffer_size` bytes. The handshake must have
    passed `refusal`.
    """

    def __init__(self, handler: Callable[["WebSocket"], object], server: Server) -> None:
        self._handler = handler
        self._server = server
        self._longest = int(server.max_http_buffer_size)
        self._buffer = b""
        self._kind = CONTINUATION  # opcode of the message being received, if any
        self._checker: codecs.IncrementalDecoder | None = None
        self._sending = threading.Lock()
        self._senders = 0  # including those waiting for the lock
        self._closing = False
        self._end = math.inf

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Open the WebSocket, run the handler, and close it; the returned body is empty.

        Afterwards, nothing may be read from the connection or written to it.
        """
        key = environ["HTTP_SEC_WEBSOCKET_KEY"]
        accept = base64.b64encode(hashlib.sha1(f"{key}{GUID}".encode(), usedforsecurity=False).digest()).decode()
        self.socket = environ[SOCKET_VARIABLE]
        self.socket.sendall(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode()
        )
        if hasattr(self.socket, "watch"):
            self.socket.watch()
        try:
            self._handler(self)
        finally:
            self.close()
        return ()

    def wait(self) -> str | bytes | None:
        """Return the client's next message, str for text and bytes for binary; None when the connection has ended."""
        try:
            return self._message()
        except _FailureError as failure:
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
                self._send(_frame(CLOSE, b"" if status is None else struct.pack("!H", status)))

    def _message(self) -> str | bytes | None:
        parts: list[bytes] = []
        size = 0
        self._kind, self._checker = CONTINUATION, None
        while (found := self._next()) is not None:
            first, payload = found
            opcode = first & OPCODE
            if opcode & CONTROL:
                if not self._go_on_after(opcode, payload):
                    return None
                continue
            self._kind = self._kind or opcode
            size += len(payload)
            # Empty fragments take memory too.
            if size + len(parts) > self._longest:
                raise _FailureError(TOO_BIG)
            parts.append(payload)
            if first & FINAL:
                return _decoded(b"".join(parts)) if self._kind == TEXT else b"".join(parts)
        return None

    def _go_on_after(self, opcode: int, payload: bytes) -> bool:
        """Answer a control frame; return whether more frames can follow (section 5.5)."""
        if opcode == CLOSE:
            status = int.from_bytes(payload[:2], "big") if payload else NORMAL
            if len(payload) == 1 or not any(status in allowed for allowed in STATUSES):
                raise _FailureError(PROTOCOL_ERROR)
            _decoded(payload[2:])
            self._close(status)
            return False
        if opcode == PING:
            with contextlib.suppress(OSError):
                self._send(_frame(PONG, payload))
        elif opcode != PONG:
            raise _FailureError(PROTOCOL_ERROR)
        return True

    def _next(self) -> tuple[int, bytes] | None:
        """Return the next frame's first byte and payload; None at the end of the connection."""
        while len(self._buffer) < 2:
            if not self._receive():
                return None
        first, size = self._buffer[0], self._buffer[1] & LENGTH
        if first & RESERVED or not self._buffer[1] & MASKED:
            raise _FailureError(PROTOCOL_ERROR)
        opcode = first & OPCODE
        if opcode & CONTROL:
            if size > LONGEST_OF_CONTROL or not first & FINAL:
                raise _FailureError(PROTOCOL_ERROR)
        elif (opcode == CONTINUATION) != bool(self._kind) or opcode > BINARY:
            raise _FailureError(PROTOCOL_ERROR)
        begin = 2
        if size > 125:
            begin = 4 if size == 126 else 10
            while len(self._buffer) < begin:
                if not self._receive():
                    return None
            size = int.from_bytes(self._buffer[2:begin], "big")
            if size > self._longest:
                raise _FailureError(TOO_BIG)
        end = begin + 4 + size
        buffer = self._buffer
        text = (opcode or self._kind) == TEXT
        if len(buffer) < end:
            payload = self._receive_payload(begin, size, text)
            return None if payload is None else (first, payload)
        self._buffer = buffer[end:]
        payload = _unmasked(buffer[begin + 4 : end], buffer[begin : begin + 4])
        if text and first != FINAL | TEXT:
            self._check(payload)
        return first, payload

    def _receive(self) -> bool:
        """Read into the buffer; return False at the end of the connection."""
        received = self._read()
        self._buffer += received
        return bool(received)

    def _receive_payload(self, begin: int, size: int, text: bool) -> bytes | None:
        """Return the payload of a frame that is not in the buffer yet; None at the end of the connection."""
        while len(self._buffer) < begin + 4:
            if not self._receive():
                return None
        key, received = self._buffer[begin : begin + 4], self._buffer[begin + 4 :]
        parts: list[bytes] = []
        missing = size
        while True:
            shift = (size - missing) % 4
            part = _unmasked(received[:missing], key[shift:] + key[:shift])
            if text:
                self._check(part)
            parts.append(part)
            missing -= len(part)
            if not missing:
                self._buffer = received[len(part) :]
                return b"".join(parts)
            if not (received := self._read()):
                return None

    def _check(self, part: bytes) -> None:
        """Reject a text as soon as it cannot be valid UTF-8 any more (section 8.1)."""
        if self._checker is None:
            self._checker = codecs.getincrementaldecoder("utf-8")()
        try:
            self._checker.decode(part)
        except UnicodeDecodeError:
            raise _FailureError(NOT_UTF8) from None
        # Python's decoder waits for the third octet of a surrogate, which is never valid.
        if b"\xed\xa0" <= self._checker.getstate()[0] < b"\xee":
            raise _FailureError(NOT_UTF8)

    def _read(self) -> bytes:
        return b"" if time.monotonic() > self._end else self.socket.recv(READ_BYTES)


def _unmasked(payload: bytes, key: bytes) -> bytes:
    """Return a payload without the client's mask (section 5.3), in one operation."""
    size = len(payload)
    mask = (key * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(mask, "little")).to_bytes(size, "little")


def _decoded(payload: bytes) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise _FailureError(NOT_UTF8) from None
