"""The result of a probe: figures, verdict, tables, JSON.

The JSON file, schema 1 (null: not known):

    {"schema": 1,
     "target": "http://127.0.0.1:9002", "address": "127.0.0.1",
     "key": "query parameter client_id" | "header x-client-id" | null,
     "ids": 60, "connections": 3, "planned_sessions": 720, "hold_seconds": 30.0 | null, "elapsed_seconds": 4.2,
     "sticky": true | false | null (interrupted), "verdict": "one line", "interrupted": false,
     "nodes_known_by": "header x-served-by" | "texts of the application" | null (then no ids_on_more_than_one_node),
     "total": FIGURES, "transports": {"polling": FIGURES, ...},
     "split_ids": {"user-00007": ["node1-1", "node2-1"], ...}  (the first 100)}

    FIGURES = {"sessions": 180, "completed": 180, "invalid_session": 0, "failures": {"HTTP 503": 2, ...},
     "dropped": 0, "fell_back_to_polling": 0, "ids": 60, "ids_on_more_than_one_node": 0,
     "sessions_per_node": {"node1-1": 60, ...}, "ids_per_node": {"node1-1": 20, ...}, "busiest_over_mean_ids": 1.05,
     "handshake_ms": {"p50": 3.1, "p99": 9.0}, "round_trip_ms": {"p50": 1.2, "p99": 4.0}}

`failures` counts all sessions that did not complete by cause, including `Invalid session`; `dropped` counts those of
them that had been open. `busiest_over_mean_ids` is the largest of `ids_per_node` divided by their mean, over the nodes
that served an id: a client does not know the others.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stickyring.tools.probe.failures import INVALID_SESSION, TWO_NODES
from stickyring.tools.probe.session import Record
from stickyring.tools.probe.settings import Dialect, Manner, Shape
from stickyring.tools.probe.targets import Target

SPLIT_IDS_SHOWN = 100
NODES_SHOWN = 40


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the nearest-rank percentile of `values` at `share` (0 to 1); None without values."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


class Figures:
    """The figures of some sessions."""

    def __init__(self, records: Iterable[Record]) -> None:
        records = list(records)
        self.sessions = len(records)
        self.completed = sum(record.cause is None for record in records)
        self.failures = Counter(record.cause for record in records if record.cause is not None)
        self.dropped = sum(record.opened and record.cause is not None for record in records)
        self.fell_back = sum(record.fell_back for record in records)
        self.unanswered = sum(record.begun and record.handshake is None for record in records)
        self.handshakes = [record.handshake for record in records if record.handshake is not None]
        self.round_trips = [seconds for record in records for seconds in record.round_trips]
        self.sessions_per_node = Counter(node for record in records for node in record.nodes)
        self.nodes_of: dict[str, set[str]] = defaultdict(set)
        for record in records:
            self.nodes_of[record.user] |= record.nodes
        self.ids_per_node = Counter(node for nodes in self.nodes_of.values() for node in nodes)

    @property
    def invalid(self) -> int:
        """Sessions that got HTTP 400 `Invalid session`."""
        return self.failures[INVALID_SESSION]

    @property
    def failed_otherwise(self) -> int:
        """Sessions that failed for another cause."""
        return self.sessions - self.completed - self.invalid

    @cached_property
    def split_ids(self) -> dict[str, list[str]]:
        """The ids seen on more than one node, with those nodes."""
        return {user: sorted(nodes) for user, nodes in sorted(self.nodes_of.items()) if len(nodes) > 1}

    @property
    def busiest_over_mean(self) -> float | None:
        """Ids on the busiest node, divided by the mean of all nodes seen."""
        counts = self.ids_per_node.values()
        return max(counts) * len(counts) / sum(counts) if counts else None

    def as_json(self, nodes_known: bool) -> dict[str, Any]:
        """Return FIGURES of the schema."""
        return {
            "sessions": self.sessions,
            "completed": self.completed,
            "invalid_session": self.invalid,
            "failures": dict(self.failures.most_common()),
            "dropped": self.dropped,
            "fell_back_to_polling": self.fell_back,
            "ids": len(self.nodes_of),
            "ids_on_more_than_one_node": len(self.split_ids) if nodes_known else None,
            "sessions_per_node": dict(sorted(self.sessions_per_node.items())),
            "ids_per_node": dict(sorted(self.ids_per_node.items())),
            "busiest_over_mean_ids": rounded(self.busiest_over_mean),
            "handshake_ms": milliseconds(self.handshakes),
            "round_trip_ms": milliseconds(self.round_trips),
        }


@dataclass(frozen=True)
class Report:
    """The result of a run; `elapsed` is in seconds."""

    target: Target
    dialect: Dialect
    shape: Shape
    records: Sequence[Record]
    interrupted: bool
    elapsed: float

    @cached_property
    def total(self) -> Figures:
        """The figures of all sessions."""
        return Figures(self.records)

    @cached_property
    def by_manner(self) -> dict[str, Figures]:
        """The figures of each transport, in the requested order."""
        return {
            manner: Figures(record for record in self.records if record.manner == manner)
            for manner in self.shape.manners
        }

    @property
    def key(self) -> str | None:
        """How the id is sent; None if it is not sent."""
        if self.dialect.key_header is not None:
            return f"header {self.dialect.key_header}"
        return None if self.dialect.key_param is None else f"query parameter {self.dialect.key_param}"

    @cached_property
    def nodes_known_by(self) -> str | None:
        """Where the nodes' names come from."""
        if any(record.header_nodes for record in self.records):
            return f"header {self.dialect.node_header}"
        return "texts of the application" if any(record.spoken_nodes for record in self.records) else None

    @property
    def sticky(self) -> bool:
        """Whether every requested session completed, and no id was seen on two nodes."""
        total = self.total
        return total.completed == self.shape.total and not total.split_ids

    @property
    def verdict(self) -> str:
        """The result and its cause, in one line."""
        total, noun = self.total, self.shape.noun
        if self.interrupted:
            ended = f"{total.sessions} of {self.shape.total} {noun} had ended"
            return f"interrupted: {ended}, {total.completed} of them complete; nothing is proven"
        if not self.sticky:
            return self._failing()
        completed = f"all {total.sessions} {noun} completed"
        match list(total.ids_per_node):
            case []:
                return f"sticky as far as can be seen: {completed}; which node served them is unknown"
            case [only]:
                return f"sticky: {completed}, but there was only one node ({only})"
            case nodes:
                return f"sticky: {completed}, each of {len(total.nodes_of)} ids on one of {len(nodes)} nodes"

    def _failing(self) -> str:
        total, noun = self.total, self.shape.noun
        unkeyed = "" if self.key else ", and no id was sent"
        parts = []
        if total.invalid:
            parts.append(
                f"{total.invalid} of {total.sessions} sessions got HTTP 400 {INVALID_SESSION}: "
                f"the requests of one session reached different nodes{unkeyed}"
            )
        if total.split_ids:
            split = f"{len(total.split_ids)} of {len(total.nodes_of)} ids were on more than one node"
            parts.append(split if total.invalid else f"{split}{unkeyed}")
        others = [(name, count) for name, count in total.failures.most_common() if name != INVALID_SESSION]
        if others:
            causes = ", ".join(f"{count} x {name}" for name, count in others[:3])
            more = f", {len(others) - 3} more causes" if len(others) > 3 else ""
            parts.append(f"{total.failed_otherwise} of {total.sessions} {noun} failed: {causes}{more}")
        if total.failures.keys() == {"HTTP 404"} and Manner.HTTP not in self.shape.manners:
            parts.append("is this the --path of Socket.IO? An application without Socket.IO needs --http")
        elif total.unanswered == total.sessions and not total.invalid:
            parts.append("no connect of Socket.IO was answered: the application may need another --parser")
        if total.dropped:
            parts.append(f"{total.dropped} sessions were dropped after they had been open")
        unsticky = total.invalid or total.split_ids or total.failures[TWO_NODES]
        return f"{'not sticky' if unsticky else 'not proven sticky'}: {'; '.join(parts)}"

    def as_json(self) -> dict[str, Any]:
        """Return the object of the module's docstring."""
        known = self.nodes_known_by is not None
        return {
            "schema": 1,
            "target": self.target.origin,
            "address": self.target.address,
            "key": self.key,
            "ids": len(self.shape.ids),
            "connections": self.shape.connections,
            "planned_sessions": self.shape.total,
            "hold_seconds": self.shape.hold,
            "elapsed_seconds": round(self.elapsed, 3),
            "sticky": None if self.interrupted else self.sticky,
            "verdict": self.verdict,
            "interrupted": self.interrupted,
            "nodes_known_by": self.nodes_known_by,
            "total": self.total.as_json(known),
            "transports": {manner: figures.as_json(known) for manner, figures in self.by_manner.items()},
            "split_ids": dict(list(self.total.split_ids.items())[:SPLIT_IDS_SHOWN]),
        }

    def __rich__(self) -> RenderableType:
        good = self.sticky and not self.interrupted
        paragraphs: list[list[RenderableType]] = [
            [Text(line) for line in self._asked()],
            [self._figures_table(), *(Text(line, style="dim") for line in self._notes())],
        ]
        if self.nodes_known_by is not None:
            paragraphs.append([self._nodes_table()])
        if self.total.failures:
            paragraphs.append([self._failures_table()])
        paragraphs.append([Text(self.verdict, style="bold green" if good else "bold red")])
        # A blank line between paragraphs, none after the last.
        return Group(*(line for paragraph in paragraphs for line in (Text(), *paragraph)))

    def _asked(self) -> list[str]:
        key = f"id as {self.key}" if self.key else "no id sent"
        inside = "" if self.dialect.namespace == "/" else f", namespace {self.dialect.namespace}"
        return [f"{self.target.origin} ({self.target.address}), {key}{inside}", f"{self._load()}, {self.elapsed:.1f} s"]

    def _load(self) -> str:
        shape = self.shape
        return f"{len(shape.ids)} ids x {shape.connections} connections x {len(shape.manners)} transports"

    @property
    def _columns(self) -> dict[str, Figures]:
        """What the tables of nodes and failures show beside the total."""
        return self.by_manner

    def _notes(self) -> list[str]:
        notes = ["split ids: seen on more than one node; busiest/mean: ids on the busiest node over the mean"]
        if self.nodes_known_by is None:
            notes.append(f"which node served is unknown: no {self.dialect.node_header} header, no node#<id> text;")
            notes.append(f"only completion and {INVALID_SESSION} count")
        else:
            notes.append(f"nodes known by {self.nodes_known_by}")
        if self.total.fell_back:
            notes.append(f"{self.total.fell_back} websocket-first sessions fell back to polling")
        return notes

    def _figures_table(self) -> Table:
        # Without padding and edge the columns fit into the 80 characters of a terminal.
        table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        table.add_column("transport", no_wrap=True)
        held = ["drop-\nped"] if self.shape.hold is not None else []
        for name in (
            "ses-\nsions",
            "com-\nplete",
            "Invalid\nsession",
            "other\nfails",
            *held,
            "split\nids",
            "busiest\n/mean",
            "handshake\np50/p99 ms",
            "round trip\np50/p99 ms",
        ):
            table.add_column(name, justify="right", no_wrap=True)
        rows = list(self.by_manner.items())
        if len(rows) > 1:
            rows.append(("all", self.total))
        for number, (name, figures) in enumerate(rows):
            dropped = [str(figures.dropped)] if held else []
            table.add_row(
                name,
                str(figures.sessions),
                str(figures.completed),
                str(figures.invalid),
                str(figures.failed_otherwise),
                *dropped,
                "?" if self.nodes_known_by is None else str(len(figures.split_ids)),
                "-" if figures.busiest_over_mean is None else f"{figures.busiest_over_mean:.2f}",
                pair(figures.handshakes),
                pair(figures.round_trips),
                end_section=number == len(rows) - 2,
            )
        return table

    def _nodes_table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        table.add_column("node", overflow="fold")
        for name in ("ids", self.shape.noun, *self._columns):
            table.add_column(name, justify="right", no_wrap=True)
        nodes = sorted(self.total.ids_per_node)
        for node in nodes[:NODES_SHOWN]:
            table.add_row(
                Text(node),
                str(self.total.ids_per_node[node]),
                str(self.total.sessions_per_node[node]),
                *(str(figures.sessions_per_node[node]) for figures in self._columns.values()),
            )
        if len(nodes) > NODES_SHOWN:
            table.add_row(f"... and {len(nodes) - NODES_SHOWN} more")
        return table

    def _failures_table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        table.add_column("cause of failure", overflow="fold")
        for name in (self.shape.noun, *self._columns):
            table.add_column(name, justify="right", no_wrap=True)
        for name, count in self.total.failures.most_common():
            table.add_row(Text(name), str(count), *(str(figures.failures[name]) for figures in self._columns.values()))
        return table


def rounded(value: float | None) -> float | None:
    """Return the value rounded to three decimals."""
    return None if value is None else round(value, 3)


def milliseconds(seconds: Sequence[float]) -> dict[str, float | None]:
    """Return p50 and p99 in milliseconds, by name."""
    return {
        name: None if (value := percentile(seconds, share)) is None else round(value * 1000, 3)
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }


def pair(seconds: Sequence[float]) -> str:
    """Return p50 and p99 in milliseconds, for a table."""
    values = milliseconds(seconds).values()
    return "/".join("-" if value is None else f"{value:.{0 if value >= 100 else 1}f}" for value in values)
