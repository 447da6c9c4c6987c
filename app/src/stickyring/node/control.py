"""The control socket: HTTP on a Unix socket, by which a host's operator asks its node and tells it what to do.

It serves the commands of `stickyring.node.operate` and cannot be reached over the network. Every answer is a JSON
object; one that refuses has `error`, a line of text.

    GET  /sessions[?key=KEY]  200 {"node": name, "sessions": [{"key": "alice" | null, "cluster": "nodes" | null,
                              "transport": "polling" | "websocket", "seconds": it has been open}]}
    POST /rebalance           takes {"ring": ring document, "rate": sessions a second, may be absent}
                              202 as GET /rebalance; 400 no such thing; 409 one is running
    GET  /rebalance           200 {"running", "rate", "seconds" since it began, and numbers of sessions: "to_move",
                              "staying" and "without_key" when it began; "asked" so far; "left", those of them that are
                              gone; "returned", here when it ended though the ring has them elsewhere; and of users,
                              "users_asked" and "users_returned"}; only "running", false, if there was none since the
                              node started
    POST /drain               202 as GET /drain: nobody is taken in any more, and everybody is asked to leave
    POST /undrain             200 as GET /drain: users are taken in again; 409 the node is about to stop
    GET  /drain               200 {"draining", "drained": whether everybody has left, and numbers of sessions:
                              "sessions" that are open, "to_move" found so far, "asked", and "left", those of them that
                              are gone; "requests" that are being answered}
    GET  /listener            200 {"process": id of the node's master}, and as ancillary data beside it (SCM_RIGHTS) the
                              descriptor of its listening socket; 409 the node could not be replaced now
    POST /retire              202 {"relay": name of an abstract Unix socket, on which it answers requests of its
                              sessions meanwhile}: the node has left its listening socket to whoever asked, drains and
                              ends; 409 it cannot, and goes on; it goes on, too, when whoever asked has hung up.
                              Both are for `stickyring.node.takeover`
"""

import json
import logging
import socket
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from stickyring.node.drain import Drain
from stickyring.node.metrics import MoveMetrics
from stickyring.node.rebalance import Rebalance, default_rate
from stickyring.node.sessions import Session
from stickyring.node.takeover import CannotRetireError, Incumbent
from stickyring.ring import Ring, RingError

log = logging.getLogger(__name__)

REQUEST_SECONDS = 10
"""How long a request may take to arrive."""
LARGEST_BODY = 8 * 2**20
FASTEST_RATE = 10_000
ACCEPT_PAUSE_SECONDS = 0.2


class Refusal(Exception):
    """A request that is answered with `status` and the text as `error`."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class Control:
    """What a node is asked and told over its control socket; answers are given as they are sent, in JSON's types."""

    def __init__(
        self,
        node_name: str,
        sessions: Mapping[str, Session],
        metrics: MoveMetrics,
        drain: Drain,
        incumbent: Incumbent,
    ) -> None:
        self._node_name = node_name
        self._drain = drain
        self._sessions = sessions
        self._metrics = metrics
        self._incumbent = incumbent
        self._rebalance: Rebalance | None = None
        self._known_ring: tuple[str, Ring] | None = None

    def answer(self, method: str, target: str, body: bytes) -> tuple[HTTPStatus, dict[str, Any]]:
        """Do what a request asks; `listener` in an answer is a descriptor, and sent as such.

        Raises:
            Refusal: it asks for nothing that there is, or for nothing that can be done now.
            CannotRetireError: as `Incumbent` has it.
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
                raise Refusal(HTTPStatus.NOT_FOUND, f"nothing answers {method} {parts.path} here")
        return status, answer

    def _list_sessions(self, wanted: str | None) -> dict[str, Any]:
        found = [
            {
                "key": session.key,
                "cluster": session.cluster,
                "transport": session.transport,
                "seconds": round(session.seconds, 3),
            }
            for session in [*self._sessions.values()]
            if not session.ended and wanted in {None, session.key}
        ]
        return {"node": self._node_name, "sessions": found}

    def _start_rebalance(self, body: bytes) -> dict[str, Any]:
        try:
            order = json.loads(body)
        except ValueError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"the request is not JSON: {error}") from None
        if not isinstance(order, dict) or "ring" not in order or order.keys() - {"ring", "rate"}:
            raise Refusal(HTTPStatus.BAD_REQUEST, "a rebalance takes an object with ring and, if wanted, rate")
        try:
            ring = self._ring(order["ring"])
        except RingError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"this is no ring: {error}") from None
        rate = order.get("rate", default_rate(ring))
        if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate <= FASTEST_RATE:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"rate: {rate!r} is not a number of sessions up to {FASTEST_RATE}")
        if self._rebalance is not None and self._rebalance.running:
            raise Refusal(HTTPStatus.CONFLICT, "a rebalance is running")
        self._rebalance = Rebalance(self._node_name, self._sessions, ring, rate, self._metrics)
        if self._rebalance.progress()["to_move"]:
            threading.Thread(target=self._rebalance.run, daemon=True).start()
        else:
            # Mostly: the answer then says that it is over, and whoever asked need not ask again.
            self._rebalance.run()
        return self._rebalance.progress()

    def _ring(self, document: dict[str, Any]) -> Ring:
        # Making one keeps all else in this process waiting, for seconds with heavy weights; mostly it is the last one.
        # Compared as text: in Python, true equals 1.
        text = json.dumps(document, sort_keys=True)
        if self._known_ring is None or self._known_ring[0] != text:
            self._known_ring = text, Ring.load(document)
        return self._known_ring[1]


class ControlServer(ThreadingMixIn, UnixStreamServer):
    """Serves a `Control` on a listening Unix socket, a thread a request.

    The threads and sockets are the standard library's, as the worker class has patched it or not. The base's own loop
    is not used: it waits in a selector, which not all of them patch.
    """

    daemon_threads = True

    def __init__(self, listener: socket.socket, control: Control) -> None:
        super().__init__("", _Request, bind_and_activate=False)
        self.socket.close()
        # Made anew by descriptor: this one may be a green socket, which the master's is not.
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=listener.detach())
        self.control = control

    def run(self) -> None:
        """Serve for ever."""
        while True:
            try:
                connection, address = self.get_request()
            except OSError as error:
                log.warning("the control socket accepts nothing for now: %s", error.strerror)
                time.sleep(ACCEPT_PAUSE_SECONDS)
                continue
            self.process_request(connection, address)

    def handle_error(self, request: object, client_address: object) -> None:
        """Log what went wrong with one request; it concerns nobody else."""
        log.exception("a request on the control socket has failed")


class _Request(BaseHTTPRequestHandler):
    server: ControlServer
    timeout = REQUEST_SECONDS

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        # There would be nobody to take the place of this node.
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
        """Whether the other end is still there; nothing follows a request, so there is nothing to read if it is."""
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
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {LARGEST_BODY} bytes")
        return self.rfile.read(int(length))

    def log_message(self, format: str, *args: object) -> None:
        pass
