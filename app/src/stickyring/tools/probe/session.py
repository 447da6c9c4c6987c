"""One Socket.IO session like a browser's, and the record of what it saw.

Protocols: Engine.IO revision 4 (https://socket.io/docs/v4/engine-io-protocol/) and Socket.IO revision 5
(https://socket.io/docs/v4/socket-io-protocol/).
"""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NoReturn

import aiohttp
import msgpack
from aiohttp.abc import AbstractCookieJar
from multidict import CIMultiDict
from yarl import URL

from stickyring.tools.probe.failures import TWO_NODES, Failure, cause, connect_refusal, refusal
from stickyring.tools.probe.settings import Dialect, Manner, Parser
from stickyring.tools.probe.transports import Polling, Transport, WebSocket

# Errors that a faulty deployment can cause; any other is a bug of the probe and must be seen.
ERRORS = (Failure, TimeoutError, aiohttp.ClientError, OSError, ValueError)
CONNECT, DISCONNECT, EVENT = 0, 1, 2
ECHO_EVERY = 5.0
LONGEST_CLOSE = 5.0
AGENT = f"stickyring-probe/{version('stickyring')}"

# Socket.IO packet inside an Engine.IO message: type, namespace, acknowledgement id, JSON.
SOCKETIO_PACKET = re.compile(r"4([0-6])(?:(/[^,]*),?)?(\d*)(.*)", re.DOTALL)
NODE_TEXT = re.compile(r"node#(.+?): ", re.DOTALL)


@dataclass(slots=True)
class User:
    """One id with its cookie jar; `visit` is held while a session opens."""

    name: str
    cookies: AbstractCookieJar
    visit: contextlib.AbstractAsyncContextManager[Any]


@dataclass(slots=True)
class Record:
    """What one session saw. Times in seconds; `cause` is None if it completed.

    `header_nodes` are the nodes named in the response header, `spoken_nodes` those named in the application's texts.
    `begun` is set when the handshake of Engine.IO succeeds, `handshake` when Socket.IO has answered the connect.
    `opened` is set when the first round trip succeeds, so a record with `opened` and a `cause` is a dropped session.
    """

    user: str
    manner: Manner
    header_nodes: set[str] = field(default_factory=set)
    spoken_nodes: set[str] = field(default_factory=set)
    handshake: float | None = None
    round_trips: list[float] = field(default_factory=list)
    begun: bool = False
    opened: bool = False
    fell_back: bool = False
    cause: str | None = None

    @property
    def nodes(self) -> set[str]:
        """The nodes that answered: from the header if there was one, else from the texts."""
        return self.header_nodes or self.spoken_nodes

    def verify(self) -> None:
        """Raise Failure if two nodes answered."""
        if len(self.header_nodes) > 1 or len(self.spoken_nodes) > 1:
            raise Failure(TWO_NODES)


def http_session(
    connector: aiohttp.BaseConnector, dialect: Dialect, user: User, *middlewares: aiohttp.ClientMiddlewareType
) -> aiohttp.ClientSession:
    """Return a client with the user's cookies and the headers of the dialect, the user's id perhaps among them."""
    headers = CIMultiDict({"User-Agent": AGENT})
    for name, _ in dialect.headers:
        headers.pop(name, None)
    for name, value in dialect.headers:
        headers.add(name, value)
    if dialect.key_header is not None:
        headers[dialect.key_header] = user.name
    return aiohttp.ClientSession(
        connector=connector,
        connector_owner=False,
        cookie_jar=user.cookies,
        headers=headers,
        skip_auto_headers=("Accept-Encoding",),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        middlewares=middlewares,
    )


class Session:
    """A Socket.IO session: `open`, any number of `round_trip`, perhaps `stay`, then `close` or `abort`.

    All but `abort` raise Failure with the cause if the deployment fails or exceeds the timeout. `url` is the URL of the
    Socket.IO path without a query; `query` is added to every request.
    """

    def __init__(
        self,
        *,
        connector: aiohttp.BaseConnector,
        url: str,
        query: str,
        dialect: Dialect,
        user: User,
        manner: Manner,
        connection: int,
    ) -> None:
        self.record = Record(user.name, manner)
        self._dialect = dialect
        self._label = f"{user.name} {manner} {connection}"
        self._user = user
        self._http = http_session(connector, dialect, user, self._watch)
        key = None if dialect.key_param is None else f"{dialect.key_param}={user.name}"
        self._base_url = "&".join(filter(None, (f"{url}?EIO=4", query, key)))
        self._sid = ""
        self._upgrades: list[str] = []
        self._transport: Transport | None = None
        self._connected = False
        self._awaited: str | None = None
        self._questions = 0

    async def open(self) -> None:
        """Do the handshake, the Socket.IO connect (packet 40) and, for UPGRADE, the upgrade to WebSocket.

        Raises:
            Rejected: the application answered the handshake with 401, or the connect with CONNECT_ERROR.
        """
        manner = self.record.manner
        begin = time.perf_counter()
        async with self._user.visit:
            if manner in (Manner.POLLING, Manner.UPGRADE):
                await self._step("handshake", self._open_polling())
            else:
                try:
                    await self._step("handshake", self._open_websocket())
                except Failure:
                    if manner is Manner.WEBSOCKET:
                        raise
                    # The session did not exist yet, so the node that refused the WebSocket does not count.
                    self.record.header_nodes.clear()
                    self.record.fell_back = True
                    await self._drop_transport()
                    await self._step("handshake", self._open_polling())
        await self._step("connect acknowledgement", self._connect())
        self.record.handshake = time.perf_counter() - begin
        if manner is Manner.UPGRADE:
            await self._step("upgrade", self._upgrade())

    async def round_trip(self) -> None:
        """Send a question through the whole deployment, wait for the answer, and record the time.

        With an echo, the question is an event with a unique text, and the answer an event or acknowledgement with it.
        Without, it is a connect to a namespace that does not exist, which every Socket.IO server answers.
        """
        self._questions += 1
        if self._dialect.event is None:
            self._awaited = f"/stickyring-probe-{self._questions}"
            packet, stage = self._packet(CONNECT, self._awaited), "answer"
        else:
            self._awaited = f"[{self._label} #{self._questions}]"
            data = [self._dialect.event, self._awaited]
            packet, stage = self._packet(EVENT, self._dialect.namespace, data), "echo"
        begin = time.perf_counter()
        await self._step(stage, self._ask(packet))
        self.record.round_trips.append(time.perf_counter() - begin)
        self.record.opened = True

    async def stay(self) -> NoReturn:
        """Keep the session open until cancelled: answer pings, and do a round trip every few seconds."""
        loop = asyncio.get_running_loop()
        while True:
            next_echo = loop.time() + ECHO_EVERY
            while packets := await self._packets_before(next_echo):
                await self._step("pong", self._act(packets))
            await self.round_trip()

    async def close(self) -> None:
        """Disconnect, and close the transport."""
        assert self._transport is not None
        await self._step("close", self._transport.close(self._packet(DISCONNECT, self._dialect.namespace)))

    async def abort(self) -> None:
        """Free everything that is still open; may follow `close`."""
        await self._drop_transport()
        await self._http.close()

    async def _drop_transport(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.abort()

    async def _step(self, stage: str, work: Coroutine[Any, Any, None]) -> None:
        await step(stage, self._dialect.timeout, work)

    async def _packets_before(self, when: float) -> list[str | bytes]:
        """Return the next packets, or none if the loop's clock reaches `when` first; that loses no packet."""
        assert self._transport is not None
        try:
            async with asyncio.timeout_at(when):
                return await self._transport.receive()
        except TimeoutError:
            return []
        except Failure:
            raise
        except ERRORS as error:
            raise Failure(cause(error, "held open")) from error

    async def _watch(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Check every response, including a WebSocket's 101: record the node, and raise Failure for a refusal."""
        response = await handler(request)
        node = response.headers.get(self._dialect.node_header)
        if node:
            self.record.header_nodes.add(node)
        if response.status not in (200, 101):
            body = await response.content.read(512)
            response.close()
            raise refusal(response.status, body.decode(errors="replace"))
        return response

    def _url(self, transport: str, sid: str | None = None) -> URL:
        session = "" if sid is None else f"&sid={sid}"
        # Already encoded: request exactly what the user typed.
        return URL(f"{self._base_url}&transport={transport}{session}", encoded=True)

    async def _open_polling(self) -> None:
        async with self._http.get(self._url("polling")) as response:
            packet = await response.text("utf-8")
        self._sid, self._upgrades = open_packet(packet)
        self.record.begun = True
        self._transport = Polling(self._http, self._url("polling", self._sid))

    async def _open_websocket(self) -> None:
        websocket = await WebSocket.open(self._http, self._url("websocket"), self._closing_time())
        self._transport = websocket
        self._sid, self._upgrades = open_packet(str((await websocket.receive())[0]))
        self.record.begun = True

    async def _connect(self) -> None:
        assert self._transport is not None
        await self._transport.send(self._packet(CONNECT, self._dialect.namespace, self._dialect.auth))
        while not self._connected:
            await self._take()

    async def _upgrade(self) -> None:
        """Probe the WebSocket while a GET waits; when the server has answered the GET, switch to the WebSocket."""
        polling = self._transport
        assert isinstance(polling, Polling)
        if "websocket" not in self._upgrades:
            raise Failure("the server offers no upgrade to websocket (--no-upgrade leaves it out)")
        polling.poll()
        websocket = await WebSocket.open(self._http, self._url("websocket", self._sid), self._closing_time())
        try:
            await websocket.send("2probe")
            answer = await websocket.receive()
            # The server answers the waiting GET with a NOOP. Wait for it, so that only one transport carries packets.
            while polling.waiting:
                await self._take()
            await websocket.send("5")
        except BaseException:
            await websocket.abort()
            raise
        self._transport = websocket
        if answer != ["3probe"]:
            raise Failure("the server did not answer the upgrade probe")

    def _closing_time(self) -> float:
        return min(self._dialect.timeout, LONGEST_CLOSE)

    def _packet(self, kind: int, namespace: str, data: Any = None) -> str | bytes:  # noqa: ANN401 - any JSON
        """Return a Socket.IO packet as an Engine.IO message; an event asks for an acknowledgement."""
        number = self._questions if kind == EVENT else None
        if self._dialect.parser is Parser.MSGPACK:
            fields = {"type": kind, "nsp": namespace, "data": data, "id": number}
            packed: bytes = msgpack.packb({name: value for name, value in fields.items() if value is not None})
            return packed
        inside = "" if namespace == "/" else f"{namespace},"
        return f"4{kind}{inside}{'' if number is None else number}{'' if data is None else json.dumps(data)}"

    async def _ask(self, packet: str | bytes) -> None:
        assert self._transport is not None
        await self._transport.send(packet)
        while self._awaited is not None:
            await self._take()

    async def _take(self) -> None:
        assert self._transport is not None
        await self._act(await self._transport.receive())

    async def _act(self, packets: list[str | bytes]) -> None:
        assert self._transport is not None
        for packet in packets:
            if packet == "2":
                await self._transport.send("3")
            elif packet == "1":
                raise Failure("session closed by the server")
            elif isinstance(packet, bytes):
                if self._dialect.parser is Parser.MSGPACK:
                    self._message(*_unpacked(packet))
            elif packet.startswith("4"):
                self._message(*_parsed(packet))

    def _message(self, kind: int, namespace: str, content: Any) -> None:  # noqa: ANN401 - as it came
        if namespace != self._dialect.namespace:
            if namespace == self._awaited and kind in (0, 4):
                self._awaited = None
        elif kind == 0:
            self._connected = True
        elif kind == 1:
            # python-socketio refuses so with `always_connect`, and then says why.
            rejected = content and not self.record.opened
            raise connect_refusal(namespace, content) if rejected else Failure("disconnected by the server")
        elif kind == 4:
            raise connect_refusal(namespace, content)
        elif kind in (2, 3) and isinstance(content, list):
            for text in content:
                if isinstance(text, str):
                    self._heard(text)

    def _heard(self, text: str) -> None:
        ours = self._awaited is not None and self._awaited in text
        # Only the welcome and our own echo count: a chat can forward texts of other nodes.
        if (ours or text.endswith(": welcome")) and (match := NODE_TEXT.match(text)):
            self.record.spoken_nodes.add(match.group(1))
        if ours:
            self._awaited = None


async def step(stage: str, timeout: float, work: Coroutine[Any, Any, None]) -> None:
    """Await `work`; raise Failure with the cause if it fails or takes longer than `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout):
            await work
    except Failure:
        raise
    except ERRORS as error:
        raise Failure(cause(error, stage)) from error


def _parsed(packet: str) -> tuple[int, str, Any]:
    match = SOCKETIO_PACKET.match(packet)
    if match is None:
        raise Failure(f"not a Socket.IO packet: {packet[:40]}")
    kind, namespace, _, body = match.groups()
    # Attachments are ignored: an echo is text.
    return int(kind), namespace or "/", json.loads(body) if kind in "1234" and body else None


def _unpacked(packet: bytes) -> tuple[int, str, Any]:
    try:
        fields = msgpack.unpackb(packet)
        return fields["type"], fields["nsp"], fields.get("data")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure("not a Socket.IO packet of msgpack") from error


def open_packet(packet: str) -> tuple[str, list[str]]:
    """Return the session id and the upgrades of an Engine.IO open packet; raise Failure for anything else."""
    try:
        content = json.loads(packet.removeprefix("0"))
        return str(content["sid"]), list(content["upgrades"])
    except (ValueError, KeyError, TypeError) as error:
        raise Failure("the answer to the handshake is not Engine.IO 4") from error
