"""`stickyring status` sees the deployed fleet, and what is wrong with it."""

import json
from typing import Any

import pytest


@pytest.mark.once
def test_status_shows_the_fleet_and_names_a_drained_instance(
    ansible: Any, inventory: Any, nodes: Any, machine: Any
) -> None:
    def status(code: int) -> dict[str, Any]:
        asked = ansible("stickyring", "status", "--json", "--inventory", inventory, check=False)
        assert asked.returncode == code, asked.stdout + asked.stderr
        found: dict[str, Any] = json.loads(asked.stdout)
        return found

    fleet = status(0)
    assert {one["host"] for one in fleet["instances"]} == {node.name for node in nodes}
    assert all(one["release"] and one["state"] == "serves" for one in fleet["instances"])
    assert all(one["healthy_in"] == [edge["name"] for edge in fleet["edges"]] for one in fleet["instances"])
    node = nodes[0].name
    command = "/opt/stickyring-node/current/bin/stickyring {} --control /run/stickyring-node/1/control.sock"
    machine(node).check_output(command.format("drain"))
    try:
        assert f"{node}-1 is drained: it takes no new users." in status(1)["problems"]
    finally:
        machine(node).check_output(command.format("undrain"))
