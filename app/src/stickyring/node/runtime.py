"""What a node adds to the application that it serves: health, readiness, metrics, a cap, and its users' sessions."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import socketio
from prometheus_client import make_wsgi_app

from stickyring.node.drain import Drain
from stickyring.node.forwarded import Edges
from stickyring.node.gate import SocketIOGate, refuse
from stickyring.node.metrics import MoveMetrics, node_registry
from stickyring.node.sessions import Session
from stickyring.node.takeover import ELSEWHERE_HEADER, Predecessor

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


class Runtime:
    """A WSGI application around the deployed one.

    It answers `/healthz` (200: the process lives), `/readyz` (200: accepts new users; 503: full or draining) and
    `/metrics` (Prometheus exposition) itself; every other request reaches the application unchanged. While the node
    drains, the edge is asked to try the next node instead.

    A `socketio.WSGIApp` gets a `SocketIOGate`. One inside another WSGI application is not recognised, and is served
    like any other application.

    The application sees the client's scheme and address if an edge sends them (`stickyring.node.forwarded`).

    `sessions` holds the open sessions by Engine.IO id; it is empty without a gate. `move_metrics` counts moved
    sessions. `drain` empties the node.
    """

    def __init__(
        self, application: "WSGIApplication", *, node_name: str, max_connections: int, edges: Edges | None = None
    ) -> None:
        self._edges = edges or Edges()
        registry = node_registry(node_name)
        self.sessions: dict[str, Session] = {}
        self.move_metrics = MoveMetrics(registry)
        self._requests: set[object] = set()
        self.drain = Drain(self.sessions, self._requests, self.move_metrics)
        self._metrics: WSGIApplication = make_wsgi_app(registry)
        self._gate: SocketIOGate | None = None
        if isinstance(application, socketio.WSGIApp):
            application = self._gate = SocketIOGate(application, max_connections, registry, self.sessions, self.drain)
        self._application = application

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Serve one request."""
        self._edges.tell(environ)
        if self._gate is not None and environ["PATH_INFO"] == self._gate.path.rstrip("/"):
            # Some clients (Swift, Dart) omit the slash, and Node.js accepts that.
            environ["PATH_INFO"] = self._gate.path
        match environ["PATH_INFO"]:
            case "/healthz":
                return _text(start_response, "200 OK", "ok")
            case "/readyz":
                return self._readiness(start_response)
            case "/metrics":
                return self._metrics(environ, start_response)
            case path if self.drain.active and not (self._gate and path.startswith(self._gate.path)):
                return refuse(start_response, [(ELSEWHERE_HEADER, "1")])
            case _ if "HTTP_UPGRADE" in environ:
                # Not wrapped: a drain waits for its session, and gunicorn checks the answer's type.
                return self._application(environ, start_response)
            case _:
                return _Answer(self._application, environ, start_response, self._requests)

    def succeed(self, predecessor: Predecessor | None) -> None:
        """Pass requests of the predecessor's sessions on to it."""
        if self._gate is not None:
            self._gate.predecessor = predecessor

    def heed(self, exhausted: Callable[[], bool]) -> None:
        """Accept no new sessions while `exhausted()` is true: the worker has no descriptors left."""
        if self._gate is not None:
            self._gate.exhausted = exhausted

    def _readiness(self, start_response: "StartResponse") -> Iterable[bytes]:
        if self.drain.active:
            return _text(start_response, "503 Service Unavailable", "draining")
        if self._gate is not None and self._gate.full:
            return _text(start_response, "503 Service Unavailable", "full")
        return _text(start_response, "200 OK", "ready")


class _Answer:
    """An application's answer; it is in `under_way` until it is closed."""

    def __init__(
        self,
        application: "WSGIApplication",
        environ: "WSGIEnvironment",
        start_response: "StartResponse",
        under_way: set[object],
    ) -> None:
        self._under_way = under_way
        under_way.add(self)
        try:
            self._body = application(environ, start_response)
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


def _text(start_response: "StartResponse", status: str, text: str) -> Iterable[bytes]:
    body = f"{text}\n".encode()
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
    return [body]
