"""Prometheus as `site.yml` deploys it: it watches every instance and edge, and shows the fleet."""

from __future__ import annotations

import json
import re
import shlex
import socket
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import environment
import pytest
import yaml
from faults import NODE
from lab_monitor import METRICS_PORT, PROMETHEUS, LabMonitor, wait_for
from playwright.sync_api import ConsoleMessage, sync_playwright

DASHBOARDS = environment.PROJECT / "roles" / "stickyring_monitor" / "files" / "dashboards"
OPERATIONS = environment.PROJECT / "docs" / "operations.md"
NOBODY = 99
"""The number of an address that no host of the lab has."""
RULES = environment.PROJECT / "roles" / "stickyring_monitor" / "files" / "stickyring.rules.yml"


@pytest.fixture
def instances(nodes: Any) -> set[str]:
    """Their names, as the inventory has them."""
    return {
        f"{node.name}-{number}"
        for node in nodes
        for number in range(1, int(node.variables["stickyring_node_instances"]) + 1)
    }


@pytest.fixture
def names(edges: Any) -> set[str]:
    """The edges' names."""
    return {edge.name for edge in edges}


def test_it_is_deployed_after_a_check_and_a_second_run_changes_nothing(monitor: LabMonitor) -> None:
    monitor.play("molecule/shared/create.yml")
    monitor.play("playbooks/monitor.yml", "--check")
    said = monitor.play("site.yml", "--diff")
    assert "a-secret-path" not in said
    assert set(re.findall(r"changed=(\d+)", monitor.play("playbooks/monitor.yml"))) == {"0"}


def test_it_watches_every_instance_and_edge(monitor: LabMonitor, instances: set[str], names: set[str]) -> None:
    targets = monitor.ask(f"{PROMETHEUS}/targets?state=active")["data"]["activeTargets"]
    assert {(one["labels"]["job"], one["labels"]["instance"], one["health"]) for one in targets} == {
        *(("stickyring_edges", name, "up") for name in names),
        *(("stickyring_envoys", name, "up") for name in names),
        *(("stickyring_nodes", name, "up") for name in instances),
    }
    assert {one["metric"]["instance"] for one in monitor.query("probe_success == 1")} == names


def test_every_rule_is_evaluated(monitor: LabMonitor) -> None:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    wanted = {rule.get("alert") or rule["record"]: "ok" for group in groups for rule in group["rules"]}

    def health() -> dict[str, str]:
        found = monitor.ask(f"{PROMETHEUS}/rules")["data"]["groups"]
        return {rule["name"]: rule["health"] for group in found for rule in group["rules"]}

    # Before the first evaluation it is unknown.
    wait_for(lambda: health() == wanted, 60, health)


def test_an_edge_has_the_metrics_of_the_rules(monitor: LabMonitor) -> None:
    """Otherwise an alert would never fire."""
    named = set(re.findall(r"\benvoy_\w+(?={)", RULES.read_text()))
    known = set(monitor.ask(f"{PROMETHEUS}/label/__name__/values")["data"])
    assert len(named) == 7
    assert named - known == set()


def test_a_node_is_updated_while_its_edge_has_metrics(monitor: LabMonitor) -> None:
    """What is behind their port is among the endpoints of which Envoy tells, and has no name."""
    options = ("--limit", "node1,edge", "-e", "stickyring_node_release=watched", "-e", "stickyring_node_proving_time=1")
    said = monitor.play("playbooks/rolling_update.yml", *options)
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


def test_only_those_who_may_reach_it_and_the_metrics_of_edges(monitor: LabMonitor, edge: Any) -> None:
    for port in 9090, 9093, 9094, 9115:
        with pytest.raises(OSError), socket.create_connection((monitor.address, port), timeout=2):
            pass
    # Envoy closes connections of all others.
    with socket.create_connection((edge.variables["stickyring_address"], METRICS_PORT), timeout=2) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: edge\r\n\r\n")
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert monitor.host.file("/etc/prometheus/alertmanager.yml").mode == 0o640


def test_a_browser_shows_the_fleet_at_a_glance(tunnel: str, instances: set[str], names: set[str]) -> None:
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
            for table, wanted, state in (("edge", names, "yes"), ("instance", instances, "up")):
                rows = [row.split("\t")[:2] for row in page.locator(f"#{table}_table tr").all_inner_texts()[1:]]
                assert {(name.strip(), found.strip()) for name, found in rows} == {(name, state) for name in wanted}
            assert page.locator("#alerts").inner_text() == "No alert is firing."
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is as wide as it"
            page.screenshot(path=environment.PROJECT / ".artifacts" / f"fleet-{width}.png")
        chromium.close()
    assert complaints == []


def test_the_alerts_of_a_host_under_maintenance_can_be_silenced(monitor: LabMonitor) -> None:
    """With the command of docs/operations.md."""
    (command,) = re.findall(r"`ssh monitor1 (amtool [^`]+)`", OPERATIONS.read_text())
    # A shell here and one there, as with ssh.
    silence = monitor.host.check_output("sh -c %s", " ".join(shlex.split(command)))
    found = monitor.ask("http://127.0.0.1:9093/api/v2/silences")
    assert [(one["id"], one["matchers"][0]["isRegex"]) for one in found] == [(silence, True)]
    monitor.host.check_output("amtool --alertmanager.url=http://127.0.0.1:9093 silence expire %s", silence)


@pytest.mark.soak
def test_a_setting_changes_while_it_runs_and_an_invalid_one_changes_nothing(monitor: LabMonitor, ansible: Any) -> None:
    host = monitor.host
    before = host.check_output("systemctl show --property=MainPID --value prometheus")
    monitor.play("playbooks/monitor.yml", "-e", "stickyring_monitor_scrape_interval=5")
    assert host.check_output("systemctl show --property=MainPID --value prometheus") == before, "a reload is enough"
    text = monitor.ask(f"{PROMETHEUS}/status/config")["data"]["yaml"]
    assert {job["scrape_interval"] for job in yaml.safe_load(text)["scrape_configs"]} == {"5s"}
    monitor.play("playbooks/monitor.yml", "-e", "stickyring_monitor_retention_size=2GB")
    assert monitor.ask(f"{PROMETHEUS}/status/flags")["data"]["storage.tsdb.retention.size"] in {"2GB", "2GiB"}
    kept = host.file("/etc/prometheus/alertmanager.yml").content_string
    wrong = '{"stickyring_monitor_alertmanager": {"route": {"receiver": "nobody"}, "receivers": [{"name": "other"}]}}'
    refused = ansible("ansible-playbook", "-i", monitor.inventory, "playbooks/monitor.yml", "-e", wrong, check=False)
    assert refused.returncode != 0
    assert "undefined receiver" in refused.stdout
    assert host.file("/etc/prometheus/alertmanager.yml").content_string == kept
    monitor.play("playbooks/monitor.yml")


@pytest.mark.soak
def test_a_removed_node_is_watched_no_longer(monitor: LabMonitor, nodes: Any, machine: Any) -> None:
    """Neither another node that is down nor a monitor that is away stops a removal."""
    gone, down = nodes[-1].name, machine(nodes[0].name)
    play = ("playbooks/remove_node.yml", "-e", f"stickyring_node={gone}")

    def watched() -> set[str]:
        return {one["metric"]["instance"].partition("-")[0] for one in monitor.query('up{job="stickyring_nodes"}')}

    down.check_output(f"systemctl stop {NODE}")
    try:
        assert "Nothing watches it any more." in " ".join(monitor.play(*play).split())
    finally:
        down.check_output(f"systemctl start {NODE}")
    wait_for(lambda: watched() == {node.name for node in nodes} - {gone}, 60, watched)
    monitor.play("site.yml")
    wait_for(lambda: watched() == {node.name for node in nodes}, 60, watched)
    hosts = monitor.inventory / "host_vars" / "monitor1.yml"
    hosts.parent.mkdir(exist_ok=True)
    hosts.write_text(f"ansible_host: {environment.lab_address(monitor.inventory, NOBODY)}\n")
    try:
        said = " ".join(monitor.play(*play).split())
    finally:
        hosts.unlink()
    assert "monitor1 may still watch it, and report that it is down." in said
    monitor.play("site.yml")


def test_somebody_elses_prometheus_is_left_alone(monitor: LabMonitor, ansible: Any) -> None:
    """Without the options of stickyring, the host looks like one that another team has set up with our files."""
    host = monitor.host
    before = host.file("/etc/prometheus/prometheus.yml").content_string
    host.check_output("mv /etc/default/prometheus /root/")
    try:
        refused = ansible("ansible-playbook", "-i", monitor.inventory, "playbooks/monitor.yml", check=False)
        some = ("--tags", "configure")
        also = ansible("ansible-playbook", "-i", monitor.inventory, "playbooks/monitor.yml", *some, check=False)
    finally:
        host.check_output("mv /root/prometheus /etc/default/prometheus")
    assert (refused.returncode, also.returncode) == (2, 2)
    said = " ".join(refused.stdout.split())
    assert re.search(r"monitor1 has /usr/bin/prometheus, .* already, which may be somebody else's\.", said)
    assert host.file("/etc/prometheus/prometheus.yml").content_string == before


def test_an_alertmanager_that_is_not_debians_is_left_alone(monitor: LabMonitor, ansible: Any, machine: Any) -> None:
    host = machine("node1")
    host.check_output("mkdir /etc/prometheus && touch /etc/prometheus/alertmanager.yml")
    there = ("-e", "stickyring_monitor_directory=/srv/prometheus")
    group = monitor.inventory / "another.yml"
    group.write_text("monitor: {hosts: {node1: {}}}\n")
    try:
        play = ("ansible-playbook", "-i", monitor.inventory, "playbooks/monitor.yml", "--limit", "node1,localhost")
        said = [" ".join(ansible(*play, *options, check=False).stdout.split()) for options in ((), there)]
        assert host.check_output("ls /etc/prometheus") == "alertmanager.yml"
    finally:
        group.unlink()
        host.check_output("rm -r /etc/prometheus")
    assert "node1 has /etc/prometheus/alertmanager.yml already, which may be somebody else's." in said[0]
    assert "Here it has to be /etc/prometheus." in said[1]
    assert not host.exists("prometheus")
