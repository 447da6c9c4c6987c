"""Changes that end open WebSockets need permission; others have another Envoy take over, on one edge at a time."""

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

# It is in Envoy's bootstrap, so another value needs another process.
ANOTHER_BOOTSTRAP = ["-e", "stickyring_edge_max_heap_mib=1900"]
ANOTHER_UNIT = ["-e", "stickyring_edge_log_level=warning"]
RATE = 6
"""Users a second whom all nodes together ask to reconnect."""
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


def test_websockets_do_not_end_without_permission(
    edges: Any, residents: Any, edge_play: Any, listeners: Any, plan: Any, processes: Any, machine: Any
) -> None:
    options, reason = listeners("sticky", port=7912), "listener sticky changes"
    before, since = processes(), time.monotonic()
    files = {edge.name: machine(edge.name).check_output(FILES) for edge in edges}

    said = plan(*options)
    for edge, connected in zip(edges, residents, strict=True):
        assert f"{edge.name}: {reason}: {websockets(connected)} open websockets end" in said
    assert "open websockets" not in plan(), "the control: nothing changes"

    refused = edge_play(*options, check=False)
    said = in_one_line(refused.stdout + refused.stderr)
    assert refused.returncode != 0
    assert f"{reason}: {websockets(residents[0])} open websockets end" in said
    assert "-e stickyring_edge_may_end_websockets=true" in said
    deploying = refused.stdout.partition("PLAY [Deploy the edges]")[2].partition("PLAY RECAP")[0]
    assert f"fatal: [{edges[0].name}]" in deploying
    assert f"[{edges[1].name}]" not in deploying, "the second edge was reached"
    assert processes() == before
    assert {edge.name: machine(edge.name).check_output(FILES) for edge in edges} == files
    assert [disconnects(connected, since) for connected in residents] == [[], []]


def test_users_are_asked_to_reconnect_when_another_envoy_takes_over(
    edges: Any, residents: Any, serving: Any, edge_play: Any, plan: Any, processes: Any, machine: Any
) -> None:
    options, reason = [*ANOTHER_BOOTSTRAP, *ANOTHER_UNIT], "the bootstrap changes, the unit changes"
    before, since = processes(), time.monotonic()
    said = plan(*options)
    for edge, connected in zip(edges, residents, strict=True):
        assert f"{edge.name}: {reason}" in said
        assert f": {websockets(connected)} open websockets reconnect" in said

    edge_play(*options, "-e", f"stickyring_edge_reconnects_per_second={RATE}")
    for connected in residents:
        connected.settle(SETTLED_SECONDS)
    after = processes()
    assert all(after[edge.name] != before[edge.name] for edge in edges)
    everybody = [one for connected in residents for one in connected]
    for one in everybody:
        assert one.count("disconnect", since) == ("websocket" in one.transports), one
        assert one.count("failed", since) == 0, one
        assert one.lost == []
    assert [answer for answer in serving if not all(answer[1])] == [], "a connection was refused or got no answer"
    # A quarter more than asked for: pauses vary.
    times = sorted(moment for connected in residents for moment in ended(connected, since))
    assert (len(times) - 1) / (times[-1] - times[0]) < 1.25 * RATE
    for edge in edges:
        assert "leaving" not in machine(edge.name).check_output("ls /run/stickyring-edge"), "the old one has ended"


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


def test_a_drained_edge_has_no_users_until_it_is_reloaded(
    edges: Any, residents: Any, ansible: Any, inventory: Path, machine: Any
) -> None:
    """Users of a process that leaves already are asked too, and the one that a reload has started is found.

    After the first reload, they may have come to that one.
    """
    drained, since = edges[1], time.monotonic()
    reload = "systemctl reload stickyring-edge"
    machine(drained.name).check_output(reload)
    play = ["ansible-playbook", "-i", inventory, "playbooks/drain_edge.yml", "-e", f"stickyring_edge={drained.name}"]
    assert f"{drained.name} accepts nobody, and has 0 open requests." in in_one_line(ansible(*play).stdout)
    host, _, port = drained.url("sticky").removeprefix("http://").partition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=2)
    assert disconnects(residents[0], since) == [], "users of the other edge"
    machine(drained.name).check_output(reload)
    residents[1].settle(SETTLED_SECONDS)
    assert all(1 <= one.count("disconnect", since) <= 2 for one in residents[1] if "websocket" in one.transports)
    assert not any(one.lost for connected in residents for one in connected)
