"""What a node adds to the application that it serves: health, readiness, metrics, a cap, and its users' sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING

from prometheus_client import make_wsgi_app

from stickyring.bus.metrics import register_bus
from stickyring.node.application import Application, try_once
from stickyring.node.drain import Drain
from stickyring.node.forwarded import Edges
from stickyring.node.gate import SocketIOGate, refuse
from stickyring.node.limits import NO_LIMITS, Limits
from stickyring.node.metrics import EngineMetrics, MoveMetrics, RefusedConnections, node_registry
from stickyring.node.reconnect import RECONNECT, Reconnections
from stickyring.node.sessions import Session
from stickyring.node.takeover import ELSEWHERE_HEADER, Predecessor
from stickyring.node.websocket import SOCKET_VARIABLE

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

EVENT_STREAM = "text/event-stream"


class Runtime:
    """A WSGI application around the deployed one.

    It answers `/healthz` (200: the process lives), `/readyz` (200: accepts new users; 503: full or draining) and
    `/metrics` (Prometheus exposition) itself, and an edge's own requests (`stickyring.node.reconnect`); every other
    request reaches the application unchanged. While the node drains, the edge is asked to try the next node instead.

    Each Socket.IO server in the application gets a `SocketIOGate`; the cap and the drain are for all of them together.

    The application sees the client's scheme and address if an edge sends them (`stickyring.node.forwarded`).

    `sessions` holds the open sessions by Engine.IO id; it is empty without a gate. `move_metrics` counts moved
    sessions. `drain` empties the node.
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
        registry = node_registry(node_name)
        self.sessions: dict[str, Session] = {}
        self.move_metrics = MoveMetrics(registry)
        self._refused = RefusedConnections(registry)
        self._requests: set[object] = set()
        self.drain = Drain(self.sessions, self._requests, self.move_metrics)
        self._reconnections = Reconnections(self.sessions, self.move_metrics)
        self._metrics: WSGIApplication = make_wsgi_app(registry)
        self._deployed = application
        self._application: WSGIApplication = application.call
        self._paths = application.paths
        servers = application.servers
        metrics = (
            EngineMetrics([server.eio for server in servers], max_connections, registry, self.sessions)
            if servers
            else None
        )
        self._streams = register_bus(servers, registry)
        self._gates = [
            SocketIOGate(server, metrics, max_connections, self.sessions, self.drain, limits=limits)
            for server in servers
            if metrics
        ]

    def is_kept(self, sid: str) -> bool:
        """Return whether the bus has a session, so that its client can go on with it anywhere."""
        return any(stream.recovery.is_saved(sid) for stream in self._streams)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        from_edge = self._edges.tell(environ)
        for stream in self._streams:
            stream.start()  # python-socketio would start it with the first session
        path = environ["PATH_INFO"]
        socket_io = self._paths.match(path, environ.get("QUERY_STRING", ""))
        if socket_io:
            # Hidden from python-engineio, which would create a class per request for eventlet's WebSocket.
            environ[SOCKET_VARIABLE] = environ.pop("gunicorn.socket", None)
            if path.endswith(self._paths.known):
                # Some clients (Swift, Dart) omit the slash, and Node.js accepts that.
                environ["PATH_INFO"] += "/"
        match path:
            case "/healthz":
                return _text(start_response, "200 OK", "ok")
            case "/readyz":
                return self._readiness(start_response)
            case "/metrics":
                return self._metrics(environ, start_response)
            case _ if from_edge and (environ["REQUEST_METHOD"], path) == RECONNECT:
                return _json(start_response, *self._reconnections.answer(environ.get("QUERY_STRING", "")))
            case _ if self.drain.active and not socket_io:
                return refuse(start_response, [(ELSEWHERE_HEADER, "1")])
            case _:
                return self._pass_on(environ, start_response)

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

    def try_once(self, path: str, _state: object = None) -> None:
        """Let the application answer a request for `/`, and a handshake on each path of Socket.IO.

        Raises:
            CannotBeServedError: it raises an exception, or what it returns is no answer.
        """
        try_once(path, self._application, "/")
        for known in self._paths.known:
            before = len(self.sessions)
            status = try_once(path, self, f"{known}/", "EIO=4&transport=polling")
            self._deployed.check_handshake(f"{known}/", int(status[:3]), begun=len(self.sessions) > before)

    def _pass_on(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if "HTTP_UPGRADE" in environ:
            # Not wrapped: a drain waits for its session, and gunicorn checks the answer's type.
            return self._application(environ, start_response)
        return _Answer(self._application, environ, start_response, self._requests)

    def _readiness(self, start_response: StartResponse) -> Iterable[bytes]:
        if self.drain.active:
            return _text(start_response, "503 Service Unavailable", "draining")
        if any(gate.full for gate in self._gates):
            return _text(start_response, "503 Service Unavailable", "full")
        return _text(start_response, "200 OK", "ready")


class _Answer:
    """An application's answer; it is in `under_way` until it is closed, unless it is a stream of events."""

    def __init__(
        self,
        application: WSGIApplication,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        under_way: set[object],
    ) -> None:
        self._under_way = under_way
        under_way.add(self)

        def begin(
            status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
        ) -> Callable[[bytes], object]:
            # A stream of events does not end by itself.
            if any(name.lower() == "content-type" and value.startswith(EVENT_STREAM) for name, value in headers):
                under_way.discard(self)
            return start_response(status, headers, exc_info) if exc_info else start_response(status, headers)

        try:
            self._body = application(environ, begin)
        except BaseException:
            under_way.discard(self)
            raise

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        """Close the application's answer (PEP 3333)."""
        self._under_way.discard(self)
        if close := getattr(self._body, "close", None):
            close()


def _json(start_response: StartResponse, status: HTTPStatus, body: bytes) -> Iterable[bytes]:
    start_response(
        f"{status.value} {status.phrase}", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    )
    return [body]


def _text(start_response: StartResponse, status: str, text: str) -> Iterable[bytes]:
    body = f"{text}\n".encode()
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
    return [body]
