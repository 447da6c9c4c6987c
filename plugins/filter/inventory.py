"""Filters on the inventory: the endpoints of the ring, and mistakes in the inventory."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleUndefinedVariable
from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.stickyring.fleet.plugins.module_utils.instances import instance_name, instance_port
from ansible_collections.stickyring.fleet.plugins.plugin_utils.addresses import is_address
from jinja2 import UndefinedError

LISTS_OF_THE_PROBE = {
    "stickyring_probe_options": "[--no-echo]",
    "stickyring_probe_urls": '["https://chat.example.com"]',
}
DICTIONARIES_OF_THE_PROBE = {
    "stickyring_probe_auth": '{token: "{{ vault_probe_token }}"}',
    "stickyring_probe_headers": '{Authorization: "Bearer {{ vault_probe_token }}"}',
}

RESULT = re.compile(r"stickyring_(bus|edge|firewall|monitor|node)_result_")
"""Variables that a role has set in an earlier playbook of the same run."""


def endpoints(
    hosts: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One endpoint for each instance of each host, in the order of the inventory.

    hosts: names of the hosts that serve; hostvars: the variables of all hosts by name; defaults: the node role's
    defaults, for what a host leaves unset. Returns dicts with `name`, `address`, `port` and `weight`; the name is the
    endpoint's identity on the ring and stays when its address changes.
    """
    found = []
    for host in hosts:
        variables = hostvars[host]
        name = variables.get("stickyring_node_name", host)
        port = int(variables.get("stickyring_node_port", defaults["stickyring_node_port"]))
        instances = int(variables.get("stickyring_node_instances", defaults["stickyring_node_instances"]))
        found += [
            {
                "name": instance_name(name, instance),
                "address": variables["stickyring_address"],
                "port": instance_port(port, instance),
                "weight": int(variables.get("stickyring_weight", 1)),
            }
            for instance in range(1, instances + 1)
        ]
    return found


def watched_nodes(
    hosts: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the instances of these hosts, for Prometheus: as `endpoints`, without weights."""
    return [{key: one[key] for key in ("name", "address", "port")} for one in endpoints(hosts, hostvars, defaults)]


def watched_edges(
    hosts: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return dicts for these edges: `name`; `urls`, where site.yml probes them, as users would reach them; `metrics`,
    address and port of Envoy's metrics, empty if they have none.
    """
    return [
        {"name": host, "urls": _urls(hostvars[host], defaults), "metrics": _metrics(hostvars[host])} for host in hosts
    ]


def _metrics(variables: Mapping[str, Any]) -> str:
    port, address = variables.get("stickyring_edge_metrics_port", 0), str(variables["stickyring_address"])
    return f"{f'[{address}]' if ':' in address else address}:{port}" if int(port) else ""


def _urls(variables: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    if (given := variables.get("stickyring_probe_urls")) is not None:
        return list(given)
    cluster = variables.get("stickyring_cluster", "nodes")
    listeners = variables.get("stickyring_edge_listeners", defaults["stickyring_edge_listeners"])
    return probed_urls(listeners, cluster, str(variables["stickyring_address"]))


def probed_urls(listeners: Sequence[Mapping[str, Any]], cluster: str, address: str) -> list[str]:
    """Return the URL of the first listener of an edge that keeps users of a cluster on a node, given only an id.

    Neither one for proxies, nor one that takes users with a token, nor one that hashes nothing. Empty if there is none.
    """
    host = f"[{address}]" if ":" in address else address
    ours = [one for one in listeners if one.get("cluster") == cluster and one.get("hash_policies") != []]
    return [
        f"{'https' if 'tls' in one else 'http'}://{host}:{one['port']}"
        for one in ours
        if not {"proxy_protocol", "token"} & one.keys()
    ][:1]


def longest_restart(
    nodes: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]
) -> int:
    """Minutes that the slowest node may take, by its settings, to restart all of its instances."""

    def seconds(node: str) -> int:
        settings = ("instances", "drain_timeout", "start_timeout", "proving_time")
        names = [f"stickyring_node_{setting}" for setting in settings]
        instances, *waits = (int(hostvars[node].get(name, defaults[name])) for name in names)
        return instances * sum(waits)

    return -(-max(map(seconds, nodes), default=0) // 60)


def status_answers(
    hosts: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What each host has answered to playbooks/status.yml: dicts with `host` and `answer`.

    app/src/stickyring/tools/status/fleet.py describes an answer.

    hosts: those of the groups edge, nodes and bus; hostvars: the variables of all hosts by name; defaults: the node
    role's defaults. Variables of a host are computed at each access, which takes milliseconds: so here, once.
    """
    found = []
    for host in hosts:
        variables = hostvars[host]
        groups = [group for group in variables["group_names"] if group in {"edge", "nodes", "bus"}]
        own = endpoints([host], hostvars, defaults) if "nodes" in groups else []
        answer = {
            "groups": groups,
            "ring": variables.get("stickyring_edge_result_ring", {}),
            "edge": variables.get("__stickyring_edge_answer", {}).get("msg", "not asked"),
            "node": variables.get("stickyring_node_result_summary", {}),
            "bus": variables.get("stickyring_bus_result_state", {}),
            "instances": [one["name"] for one in own],
        }
        found.append({"host": host, "answer": answer})
    return found


def problems(
    groups: Mapping[str, Sequence[str]],
    hostvars: Mapping[str, Mapping[str, Any]],
    defaults: Mapping[str, Any],
    known_variables: Iterable[str],
) -> list[str]:
    """Everything that is wrong with an inventory, one sentence each: what, where and how to fix it.

    groups: host names by group; hostvars: the variables of all hosts by name; defaults: the merged defaults of the
    roles; known_variables: every valid name with the prefix `stickyring_`.
    """
    nodes = list(groups.get("nodes", []))
    edges = list(groups.get("edge", []))
    hosts = list(dict.fromkeys([*nodes, *edges]))

    found = [
        f"The group `{group}` has no host: add one to the inventory."
        for group, members in (("nodes", nodes), ("edge", edges))
        if not members
    ]
    for host in hosts:
        found += _unknown_variables(host, hostvars[host], known_variables)

    without_address = [host for host in hosts if not _address(hostvars[host])]
    found += [
        f"{host}: stickyring_address is not set, or refers to a variable that is not set: give the address at which the"
        " edge reaches the host."
        for host in without_address
    ]
    if without_address:
        return found

    found += [
        f"{host}: its address is {_address(hostvars[host])!r}, and Envoy resolves no names: set stickyring_address to"
        " the IP address at which edges and nodes reach the host. ansible_host may stay a name."
        for host in hosts
        if not is_address(_address(hostvars[host]))
    ]
    found += _not_numbers(nodes, hostvars)
    found += _not_a_share(hostvars, nodes)
    found += [
        f"{host}: {name} is {hostvars[host][name]!r}: give a list, {example} for example."
        for host in edges
        for name, example in LISTS_OF_THE_PROBE.items()
        if not isinstance(hostvars[host].get(name, []), list)
    ]
    # Without their values, which are secrets.
    found += [
        f"{host}: {name} is not a dictionary: give {example}, for example."
        for host in edges
        for name, example in DICTIONARIES_OF_THE_PROBE.items()
        if not isinstance(hostvars[host].get(name, {}), Mapping)
    ]
    if found:
        return found
    both = [host for host in nodes if host in edges]
    # With the firewall, two names of one machine would take turns with its rules.
    walled = [host for host in groups.get("bus", []) if _is_on(hostvars[host].get("stickyring_firewall", False))]
    return [*_repeated([*dict.fromkeys([*hosts, *walled])], nodes, hostvars), *_shared_ports(both, hostvars, defaults)]


def _is_on(value: object) -> bool:
    return bool(boolean(value, strict=False))


def _address(variables: Mapping[str, Any]) -> str:
    """The host's stickyring_address; empty if it is not set or refers to a variable that is not set."""
    try:
        return str(variables["stickyring_address"])
    except (KeyError, AnsibleUndefinedVariable, UndefinedError):
        return ""


def _not_a_share(hostvars: Mapping[str, Mapping[str, Any]], nodes: Sequence[str]) -> list[str]:
    """Invalid values of stickyring_share; Ansible would take 0 for all hosts at once."""
    shares = {str(hostvars[host].get("stickyring_share", 1)) for host in nodes}
    good = re.compile(r"[1-9][0-9]*|([1-9]|[1-9][0-9]|100)%")
    return [
        f"stickyring_share is {share!r}: give the number of nodes that may restart at the same time, 1 or more, or a"
        " part of them, 25% for example."
        for share in sorted(shares)
        if not good.fullmatch(share)
    ]


def _unknown_variables(host: str, variables: Mapping[str, Any], known_variables: Iterable[str]) -> list[str]:
    known = set(known_variables)
    found = []
    for name in sorted(variables):
        if name.startswith("stickyring_") and name not in known and not RESULT.match(name):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "no role uses it."
            found.append(f"{host}: unknown variable {name}: {hint}")
    return found


def _not_numbers(nodes: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = []
    for host in nodes:
        for name, low, high in (
            ("stickyring_node_port", 1, 65535),
            ("stickyring_node_instances", 1, 64),
            ("stickyring_weight", 1, 1000),
        ):
            value = hostvars[host].get(name, low)
            if not re.fullmatch(r"[0-9]+", str(value)) or not low <= int(value) <= high:
                found.append(f"{host}: {name} is {value!r}: give a number from {low} to {high}.")
    return found


def _repeated(hosts: Sequence[str], nodes: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]]) -> list[str]:
    by_address = defaultdict(list)
    for host in hosts:
        by_address[_address(hostvars[host])].append(host)
    by_name = defaultdict(list)
    for host in nodes:
        by_name[hostvars[host].get("stickyring_node_name", host)].append(host)
    found = [
        f"{' and '.join(sharing)} have the same address {address}: list each host once."
        for address, sharing in by_address.items()
        if len(sharing) > 1
    ]
    return found + [
        f"{' and '.join(sharing)} have the same name {name} on the ring: give each a stickyring_node_name of its own."
        for name, sharing in by_name.items()
        if len(sharing) > 1
    ]


def _shared_ports(
    hosts: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]
) -> list[str]:
    """Ports that a node and an edge on the same host would both use; the edge role checks its own listeners."""
    found = []
    for host in hosts:
        listeners = hostvars[host].get("stickyring_edge_listeners", defaults["stickyring_edge_listeners"])
        taken = {int(one["port"]): f"listener {one.get('name')}" for one in listeners if "port" in one}
        found += [
            f"{host}: port {endpoint['port']} is used by instance {endpoint['name']} and by {taken[endpoint['port']]}."
            for endpoint in endpoints([host], hostvars, defaults)
            if endpoint["port"] in taken
        ]
    return found


class FilterModule:
    """The filters by the names that playbooks use."""

    def filters(self) -> dict[str, Any]:
        """Name to function."""
        return {
            "endpoints": endpoints,
            "inventory_problems": problems,
            "longest_restart": longest_restart,
            "status_answers": status_answers,
            "probed_urls": probed_urls,
            "watched_edges": watched_edges,
            "watched_nodes": watched_nodes,
        }
