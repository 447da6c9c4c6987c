"""The sessions of a node: whose each one is, since when, and how it is ended so that its client comes back.

A session is one of Engine.IO (protocol revision 4), which is one connection of a user: a tab, a device.
"""

import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote

from engineio.packet import NOOP
from engineio.packet import Packet as EnginePacket

from stickyring.metrics import Engine, EngineSession, Packet
from stickyring.websocket import PROTOCOL_ERROR, WebSocket

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

# Request headers of the edge's, as the WSGI environ names them.
KEY_VARIABLE = "HTTP_X_STICKYRING_KEY"
"""`x-stickyring-key`: what the edge hashed; decoded, if it came from the query."""
QUERY_VARIABLE = "HTTP_X_STICKYRING_QUERY"
"""`x-stickyring-query`: the query parameters that the edge looks for a key in, `name1,name2`, the first one first."""
CLUSTER_VARIABLE = "HTTP_X_STICKYRING_CLUSTER"
"""`x-stickyring-cluster`: the edge's cluster by which the request came; each has a ring of its own."""
SESSION_VARIABLE = "stickyring.session"
"""The open session that a request is of, in the WSGI environ."""
SETTLING_SECONDS = 1.0
"""A client that has just connected still joins namespaces; cut off in that, python-socketio's gives up for good."""
TICK_SECONDS = 0.05
REASON = "transport close"
"""What applications are told: the reason that stands for a client who lost the connection and may be back."""

# Socket.IO protocol revision 5: type 2 or 5 (event), attachments, namespace, and the id of the wanted acknowledgement.
WANTS_ANSWER = re.compile(r"[25](?:\d+-)?(?:/[^,]*,)?\d+\[")
ANSWERS = ("3", "6")


@dataclass(slots=True, weakref_slot=True, eq=False)
class Session:
    """One open session and what is known of it.

    `key` is the user: the newest key that a request of this session carried, None if none did; `cluster` is likewise
    the edge's cluster. `websocket` is what carries it, once something other than polls does. `unanswered` counts the
    events whose acknowledgement the application still owes; while `taking` is false, it gets no more that want one.
    `moved` says that the node ended the session to have it elsewhere. `polling` is locked while a poll is answered; a
    session that began as a WebSocket has none.
    """

    engine: Engine
    socket: EngineSession
    key: str | None = None
    cluster: str | None = None
    websocket: WebSocket | None = None
    began: float = field(default_factory=time.monotonic)
    unanswered: int = 0
    taking: bool = True
    moved: bool = False
    polling: "threading.Lock | None" = None

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
        """Note what the edge says with a request of this session."""
        self.key = key_of(environ) or self.key
        self.cluster = _on_the_wire(environ, CLUSTER_VARIABLE) or self.cluster

    def begin_poll(self) -> None:
        """Wait for the poll before this one to end, and have it end: it waits on a connection that is lost.

        Clients ask again by themselves when an edge has gone (browsers, aiohttp). Two polls would take the packets from
        each other, and the session's end would end one of them only.
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

    def takes(self, data: object) -> bool:
        """Note a message from the client; return whether the application gets it."""
        if self.ended:
            return False
        if not isinstance(data, str) or not WANTS_ANSWER.match(data):
            return True
        # One with attachments (type 5) is taken in: without it, they would be taken for something else.
        if not self.taking and data.startswith("2"):
            return False
        self.unanswered += 1
        return True

    def sent(self, data: object) -> None:
        """Note a message to the client."""
        if isinstance(data, str) and data.startswith(ANSWERS):
            self.unanswered -= 1

    def end(self) -> None:
        """End it so that its client comes back by itself; the application's disconnect handlers have run on return.

        There is neither a Socket.IO DISCONNECT nor an Engine.IO CLOSE: after the one the JavaScript client stays away,
        after the other python-socketio's. A WebSocket is closed, after what waited for it; a waiting poll is answered
        without a packet, which the gate turns into an error.
        """
        self.moved = True
        self.socket.close(wait=False, abort=True, reason=REASON)
        # The engine keeps a polling session that has ended until its next round, and fails on a POST for it.
        self.engine.sockets.pop(self.socket.sid, None)


class SessionWebSocket(WebSocket):
    """The WebSocket of a session, which knows it from when it carries the session: an upgrade may fail before."""

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Open the connection, let the handler run, and close it."""
        self._session: Session | None = environ.get(SESSION_VARIABLE)
        return super().__call__(environ, start_response)

    def wait(self) -> str | bytes | None:
        """Return the client's next packet; None when the connection has ended, or something else came."""
        session = self._session
        if session is not None and session.websocket is None and session.socket.upgraded:
            session.websocket = self
        packet = super().wait()
        if isinstance(packet, str) and not packet[:1].isdecimal():
            # python-engineio would fail at it, and leave the session open.
            self.fail(PROTOCOL_ERROR)
            return None
        return packet


def key_of(environ: dict[str, object]) -> str | None:
    """Return the key that the edge hashed for a request, as it stands on the wire; None without one.

    The edge says what it took from the query decoded, and hashed it as it came: of the parameters that it looks at, the
    one that decodes to the key tells. A key that none of them decodes to came from elsewhere, and as it is.
    """
    key = _on_the_wire(environ, KEY_VARIABLE)
    if not key:
        return None
    parameters = [parameter.partition("=") for parameter in _on_the_wire(environ, "QUERY_STRING").split("&")]
    for wanted in _on_the_wire(environ, QUERY_VARIABLE).split(","):
        raw = next((value for name, _, value in parameters if name == wanted), "")
        if unquote(raw, errors="surrogateescape") == key:
            return raw
    return key


def _on_the_wire(environ: dict[str, object], variable: str) -> str:
    """Return the bytes that came, as UTF-8 with surrogates for what is none; WSGI has them as ISO-8859-1 (PEP 3333)."""
    return str(environ.get(variable, "")).encode("latin-1").decode("utf-8", "surrogateescape")
