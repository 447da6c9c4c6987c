"""The gate in front of a Socket.IO application: it caps and counts connections, and knows the user of each session."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_plus

import socketio

from stickyring.node.drain import Drain
from stickyring.node.limits import Allowance, Limits, network_of
from stickyring.node.metrics import LAG_INTERVAL, TRANSPORTS, Engine, EngineMetrics, Packet
from stickyring.node.packets import HandlerError, body_of, check_packets
from stickyring.node.sessions import (
    ISSUED_VARIABLE,
    REASON,
    SESSION_VARIABLE,
    Session,
    SessionWebSocket,
    key_of,
    names_of,
    request_id_of,
)
from stickyring.node.takeover import ELSEWHERE_HEADER, Predecessor
from stickyring.node.websocket import PROTOCOL_ERROR, SOCKET_VARIABLE, Server, WebSocket, refusal

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)

ENGINE_IO_PROTOCOL = "4"
RETRY_LATER = ("Retry-After", "5")
TOO_MANY = "429 Too Many Requests", [RETRY_LATER], b""
"""The answer to a handshake of an address that has all the sessions that it may have."""
NO_SNIFFING = ("X-Content-Type-Options", "nosniff")
JSON = [("Content-Type", "application/json")]
UNKNOWN_SESSION = b'{"code":1,"message":"Session ID unknown"}'
BAD_REQUEST = b'{"code":3,"message":"Bad request"}'
"""Engine.IO's own errors, as in Node.js."""
MOVED = b'"This session has moved: connect again"'
FAILED = b'"This session has ended for an error"'
NOOP = b"6"
CLIENT_LEFT = "client disconnect"
"""One of `metrics.DISCONNECTS`."""
JOIN_SECONDS = 45.0
"""How long a client may take to join a namespace (the Socket.IO packet CONNECT); `connectTimeout` of socket.io."""


class Gate:
    """What the gates of both runtimes have in common: their state, and which requests the engine must not see."""

    def __init__(
        self,
        server: Any,  # noqa: ANN401 - a socketio.Server or AsyncServer
        metrics: EngineMetrics,
        max_connections: int,
        sessions: dict[str, Session],
        drain: Drain,
        *,
        limits: Limits,
    ) -> None:
        self._server = server
        self._metrics = metrics
        self._max_connections = max_connections
        self._sessions = sessions
        self._drain = drain
        self._limits = limits
        self._open_of_networks: Counter[str] = Counter()
        self._crowded: set[str] = set()  # networks that are over the limit
        self._engine: Engine = server.eio
        self._measures_lag = False
        self.predecessor: Predecessor | None = None
        self.exhausted: Callable[[], bool] = lambda: False

    @property
    def full(self) -> bool:
        """Whether a new handshake would be refused."""
        # Not the engine's own count, which includes ended polling sessions until its next cleanup.
        return len(self._sessions) >= self._max_connections

    def _refusal(
        self, environ: WSGIEnvironment, query: str, sid: str | None, session: Session | None
    ) -> tuple[str, list[tuple[str, str]], bytes] | None:
        """Return status, headers and body for a request that the engine must not see; else None."""
        if session is None and sid is not None:
            # The engine keeps an ended session until its next cleanup, and fails on a POST for it.
            self._engine.sockets.pop(sid, None)
            self._metrics.unknown_sessions.labels(transport_label(query)).inc()
            if self._drain.active or (key_of(environ) is not None and ISSUED_VARIABLE not in environ):
                return "400 Bad Request", [*JSON, (ELSEWHERE_HEADER, "1")], UNKNOWN_SESSION
        elif session is None and (self._drain.active or self.exhausted()):
            if environ["REQUEST_METHOD"] == "GET":
                reason = "draining" if self._drain.active else "descriptors"
                self._metrics.refused.labels(transport_label(query), reason).inc()
            return "503 Service Unavailable", [(ELSEWHERE_HEADER, "1"), RETRY_LATER], b""
        if parameter(query, "j") is not None:
            return "400 Bad Request", JSON, BAD_REQUEST
        refused = self._invalid_websocket(environ)
        if refused and sid is None:
            self._metrics.refused.labels(transport_label(query), "bad_request").inc()
        return (*refused, b"") if refused else None

    def _invalid_websocket(self, environ: WSGIEnvironment) -> tuple[str, list[tuple[str, str]]] | None:
        """Return status and headers for an invalid handshake of a WebSocket; else None."""
        raise NotImplementedError

    def _allowance(self, sid: str) -> Allowance | None:
        """Return what the client of a new session may send; None if it has no limit."""

        def note(kind: str) -> None:
            self._metrics.count_excess(kind)
            names = names_of(sid, self._sessions.get(sid))
            log.info("over the limit", extra={**names, "limit": kind, "enforced": self._limits.enforced})

        return Allowance(self._limits, note) if self._limits.messages or self._limits.size else None

    def _refuses_another_of_its_address(self, environ: WSGIEnvironment, transport: str) -> bool:
        """Return whether a handshake is one too many of its client's address; count it if so, enforced or not."""
        limits, network = self._limits, network_of(environ.get("REMOTE_ADDR", ""))
        if not limits.sessions or self._open_of_networks[network] < limits.sessions:
            return False
        self._metrics.count_excess("sessions")
        if network not in self._crowded:
            self._crowded.add(network)
            told = {"client": network, "request_id": request_id_of(environ), "limit": "sessions"}
            log.info("over the limit", extra={**told, "enforced": limits.enforced})
        if limits.enforced:
            self._metrics.refused.labels(transport, "address").inc()
        return limits.enforced

    def _count_begun(self, session: Session, environ: WSGIEnvironment) -> None:
        session.network = network_of(environ.get("REMOTE_ADDR", ""))
        self._open_of_networks[session.network] += 1

    def _count_ended(self, session: Session) -> None:
        self._open_of_networks[session.network] -= 1
        if self._open_of_networks[session.network] < self._limits.sessions:
            self._crowded.discard(session.network)
        if not self._open_of_networks[session.network]:
            del self._open_of_networks[session.network]

    def _end_who_has_not_joined(self, sid: str) -> None:
        if (session := self._sessions.get(sid)) is not None and not self._has_joined(sid):
            session.fail("unjoined")

    def _has_joined(self, sid: str) -> bool:
        manager = self._server.manager
        return any(manager.sid_from_eio_sid(sid, namespace) for namespace in [*manager.get_namespaces()])

    def _reason_of_end(self, sid: str, reason: str = "") -> str:
        """Return the engine's reason, or that its client left, if it was in no namespace when its connection closed.

        Over WebSocket, clients leave their namespaces and close the connection, without a CLOSE of Engine.IO.
        """
        return CLIENT_LEFT if reason == REASON and not self._has_joined(sid) else reason


class SocketIOGate(Gate):
    """Stands before a Socket.IO server: rejects new handshakes when the node is full, counts, and tracks the sessions.

    It works for any application that has one, through public names of python-engineio's server: `handle_request()`
    (which every middleware calls), `on()` and `handlers` (the events connect, message and disconnect), `send_packet()`
    (every outgoing message) and `sockets` (the sessions). A
    session is in `sessions` from its connect event to its disconnect event. WebSockets are those of
    `stickyring.node.websocket`, put in place of the engine's under a private name; the engine's version is pinned. A
    message that the application sends goes to the WebSocket at once if nothing is queued before it. Each session
    handles POSTs and polls in place of the engine, and `stickyring.node.packets` checks what they contain.

    An error in a request, a packet or a WebSocket of a session ends the session at once, and its client gets an error.
    The same happens after JOIN_SECONDS without a namespace.

    A handshake is a GET without `sid`. At `max_connections` sessions, a handshake of protocol 4 gets 503 with
    Retry-After before the engine sees it; if its address has as many sessions as `limits` allow, 429. Older protocols
    are left to the engine, which answers 400 and says so.

    ELSEWHERE_HEADER makes the edge try the next node. It is sent

    - with 503 for handshakes, while the node drains or its worker is `exhausted` (such a worker answers only on open
      connections; a session that begins on one would end with its first request on a new connection);
    - with 400 for requests of a session that is not here, if the user has a key. When the ring changes, a polling
      client's session is on the next node of the ring until a rebalance ends it, and works there. If no node has it,
      the client gets the last node's 400. Without a key, or with one that the edge generated for this request, there
      is no next node, and the engine's 400 is the answer.

    JSONP polling, which runs the answer as a script in the page, is refused; protocol 4 has none.

    If a client closes the connection of a waiting poll, or polls again meanwhile, its session ends, as in Node.js.

    A poll that ends because its session was moved gets a 410: the only answer after which both the JavaScript and the
    Python client treat the connection as lost and reconnect.
    """

    def __init__(
        self,
        server: socketio.Server,
        metrics: EngineMetrics,
        max_connections: int,
        sessions: dict[str, Session],
        drain: Drain,
        *,
        limits: Limits,
    ) -> None:
        super().__init__(server, metrics, max_connections, sessions, drain, limits=limits)
        self._handle_request: WSGIApplication = self._engine.handle_request
        self._engine.handle_request = self._guard
        check_packets(server)
        # The only way to make python-engineio use another WebSocket.
        server.eio._async = {**server.eio._async, "websocket": _choose_websocket(server.eio._async["websocket"])}
        self._arrivals = Timetable(self._engine, JOIN_SECONDS, self._end_who_has_not_joined)
        self._pings = Timetable(self._engine, self._engine.ping_interval, self._ping)
        self._watch()

    def _guard(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request, in place of the engine."""
        if self.predecessor is not None and (passed_on := self._ask_predecessor(self.predecessor, environ)):
            return _answer(start_response, *passed_on)
        return self._serve(environ, start_response)

    def _serve(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        query = environ.get("QUERY_STRING", "")
        sid = parameter(query, "sid")
        session = self._sessions.get(sid or "")
        if session is not None:
            environ[SESSION_VARIABLE] = session
        if (refused := self._refusal(environ, query, sid, session)) is not None:
            return _answer(start_response, *refused)
        if is_a_websocket(environ):
            if environ[SOCKET_VARIABLE] is None:
                return self._handle_request(environ, start_response)
            if session is not None and (session.socket.upgrading or session.socket.upgraded):
                # Only one WebSocket per session. Like Node.js, open the second one and close it.
                WebSocket(lambda websocket: websocket.fail(PROTOCOL_ERROR), self._engine)(environ, start_response)
                raise StopIteration
        if sid is None and environ["REQUEST_METHOD"] == "GET":
            return self._handshake(environ, start_response, transport_label(query), parameter(query, "EIO") or "")
        answer = self._poll(session, environ) if session is not None and is_a_poll(environ) else self._ask(environ)
        if session is not None and session.failed == "too_long" and answer[0].startswith("400"):
            answer = "413 Content Too Large", *answer[1:]
        return _answer(start_response, *conforming(environ, answer))

    def _invalid_websocket(self, environ: WSGIEnvironment) -> tuple[str, list[tuple[str, str]]] | None:
        return refusal(environ) if environ[SOCKET_VARIABLE] is not None and is_a_websocket(environ) else None

    def _ask_predecessor(
        self, predecessor: Predecessor, environ: WSGIEnvironment
    ) -> tuple[str, list[tuple[str, str]], bytes] | None:
        """Return the predecessor's answer to a request of one of its sessions; None if it is not one."""
        sid = parameter(environ.get("QUERY_STRING", ""), "sid")
        # A WebSocket is not passed on: its client keeps polling.
        if sid is None or sid in self._sessions or "HTTP_UPGRADE" in environ:
            return None
        try:
            body = body_of(environ, int(self._engine.max_http_buffer_size))
        except Exception:  # the server's error for an invalid body
            return None
        return predecessor.ask(environ, body.encode(), self._engine.ping_interval + self._engine.ping_timeout)

    def _ask(self, environ: WSGIEnvironment) -> tuple[str, list[tuple[str, str]], bytes]:
        """Return status, headers and body of the engine's answer; StopIteration at the end of a WebSocket."""
        begun: list[tuple[str, list[tuple[str, str]]]] = []

        def begin(
            status: str, headers: list[tuple[str, str]], _exc_info: OptExcInfo | None = None, /
        ) -> Callable[[bytes], object]:
            begun.append((status, [*headers]))
            return lambda _: None

        try:
            body = b"".join(self._handle_request(environ, begin))
        except OSError:
            raise  # the client of a WebSocket has gone; gunicorn handles that
        except Exception as error:
            if (session := environ.get(SESSION_VARIABLE)) is not None:
                session.fail("packet", error)
            raise
        if not begun:
            # To gunicorn, this means that nothing more may be read from the connection or written to it.
            raise StopIteration
        ((status, headers),) = begun
        return status, headers, body

    def _poll(self, session: Session, environ: WSGIEnvironment) -> tuple[str, list[tuple[str, str]], bytes]:
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
            # The client has closed the session.
            return status, headers, NOOP
        return status, headers, body

    def _handshake(
        self, environ: WSGIEnvironment, start_response: StartResponse, transport: str, protocol: str
    ) -> Iterable[bytes]:
        supported = protocol == ENGINE_IO_PROTOCOL
        if supported and self.full:
            self._metrics.refused.labels(transport, "capacity").inc()
            return refuse(start_response, [RETRY_LATER])
        if supported and self._refuses_another_of_its_address(environ, transport):
            return _answer(start_response, *TOO_MANY)
        # An accepted handshake is counted at the engine's connect event. Unlike the engine, require `transport`.
        if supported and parameter(environ.get("QUERY_STRING", ""), "transport") is None:
            status, headers, body = "400 Bad Request", [*JSON], BAD_REQUEST
        else:
            status, headers, body = self._ask(environ)
        if not status.startswith("200"):
            reason = "unauthorized" if status.startswith("401") else "bad_request"
            self._metrics.refused.labels(transport, reason if supported else "protocol").inc()
        return _answer(start_response, status, headers, body)

    def _measure_lag(self) -> None:
        while True:
            due = monotonic() + LAG_INTERVAL
            self._engine.sleep(LAG_INTERVAL)
            self._metrics.lag.observe(max(0.0, monotonic() - due))

    def _ping(self, sid: str) -> None:
        if (session := self._sessions.get(sid)) is not None:
            session.ping()

    def _watch(self) -> None:
        """Wrap the Socket.IO server's handlers of the engine's events."""
        engine, metrics, sessions = self._engine, self._metrics, self._sessions
        connect, message, disconnect = (engine.handlers[event] for event in ("connect", "message", "disconnect"))
        send_packet = engine.send_packet

        def on_connect(sid: str, environ: WSGIEnvironment) -> object:
            answer = connect(sid, environ)
            if answer is None or answer is True:
                transport = transport_label(environ.get("QUERY_STRING", ""))
                metrics.accepted[transport].inc()
                polling = None if transport == "websocket" else threading.Lock()
                socket = engine.sockets[sid]
                session = Session(
                    engine,
                    socket,
                    polling=polling,
                    on_failure=metrics.count_failure,
                    allowance=self._allowance(sid),
                    await_ping=self._pings.add,
                )
                session.note(environ)
                session.stand_in()
                sessions[sid] = environ[SESSION_VARIABLE] = session
                self._count_begun(session, environ)
                self._arrivals.add(sid)
                if not self._measures_lag:
                    self._measures_lag = True
                    engine.start_background_task(self._measure_lag)
                log.debug("connected", extra={**session.names, "transport": transport})
            return answer

        def on_message(sid: str, data: object) -> object:
            # A session can end between two packets of a payload, and a client may still be sending: ignore the rest.
            if (session := sessions.get(sid)) is None or session.ended:
                return None
            metrics.received[session.transport].inc()
            try:
                return message(sid, data)
            except Exception as error:
                session.fail("handler" if isinstance(error, HandlerError) else "packet", error)
                return None

        def on_disconnect(sid: str, *reason: str) -> object:
            if (session := sessions.pop(sid, None)) is not None:
                self._count_ended(session)
                metrics.count_end(session, self._reason_of_end(sid, *reason))
            log.debug("disconnected", extra={**names_of(sid, session), "reason": " ".join(reason)})
            try:
                return disconnect(sid, *reason)
            finally:
                if session is not None:
                    session.stand_back()

        def counting_send_packet(sid: str, packet: Packet) -> None:
            if (session := sessions.get(sid)) is not None:
                metrics.sent[session.transport].inc()
                session.send(packet)
            else:
                send_packet(sid, packet)

        engine.on("connect", on_connect)
        engine.on("message", on_message)
        engine.on("disconnect", on_disconnect)
        engine.send_packet = counting_send_packet
        self._watch_acknowledgements()

    def _watch_acknowledgements(self) -> None:
        """Count pending acknowledgements after events are decoded, so that it works with any serializer.

        An event for a namespace that the client has not joined ends the session, as in Node.js; python-socketio alone
        only logs it.

        The two replaced names are private; python-socketio's version is pinned.
        """
        server, manager, sessions = self._server, self._server.manager, self._sessions
        observe = self._metrics.answers.observe
        handle, handle_and_answer = server._handle_event, server._handle_event_internal

        def count_and_handle(eio_sid: str, namespace: str | None, id: int | None, data: object) -> None:
            inside = namespace or "/"
            if not manager.is_connected(manager.sid_from_eio_sid(eio_sid, inside), inside):
                raise ValueError("an event for a namespace that the client has not joined")
            if (session := sessions.get(eio_sid)) is None or session.takes(owing=id is not None):
                handle(eio_sid, namespace, id, data)

        def handle_and_count(*event: Any) -> None:  # noqa: ANN401
            began = monotonic()
            try:
                handle_and_answer(*event)
            finally:
                _, _, eio_sid, _, _, id = event
                if id is not None:
                    observe(monotonic() - began)
                    if (session := sessions.get(eio_sid)) is not None:
                        session.handled()

        server._handle_event = count_and_handle
        server._handle_event_internal = handle_and_count


class Timetable:
    """Calls `then` with the id of a session so many seconds after it was added, from one background task for all."""

    def __init__(self, engine: Engine, seconds: float, then: Callable[[str], object]) -> None:
        self._engine, self._seconds, self._then = engine, seconds, then
        self._due: deque[tuple[float, str]] = deque()
        self._runs = False

    def add(self, sid: str) -> None:
        """Add a session."""
        self._due.append((monotonic() + self._seconds, sid))
        if not self._runs:
            self._runs = True
            self._engine.start_background_task(self._run)

    def _run(self) -> None:
        while True:
            now = monotonic()
            # Whoever is added meanwhile is due later.
            due = self._due[0][0] if self._due else now + self._seconds
            if due > now:
                self._engine.sleep(due - now)
                continue
            _, sid = self._due.popleft()
            try:
                self._then(sid)
            except Exception:
                log.exception("cannot attend to a session", extra={"sid": sid})


def _choose_websocket(other: Callable[..., WSGIApplication]) -> Callable[..., WSGIApplication]:
    """Return a factory of our WebSocket if gunicorn provides the connection, and of the other one if not."""

    def choose(handler: Callable[[WebSocket], object], server: Server) -> WSGIApplication:
        def open_websocket(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            ours = environ[SOCKET_VARIABLE] is not None
            return (SessionWebSocket(server) if ours else other(handler, server))(environ, start_response)

        return open_websocket

    return choose


def parameter(query: str, name: str) -> str | None:
    """Return the first non-empty value of a query parameter; None if there is none."""
    # parse_qs would take longer than everything else here.
    for parameter in query.split("&"):
        found, _, value = parameter.partition("=")
        # python-engineio decodes names too, and must find the same parameter.
        if value and (found == name or ("%" in found and unquote_plus(found) == name)):
            return unquote_plus(value)
    return None


def transport_label(query: str) -> str:
    """Return the requested transport as a metric's label; `other` for one that a client made up."""
    transport = parameter(query, "transport") or "polling"
    return transport if transport in TRANSPORTS else "other"


def is_a_websocket(environ: WSGIEnvironment) -> bool:
    """Return whether a request asks for a WebSocket."""
    return bool(environ.get("HTTP_UPGRADE", "").lower() == "websocket")


def is_a_poll(environ: WSGIEnvironment) -> bool:
    """Return whether a request waits for a polling session's packets."""
    if environ["REQUEST_METHOD"] != "GET" or "HTTP_UPGRADE" in environ:
        return False
    return transport_label(environ.get("QUERY_STRING", "")) == "polling"


def conforming(
    environ: WSGIEnvironment, answer: tuple[str, list[tuple[str, str]], bytes]
) -> tuple[str, list[tuple[str, str]], bytes]:
    """Return the engine's answer with the protocol's own status and body."""
    status, headers, body = answer
    if environ["REQUEST_METHOD"] == "POST" and body == b"OK":
        return status, headers, b"ok"
    return "400 Bad Request" if status.startswith("405") else status, headers, body


def _answer(start_response: StartResponse, status: str, headers: list[tuple[str, str]], body: bytes) -> Iterable[bytes]:
    # Without Content-Length, gunicorn sends a body in three pieces. Some bodies repeat a client's input, which no
    # browser may interpret as a page.
    start_response(status, [*headers, NO_SNIFFING, ("Content-Length", str(len(body)))])
    return [body]


def refuse(start_response: StartResponse, headers: list[tuple[str, str]]) -> Iterable[bytes]:
    """Answer 503 with these headers and no body."""
    # If a body arrives a moment after the head, python-socketio's client never reconnects.
    start_response("503 Service Unavailable", [("Content-Length", "0"), *headers])
    return []
