"""The Prometheus metrics of a node process, in a registry of their own.

A message is one Engine.IO message packet (protocol revision 4): a Socket.IO event, acknowledgement, connect or
disconnect, or a binary attachment. Pings and the handshake itself are not messages.
"""

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from stickyring.node.limits import KINDS

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

TRANSPORTS = ("polling", "websocket")
VERSION = version("stickyring")
_ENVIRONMENT = Path(sys.prefix).resolve()
RELEASE = _ENVIRONMENT.name if _ENVIRONMENT.parent.name == "releases" else ""
"""The name of the deployed release that this process runs, a folder below releases; empty elsewhere."""


class Queue(Protocol):
    """The used part of a session's queue of packets to its client."""

    def empty(self) -> bool:
        """Whether no packet is queued."""

    def put(self, item: "Packet | None") -> None:
        """Queue a packet; None means that none follows."""

    def get(self, block: bool = True, timeout: float | None = None) -> "Packet | None":
        """Take the next packet, waiting for it at most `timeout` seconds."""

    def task_done(self) -> None:
        """Mark a taken packet as done."""

    def join(self) -> None:
        """Wait until all packets are taken and marked as done."""


class EngineSession(Protocol):
    """The used part of python-engineio's session, `engineio.Socket`."""

    sid: str
    connected: bool
    upgraded: bool
    upgrading: bool
    closing: bool
    closed: bool
    last_ping: float | None

    @property
    def queue(self) -> Queue:
        """The packets that wait for the client."""

    # `Session` replaces these two.
    poll: Callable[[], list["Packet"]]
    handle_post_request: Callable[[dict[str, Any]], None]

    def receive(self, packet: "Packet") -> None:
        """Handle a packet from the client."""

    def check_ping_timeout(self) -> bool:
        """Return whether the client still answers pings; if not, end the session."""

    def close(self, wait: bool, abort: bool, reason: str) -> None:
        """End the session: the disconnect event, then the queued packets, then a CLOSE unless `abort`."""


class Packet(Protocol):
    """The used part of `engineio.packet.Packet`."""

    data: object

    def encode(self) -> str | bytes:
        """Return it as a WebSocket message."""


class Engine(Protocol):
    """The used part of `engineio.Server`, which has no type hints: public names only."""

    sockets: dict[str, EngineSession]
    handlers: dict[str, Callable[..., object]]
    send_packet: Callable[[str, Packet], None]
    handle_request: "Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]"
    max_http_buffer_size: float
    ping_interval: float
    ping_timeout: float

    def get_queue_empty_exception(self) -> type[Exception]:
        """Return the exception that a queue raises on timeout."""

    def sleep(self, seconds: float) -> None:
        """Sleep, and let other green threads run."""

    def start_background_task(self, target: Callable[..., object], *args: object) -> object:
        """Run `target` in a task of its own."""

    def on(self, event: str, handler: Callable[..., object]) -> None:
        """Set the handler of `connect`, `message` or `disconnect`."""


def node_registry(node_name: str) -> CollectorRegistry:
    """Return a registry with the standard process metrics and `stickyring_node_info`."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    Info("stickyring_node", "The endpoint's name, its release, the version of stickyring.", registry=registry).info(
        {"node": node_name, "version": VERSION, "release": RELEASE}
    )
    return registry


FAILURES = ("packet", "too_long", "unread", "unjoined", "handler", "flooding")
"""Errors for which a node ends a session: an invalid packet; a body or attachments that are too long; a client that
does not read; a client that joins no namespace; a connect handler that fails; a client that sends more than it may."""


DISCONNECTS = {
    "client disconnect": "client",
    "server disconnect": "server",
    "ping timeout": "ping_timeout",
    "transport close": "transport_close",
    "transport error": "transport_error",
}
"""What python-engineio gives applications as the reason of a disconnect, as a label."""
ANSWER_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SESSION_SECONDS = (1, 10, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 7 * 24 * 3600)
LAG_INTERVAL = 0.5
"""Seconds between two measurements of the event loop's lag."""


class OpenSession(Protocol):
    """The used part of a session of `stickyring.node.sessions`."""

    moved: bool
    failed: str

    @property
    def seconds(self) -> float:
        """How long it has been open, in seconds."""

    @property
    def waiting(self) -> int:
        """Bytes that wait for the client."""


class EngineMetrics:
    """The metrics of a node's Engine.IO servers together; the gates count.

    Labels: `transport` is polling, websocket or other (a transport that the client made up); `direction` is received or
    sent; `reason` of a failed session is one of FAILURES; `reason` of a refused handshake is capacity, draining or
    descriptors (503), address (429), protocol (400: older than Engine.IO 4), unauthorized (401) or bad_request (400);
    `reason` of a disconnect is moved, failed, one of DISCONNECTS or other.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        max_connections: int,
        registry: CollectorRegistry,
        sessions: Mapping[str, OpenSession],
    ) -> None:
        registry.register(_ConnectionsCollector(engines))
        registry.register(_QueuesCollector(sessions))
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
            "Requests for a session that this node does not have. With a key, the edge tries the next node: the ring "
            "has changed under a polling client, or the session has ended. Without a key, it is the wrong node.",
            ["transport"],
            registry=registry,
        )
        failed = Counter(
            "stickyring_sessions_failed", "Sessions that the node ended for an error.", ["reason"], registry=registry
        )
        over = Counter(
            "stickyring_sessions_over_limit",
            "Sessions whose client sent more than the limits, or that were too many of an address; enforced or not.",
            ["limit"],
            registry=registry,
        )
        messages = Counter("stickyring_messages", "Engine.IO messages.", ["transport", "direction"], registry=registry)
        disconnects = Counter("stickyring_disconnects", "Sessions that have ended.", ["reason"], registry=registry)
        self._durations = Histogram(
            "stickyring_session_duration_seconds",
            "Duration of ended sessions.",
            buckets=SESSION_SECONDS,
            registry=registry,
        )
        self.answers = _Answers(registry)
        self.lag = Histogram(
            "stickyring_loop_lag_seconds",
            f"How late the event loop ran a task that was due, each {LAG_INTERVAL:g} s from the first session on.",
            buckets=LAG_SECONDS,
            registry=registry,
        )
        # Looked up once, because these are incremented often. Samples that begin at 0 also make rates right.
        self.accepted = {transport: accepted.labels(transport) for transport in TRANSPORTS}
        self.received = {transport: messages.labels(transport, "received") for transport in TRANSPORTS}
        self.sent = {transport: messages.labels(transport, "sent") for transport in TRANSPORTS}
        self._over = {kind: over.labels(kind) for kind in KINDS}
        self._failed = {reason: failed.labels(reason) for reason in FAILURES}
        reasons = ("moved", "failed", *DISCONNECTS.values(), "other")
        self._disconnects = {reason: disconnects.labels(reason) for reason in reasons}
        for transport in TRANSPORTS:
            self.refused.labels(transport, "capacity")
            self.refused.labels(transport, "address")
            self.refused.labels(transport, "draining")
            self.refused.labels(transport, "descriptors")
            self.unknown_sessions.labels(transport)

    def count_failure(self, reason: str) -> None:
        """Count a session that the node ended for `reason`, one of FAILURES."""
        self._failed[reason].inc()

    def count_excess(self, kind: str) -> None:
        """Count a session that has exceeded a limit; `kind` is one of `limits.KINDS`."""
        self._over[kind].inc()

    def count_end(self, session: OpenSession, reason: str = "") -> None:
        """Count a session that has ended; `reason` is the engine's."""
        label = "moved" if session.moved else "failed" if session.failed else DISCONNECTS.get(reason, "other")
        self._disconnects[label].inc()
        self._durations.observe(session.seconds)


class _Answers(Collector):
    """The times to acknowledgements; a `Histogram` would add several percent to the CPU time of an echo.

    They begin with the handler. To note when an event arrives would add as much; what it waits until then is the lag.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counts = [0] * (len(ANSWER_SECONDS) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, seconds: float) -> None:
        """Count an acknowledgement that was given after so many seconds; for one thread."""
        self._counts[bisect_left(ANSWER_SECONDS, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Return the histogram."""
        bounds = [*map(floatToGoString, ANSWER_SECONDS), "+Inf"]
        yield HistogramMetricFamily(
            "stickyring_acknowledgement_seconds",
            "From the start of an event's handler until its acknowledgement is given.",
            [*zip(bounds, accumulate(self._counts), strict=True)],
            self._sum,
        )


class MoveMetrics:
    """The metrics of sessions that a node moves."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.rebalances = Counter(
            "stickyring_rebalances", "Rebalances: moved users were asked to reconnect.", registry=registry
        )
        self.moved = Counter("stickyring_sessions_moved", "Sessions asked to reconnect elsewhere.", registry=registry)
        self.draining = Gauge("stickyring_draining", "1 while the node drains or is drained.", registry=registry)
        self.drain_sessions = Gauge(
            "stickyring_drain_sessions",
            "Sessions of the drain: to move, found so far; asked to reconnect; left, of those.",
            ["state"],
            registry=registry,
        )
        self.off_ring = OffRing(registry)


class OffRing(Collector):
    """The number of sessions whose users are assigned to another node; `count` is None until a ring is known."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.count: Callable[[], int] | None = None
        registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Count at each scrape."""
        if self.count is not None:
            text = "Sessions whose users the ring of the last rebalance assigns to another node."
            yield GaugeMetricFamily("stickyring_sessions_off_ring", text, self.count())


class RefusedConnections(Collector):
    """The number of connections that the worker has refused; `count` is set before it serves."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.count: Callable[[], int] = lambda: 0
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Read it at each scrape."""
        text = "Connections refused because file descriptors had run out."
        yield CounterMetricFamily("stickyring_connections_refused", text, self.count())


class _QueuesCollector(Collector):
    """Sums up at each scrape what waits for clients."""

    def __init__(self, sessions: Mapping[str, OpenSession]) -> None:
        self._sessions = sessions

    def collect(self) -> Iterator[GaugeMetricFamily]:
        waiting = [session.waiting for session in [*self._sessions.values()]]
        text = "Bytes queued or under way to clients"
        yield GaugeMetricFamily("stickyring_send_queue_bytes", f"{text}.", sum(waiting))
        yield GaugeMetricFamily(
            "stickyring_send_queue_largest_bytes",
            f"{text}, for the client for which the most wait.",
            max(waiting, default=0),
        )


class _ConnectionsCollector(Collector):
    """Counts the engines' open sessions by transport at each scrape, so the figure cannot drift."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[GaugeMetricFamily]:
        sessions = [session for engine in self._engines for session in engine.sockets.copy().values()]
        upgraded = [session.upgraded for session in sessions if not session.closed]
        family = GaugeMetricFamily("stickyring_connections", "Open Engine.IO sessions.", labels=["transport"])
        family.add_metric(["polling"], upgraded.count(False))
        family.add_metric(["websocket"], upgraded.count(True))
        yield family
