"""The lab with a host that watches it."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from lab_monitor import LabMonitor

TUNNEL_SECONDS = 10


@pytest.fixture(scope="session")
def monitor(inventory: Any, tmp_path_factory: pytest.TempPathFactory) -> LabMonitor:
    """The host that watches, which does not exist yet."""
    return LabMonitor(inventory, tmp_path_factory.mktemp("monitor") / "inventory")


@pytest.fixture
def tunnel(monitor: LabMonitor, ansible: Any) -> Iterator[str]:
    """The address of Prometheus for a browser on this machine, as docs/operations.md has it."""
    known = json.loads(ansible("ansible-inventory", "-i", monitor.inventory, "--host", "monitor1").stdout)
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
