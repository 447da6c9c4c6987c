"""The sessions of a node: their users, their ages, and how to end them so that their clients reconnect.

A session is an Engine.IO session (protocol revision 4): one connection of a user, such as a tab or a device.

python-engineio keeps three green threads for each WebSocket: one reads, one writes, one waits for the next ping. Here
one reads; another writes only while a client does not read fast enough, and one pings all clients.
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

from engineio.exceptions import EngineIOError, QueueEmpty, SocketIsClosedError
from engineio.packet import CLOSE, NOOP, PING
from engineio.packet import Packet as EnginePacket

from stickyring.node.limits import Allowance
from stickyring.node.metrics import Engine, EngineSession, Packet
from stickyring.node.packets import FROM_CLIENT, TooLongError, body_of, packets_of
from stickyring.node.websocket import POLICY_VIOLATION, PROTOCOL_ERROR, SOCKET_VARIABLE, Server, WebSocket

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)
SENDING = threading.Lock()
"""Held while a packet is sent at once or queued: green threads do not switch meanwhile, but real ones may."""

# Request headers that the edge sets, as the WSGI environ names them.
KEY_VARIABLE = "HTTP_X_STICKYRING_KEY"
"""`x-stickyring-key`: the key that the edge hashed."""
ISSUED_VARIABLE = "HTTP_X_STICKYRING_ISSUED"
"""`x-stickyring-issued`: the edge generated the key for this request; the next request may have another."""
REQUEST_ID_VARIABLE = "HTTP_X_REQUEST_ID"
"""The edge's, of 36 characters, or that of a trusted proxy."""
LONGEST_REQUEST_ID = 128
CLUSTER_VARIABLE = "HTTP_X_STICKYRING_CLUSTER"
"""`x-stickyring-cluster`: the edge's cluster that the request used; each cluster has its own ring."""
PROCESS_VARIABLE = "HTTP_X_STICKYRING_PROCESS"
"""`x-stickyring-process`: the process of an edge that the request came through."""
SESSION_VARIABLE = "stickyring.session"
"""The open session of a request, in the WSGI environ."""
NO_OPERATION = str(NOOP)
PROBE, PROBED, UPGRADE = "2probe", "3probe", "5"
"""The packets of an upgrade to WebSocket."""
SETTLING_SECONDS = 1.0
"""A new client is still joining namespaces; if its session ends meanwhile, python-socketio's client gives up."""
TICK_SECONDS = 0.05
PATIENCE_SECONDS = 2.0
"""How long to wait until nothing is under way in a session. Then it accepts nothing new, and gets the same time again
for what is under way: an acknowledgement that is never given must not block the end."""
REASON = "transport close"
"""The reason that applications get: the client lost the connection and may be back."""
FAILED = "transport error"
"""The reason that applications get if the node ended the session for an error."""
PACKETS_AT_ONCE = 16
"""Most packets in an answer to a poll: python-socketio's clients drop the connection if there are more."""
CLOSING = {"packet": PROTOCOL_ERROR, "too_long": PROTOCOL_ERROR, "flooding": POLICY_VIOLATION}
"""The status that closes the WebSocket of a session that failed for this."""
TURN_PACKETS = 64
"""After this many packets of one payload, other green threads run."""
WAITING_MESSAGES = 64
"""How many messages of the largest size may wait for a client that does not read. With python-engineio's default of
1 MB, that is 64 MB: enough for a file sent in one go, and a bound on a node's memory for one client."""
PACKET_BYTES = 256
"""Memory of a waiting packet beside its content."""
UPGRADE_SECONDS = 10.0
"""How long a client may take for an upgrade, as with socket.io; meanwhile its polls return at once."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class Session:
    """One open session.

    - `key`: the user, as the key of the handshake that the edge hashed; None without a key.
    - `cluster`: the edge's cluster of the handshake; None without an edge.
    - `request_id`: what the edge's log calls the request of the handshake; empty without an edge.
    - `network`: the address of its client, or the network of an IPv6 one (`limits.network_of`).
    - `websocket`: the WebSocket that carries the session; None while it polls.
    - `process`: the process of an edge through which its WebSocket came; empty if the edge does not say.
    - `unanswered`: number of events whose acknowledgement the application has not given yet.
    - `taking`: if false, the application gets no more events that ask for an acknowledgement.
    - `refused`: such an event was dropped; everything that the client sent after it is dropped too.
    - `asked`: the node has begun to end it to move its user.
    - `moved`: the node ended the session to move its user.
    - `failed`: the error for which the node ended it, one of `metrics.FAILURES`; `on_failure` is called with it.
    - `polling`: locked while a poll is answered; None if the session began as a WebSocket.
    - `allowance`: what its client may send; None for no limit.
    - `await_ping`: called with the session's id to have `ping` called after the ping interval.
    """

    engine: Engine
    socket: EngineSession
    key: str | None = None
    cluster: str | None = None
    request_id: str = ""
    network: str = ""
    websocket: "SessionWebSocket | None" = None
    process: str = ""
    began: float = field(default_factory=time.monotonic)
    unanswered: int = 0
    taking: bool = True
    refused: bool = False
    asked: bool = False
    moved: bool = False
    failed: str = ""
    on_failure: Callable[[str], None] = lambda reason: None
    polling: "threading.Lock | None" = None
    allowance: Allowance | None = None
    await_ping: Callable[[str], object] = lambda sid: None
    _theirs: Callable[..., Any] = field(default=lambda **_: None, init=False)  # the engine's close()
    _writing: bool = field(default=False, init=False)  # a green thread writes to the WebSocket what is queued
    _waiting: int = field(default=0, init=False)  # bytes queued or under way
    _under_way: int = field(default=0, init=False)  # bytes under way

    @property
    def transport(self) -> str:
        """`polling` or `websocket`."""
        return "websocket" if self.socket.upgraded else "polling"

    @property
    def seconds(self) -> float:
        """How long it has been open, in seconds."""
        return time.monotonic() - self.began

    @property
    def waiting(self) -> int:
        """Bytes that wait for the client: queued or under way."""
        return self._waiting

    @property
    def ended(self) -> bool:
        """Whether it is over, or about to be."""
        return self.socket.closing or self.socket.closed

    @property
    def quiet(self) -> bool:
        """Whether it can end without losing anything: no acknowledgement, queued packet, upgrade or join is pending."""
        return (
            self.unanswered <= 0
            # What a poll was answered with has arrived when the client polls again. Before that, a POST that meets the
            # end could be refused first: then clients drop the connection, with the acknowledgement that is in it.
            and (self.socket.upgraded or (self.socket.queue.empty() and not self._under_way))
            and not self.socket.upgrading
            and self.seconds >= SETTLING_SECONDS
        )

    def note(self, environ: dict[str, object]) -> None:
        """Store the key, the cluster and the request id of the handshake.

        Keys of later requests are ignored, even if the handshake had none. A client without cookies has another key in
        each request, and a client can claim any. With such keys, a rebalance would ask users to reconnect who then come
        back to the same node.
        """
        self.key = key_of(environ)
        self.cluster = _on_the_wire(environ, CLUSTER_VARIABLE) or None
        self.request_id = request_id_of(environ)

    @property
    def names(self) -> dict[str, str]:
        """What identifies it in lines of the log: here, and on the edge."""
        return {"sid": self.socket.sid, "request_id": self.request_id}

    def stand_in(self) -> None:
        """Replace the engine's methods for sending, POSTs, polls, pings and the end by this object's."""
        theirs: Any = self.socket
        self._theirs = theirs.close
        theirs.send, theirs.handle_post_request, theirs.poll = self.send, self.take_in, self.poll
        theirs.schedule_ping, theirs.close = self.schedule_ping, self.close

    def stand_back(self) -> None:
        """Restore the engine's methods: the engine may keep its part of a session for a while after the end."""
        for name in ("send", "handle_post_request", "poll", "schedule_ping", "close"):
            vars(self.socket).pop(name, None)

    def begin_poll(self) -> None:
        """Wait until no other poll waits; if one does, end it, and except during an upgrade the session with it.

        A client has one poll at a time. It sends another one if the connection of the first is lost, and what that one
        was answered with may be lost too. Going on would hide this from the application; so the session ends, as in
        Node.js, and the client reconnects.
        """
        if self.polling is None or self.polling.acquire(blocking=False):
            return
        if not (self.ended or self.socket.upgrading or self.socket.upgraded):
            self.socket.queue.put(EnginePacket(CLOSE))
            self.lose()
        while not self.polling.acquire(timeout=TICK_SECONDS):
            if self.socket.queue.empty():
                self.socket.queue.put(EnginePacket(NOOP))

    def end_poll(self) -> None:
        """Let the next poll begin."""
        if self.polling is not None:
            self.polling.release()

    def send(self, packet: Packet) -> None:
        """Send a packet over the WebSocket if none is queued before it; else queue it. Replaces `Socket.send`.

        Raises:
            SocketIsClosedError: the session has ended.
        """
        if not self.socket.check_ping_timeout():
            return
        with SENDING:
            websocket = None if self.ended or self._writing or not self.socket.queue.empty() else self.websocket
            if websocket is not None and websocket.send_at_once(packet.encode()):
                return
            if not self.has_room_for(packet):
                return
            self.socket.queue.put(packet)
        if not self.ended:
            self._flush()

    def carry(self, websocket: "SessionWebSocket") -> None:
        """Use this WebSocket from now on, also for what is queued."""
        self.socket.connected = self.socket.upgraded = True
        self.socket.upgrading = False
        self.websocket = websocket
        self._waiting, self._under_way = max(0, self._waiting - self._under_way), 0
        self._flush()
        if self.ended and not self._writing:
            # The last poll took the mark of the session's end.
            websocket.close()

    def _flush(self) -> None:
        """Send what is queued over the WebSocket, and close it after the session's end; polls take it themselves."""
        queue = self.socket.queue
        with SENDING:
            while self.websocket is not None and not self._writing and not queue.empty():
                packet = queue.get(block=False)
                if packet is not None and self.websocket.send_at_once(packet.encode()):
                    self._forget(packet)
                else:
                    self._writing = True
                    self.engine.start_background_task(self._write, self.websocket, packet)

    def _write(self, websocket: "SessionWebSocket", packet: Packet | None) -> None:
        """Send this packet and all that are queued, as the client reads them; None ends the WebSocket."""
        while self._writing:
            try:
                if packet is not None:
                    websocket.send(packet.encode())
                else:
                    websocket.close()
            except Exception as error:
                log.debug("not sent", extra={**self.names, "error": repr(error)})
                websocket.close()
            self._forget(packet)
            with SENDING:
                if self.socket.queue.empty():
                    self._writing = False
                else:
                    packet = self.socket.queue.get(block=False)

    def wait_until_written(self) -> None:
        """Wait until the client has got what is queued, or the connection has failed."""
        if self._writing:
            self.socket.queue.join()

    def _forget(self, packet: Packet | None) -> None:
        """Count a packet of the queue as sent."""
        self.socket.queue.task_done()
        if packet is not None:
            self._waiting = max(0, self._waiting - size_of(packet))

    def schedule_ping(self) -> None:
        """Ping the client after the ping interval; the answer to a ping schedules the next one."""
        if self.socket.last_ping:
            self.socket.last_ping = None
            self.await_ping(self.socket.sid)

    def ping(self) -> None:
        """Ping the client."""
        if not self.ended:
            self.socket.last_ping = time.time()
            self.send(EnginePacket(PING))

    def close(self, wait: bool = True, abort: bool = False, reason: str | None = None) -> None:
        """End it: the disconnect event, the queued packets, then a CLOSE unless `abort`. Replaces `Socket.close`.

        `wait`: until the client has taken what is queued.
        """
        if self.ended:
            return
        self._theirs(wait=False, abort=abort, reason=reason)
        if self.websocket is not None:
            # The engine would keep its part until its next cleanup.
            self.engine.sockets.pop(self.socket.sid, None)
            self._flush()
        if wait:
            self.socket.queue.join()

    def takes(self, *, owing: bool) -> bool:
        """Count an event, `owing` if its client asks for an acknowledgement; return whether the application gets it."""
        self.refused |= owing and not self.taking
        if self.ended or self.refused:
            return False
        self.unanswered += owing
        return True

    def admits(self, messages: int, size: int) -> bool:
        """Return whether its client may send so many messages and bytes now; if not, the caller ends it."""
        if self.allowance is None or self.allowance.admits(messages, size):
            return True
        if not self.failed:
            self._note_failure("flooding")
        return False

    def handled(self) -> None:
        """Count an acknowledgement that is queued or sent, or that the application does not give."""
        self.unanswered -= 1

    def take_in(self, environ: dict[str, Any]) -> None:
        """Receive all packets of a POST in order; replaces `Socket.handle_post_request`.

        The engine's own method accepts at most 16 packets and only a body with Content-Length. If it fails, possibly
        after some packets, it answers OK.

        Raises:
            EngineIOError: a packet was not received. The session has ended, and the engine answers 400.
        """
        try:
            with _bounded(environ.get(SOCKET_VARIABLE), self.engine.ping_timeout):
                body = body_of(environ, int(self.engine.max_http_buffer_size))
        except Exception as error:
            self.fail("packet", error)
            raise EngineIOError from error
        try:
            admitted = self.admits(0, int(environ.get("CONTENT_LENGTH") or len(body)))
            for number, packet in enumerate(packets_of(body), start=1):
                if self.ended or self.refused or not (admitted and self.admits(1, 0)):
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
        # The mover still waits for acknowledgements of the application. An answer now would make the client leave.
        while self.refused and not self.ended:
            self.engine.sleep(TICK_SECONDS)
        # The engine itself would wait for the client to read what is queued.
        self.fail(self.failed)
        raise EngineIOError("the session ended, possibly before the last packet")

    def poll(self) -> list[Packet]:
        """Wait for the next packets; return none at the end of the session. Replaces `Socket.poll`.

        Raises:
            QueueEmpty: no packet within the ping interval plus the ping timeout.
        """
        queue, empty = self.socket.queue, self.engine.get_queue_empty_exception()
        # The client polls again, so the packets under way have arrived.
        # The engine's own few packets, such as pings, are counted only here.
        self._waiting = max(0, self._waiting - self._under_way)
        self._under_way = 0
        packets: list[Packet] = []
        try:
            packet = queue.get(timeout=self.engine.ping_interval + self.engine.ping_timeout)
            while packet is not None:
                queue.task_done()
                packets.append(packet)
                self._under_way += size_of(packet)
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
        """Return whether another packet may be queued for the client; if not, the session ends."""
        if self.failed:
            return False
        if self.ended:
            return True
        self._waiting += size_of(packet)
        if self._waiting <= WAITING_MESSAGES * self.engine.max_http_buffer_size:
            return True
        # In a task of its own: a handler is sending, and the disconnect handlers may need a lock that it holds.
        self._note_failure("unread")
        self._close_in_a_task()
        return False

    def _close_in_a_task(self) -> None:
        self.engine.start_background_task(self._close, FAILED)

    def end(self) -> None:
        """End it so that its client reconnects by itself; on return, the application's disconnect handlers have run.

        It sends neither a Socket.IO DISCONNECT, after which the JavaScript client stays away, nor an Engine.IO CLOSE,
        after which python-socketio's client does. A WebSocket is closed after its queued packets are sent. A waiting
        poll is answered without a packet, and the gate turns that into an error.
        """
        self.moved = True
        self._close(REASON)

    def see_off(self, done: Callable[[], None]) -> None:
        """In a thread of its own: end it once nothing is under way in it; then call `done`.

        A session may have to wait, and the application's disconnect handlers may block.
        """

        def leave() -> None:
            try:
                self._wait_for_quiet()
                self.taking = False
                self._wait_for_quiet()
                if not self.ended:
                    self.end()
            finally:
                done()

        threading.Thread(target=leave, daemon=True).start()

    def _wait_for_quiet(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (self.ended or self.quiet) and time.monotonic() < deadline:
            time.sleep(TICK_SECONDS)

    def fail(self, reason: str, error: BaseException | None = None) -> None:
        """End it at once for an error, and answer the client with an error; `reason` is one of `metrics.FAILURES`."""
        if self.ended:
            return
        if not self.failed:
            self._note_failure("too_long" if isinstance(error, TooLongError) else reason, error)
        self._close(FAILED)

    def lose(self) -> None:
        """End it because its WebSocket has closed."""
        if not self.ended:
            self._close(REASON)

    def lose_poll(self) -> None:
        """End it because its client closed the connection of a waiting poll, unless it is upgrading."""
        if not (self.socket.upgrading or self.socket.upgraded):
            self.lose()

    def _note_failure(self, reason: str, error: BaseException | None = None) -> None:
        self.failed = reason
        if self.websocket is not None and reason in CLOSING:
            self.websocket.blame(CLOSING[reason])
        self.on_failure(reason)
        log.debug("failed", extra={**self.names, "reason": reason, "error": repr(error)})

    def _close(self, reason: str) -> None:
        self.socket.close(wait=False, abort=True, reason=reason)
        # The engine keeps an ended polling session until its next cleanup, and fails on a POST for it.
        self.engine.sockets.pop(self.socket.sid, None)
        if self.failed == "unread" and self.websocket is not None:
            self.websocket.cut()


class SessionWebSocket(WebSocket):
    """The WebSocket of a session; `Session.websocket` is set once the WebSocket carries it.

    When the WebSocket ends, its session ends at once. So does a session whose client breaks the protocol during the
    upgrade. If an upgrade is not completed, the session goes on polling.
    """

    def __init__(self, server: Server) -> None:
        super().__init__(self._handle, server)
        self._status: int | None = None

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Open the WebSocket, receive packets until it ends, and close it."""
        self._session: Session = environ[SESSION_VARIABLE]
        self._session.process = process_of(environ)
        try:
            return super().__call__(environ, start_response)
        except BaseException:
            self._leave()
            raise

    def wait(self) -> str | bytes | None:
        """Return the client's next packet; None when the connection has ended or the client broke the protocol."""
        packet = super().wait()
        if packet is None:
            # The session's end would first wait for data being sent, which the client may not read.
            self._session.lose()
        elif isinstance(packet, str) and packet[:1] not in FROM_CLIENT:
            self.fail(PROTOCOL_ERROR)
            return None
        return packet

    def send(self, message: str | bytes) -> None:
        """Send a packet, except the NOOP that the engine queues to end a poll."""
        if message != NO_OPERATION:
            super().send(message)

    def send_at_once(self, message: str | bytes) -> bool:
        """Send a packet without waiting, except that NOOP; return whether it is sent or under way."""
        return message == NO_OPERATION or super().send_at_once(message)

    def fail(self, status: int) -> None:
        """Close it and end the session, because the client broke the protocol."""
        self.blame(status)
        self._session.fail("packet")
        super().fail(status)

    def blame(self, status: int) -> None:
        """Set the status of the closing frame, unless one is set already."""
        self._status = self._status or status

    def cut(self) -> None:
        """Shut the connection down without a closing frame, for a client that does not read."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(SHUT_RDWR)

    def _handle(self, _: WebSocket) -> None:
        socket = self._session.socket
        try:
            if not socket.connected or self._upgrades():
                self._carry()
                while (packet := self.wait()) is not None:
                    if not self._session.admits(1, len(packet)):
                        self._session.fail("flooding")
                        break
                    socket.receive(EnginePacket(encoded_packet=packet))
                    # A client that only sends has to answer pings too.
                    socket.check_ping_timeout()
        except (OSError, SocketIsClosedError):
            pass  # the client left during the upgrade, or the session has ended
        except Exception as error:
            self._session.fail("packet", error)
        finally:
            # Closing the connection takes a while, so end the session first.
            self._leave()
            self._session.wait_until_written()

    def _upgrades(self) -> bool:
        """Whether the client of a polling session completes the upgrade."""
        self._session.socket.upgrading = True
        if not self._hears(PROBE):
            return False
        self.send(PROBED)
        # A poll that still waits would take packets that are for the WebSocket.
        self._session.socket.queue.put(EnginePacket(NOOP))
        self._session.begin_poll()
        self._session.end_poll()
        return self._hears(UPGRADE)

    def _hears(self, wanted: str) -> bool:
        """Whether the next packet is the one that is wanted; without one, the session goes on polling."""
        self._end = time.monotonic() + UPGRADE_SECONDS
        self.socket.settimeout(UPGRADE_SECONDS)
        packet = super().wait()
        if packet is not None and packet != wanted:
            self.fail(PROTOCOL_ERROR)
        return packet == wanted

    def _carry(self) -> None:
        if not self._closing:
            engine = self._session.engine
            self._end = math.inf
            self.socket.settimeout(engine.ping_interval + engine.ping_timeout)
        self._session.carry(self)

    def _leave(self) -> None:
        session = self._session
        if session.socket.upgraded or not session.socket.connected:
            session.lose()
        else:
            session.socket.upgrading = False

    def _close(self, status: int | None = None) -> None:
        if self._session.websocket is self:
            # First, because sending waits for the client to read.
            self._session.lose()
        # The session's end closes it too; the first status counts.
        super()._close(self._status if status is None else status)


@contextlib.contextmanager
def _bounded(connection: Any, seconds: float) -> Iterator[None]:  # noqa: ANN401 - of the worker class's kind
    """Bound each wait for data of a connection to `seconds` in this block."""
    if connection is None:
        yield
        return
    timeout = connection.gettimeout()
    connection.settimeout(seconds)
    try:
        yield
    finally:
        connection.settimeout(timeout)


def size_of(packet: Packet) -> int:
    """Return the memory that a waiting packet takes, in bytes."""
    # PyPy has no sys.getsizeof().
    return (len(packet.data) if isinstance(packet.data, str | bytes) else 0) + PACKET_BYTES


def key_of(environ: dict[str, object]) -> str | None:
    """Return the key that the edge hashed for a request; None without a key."""
    return _on_the_wire(environ, KEY_VARIABLE) or None


def names_of(sid: str, session: Session | None) -> dict[str, str]:
    """Return the `names` of a session, or its id alone if it is not known here."""
    return {"sid": sid} if session is None else session.names


def request_id_of(environ: dict[str, object]) -> str:
    """Return what the edge's log calls a request; empty without an edge."""
    return _on_the_wire(environ, REQUEST_ID_VARIABLE)[:LONGEST_REQUEST_ID]


def process_of(environ: dict[str, object]) -> str:
    """Return the process of an edge through which a request came; empty if the edge does not say."""
    return _on_the_wire(environ, PROCESS_VARIABLE)


def _on_the_wire(environ: dict[str, object], variable: str) -> str:
    """Return a header as UTF-8, with surrogates for invalid bytes; WSGI decodes it as ISO-8859-1 (PEP 3333)."""
    return str(environ.get(variable, "")).encode("latin-1").decode("utf-8", "surrogateescape")
