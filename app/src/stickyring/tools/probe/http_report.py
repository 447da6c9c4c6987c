"""The result of a probe with plain HTTP requests: figures, verdict, tables, JSON.

The JSON file, schema 1 (null: not known):

    {"schema": 1,
     "target": "http://127.0.0.1:9002", "address": "127.0.0.1", "http": "/health",
     "key": "query parameter client_id" | "header x-client-id" | null,
     "ids": 60, "connections": 3, "planned_requests": 180, "elapsed_seconds": 0.4,
     "sticky": true | false | null (interrupted), "verdict": "one line", "interrupted": false,
     "nodes_known_by": "header x-served-by" | null,
     "total": {"requests": 180, "completed": 180, "failures": {"HTTP 503": 2, ...},
      "ids": 60, "ids_on_more_than_one_node": 0, "nodes": 3, "requests_per_node": {"node1-1": 60, ...},
      "ids_per_node": {"node1-1": 20, ...}, "busiest_over_mean_ids": 1.05, "response_ms": {"p50": 1.2, "p99": 4.0}},
     "split_ids": {"user-00007": ["node1-1", "node2-1"], ...}  (the first 100)}
"""

from typing import Any

from rich import box
from rich.table import Table

from stickyring.tools.probe.report import SPLIT_IDS_SHOWN, Figures, Report, milliseconds, pair, rounded


class HttpReport(Report):
    """The result of a run of plain requests."""

    def as_json(self) -> dict[str, Any]:
        """Return the object of the module's docstring."""
        total = self.total
        return {
            "schema": 1,
            "target": self.target.origin,
            "address": self.target.address,
            "http": self.dialect.path,
            "key": self.key,
            "ids": len(self.shape.ids),
            "connections": self.shape.connections,
            "planned_requests": self.shape.total,
            "elapsed_seconds": round(self.elapsed, 3),
            "sticky": None if self.interrupted else self.sticky,
            "verdict": self.verdict,
            "interrupted": self.interrupted,
            "nodes_known_by": self.nodes_known_by,
            "total": {
                "requests": total.sessions,
                "completed": total.completed,
                "failures": dict(total.failures.most_common()),
                "ids": len(total.nodes_of),
                "ids_on_more_than_one_node": None if self.nodes_known_by is None else len(total.split_ids),
                "nodes": len(total.sessions_per_node),
                "requests_per_node": dict(sorted(total.sessions_per_node.items())),
                "ids_per_node": dict(sorted(total.ids_per_node.items())),
                "busiest_over_mean_ids": rounded(total.busiest_over_mean),
                "response_ms": milliseconds(total.round_trips),
            },
            "split_ids": dict(list(total.split_ids.items())[:SPLIT_IDS_SHOWN]),
        }

    @property
    def _columns(self) -> dict[str, Figures]:
        return {}

    def _load(self) -> str:
        return f"GET {self.dialect.path}: {len(self.shape.ids)} ids x {self.shape.connections} requests"

    def _notes(self) -> list[str]:
        known = self.nodes_known_by
        return [
            "split ids: seen on more than one node; busiest/mean: ids on the busiest node over the mean",
            f"no answer has a {self.dialect.node_header} header" if known is None else f"nodes known by {known}",
        ]

    def _figures_table(self) -> Table:
        total = self.total
        figures = {
            "requests": str(total.sessions),
            "complete": str(total.completed),
            "failed": str(total.sessions - total.completed),
            "nodes": str(len(total.sessions_per_node)),
            "split\nids": "?" if self.nodes_known_by is None else str(len(total.split_ids)),
            "busiest\n/mean": "-" if total.busiest_over_mean is None else f"{total.busiest_over_mean:.2f}",
            "response\np50/p99 ms": pair(total.round_trips),
        }
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        for name in figures:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_row(*figures.values())
        return table
