"""Nodes on PyPy: they start and stop like others, and change to CPython and back without a restart."""

from __future__ import annotations

import json
from typing import Any

import pytest

UNIT = "stickyring-node@1.service"
CPYTHON = {
    "stickyring_node_python": "python3",
    "stickyring_artifacts_python_versions": ["3.13", "pypy3.11"],
    "stickyring_node_surge": True,
}


@pytest.fixture
def running(machine: Any, nodes: Any) -> Any:
    """What the service of each node runs on, as the kernel names it."""
    look = f"basename $(readlink /proc/$(systemctl show {UNIT} -P MainPID)/exe)"
    return lambda: [machine(node.name).check_output(look) for node in nodes]


def test_it_runs_on_pypy(running: Any) -> None:
    assert all(program.startswith("pypy3") for program in running())


def test_it_says_nothing_but_json(machine: Any, nodes: Any) -> None:
    """Python warns on the same stream, and eventlet of locks that it has not patched."""
    for node in nodes:
        said = (
            machine(node.name)
            .check_output(f"journalctl --unit {UNIT} --identifier stickyring --output=cat --no-pager")
            .splitlines()
        )
        assert said
        assert [json.loads(line)["node"] for line in said] == [f"{node.name}-1"] * len(said)


def test_it_stops_without_an_error(machine: Any, nodes: Any) -> None:
    host = machine(nodes[0].name)
    host.check_output(f"systemctl stop {UNIT}")
    stopped = host.check_output(f"systemctl show {UNIT} -P Result -P ExecMainStatus").split()
    host.check_output(f"systemctl start {UNIT}")
    assert stopped == ["success", "0"]


def test_nodes_change_to_cpython_and_back(ansible: Any, inventory: Any, running: Any, machine: Any, nodes: Any) -> None:
    """In surge mode, one process takes over from the other, whatever runs it; a rollback restarts."""
    play = ("ansible-playbook", "-i", inventory)
    starts = f"systemctl show {UNIT} -P ActiveEnterTimestampMonotonic"
    before = [machine(node.name).check_output(starts) for node in nodes]
    ansible(*play, "playbooks/rolling_update.yml", "-e", json.dumps(CPYTHON))
    assert all(program.startswith("python3") for program in running())
    assert [machine(node.name).check_output(starts) for node in nodes] == before, "a unit was started anew"
    ansible(*play, "playbooks/rollback.yml")
    assert all(program.startswith("pypy3") for program in running())
    ansible(*play, "playbooks/verify.yml")
