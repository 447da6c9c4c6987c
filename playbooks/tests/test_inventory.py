"""The check of an inventory, on inventories that differ from a good one by one fault."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from ansible_collections.stickyring.fleet.plugins.filter import inventory

DEFAULTS = {
    "stickyring_node_port": 8001,
    "stickyring_node_instances": 1,
    "stickyring_node_drain_timeout": 30,
    "stickyring_node_start_timeout": 40,
    "stickyring_node_proving_time": 15,
    "stickyring_edge_listeners": [{"name": "sticky", "port": 9002, "cluster": "nodes"}],
}
KNOWN = [
    *DEFAULTS,
    "stickyring_address",
    "stickyring_share",
    "stickyring_node_name",
    "stickyring_probe_auth",
    "stickyring_probe_headers",
    "stickyring_probe_options",
    "stickyring_probe_urls",
]
GROUPS = {"edge": ["edge1"], "nodes": ["node1", "node2"]}
HOSTVARS: dict[str, dict[str, Any]] = {
    "edge1": {"stickyring_address": "198.51.100.10"},
    "node1": {"stickyring_address": "198.51.100.11"},
    "node2": {"stickyring_address": "198.51.100.12"},
}


def check(groups: dict[str, list[str]] | None = None, **changes: dict[str, Any]) -> list[str]:
    """Problems of the good inventory after the named hosts' variables were changed."""
    hostvars = deepcopy(HOSTVARS)
    for host, variables in changes.items():
        hostvars.setdefault(host, {}).update(variables)
    found: list[str] = inventory.problems(GROUPS if groups is None else groups, hostvars, DEFAULTS, KNOWN)
    return found


def test_a_good_inventory_has_no_problem() -> None:
    assert check() == []


@pytest.mark.parametrize(
    ("group", "rest"), [("nodes", {"edge": ["edge1"]}), ("edge", {"nodes": ["node1"], "edge": []})]
)
def test_an_empty_group_is_named(group: str, rest: dict[str, list[str]]) -> None:
    assert check(rest) == [f"The group `{group}` has no host: add one to the inventory."]


def test_an_address_twice_names_both_hosts() -> None:
    assert check(node2={"stickyring_address": "198.51.100.11"}) == [
        "node1 and node2 have the same address 198.51.100.11: list each host once."
    ]


@pytest.mark.parametrize(("firewall", "count"), [("yes", 1), (False, 0)])
def test_with_the_firewall_a_machine_has_one_name_in_nodes_and_bus(*, firewall: object, count: int) -> None:
    bus = {"stickyring_address": "198.51.100.11", "stickyring_firewall": firewall}
    found = check(GROUPS | {"bus": ["bus1"]}, bus1=bus)
    assert found == ["node1 and bus1 have the same address 198.51.100.11: list each host once."] * count


def test_a_name_twice_names_both_hosts() -> None:
    (message,) = check(node2={"stickyring_node_name": "node1"})
    assert message.startswith("node1 and node2 have the same name node1 on the ring")


def test_a_host_without_an_address_is_named() -> None:
    (message,) = check({"edge": ["edge1"], "nodes": ["node1", "node3"]}, node3={})
    assert message.startswith("node3: stickyring_address is not set")


@pytest.mark.parametrize("address", ["node3.example.com", "localhost", "192.0.2.300"])
def test_a_name_instead_of_an_address_is_refused_with_the_remedy(address: str) -> None:
    (message,) = check(node2={"stickyring_address": address})
    assert message.startswith(f"node2: its address is {address!r}, and Envoy resolves no names: set stickyring_address")
    # Nodes know the edges by their addresses.
    (message,) = check(edge1={"stickyring_address": address})
    assert message.startswith(f"edge1: its address is {address!r}")


@pytest.mark.parametrize("share", [0, "0%", "-1", "101%", "x"])
def test_an_invalid_share_is_refused(share: object) -> None:
    (message,) = check(node1={"stickyring_share": share})
    assert message.startswith(f"stickyring_share is '{share}': give the number of nodes")


@pytest.mark.parametrize("share", [1, "2", "25%", "100%"])
def test_a_valid_share_is_accepted(share: object) -> None:
    assert check(node1={"stickyring_share": share}) == []


def test_options_of_the_probe_that_are_no_list_are_refused() -> None:
    """They are checked before anything is deployed."""
    (message,) = check(edge1={"stickyring_probe_options": "--no-echo"})
    assert message == "edge1: stickyring_probe_options is '--no-echo': give a list, [--no-echo] for example."
    (message,) = check(edge1={"stickyring_probe_urls": "http://x"})
    assert message.startswith("edge1: stickyring_probe_urls is 'http://x': give a list")


@pytest.mark.parametrize("name", ["stickyring_probe_auth", "stickyring_probe_headers"])
def test_a_login_that_is_no_dictionary_is_refused_without_showing_it(name: str) -> None:
    (message,) = check(edge1={name: "sesame"})
    assert message.startswith(f"edge1: {name} is not a dictionary: give {{")
    assert "sesame" not in message
    assert check(edge1={name: {"token": "sesame"}}) == []


def test_two_hosts_can_use_the_same_port() -> None:
    assert check(node1={"stickyring_node_port": 9002}) == []


def test_a_host_that_is_edge_and_node_has_one_set_of_ports() -> None:
    groups = {"edge": ["node1"], "nodes": ["node1"]}
    assert check(groups) == []
    assert check(groups, node1={"stickyring_node_port": 9001, "stickyring_node_instances": 2}) == [
        "node1: port 9002 is used by instance node1-2 and by listener sticky."
    ]


def test_results_of_an_earlier_playbook_are_not_taken_for_settings() -> None:
    assert check(node1={"stickyring_node_result_state": {}}, edge1={"stickyring_edge_result_ring": {}}) == []
    (message,) = check(node1={"stickyring_probe_result_state": {}})
    assert message.startswith("node1: unknown variable stickyring_probe_result_state")


def test_the_message_for_an_unknown_variable_suggests_the_nearest_name() -> None:
    assert check(node1={"stickyring_node_prot": 1}) == [
        "node1: unknown variable stickyring_node_prot: did you mean stickyring_node_port?"
    ]


@pytest.mark.parametrize("value", ["8001x", 0, 70000, None])
def test_an_invalid_port_is_refused(value: object) -> None:
    (message,) = check(node1={"stickyring_node_port": value})
    assert message == f"node1: stickyring_node_port is {value!r}: give a number from 1 to 65535."


def test_endpoints_are_named_by_host_and_instance() -> None:
    hostvars = deepcopy(HOSTVARS)
    hostvars["node2"] |= {"stickyring_node_instances": 2, "stickyring_node_port": 7000, "stickyring_weight": 3}
    assert inventory.endpoints(["node1", "node2"], hostvars, DEFAULTS) == [
        {"name": "node1-1", "address": "198.51.100.11", "port": 8001, "weight": 1},
        {"name": "node2-1", "address": "198.51.100.12", "port": 7000, "weight": 3},
        {"name": "node2-2", "address": "198.51.100.12", "port": 7001, "weight": 3},
    ]


def test_prometheus_watches_every_instance() -> None:
    hostvars = deepcopy(HOSTVARS)
    hostvars["node2"] |= {"stickyring_node_instances": 2, "stickyring_weight": 3}
    assert inventory.watched_nodes(["node1", "node2"], hostvars, DEFAULTS) == [
        {"name": "node1-1", "address": "198.51.100.11", "port": 8001},
        {"name": "node2-1", "address": "198.51.100.12", "port": 8001},
        {"name": "node2-2", "address": "198.51.100.12", "port": 8002},
    ]


@pytest.mark.parametrize(
    ("variables", "urls"),
    [
        ({}, ["http://198.51.100.10:9002"]),
        ({"stickyring_address": "2001:db8::1"}, ["http://[2001:db8::1]:9002"]),
        (
            {
                "stickyring_cluster": "chat",
                "stickyring_edge_listeners": [
                    {"name": "to_https", "port": 80, "redirect_port": 443},
                    {"name": "other", "port": 9002, "cluster": "nodes"},
                    {"name": "proxied", "port": 444, "cluster": "chat", "proxy_protocol": True},
                    {"name": "signed", "port": 445, "cluster": "chat", "token": {"keys": "/keys.json"}},
                    {"name": "unkeyed", "port": 446, "cluster": "chat", "hash_policies": []},
                    {"name": "chat", "port": 443, "cluster": "chat", "tls": {"certificate": "a", "key": "b"}},
                    {"name": "more", "port": 8443, "cluster": "chat"},
                ],
            },
            ["https://198.51.100.10:443"],
        ),
        ({"stickyring_probe_urls": ["https://chat.example.com"]}, ["https://chat.example.com"]),
        ({"stickyring_probe_urls": []}, []),
    ],
)
def test_prometheus_watches_edges_where_they_are_probed(variables: dict[str, Any], urls: list[str]) -> None:
    hostvars = {"edge1": HOSTVARS["edge1"] | variables}
    assert inventory.watched_edges(["edge1"], hostvars, DEFAULTS) == [{"name": "edge1", "urls": urls, "metrics": ""}]


@pytest.mark.parametrize(
    ("address", "metrics"), [("192.0.2.1", "192.0.2.1:9902"), ("2001:db8::1", "[2001:db8::1]:9902")]
)
def test_prometheus_gets_the_metrics_of_edges_at_their_port(address: str, metrics: str) -> None:
    variables = {"stickyring_address": address, "stickyring_edge_metrics_port": "9902", "stickyring_probe_urls": []}
    found = inventory.watched_edges(["edge1"], {"edge1": variables}, DEFAULTS)
    assert found == [{"name": "edge1", "urls": [], "metrics": metrics}]


@pytest.mark.parametrize(
    ("variables", "minutes"),
    [
        ({}, 2),
        ({"stickyring_node_drain_timeout": "86400"}, 1441),
        ({"stickyring_node_drain_timeout": 3600, "stickyring_node_instances": 4}, 244),
    ],
)
def test_the_longest_restart_is_that_of_the_slowest_node(variables: dict[str, Any], minutes: int) -> None:
    assert inventory.longest_restart(["node1", "node2"], HOSTVARS | {"node2": variables}, DEFAULTS) == minutes
    assert inventory.longest_restart([], HOSTVARS, DEFAULTS) == 0
