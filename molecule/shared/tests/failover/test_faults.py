"""What each fault costs its users, in seconds from the last echo before it to the next; nobody else notices."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pytest
from residents import Connection, Residents

NODE = "stickyring-node@1.service"
EDGE = "stickyring-edge.service"
JOURNAL = "/run/log/journal"
USERS = [f"user-{number}" for number in range(90)]
PAUSE_SECONDS = 0.3
SETTLED_SECONDS = 60
FIGURES = Path(__file__).parents[4] / ".artifacts" / "failover.json"


@pytest.fixture
def residents(edge_url: Any, ansible: Any, inventory: Any) -> Iterator[Residents]:
    """Users who talk several times a second, each at home."""
    ansible("ansible-playbook", "-i", inventory, "playbooks/verify.yml")
    with Residents(edge_url("sticky"), USERS, PAUSE_SECONDS) as all_of_them:
        all_of_them.settle(SETTLED_SECONDS)
        yield all_of_them
        assert not [one for one in all_of_them if one.lost]


def have_not_noticed(connections: Iterable[Connection], since: float) -> None:
    for one in connections:
        assert one.count("disconnect", since) == 0, one
        assert not [began for began in one.repeated if began >= since], one


def judge(fault: str, affected: list[Connection], others: list[Connection], since: float, bound: float) -> None:
    """Prints and keeps the figures of the affected, and compares their 99th percentile with the bound."""
    silences = sorted(one.silence(since) for one in affected)
    p99 = quantiles(silences, n=100, method="inclusive")[98]
    figures = {"users": len(silences), "median": round(median(silences), 2), "p99": round(p99, 2), "bound": bound}
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    FIGURES.write_text(json.dumps(known | {fault: figures}, indent=1) + "\n")
    print(fault, figures)
    assert p99 <= bound, figures
    have_not_noticed(others, since)


@contextmanager
def fault_on_node1(residents: Residents, name: str, bound: float) -> Iterator[None]:
    """Whatever becomes of node1 in the block, its users are back elsewhere in time and nobody else notices."""
    affected = [one for one in residents if one.node == "node1-1"]
    others = [one for one in residents if one.node not in {"node1-1", ""}]
    assert len(affected) + len(others) == len(residents.connections)
    since = time.monotonic() - 2 * PAUSE_SECONDS
    yield
    residents.wait(lambda: all(one.answers[-1][0] > since + bound for one in residents), 3 * bound + SETTLED_SECONDS)
    judge(name, affected, others, since, bound)


def test_a_killed_process(residents: Residents, machine: Any) -> None:
    with fault_on_node1(residents, "killed process", 3):
        machine("node1").check_output(f"systemctl kill --signal=KILL --kill-whom=all {NODE}")


def test_a_hung_process(residents: Residents, machine: Any) -> None:
    """Its kernel still takes connections and acknowledges what comes."""
    node1 = machine("node1")
    hung = node1.check_output(f"systemctl show {NODE} --property=MainPID --value")
    with fault_on_node1(residents, "hung process", 20):
        node1.check_output(f"systemctl kill --signal=STOP --kill-whom=all {NODE}")
    assert node1.check_output(f"systemctl show {NODE} --property=MainPID --value") != hung
    assert "watchdog" in node1.check_output(f"journalctl --unit={NODE} --no-pager --since=-2min").lower()


@pytest.fixture
def cut(machine: Any, edge: Any) -> Iterator[Any]:
    """Cuts a node off from the edge: what comes arrives, and nothing goes back, not even an acknowledgement of TCP."""
    route = f"blackhole {edge.variables['stickyring_address']}/32"
    node1 = machine("node1")
    yield lambda: node1.check_output(f"ip route add {route}")
    node1.check_output(f"ip route del {route}")


def test_a_vanished_host(residents: Residents, cut: Any) -> None:
    with fault_on_node1(residents, "vanished host", 12):
        cut()


@contextmanager
def nobody_notices(residents: Residents, seconds: float) -> Iterator[None]:
    """Whatever happens in the block, everybody goes on talking for so long after it, without a disconnect."""
    since = time.monotonic() - 2 * PAUSE_SECONDS
    yield
    ended = time.monotonic() + seconds
    residents.wait(lambda: all(one.answers[-1][0] > ended for one in residents), SETTLED_SECONDS)
    have_not_noticed(residents, since)
    assert max(one.silence(since) for one in residents) < seconds


@pytest.fixture
def journal_disks(machine: Any, edge: Any) -> Iterator[list[Any]]:
    """The edge and node1, each with its journal on a small disk of its own."""
    hosts = [machine(edge.name), machine("node1")]
    for host in hosts:
        host.check_output(f"mount -t tmpfs -o size=16m journal {JOURNAL} && systemctl restart systemd-journald")
    yield hosts
    for host in hosts:
        host.check_output(f"umount --lazy {JOURNAL} && systemctl restart systemd-journald")


def test_a_full_disk(residents: Residents, journal_disks: list[Any]) -> None:
    with nobody_notices(residents, 5):
        for host in journal_disks:
            filling = host.run(f"dd if=/dev/zero of={JOURNAL}/filling bs=4k")
            assert "No space left on device" in filling.stderr
    _, node1 = journal_disks
    with fault_on_node1(residents, "node restarted on a full disk", 5):
        node1.check_output(f"systemctl restart {NODE}")


def test_a_restarted_edge(residents: Residents, machine: Any, edge: Any) -> None:
    since = time.monotonic() - 2 * PAUSE_SECONDS
    machine(edge.name).check_output(f"systemctl restart {EDGE}")
    bound = 5
    residents.wait(lambda: all(one.answers[-1][0] > since + bound for one in residents), SETTLED_SECONDS)
    judge("restarted edge", residents.connections, [], since, bound)
