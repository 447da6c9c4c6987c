"""The sessions of a node: whose each one is, since when, and how it is ended so that its client comes back.

A session is one of Engine.IO (protocol revision 4), which is one connection of a user: a tab, a device.
"""

import re
import time
from dataclasses import dataclass, field
from urllib.parse import unquote

from stickyring.metrics import Engine, EngineSession

KEY_VARIABLE = "HTTP_X_STICKYRING_KEY"
"""The request header `x-stickyring-key`, in which the edge says what it hashed, as the WSGI environ names it."""
SETTLING_SECONDS = 1.0
"""A client that has just connected still joins namespaces; cut off in that, python-socketio's gives up for good."""
REASON = "transport close"
"""What applications are told: the reason that stands for a client who lost the connection and may be back."""

# Socket.IO protocol revision 5: type 2 or 5 (event), attachments, namespace, and the id of the wanted acknowledgement.
WANTS_ANSWER = re.compile(r"[25](?:\d+-)?(?:/[^,]*,)?\d+\[")
ANSWERS = ("3", "6")


@dataclass(slots=True, weakref_slot=True, eq=False)
class Session:
    """One open session and what is known of it.

    `key` is the user: the newest key that a request of this session carried, None if none did. `unanswered` counts the
    events whose acknowledgement the application still owes; while `taking` is false, it gets no more that want one.
    `moved` says that the node ended the session to have it elsewhere.
    """

    engine: Engine
    socket: EngineSession
    key: str | None = None
    began: float = field(default_factory=time.monotonic)
    unanswered: int = 0
    taking: bool = True
    moved: bool = False

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


def key_of(environ: dict[str, object]) -> str | None:
    """Return the key that the edge hashed for a request, as it stands on the wire; None without one.

    The edge says what it took from the query decoded, and hashed it as it came: the parameter that decodes to it tells.
    WSGI decodes headers as ISO-8859-1 (PEP 3333), keys are UTF-8 on the wire.
    """
    value = environ.get(KEY_VARIABLE)
    if not isinstance(value, str) or not value:
        return None
    key = value.encode("latin-1").decode("utf-8", "surrogateescape")
    query = str(environ.get("QUERY_STRING", ""))
    if "%" in query:
        for parameter in query.split("&"):
            _, _, raw = parameter.partition("=")
            if unquote(raw, errors="surrogateescape") == key:
                return raw
    return key
