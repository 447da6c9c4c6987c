"""The lab with a bus, first on one host and then on three."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from lab_bus import LabBus


@pytest.fixture(scope="session")
def fleet(inventory: Any, tmp_path_factory: pytest.TempPathFactory) -> LabBus:
    """The inventory with a bus of one host, which does not exist yet."""
    bus = LabBus(inventory, tmp_path_factory.mktemp("bus") / "inventory")
    bus.write("bus1")
    return bus


@pytest.fixture(scope="session")
def play(fleet: LabBus, ansible: Any) -> Callable[..., str]:
    """Runs a playbook on the hosts of the lab and of the bus; returns its output."""

    def run(*arguments: str, check: bool = True) -> str:
        given = ("-i", fleet.inventory, "-e", "stickyring_node_proving_time=0", *arguments)
        return str(ansible("ansible-playbook", *given, check=check).stdout)

    return run
