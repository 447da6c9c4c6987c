"""Users on every edge, and the playbook that changes the edges."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from residents import Residents

USERS = [f"user-{number}" for number in range(12)]
SETTLED_SECONDS = 60
MAY_END = "stickyring_edge_may_end_websockets=true"


@pytest.fixture
def residents(edges: Any) -> Iterator[list[Residents]]:
    """The same users, connected to every edge, in the edges' order."""
    with ExitStack() as stack:
        connected = [stack.enter_context(Residents(edge.url("sticky"), USERS)) for edge in edges]
        for one in connected:
            one.settle(SETTLED_SECONDS)
        yield connected


@pytest.fixture
def edge_play(ansible: Any, inventory: Path) -> Iterator[Any]:
    """Runs playbooks/edge.yml; at the end deploys the inventory's settings again."""

    def run(*options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return ansible("ansible-playbook", "-i", inventory, "playbooks/edge.yml", *options, check=check)

    yield run
    run("-e", MAY_END)


@pytest.fixture
def processes(edges: Any, machine: Any) -> Any:
    """The main process of each edge's Envoy, by the edge's name."""
    show = "systemctl show stickyring-edge.service --property=MainPID --value"
    return lambda: {edge.name: machine(edge.name).check_output(show) for edge in edges}


@pytest.fixture
def listeners(edges: Any) -> Any:
    """The inventory's listeners with other settings for one of them, as an option of ansible-playbook."""

    def option(name: str, **settings: object) -> list[str]:
        changed = [
            one | settings if one["name"] == name else one for one in edges[0].variables["stickyring_edge_listeners"]
        ]
        return ["-e", json.dumps({"stickyring_edge_listeners": changed})]

    return option
