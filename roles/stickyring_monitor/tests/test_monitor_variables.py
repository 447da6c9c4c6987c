"""What is made of the variables for a Prometheus, and what is said of those with which it would not work."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.stickyring.fleet.plugins.filter.monitor import (
    monitor_edges,
    monitor_envoys,
    monitor_mistakes,
    monitor_nodes,
)

GOOD: dict[str, Any] = {
    "directory": "/etc/prometheus/stickyring",
    "scrape_interval": 15,
    "blackbox": "127.0.0.1:9115",
    "edge_path": "/healthz",
    "retention_time": "15d",
    "retention_size": "4GB",
    "alertmanager": {"route": {"receiver": "nobody"}, "receivers": [{"name": "nobody"}]},
}


def test_a_target_is_an_address_with_a_port_and_the_name_of_the_instance() -> None:
    assert monitor_nodes([{"name": "node1-1", "address": "2001:db8::11", "port": 8001}]) == [
        {"targets": ["[2001:db8::11]:8001"], "labels": {"instance": "node1-1"}}
    ]


def test_an_edge_is_asked_at_all_its_urls_and_one_without_urls_is_not_watched() -> None:
    urls = ["https://chat.example.com/", "http://[2001:db8::1]:9002?app=1"]
    edges = [{"name": "edge1", "urls": urls}, {"name": "edge2", "urls": []}]
    assert monitor_edges(edges, "/up") == [
        {
            "targets": ["https://chat.example.com/up", "http://[2001:db8::1]:9002/up?app=1"],
            "labels": {"instance": "edge1"},
        }
    ]


def test_an_edge_without_a_port_for_metrics_has_no_target() -> None:
    edges = [{"name": "edge1", "urls": [], "metrics": "192.0.2.10:9902"}, {"name": "edge2", "urls": [], "metrics": ""}]
    assert monitor_envoys(edges) == [{"targets": ["192.0.2.10:9902"], "labels": {"instance": "edge1"}}]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scrape_interval": "1"},
        {"blackbox": ""},
        {"blackbox": "[::1]:9115"},
        {"blackbox": "probes.example.com:9115"},
    ],
)
def test_good_variables_are_taken(changes: dict[str, Any]) -> None:
    assert monitor_mistakes(GOOD | changes) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"directory": ""}, "directory: name a folder"),
        ({"scrape_interval": "60"}, "scrape_interval: 60 is not between 1 and 15 seconds, as the alerts need it"),
        ({"scrape_interval": "15s"}, "scrape_interval: 15s is not between 1 and 15 seconds, as the alerts need it"),
        ({"scrape_interval": 0}, "scrape_interval: 0 is not between 1 and 15 seconds, as the alerts need it"),
        (
            {"blackbox": "127.0.0.1"},
            "blackbox: 127.0.0.1 is no address with a port. Give one, 127.0.0.1:9115 for example, or an empty text",
        ),
        (
            {"blackbox": "::1:9115"},
            "blackbox: ::1:9115 is no address with a port. Give one, 127.0.0.1:9115 for example, or an empty text",
        ),
        ({"retention_time": 15}, "retention_time: 15 is no time. Give one, 15d or 12h for example"),
        ({"retention_size": "4 GB"}, "retention_size: 4 GB is no size. Give one, 4GB or 500MB for example"),
        (
            {"alertmanager": {"receivers": ["https://example.com/secret"]}},
            "alertmanager: give its configuration, a dictionary with route and receivers",
        ),
        ({"edge_path": "healthz"}, "edge_path: healthz does not begin with /"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: str) -> None:
    assert monitor_mistakes(GOOD | changes) == [f"stickyring_monitor_{words}"]
