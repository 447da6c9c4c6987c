"""The two Engine.IO transports, long-polling and WebSocket, on aiohttp.

Protocol: Engine.IO revision 4, https://socket.io/docs/v4/engine-io-protocol/.
"""

import asyncio
import base64
import contextlib
import socket
import struct
from typing import Protocol

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from stickyring.tools.probe.failures import Failure
from stickyring.tools.probe.targets import Target

RECORD_SEPARATOR = "\x1e"
NO_LINGER = struct.pack("ii", 1, 0)
LINGER = struct.pack("ii", 0, 0)


class JudgedResolver(AbstractResolver):
    """Resolves the target's host to the chosen address, and nothing else."""

    def __init__(self, target: Target) -> None:
        self._target = target

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return one entry, whatever `family` is; raise OSError for another host."""
        if host.lower() != self._target.host:
            raise OSError(f"{host} is not the target")
        address = self._target.address
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
        ]

    async def close(self) -> None:
        """Do nothing: nothing is open."""


def connector(target: Target) -> aiohttp.TCPConnector:
    """Return a connector to the target's address only, with a new connection for each request."""

    def open_socket(entry: aiohttp.AddrInfoType) -> socket.socket:
        if entry[4][0] != target.address:
            raise OSError(f"{entry[4][0]} is not the target's address")
        connection = socket.socket(entry[0], entry[1], entry[2])
        # Each connection would leave its port in TIME_WAIT for a minute, and there are only 28 000 ports for one
        # destination. The answer has been read when the connection closes, so a reset loses nothing.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        return connection

    return aiohttp.TCPConnector(
        resolver=JudgedResolver(target),
        force_close=True,
        limit=0,
        use_dns_cache=False,
        happy_eyeballs_delay=None,
        socket_factory=open_socket,
    )


class Transport(Protocol):
    """Sends and receives Engine.IO packets; bytes are binary messages."""

    async def send(self, *packets: str | bytes) -> None:
        """Send packets in order."""

    async def receive(self) -> list[str | bytes]:
        """Return the next packets, at least one. Cancelling the wait loses none."""

    async def close(self, farewell: str | bytes) -> None:
        """Send a last packet and free the connection."""

    async def abort(self) -> None:
        """Free the connection at once."""


class Polling:
    """Long-polling: packets are sent with POST and received with GET, each request on a new connection."""

    def __init__(self, http: aiohttp.ClientSession, url: URL) -> None:
        self._http = http
        self._url = url
        self._poll: asyncio.Task[list[str | bytes]] | None = None

    async def send(self, *packets: str | bytes) -> None:
        """POST the packets as one payload."""
        async with self._http.post(
            self._url,
            data=RECORD_SEPARATOR.join(map(_as_text, packets)).encode(),
            headers={"Content-Type": "text/plain;charset=UTF-8"},
        ) as response:
            await response.read()

    @property
    def waiting(self) -> bool:
        """Whether a GET is under way, or its packets have not been received yet."""
        return self._poll is not None

    def poll(self) -> None:
        """Start a GET unless one is under way, as a browser's client does."""
        if self._poll is None:
            self._poll = asyncio.create_task(self._get())

    async def receive(self) -> list[str | bytes]:
        """Return the packets of the GET under way, or of a new one."""
        self.poll()
        poll = self._poll
        assert poll is not None
        await asyncio.wait((poll,))
        self._poll = None
        return poll.result()

    async def _get(self) -> list[str | bytes]:
        async with self._http.get(self._url) as response:
            return [_from_text(packet) for packet in (await response.text("utf-8")).split(RECORD_SEPARATOR)]

    async def close(self, farewell: str | bytes) -> None:
        """Send `farewell` and close the session in one POST, as socket.io-client does."""
        await self.send(farewell, "1")
        await self.abort()

    async def abort(self) -> None:
        """Cancel the GET under way."""
        poll, self._poll = self._poll, None
        if poll is not None:
            poll.cancel()
            await asyncio.gather(poll, return_exceptions=True)


class WebSocket:
    """One WebSocket, one Engine.IO packet in each message."""

    def __init__(self, connection: aiohttp.ClientWebSocketResponse) -> None:
        self._connection = connection

    @classmethod
    async def open(cls, http: aiohttp.ClientSession, url: URL, timeout: float) -> "WebSocket":
        """Open a WebSocket at `url` (http or https); on close, wait at most `timeout` seconds for the server."""
        connection = await http.ws_connect(url, timeout=aiohttp.ClientWSTimeout(ws_close=timeout), autoping=True)
        own_socket = connection.get_extra_info("socket")
        if own_socket is not None:
            # One long connection does not use up ports: close it without a reset, which a server might log.
            own_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
        return cls(connection)

    async def send(self, *packets: str | bytes) -> None:
        """Send each packet as a message, text or binary."""
        for packet in packets:
            if isinstance(packet, bytes):
                await self._connection.send_bytes(packet)
            else:
                await self._connection.send_str(packet)

    async def receive(self) -> list[str | bytes]:
        """Return the next message; raise Failure if the server has closed the connection."""
        message = await self._connection.receive()
        if message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
            return [message.data]
        code = self._connection.close_code
        ended = code is None or code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE
        raise Failure("websocket cut without a close frame" if ended else f"websocket closed, code {code}")

    async def close(self, farewell: str | bytes) -> None:
        """Send `farewell`, then do the closing handshake."""
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
            await self.send(farewell)
        await self._connection.close()

    async def abort(self) -> None:
        """Do only the closing handshake; return at once if the connection is already down."""
        await self._connection.close()


def _as_text(packet: str | bytes) -> str:
    return packet if isinstance(packet, str) else "b" + base64.b64encode(packet).decode()


def _from_text(packet: str) -> str | bytes:
    return base64.b64decode(packet[1:]) if packet.startswith("b") else packet
