"""Real nodes for an Envoy in front of them: `stickyring serve` with an application that echoes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.stickyring.fleet.plugins.filter import edge as filters
from ansible_collections.stickyring.fleet.plugins.module_utils.admin import Admin
from running_envoy import START_SECONDS, Edge, free_ports

PROGRAMS = Path(sys.executable).parent
APPLICATION = """
import os, socketio
server = socketio.Server(async_mode="eventlet", async_handlers=False)
server.on("message", lambda sid, data: data)
inner = socketio.WSGIApp(server)
def other(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{environ['wsgi.url_scheme']} {environ['REMOTE_ADDR']}".encode()]
application = socketio.WSGIApp(server, other)
"""


@dataclass(frozen=True)
class Node:
    """A `stickyring serve`: its address, its port and its control socket."""

    name: str
    address: str
    port: int
    control: Path

    def ask(self, *arguments: str, text: str | None = None) -> dict[str, Any]:
        command, *options = arguments
        done = subprocess.run(
            [PROGRAMS / "stickyring", command, "--control", self.control, *options],
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def users(self) -> list[str | None]:
        return [session["key"] for session in self.ask("sessions")["sessions"]]


@contextmanager
def serving(folder: Path, addresses: Mapping[str, str]) -> Iterator[dict[str, Node]]:
    """Nodes with these names at these addresses, until the end of the block."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(_serving(folder, name, address, port))
            for (name, address), port in zip(addresses.items(), free_ports(len(addresses)), strict=True)
        }


@contextmanager
def _serving(folder: Path, name: str, address: str, port: int) -> Iterator[Node]:
    (folder / "echoing.py").write_text(APPLICATION)
    node = Node(name, address, port, folder / f"{name}.sock")
    command: list[str | Path] = [
        PROGRAMS / "stickyring",
        "serve",
        "echoing:application",
        "--listen",
        f"[{address}]:{port}" if ":" in address else f"{address}:{port}",
    ]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--node-name", name, "--control", node.control, "--drain-timeout", "0"],
            cwd=folder,
            env={"PATH": os.environ["PATH"]},
            stderr=log,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while b'"message": "serving' not in (folder / f"{name}.log").read_bytes():
            assert process.poll() is None, (folder / f"{name}.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield node
    finally:
        process.terminate()
        process.wait(START_SECONDS)


def ring_document(edge: Edge) -> dict[str, Any]:
    """The ring that Envoy serves, as `stickyring whereis` and `rebalance` take it."""
    answer = Admin(edge.admin_socket).get("/config_dump?include_eds&name_regex=nodes")
    document: dict[str, Any] = filters.edge_served_ring("nodes", answer)
    return document
