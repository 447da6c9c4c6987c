"""The lab with a host that watches it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import environment
import pytest
import testinfra

METRICS_PORT = 9902
TUNNEL_SECONDS = 10
RECEIVER = {"name": "team", "webhook_configs": [{"url": "http://192.0.2.99/a-secret-path"}]}
ASK = "import sys, urllib.request; sys.stdout.write(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"


@pytest.fixture(scope="session")
def fleet(inventory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inventory with the group `monitor`, whose host does not exist yet."""
    folder = tmp_path_factory.mktemp("monitor") / "inventory"
    shutil.copytree(inventory, folder)
    group = {
        "hosts": {"monitor1": {"ansible_host": environment.lab_address(inventory, 40)}},
        "vars": {"stickyring_monitor_alertmanager": {"route": {"receiver": "team"}, "receivers": [RECEIVER]}},
    }
    of_edges = {"vars": {"stickyring_edge_metrics_port": METRICS_PORT}}
    (folder / "monitor.json").write_text(json.dumps({"monitor": group, "edge": of_edges}))
    return folder


@pytest.fixture(scope="session")
def play(fleet: Path, ansible: Any) -> Callable[..., str]:
    """Runs a playbook on the hosts of the lab and on the one that watches; returns its output."""
    return lambda *arguments: str(ansible("ansible-playbook", "-i", fleet, *arguments).stdout)


@pytest.fixture(scope="session")
def host(fleet: Path) -> testinfra.host.Host:
    """The host that watches, as root."""
    return testinfra.get_host("ansible://monitor1?sudo=true", ansible_inventory=str(fleet))


@pytest.fixture
def tunnel(fleet: Path, ansible: Any) -> Iterator[str]:
    """The address of Prometheus for a browser on this machine, as docs/operations.md has it."""
    known = json.loads(ansible("ansible-inventory", "-i", fleet, "--host", "monitor1").stdout)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["-i", known["ansible_ssh_private_key_file"], *known["ansible_ssh_common_args"].split()]
    place = f"{known['ansible_user']}@{known['ansible_host']}"
    with subprocess.Popen(["ssh", "-N", "-L", f"{port}:127.0.0.1:9090", *options, place]) as process:
        deadline = time.monotonic() + TUNNEL_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        process.terminate()


@pytest.fixture(scope="session")
def ask(host: testinfra.host.Host) -> Callable[[str], Any]:
    """The decoded answer to a URL of a service on that host, which only its own users reach."""
    return lambda url: json.loads(host.check_output("python3 -c %s %s", ASK, quote(url, safe=":/?=&")))
