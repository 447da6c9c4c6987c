"""A node with users changes to PyPy and back; on PyPy it serves, starts and stops as on CPython.

The tests are steps, from the change to PyPy to the change back.
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
LIMIT = ["--limit", "node1,edge"]
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
def node(machine: Any, nodes: Any) -> Any:
    """The node that changes; the others stay on CPython."""
    return machine(nodes[0].name)


def runs_on(node: Any) -> str:
    """The interpreter of the service, by the name of its executable."""
    program: str = node.check_output(f"basename $(readlink /proc/$(systemctl show {UNIT} -P MainPID)/exe)")
    return program


def test_it_changes_to_pypy(play: Any, node: Any, edge_url: Any) -> None:
    """In surge mode, a process on PyPy takes over from one on CPython."""
    starts = f"systemctl show {UNIT} -P ActiveEnterTimestampMonotonic"
    before = node.check_output(starts)
    assert runs_on(node).startswith("python3")
    with Residents(edge_url("sticky"), USERS) as residents:
        residents.settle(SETTLED_SECONDS)
        play("playbooks/rolling_update.yml", *LIMIT, "-e", json.dumps(PYPY))
        residents.settle(SETTLED_SECONDS)
        assert not [one for one in residents if one.lost]
    assert runs_on(node).startswith("pypy3")
    assert node.check_output(starts) == before, "the unit was restarted"


def test_every_user_is_sticky(ansible: Any, edge_url: Any) -> None:
    ansible("stickyring", "probe", edge_url("sticky"), "--ids", "60", "--connections", "2")


def test_only_writable_and_executable_memory_is_allowed_beyond_the_sandbox(node: Any) -> None:
    shown = "MemoryDenyWriteExecute NoNewPrivileges ProtectSystem CapabilityBoundingSet"
    command = f"systemctl show {UNIT} {' '.join(f'--property={name}' for name in shown.split())}"
    assert dict(line.split("=", 1) for line in node.check_output(command).splitlines()) == {
        "MemoryDenyWriteExecute": "no",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "CapabilityBoundingSet": "",
    }


def test_it_logs_only_json(node: Any, nodes: Any) -> None:
    """Python's warnings use the same stream, as do eventlet's about unpatched locks."""
    look = (
        f'main=$(systemctl show {UNIT} -P MainPID); processes="$main $(cat /proc/$main/task/$main/children)";'
        f" journalctl --unit {UNIT} $(printf ' _PID=%s' $processes) --output=cat --no-pager"
    )
    said = node.check_output(look).splitlines()
    assert said
    assert [json.loads(line)["node"] for line in said] == [f"{nodes[0].name}-1"] * len(said)


def test_it_stops_without_an_error(node: Any) -> None:
    node.check_output(f"systemctl stop {UNIT}")
    stopped = node.check_output(f"systemctl show {UNIT} -P Result -P ExecMainStatus").split()
    node.check_output(f"systemctl start {UNIT}")
    assert stopped == ["success", "0"]


def test_a_rollback_brings_cpython_back(play: Any, node: Any) -> None:
    play("playbooks/rollback.yml", *LIMIT, "-e", "stickyring_node_proving_time=2")
    assert runs_on(node).startswith("python3")
    play("playbooks/verify.yml")
