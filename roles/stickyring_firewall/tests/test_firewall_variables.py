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
        (DOORS, "192.0.2.1", "admitted: '192.0.2.1' is no list: give [192.0.2.10]"),
        (DOORS, ["192.0.2.1/24"], "admitted: 192.0.2.1/24 is no address and no network"),
        ([{"ports": [1], "sources": ["edge1"]}], [], "doors: edge1 is no address and no network"),
        ([{"ports": [0], "sources": []}], [], "doors: 0 is no port"),
        ([*DOORS, DOORS[1]], [], "doors: port 6379 is there 2 times"),
        ([{"ports": [2222], "sources": []}], [], "doors: Ansible connects to port 2222"),
    ],
)
def test_mistakes_are_named(doors: list[dict[str, Any]], admitted: Any, words: str) -> None:
    (found,) = firewall_mistakes(doors, admitted, 2222)
    assert found.startswith(f"stickyring_firewall_{words}")


def test_networks_are_sorted_by_family_each_once() -> None:
    assert firewall_sets(["2001:db8::/64", "192.0.2.10", "10.0.0.0/8", "192.0.2.10"]) == {
        "ipv4": ["10.0.0.0/8", "192.0.2.10/32"],
        "ipv6": ["2001:db8::/64"],
    }


def test_who_has_to_get_through_follows_from_the_sources() -> None:
    addresses = {"edge1": "192.0.2.10", "edge2": "2001:db8::1", "node1": "192.0.2.21"}
    hostvars: dict[str, dict[str, Any]] = {host: {"stickyring_address": one} for host, one in addresses.items()}
    ways = [{"host": host, "ports": [8001, 8002]} for host in ("edge1", "edge2")]
    assert firewall_ways(DOORS, [*addresses], hostvars) == ways
    assert firewall_ways([], [*addresses], {}) == [], "the variables of hosts are computed for nothing"
