"""`stickyring status` on this machine: a running node, a socket that stands for Envoy, and hosts that do not answer."""

from __future__ import annotations

import http.server
import json
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
CLUSTER = {
    "name": "nodes",
    "lb_policy": "RING_HASH",
    "ring_hash_lb_config": {"minimum_ring_size": "1", "maximum_ring_size": "8388608"},
}
HOST = {"load_balancing_weight": 100, "health_status": "HEALTHY"}


def config_dump(*names: str) -> dict[str, Any]:
    hosts = [{"endpoint": {"hostname": name}, **HOST} for name in names]
    endpoints = {"cluster_name": "nodes", "endpoints": [{"lb_endpoints": hosts}]}
    sections: dict[str, dict[str, Any]] = {
        "ClustersConfigDump": {"dynamic_active_clusters": [{"cluster": CLUSTER}]},
        "EndpointsConfigDump": {"dynamic_endpoint_configs": [{"endpoint_config": endpoints}]},
    }
    return {
        "configs": [
            {"@type": f"type.googleapis.com/envoy.admin.v3.{name}", **section} for name, section in sections.items()
        ]
    }


class Envoy(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Answers every request with the same configuration."""

    daemon_threads = True

    def __init__(self, path: Path, names: list[str]) -> None:
        body = json.dumps(config_dump(*names)).encode()

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        super().__init__(str(path), Answer)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A folder in which an instance of node1 runs, and an Envoy whose ring has it and node2."""
    (tmp_path / "run" / "1").mkdir(parents=True)
    (tmp_path / "current").symlink_to(PROGRAMS.parent)
    serve = [str(PROGRAMS / "stickyring"), "serve", "--listen", "127.0.0.1:0", "--node-name", "node1-1"]
    with (
        Envoy(tmp_path / "admin.sock", ["node1-1", "node2-1"]) as envoy,
        subprocess.Popen([*serve, "--control", str(tmp_path / "run/1/control.sock")], stderr=subprocess.PIPE) as node,
    ):
        threading.Thread(target=envoy.serve_forever, daemon=True).start()
        try:
            assert any(b'"address"' in line for line in node.stderr or ())
            yield tmp_path
        finally:
            envoy.shutdown()
            node.kill()


def status(home: Path, nodes: dict[str, dict[str, object]]) -> tuple[int, dict[str, Any]]:
    """The exit status and the answer for node1 and these nodes."""
    inventory = {
        "all": {"vars": {"ansible_connection": "local", "ansible_become": False}},
        "edge": {"hosts": {"edge1": {"stickyring_address": "192.0.2.1"}}},
        "nodes": {"hosts": {"node1": {"stickyring_address": "192.0.2.11"}, **nodes}},
    }
    (home / "hosts.json").write_text(json.dumps(inventory))
    service = os.path.relpath(home / "run", "/run")
    given = {"__stickyring_node_home": str(home), "stickyring_node_service": service}
    given |= {"__stickyring_edge_admin_socket": str(home / "admin.sock")}
    command = [
        str(PROGRAMS / "stickyring"),
        "status",
        "--json",
        "-i",
        str(home / "hosts.json"),
        "--",
        "-e",
        json.dumps(given),
    ]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_running_node_is_well_and_one_that_cannot_be_reached_is_named(home: Path) -> None:
    away = {"stickyring_address": "192.0.2.12", "ansible_connection": "ssh", "ansible_host": "127.0.0.1"}
    code, fleet = status(home, {"node2": {**away, "ansible_port": 1}})
    assert code == 1
    assert len(fleet["problems"]) == 1, fleet["problems"]
    (problem,) = fleet["problems"]
    assert problem.startswith("node2: Failed to connect to the host via ssh: ")
    (edge,) = fleet["edges"]
    assert edge["health"] == {"node1-1": "HEALTHY", "node2-1": "HEALTHY"}
    node1, node2 = fleet["instances"]
    assert (node1["name"], node1["state"], node1["users"], node1["due"]) == ("node1-1", "serves", 0, 0.5)
    assert (node2["name"], node2["host"], node2["users"]) == ("node2-1", "node2", None)
    # Without it in the inventory, the ring is wrong.
    code, fleet = status(home, {})
    assert code == 1
    assert fleet["problems"] == ["node2-1: on the ring of edge1, but not in the inventory. Run site.yml."]


def test_an_edge_on_which_no_envoy_answers_is_named(home: Path) -> None:
    (home / "admin.sock").unlink()
    code, fleet = status(home, {})
    assert code == 1
    assert [one["state"] for one in fleet["instances"]] == ["serves"]
    assert "edge1: " in fleet["problems"][0]
    assert "No such file" in fleet["problems"][0]
