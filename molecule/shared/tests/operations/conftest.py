"""A fleet that is updated while users send messages all the time."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import environment
import pytest
from residents import Residents

SETTLED_SECONDS = 60


@pytest.fixture(scope="module")
def residents(request: pytest.FixtureRequest, edge_url: Any) -> Iterator[Residents]:
    """The number of users in the module's USERS, each over every transport."""
    with Residents(edge_url("sticky"), [f"user-{number}" for number in range(request.module.USERS)]) as all_of_them:
        all_of_them.settle(SETTLED_SECONDS)
        yield all_of_them


@pytest.fixture
def run(inventory: Path, ansible: Any) -> Callable[..., Any]:
    """Runs a playbook on the fleet, which must succeed, or fail if `fails`; returns its output in one line."""

    def run(playbook: str, *options: str, fails: bool = False) -> str:
        done = ansible("ansible-playbook", "-i", inventory, playbook, *options, check=False)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return " ".join(done.stdout.split())

    return run


@pytest.fixture
def nowhere(inventory: Path, tmp_path: Path) -> str:
    """An inventory with the edge `edge9`, at an address that no host has."""
    address = environment.lab_address(inventory, 99)
    (tmp_path / "hosts.yml").write_text(f"edge: {{hosts: {{edge9: {{ansible_host: {address}}}}}}}\n")
    return str(tmp_path)


@pytest.fixture
def serving(machine: Any, nodes: Any) -> Callable[[], dict[str, tuple[str, str]]]:
    """The release and the main process of every node."""

    def look() -> dict[str, tuple[str, str]]:
        command = "basename $(readlink /opt/stickyring-node/current); systemctl show stickyring-node@1 -P MainPID"
        return {node.name: tuple(machine(node.name).check_output(command).split()) for node in nodes}

    return look


@pytest.fixture
def podman(hosts: Any) -> Callable[[str, Sequence[str]], None]:
    """Runs a podman command on a host's container, from outside the host; {} in the command is the container."""
    lab = f"stickyring{hosts['node1'].variables.get('stickyring_lab_number', '')}"
    namespace = Path("/run/stickyring-lab/mount")
    program = [
        *(["nsenter", f"--mount={namespace}"] if namespace.exists() else []),
        "podman",
        "--cgroup-manager=cgroupfs",
    ]

    def do(host: str, command: Sequence[str]) -> None:
        words = [word.format(f"{lab}-{host}") for word in command]
        done = subprocess.run([*program, *words], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr

    return do
