"""The settings of a probe: how to talk to the deployment, and how much load to put on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Manner(StrEnum):
    """The order of transports that a session tries.

    `websocket-first` falls back to polling if the WebSocket handshake fails (socket.io-client's
    `transports: ["websocket", "polling"]` with `tryAllTransports`); `websocket` does not. `http` is no session but a
    plain request, for applications without Socket.IO.
    """

    POLLING = "polling"
    UPGRADE = "upgrade"
    WEBSOCKET_FIRST = "websocket-first"
    WEBSOCKET = "websocket"
    HTTP = "http"


SESSIONS = (Manner.POLLING, Manner.UPGRADE, Manner.WEBSOCKET_FIRST, Manner.WEBSOCKET)
"""The transports of Socket.IO."""


class Parser(StrEnum):
    """How Socket.IO packets are encoded: as text, or by socket.io-msgpack-parser (python-socketio: `serializer`)."""

    DEFAULT = "default"
    MSGPACK = "msgpack"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How to talk to the deployment.

    The id is sent as the query parameter `key_param`, or in the header `key_header`, or (both None) not at all. `event`
    is None if the deployment has no echo. `auth` is the payload of the Socket.IO connect to `namespace`; `headers` are
    sent with every request. `secrets` are texts that must not appear in the output. A `parser` of None is found out if
    there is no echo, and otherwise the default. `timeout` is in seconds, for each step.
    """

    path: str = "/socket.io/"
    key_param: str | None = "client_id"
    key_header: str | None = None
    node_header: str = "x-served-by"
    event: str | None = "message"
    namespace: str = "/"
    auth: Mapping[str, Any] | None = None
    headers: Sequence[tuple[str, str]] = ()
    secrets: frozenset[str] = frozenset()
    parser: Parser | None = None
    timeout: float = 10.0

    def without_secrets(self, text: str) -> str:
        """Return a text of the server with `***` instead of each secret."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text


@dataclass(frozen=True, slots=True)
class Shape:
    """How much load: every id has `connections` sessions in each manner; at most `concurrency` open at once.

    With `hold` None, each session closes after its echo. Otherwise all sessions stay open together for `hold` seconds.
    `keep_cookies` gives every id a cookie jar, shared by its sessions.
    """

    ids: Sequence[str]
    manners: Sequence[Manner] = SESSIONS
    connections: int = 3
    concurrency: int = 50
    hold: float | None = None
    keep_cookies: bool = False

    @property
    def noun(self) -> str:
        """What there are `total` of."""
        return "requests" if Manner.HTTP in self.manners else "sessions"

    @property
    def total(self) -> int:
        """Number of sessions, or of plain requests."""
        return len(self.ids) * len(self.manners) * self.connections
