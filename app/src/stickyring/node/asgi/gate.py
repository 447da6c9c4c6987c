"""The gate of `stickyring.node.gate` for a `socketio.AsyncServer`, in front of an ASGI application's sessions."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import socketio

from stickyring.node.asgi.emit import emit_without_tasks
from stickyring.node.asgi.packets import check_packets
from stickyring.node.asgi.sessions import LOST, AsyncSession
from stickyring.node.asgi.websocket import Channel
from stickyring.node.drain import Drain
from stickyring.node.gate import (
    BAD_REQUEST,
    ENGINE_IO_PROTOCOL,
    FAILED,
    JOIN_SECONDS,
    JSON,
    MOVED,
    NO_SNIFFING,
    NOOP,
    RETRY_LATER,
    TOO_MANY,
    Gate,
    conforming,
    is_a_poll,
    is_a_websocket,
    parameter,
    transport_label,
)
from stickyring.node.limits import Limits
from stickyring.node.metrics import LAG_INTERVAL, EngineMetrics, Packet
from stickyring.node.packets import HandlerError, checked_body
from stickyring.node.sessions import SESSION_VARIABLE, Session, names_of, process_of
from stickyring.node.takeover import Predecessor
from stickyring.node.websocket import PROTOCOL_ERROR, refusal

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment
    from asgiref.typing import ASGIReceiveCallable, ASGISendCallable

log = logging.getLogger(__name__)

CHANNEL = "stickyring.channel"
"""A WebSocket's `Channel`, in the ASGI scope and in the environ that applications get."""
EDGES_HEADERS = b"x-stickyring-"
Answer = tuple[str, list[tuple[str, str]], bytes]


class AsyncSocketIOGate(Gate):
    """Stands before a `socketio.AsyncServer`, with the rules of `stickyring.node.gate.SocketIOGate`.

    It replaces what python-engineio does with ASGI (`translate_request` stays, `make_response` and `websocket` are of
    this module) and the methods of each of its sessions (`stickyring.node.asgi.sessions`).
    """

    def __init__(
        self,
        server: socketio.AsyncServer,
        metrics: EngineMetrics,
        max_connections: int,
        sessions: dict[str, Session],
        drain: Drain,
        *,
        limits: Limits,
    ) -> None:
        super().__init__(server, metrics, max_connections, sessions, drain, limits=limits)
        engine = server.eio
        self._handle_request: Callable[[WSGIEnvironment], Awaitable[Answer | str]] = engine.handle_request
        self._translate = engine._async["translate_request"]
        engine._async = {
            "asyncio": True,
            "translate_request": lambda environ: environ,
            "make_response": _keep_response,
            "websocket": _OpenedWebSocket,
        }
        engine.handle_request = self._guard
        # Sessions here time out by themselves; the engine's task would look at each of them again and again.
        engine.start_service_task = False
        check_packets(server)
        emit_without_tasks(server)
        self._watch()

    async def _guard(self, scope: dict[str, Any], receive: "ASGIReceiveCallable", send: "ASGISendCallable") -> None:
        """Serve one request, in place of the engine."""
        channel: Channel | None = scope.get(CHANNEL)
        lost: list[bool] = []

        async def receive_and_note() -> Any:  # noqa: ANN401 - an ASGI event
            event = await receive()
            if event["type"] == "http.disconnect":
                lost.append(True)
            return event

        environ = await self._translate(scope, receive_and_note, send)
        if not environ:
            # The client has left, or what it sent was no HTTP.
            session = self._sessions.get(parameter(scope["query_string"].decode("latin-1"), "sid") or "")
            if isinstance(session, AsyncSession) and not session.has_websocket:
                await session.end_for("packet", ConnectionResetError())
            return
        environ[LOST] = lost
        for name, value in scope["headers"]:
            # As WSGI has them (PEP 3333): what reads the edge's headers decodes the bytes.
            if name.startswith(EDGES_HEADERS):
                environ[f"HTTP_{name.decode('latin-1').upper().replace('-', '_')}"] = value.decode("latin-1")
        environ["REMOTE_ADDR"] = (scope.get("client") or ("127.0.0.1",))[0]
        environ["wsgi.url_scheme"] = scope["scheme"].replace("ws", "http")
        environ[CHANNEL] = channel
        answer = await self._answer(environ)
        if answer is None:
            return
        status, headers, body = conforming(environ, answer)
        if channel is not None:
            channel.taken = True
            channel.websocket.refuse(status, [*headers, NO_SNIFFING], body)
            return
        lines = [*headers, NO_SNIFFING, ("Content-Length", str(len(body)))]
        encoded = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in lines]
        await send({"type": "http.response.start", "status": int(status[:3]), "headers": encoded, "trailers": False})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _answer(self, environ: "WSGIEnvironment") -> Answer | None:
        """Return the answer to a request; None for a WebSocket that is open."""
        query = environ["QUERY_STRING"]
        sid = parameter(query, "sid")
        if self.predecessor is not None and sid is not None and sid not in self._sessions:
            passed_on = await self._ask_predecessor(self.predecessor, environ)
            if passed_on is not None:
                return passed_on
        session = self._sessions.get(sid or "")
        if session is not None:
            environ[SESSION_VARIABLE] = session
        if (refused := self._refusal(environ, query, sid, session)) is not None:
            return refused
        if sid is None and environ["REQUEST_METHOD"] == "GET":
            return await self._handshake(environ, transport_label(query), parameter(query, "EIO") or "")
        if not isinstance(session, AsyncSession):
            return await self._ask(environ)
        if is_a_websocket(environ) and session.has_websocket:
            # Only one WebSocket per session. Like Node.js, open the second one and close it.
            channel: Channel = environ[CHANNEL]
            channel.taken = True
            channel.websocket.open(1, lambda _: None, lambda _: None)
            channel.websocket.fail(PROTOCOL_ERROR)
            return None
        answer = await (self._poll(session, environ) if is_a_poll(environ) else self._ask(environ))
        if answer is not None and session.failed == "too_long" and answer[0].startswith("400"):
            answer = "413 Content Too Large", *answer[1:]
        return answer

    def _invalid_websocket(self, environ: "WSGIEnvironment") -> tuple[str, list[tuple[str, str]]] | None:
        if not is_a_websocket(environ):
            return None
        if environ[CHANNEL] is None:
            return "400 Bad Request", []  # several Connection headers, of which uvicorn takes the last
        return refusal(environ)

    async def _ask_predecessor(self, predecessor: Predecessor, environ: "WSGIEnvironment") -> Answer | None:
        """Return the predecessor's answer to a request of one of its sessions; None if it is not one."""
        # A WebSocket is not passed on: its client keeps polling.
        if environ[CHANNEL] is not None:
            return None
        longest = int(self._engine.max_http_buffer_size)
        try:
            async with asyncio.timeout(self._engine.ping_timeout):
                body = await environ["wsgi.input"].read(longest + 1)
            if environ[LOST]:
                return None
            checked_body(environ, body, longest)
        except (ValueError, TimeoutError):
            return None
        environ["wsgi.input"] = _Read(body)
        seconds = self._engine.ping_interval + self._engine.ping_timeout
        return await _in_a_thread(predecessor.ask, _as_wsgi(environ), body, seconds)

    async def _ask(self, environ: "WSGIEnvironment") -> Answer | None:
        """Return the engine's answer; None for a WebSocket that is open."""
        try:
            answer = await self._handle_request(environ)
        except Exception as error:
            if isinstance(session := environ.get(SESSION_VARIABLE), AsyncSession):
                await session.end_for("packet", error)
            raise
        return None if isinstance(answer, str) else answer

    async def _poll(self, session: AsyncSession, environ: "WSGIEnvironment") -> Answer | None:
        async def heed_its_end() -> None:
            while (await environ["asgi.receive"]())["type"] != "http.disconnect":
                pass
            if not (session.socket.upgrading or session.socket.upgraded):
                session.lose()

        async with session.polled():
            heeding = asyncio.create_task(heed_its_end())
            try:
                answer = await self._ask(environ)
            finally:
                heeding.cancel()
        if answer is None or not session.ended or answer[2]:
            return answer
        status, headers, _ = answer
        if session.moved:
            return "410 Gone", [*headers, ("Cache-Control", "no-store")], MOVED
        if session.failed:
            return "400 Bad Request", [*headers, ("Cache-Control", "no-store")], FAILED
        # The client has closed the session.
        return status, headers, NOOP

    async def _handshake(self, environ: "WSGIEnvironment", transport: str, protocol: str) -> Answer | None:
        supported = protocol == ENGINE_IO_PROTOCOL
        if supported and self.full:
            self._metrics.refused.labels(transport, "capacity").inc()
            return "503 Service Unavailable", [RETRY_LATER], b""
        if supported and self._refuses_another_of_its_address(environ, transport):
            return TOO_MANY
        # An accepted handshake is counted at the engine's connect event. Unlike the engine, require `transport`.
        answer: Answer | None = ("400 Bad Request", [*JSON], BAD_REQUEST)
        if not supported or parameter(environ["QUERY_STRING"], "transport") is not None:
            answer = await self._ask(environ)
        if answer is not None and not answer[0].startswith("200"):
            reason = "unauthorized" if answer[0].startswith("401") else "bad_request"
            self._metrics.refused.labels(transport, reason if supported else "protocol").inc()
        return answer

    def _watch(self) -> None:
        """Wrap the Socket.IO server's handlers of the engine's events."""
        engine, metrics, sessions = self._engine, self._metrics, self._sessions
        connect, message, disconnect = (engine.handlers[event] for event in ("connect", "message", "disconnect"))
        send_packet: Callable[[str, Packet], Awaitable[None]] = engine.send_packet  # type: ignore[assignment]

        async def on_connect(sid: str, environ: "WSGIEnvironment") -> object:
            answer = await connect(sid, environ)  # type: ignore[misc]
            if answer is None or answer is True:
                transport = transport_label(environ["QUERY_STRING"])
                metrics.accepted[transport].inc()
                session = AsyncSession(engine, engine.sockets[sid], metrics.count_failure, self._allowance(sid))
                session.note(environ)
                session.stand_in()
                sessions[sid] = environ[SESSION_VARIABLE] = session
                self._count_begun(session, environ)
                loop = asyncio.get_running_loop()
                loop.call_later(JOIN_SECONDS, self._end_who_has_not_joined, sid)
                if not self._measures_lag:
                    self._measures_lag = True
                    loop.call_later(LAG_INTERVAL, self._measure_lag, loop, loop.time() + LAG_INTERVAL)
                log.debug("connected", extra={**session.names, "transport": transport})
            return answer

        async def on_message(sid: str, data: object) -> None:
            # A session can end between two packets of a payload, and a client may still be sending: ignore the rest.
            session = sessions.get(sid)
            if not isinstance(session, AsyncSession) or session.ended:
                return
            metrics.received[session.transport].inc()
            try:
                await message(sid, data)  # type: ignore[misc]
            except Exception as error:
                await session.end_for("handler" if isinstance(error, HandlerError) else "packet", error)

        async def on_disconnect(sid: str, *reason: str) -> None:
            if (session := sessions.pop(sid, None)) is not None:
                self._count_ended(session)
                metrics.count_end(session, self._reason_of_end(sid, *reason))
            log.debug("disconnected", extra={**names_of(sid, session), "reason": " ".join(reason)})
            try:
                await disconnect(sid, *reason)  # type: ignore[misc]
            finally:
                if session is not None:
                    session.stand_back()

        async def counting_send_packet(sid: str, packet: Packet) -> None:
            if (session := sessions.get(sid)) is not None:
                metrics.sent[session.transport].inc()
            await send_packet(sid, packet)

        engine.on("connect", on_connect)
        engine.on("message", on_message)
        engine.on("disconnect", on_disconnect)
        engine.send_packet = counting_send_packet  # type: ignore[assignment]
        self._watch_acknowledgements()

    def _measure_lag(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        now = loop.time()
        self._metrics.lag.observe(max(0.0, now - due))
        loop.call_at(now + LAG_INTERVAL, self._measure_lag, loop, now + LAG_INTERVAL)

    def _watch_acknowledgements(self) -> None:
        """Count pending acknowledgements after events are decoded, as `SocketIOGate._watch_acknowledgements`."""
        server, manager, sessions = self._server, self._server.manager, self._sessions
        observe = self._metrics.answers.observe
        handle, handle_and_answer = server._handle_event, server._handle_event_internal

        async def count_and_handle(eio_sid: str, namespace: str | None, id: int | None, data: object) -> None:
            inside = namespace or "/"
            if not manager.is_connected(manager.sid_from_eio_sid(eio_sid, inside), inside):
                raise ValueError("an event for a namespace that the client has not joined")
            if (session := sessions.get(eio_sid)) is None or session.takes(owing=id is not None):
                await handle(eio_sid, namespace, id, data)

        async def handle_and_count(*event: Any) -> None:  # noqa: ANN401
            began = monotonic()
            try:
                await handle_and_answer(*event)
            finally:
                _, _, eio_sid, _, _, id = event
                if id is not None:
                    observe(monotonic() - began)
                    if (session := sessions.get(eio_sid)) is not None:
                        session.handled()

        server._handle_event = count_and_handle
        server._handle_event_internal = handle_and_count


class _OpenedWebSocket:
    """Opens a session's WebSocket for the engine, which then has nothing to wait for."""

    def __init__(self, _handler: object, _server: object) -> None:
        pass

    async def __call__(self, environ: "WSGIEnvironment") -> str:
        channel: Channel = environ[CHANNEL]
        channel.taken = True
        session: AsyncSession = environ[SESSION_VARIABLE]
        session.process = process_of(environ)
        session.attach(channel.websocket)
        return ""


class _Read:
    """A body that was read already."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def read(self, length: int | None = None) -> bytes:
        return self._body if length is None else self._body[:length]


def _as_wsgi(environ: "WSGIEnvironment") -> "WSGIEnvironment":
    """Return a copy whose headers and target are as WSGI has them: the bytes on the wire, decoded as ISO-8859-1."""
    scope = environ["asgi.scope"]
    headers = {
        f"HTTP_{name.decode('latin-1').upper().replace('-', '_')}": value.decode("latin-1")
        for name, value in scope["headers"]
    }
    query = f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else ""
    return {**environ, **headers, "RAW_URI": f"{scope['raw_path'].decode('latin-1')}{query}"}


async def _in_a_thread(call: Callable[..., Answer | None], *arguments: object) -> Answer | None:
    """Return what a blocking call returns; in a thread of its own, because a poll takes long, and pools are small."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Answer | None] = loop.create_future()

    def settle(answer: Answer | None, error: Exception | None) -> None:
        if not done.done():
            if error is None:
                done.set_result(answer)
            else:
                done.set_exception(error)

    def run() -> None:
        answer, failed = None, None
        try:
            answer = call(*arguments)
        except Exception as error:
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, answer, failed)

    threading.Thread(target=run, daemon=True).start()
    return await done


def _keep_response(status: str, headers: list[tuple[str, str]], body: bytes, _environ: dict[str, Any]) -> Answer:
    return status, headers, body
