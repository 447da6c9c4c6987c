"""What stands before a Socket.IO application: a cap, counting, and whose each session is."""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

import socketio
from prometheus_client import CollectorRegistry

from stickyring.node.drain import Drain
from stickyring.node.metrics import TRANSPORTS, Engine, EngineMetrics, Packet
from stickyring.node.packets import HandlerError, body_of, check_packets
from stickyring.node.sessions import ISSUED_VARIABLE, SESSION_VARIABLE, Session, SessionWebSocket, key_of
from stickyring.node.takeover import ELSEWHERE_HEADER, Predecessor
from stickyring.node.websocket import PROTOCOL_ERROR, SOCKET_VARIABLE, Server, WebSocket, refusal

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)

ENGINE_IO_PROTOCOL = "4"
RETRY_LATER = ("Retry-After", "5")
NO_SNIFFING = ("X-Content-Type-Options", "nosniff")
JSON = [("Content-Type", "application/json")]
UNKNOWN_SESSION = b'{"code":1,"message":"Session ID unknown"}'
BAD_REQUEST = b'{"code":3,"message":"Bad request"}'
"""Engine.IO's own errors, as Node.js writes them."""
MOVED = b'"This session has moved: connect again"'
FAILED = b'"This session has ended for an error"'
NOOP = b"6"
JOIN_SECONDS = 45.0
"""How long a client may take to join a namespace (the Socket.IO packet CONNECT); `connectTimeout` of socket.io."""


class SocketIOGate:
    """Stands before a `socketio.WSGIApp`: refuses new handshakes when the node is full, counts, and knows the sessions.

    It works for any such application, through public names of python-engineio's server: `on()` and `handlers` (the
    events connect, message and disconnect), `send_packet()` (every message that goes out) and `sockets` (the sessions).
    A session is in `sessions` from its connect event to its disconnect event. WebSockets are those of
    `stickyring.node.websocket`, which the engine finds where its asynchronous mode has its own; that name is not
    public, and the engine's version is pinned. What the application sends goes to them at once where nothing waits
    before it. Each session receives POSTs and hands out packets in place of the engine, and `stickyring.node.packets`
    says what may be in them.

    Whatever fails while a request, a packet or a WebSocket of a session is handled ends the session at once, and its
    client gets an error. So does JOIN_SECONDS without a namespace.

    A handshake is a GET without `sid`. Above `max_connections` sessions, one of protocol 4 gets 503 with Retry-After
    before the engine sees it. Older protocols are left to the engine, which answers 400 and says so.

    While the node is drained, or its worker `exhausted`, handshakes are sent on: they get 503 with ELSEWHERE_HEADER.
    (Such a worker answers on the connections that it has, and refuses new ones. A session made here on an old one would
    end with its next request on a new one.) So is, at any time, a request of a session that is not here, if its user
    has a key: after a node has gone, come or come back, the session of a client that polls is on the next node of the
    ring until a rebalance ends it, and lives on there. If no node has it, the last answer, the protocol's 400, is the
    client's. Without a key, and with one that the edge has made up for this request, there is no such order, and the
    engine answers 400.

    JSONP polling, which runs what comes in the page, is refused; protocol 4 has none.

    Who ends the connection of a poll that waits has left, as with Node.js.

    A poll that ends because its session was moved is answered with 410: the one answer after which every client, of
    JavaScript and of Python, takes the connection for lost and makes a new one.
    """

    def __init__(
        self,
        application: socketio.WSGIApp,
        max_connections: int,
        registry: CollectorRegistry,
        sessions: dict[str, Session],
        drain: Drain,
    ) -> None:
        self._application = application
        self.path: str = application.engineio_path
        self._sessions = sessions
        self._drain = drain
        self._max_connections = max_connections
        self._server: socketio.Server = application.engineio_app
        self._engine: Engine = self._server.eio
        check_packets(self._server)
        # The only way to have python-engineio take another WebSocket.
        self._engine._async = {**self._engine._async, "websocket": _choose_websocket(self._engine._async["websocket"])}
        self._metrics = EngineMetrics(self._engine, max_connections, registry)
        # Who has to have joined when, the first one first.
        self._arrivals: deque[tuple[float, str]] = deque()
        self._watches_arrivals = False
        self.predecessor: Predecessor | None = None
        self.exhausted: Callable[[], bool] = lambda: False
        self._watch()

    @property
    def full(self) -> bool:
        """Whether a new handshake would be refused."""
        # The engine keeps a polling session that has ended until its next round; it takes nobody's place.
        return len(self._sessions) >= self._max_connections

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Serve one request."""
        if not environ["PATH_INFO"].startswith(self.path):
            return self._pass_on(environ, start_response)
        if self.predecessor is not None and (passed_on := self._ask_predecessor(self.predecessor, environ)):
            return _answer(start_response, *passed_on)
        return self._serve(environ, start_response)

    def _serve(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        # Where python-engineio does not look: it would make a class for each request, for eventlet's WebSocket.
        environ[SOCKET_VARIABLE] = environ.pop("gunicorn.socket", None)
        query = environ.get("QUERY_STRING", "")
        sid = _parameter(query, "sid")
        session = self._sessions.get(sid or "")
        if session is not None:
            environ[SESSION_VARIABLE] = session
        if (refused := self._refusal(environ, query, sid, session)) is not None:
            return _answer(start_response, *refused)
        if _is_a_websocket(environ):
            if environ[SOCKET_VARIABLE] is None:
                return self._pass_on(environ, start_response)
            if session is not None and (session.socket.upgrading or session.socket.upgraded):
                # One at a time. Node.js opens the other one as well, and closes it.
                WebSocket(lambda websocket: websocket.fail(PROTOCOL_ERROR), self._engine)(environ, start_response)
                raise StopIteration
        if sid is None and environ["REQUEST_METHOD"] == "GET":
            return self._handshake(environ, start_response, _transport_label(query), _parameter(query, "EIO") or "")
        answer = self._poll(session, environ) if session is not None and _is_a_poll(environ) else self._ask(environ)
        if session is not None and session.failed == "too_long" and answer[0].startswith("400"):
            answer = "413 Content Too Large", *answer[1:]
        return _answer(start_response, *_conforming(environ, answer))

    def _refusal(
        self, environ: "WSGIEnvironment", query: str, sid: str | None, session: Session | None
    ) -> tuple[str, list[tuple[str, str]], bytes] | None:
        """Return status, headers and body for a request that the engine must not see; else None."""
        if session is None and sid is not None:
            # The engine keeps one that has ended until its next round, and fails on a POST for it.
            self._engine.sockets.pop(sid, None)
            self._metrics.unknown_sessions.labels(_transport_label(query)).inc()
            if self._drain.active or (key_of(environ) is not None and ISSUED_VARIABLE not in environ):
                return "400 Bad Request", [*JSON, (ELSEWHERE_HEADER, "1")], UNKNOWN_SESSION
        elif session is None and (self._drain.active or self.exhausted()):
            if environ["REQUEST_METHOD"] == "GET":
                reason = "draining" if self._drain.active else "descriptors"
                self._metrics.refused.labels(_transport_label(query), reason).inc()
            return "503 Service Unavailable", [(ELSEWHERE_HEADER, "1"), RETRY_LATER], b""
        if _parameter(query, "j") is not None:
            return "400 Bad Request", JSON, BAD_REQUEST
        if environ[SOCKET_VARIABLE] is None or not _is_a_websocket(environ):
            return None
        refused = refusal(environ)
        if refused and sid is None:
            self._metrics.refused.labels(_transport_label(query), "bad_request").inc()
        return (*refused, b"") if refused else None

    def _pass_on(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        answer: Iterable[bytes] = self._application(environ, start_response)
        return answer

    def _ask_predecessor(
        self, predecessor: Predecessor, environ: "WSGIEnvironment"
    ) -> tuple[str, list[tuple[str, str]], bytes] | None:
        """Return what the process before this one says to a request of one of its sessions; None if it is none."""
        sid = _parameter(environ.get("QUERY_STRING", ""), "sid")
        # A WebSocket is not passed on: its client goes on with polls.
        if sid is None or sid in self._sessions or "HTTP_UPGRADE" in environ:
            return None
        try:
            body = body_of(environ, int(self._engine.max_http_buffer_size))
        except Exception:  # whatever the server raises for a body that is none
            return None
        return predecessor.ask(environ, body.encode(), self._engine.ping_interval + self._engine.ping_timeout)

    def _ask(self, environ: "WSGIEnvironment") -> tuple[str, list[tuple[str, str]], bytes]:
        """Return status, headers and body of the application's answer; it does not return from a WebSocket."""
        begun: list[tuple[str, list[tuple[str, str]]]] = []

        def begin(status: str, headers: list[tuple[str, str]], *exc_info: "OptExcInfo") -> Callable[[bytes], object]:
            begun.append((status, [*headers]))
            return lambda _: None

        try:
            body = b"".join(self._application(environ, begin))
        except OSError:
            raise  # a WebSocket whose client has gone, which knows what that means
        except Exception as error:
            if (session := environ.get(SESSION_VARIABLE)) is not None:
                session.fail("packet", error)
            raise
        if not begun:
            # What gunicorn takes for the end of a connection, of which nothing more is to be read or written.
            raise StopIteration
        ((status, headers),) = begun
        return status, headers, body

    def _poll(self, session: Session, environ: "WSGIEnvironment") -> tuple[str, list[tuple[str, str]], bytes]:
        session.begin_poll()
        heeding = getattr(environ[SOCKET_VARIABLE], "heeding_its_end", lambda _: contextlib.nullcontext())
        try:
            with heeding(session.lose_poll):
                status, headers, body = self._ask(environ)
        finally:
            session.end_poll()
        if session.ended and not body:
            if session.moved:
                return "410 Gone", [*headers, ("Cache-Control", "no-store")], MOVED
            if session.failed:
                return "400 Bad Request", [*headers, ("Cache-Control", "no-store")], FAILED
            # Its client has closed it.
            return status, headers, NOOP
        return status, headers, body

    def _handshake(
        self, environ: "WSGIEnvironment", start_response: "StartResponse", transport: str, protocol: str
    ) -> Iterable[bytes]:
        supported = protocol == ENGINE_IO_PROTOCOL
        if supported and self.full:
            self._metrics.refused.labels(transport, "capacity").inc()
            return refuse(start_response, [RETRY_LATER])
        # One that is accepted is counted at the engine's connect event. The engine takes polling for the default.
        if supported and _parameter(environ.get("QUERY_STRING", ""), "transport") is None:
            status, headers, body = "400 Bad Request", [*JSON], BAD_REQUEST
        else:
            status, headers, body = self._ask(environ)
        if not status.startswith("200"):
            reason = "unauthorized" if status.startswith("401") else "bad_request"
            self._metrics.refused.labels(transport, reason if supported else "protocol").inc()
        return _answer(start_response, status, headers, body)

    def _watch(self) -> None:
        """Put counting in front of what the Socket.IO server does at the engine's events."""
        engine, metrics, sessions = self._engine, self._metrics, self._sessions
        connect, message, disconnect = (engine.handlers[event] for event in ("connect", "message", "disconnect"))
        send_packet = engine.send_packet

        def on_connect(sid: str, environ: "WSGIEnvironment") -> object:
            answer = connect(sid, environ)
            if answer is None or answer is True:
                transport = _transport_label(environ.get("QUERY_STRING", ""))
                metrics.accepted[transport].inc()
                polling = None if transport == "websocket" else threading.Lock()
                socket = engine.sockets[sid]
                session = Session(engine, socket, polling=polling, on_failure=metrics.count_failure)
                session.note(environ)
                session.stand_in()
                sessions[sid] = environ[SESSION_VARIABLE] = session
                self._expect_to_join(sid)
                log.debug("connected", extra={"sid": sid, "transport": transport})
            return answer

        def on_message(sid: str, data: object) -> object:
            # A session can end between two packets of one payload, and a client can still be sending: what comes after
            # the end is nobody's.
            if (session := sessions.get(sid)) is None or session.ended:
                return None
            metrics.received[session.transport].inc()
            try:
                return message(sid, data)
            except Exception as error:
                session.fail("handler" if isinstance(error, HandlerError) else "packet", error)
                return None

        def on_disconnect(sid: str, *reason: str) -> object:
            session = sessions.pop(sid, None)
            log.debug("disconnected", extra={"sid": sid, "reason": " ".join(reason)})
            try:
                return disconnect(sid, *reason)
            finally:
                if session is not None:
                    session.stand_back()

        def counting_send_packet(sid: str, packet: Packet) -> None:
            if (session := sessions.get(sid)) is not None:
                metrics.sent[session.transport].inc()
            if session is None or (not session.send_at_once(packet) and session.has_room_for(packet)):
                send_packet(sid, packet)

        engine.on("connect", on_connect)
        engine.on("message", on_message)
        engine.on("disconnect", on_disconnect)
        engine.send_packet = counting_send_packet
        self._watch_acknowledgements()

    def _watch_acknowledgements(self) -> None:
        """Count what the application owes, where events are decoded: any serializer may have made them.

        An event for a namespace that the client is not in ends the session, as with Node.js: python-socketio logs it.

        The two names are not public, and python-socketio's version is pinned.
        """
        server, manager, sessions = self._server, self._server.manager, self._sessions
        handle, handle_and_answer = server._handle_event, server._handle_event_internal

        def count_and_handle(eio_sid: str, namespace: str | None, id: int | None, data: object) -> None:
            inside = namespace or "/"
            if not manager.is_connected(manager.sid_from_eio_sid(eio_sid, inside), inside):
                raise ValueError("an event for a namespace that the client is not in")
            if (session := sessions.get(eio_sid)) is None or session.takes(owing=id is not None):
                handle(eio_sid, namespace, id, data)

        def handle_and_count(*event: object) -> None:
            try:
                handle_and_answer(*event)
            finally:
                eio_sid, id = str(event[2]), event[5]
                if id is not None and (session := sessions.get(eio_sid)) is not None:
                    session.handled()

        server._handle_event = count_and_handle
        server._handle_event_internal = handle_and_count

    def _expect_to_join(self, sid: str) -> None:
        self._arrivals.append((time.monotonic() + JOIN_SECONDS, sid))
        if not self._watches_arrivals:
            self._watches_arrivals = True
            self._engine.start_background_task(self._end_who_never_join)

    def _end_who_never_join(self) -> None:
        while True:
            while self._arrivals and self._arrivals[0][0] <= time.monotonic():
                _, sid = self._arrivals.popleft()
                if (session := self._sessions.get(sid)) is not None and not self._has_joined(sid):
                    session.fail("unjoined")
            due = self._arrivals[0][0] if self._arrivals else time.monotonic() + JOIN_SECONDS
            self._engine.sleep(max(due - time.monotonic(), 0))

    def _has_joined(self, sid: str) -> bool:
        manager = self._server.manager
        return any(manager.sid_from_eio_sid(sid, namespace) for namespace in [*manager.get_namespaces()])


def _choose_websocket(other: Callable[..., "WSGIApplication"]) -> Callable[..., "WSGIApplication"]:
    """Return what makes our WebSocket where gunicorn hands the connection over, and the other one elsewhere."""

    def choose(handler: Callable[[WebSocket], object], server: Server) -> "WSGIApplication":
        def open_websocket(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
            ours = environ[SOCKET_VARIABLE] is not None
            return (SessionWebSocket(handler, server) if ours else other(handler, server))(environ, start_response)

        return open_websocket

    return choose


def _parameter(query: str, name: str) -> str | None:
    """Return the first value of a parameter; None if it is not there, or empty."""
    # parse_qs takes longer than everything else here.
    for parameter in query.split("&"):
        found, _, value = parameter.partition("=")
        # python-engineio decodes names too, and has to find the same one.
        if value and (found == name or ("%" in found and unquote_plus(found) == name)):
            return unquote_plus(value)
    return None


def _transport_label(query: str) -> str:
    """Return the transport that is asked for, but keep a client from making up new values of a label."""
    transport = _parameter(query, "transport") or "polling"
    return transport if transport in TRANSPORTS else "other"


def _is_a_websocket(environ: "WSGIEnvironment") -> bool:
    return bool(environ.get("HTTP_UPGRADE", "").lower() == "websocket")


def _is_a_poll(environ: "WSGIEnvironment") -> bool:
    if environ["REQUEST_METHOD"] != "GET" or "HTTP_UPGRADE" in environ:
        return False
    return _transport_label(environ.get("QUERY_STRING", "")) == "polling"


def _conforming(
    environ: "WSGIEnvironment", answer: tuple[str, list[tuple[str, str]], bytes]
) -> tuple[str, list[tuple[str, str]], bytes]:
    """Return an answer of the engine's in the words of the protocol."""
    status, headers, body = answer
    if environ["REQUEST_METHOD"] == "POST" and body == b"OK":
        return status, headers, b"ok"
    return "400 Bad Request" if status.startswith("405") else status, headers, body


def _answer(
    start_response: "StartResponse", status: str, headers: list[tuple[str, str]], body: bytes
) -> Iterable[bytes]:
    # With its length: without, gunicorn sends a body in three pieces. Some have what a user has sent, which no browser
    # is to take for a page.
    start_response(status, [*headers, NO_SNIFFING, ("Content-Length", str(len(body)))])
    return [body]


def refuse(start_response: "StartResponse", headers: list[tuple[str, str]]) -> Iterable[bytes]:
    """Answer 503 with these headers, and with no body."""
    # One that comes a moment after the head ends a client of python-socketio for good.
    start_response("503 Service Unavailable", [("Content-Length", "0"), *headers])
    return []
