"""What a node process counts, as Prometheus metrics in a registry of its own.

A message is one Engine.IO message packet (protocol revision 4): a Socket.IO event, acknowledgement, connect or
disconnect, or a binary attachment. Pings and the handshake itself are not messages.
"""

from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

TRANSPORTS = ("polling", "websocket")


class Queue(Protocol):
    """What is used of the packets that wait for their way to a client."""

    def empty(self) -> bool:
        """Whether none waits."""

    def put(self, item: "Packet | None") -> None:
        """Have one more wait; None says that none follows."""

    def get(self, block: bool = True, timeout: float | None = None) -> "Packet | None":
        """Take the next one, waiting for it."""

    def task_done(self) -> None:
        """Say that one which was taken is dealt with."""


class EngineSession(Protocol):
    """What is used of one session of python-engineio, `engineio.Socket`."""

    sid: str
    connected: bool
    upgraded: bool
    upgrading: bool
    closing: bool
    closed: bool

    @property
    def queue(self) -> Queue:
        """The packets that wait."""

    # The two that a `Session` puts its own in place of.
    poll: Callable[[], list["Packet"]]
    handle_post_request: Callable[[dict[str, Any]], None]

    def receive(self, packet: "Packet") -> None:
        """Deal with a packet from the client."""

    def check_ping_timeout(self) -> bool:
        """Whether the client still answers pings; its end, if it does not."""

    def close(self, wait: bool, abort: bool, reason: str) -> None:
        """End the session: the disconnect event first, then what waits for the client, then a CLOSE unless `abort`."""


class Packet(Protocol):
    """What is used of `engineio.packet.Packet`."""

    data: object

    def encode(self) -> str | bytes:
        """As it stands in a message of a WebSocket."""


class Engine(Protocol):
    """What is used of `engineio.Server`, which has no type hints: public names only."""

    sockets: dict[str, EngineSession]
    handlers: dict[str, Callable[..., object]]
    send_packet: Callable[[str, Packet], None]
    max_http_buffer_size: float
    ping_interval: float
    ping_timeout: float

    def get_queue_empty_exception(self) -> type[Exception]:
        """What a queue raises when nothing comes in time."""

    def sleep(self, seconds: float) -> None:
        """Let others run."""

    def start_background_task(self, target: Callable[..., object], *args: object) -> object:
        """Run something beside this."""

    def on(self, event: str, handler: Callable[..., object]) -> None:
        """Set the handler of `connect`, `message` or `disconnect`."""


def node_registry(node_name: str) -> CollectorRegistry:
    """Return a registry with the standard process metrics and `stickyring_node_info`."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    Info("stickyring_node", "The endpoint's name at the edge and the version of stickyring.", registry=registry).info(
        {"node": node_name, "version": version("stickyring")}
    )
    return registry


FAILURES = ("packet", "too_long", "unread", "unjoined", "handler")
"""Why a node ends a session for an error: a packet that cannot be decoded or that a client may not send; a body or
attachments that are too long; a client that does not read or that joins no namespace; a connect handler that fails."""


class EngineMetrics:
    """The counters of one Engine.IO server; whoever sees an event increments them.

    Labels: `transport` is polling, websocket or other (a transport that the client made up); `direction` is received or
    sent; `reason` of a session that failed is one of FAILURES, of a handshake capacity, draining or descriptors (503),
    protocol (400: older than Engine.IO 4), unauthorized (401) or bad_request (400).
    """

    def __init__(self, engine: Engine, max_connections: int, registry: CollectorRegistry) -> None:
        registry.register(_ConnectionsCollector(engine))
        Gauge("stickyring_connections_limit", "Connections above which new handshakes get 503.", registry=registry).set(
            max_connections
        )
        accepted = Counter(
            "stickyring_handshakes_accepted", "Engine.IO handshakes accepted.", ["transport"], registry=registry
        )
        self.refused = Counter(
            "stickyring_handshakes_refused", "Engine.IO handshakes refused.", ["transport", "reason"], registry=registry
        )
        self.unknown_sessions = Counter(
            "stickyring_unknown_sessions",
            "Requests for a session that this node does not know, by a user with a key sent on to the next: the edge's "
            "ring has changed under a polling client, or the session has ended; without a key: the wrong node.",
            ["transport"],
            registry=registry,
        )
        failed = Counter(
            "stickyring_sessions_failed", "Sessions that the node ended for an error.", ["reason"], registry=registry
        )
        messages = Counter("stickyring_messages", "Engine.IO messages.", ["transport", "direction"], registry=registry)
        # Looked up once: these are incremented often. A metric that is there at 0 also makes rates right.
        self.accepted = {transport: accepted.labels(transport) for transport in TRANSPORTS}
        self.received = {transport: messages.labels(transport, "received") for transport in TRANSPORTS}
        self.sent = {transport: messages.labels(transport, "sent") for transport in TRANSPORTS}
        self._failed = {reason: failed.labels(reason) for reason in FAILURES}
        for transport in TRANSPORTS:
            self.refused.labels(transport, "capacity")
            self.refused.labels(transport, "draining")
            self.refused.labels(transport, "descriptors")
            self.unknown_sessions.labels(transport)

    def count_failure(self, reason: str) -> None:
        """Count a session that the node ended, for one of FAILURES."""
        self._failed[reason].inc()


class MoveMetrics:
    """The counters of sessions that a node sends elsewhere."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.rebalances = Counter(
            "stickyring_rebalances", "Times that users were asked to go where the ring has them.", registry=registry
        )
        self.moved = Counter("stickyring_sessions_moved", "Sessions asked to reconnect elsewhere.", registry=registry)
        self.draining = Gauge("stickyring_draining", "1 while the node takes no users in.", registry=registry)


class _ConnectionsCollector(Collector):
    """Reads the open sessions by transport from the engine when a scrape asks: it cannot drift from the truth."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily]:
        upgraded = [session.upgraded for session in self._engine.sockets.copy().values() if not session.closed]
        family = GaugeMetricFamily("stickyring_connections", "Open Engine.IO sessions.", labels=["transport"])
        family.add_metric(["polling"], upgraded.count(False))
        family.add_metric(["websocket"], upgraded.count(True))
        yield family
