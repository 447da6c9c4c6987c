"""Envoy's filesystem xDS files: their content, and how Envoy's statistics and dump show that they are loaded.

https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/overview/xds_api
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import socket
from typing import Any

CLUSTER = "envoy.config.cluster.v3.Cluster"
ENDPOINTS = "envoy.config.endpoint.v3.ClusterLoadAssignment"
ROUTES = "envoy.config.route.v3.RouteConfiguration"
SECRET = "envoy.extensions.transport_sockets.tls.v3.Secret"
LISTENER = "envoy.config.listener.v3.Listener"
# A resource must exist before another names it, so Envoy gets them in this order.
TYPES = (CLUSTER, ENDPOINTS, ROUTES, SECRET, LISTENER)
# Envoy takes exactly one of these from a file.
SINGLE_TYPES = (ENDPOINTS, ROUTES, SECRET)

Resource = dict[str, Any]
Stats = dict[str, Any]
Dump = dict[str, Any]


class InvalidFiles(Exception):
    """The wanted files must not be written; the message names the file."""


def version_of(resources: list[Resource]) -> str:
    """The version_info of a file with these resources: 16 hexadecimal digits, independent of the order of keys."""
    return hashlib.sha256(json.dumps(resources, sort_keys=True).encode()).hexdigest()[:16]


def with_key(resources: list[Resource], private_key: str | None) -> list[Resource]:
    """The secret with its private key; without a key, the resources are returned unchanged."""
    if private_key is None:
        return resources
    [secret] = resources
    certificate = {**secret["tls_certificate"], "private_key": {"inline_string": private_key}}
    return [{**secret, "tls_certificate": certificate}]


def is_secret(text: str) -> bool:
    """Whether a file with this text contains a private key or a secret resource."""
    return SECRET in text or "PRIVATE KEY" in text


def resources_of(text: str) -> dict[str, Resource]:
    """Name to resource, from a file's text; empty if it is no xDS file with names."""
    try:
        return {resource["name"]: resource for resource in json.loads(text)["resources"]}
    except (ValueError, KeyError, TypeError):
        return {}


class XdsFile:
    """One wanted file: its path below the directory, its resources, their type and version."""

    def __init__(self, path: str, resources: list[Resource]) -> None:
        if not resources:
            raise InvalidFiles(
                f"{path}: no resources. Envoy would drop what it serves; leave the file out to remove it."
            )
        types = {resource.get("@type", "").removeprefix("type.googleapis.com/") for resource in resources}
        if len(types) != 1 or not types <= set(TYPES):
            raise InvalidFiles(f"{path}: needs resources of one type out of {', '.join(TYPES)}; got {sorted(types)}.")
        self.path = path
        self.type = types.pop()
        self.resources = resources
        self.version = version_of(resources)
        if self.type in SINGLE_TYPES and len(resources) != 1:
            raise InvalidFiles(f"{path}: Envoy takes exactly one resource from such a file; got {len(resources)}.")
        if self.type == ENDPOINTS and not self.endpoints():
            raise InvalidFiles(f"{path}: the endpoint list is empty. Envoy would accept it and then refuse every user.")

    def endpoints(self) -> dict[tuple[str, int], str]:
        """Address and port to name, for a file of endpoints."""
        return endpoints_of(self.resources[0])

    def checked_endpoints(self) -> dict[tuple[str, int], str]:
        """The same, without endpoints that have no health check: places on the ring that are no nodes."""
        unchecked = {
            place_of(item["endpoint"]["address"])
            for locality in self.resources[0].get("endpoints", [])
            for item in locality.get("lb_endpoints", [])
            if item["endpoint"].get("health_check_config", {}).get("disable_active_health_check")
        }
        return {place: name for place, name in self.endpoints().items() if place not in unchecked}

    def names(self) -> list[str]:
        """The resources' names; for endpoints that of their cluster."""
        return [resource["cluster_name" if self.type == ENDPOINTS else "name"] for resource in self.resources]

    @property
    def text(self) -> str:
        """The file's content: a DiscoveryResponse in JSON."""
        return json.dumps({"version_info": self.version, "resources": self.resources}, indent=2) + "\n"

    def subscriptions(self, stats: Stats) -> list[str]:
        """Statistics prefixes of Envoy's subscriptions to this file; none if no listener uses it yet."""
        if self.type == CLUSTER:
            return ["cluster_manager.cds"]
        if self.type == LISTENER:
            return ["listener_manager.lds"]
        if self.type == ENDPOINTS:
            return [f"cluster.{self.names()[0]}"]
        if self.type == SECRET:
            prefix = f"sds.{self.names()[0]}"
            return [prefix] if f"{prefix}.version_text" in stats else []
        ending = f".rds.{self.names()[0]}.version_text"
        return [name.removesuffix(".version_text") for name in stats if name.endswith(ending)]

    def refusals(self, stats: Stats) -> int:
        """How many updates of this file Envoy has rejected since it started."""
        return sum(
            stats.get(f"{prefix}.{counter}", 0)
            for prefix in self.subscriptions(stats)
            for counter in ("update_rejected", "update_failure")
        )

    def refused(self, stats: Stats) -> bool:
        """Whether Envoy has rejected this file and does not have its version."""
        return bool(self.refusals(stats) and self.version_problems(stats))

    def version_problems(self, stats: Stats) -> list[str]:
        """A line when Envoy is not at this version."""
        loaded = {stats.get(f"{prefix}.version_text") or "none" for prefix in self.subscriptions(stats)}
        if loaded == {self.version}:
            return []
        return [f"{self.path}: Envoy is at version {', '.join(sorted(loaded)) or 'none'}, not at {self.version}"]

    def activity_problems(self, dump: Dump) -> list[str]:
        """A line for each resource that is not active, still warming or should be gone."""
        if self.type == ENDPOINTS:
            return self._endpoint_problems(dump)
        if self.type == CLUSTER:
            clusters = dump.get("ClustersConfigDump", {})
            active = {item["cluster"]["name"] for item in clusters.get("dynamic_active_clusters", [])}
            warming = warming_clusters(dump)
        elif self.type == LISTENER:
            listeners = dump.get("ListenersConfigDump", {}).get("dynamic_listeners", [])
            active = {item["name"] for item in listeners if "active_state" in item}
            warming = {item["name"] for item in listeners if "warming_state" in item}
        else:
            return []
        kind = self.type.rpartition(".")[2].lower()
        wanted = set(self.names())
        return (
            [f"{kind} {name} is not active" for name in sorted(wanted - active)]
            + [f"{kind} {name} is still warming" for name in sorted(wanted & warming)]
            + [f"{kind} {name} is still there" for name in sorted(active - wanted)]
        )

    def _endpoint_problems(self, dump: Dump) -> list[str]:
        loaded: set[tuple[str, int]] = set()
        for item in dump.get("EndpointsConfigDump", {}).get("dynamic_endpoint_configs", []):
            if item["endpoint_config"]["cluster_name"] == self.names()[0]:
                loaded |= set(endpoints_of(item["endpoint_config"]))
        if loaded == set(self.endpoints()):
            return []
        return [f"cluster {self.names()[0]} has other endpoints than {self.path}: {sorted(loaded)}"]

    def port_problems(self) -> list[str]:
        """A line for each listener port that accepts no connection."""
        problems = []
        for listener in self.resources if self.type == LISTENER else []:
            where = listener["address"]["socket_address"]
            # The socket at :: is for both families, and a host without IPv6 addresses has no ::1.
            host = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(where["address"], where["address"])
            port = where["port_value"]
            try:
                socket.create_connection((host, port), timeout=5).close()
            except OSError as error:
                problems.append(f"listener {listener['name']}: {host}:{port} accepts no connection ({error})")
        return problems

    def health_problems(self, hosts: dict[tuple[str, str, int], Resource]) -> list[str]:
        """A line with name, address and Envoy's flags for each endpoint that Envoy does not find healthy."""
        problems = []
        for (address, port), name in self.checked_endpoints().items() if self.type == ENDPOINTS else ():
            status = hosts.get((self.names()[0], address, port), {"unknown_to_envoy": True})
            flags = [flag for flag, value in status.items() if value is True]
            if flags or status.get("eds_health_status", "HEALTHY") != "HEALTHY":
                told = ", ".join(flags) or status["eds_health_status"]
                problems.append(f"{name} ({address}:{port}) of cluster {self.names()[0]} is not healthy: {told}")
        return problems


def endpoints_of(assignment: Resource) -> dict[tuple[str, int], str]:
    """Address and port to name, for a ClusterLoadAssignment; without Envoy's own admin interface, which is no node."""
    found = {}
    for locality in assignment.get("endpoints", []):
        for item in locality.get("lb_endpoints", []):
            if "pipe" in item["endpoint"]["address"]:
                continue
            found[place_of(item["endpoint"]["address"])] = item["endpoint"].get("hostname", "")
    return found


def place_of(address: Resource) -> tuple[str, int]:
    """IP address in its canonical spelling, and port of an Address."""
    place = address["socket_address"]
    return str(ipaddress.ip_address(place["address"])), place["port_value"]


def warming_clusters(dump: Dump) -> set[str]:
    """Names of clusters that do not serve yet because their endpoints are not loaded or not checked."""
    return {item["cluster"]["name"] for item in dump.get("ClustersConfigDump", {}).get("dynamic_warming_clusters", [])}
