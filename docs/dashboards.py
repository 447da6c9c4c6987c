#!/usr/bin/env python3
"""Writes the Grafana dashboards of roles/stickyring_monitor/files/dashboards.

Import them in Grafana, or provision the folder; they ask for a data source of Prometheus.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.builders.common import ReduceDataOptions, VizLegendOptions
from grafana_foundation_sdk.builders.dashboard import Dashboard, DashboardLink, DatasourceVariable, QueryVariable
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DashboardLinkType, DataSourceRef, VariableRefresh

FOLDER = Path(__file__).parents[1] / "roles" / "stickyring_monitor" / "files" / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="$source")
TAG = "stickyring"
HEIGHT, HALF, QUARTER = 8, 12, 6
"""Sizes of panels in Grafana's grid, which is 24 wide."""
EXAMPLES_OF_USE = """
examples:
  docs/dashboards.py           write the files
  docs/dashboards.py --check   exit with 1 and name the files that are out of date
"""


@dataclass(frozen=True)
class Graph:
    """A panel with lines. `queries`: the legend of each, in Grafana's notation, to its expression of PromQL."""

    title: str
    unit: str
    queries: dict[str, str]
    description: str = ""


@dataclass(frozen=True)
class Number:
    """A panel with one value."""

    title: str
    unit: str
    query: str


@dataclass(frozen=True)
class Page:
    """A dashboard; `chosen`: the metric whose label `instance` one can choose by, if any."""

    title: str
    description: str
    panels: list[Graph | Number]
    chosen: str = ""


PAGES = {
    "fleet": Page(
        "stickyring fleet",
        "Who is connected where, and what is wrong.",
        [
            Number("Sessions", "short", "sum(stickyring_connections)"),
            Number("Instances down", "short", 'count(up{job="stickyring_nodes"}) - sum(up{job="stickyring_nodes"})'),
            Number("Edges that serve users", "short", 'sum(min by (instance) (probe_success{job="stickyring_edges"}))'),
            Number("Alerts", "short", 'count(ALERTS{alertname=~"Stickyring.*",alertstate="firing"}) or vector(0)'),
            Graph("Sessions by instance", "short", {"{{instance}}": "instance:stickyring_connections:sum"}),
            Graph(
                "Share of the limit",
                "percentunit",
                {"{{instance}}": "instance:stickyring_connections:part_of_limit"},
            ),
            Graph(
                "New sessions",
                "ops",
                {
                    "accepted": "sum(rate(stickyring_handshakes_accepted_total[$__rate_interval]))",
                    "refused": "sum(rate(stickyring_handshakes_refused_total[$__rate_interval])) or vector(0)",
                },
            ),
            Graph(
                "Sessions that have ended, by reason",
                "ops",
                {"{{reason}}": "sum by (reason) (rate(stickyring_disconnects_total[$__rate_interval]))"},
            ),
            Graph(
                "Acknowledgements, p99",
                "s",
                {"{{instance}}": "instance:stickyring_acknowledgement_seconds:p99_5m"},
                "From the start of an event's handler until its acknowledgement is given.",
            ),
            Graph(
                "Event loop lag, p99",
                "s",
                {"{{instance}}": "instance:stickyring_loop_lag_seconds:p99_5m"},
                "How late the event loop runs a task that is due. A handler that blocks makes it grow, for all users.",
            ),
        ],
    ),
    "instance": Page(
        "stickyring instance",
        "One process of the application on a node.",
        [
            Graph(
                "Sessions",
                "short",
                {
                    "{{transport}}": 'stickyring_connections{instance=~"$instance"}',
                    "limit": 'stickyring_connections_limit{instance=~"$instance"}',
                },
            ),
            Graph(
                "Messages",
                "ops",
                {
                    "{{transport}} {{direction}}": (
                        'rate(stickyring_messages_total{instance=~"$instance"}[$__rate_interval])'
                    )
                },
            ),
            Graph(
                "What waits for clients",
                "bytes",
                {
                    "all": 'stickyring_send_queue_bytes{instance=~"$instance"}',
                    "the most of one": 'stickyring_send_queue_largest_bytes{instance=~"$instance"}',
                },
            ),
            Graph(
                "Memory",
                "bytes",
                {"memory": 'process_resident_memory_bytes{instance=~"$instance",job="stickyring_nodes"}'},
            ),
            Graph(
                "CPU",
                "percentunit",
                {
                    "of one core": (
                        'rate(process_cpu_seconds_total{instance=~"$instance",job="stickyring_nodes"}[$__rate_interval])'
                    )
                },
            ),
            Graph(
                "Duration of sessions",
                "s",
                {
                    "median of those that end": (
                        "histogram_quantile(0.5, sum by (le)"
                        ' (rate(stickyring_session_duration_seconds_bucket{instance=~"$instance"}[$__rate_interval])))'
                    )
                },
            ),
        ],
        "stickyring_node_info",
    ),
    "edge": Page(
        "stickyring edge",
        "One Envoy. Needs stickyring_edge_metrics_port.",
        [
            Graph(
                "Connections",
                "short",
                {
                    "of clients": 'sum(envoy_http_downstream_cx_active{instance=~"$instance"})',
                    "WebSockets": 'sum(envoy_http_downstream_cx_upgrades_active{instance=~"$instance"})',
                },
            ),
            Graph(
                "Responses",
                "ops",
                {
                    "{{envoy_response_code_class}}xx": (
                        "sum by (envoy_response_code_class)"
                        ' (rate(envoy_http_downstream_rq_xx{instance=~"$instance"}[$__rate_interval]))'
                    )
                },
            ),
            Graph(
                "Unhealthy endpoints",
                "short",
                {
                    "{{envoy_cluster_name}}": (
                        'envoy_cluster_membership_total{instance=~"$instance"} - envoy_cluster_membership_healthy'
                    )
                },
            ),
            Graph(
                "Requests that went to the next node",
                "ops",
                {
                    "{{envoy_cluster_name}}": (
                        'rate(envoy_cluster_upstream_rq_retry{instance=~"$instance"}[$__rate_interval])'
                    )
                },
            ),
            Graph(
                "Refused",
                "ops",
                {
                    "new sessions above the limit of an address": (
                        "rate(envoy_stickyring_handshakes_http_local_rate_limit_enforced"
                        '{instance=~"$instance"}[$__rate_interval])'
                    ),
                    "connections above the limit of the edge": (
                        'sum(rate(envoy_listener_downstream_global_cx_overflow{instance=~"$instance"}[$__rate_interval]))'
                    ),
                },
            ),
            Graph("Memory", "bytes", {"allocated": 'envoy_server_memory_allocated{instance=~"$instance"}'}),
        ],
        "envoy_server_uptime",
    ),
    "moves": Page(
        "stickyring moves",
        "Users through an update, a drain or a rebalance.",
        [
            Graph("Releases", "short", {"{{release}}": "count by (release) (stickyring_node_info)"}),
            Graph("Instances that drain", "short", {"draining": "sum(stickyring_draining)"}),
            Graph(
                "Sessions of drains", "short", {"{{instance}} {{state}}": "stickyring_drain_sessions"}, "Until the end."
            ),
            Graph(
                "Users who were moved, and those who came",
                "ops",
                {
                    "asked to reconnect": "sum(rate(stickyring_sessions_moved_total[$__rate_interval]))",
                    "new sessions": "sum(rate(stickyring_handshakes_accepted_total[$__rate_interval]))",
                },
            ),
            Graph("Sessions by instance", "short", {"{{instance}}": "instance:stickyring_connections:sum"}),
            Graph(
                "Sessions that have ended, by instance and reason",
                "ops",
                {
                    "{{instance}} {{reason}}": (
                        "sum by (instance, reason) (rate(stickyring_disconnects_total[$__rate_interval]))"
                    )
                },
            ),
        ],
    ),
}


def target(expression: str, legend: str, letter: str) -> prometheus.Dataquery:
    """Return a query of a panel."""
    return prometheus.Dataquery().datasource(SOURCE).expr(expression).legend_format(legend).ref_id(letter)


def panel(what: Graph | Number) -> stat.Panel | timeseries.Panel:
    """Return the builder of a panel."""
    if isinstance(what, Number):
        last = ReduceDataOptions().calcs(["lastNotNull"])
        number = stat.Panel().title(what.title).unit(what.unit).datasource(SOURCE).height(4).span(QUARTER)
        return number.reduce_options(last).with_target(target(what.query, "", "A"))
    legend = VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    graph = timeseries.Panel().title(what.title).unit(what.unit).datasource(SOURCE).height(HEIGHT).span(HALF)
    graph = graph.legend(legend.show_legend(True)).min(0).fill_opacity(8).description(what.description)
    for letter, (label, expression) in zip(ascii_uppercase, what.queries.items(), strict=False):
        graph = graph.with_target(target(expression, label, letter))
    return graph


def dashboard(name: str, page: Page) -> str:
    """Return the JSON of a dashboard."""
    others = (
        DashboardLink("stickyring").type(DashboardLinkType.DASHBOARDS).tags([TAG]).as_dropdown(True).keep_time(True)
    )
    built = (
        Dashboard(page.title)
        .uid(f"stickyring-{name}")
        .description(page.description)
        .tags([TAG])
        .time("now-1h", "now")
        .refresh("15s")
        .link(others)
        .with_variable(DatasourceVariable("source").label("Data source").type("prometheus"))
    )
    if page.chosen:
        instances = QueryVariable("instance").label("Instance").datasource(SOURCE).multi(False).include_all(False)
        built = built.with_variable(
            instances.query(f"label_values({page.chosen}, instance)").refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        )
    for one in page.panels:
        built = built.with_panel(panel(one))
    return json.dumps(json.loads(JSONEncoder(sort_keys=True).encode(built.build())), indent=1, sort_keys=True) + "\n"


def main() -> None:
    """Write the files, or name those that are not up to date."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES_OF_USE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    only_check = parser.parse_args().check
    FOLDER.mkdir(exist_ok=True)
    wanted = {FOLDER / f"{name}.json": dashboard(name, page) for name, page in PAGES.items()}
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    stale += [path for path in FOLDER.iterdir() if path not in wanted]
    if only_check and stale:
        sys.exit(f"Run docs/dashboards.py: {', '.join(path.name for path in stale)}")
    for path in stale:
        if path in wanted:
            path.write_text(wanted[path])
        else:
            path.unlink()


if __name__ == "__main__":
    main()
