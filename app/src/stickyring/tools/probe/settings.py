"""The settings of a probe: how to talk to the deployment, and how much load to put on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Manner(StrEnum):
    """The order of transports that a session tries.

    `websocket-first` falls back to polling if the WebSocket handshake fails (socket.io-client's
    `transports: ["websocket", "polling"]` with `tryAllTransports`); `websocket` does not.
    """

    POLLING = "polling"
    UPGRADE = "upgrade"
    WEBSOCKET_FIRST = "websocket-first"
    WEBSOCKET = "websocket"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How to talk to the deployment.

    The id is sent as the query parameter `key_param`, or in the header `key_header`, or (both None) not at all. `event`
    is None if the deployment has no echo. `msgpack` is for a server with `serializer="msgpack"`, in Node.js with the
    parser socket.io-msgpack-parser. `timeout` is in seconds, for each step.
    """

    path: str = "/socket.io/"
    key_param: str | None = "client_id"
    key_header: str | None = None
    node_header: str = "x-served-by"
    event: str | None = "message"
    msgpack: bool = False
    timeout: float = 10.0


@dataclass(frozen=True, slots=True)
class Shape:
    """How much load: every id has `connections` sessions in each manner; at most `concurrency` open at once.

    With `hold` None, each session closes after its echo. Otherwise all sessions stay open together for `hold` seconds.
    `keep_cookies` gives every id a cookie jar, shared by its sessions.
    """

    ids: Sequence[str]
    manners: Sequence[Manner] = tuple(Manner)
    connections: int = 3
    concurrency: int = 50
    hold: float | None = None
    keep_cookies: bool = False

    @property
    def total(self) -> int:
        """Number of sessions."""
        return len(self.ids) * len(self.manners) * self.connections
