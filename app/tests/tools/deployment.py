"""A small deployment in this process: python-socketio nodes behind an edge with a routing policy."""

import asyncio
import contextlib
import itertools
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

import socketio
from aiohttp import web


@dataclass
class Request:
    """The head of an HTTP request as the edge sees it."""

    target: str
    headers: dict[str, str]

    @property
    def upgrade(self) -> bool:
        return self.headers.get("upgrade", "").lower() == "websocket"

    def parameter(self, name: str) -> str | None:
        return parse_qs(urlsplit(self.target).query).get(name, [None])[0]

    def cookie(self, name: str) -> str | None:
        cookies = SimpleCookie(self.headers.get("cookie", ""))
        return cookies[name].value if name in cookies else None


@dataclass
class Answer:
    """What the edge does with a request: an answer of its own, or a node's with further header lines."""

    node: int = 0
    served_by: str | None = None
    header_lines: list[str] = field(default_factory=list)
    own: bytes | None = None


Policy = Callable[[Request], Answer]


def owner(key: str) -> Answer:
    return Answer(node=zlib.crc32(key.encode()))


def astray() -> Policy:
    """The negative control, deterministic: an id's sessions begin on two nodes in turn and continue on the third."""
    turns: dict[str | None, Iterator[int]] = defaultdict(itertools.count)

    def policy(request: Request) -> Answer:
        begins = request.parameter("sid") is None
        return Answer(node=next(turns[request.parameter("client_id")]) % 2 if begins else 2)

    return policy


def by_parameter(name: str = "client_id") -> Policy:
    """By query parameter, like a hash policy; not sticky without it."""
    fallback = astray()
    return lambda request: owner(key) if (key := request.parameter(name)) else fallback(request)


def by_header(name: str) -> Policy:
    fallback = astray()
    return lambda request: owner(key) if (key := request.headers.get(name)) else fallback(request)


def by_issued_cookie() -> Policy:
    """By a cookie that the edge issues to clients without one."""
    serial = itertools.count()

    def policy(request: Request) -> Answer:
        key = request.cookie("stickyring")
        if key is not None:
            return owner(key)
        key = f"issued-{next(serial)}"
        answer = owner(key)
        answer.header_lines.append(f'set-cookie: stickyring="{key}"; HttpOnly')
        return answer

    return policy


def refuse(status: str, *header_lines: str) -> Answer:
    head = "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status}", "content-length: 0", *header_lines))
    return Answer(own=f"{head}\r\n".encode())


@dataclass
class Deployment:
    """The edge's port, what it counted, and its live connections."""

    port: int = 0
    connections: int = 0
    requests: list[Request] = field(default_factory=list)
    node_requests: int = 0
    events: list[str] = field(default_factory=list)
    live: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Reset every connection, as a restart of the edge does."""
        for writer in self.live:
            writer.transport.abort()


def node_application(
    deployment: Deployment, name: str, echo: bool, quick_pings: bool, serializer: str
) -> web.Application:
    server = socketio.AsyncServer(
        async_mode="aiohttp",
        cors_allowed_origins="*",
        ping_interval=0.2 if quick_pings else 25,
        ping_timeout=2 if quick_pings else 20,
        serializer=serializer,
    )

    async def connect(sid: str, environ: dict[str, Any]) -> None:
        await server.emit("message", f"node#{name}: welcome", to=sid)

    async def message(sid: str, text: str) -> str:
        await server.emit("message", f"node#{name}: {text}", to=sid)
        return f"node#{name}: {text}"

    def disconnect(sid: str, reason: str) -> None:
        deployment.events.append(f"disconnect: {reason}")

    @web.middleware
    async def count(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        deployment.node_requests += 1
        return await handler(request)

    # Without a handler the server would not know the namespace.
    server.on("connect", connect if echo else lambda sid, environ: None)
    server.on("disconnect", disconnect)
    if echo:
        server.on("message", message)
    application = web.Application(middlewares=[count])
    server.attach(application)
    return application


@contextlib.asynccontextmanager
async def deployed(
    policy: Policy,
    *,
    nodes: int = 3,
    node_header: str | None = "x-served-by",
    echo: bool = True,
    quick_pings: bool = False,
    serializer: str = "default",
    ports: Sequence[int] = (),
) -> AsyncIterator[Deployment]:
    """Nodes node1-1, node2-1, ... and an edge on free loopback ports; with `ports`, an edge of nodes that run there."""
    deployment = Deployment()
    async with contextlib.AsyncExitStack() as stack:
        ports = list(ports)
        for number in range(1, 1 if ports else nodes + 1):
            application = node_application(deployment, f"node{number}-1", echo, quick_pings, serializer)
            # Otherwise an abandoned poll would delay the end of the test by a ping interval.
            runner = web.AppRunner(application, access_log=None, shutdown_timeout=0, handler_cancellation=True)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            ports.append(runner.addresses[0][1])

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            deployment.connections += 1
            deployment.live.add(writer)
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await forward(
                    deployment=deployment,
                    policy=policy,
                    node_header=node_header,
                    ports=ports,
                    reader=reader,
                    writer=writer,
                )
            deployment.live.discard(writer)
            writer.close()

        edge = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1000)
        stack.callback(edge.close)
        stack.callback(deployment.cut)
        deployment.port = edge.sockets[0].getsockname()[1]
        yield deployment


async def forward(
    *,
    deployment: Deployment,
    policy: Policy,
    node_header: str | None,
    ports: list[int],
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Forward one connection. Its first request chooses the node, so a client that reused it would be sticky."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode().rstrip("\r\n").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    request = Request(first.split(" ")[1], headers)
    deployment.requests.append(request)
    answer = policy(request)
    if answer.own is not None:
        writer.write(answer.own)
        await writer.drain()
        return
    node = answer.node % len(ports)
    node_reader, node_writer = await asyncio.open_connection("127.0.0.1", ports[node])
    node_writer.write(head)
    to_node = asyncio.create_task(copy(reader, node_writer))
    # When one side closes, close the other too, as a real edge does: a poll must not outlive its client.
    to_node.add_done_callback(lambda _: node_writer.transport.abort())
    try:
        response, _, rest = (await node_reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
        added = list(answer.header_lines)
        if node_header is not None:
            added.append(f"{node_header}: {answer.served_by or f'node{node + 1}-1'}")
        writer.write(b"\r\n".join((response, *(line.encode() for line in added), rest)))
        await copy(node_reader, writer)
    finally:
        to_node.cancel()
        await asyncio.gather(to_node, return_exceptions=True)
        node_writer.close()


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
