"""Filters for what a Prometheus is given: its targets, and mistakes in the role's variables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

SLOWEST_SCRAPE = 15
DURATION = re.compile(r"[1-9][0-9]*(s|m|h|d|w|y)")
SIZE = re.compile(r"[1-9][0-9]*(MB|GB|TB)")
PLACE = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]+")
"""Host and port, as Prometheus wants them."""


def monitor_nodes(instances: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the target groups (`file_sd_config`) of instances, each a dict with `name`, `address` and `port`.

    The label `instance` is the instance's name, which stays when its address changes.
    """
    return [
        {"targets": [f"{_host(one['address'])}:{one['port']}"], "labels": {"instance": one["name"]}}
        for one in instances
    ]


def monitor_edges(edges: Sequence[Mapping[str, Any]], path: str) -> list[dict[str, Any]]:
    """Return the target groups of edges, each a dict with `name` and `urls`; the targets are those URLs with the path.

    A query of a URL stays: it may choose the application.
    """
    return [
        {
            "targets": [urlunsplit(urlsplit(url)._replace(path=path)) for url in one["urls"]],
            "labels": {"instance": one["name"]},
        }
        for one in edges
        if one["urls"]
    ]


def monitor_envoys(edges: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the target groups of the edges' own metrics, for those that have `metrics`, an address with a port."""
    return [{"targets": [one["metrics"]], "labels": {"instance": one["name"]}} for one in edges if one.get("metrics")]


def monitor_mistakes(variables: Mapping[str, Any]) -> list[str]:
    """Return the mistakes in the role's variables, one sentence each without full stop.

    variables: those to check, by their names without the role's prefix; numbers may be texts.
    """
    return [f"stickyring_monitor_{mistake}" for mistake in _mistakes(variables)]


def _mistakes(variables: Mapping[str, Any]) -> Iterator[str]:
    interval, blackbox = str(variables["scrape_interval"]), str(variables["blackbox"])
    if not variables["directory"]:
        yield "directory: name a folder"
    if not (interval.isdecimal() and 1 <= int(interval) <= SLOWEST_SCRAPE):
        yield f"scrape_interval: {interval} is not between 1 and {SLOWEST_SCRAPE} seconds, as the alerts need it"
    if blackbox and not PLACE.fullmatch(blackbox):
        yield f"blackbox: {blackbox} is no address with a port. Give one, 127.0.0.1:9115 for example, or an empty text"
    time, size, alertmanager = (variables[name] for name in ("retention_time", "retention_size", "alertmanager"))
    if not DURATION.fullmatch(str(time)):
        yield f"retention_time: {time} is no time. Give one, 15d or 12h for example"
    if not SIZE.fullmatch(str(size)):
        yield f"retention_size: {size} is no size. Give one, 4GB or 500MB for example"
    # Without its values, which may be secrets.
    if not (isinstance(alertmanager, Mapping) and {"route", "receivers"} <= set(alertmanager)):
        yield "alertmanager: give its configuration, a dictionary with route and receivers"
    if not str(variables["edge_path"]).startswith("/"):
        yield f"edge_path: {variables['edge_path']} does not begin with /"


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


class FilterModule:
    """The filters by the names that roles use."""

    def filters(self) -> dict[str, Any]:
        """Name to function."""
        return {
            "monitor_edges": monitor_edges,
            "monitor_envoys": monitor_envoys,
            "monitor_mistakes": monitor_mistakes,
            "monitor_nodes": monitor_nodes,
        }
