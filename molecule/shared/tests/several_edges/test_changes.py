"""Changes that end open WebSockets are reported beforehand, need permission, and are made on one edge at a time."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from residents import Residents

# It is in Envoy's bootstrap, so another value needs a restart.
ANOTHER_BOOTSTRAP = ["-e", "stickyring_edge_max_heap_mib=1900"]
MAY_END = ["-e", "stickyring_edge_may_end_websockets=true"]
SETTLED_SECONDS = 60
ASKING_SECONDS = 0.1
FILES = "find /etc/stickyring-edge /etc/systemd/system/stickyring-edge.service -type f -exec sha256sum {} + | sort -k 2"


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def websockets(connected: Residents) -> int:
    """How many WebSockets the users of an edge have open once they have settled."""
    return sum(1 for one in connected if "websocket" in one.transports)


def disconnects(connected: Residents, since: float) -> list[float]:
    """When the connections of an edge's users were closed."""
    return sorted(moment for one in connected for moment, what in one.events if what == "disconnect" and moment > since)


def ended(connected: Residents, since: float) -> list[float]:
    """When each WebSocket of an edge's users was closed; all must have been closed."""
    return sorted(one.first("disconnect", since) for one in connected if "websocket" in one.transports)


@pytest.fixture
def plan(ansible: Any, inventory: Path, tmp_path: Path) -> Any:
    """The output of playbooks/plan.yml with these options, in one line."""

    def ask(*options: str) -> str:
        where = ["-e", f"stickyring_directory={tmp_path}"]
        return in_one_line(ansible("ansible-playbook", "-i", inventory, "playbooks/plan.yml", *where, *options).stdout)

    return ask


@pytest.mark.parametrize("change", ["bootstrap", pytest.param("listener", marks=pytest.mark.soak)])
def test_websockets_are_not_dropped_without_permission(
    edges: Any, residents: Any, edge_play: Any, listeners: Any, plan: Any, processes: Any, machine: Any, change: str
) -> None:
    options, reason = {
        "bootstrap": (ANOTHER_BOOTSTRAP, "the bootstrap changes"),
        "listener": (listeners("sticky", port=7912), "listener sticky changes"),
    }[change]
    before, since = processes(), time.monotonic()
    files = {edge.name: machine(edge.name).check_output(FILES) for edge in edges}

    said = plan(*options)
    for edge, connected in zip(edges, residents, strict=True):
        assert f"{edge.name}: {reason}: {websockets(connected)} open websockets end" in said
    assert "open websockets end" not in plan(), "the control: nothing changes"

    refused = edge_play(*options, check=False)
    said = in_one_line(refused.stdout + refused.stderr)
    assert refused.returncode != 0
    assert f"{reason}: {websockets(residents[0])} open websockets end" in said
    assert "-e stickyring_edge_may_end_websockets=true" in said
    deploying = said.partition("PLAY [Deploy the edges]")[2].partition("PLAY RECAP")[0]
    assert f"fatal: [{edges[0].name}]" in deploying
    assert f"[{edges[1].name}]" not in deploying, "the second edge was reached"
    assert processes() == before
    assert {edge.name: machine(edge.name).check_output(FILES) for edge in edges} == files
    assert [disconnects(connected, since) for connected in residents] == [[], []]


@pytest.fixture
def serving(edges: Any) -> Iterator[list[tuple[float, list[bool]]]]:
    """Sends requests to every edge all the time: (time, for each edge whether it answered)."""
    answers: list[tuple[float, list[bool]]] = []
    ended = threading.Event()

    def answers_with_a_node(edge: Any) -> bool:
        where = edge.url("sticky").removeprefix("http://").split(":")
        try:
            with socket.create_connection((where[0], int(where[1])), timeout=2) as client:
                client.settimeout(2)
                client.sendall(b"GET /healthz?client_id=1 HTTP/1.1\r\nHost: edge\r\nConnection: close\r\n\r\n")
                return client.recv(100).startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    def ask() -> None:
        while not ended.wait(ASKING_SECONDS):
            answers.append((time.monotonic(), [answers_with_a_node(edge) for edge in edges]))

    asking = threading.Thread(target=ask)
    asking.start()
    yield answers
    ended.set()
    asking.join()


@pytest.mark.usefixtures("edge_play")
def test_edges_that_restart_do_so_one_after_the_other(
    edges: Any, residents: Any, serving: Any, processes: Any, started: Any, inventory: Path
) -> None:
    before, since = processes(), time.monotonic()
    proven: dict[str, float] = {}
    task = ""
    with started("ansible-playbook", "-i", inventory, "playbooks/edge.yml", *ANOTHER_BOOTSTRAP, *MAY_END) as play:
        for line in play.stdout:
            task = line if line.startswith("TASK [") else task
            if "Prove that Envoy serves" in task and (host := re.match(r"ok: \[(\w+)\]", line)):
                proven[host[1]] = time.monotonic()
        assert play.wait(60) == 0, play.stderr.read()
    for connected in residents:
        connected.settle(SETTLED_SECONDS)

    after = processes()
    assert all(after[edge.name] != before[edge.name] for edge in edges), "the control: both were restarted"
    first, second = (ended(connected, since) for connected in residents)
    assert first[-1] < proven[edges[0].name] < second[0]
    assert disconnects(residents[1], since)[0] > proven[edges[0].name], "polling users"
    assert [answer for answer in serving if not any(answer[1])] == []
    assert not any(one.lost for connected in residents for one in connected)
