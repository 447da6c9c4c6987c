"""The lab with a bus on a host of its own, and what is needed to speak to its users."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

PASSWORDS = {
    "stickyring_bus_password": "of-the-nodes-of-the-lab",
    "stickyring_bus_emitter_password": "of-the-workers-of-the-lab",
}
ADDRESS = "198.51.100.30"


@dataclass(frozen=True)
class Fleet:
    """An inventory with the group `bus`, and how playbooks run on it."""

    inventory: Path
    play: Callable[..., str]

    def url(self, account: str) -> str:
        password = PASSWORDS[f"stickyring_bus_{'emitter_' if account == 'emitter' else ''}password"]
        return f"redis://{account}:{password}@{ADDRESS}:6379/0"


@pytest.fixture(scope="session")
def fleet(inventory: Path, ansible: Any, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """The inventory; its new host exists, and has nothing of ours."""
    folder = tmp_path_factory.mktemp("fleet") / "inventory"
    shutil.copytree(inventory, folder)
    hosts = yaml.safe_load((folder / "hosts.yml").read_text())
    hosts["bus"] = {"hosts": {"bus1": {"ansible_host": ADDRESS}}}
    (folder / "hosts.yml").write_text(yaml.safe_dump(hosts, sort_keys=False))
    ansible("ansible-playbook", "-i", folder, "molecule/shared/create.yml")
    given = json.dumps(PASSWORDS | {"stickyring_node_proving_time": 0})

    def play(*arguments: str) -> str:
        return str(ansible("ansible-playbook", "-i", folder, *arguments, "-e", given).stdout)

    return Fleet(folder, play)


@pytest.fixture(scope="session")
def on_bus(fleet: Fleet, machine: Any) -> Callable[[str], str]:
    """Runs a command on the host of the bus, which must succeed; returns its output."""
    return partial(machine("bus1", fleet.inventory).check_output)
