"""A host beside those of an inventory that watches them, and questions to its Prometheus."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import environment
import testinfra

METRICS_PORT = 9902
"""Of Envoy's own metrics."""
RECEIVER = {"name": "team", "webhook_configs": [{"url": "http://192.0.2.99/a-secret-path"}]}
NUMBER = 40
"""Of its address in the lab."""
ASK = "import sys, urllib.request; sys.stdout.write(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"
PROMETHEUS = "http://127.0.0.1:9090/api/v1"


class LabMonitor:
    """A copy of an inventory, in a new folder, that has the group `monitor` too."""

    def __init__(self, inventory: Path, folder: Path) -> None:
        self.inventory = folder
        self.address = environment.lab_address(inventory, NUMBER)
        shutil.copytree(inventory, folder)
        group = {
            "hosts": {"monitor1": {"ansible_host": self.address}},
            "vars": {"stickyring_monitor_alertmanager": {"route": {"receiver": "team"}, "receivers": [RECEIVER]}},
        }
        of_edges = {"vars": {"stickyring_edge_metrics_port": METRICS_PORT}}
        (folder / "monitor.json").write_text(json.dumps({"monitor": group, "edge": of_edges}))

    def play(self, *arguments: str) -> str:
        """Runs a playbook on the hosts of the lab and on the one that watches; returns its output."""
        return environment.run("ansible-playbook", "-i", self.inventory, *arguments).stdout

    @property
    def host(self) -> testinfra.host.Host:
        """The host that watches, as root."""
        return testinfra.get_host("ansible://monitor1?sudo=true", ansible_inventory=str(self.inventory))

    def read(self, url: str) -> str:
        """The answer to a URL of a service on that host, which only its own users reach."""
        text: str = self.host.check_output("python3 -c %s %s", ASK, url)
        return text

    def ask(self, url: str) -> Any:
        """The same, decoded."""
        return json.loads(self.read(url))

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What Prometheus answers to an expression now: {"metric": labels, "value": [time, text]} of each series."""
        answer = self.ask(f"{PROMETHEUS}/query?query={quote(expression, safe='')}")
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def alerts(self, seconds: int = 0) -> set[tuple[str, str]]:
        """Name and instance of each alert that is firing, or was in the last seconds; "" for one of the whole fleet."""
        firing = 'ALERTS{alertname=~"Stickyring.*",alertstate="firing"}'
        asked = f"count_over_time({firing}[{seconds}s])" if seconds else firing
        return {(one["metric"]["alertname"], one["metric"].get("instance", "")) for one in self.query(asked)}


def wait_for(question: Callable[[], bool], seconds: float, what: Callable[[], object] = lambda: "") -> float:
    """Waits until the answer is yes; returns after how many seconds that was."""
    began = time.monotonic()
    while not question():
        assert time.monotonic() - began < seconds, f"not within {seconds} s {what()}"
        time.sleep(1)
    return time.monotonic() - began
