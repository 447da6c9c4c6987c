"""A WebSocket on asyncio, for the sessions of python-engineio and for an application's own WebSockets.

It is an asyncio protocol that hands over each message as it arrives: an idle WebSocket has neither a task nor a buffer.
It supports no extensions, as `stickyring.node.websocket`.
"""

import asyncio
import struct
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from stickyring.node.websocket import (
    CLOSE,
    CLOSING_SECONDS,
    CONTROL,
    NORMAL,
    PING,
    PONG,
    PROTOCOL_ERROR,
    TEXT,
    FailureError,
    Reader,
    acceptance,
    closing_frame,
    decoded,
    encode,
    frame,
    status_of,
)

EARLY_BYTES = 65536
"""How much a client may send before its WebSocket is open."""
LARGEST_MESSAGE = 16 * 1024 * 1024
"""Of an application's own WebSocket; as with uvicorn."""
WAITING_BYTES = 4 * 1024 * 1024
"""An application's own WebSocket reads no further while messages of this size wait for it."""
UNREAD_BYTES = 65536
"""Above this, pings of a client that does not read get no answer."""
NOT_OPEN, OPEN, CLOSING = range(3)
WENT_AWAY = 1006
"""What an application is told of a connection that was lost without a closing frame."""


class WebSocket(asyncio.Protocol):
    """One connection whose client asks for a WebSocket.

    `open` accepts it; then `on_message` is called with each message, str for text and bytes for binary, and `on_end`
    once, with the status, when the connection has ended or the client broke the protocol.
    """

    def __init__(self, transport: asyncio.Transport, key: str) -> None:
        self.transport = transport
        self._key = key
        self._state = NOT_OPEN
        self._early = b""
        self._reader: Reader | None = None
        self._on_message: Callable[[str | bytes], object] | None = None
        self._on_end: Callable[[int], object] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._status = WENT_AWAY
        self._blamed: int | None = None
        self._lost = False
        self.broken = False
        """Whether the client broke the protocol."""
        self.writable: asyncio.Event | None = None
        self.on_lost: Callable[[], object] | None = None

    def open(
        self,
        longest: int,
        on_message: Callable[[str | bytes], object],
        on_end: Callable[[int], object],
        *headers: str,
    ) -> None:
        """Accept it; a message has at most `longest` bytes."""
        self._reader = Reader(longest)
        self._on_message, self._on_end = on_message, on_end
        self._state = OPEN
        self.transport.write(acceptance(self._key, *headers))
        if self._early:
            early, self._early = self._early, b""
            asyncio.get_running_loop().call_soon(self.data_received, early)
        if self._lost:
            self._end()

    def refuse(self, status: str, headers: list[tuple[str, str]], body: bytes = b"") -> None:
        """Answer the handshake with an HTTP error, and close the connection."""
        headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers)]
        if any("\r" in line or "\n" in line for line in lines):
            raise ValueError("a header with a line break")
        lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
        self.transport.write("\r\n".join(lines).encode("latin-1") + body)
        self._state = CLOSING
        self.transport.close()

    @property
    def is_new(self) -> bool:
        """Whether it is neither open nor refused."""
        return self._state == NOT_OPEN and not self._lost

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent."""
        return self._state == OPEN and not self._lost

    def send(self, message: str | bytes) -> None:
        """Send a message; without effect when the connection has ended."""
        if self.is_open:
            self.transport.write(frame(message))

    def close(self, status: int | None = None) -> None:
        """Send a closing frame, and give the client CLOSING_SECONDS to answer it."""
        if self._state == OPEN:
            self._state = CLOSING
            self.transport.write(closing_frame(self._blamed or status))
            if not self._lost:
                self._deadline = asyncio.get_running_loop().call_later(CLOSING_SECONDS, self.transport.abort)
                if self.transport.can_write_eof():
                    self.transport.write_eof()

    def blame(self, status: int) -> None:
        """Set the status of the closing frame, unless one is set already."""
        self._blamed = self._blamed or status

    def fail(self, status: int) -> None:
        """Close it because the client broke the protocol; discard what the client still sends."""
        self.broken = True
        self._status = status
        self.close(status)
        self._end()

    def abort(self) -> None:
        """Close the connection at once; what has not been sent is lost."""
        self._state = CLOSING
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take bytes of the client."""
        if (reader := self._reader) is None:
            if self._state == NOT_OPEN:
                self._early += data
                if len(self._early) > EARLY_BYTES:
                    self.abort()
            return
        reader.feed(data)
        try:
            while (found := reader.next()) is not None:
                kind, payload = found
                if not kind & CONTROL:
                    if self._on_message is not None:
                        self._on_message(decoded(payload) if kind == TEXT else payload)
                elif kind == PING:
                    # For a client that does not read, only some are answered (section 5.5.3).
                    if self.is_open and self.transport.get_write_buffer_size() <= UNREAD_BYTES:
                        self.transport.write(encode(PONG, payload))
                elif kind == CLOSE:
                    status_of(payload)
                    self._answer_close(payload)
                    return
                elif kind != PONG:
                    raise FailureError(PROTOCOL_ERROR)  # noqa: TRY301 - one place answers all of them
        except FailureError as failure:
            self.fail(failure.status)

    def _answer_close(self, payload: bytes) -> None:
        self._status = struct.unpack("!H", payload[:2])[0] if payload else NORMAL
        self._reader = None
        if self._state == OPEN:
            self._state = CLOSING
            self.transport.write(encode(CLOSE, payload[:2]))
        self.transport.close()

    def eof_received(self) -> bool:
        """The client sends nothing more: the connection ends."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._lost = True
        if self.on_lost is not None:
            self.on_lost()
        if self.writable is not None:
            self.writable.set()
        if self._deadline is not None:
            self._deadline.cancel()
        if self._state != NOT_OPEN:
            self._end()

    def _end(self) -> None:
        on_end, self._on_end, self._on_message, self._reader = self._on_end, None, None, None
        self._state = CLOSING
        if on_end is not None:
            on_end(self._status)

    def pause_writing(self) -> None:
        """The client does not read."""
        if self.writable is not None:
            self.writable.clear()

    def resume_writing(self) -> None:
        """The client reads again."""
        if self.writable is not None:
            self.writable.set()


class Channel:
    """The ASGI side of a WebSocket (ASGI specification, WebSocket connection scope): `receive` and `send`.

    If the application accepts it, the WebSocket is the application's. Socket.IO's servers do not: their gate opens it.
    """

    def __init__(self, websocket: WebSocket, *, valid: bool) -> None:
        self.websocket = websocket
        self._valid = valid  # the handshake
        self.taken = False
        self._arrived: deque[dict[str, Any]] = deque([{"type": "websocket.connect"}])
        self._waiting_bytes = 0
        self._news = asyncio.Event()
        self._news.set()

    async def receive(self) -> dict[str, Any]:
        """Return the next event."""
        while not self._arrived:
            self._news.clear()
            await self._news.wait()
        event = self._arrived.popleft()
        if self._waiting_bytes and (size := len(event.get("text") or event.get("bytes") or "")):
            self._waiting_bytes -= size
            if self._waiting_bytes <= WAITING_BYTES and not self.websocket.transport.is_closing():
                self.websocket.transport.resume_reading()
        return event

    async def send(self, event: dict[str, Any]) -> None:
        """Send an event of the application."""
        websocket = self.websocket
        match event["type"]:
            case "websocket.accept":
                if not websocket.is_new:
                    raise RuntimeError("the WebSocket has been accepted or refused already, or its client has left")
                if not self._valid:
                    websocket.refuse("400 Bad Request", [])
                    self._end(WENT_AWAY)
                    return
                headers = [
                    f"{name.decode('latin-1')}: {value.decode('latin-1')}" for name, value in event.get("headers", ())
                ]
                if protocol := event.get("subprotocol"):
                    headers.append(f"Sec-WebSocket-Protocol: {protocol}")
                if any("\r" in line or "\n" in line for line in headers):
                    raise ValueError("a header with a line break")
                websocket.writable = asyncio.Event()
                websocket.writable.set()
                websocket.open(LARGEST_MESSAGE, self._take, self._end, *headers)
            case "websocket.send":
                text = event.get("text")
                websocket.send(event["bytes"] if text is None else text)
                if websocket.writable is not None:
                    await websocket.writable.wait()
            case "websocket.close":
                self.end(event.get("code", NORMAL))
            case "websocket.http.response.start":
                self._refusal = HTTPStatus(event["status"]), event.get("headers", ())
                self._body = b""
            case "websocket.http.response.body":
                self._body += event.get("body", b"")
                if event.get("more_body", False):
                    return
                status, headers = self._refusal
                lines = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
                if websocket.is_new:
                    websocket.refuse(f"{status.value} {status.phrase}", lines, self._body)

    def end(self, status: int) -> None:
        """Close it; before it is open, refuse it."""
        if self.websocket.is_open:
            self.websocket.close(status)
        elif self.websocket.is_new:
            self.websocket.refuse("403 Forbidden", [])

    def _take(self, message: str | bytes) -> None:
        kind = "text" if isinstance(message, str) else "bytes"
        self._arrived.append({"type": "websocket.receive", kind: message})
        self._waiting_bytes += len(message)
        if self._waiting_bytes > WAITING_BYTES:
            self.websocket.transport.pause_reading()
        self._news.set()

    def _end(self, status: int) -> None:
        self._arrived.append({"type": "websocket.disconnect", "code": status})
        self._news.set()
