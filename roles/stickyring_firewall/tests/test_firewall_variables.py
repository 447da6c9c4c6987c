"""Mistakes in the variables of the firewall, and who needs which way."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.stickyring.fleet.plugins.filter.firewall import (
    firewall_mistakes,
    firewall_sets,
    firewall_ways,
)

DOORS: list[dict[str, Any]] = [
    {"ports": [8001, "8002"], "sources": ["192.0.2.10", "2001:db8::/64"]},
    {"ports": [6379], "sources": []},
]


@pytest.mark.parametrize("admitted", [[], ["192.0.2.0/24", "2001:db8::7"]])
def test_good_variables_are_taken(admitted: list[str]) -> None:
    assert firewall_mistakes(DOORS, admitted, "22") == []


@pytest.mark.parametrize(
    ("doors", "admitted", "words"),
    [
        (DOORS, ["monitor1"], "admitted: monitor1 is no address and no network: give 192.0.2.10 or"),
        (DOORS, ["192.0.2.1/24"], "admitted: 192.0.2.1/24 is no address and no network"),
        ([{"ports": [1], "sources": ["edge1"]}], [], "doors: edge1 is no address and no network"),
        ([{"ports": [0], "sources": []}], [], "doors: 0 is no port"),
        ([*DOORS, DOORS[1]], [], "doors: port 6379 is there 2 times"),
        ([{"ports": [2222], "sources": []}], [], "doors: Ansible connects to port 2222"),
    ],
)
def test_mistakes_are_named(doors: list[dict[str, Any]], admitted: list[str], words: str) -> None:
    (found,) = firewall_mistakes(doors, admitted, 2222)
    assert found.startswith(f"stickyring_firewall_{words}")


def test_networks_are_sorted_by_family_each_once() -> None:
    assert firewall_sets(["2001:db8::/64", "192.0.2.10", "10.0.0.0/8", "192.0.2.10"]) == {
        "ipv4": ["10.0.0.0/8", "192.0.2.10/32"],
        "ipv6": ["2001:db8::/64"],
    }


def test_only_rules_on_trial_have_ways_and_only_for_those_whom_they_let_in() -> None:
    hostvars: dict[str, dict[str, Any]] = {
        "node1": {"stickyring_address": "192.0.2.21", "stickyring_firewall_result_doors": DOORS},
        "node2": {"stickyring_address": "192.0.2.22"},
    }
    ways = [{"host": "node1", "address": "192.0.2.21", "port": port} for port in (8001, 8002)]
    assert firewall_ways(["node1", "node2"], hostvars, "192.0.2.10") == ways
    assert firewall_ways(["node1", "node2"], hostvars, "2001:db8::1") == ways
    assert firewall_ways(["node1", "node2"], hostvars, "192.0.2.11") == []
