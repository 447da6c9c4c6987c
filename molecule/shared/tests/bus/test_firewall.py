"""With the firewall, only edges reach nodes, and only nodes the bus; rules that would shut one out are undone."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environment
import pytest
from lab_bus import LabBus, connect_users, wait_until, wait_until_all_are_back

pytestmark = pytest.mark.once("operations")
FIREWALL = "playbooks/firewall.yml"
CLOSED_SECONDS = 2
TRIAL_SECONDS = 35
ON = ("-e", "stickyring_firewall=true")
LIMITED = ("--limit", "node1")
RULES = "nft list table inet stickyring"
OTHERS = "inet of_others"
"""A table that is not ours."""


@pytest.fixture(scope="module")
def doors(fleet: LabBus, nodes: list[Any]) -> list[tuple[str, int]]:
    """The addresses and ports that only some hosts may reach."""
    of_nodes = [
        (node.variables["stickyring_address"], int(node.variables["stickyring_node_port"]) + number)
        for node in nodes
        for number in range(int(node.variables["stickyring_node_instances"]))
    ]
    return [*of_nodes, *((address, port) for address in fleet.addresses.values() for port in (6379, 26379))]


def reached(doors: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Those that this machine reaches, which is neither an edge nor a node."""
    found = []
    for door in doors:
        try:
            socket.create_connection(door, timeout=CLOSED_SECONDS).close()
        except TimeoutError:
            continue
        found.append(door)
    return found


def reaches(fleet: LabBus, host: str, door: tuple[str, int]) -> bool:
    address, port = door
    command = f"timeout {CLOSED_SECONDS} bash -c '</dev/tcp/{address}/{port}' && echo reached || echo closed"
    return fleet.do(host, command).strip() == "reached"


def test_it_closes_the_ports_to_all_but_edges_and_nodes_and_nobody_is_disconnected(
    fleet: LabBus, play: Any, nodes: list[Any], edge: Any, edge_url: Any, javascript: Path, doors: list[tuple[str, int]]
) -> None:
    fleet.do("node1", f"nft add table {OTHERS}")
    assert reached(doors) == doors
    crowd = connect_users(javascript, edge_url("sticky"))
    wait_until_all_are_back(nodes)
    play(FIREWALL, *ON)
    assert reached(doors) == []
    of_node, *_, of_bus = doors
    assert reaches(fleet, edge.name, of_node)
    assert not reaches(fleet, edge.name, of_bus)
    assert reaches(fleet, nodes[0].name, of_bus)
    assert not reaches(fleet, "bus1", of_node)
    play("playbooks/verify.yml", *ON)
    history = crowd.end()
    assert (history.faults, history.recovered, history.not_recovered) == ([], 0, 0)
    assert set(re.findall(r"changed=(\d+)", play(FIREWALL, *ON, *LIMITED))) == {"0"}


def test_rules_come_back_after_debians_service_has_deleted_all(fleet: LabBus, doors: list[tuple[str, int]]) -> None:
    for command in ("restart", "reload", "stop", "start"):
        fleet.do("node1", f"systemctl {command} nftables.service")
        wait_until(lambda command=command: reached(doors[:1]) == (doors[:1] if command == "stop" else []), command)
    fleet.do("node1", f"nft add table {OTHERS}")


def test_a_run_that_was_killed_before_the_rules_were_kept_is_completed(
    fleet: LabBus, play: Any, doors: list[tuple[str, int]]
) -> None:
    """Such a run leaves rules that are loaded and will not be after a boot."""
    fleet.do("node1", "systemctl disable stickyring-firewall")
    play(FIREWALL, *ON, *LIMITED)
    assert fleet.do("node1", "systemctl is-enabled stickyring-firewall").strip() == "enabled"
    assert reached(doors[:1]) == []


@pytest.fixture
def elsewhere(fleet: LabBus, edge: Any, doors: list[tuple[str, int]]) -> Iterator[str]:
    """The address that the edge's packets to the first node come from: not its own, as behind some routers."""
    (address, _), *_ = doors
    elsewhere = environment.lab_address(fleet.inventory, 99)
    link = fleet.do(edge.name, f"ip -o route get {address}").split("dev ")[1].split()[0]
    fleet.do(edge.name, f"ip address add {elsewhere}/32 dev {link}; ip route add {address} dev {link} src {elsewhere}")
    yield elsewhere
    fleet.do(edge.name, f"ip route del {address}; ip address del {elsewhere}/32 dev {link}")


def test_rules_that_shut_out_an_edge_are_undone_also_if_it_is_not_part_of_the_run(
    fleet: LabBus, play: Any, edge: Any, doors: list[tuple[str, int]], elsewhere: str
) -> None:
    changed = (*ON, *LIMITED, "-e", f"stickyring_firewall_trial_seconds={TRIAL_SECONDS}")
    other = "{stickyring_firewall_admitted: [192.0.2.77]}"
    told = " ".join(play(FIREWALL, *changed, "-e", other, check=False).split())
    assert f"{edge.name} does not reach node1 with the new rules, so they are undone within {TRIAL_SECONDS} s" in told
    assert "192.0.2.77" in fleet.do("node1", RULES)
    wait_until(lambda: "192.0.2.77" not in fleet.do("node1", RULES), "the rules are undone")
    play(FIREWALL, *changed, "-e", f"{{stickyring_firewall_admitted: [{elsewhere}]}}")
    assert reached(doors[:1]) == []
    assert reaches(fleet, edge.name, doors[0])


def test_rules_that_are_confirmed_too_late_are_not_kept(fleet: LabBus, started: Any) -> None:
    late = ("-e", "stickyring_firewall_trial_seconds=2", "-e", "{stickyring_firewall_admitted: [192.0.2.78]}")
    told = ""
    with started("ansible-playbook", "-i", fleet.inventory, FIREWALL, *ON, *LIMITED, *late) as run:
        for line in run.stdout:
            told += line
            if line.startswith("TASK [Open connections from each host"):
                run.send_signal(signal.SIGSTOP)
                wait_until(lambda: "192.0.2.78" not in fleet.do("node1", RULES), "the rules are undone")
                run.send_signal(signal.SIGCONT)
    assert "node1: the new rules were undone before they could be confirmed" in " ".join(told.split())
    assert "192.0.2.78" not in fleet.do("node1", RULES)


def test_it_is_removed(fleet: LabBus, play: Any, doors: list[tuple[str, int]]) -> None:
    play(FIREWALL, "-e", "stickyring_firewall=false")
    assert reached(doors) == doors
    for host in ("node1", "bus1"):
        assert "stickyring-firewall" not in fleet.do(host, "systemctl list-unit-files; ls /etc")
    tables = fleet.do("node1", "nft list tables").splitlines()
    assert f"table {OTHERS}" in tables
    assert "table inet stickyring" not in tables
