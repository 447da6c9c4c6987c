"""Each fault of docs/runbooks.md's table is played under users: exactly its alerts fire, in time, and end after it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import environment
import pytest
from faults import EDGE, NODE, clients_cut_off, cut_off, exhausted
from lab_monitor import LabMonitor, wait_for
from residents import Residents

pytestmark = pytest.mark.soak
RUNBOOKS = environment.PROJECT / "docs" / "runbooks.md"
USERS = [f"user-{number}" for number in range(60)]
SETTLED_SECONDS = 60
ANSWER_SECONDS = 300.0
OVER_SECONDS = 300
"""A rule that looks at the last minutes still sees the fault then."""
NEXT = 'ALERTS{alertname=~"Stickyring.*"}'
"""What fires, or would after a while."""
Fault = Callable[[Any, Any, Any], AbstractContextManager[object]]


@pytest.fixture(scope="module")
def residents(edge_url: Any) -> Iterator[Residents]:
    with Residents(edge_url("sticky"), USERS, answer=ANSWER_SECONDS) as connected:
        connected.settle(SETTLED_SECONDS)
        yield connected
        assert not [one for one in connected if one.lost]


@contextmanager
def stopped(host: Any, unit: str) -> Iterator[None]:
    host.check_output(f"systemctl stop {unit}")
    try:
        yield
    finally:
        host.check_output(f"systemctl start {unit}")


@contextmanager
def killed(host: Any, unit: str) -> Iterator[None]:
    host.check_output(f"systemctl kill --signal=KILL --kill-whom=all {unit}")
    yield


@contextmanager
def vanished(host: Any) -> Iterator[None]:
    """Nothing but SSH answers."""
    # 6 is TCP: not every host has /etc/protocols.
    host.check_output("ip rule add pref 1 not ipproto 6 sport 22 blackhole")
    try:
        yield
    finally:
        host.check_output("ip rule del pref 1")


FAULTS: dict[str, Fault] = {
    "an instance stays down": lambda machine, node, edge: stopped(machine(node.name), NODE),
    "a node cannot be reached by an edge": cut_off,
    "a node's host vanishes": lambda machine, node, edge: vanished(machine(node.name)),
    "a node runs out of descriptors": lambda machine, node, edge: exhausted(machine, node),
    "an edge is killed": lambda machine, node, edge: killed(machine(edge.name), EDGE),
    "an edge stays down": lambda machine, node, edge: stopped(machine(edge.name), EDGE),
    "an edge's answers do not reach its clients": lambda machine, node, edge: clients_cut_off(machine, edge),
}


def rows() -> dict[str, tuple[set[str], set[str], float]]:
    """By fault, as the documentation has it: the alerts that fire, those that may, and within how many seconds."""
    table = re.findall(r"^\| (an? .+?) \| (.+?) \| (\d+) s \|$", RUNBOOKS.read_text(), re.MULTILINE)
    found: dict[str, tuple[set[str], set[str], float]] = {}
    for fault, alerts, seconds in table:
        surely, _, perhaps = alerts.partition("; perhaps ")
        names = [{*re.findall(r"Stickyring\w+", text)} for text in (surely, perhaps)]
        found[fault] = (names[0], names[1], float(seconds))
    return found


def fired(monitor: LabMonitor, since: float) -> set[tuple[str, str]]:
    return monitor.alerts(math.ceil(time.monotonic() - since))


def test_restarts_and_planned_changes_fire_no_alert(
    monitor: LabMonitor, residents: Residents, nodes: Any, machine: Any
) -> None:
    began = time.monotonic()
    assert monitor.alerts() == set()
    first, second, *_ = (machine(node.name) for node in nodes)

    def wait_until_all_are_back(since: float) -> None:
        """Somebody has noticed, and each is on some node: the update brings them home."""
        residents.wait(lambda: any(one.count("disconnect", since) for one in residents), SETTLED_SECONDS)
        residents.wait(lambda: all(one.node for one in residents), SETTLED_SECONDS)

    with killed(first, NODE):
        wait_until_all_are_back(began)
    process = f"systemctl show {NODE} --property=MainPID --value"
    hung, since = second.check_output(process), time.monotonic()
    second.check_output(f"systemctl kill --signal=STOP --kill-whom=all {NODE}")
    wait_for(lambda: second.check_output(process) not in {hung, "0"}, SETTLED_SECONDS)
    wait_until_all_are_back(since)
    monitor.play("playbooks/rolling_update.yml", "-e", "stickyring_node_release=unnoticed")
    monitor.play("playbooks/edge.yml", "-e", "stickyring_edge_request_headers_timeout=12")
    residents.settle(SETTLED_SECONDS)
    # The first evaluations after it count too.
    wait_for(lambda: not monitor.query(NEXT), OVER_SECONDS)
    assert fired(monitor, began) == set()
    monitor.play("playbooks/edge.yml")


def test_every_row_of_the_table_is_played() -> None:
    assert set(rows()) == set(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_exactly_the_alerts_of_a_fault_fire_and_end(
    monitor: LabMonitor, residents: Residents, nodes: Any, edge: Any, machine: Any, fault: str
) -> None:
    """Whether an alert names the right host depends on whose fault it is; that of the whole fleet names none."""
    surely, perhaps, seconds = rows()[fault]
    node = nodes[0]
    instances = range(1, int(node.variables["stickyring_node_instances"]) + 1)
    where = {
        "StickyringEdgeDown": [edge.name],
        "StickyringEdgeMissesNode": [edge.name],
        "StickyringHandshakesRefused": [f"{node.name}-1"],
        "StickyringMassDisconnect": [""],
        "StickyringNodeDown": [f"{node.name}-{number}" for number in instances],
    }
    expected = {(name, place) for name in surely for place in where[name]}
    allowed = expected | {(name, place) for name in perhaps for place in where[name]}
    residents.settle(SETTLED_SECONDS)
    assert monitor.alerts() == set()
    began = time.monotonic()
    with FAULTS[fault](machine, node, edge):
        took = wait_for(lambda: expected <= fired(monitor, began), seconds, lambda: fired(monitor, began))
    # Otherwise users stay where the fault has sent them, which would be an alert after ten minutes.
    monitor.play("playbooks/rebalance.yml")
    over = wait_for(lambda: monitor.alerts() == set(), OVER_SECONDS, monitor.alerts)
    print(f"{fault}: fires after {took:.0f} s, over {over:.0f} s after the fault")
    assert expected <= fired(monitor, began) <= allowed
