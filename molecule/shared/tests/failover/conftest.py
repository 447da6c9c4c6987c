"""What the suite measures beside its users."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from faults import EDGE, NODE


@pytest.fixture
def memory(machine: Any, edge: Any, nodes: Any) -> Callable[[], dict[str, int]]:
    """Memory of the processes of edge and nodes in KiB, by host."""
    resident = "main=$(systemctl show --property=MainPID --value %s); ps -o rss= --pid $main --ppid $main"
    units = {edge.name: EDGE, **{node.name: NODE for node in nodes}}

    def read() -> dict[str, int]:
        return {name: sum(map(int, machine(name).check_output(resident, unit).split())) for name, unit in units.items()}

    return read
