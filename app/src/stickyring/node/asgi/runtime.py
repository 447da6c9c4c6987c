"""What a node adds to an ASGI application, as `stickyring.node.runtime` does to a WSGI application."""

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from stickyring.bus.metrics import register_bus
from stickyring.node.application import Application, CannotBeServedError, describe
from stickyring.node.asgi.gate import AsyncSocketIOGate
from stickyring.node.drain import Drain
from stickyring.node.forwarded import CLIENT_VARIABLE, LOOPBACK, SCHEME_VARIABLE, Edges
from stickyring.node.limits import NO_LIMITS, Limits
from stickyring.node.metrics import EngineMetrics, MoveMetrics, RefusedConnections, node_registry
from stickyring.node.reconnect import RECONNECT, Reconnections
from stickyring.node.sessions import Session
from stickyring.node.takeover import ELSEWHERE_HEADER, Predecessor

if TYPE_CHECKING:
    from asgiref.typing import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope

EVENT_STREAM = b"text/event-stream"
FORWARDED = {b"x-forwarded-proto": SCHEME_VARIABLE, b"x-stickyring-client": CLIENT_VARIABLE}


class AsyncRuntime:
    """An ASGI application around the deployed one; attributes and paths are those of `stickyring.node.runtime.Runtime`.

    It must be made, and called, in the event loop's thread. Lifespan events reach the application unchanged.
    """

    def __init__(
        self,
        application: Application,
        *,
        node_name: str,
        max_connections: int,
        edges: Edges | None = None,
        limits: Limits = NO_LIMITS,
    ) -> None:
        self._edges = edges or Edges()
        self._registry = node_registry(node_name)
        self.sessions: dict[str, Session] = {}
        self.move_metrics = MoveMetrics(self._registry)
        self._refused = RefusedConnections(self._registry)
        self._requests: set[object] = set()
        self.drain = Drain(self.sessions, self._requests, self.move_metrics)
        self._reconnections = Reconnections(self.sessions, self.move_metrics)
        self._deployed = application
        self._application: Any = application.call
        self._paths = application.paths
        servers = application.servers
        metrics = (
            EngineMetrics([server.eio for server in servers], max_connections, self._registry, self.sessions)
            if servers
            else None
        )
        self._streams = register_bus(servers, self._registry)
        self._gates = [
            AsyncSocketIOGate(server, metrics, max_connections, self.sessions, self.drain, limits=limits)
            for server in servers
            if metrics
        ]

    def is_kept(self, sid: str) -> bool:
        """Return whether the bus has a session, so that its client can go on with it anywhere."""
        return any(stream.recovery.is_saved(sid) for stream in self._streams)

    async def __call__(self, scope: "Scope", receive: "ASGIReceiveCallable", send: "ASGISendCallable") -> None:
        """Serve one request, WebSocket or lifespan."""
        if scope["type"] == "lifespan":
            await self._application(scope, receive, send)
            return
        from_edge = self._tell_scheme_and_client(scope)
        path = scope["path"]
        for stream in self._streams:
            stream.start()  # python-socketio would start it with the first session
        socket_io = self._paths.match(path, scope["query_string"].decode("latin-1"))
        if socket_io and path.endswith(self._paths.known):
            # Some clients (Swift, Dart) omit the slash, and Node.js accepts that.
            scope["path"] += "/"
        if path == "/healthz":
            await _text(send, 200, "ok")
        elif path == "/readyz":
            await _text(send, *self._readiness())
        elif path == "/metrics":
            await _body(send, 200, generate_latest(self._registry), CONTENT_TYPE_LATEST)
        elif from_edge and (scope.get("method"), path) == RECONNECT:
            status, body = self._reconnections.answer(scope["query_string"].decode("latin-1"))
            await _body(send, status, body, "application/json")
        elif socket_io:
            await self._application(scope, receive, send)
        elif self.drain.active:
            await self._refuse(scope, send)
        elif scope["type"] == "websocket":
            # Not counted: it may stay open as long as it likes.
            await self._application(scope, receive, send)
        else:
            await self._pass_on(scope, receive, send)

    def succeed(self, predecessor: Predecessor | None) -> None:
        """Pass requests of the predecessor's sessions on to it."""
        for gate in self._gates:
            gate.predecessor = predecessor

    def heed(self, exhausted: Callable[[], bool], refused: Callable[[], int]) -> None:
        """Accept no new sessions while `exhausted()` is true: the worker has no descriptors left.

        `refused()` is the number of connections that it has refused for that reason, for the metrics.
        """
        self._refused.count = refused
        for gate in self._gates:
            gate.exhausted = exhausted

    async def end(self) -> None:
        """End what sessions are left, with the application's disconnect handlers."""
        await asyncio.gather(*(session.leave() for session in [*self.sessions.values()]))  # type: ignore[attr-defined]

    async def try_once(self, path: str, state: Mapping[str, Any]) -> None:
        """Let the application answer a request for `/`, and a handshake on each path; `state` is the lifespan's.

        Raises:
            CannotBeServedError: it raises an exception, or what it sends is no answer.
        """
        await _ask(path, self._application, state, "/")
        for known in self._paths.known:
            before = len(self.sessions)
            status = await _ask(path, self, state, f"{known}/", b"EIO=4&transport=polling")
            self._deployed.check_handshake(f"{known}/", status, begun=len(self.sessions) > before)

    async def _pass_on(self, scope: "Scope", receive: "ASGIReceiveCallable", send: "ASGISendCallable") -> None:
        """Call the application; a drain waits for its answer, but not for a stream of events, which does not end."""
        request = object()
        self._requests.add(request)

        async def watch(event: "ASGISendEvent") -> None:
            if event["type"] == "http.response.start":
                headers = list(event.get("headers", ()))
                event = {**event, "headers": headers}
                if any(name.lower() == b"content-type" and value.startswith(EVENT_STREAM) for name, value in headers):
                    self._requests.discard(request)
            await send(event)

        try:
            await self._application(scope, receive, watch)
        finally:
            self._requests.discard(request)

    async def _refuse(self, scope: "Scope", send: "ASGISendCallable") -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.http.response.start", "status": 503, "headers": [_ELSEWHERE]})
            await send({"type": "websocket.http.response.body", "body": b"", "more_body": False})
        else:
            await _body(send, 503, b"", "text/plain", _ELSEWHERE)

    def _tell_scheme_and_client(self, scope: Any) -> bool:  # noqa: ANN401 - asgiref has types for reading only
        """Set them in the scope; return whether it is an edge's own request."""
        # A process that took over passes requests on over a Unix socket, which has no address.
        told: dict[str, Any] = {"REMOTE_ADDR": (scope.get("client") or (LOOPBACK[0],))[0]}
        for name, value in scope["headers"]:
            if (variable := FORWARDED.get(name)) is not None:
                told[variable] = value.decode("latin-1")
        secure = scope["type"] == "websocket"
        from_edge = self._edges.tell(told)
        if scheme := told.get("wsgi.url_scheme"):
            scope["scheme"] = scheme.replace("http", "ws") if secure else scheme
        scope["client"] = (told["REMOTE_ADDR"], (scope.get("client") or ("", 0))[1])
        return from_edge

    def _readiness(self) -> tuple[int, str]:
        if self.drain.active:
            return 503, "draining"
        if any(gate.full for gate in self._gates):
            return 503, "full"
        return 200, "ready"


_ELSEWHERE = (ELSEWHERE_HEADER.encode(), b"1")


async def _text(send: "ASGISendCallable", status: int, text: str) -> None:
    await _body(send, status, f"{text}\n".encode(), "text/plain; charset=utf-8")


async def _body(send: "ASGISendCallable", status: int, body: bytes, kind: str, *headers: tuple[bytes, bytes]) -> None:
    lines = [(b"content-type", kind.encode()), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": lines, "trailers": False})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _ask(
    path: str,
    application: Any,  # noqa: ANN401 - any callable
    state: Mapping[str, Any],
    target: str,
    query: bytes = b"",
) -> int:
    """Return the status of an application's answer to one GET."""
    statuses: list[int] = []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": target,
        "raw_path": target.encode(),
        "root_path": "",
        "query_string": query,
        "headers": [(b"host", b"127.0.0.1")],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 80),
        "state": {**state},
    }

    asked: list[bool] = []
    ended = asyncio.Event()

    async def receive() -> dict[str, object]:
        if asked:
            await ended.wait()
            return {"type": "http.disconnect"}
        asked.append(True)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(event: dict[str, Any]) -> None:
        if event["type"] == "http.response.start":
            statuses.append(event["status"])
            # The first sign of an answer is enough: a stream may have no end.
            ended.set()

    try:
        answer = await application(scope, receive, send)
    except Exception as error:
        raise CannotBeServedError(f"it fails on a request for {target}: {describe(error)}") from error
    if answer is not None or not statuses:
        raise CannotBeServedError(
            f"for a request it returns an object of {type(answer).__name__} and sends no answer; if it makes the "
            f"application, write {path}()"
        )
    return statuses[0]
