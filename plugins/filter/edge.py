"""Filters of the edge's role: what it makes of its variables, and what Envoy makes of that."""

from __future__ import annotations

import json
from typing import Any

from ansible_collections.stickyring.fleet.plugins.plugin_utils.certificates import acme_thumbprint
from ansible_collections.stickyring.fleet.plugins.plugin_utils.edge_resources import (
    cluster_of,
    edge_acme_listeners,
    edge_files,
    edge_pem_paths,
    edge_prefixes,
    edge_private_keys,
    endpoints_of,
    policy_of,
)
from ansible_collections.stickyring.fleet.plugins.plugin_utils.edge_routes import edge_duration
from ansible_collections.stickyring.fleet.plugins.plugin_utils.edge_variables import edge_problems

Data = dict[str, Any]

RING_POLICIES = ("RING_HASH", "MAGLEV")
# Envoy's own default for the slots of a Maglev table.
MAGLEV_TABLE = 65537


def _ring_document(resource: Data, members: list[Data]) -> Data:
    """The document that stickyring.ring reads, from a Cluster resource and its members in Envoy's order."""
    document: Data = {"cluster": resource["name"], "policy": resource["lb_policy"], "members": members}
    if resource["lb_policy"] == "RING_HASH":
        sizes = resource["ring_hash_lb_config"]
        document |= {"minimum_size": int(sizes["minimum_ring_size"]), "maximum_size": int(sizes["maximum_ring_size"])}
    else:
        document["table_size"] = MAGLEV_TABLE
    return document


def edge_wanted_ring(clusters: list[Data], name: str, common: Data) -> Data:
    """The ring document of a cluster as the variables define it, with every endpoint healthy.

    Empty if there is no such cluster, or if its policy has no ring.
    """
    cluster = next((item for item in clusters if item["name"] == name), {"lb_policy": "none"})
    if policy_of(cluster) not in RING_POLICIES:
        return {}
    members = [
        {"name": item["endpoint"]["hostname"], "weight": item["load_balancing_weight"]}
        for item in endpoints_of(cluster, common)["endpoints"][0]["lb_endpoints"]
    ]
    return _ring_document(cluster_of(cluster, common), members)


def edge_served_ring(name: str, config_dump: Data) -> Data:
    """The ring document of a cluster as Envoy serves it, from its admin interface's /config_dump?include_eds.

    Empty if Envoy has no such cluster, or if its policy has no ring.
    """
    sections = {section["@type"].rpartition(".")[2]: section for section in config_dump["configs"]}
    clusters = [item["cluster"] for item in sections.get("ClustersConfigDump", {}).get("dynamic_active_clusters", [])]
    assignments = [
        item["endpoint_config"] for item in sections.get("EndpointsConfigDump", {}).get("dynamic_endpoint_configs", [])
    ]
    cluster: Data = next((item for item in clusters if item["name"] == name), {})
    assignment = next((item for item in assignments if item["cluster_name"] == name), None)
    if cluster.get("lb_policy") not in RING_POLICIES or assignment is None:
        return {}
    members = [
        {
            "name": host["endpoint"]["hostname"],
            "weight": host["load_balancing_weight"],
            # As on the ring: degraded or draining endpoints own nothing either.
            "health": "HEALTHY" if host["health_status"] == "HEALTHY" else "UNHEALTHY",
        }
        for locality in assignment.get("endpoints", [])
        for host in locality["lb_endpoints"]
    ]
    return _ring_document(cluster, members)


def _key_rules(resource: Data) -> list[str]:
    """How a route configuration finds and hashes a key; from edge_files or from Envoy's config_dump."""
    settings = resource.get("typed_per_filter_config", {}).get("stickyring.key", {})
    texts = [
        f"{one.get('object_key')} {one['format_string']['text_format_source']['inline_string']}"
        for one in settings.get("on_request_headers", [])
    ]
    routes = [
        route["route"] for host in resource.get("virtual_hosts", []) for route in host["routes"] if "route" in route
    ]
    return [*texts, *sorted({json.dumps(route.get("hash_policy", []), sort_keys=True) for route in routes})]


def edge_rekeyed(files: dict[str, list[Data]], config_dump: Data) -> list[str]:
    """Names of listeners that Envoy serves and that will find or hash users' keys differently.

    ``files`` is what edge_files has made, ``config_dump`` the admin interface's
    /config_dump?resource=dynamic_route_configs.
    """
    served = {item["route_config"]["name"]: item["route_config"] for item in config_dump.get("configs", [])}
    wanted = [resource for path, resources in files.items() if path.startswith("routes/") for resource in resources]
    return [
        one["name"] for one in wanted if one["name"] in served and _key_rules(one) != _key_rules(served[one["name"]])
    ]


class FilterModule:
    """The role's filters."""

    def filters(self) -> dict[str, Any]:
        """Name to function."""
        return {
            "acme_thumbprint": acme_thumbprint,
            "edge_acme_listeners": edge_acme_listeners,
            "edge_pem_paths": edge_pem_paths,
            "edge_prefixes": edge_prefixes,
            "edge_private_keys": edge_private_keys,
            "edge_problems": edge_problems,
            "edge_duration": edge_duration,
            "edge_files": edge_files,
            "edge_rekeyed": edge_rekeyed,
            "edge_served_ring": edge_served_ring,
            "edge_wanted_ring": edge_wanted_ring,
        }
