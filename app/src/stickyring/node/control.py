"""The control socket: HTTP on a Unix socket, over which a host's operator queries and controls its node.

It serves the commands of `stickyring.node.operate` and cannot be reached over the network. Every answer is a JSON
object; an error has `error`, a line of text.

    GET  /sessions[?key=KEY]  200 {"node": name, "release": name of the deployed release, "sessions": [{"key": "alice" |
                              null, "cluster": "nodes" | null, "transport": "polling" | "websocket", "seconds": open
                              for so long, "kept": whether the bus has it, so that its client can go on with it
                              anywhere, "request_id": what the edge's log calls the handshake}]}
    POST /rebalance           body {"ring": ring document, "rate": sessions per second, optional}
                              202 as GET /rebalance; 400 invalid body; 409 a rebalance is running
    GET  /rebalance           200 {"running", "rate", "seconds" since the start; numbers of sessions: "to_move",
                              "staying" and "without_key" at the start, "asked" so far, "left" of the asked ones,
                              "returned": here at the end, but assigned to another node; numbers of users:
                              "users_asked", "users_returned"}; {"running": false} if there was none since the node
                              started
    POST /drain               202 as GET /drain: the node refuses new users, and asks all users to reconnect
    POST /undrain             200 as GET /drain: the node accepts users again; 409 the node is about to stop
    GET  /drain               200 {"draining", "drained": whether all users have left; numbers of sessions: "sessions"
                              open, "to_move" found so far, "asked", "left" of the asked ones; "requests": number being
                              answered}

For `stickyring.node.takeover`:

    GET  /listener            200 {"process": id of the node's master}, with the descriptor of its listening socket as
                              ancillary data (SCM_RIGHTS); 409 the node cannot be replaced now
    POST /retire              202 {"relay": name of an abstract Unix socket, on which it still answers requests of its
                              sessions}: the node has left its listening socket to the caller, drains and ends; 409 it
                              cannot, and keeps serving. If the caller has hung up, it ignores the request.
"""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from stickyring.node.drain import Drain
from stickyring.node.metrics import RELEASE, MoveMetrics
from stickyring.node.mover import FASTEST_RATE
from stickyring.node.rebalance import Rebalance, default_rate
from stickyring.node.sessions import Session
from stickyring.node.takeover import CannotRetireError, Incumbent
from stickyring.ring import Ring, RingError

log = logging.getLogger(__name__)

REQUEST_SECONDS = 10
"""How long a request may take to arrive."""
LARGEST_BODY = 8 * 2**20
ACCEPT_PAUSE_SECONDS = 0.2


class Refusal(Exception):
    """A request is refused; the answer has `status`, and the text as `error`."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class Control:
    """Answers the requests on a node's control socket, in JSON's types."""

    def __init__(
        self,
        node_name: str,
        sessions: Mapping[str, Session],
        metrics: MoveMetrics,
        drain: Drain,
        incumbent: Incumbent,
        *,
        is_kept: Callable[[str], bool] = lambda sid: False,
    ) -> None:
        self._node_name = node_name
        self._drain = drain
        self._sessions = sessions
        self._metrics = metrics
        self._incumbent = incumbent
        self._is_kept = is_kept
        self._rebalance: Rebalance | None = None
        self._known_ring: tuple[str, Ring] | None = None

    def answer(self, method: str, target: str, body: bytes) -> tuple[HTTPStatus, dict[str, Any]]:
        """Handle a request; return status and answer. `listener` in the answer is a descriptor, and sent as one.

        Raises:
            Refusal: the request is unknown, invalid or not possible now.
            CannotRetireError: see `Incumbent`.
        """
        parts = urlsplit(target)
        status = HTTPStatus.OK
        match method, parts.path:
            case "GET", "/sessions":
                wanted = parse_qs(parts.query, errors="surrogateescape").get("key", [None])[0]
                answer = self._list_sessions(wanted)
            case "POST", "/rebalance":
                status, answer = HTTPStatus.ACCEPTED, self._start_rebalance(body)
            case "GET", "/rebalance":
                answer = {"running": False} if self._rebalance is None else self._rebalance.progress()
            case "POST", "/drain":
                self._drain.begin()
                status, answer = HTTPStatus.ACCEPTED, self._drain.progress()
            case "POST", "/undrain":
                if not self._drain.cancel():
                    raise Refusal(HTTPStatus.CONFLICT, "the node is about to stop")
                answer = self._drain.progress()
            case "GET", "/drain":
                answer = self._drain.progress()
            case "GET", "/listener":
                answer = self._incumbent.hand_over()
            case "POST", "/retire":
                status, answer = HTTPStatus.ACCEPTED, self._incumbent.retire()
            case _:
                raise Refusal(HTTPStatus.NOT_FOUND, f"there is no {method} {parts.path}")
        return status, answer

    def _list_sessions(self, wanted: str | None) -> dict[str, Any]:
        found = [
            {
                "key": session.key,
                "cluster": session.cluster,
                "transport": session.transport,
                "seconds": round(session.seconds, 3),
                "kept": self._is_kept(sid),
                "request_id": session.request_id,
            }
            for sid, session in [*self._sessions.items()]
            if not session.ended and wanted in {None, session.key}
        ]
        return {"node": self._node_name, "release": RELEASE, "sessions": found}

    def _start_rebalance(self, body: bytes) -> dict[str, Any]:
        try:
            order = json.loads(body)
        except ValueError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"the request is not JSON: {error}") from None
        if not isinstance(order, dict) or "ring" not in order or order.keys() - {"ring", "rate"}:
            raise Refusal(HTTPStatus.BAD_REQUEST, "the request is not an object with ring and optionally rate")
        try:
            ring = self._ring(order["ring"])
        except RingError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"invalid ring: {error}") from None
        rate = order.get("rate", default_rate(ring))
        if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate <= FASTEST_RATE:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"rate: {rate!r} is not a number above 0, up to {FASTEST_RATE}")
        if self._rebalance is not None and self._rebalance.running:
            raise Refusal(HTTPStatus.CONFLICT, "a rebalance is running")
        self._rebalance = Rebalance(self._node_name, self._sessions, ring, rate, self._metrics)
        self._metrics.off_ring.count = self._rebalance.count_elsewhere
        if self._rebalance.progress()["to_move"]:
            threading.Thread(target=self._rebalance.run, daemon=True).start()
        else:
            # The usual case: the answer says that it has ended, and the command need not poll.
            self._rebalance.run()
        return self._rebalance.progress()

    def _ring(self, document: dict[str, Any]) -> Ring:
        # Building a ring blocks this process, for seconds with large weights, and usually it is the last ring again.
        # Compared as text, because true equals 1 in Python.
        text = json.dumps(document, sort_keys=True)
        if self._known_ring is None or self._known_ring[0] != text:
            self._known_ring = text, Ring.load(document)
        return self._known_ring[1]


class ControlServer(ThreadingMixIn, UnixStreamServer):
    """Serves a `Control` on a listening Unix socket, with a thread per request.

    Threads and sockets are the standard library's, patched or not by the worker class. The base's own loop is not used:
    it waits in a selector, which not every worker class patches.
    """

    daemon_threads = True

    def __init__(self, listener: socket.socket, control: Control) -> None:
        super().__init__("", _Request, bind_and_activate=False)
        self.socket.close()
        # A new object for the same descriptor: sockets may be patched here, but the master's is not.
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=listener.detach())
        self.control = control

    def run(self) -> None:
        """Serve for ever."""
        while True:
            try:
                connection, address = self.get_request()
            except OSError as error:
                log.warning("the control socket cannot accept a connection: %s", error.strerror)
                time.sleep(ACCEPT_PAUSE_SECONDS)
                continue
            self.process_request(connection, address)

    def handle_error(self, request: object, client_address: object) -> None:
        """Log the error of one request; the server goes on."""
        log.exception("a request on the control socket failed")


class _Request(BaseHTTPRequestHandler):
    server: ControlServer
    timeout = REQUEST_SECONDS

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        # If the caller has hung up, no process would replace this one.
        if self.path != "/retire" or self._is_awaited():
            self._answer()

    def _answer(self) -> None:
        try:
            status, answer = self.server.control.answer(self.command, self.path, self._body())
        except Refusal as refusal:
            status, answer = refusal.status, {"error": str(refusal)}
        except CannotRetireError as cause:
            status, answer = HTTPStatus.CONFLICT, {"error": str(cause)}
        except Exception as error:
            log.exception("%s %s failed on the control socket", self.command, self.path.partition("?")[0])
            status, answer = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"the node failed: {type(error).__name__}"}
        descriptors = [answer.pop("listener")] if "listener" in answer else []
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if descriptors:
            socket.send_fds(self.connection, [body], descriptors)
        else:
            self.wfile.write(body)

    def _is_awaited(self) -> bool:
        """Whether the caller is still connected; then there is nothing to read, because nothing follows a request."""
        self.connection.setblocking(False)
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            self.connection.settimeout(self.timeout)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the request is larger than {LARGEST_BODY} bytes")
        return self.rfile.read(int(length))

    def log_message(self, format: str, *args: object) -> None:
        pass
