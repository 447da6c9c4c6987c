"""A tiny edge for tests: it passes each request to the node that owns its `client_id` on a ring."""

import asyncio
import contextlib
import re
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from stickyring.ring import Ring

KEY = re.compile(rb"[?&]client_id=([^& ]*)")
CONNECTION = re.compile(rb"\r\nconnection:[^\r]*", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """A request that passed the edge: monotonic time in seconds, key, node and request line."""

    time: float
    key: str
    node: str
    line: str

    @property
    def is_handshake(self) -> bool:
        return self.line.startswith("GET /socket.io/") and "sid=" not in self.line


@dataclass
class Edge:
    """Listens on loopback inside `with`. `ring` may be set at any time; `addresses` are the nodes' host:port.

    Every request uses a new connection, and reaches the node with `x-stickyring-key`.
    """

    ring: Ring
    addresses: dict[str, str]
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _close(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            writer.close()
            return
        line = head.partition(b"\r\n")[0]
        found = KEY.search(line)
        key = found[1].decode() if found else ""
        node = self.ring.owner(key)
        self.requests.append(Request(time.monotonic(), key, node, line.decode()))
        if b"\r\nupgrade: websocket" not in head.lower():
            head = CONNECTION.sub(b"", head).replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        if found:
            head = head.replace(b"\r\n", b"\r\nx-stickyring-key: %s\r\n" % found[1], 1)
        host, _, port = self.addresses[node].partition(":")
        upstream_reader, upstream_writer = await asyncio.open_connection(host, int(port))
        upstream_writer.write(head)
        # The edge's end cancels this; that is not an error of the connection.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(_pipe(reader, upstream_writer), _pipe(upstream_reader, writer))
        for end in (writer, upstream_writer):
            end.close()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until the end of the input, then end the output."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.close()
