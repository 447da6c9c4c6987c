"""Filters for the rules of the firewall: mistakes in them, and which way has to be open for whom."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ansible_collections.stickyring.fleet.plugins.plugin_utils.addresses import network

HIGHEST_PORT = 65535


def firewall_mistakes(doors: Sequence[Mapping[str, Any]], admitted: Sequence[str], ssh_port: object) -> list[str]:
    """Return the mistakes in the role's variables, one sentence each without full stop.

    doors: dicts with `ports` and `sources`; admitted: who may use all of them; ssh_port: where Ansible connects to.
    """
    return [*_mistakes(doors, admitted, int(str(ssh_port)))]


def _mistakes(doors: Sequence[Mapping[str, Any]], admitted: Sequence[str], ssh_port: int) -> Iterator[str]:
    if not isinstance(admitted, list):
        yield f"stickyring_firewall_admitted: {admitted!r} is no list: give [192.0.2.10], for example"
        admitted = []
    for name, sources in (
        ("stickyring_firewall_admitted", admitted),
        *(("stickyring_firewall_doors", door["sources"]) for door in doors),
    ):
        for source in sources:
            if network(source) is None:
                yield (
                    f"{name}: {source} is no address and no network: give 192.0.2.10 or 192.0.2.0/24, for example, or"
                    " the stickyring_address of the host of this name"
                )
    ports = [int(port) for door in doors for port in door["ports"]]
    for port, count in Counter(ports).items():
        if not 1 <= port <= HIGHEST_PORT:
            yield f"stickyring_firewall_doors: {port} is no port"
        if count > 1:
            yield f"stickyring_firewall_doors: port {port} is there {count} times"
        if port == ssh_port:
            yield f"stickyring_firewall_doors: Ansible connects to port {port}, which would be closed to others"


def firewall_sets(sources: Sequence[str]) -> dict[str, list[str]]:
    """Return the networks by nftables' names of their families, `ipv4` and `ipv6`, each once."""
    found = {network(source) for source in sources} - {None}
    return {
        family: sorted(str(one) for one in found if one is not None and one.version == version)
        for family, version in (("ipv4", 4), ("ipv6", 6))
    }


def firewall_ways(
    doors: Sequence[Mapping[str, Any]], hosts: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return which hosts have to get through the doors of a host: dicts with `host` and `ports`.

    hosts: those that may have to; hostvars: the variables of all hosts by name.
    """
    found = []
    # The variables of a host are computed at each access, which takes milliseconds.
    for host in hosts if doors else ():
        address = hostvars[host]["stickyring_address"]
        ports = [
            int(port)
            for door in doors
            if any(_has(source, address) for source in door["sources"])
            for port in door["ports"]
        ]
        if ports:
            found.append({"host": host, "ports": ports})
    return found


def _has(source: str, address: str) -> bool:
    found = network(source)
    return found is not None and ipaddress.ip_address(address) in found


class FilterModule:
    """The filters by the names that playbooks use."""

    def filters(self) -> dict[str, Any]:
        """Name to function."""
        return {
            "firewall_mistakes": firewall_mistakes,
            "firewall_sets": firewall_sets,
            "firewall_ways": firewall_ways,
        }
