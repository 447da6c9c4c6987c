"""The Prometheus metrics of a process at the bus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from stickyring.bus.stream import Stream

COUNTERS = {
    "published": "Events and requests of this process for the bus.",
    "refused": "Events that emit refused, because too many wait for the bus.",
    "read": "Entries read from the bus.",
    "sent": "Events of the bus sent to a session, or held for it.",
    "ahead": "Own events delivered to own sessions without the bus, which was away.",
    "outages": "Times at which the bus was away.",
    "holes": "Times at which the bus had lost events.",
}
REASONS = ("unknown", "history", "trimmed", "taken", "ended", "bus")
"""Why a session could not be recovered: the bus does not have it (any more); the bus has lost events since; its events
are no longer kept; another connection of the client has it; the application has disconnected it; the bus was away."""


def register_bus(servers: Sequence[Any], registry: CollectorRegistry) -> Sequence[Stream]:
    """Return the streams of the Socket.IO servers that have a bus, and register their metrics if any has."""
    if streams := [server.manager.stream for server in servers if hasattr(server.manager, "stream")]:
        registry.register(_BusCollector(streams))
    return streams


class _BusCollector(Collector):
    def __init__(self, streams: Sequence[Stream]) -> None:
        self._streams = streams

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        streams = self._streams
        counts = [stream.router.counts for stream in streams]
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"stickyring_bus_{name}", text, sum(getattr(one, name) for one in counts))
        up = all(stream.met.is_set() and stream.away_since is None for stream in streams)
        yield GaugeMetricFamily("stickyring_bus_up", "1 while this process reads from the bus.", int(up))
        waiting = sum(len(stream.outbox) for stream in streams)
        yield GaugeMetricFamily("stickyring_bus_waiting", "Own entries not read back from the bus yet.", waiting)
        oldest = max(stream.outbox.age for stream in streams)
        yield GaugeMetricFamily("stickyring_bus_waiting_seconds", "Age of the oldest of them.", oldest)
        recovered = sum(one.recovered for one in counts)
        yield CounterMetricFamily("stickyring_sessions_recovered", "Sessions with which a client went on.", recovered)
        lost = Counter(dict.fromkeys(REASONS, 0))
        for one in counts:
            lost.update(one.not_recovered)
        family = CounterMetricFamily(
            "stickyring_sessions_not_recovered", "Sessions with which a client could not go on.", labels=["reason"]
        )
        for reason, number in lost.items():
            family.add_metric([reason], number)
        yield family
