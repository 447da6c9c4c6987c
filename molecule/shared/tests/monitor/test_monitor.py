"""Prometheus as `site.yml` deploys it: it watches the fleet, and says when an instance is away."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import environment
import pytest
import testinfra
import yaml
from playwright.sync_api import ConsoleMessage, sync_playwright

DASHBOARDS = environment.PROJECT / "roles" / "stickyring_monitor" / "files" / "dashboards"
RULES = environment.PROJECT / "roles" / "stickyring_monitor" / "files" / "stickyring.rules.yml"
METRICS_PORT = 9902
PROMETHEUS = "http://127.0.0.1:9090/api/v1"
ALERTS = "http://127.0.0.1:9093/api/v2/alerts?silenced=false"
# Two scrapes, the rule's minute, and Prometheus' way to Alertmanager.
NOTICED_SECONDS = 150


def wait_for(question: Callable[[], bool], seconds: float = NOTICED_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(2)


def test_it_is_deployed_after_a_check_and_a_second_run_changes_nothing(play: Any) -> None:
    play("molecule/shared/create.yml")
    play("playbooks/monitor.yml", "--check")
    said = play("site.yml", "--diff")
    assert "a-secret-path" not in said
    assert set(re.findall(r"changed=(\d+)", play("playbooks/monitor.yml"))) == {"0"}


def test_it_watches_every_instance_and_edge(ask: Any, hosts: Any) -> None:
    targets = ask(f"{PROMETHEUS}/targets?state=active")["data"]["activeTargets"]
    edges = {name for name, host in hosts.items() if "edge" in host.groups}
    instances = {
        f"{name}-{number}"
        for name, host in hosts.items()
        if "nodes" in host.groups
        for number in range(1, int(host.variables["stickyring_node_instances"]) + 1)
    }
    assert {(one["labels"]["job"], one["labels"]["instance"], one["health"]) for one in targets} == {
        *(("stickyring_edges", name, "up") for name in edges),
        *(("stickyring_envoys", name, "up") for name in edges),
        *(("stickyring_nodes", name, "up") for name in instances),
    }
    probes = ask(f"{PROMETHEUS}/query?query=probe_success")["data"]["result"]
    assert {one["metric"]["instance"] for one in probes if one["value"][1] == "1"} == {
        name for name, host in hosts.items() if "edge" in host.groups
    }


def test_an_edge_has_the_metrics_of_the_rules(ask: Any) -> None:
    """Otherwise an alert would never fire."""
    named = set(re.findall(r"\benvoy_\w+(?={)", RULES.read_text()))
    known = set(ask(f"{PROMETHEUS}/label/__name__/values")["data"])
    assert len(named) == 6
    assert named - known == set()


def test_a_node_is_updated_while_its_edge_has_metrics(play: Any) -> None:
    """What is behind their port is among the endpoints of which Envoy tells, and has no name."""
    options = ("--limit", "node1,edge", "-e", "stickyring_node_release=watched", "-e", "stickyring_node_proving_time=1")
    said = play("playbooks/rolling_update.yml", *options)
    assert re.search(r"Wait until every edge finds the instances healthy\] \*+\nok: \[node1 -> edge1", said)


@pytest.mark.parametrize("dashboard", sorted(DASHBOARDS.glob("*.json")), ids=lambda path: path.stem)
def test_every_query_of_a_dashboard_returns_data(tunnel: str, dashboard: Path) -> None:
    panels = json.loads(dashboard.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(queries) >= len(panels) > 5

    def empty() -> list[str]:
        return [query for query in queries if not result_of(query)]

    def result_of(query: str) -> list[object]:
        asked = query.replace("$instance", ".+").replace("$__rate_interval", "5m")
        with urllib.request.urlopen(f"{tunnel}/api/v1/query?query={quote(asked)}", timeout=5) as answer:
            found: list[object] = json.load(answer)["data"]["result"]
            return found

    # A rate needs two scrapes, and a recorded one the next evaluation.
    wait_for(lambda: empty() == [], 60)


def test_only_those_who_may_reach_it_and_the_metrics_of_edges(
    host: testinfra.host.Host, fleet: Path, edge: Any
) -> None:
    address = environment.lab_address(fleet, 40)
    for port in 9090, 9093, 9094, 9115:
        with pytest.raises(OSError), socket.create_connection((address, port), timeout=2):
            pass
    # Envoy closes connections of all others.
    with socket.create_connection((edge.variables["stickyring_address"], METRICS_PORT), timeout=2) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: edge\r\n\r\n")
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert host.file("/etc/prometheus/alertmanager.yml").mode == 0o640


def test_a_browser_shows_the_fleet_at_a_glance(tunnel: str, hosts: Any) -> None:
    instances = {
        f"{name}-{number}"
        for name, host in hosts.items()
        if "nodes" in host.groups
        for number in range(1, int(host.variables["stickyring_node_instances"]) + 1)
    }
    edges = {name for name, host in hosts.items() if "edge" in host.groups}
    complaints: list[str] = []

    def note(message: ConsoleMessage) -> None:
        # Prometheus has no icon at the path where browsers look for one.
        if message.type == "error" and not message.location["url"].endswith("/favicon.ico"):
            complaints.append(message.text)

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=environment.CHROMIUM, args=environment.SWITCHES)
        for width in 1280, 390:
            page = chromium.new_page(viewport={"width": width, "height": 900})
            page.on("console", note)
            page.goto(f"{tunnel}/consoles/fleet.html")
            for table, names, state in (("edge", edges, "yes"), ("instance", instances, "up")):
                rows = [row.split("\t")[:2] for row in page.locator(f"#{table}_table tr").all_inner_texts()[1:]]
                assert {(name.strip(), found.strip()) for name, found in rows} == {(name, state) for name in names}
            assert page.locator("#alerts").inner_text() == "No alert is firing."
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is as wide as it"
            page.screenshot(path=environment.PROJECT / ".artifacts" / f"fleet-{width}.png")
        chromium.close()
    assert complaints == []


@pytest.mark.soak
def test_a_setting_changes_while_it_runs_and_an_invalid_one_changes_nothing(
    play: Any, ansible: Any, fleet: Any, host: testinfra.host.Host, ask: Any
) -> None:
    before = host.check_output("systemctl show --property=MainPID --value prometheus")
    play("playbooks/monitor.yml", "-e", "stickyring_monitor_scrape_interval=5")
    assert host.check_output("systemctl show --property=MainPID --value prometheus") == before, "a reload is enough"
    text = ask(f"{PROMETHEUS}/status/config")["data"]["yaml"]
    assert {job["scrape_interval"] for job in yaml.safe_load(text)["scrape_configs"]} == {"5s"}
    play("playbooks/monitor.yml", "-e", "stickyring_monitor_retention_size=2GB")
    assert ask(f"{PROMETHEUS}/status/flags")["data"]["storage.tsdb.retention.size"] in {"2GB", "2GiB"}
    kept = host.file("/etc/prometheus/alertmanager.yml").content_string
    wrong = '{"stickyring_monitor_alertmanager": {"route": {"receiver": "nobody"}, "receivers": [{"name": "other"}]}}'
    refused = ansible("ansible-playbook", "-i", fleet, "playbooks/monitor.yml", "-e", wrong, check=False)
    assert refused.returncode != 0
    assert "undefined receiver" in refused.stdout
    assert host.file("/etc/prometheus/alertmanager.yml").content_string == kept
    play("playbooks/monitor.yml")


def test_somebody_elses_prometheus_is_left_alone(ansible: Any, fleet: Any, host: testinfra.host.Host) -> None:
    """Without the rules of stickyring, the host looks like one that another team has set up."""
    before = host.file("/etc/prometheus/prometheus.yml").content_string
    host.check_output("mv /etc/prometheus/stickyring.rules.yml /root/")
    try:
        refused = ansible("ansible-playbook", "-i", fleet, "playbooks/monitor.yml", check=False)
    finally:
        host.check_output("mv /root/stickyring.rules.yml /etc/prometheus/")
    assert refused.returncode != 0
    assert "monitor1 has a Prometheus already, which may be somebody else's." in " ".join(refused.stdout.split())
    assert host.file("/etc/prometheus/prometheus.yml").content_string == before


@pytest.mark.soak
def test_an_instance_that_is_away_is_the_only_alert_and_it_ends(ask: Any, nodes: Any, machine: Any) -> None:
    """Its users are served by others, so neither the edge nor anything else is wrong."""

    def firing() -> list[tuple[str, str]]:
        return [(one["labels"]["alertname"], one["labels"]["instance"]) for one in ask(ALERTS)]

    assert firing() == []
    node = machine(nodes[-1].name)
    node.check_output("systemctl stop stickyring-node@1")
    try:
        wait_for(lambda: firing() != [])
        assert firing() == [("StickyringNodeDown", f"{nodes[-1].name}-1")]
    finally:
        node.check_output("systemctl start stickyring-node@1")
    wait_for(lambda: firing() == [])
    rules = [rule for group in ask(f"{PROMETHEUS}/rules")["data"]["groups"] for rule in group["rules"]]
    groups = yaml.safe_load(RULES.read_text())["groups"]
    assert {rule["name"]: rule["health"] for rule in rules} == {
        rule.get("alert") or rule["record"]: "ok" for group in groups for rule in group["rules"]
    }
