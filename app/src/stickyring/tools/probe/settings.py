"""What is asked of a probe: how the deployment is spoken to, and how much load it gets."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Manner(StrEnum):
    """The order of transports that a session goes through.

    `websocket-first` falls back to polling when the WebSocket handshake is refused (socket.io-client's
    `transports: ["websocket", "polling"]` with `tryAllTransports`), `websocket` never does.
    """

    POLLING = "polling"
    UPGRADE = "upgrade"
    WEBSOCKET_FIRST = "websocket-first"
    WEBSOCKET = "websocket"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How the deployment is spoken to.

    The id is sent as the query parameter `key_param`, or as the header `key_header`, or (both None) not at all. `event`
    None means that the deployment has no echo. `msgpack` means that its server has `serializer="msgpack"`, in Node.js
    the parser socket.io-msgpack-parser. `timeout` is in seconds, for each step.
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
    """How much load: every id has `connections` sessions in each manner, `concurrency` of them opening at once.

    `hold` None closes each session after its echo. Otherwise every session stays open until all of them have been open
    together for `hold` seconds. `keep_cookies` gives every id a browser's cookie jar, shared by its sessions.
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
