"""The sessions of a node: whose each one is, since when, and how it is ended so that its client comes back.

A session is one of Engine.IO (protocol revision 4), which is one connection of a user: a tab, a device.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from socket import SHUT_RDWR
from typing import TYPE_CHECKING, Any

from engineio.exceptions import EngineIOError, QueueEmpty
from engineio.packet import NOOP
from engineio.packet import Packet as EnginePacket

from stickyring.node.metrics import Engine, EngineSession, Packet
from stickyring.node.packets import FROM_CLIENT, TooLongError, body_of, packets_of
from stickyring.node.websocket import PROTOCOL_ERROR, SOCKET_VARIABLE, Server, WebSocket

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

# Request headers of the edge's, as the WSGI environ names them.
KEY_VARIABLE = "HTTP_X_STICKYRING_KEY"
"""`x-stickyring-key`: what the edge has hashed."""
ISSUED_VARIABLE = "HTTP_X_STICKYRING_ISSUED"
"""`x-stickyring-issued`: the edge has made the key up for this request, and the next one may have another."""
CLUSTER_VARIABLE = "HTTP_X_STICKYRING_CLUSTER"
"""`x-stickyring-cluster`: the edge's cluster by which the request came; each has a ring of its own."""
SESSION_VARIABLE = "stickyring.session"
"""The open session that a request is of, in the WSGI environ."""
NO_OPERATION = str(NOOP)
SETTLING_SECONDS = 1.0
"""A client that has just connected still joins namespaces; cut off in that, python-socketio's gives up for good."""
TICK_SECONDS = 0.05
REASON = "transport close"
"""What applications are told: the reason that stands for a client who lost the connection and may be back."""
FAILED = "transport error"
"""What applications are told of a session that the node ended for an error."""
PACKETS_AT_ONCE = 16
"""The most that an answer to a poll holds: python-socketio's clients take no more, and give the connection up."""
TURN_PACKETS = 64
"""After so many packets of one payload, others get their turn."""
WAITING_MESSAGES = 64
"""How many messages of the largest size may wait for a client that does not read. With python-engineio's default, 1 MB,
that is 64 MB: an application may send a file in one go, and no client can have a node keep more for it."""
PACKET_BYTES = 256
"""What a packet that waits takes beside its content."""
UPGRADE_SECONDS = 10.0
"""How long a client may take to change its transport, as with socket.io; its polls do not wait meanwhile."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class Session:
    """One open session and what is known of it.

    `key` is the user: the key of the handshake, by which the edge placed the session here, None if it had none;
    `cluster` is the edge's cluster of the handshake. `websocket` is what carries it, once something other than
    polls does. `unanswered` counts the events whose acknowledgement the application still owes; while `taking` is
    false, it gets no more that want one, and once one was `refused`, nothing that was sent after it. `moved` says
    that the node ended the session to have it elsewhere, `failed` for which error it ended it, one of
    `metrics.FAILURES`; `on_failure` is called with that. `polling` is locked while a poll is answered; a session that
    began as a WebSocket has none.
    """

    engine: Engine
    socket: EngineSession
    key: str | None = None
    cluster: str | None = None
    websocket: "SessionWebSocket | None" = None
    began: float = field(default_factory=time.monotonic)
    unanswered: int = 0
    taking: bool = True
    refused: bool = False
    moved: bool = False
    failed: str = ""
    on_failure: Callable[[str], None] = lambda reason: None
    polling: "threading.Lock | None" = None
    _waiting: int = field(default=0, init=False)  # bytes in the queue or on their way
    _under_way: int = field(default=0, init=False)  # those on their way

    @property
    def transport(self) -> str:
        """`polling` or `websocket`."""
        return "websocket" if self.socket.upgraded else "polling"

    @property
    def seconds(self) -> float:
        """How long it has been open."""
        return time.monotonic() - self.began

    @property
    def ended(self) -> bool:
        """Whether it is over, or about to be."""
        return self.socket.closing or self.socket.closed

    @property
    def quiet(self) -> bool:
        """Whether its end cuts nothing off now: no acknowledgement, no packet for a poll, no upgrade, no connecting."""
        return (
            self.unanswered <= 0
            and (self.socket.upgraded or self.socket.queue.empty())
            and not self.socket.upgrading
            and self.seconds >= SETTLING_SECONDS
        )

    def note(self, environ: dict[str, object]) -> None:
        """Note what the edge says with the handshake.

        Later keys do not count, not even the first one. A client that keeps no cookie has another one in each request,
        and one may claim any: by these, a rebalance would ask them to leave, and they would come back to where they
        were.
        """
        self.key = key_of(environ)
        self.cluster = _on_the_wire(environ, CLUSTER_VARIABLE) or None

    def stand_in(self) -> None:
        """Receive POSTs and hand out packets in place of the engine, from now on."""
        self.socket.handle_post_request, self.socket.poll = self.take_in, self.poll

    def stand_back(self) -> None:
        """Leave that to the engine again, which may keep its part of a session for a while after the end."""
        del self.socket.handle_post_request, self.socket.poll

    def begin_poll(self) -> None:
        """Wait for the poll before this one to end, and have it end: it waits on a connection that is lost in silence.

        Two polls would take the packets from each other, and the session's end would end one of them only.
        """
        while self.polling is not None and not self.polling.acquire(timeout=TICK_SECONDS):
            if self.socket.queue.empty():
                self.socket.queue.put(EnginePacket(NOOP))

    def end_poll(self) -> None:
        """Let the next poll begin."""
        if self.polling is not None:
            self.polling.release()

    def send_at_once(self, packet: Packet) -> bool:
        """Send a packet over the WebSocket, if nothing waits before it; return whether that was done.

        It saves the engine's queue and the green thread that empties it.
        """
        if self.websocket is None or self.ended or not self.socket.queue.empty():
            return False
        return not self.socket.check_ping_timeout() or self.websocket.send_at_once(packet.encode())

    def takes(self, *, owing: bool) -> bool:
        """Note an event, `owing` if its client waits for an acknowledgement; return whether the application gets it."""
        self.refused |= owing and not self.taking
        if self.ended or self.refused:
            return False
        self.unanswered += owing
        return True

    def handled(self) -> None:
        """Note that the acknowledgement is in the queue or sent, or that the application gives none."""
        self.unanswered -= 1

    def take_in(self, environ: dict[str, Any]) -> None:
        """Receive the packets of a POST, all of them in their order; stands in for `Socket.handle_post_request`.

        The engine's own takes 16 packets at most and a body with Content-Length only, and when it fails, which may be
        after some of the packets, its answer is OK.

        Raises:
            EngineIOError: something was not received. The session has ended, and the engine answers 400.
        """
        try:
            with _bounded(environ.get(SOCKET_VARIABLE), self.engine.ping_timeout):
                body = body_of(environ, int(self.engine.max_http_buffer_size))
        except Exception as error:
            self.fail("packet", error)
            raise EngineIOError from error
        try:
            for number, packet in enumerate(packets_of(body), start=1):
                if self.ended or self.refused:
                    break
                self.socket.receive(packet)
                if number % TURN_PACKETS == 0:
                    self.engine.sleep(0)
            else:
                if not (self.failed or self.refused):
                    return
        except Exception as error:
            self.fail("packet", error)
            raise EngineIOError from error
        # Who sends it away waits for what the application still owes. An answer before would have the client leave.
        while self.refused and not self.ended:
            self.engine.sleep(TICK_SECONDS)
        # Not left to the engine, which would wait for the client to read what is in the queue.
        self.fail(self.failed)
        raise EngineIOError("the session has ended, maybe before the last packet")

    def poll(self) -> list[Packet]:
        """Wait for the packets that go next, none at the end of the session; stands in for `Socket.poll`.

        Raises:
            QueueEmpty: there were none for as long as a client may be silent.
        """
        queue, empty = self.socket.queue, self.engine.get_queue_empty_exception()
        # Whoever asks for more has sent what he had.
        # The engine's own few packets, pings and such, are counted here only.
        self._waiting = max(0, self._waiting - self._under_way)
        self._under_way = 0
        packets: list[Packet] = []
        try:
            packet = queue.get(timeout=self.engine.ping_interval + self.engine.ping_timeout)
            while packet is not None:
                queue.task_done()
                packets.append(packet)
                self._under_way += _size(packet)
                if len(packets) == PACKETS_AT_ONCE:
                    return packets
                packet = queue.get(block=False)
            queue.task_done()
            if packets:
                queue.put(None)
        except empty:
            if not packets:
                raise QueueEmpty from None
        return packets

    def has_room_for(self, packet: Packet) -> bool:
        """Return whether another packet may wait for its way to the client; if not, the session ends."""
        if self.failed:
            return False
        if self.ended:
            return True
        self._waiting += _size(packet)
        if self._waiting <= WAITING_MESSAGES * self.engine.max_http_buffer_size:
            return True
        # Beside this: it is some handler's turn to send, and the disconnect handlers may want what it holds.
        self._note_failure("unread")
        self.engine.start_background_task(self._close, FAILED)
        return False

    def end(self) -> None:
        """End it so that its client comes back by itself; the application's disconnect handlers have run on return.

        There is neither a Socket.IO DISCONNECT nor an Engine.IO CLOSE: after the one the JavaScript client stays away,
        after the other python-socketio's. A WebSocket is closed, after what waited for it; a waiting poll is answered
        without a packet, which the gate turns into an error.
        """
        self.moved = True
        self._close(REASON)

    def fail(self, reason: str, error: BaseException | None = None) -> None:
        """End it at once for an error, `reason` being one of `metrics.FAILURES`; its client gets an error as well."""
        if self.ended:
            return
        if not self.failed:
            self._note_failure("too_long" if isinstance(error, TooLongError) else reason, error)
        self._close(FAILED)

    def lose(self) -> None:
        """End it because its WebSocket has ended."""
        if not self.ended:
            self._close(REASON)

    def lose_poll(self) -> None:
        """End it because its client has ended the connection of a waiting poll, unless it changes the transport."""
        if not (self.socket.upgrading or self.socket.upgraded):
            self.lose()

    def _note_failure(self, reason: str, error: BaseException | None = None) -> None:
        self.failed = reason
        if self.websocket is not None and reason in {"packet", "too_long"}:
            self.websocket.blame(PROTOCOL_ERROR)
        self.on_failure(reason)
        log.debug("failed", extra={"sid": self.socket.sid, "reason": reason, "error": repr(error)})

    def _close(self, reason: str) -> None:
        self.socket.close(wait=False, abort=True, reason=reason)
        # The engine keeps a polling session that has ended until its next round, and fails on a POST for it.
        self.engine.sockets.pop(self.socket.sid, None)
        if self.failed == "unread" and self.websocket is not None:
            self.websocket.cut()


class SessionWebSocket(WebSocket):
    """The WebSocket of a session, which knows it from when it carries the session: an upgrade may fail before.

    However the WebSocket ends, the session that it carries ends at once, and so does one whose client breaks the
    protocol in the upgrade. If an upgrade is just not completed, the session goes on with polls.
    """

    def __init__(self, handler: Callable[[WebSocket], object], server: Server) -> None:
        super().__init__(self._handle, server)
        self._engine_handler = handler
        self._probed = False
        self._status: int | None = None

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Open the connection, let the handler run, and close it."""
        self._session: Session = environ[SESSION_VARIABLE]
        try:
            return super().__call__(environ, start_response)
        finally:
            self._leave()

    def wait(self) -> str | bytes | None:
        """Return the client's next packet; None when the connection has ended, or something else came."""
        session = self._session
        if session.websocket is None:
            if not session.socket.upgraded:
                return self._wait_for_upgrade()
            self._carry()
        packet = super().wait()
        if packet is None:
            # The engine would first wait for what is being sent, which nobody may be reading.
            session.lose()
        elif isinstance(packet, str) and packet[:1] not in FROM_CLIENT:
            self.fail(PROTOCOL_ERROR)
            return None
        return packet

    def send(self, message: str | bytes) -> None:
        """Send a packet, but not the NOOP that the engine has put into the queue to end a poll."""
        if message != NO_OPERATION:
            super().send(message)

    def fail(self, status: int) -> None:
        """Close it and end the session for a client that breaks the protocol."""
        self.blame(status)
        self._session.fail("packet")
        super().fail(status)

    def blame(self, status: int) -> None:
        """Have it closed with a status, whoever closes it."""
        self._status = self._status or status

    def cut(self) -> None:
        """End the connection without a word, for a client that would not read it."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(SHUT_RDWR)

    def _handle(self, _: WebSocket) -> None:
        try:
            self._engine_handler(self)
        except OSError:
            pass  # the client has gone in the upgrade
        except Exception as error:
            self._session.fail("packet", error)
        finally:
            # Before the connection is closed, which takes a while.
            self._leave()

    def _wait_for_upgrade(self) -> str | bytes | None:
        self._end = time.monotonic() + UPGRADE_SECONDS
        self.socket.settimeout(UPGRADE_SECONDS)
        packet, wanted = super().wait(), "5" if self._probed else "2probe"
        self._probed = True
        if packet is not None and packet != wanted:
            self.fail(PROTOCOL_ERROR)
            return None
        return packet

    def _carry(self) -> None:
        self._session.websocket = self
        if self._probed and not self._closing:
            self._end = math.inf
            engine = self._session.engine
            self.socket.settimeout(engine.ping_interval + engine.ping_timeout)

    def _leave(self) -> None:
        session = self._session
        if session.socket.upgraded or not session.socket.connected:
            session.lose()
        else:
            session.socket.upgrading = False

    def _close(self, status: int | None = None) -> None:
        if self._session.websocket is self:
            # Before anything is sent, for which the client would have to read.
            self._session.lose()
        # The session's end has it closed as well: who comes first says why.
        super()._close(self._status if status is None else status)


@contextlib.contextmanager
def _bounded(connection: Any, seconds: float) -> Iterator[None]:  # noqa: ANN401 - of the worker class's kind
    """Bound each wait for more of what a connection brings."""
    if connection is None:
        yield
        return
    timeout = connection.gettimeout()
    connection.settimeout(seconds)
    try:
        yield
    finally:
        connection.settimeout(timeout)


def _size(packet: Packet) -> int:
    # Not sys.getsizeof(), which PyPy does not have.
    return (len(packet.data) if isinstance(packet.data, str | bytes) else 0) + PACKET_BYTES


def key_of(environ: dict[str, object]) -> str | None:
    """Return the key that the edge hashed for a request; None without one."""
    return _on_the_wire(environ, KEY_VARIABLE) or None


def _on_the_wire(environ: dict[str, object], variable: str) -> str:
    """Return the bytes that came, as UTF-8 with surrogates for what is none; WSGI has them as ISO-8859-1 (PEP 3333)."""
    return str(environ.get(variable, "")).encode("latin-1").decode("utf-8", "surrogateescape")
