"""The files for a Prometheus: what is in them, that promtool takes them, and what a Prometheus sees with them."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
FLEET = PROJECT / "roles" / "stickyring_monitor" / "files" / "fleet.html"
RULES = PROJECT / "roles" / "stickyring_monitor" / "files" / "stickyring.rules.yml"
# No host answers at these addresses, and no task may contact them.
EDGES: dict[str, dict[str, Any]] = {
    "edge1": {
        "stickyring_address": "192.0.2.1",
        "stickyring_edge_metrics_port": 9902,
        "stickyring_edge_metrics_readers": ["192.0.2.30"],
    },
    "edge2": {"stickyring_address": "192.0.2.2", "stickyring_probe_urls": ["https://chat.example.com?app=1"]},
}
NODES: dict[str, dict[str, Any]] = {
    "node1": {"stickyring_address": "192.0.2.11", "stickyring_node_instances": 2},
    "node2": {"stickyring_address": "2001:db8::12", "stickyring_node_port": 7000, "stickyring_weight": 3},
}


def run(
    folder: Path,
    *arguments: str,
    playbook: str = "monitor_files",
    edges: Mapping[str, Any] = EDGES,
    nodes: Mapping[str, Any] = NODES,
    **settings: object,
) -> tuple[int, str]:
    """Run the playbook in this folder with these settings for all; return the status and the output as one line."""
    groups = {"edge": {"hosts": edges}, "nodes": {"hosts": nodes}}
    given = {"stickyring_node_application": "chat:app", **settings}
    (folder / "hosts.json").write_text(json.dumps({**groups, "all": {"vars": given}}))
    done = subprocess.run(
        [PROGRAMS / "ansible-playbook", "-i", folder / "hosts.json", PROJECT / f"playbooks/{playbook}.yml", *arguments],
        cwd=folder,
        # As a shell sets it.
        env=os.environ | {"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "PWD": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAMS / "promtool", *arguments], capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the command was typed, with the written files in `made`."""
    folder = tmp_path_factory.mktemp("home")
    status, said = run(folder, "-e", "stickyring_directory=made")
    assert status == 0, said
    return folder


def files_in(folder: Path) -> dict[str, Any]:
    """Name to content, decoded if it is YAML."""
    return {
        path.name: path.read_text() if path.suffix == ".html" else yaml.safe_load(path.read_text())
        for path in folder.iterdir()
    }


def test_targets_and_jobs_are_those_of_the_inventory(home: Path) -> None:
    made = files_in(home / "made")
    assert made.pop("fleet.html") == FLEET.read_text()
    assert made.pop("stickyring.rules.yml") == yaml.safe_load(RULES.read_text())
    jobs = made.pop("stickyring.scrape.yml")["scrape_configs"]
    assert [job["job_name"] for job in jobs] == ["stickyring_nodes", "stickyring_envoys", "stickyring_edges"]
    assert made == {
        "stickyring.nodes.yml": [
            {"targets": ["192.0.2.11:8001"], "labels": {"instance": "node1-1"}},
            {"targets": ["192.0.2.11:8002"], "labels": {"instance": "node1-2"}},
            {"targets": ["[2001:db8::12]:7000"], "labels": {"instance": "node2-1"}},
        ],
        "stickyring.envoys.yml": [{"targets": ["192.0.2.1:9902"], "labels": {"instance": "edge1"}}],
        "stickyring.edges.yml": [
            {"targets": ["http://192.0.2.1:9002/healthz"], "labels": {"instance": "edge1"}},
            {"targets": ["https://chat.example.com/healthz?app=1"], "labels": {"instance": "edge2"}},
        ],
    }


def test_promtool_takes_them(home: Path, tmp_path: Path) -> None:
    made = shutil.copytree(home / "made", tmp_path / "moved")
    own = made.parent / "prometheus.yml"
    own.write_text(yaml.safe_dump({"rule_files": ["moved/stickyring.rules.yml"]}))
    for file in (made / "stickyring.scrape.yml", own):
        done = promtool("check", "config", file)
        assert done.returncode == 0, done.stdout + done.stderr
    # The control: it looks into the files that they name.
    (made / "stickyring.nodes.yml").write_text("- targets: 192.0.2.11:8001\n")
    assert promtool("check", "config", made / "stickyring.scrape.yml").returncode != 0
    (made / "stickyring.rules.yml").write_text(RULES.read_text().replace("rate(", "rite(", 1))
    assert promtool("check", "config", own).returncode != 0


def test_a_second_run_changes_nothing_even_if_it_is_limited_to_one_host(home: Path) -> None:
    before = files_in(home / "made")
    status, said = run(home, "-e", "stickyring_directory=made", "--limit", "node2")
    assert status == 0, said
    assert set(re.findall(r"changed=(\d+)", said)) == {"0"}
    assert files_in(home / "made") == before


def test_check_mode_writes_nothing(tmp_path: Path) -> None:
    status, said = run(tmp_path, "-e", "stickyring_directory=made", "--check", "--diff")
    assert status == 0, said
    assert "job_name: stickyring_edges" in said
    assert not (tmp_path / "made").exists()


def test_without_a_blackbox_exporter_edges_are_not_scraped(tmp_path: Path) -> None:
    status, said = run(tmp_path, "-e", "stickyring_directory=made", stickyring_monitor_blackbox="")
    assert status == 0, said
    jobs = files_in(tmp_path / "made")["stickyring.scrape.yml"]["scrape_configs"]
    assert [job["job_name"] for job in jobs] == ["stickyring_nodes", "stickyring_envoys"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "Name the folder with -e stickyring_directory=FOLDER. Nothing was changed."),
        (
            {"stickyring_directory": "made", "stickyring_monitor_scrape_interval": "60"},
            "stickyring_monitor_scrape_interval: 60 is not between 1 and 15 seconds",
        ),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, given: dict[str, str], words: str) -> None:
    status, said = run(tmp_path, "-e", json.dumps(given))
    assert status != 0
    assert words in said
    assert not (tmp_path / "made").exists()


def test_edges_are_asked_where_the_probe_would(home: Path, tmp_path: Path) -> None:
    given = {"stickyring_directory": str(tmp_path), "stickyring_edge_envoy_sha256": "0" * 64}
    status, said = run(tmp_path, "-e", json.dumps(given), playbook="describe")
    assert status == 0, said
    probed = {
        edge: json.loads((tmp_path / f"{edge}.json").read_text())["variables"]["stickyring_probe_urls"]
        for edge in EDGES
    }
    asked = {
        one["labels"]["instance"]: [url.replace("/healthz", "") for url in one["targets"]]
        for one in files_in(home / "made")["stickyring.edges.yml"]
    }
    assert asked == probed


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def running(folder: Path, *command: str | Path) -> Iterator[None]:
    with (folder / "log").open("ab") as log, subprocess.Popen(command, cwd=folder, stdout=log, stderr=log) as process:
        try:
            yield
        finally:
            process.kill()


def wait_for(question: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            if question():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
        time.sleep(0.1)


class Page(HTMLParser):
    """By the `id` of an element, its text, or the cells of a table's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Any] = {}
        self.name = ""
        self.cell = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if name := dict(attributes).get("id"):
            self.name = name
            self.found[name] = [] if tag == "table" else ""
        rows = self.found.get(self.name)
        if isinstance(rows, list) and tag == "tr":
            rows.append([])
        if isinstance(rows, list) and tag in {"td", "th"}:
            rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        self.cell &= tag not in {"td", "th"}
        if tag in {"table", "dd", "p"}:
            self.name = ""

    def handle_data(self, data: str) -> None:
        rows = self.found.get(self.name)
        if isinstance(rows, str):
            self.found[self.name] = " ".join(f"{rows} {data}".split())
        elif rows and self.cell:
            rows[-1][-1] = " ".join(f"{rows[-1][-1]} {data}".split())


def console(port: int) -> dict[str, Any]:
    """What the console of a Prometheus shows."""
    page = Page()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/consoles/fleet.html", timeout=5) as response:
        page.feed(response.read().decode())
    return page.found


def test_a_prometheus_with_them_sees_a_node_and_an_edge(tmp_path: Path) -> None:
    """And names what does not answer. The node itself stands for the edge: it answers /healthz too."""
    node, nobody, blackbox, prometheus = free_ports(4)
    given = {"stickyring_monitor_scrape_interval": 1, "stickyring_monitor_blackbox": f"127.0.0.1:{blackbox}"}
    edges = {
        name: {"stickyring_address": f"192.0.2.{number}", "stickyring_probe_urls": [f"http://127.0.0.1:{port}"]}
        for number, (name, port) in enumerate({"edge1": node, "edge2": nobody}.items(), 1)
    }
    nodes = {
        "node1": {"stickyring_address": "127.0.0.1", "stickyring_node_port": node},
        "node2": {"stickyring_address": "127.0.0.2", "stickyring_node_port": nobody},
    }
    status, said = run(tmp_path, "-e", json.dumps(given | {"stickyring_directory": "."}), edges=edges, nodes=nodes)
    assert status == 0, said
    jobs = yaml.safe_load((tmp_path / "stickyring.scrape.yml").read_text())
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump({"rule_files": ["stickyring.rules.yml"], **jobs}))
    (tmp_path / "blackbox.yml").write_text(yaml.safe_dump({"modules": {"http_2xx": {"prober": "http"}}}))

    def ask(path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{prometheus}/api/v1/{path}", timeout=5) as response:
            return json.load(response)["data"]

    def values(query: str) -> dict[str, str]:
        found = ask(f"query?query={urllib.parse.quote(query)}")["result"]
        return {one["metric"]["instance"]: one["value"][1] for one in found}

    listen = "--web.listen-address=127.0.0.1"
    with (
        running(tmp_path, PROGRAMS / "stickyring", "serve", "--listen", f"127.0.0.1:{node}", "--node-name", "node1-1"),
        running(
            tmp_path,
            *(PROGRAMS / "prometheus-blackbox-exporter", f"{listen}:{blackbox}", "--config.file=blackbox.yml"),
        ),
        running(
            tmp_path,
            *(PROGRAMS / "prometheus", f"{listen}:{prometheus}", "--config.file=prometheus.yml"),
            *("--storage.tsdb.path=data", "--web.console.templates=."),
        ),
    ):
        wait_for(lambda: values('up{job="stickyring_nodes"}') == {"node1-1": "1", "node2-1": "0"}, tmp_path)
        wait_for(lambda: values("probe_success") == {"edge1": "1", "edge2": "0"}, tmp_path)
        assert values("stickyring_connections_limit") == {"node1-1": "10000"}
        page = console(prometheus)
        assert page["sessions"] == "0"
        assert (page["instances"], page["edges"]) == ("1 of 2", "1 of 2")
        rows = [row[:4] for row in page["instance_table"][1:]]
        assert rows == [["node1-1", "up", "0", "-"], ["node2-1", "down", "-", "-"]]
        assert [row[:2] for row in page["edge_table"][1:]] == [["edge1", "yes"], ["edge2", "no"]]
        loaded = {rule["name"] for group in ask("rules")["groups"] for rule in group["rules"]}
        groups = yaml.safe_load(RULES.read_text())["groups"]
        assert loaded == {rule.get("alert") or rule["record"] for group in groups for rule in group["rules"]}
        # A changed inventory: node2 is gone. Prometheus is not told.
        left = yaml.safe_load((tmp_path / "stickyring.nodes.yml").read_text())[:1]
        (tmp_path / "new").write_text(yaml.safe_dump(left))
        (tmp_path / "new").rename(tmp_path / "stickyring.nodes.yml")
        wait_for(
            lambda: (
                [
                    one["labels"]["instance"]
                    for one in ask("targets")["activeTargets"]
                    if one["scrapePool"].endswith("nodes")
                ]
                == ["node1-1"]
            ),
            tmp_path,
        )
