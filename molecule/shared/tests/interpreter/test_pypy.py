"""Nodes change to PyPy and back under their users; on PyPy they serve, start and stop as they do on CPython.

The tests are steps, between the change to PyPy and the way back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from residents import Residents

UNIT = "stickyring-node@1.service"
USERS = [f"user-{number}" for number in range(20)]
SETTLED_SECONDS = 60
PYPY = {
    "stickyring_node_python": "pypy3",
    "stickyring_artifacts_python_versions": ["3.13", "pypy3.11"],
    "stickyring_node_proving_time": 2,
    "stickyring_node_surge": True,
}


@pytest.fixture
def play(ansible: Any, inventory: Path) -> Callable[..., str]:
    """Runs a playbook on the lab."""
    return lambda *arguments: ansible("ansible-playbook", "-i", inventory, *arguments).stdout


@pytest.fixture
def running(machine: Any, nodes: Any) -> Callable[[], list[str]]:
    """What the service of each node runs on, as the kernel names it."""
    look = f"basename $(readlink /proc/$(systemctl show {UNIT} -P MainPID)/exe)"
    return lambda: [machine(node.name).check_output(look) for node in nodes]


def test_nodes_change_to_pypy(play: Any, running: Any, machine: Any, nodes: Any, edge_url: Any) -> None:
    """In surge mode, one process takes over from the other, whatever runs it."""
    starts = f"systemctl show {UNIT} -P ActiveEnterTimestampMonotonic"
    before = [machine(node.name).check_output(starts) for node in nodes]
    assert all(program.startswith("python3") for program in running())
    with Residents(edge_url("sticky"), USERS) as residents:
        residents.settle(SETTLED_SECONDS)
        play("playbooks/rolling_update.yml", "-e", json.dumps(PYPY))
        residents.settle(SETTLED_SECONDS)
        assert not [one for one in residents if one.lost]
    assert all(program.startswith("pypy3") for program in running())
    assert [machine(node.name).check_output(starts) for node in nodes] == before, "a unit was started anew"


def test_every_user_is_sticky(ansible: Any, edge_url: Any) -> None:
    ansible("stickyring", "probe", edge_url("sticky"), "--ids", "60", "--connections", "2")


def test_only_writable_and_executable_memory_is_allowed_beyond_the_sandbox(machine: Any, nodes: Any) -> None:
    shown = "MemoryDenyWriteExecute NoNewPrivileges ProtectSystem CapabilityBoundingSet"
    command = f"systemctl show {UNIT} {' '.join(f'--property={name}' for name in shown.split())}"
    for node in nodes:
        found = dict(line.split("=", 1) for line in machine(node.name).check_output(command).splitlines())
        assert found == {
            "MemoryDenyWriteExecute": "no",
            "NoNewPrivileges": "yes",
            "ProtectSystem": "strict",
            "CapabilityBoundingSet": "",
        }


def test_it_says_nothing_but_json(machine: Any, nodes: Any) -> None:
    """Python warns on the same stream, and eventlet of locks that it has not patched."""
    look = (
        f'main=$(systemctl show {UNIT} -P MainPID); processes="$main $(cat /proc/$main/task/$main/children)";'
        f" journalctl --unit {UNIT} $(printf ' _PID=%s' $processes) --output=cat --no-pager"
    )
    for node in nodes:
        said = machine(node.name).check_output(look).splitlines()
        assert said
        assert [json.loads(line)["node"] for line in said] == [f"{node.name}-1"] * len(said)


def test_it_stops_without_an_error(machine: Any, nodes: Any) -> None:
    host = machine(nodes[0].name)
    host.check_output(f"systemctl stop {UNIT}")
    stopped = host.check_output(f"systemctl show {UNIT} -P Result -P ExecMainStatus").split()
    host.check_output(f"systemctl start {UNIT}")
    assert stopped == ["success", "0"]


def test_a_rollback_brings_cpython_back(play: Any, running: Any) -> None:
    play("playbooks/rollback.yml", "-e", "stickyring_node_proving_time=2")
    assert all(program.startswith("python3") for program in running())
    play("playbooks/verify.yml")
