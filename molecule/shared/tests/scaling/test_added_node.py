"""A line more in the inventory: a node more on the ring, and nobody who is connected notices."""

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

testinfra_hosts = ["ansible://edge?sudo=true"]

LIVE_SESSIONS = 200


@pytest.fixture
def larger_inventory(inventory: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "inventory"
    shutil.copytree(inventory, copy)
    with (copy / "hosts.yml").open("a") as hosts:
        hosts.write("    node4: {ansible_host: 198.51.100.14}\n")
    return copy


@pytest.fixture
def live_sessions(programs: Path, edge_url: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens websockets that talk until `.stop()`, which returns their figures."""
    figures = tmp_path / "figures.json"
    command = [programs / "stickyring", "probe", edge_url("sticky"), "--ids", str(LIVE_SESSIONS), "--connections", "1"]
    options = ["--transport", "websocket", "--concurrency", str(LIVE_SESSIONS), "--hold", "1200", "--json", figures]
    holder = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    for line in holder.stdout:
        if f"all {LIVE_SESSIONS} sessions are open" in line:
            break

    class Live:
        def stop(self) -> dict[str, Any]:
            holder.send_signal(signal.SIGINT)
            holder.communicate(timeout=60)
            return json.loads(figures.read_text())

    yield Live()
    holder.kill()
    holder.wait()


def envoy_pid(host: Host) -> str:
    return host.check_output("systemctl show stickyring-edge.service --property=MainPID --value")


def test_a_new_node_joins_without_a_dropped_websocket(
    host: Host, ansible: Any, programs: Path, edge_url: Any, larger_inventory: Path, live_sessions: Any, tmp_path: Path
) -> None:
    before = envoy_pid(host)
    ansible("ansible-playbook", "-i", larger_inventory, "molecule/shared/create.yml")
    ansible("ansible-playbook", "-i", larger_inventory, "site.yml")

    figures = live_sessions.stop()
    assert figures["total"]["sessions"] == LIVE_SESSIONS
    assert figures["total"]["dropped"] == 0
    assert "node4-1" not in figures["total"]["ids_per_node"], "these sessions were open before node4 was"
    assert envoy_pid(host) == before

    file = tmp_path / "after.json"
    subprocess.run(
        [programs / "stickyring", "probe", edge_url("sticky"), "--json", file],
        check=True,
        capture_output=True,
        timeout=300,
    )
    assert set(json.loads(file.read_text())["total"]["ids_per_node"]) == {f"node{number}-1" for number in range(1, 5)}
