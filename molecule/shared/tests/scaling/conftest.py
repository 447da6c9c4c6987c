"""A fleet that changes in steps, and users who stay connected through all of them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from residents import Residents
from stickyring.ring import Ring

USERS = [f"user-{number}" for number in range(30)]
SETTLED_SECONDS = 60


@pytest.fixture(scope="session")
def fleet(inventory: Path, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    folder = tmp_path_factory.mktemp("fleet") / "inventory"
    shutil.copytree(inventory, folder)
    return Fleet(folder)


@dataclass
class Fleet:
    """An inventory to edit."""

    folder: Path

    def edit(self, change: Callable[[dict[str, Any]], object], group: str = "nodes") -> None:
        """Applies the function to the hosts of the group and writes the inventory."""
        file = self.folder / "hosts.yml"
        content = yaml.safe_load(file.read_text())
        change(content.setdefault(group, {"hosts": {}})["hosts"])
        file.write_text(yaml.safe_dump(content, sort_keys=False))

    def prepare(self, name: str, address: str) -> None:
        """Adds a host to the lab that is not yet a node."""
        self.edit(lambda hosts: hosts.update({name: {"ansible_host": address}}), group="prepared")

    def add(self, *numbers: int) -> None:
        self.edit(
            lambda hosts: hosts.update({f"node{i}": {"ansible_host": f"198.51.100.{10 + i}"} for i in numbers}),
        )

    def drop(self, name: str, group: str = "nodes") -> None:
        self.edit(lambda hosts: hosts.pop(name), group)

    def move(self, name: str, address: str) -> None:
        self.edit(lambda hosts: hosts[name].update(ansible_host=address))


@pytest.fixture(scope="session")
def residents(edge_url: Any) -> Iterator[Residents]:
    with Residents(edge_url("sticky"), USERS) as all_of_them:
        all_of_them.settle(SETTLED_SECONDS)
        yield all_of_them


@dataclass(frozen=True)
class Plan:
    """The result of playbooks/plan.yml; moves: user to (node before, node after), for moved users."""

    before: Ring
    after: Ring
    moves: dict[str, tuple[str, str]]
    report: dict[str, Any]

    def homes(self) -> dict[str, set[str]]:
        return {user: {self.after.owner(user)} for user in USERS}


@pytest.fixture
def plan(fleet: Fleet, ansible: Any, edge: Any, tmp_path: Path) -> Callable[..., Plan]:
    """Runs playbooks/plan.yml on the fleet's inventory, with further options."""

    def ask(*options: str) -> Plan:
        ids = tmp_path / "ids"
        ids.write_text("".join(f"{user}\n" for user in USERS))
        where = ["-e", f"stickyring_ids={ids}", "-e", f"stickyring_directory={tmp_path}"]
        ansible("ansible-playbook", "-i", fleet.folder, "playbooks/plan.yml", *where, *options)
        folder = tmp_path / edge.name
        report = json.loads((folder / "plan.json").read_text())
        moves = {move["id"]: (move["from"], move["to"]) for move in report["ids"]["moves"]}
        before, after = (Ring.load(json.loads((folder / f"{name}.json").read_text())) for name in ("before", "after"))
        return Plan(before, after, moves, report)

    return ask


@pytest.fixture
def reach(fleet: Fleet, machine: Any, tmp_path: Path) -> Callable[[str], Any]:
    """A host of the present fleet by name. testinfra reads an inventory only once, hence a copy each time."""

    def find(name: str) -> Any:
        copy = tmp_path / name
        shutil.copytree(fleet.folder, copy)
        return machine(name, copy)

    return find


@pytest.fixture
def run(fleet: Fleet, ansible: Any) -> Callable[..., str]:
    """Runs a playbook on the present fleet."""
    return lambda playbook, *options: ansible("ansible-playbook", "-i", fleet.folder, playbook, *options).stdout


@pytest.fixture
def watch(residents: Residents, machine: Any, edge: Any) -> Callable[[], Callable[..., None]]:
    """Begins to watch; returns a function that takes the plan after the playbook and checks that it was followed."""

    def envoy() -> str:
        return machine(edge.name).check_output("systemctl show stickyring-edge.service --property=MainPID --value")

    def begin() -> Callable[..., None]:
        since, process = time.monotonic(), envoy()

        def judge(plan: Plan, *, uprooted: frozenset[str] = frozenset()) -> None:
            """uprooted: users whose node went away without a drain; only the node where they end up is checked."""
            residents.wait(lambda: residents.homes() == plan.homes(), SETTLED_SECONDS)
            assert envoy() == process
            for connection in residents:
                if connection.user in uprooted:
                    continue
                noticed = connection.count("disconnect", since)
                assert noticed == (1 if connection.user in plan.moves else 0), connection
                assert connection.count("failed", since) == 0, connection
                assert not connection.lost, connection
                if connection.user not in plan.moves:
                    assert not [began for began in connection.repeated if began >= since], connection

        return judge

    return begin
