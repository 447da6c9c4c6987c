"""Envoy resources of the edge, composed from the role's variables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.stickyring.fleet.plugins.plugin_utils.addresses import network
from ansible_collections.stickyring.fleet.plugins.plugin_utils.edge_routes import TOKEN_FILTER, TYPE, routes

Data = dict[str, Any]

# Envoy's own upper bound for the points of one ring.
LARGEST_RING = 8 * 1024 * 1024
# See endpoints_of. Nothing listens at this address of the edge itself, so a request that meets it is retried at the
# next point of the ring.
NOBODY: Data = {"name": "nobody", "address": "127.0.0.1", "port": 1, "weight": 1}


def edge_pem_paths(listeners: list[Data], account_key: str) -> list[str]:
    """Paths on the controller of what all listeners read there, and of the ACME account's key; each once.

    Certificates and keys of listeners with TLS, and the keys that check tokens.
    """
    tls = [item["tls"] for item in listeners if item.get("tls")]
    paths = [one[kind] for one in tls for kind in ("certificate", "key") if kind in one]
    paths += [item["token"]["keys"] for item in listeners if "keys" in (item.get("token") or {})]
    return list(dict.fromkeys([*paths, *([account_key] if account_key and edge_acme_listeners(listeners) else [])]))


def edge_acme_listeners(listeners: list[Data]) -> list[Data]:
    """Name and `names` of each listener whose certificate comes from an ACME directory."""
    return [
        {"name": item["name"], "names": item["tls"]["acme"]} for item in listeners if "acme" in (item.get("tls") or {})
    ]


def edge_prefixes(networks: list[str]) -> list[Data]:
    """Networks, and addresses, as Envoy's CidrRange."""
    found = [one for one in map(network, networks) if one is not None]
    return [{"address_prefix": str(one.network_address), "prefix_len": one.prefixlen} for one in found]


def takes_proxy_protocol(item: Data) -> bool:
    """Whether a listener is for proxies that send a PROXY protocol header."""
    return bool(boolean(item.get("proxy_protocol", False), strict=False))


def _config_source(directory: str, path: str) -> Data:
    folder = f"{directory}/{path}".rpartition("/")[0]
    return {
        "resource_api_version": "V3",
        "path_config_source": {"path": f"{directory}/{path}", "watched_directory": {"path": folder}},
    }


def _place(item: Data) -> Data:
    """The socket address of a listener: :: is for both families."""
    address = item.get("address", "0.0.0.0")
    return {"address": address, "port_value": int(item["port"]), **({"ipv4_compat": True} if address == "::" else {})}


def _listener(item: Data, common: Data) -> Data:
    manager = {
        **common["http_connection_manager"],
        "stat_prefix": item["name"],
        "rds": {
            "route_config_name": item["name"],
            "config_source": _config_source(common["directory"], f"routes/{item['name']}.json"),
        },
    }
    if item.get("token"):
        _change_filters(manager, _with_token)
    if item.get("tls"):
        _change_filters(manager, lambda filters: [*common["hsts"], *filters])
    if "redirect_port" in item:
        # The port that a client has used is not that of https.
        manager["strip_any_host_port"] = True
    return {
        "@type": TYPE + "envoy.config.listener.v3.Listener",
        "name": item["name"],
        "address": {"socket_address": _place(item)},
        **common["listener"],
        **({"listener_filters": common["proxy_protocol"]} if takes_proxy_protocol(item) else {}),
        "filter_chains": _filter_chains(item, manager, common),
    }


def _change_filters(manager: Data, change: Callable[[list[Data]], list[Data]]) -> None:
    """Change the filters of requests, and those of WebSockets, in an HTTP connection manager of one's own."""
    manager["http_filters"] = change(manager["http_filters"])
    manager["upgrade_configs"] = [{**one, "filters": change(one["filters"])} for one in manager["upgrade_configs"]]


def _with_token(filters: list[Data]) -> list[Data]:
    """Behind the limit of handshakes, which comes first: a token takes longer to check than to count."""
    check = {
        "name": TOKEN_FILTER,
        "typed_config": {"@type": TYPE + "envoy.extensions.filters.http.filter_chain.v3.FilterChainConfig"},
    }
    return [filters[0], check, *filters[1:]]


def _filter_chains(item: Data, manager: Data, common: Data) -> list[Data]:
    """One chain for trusted proxies, whose X-Forwarded-* headers count, and one for everybody else.

    The source is the peer of the connection, or whom a PROXY protocol header names: one that a user of the proxy
    cannot choose. Only trusted peers find a chain where that header is read, so nobody else can name a source.
    """
    trusted = common["trusted_proxies"]
    peers = {"direct_source_prefix_ranges": trusted} if takes_proxy_protocol(item) else {}
    kinds = [(peers | {"source_prefix_ranges": trusted}, common["forwarded"])] if trusted else []
    return [
        {
            **({"filter_chain_match": match} if match else {}),
            "filters": [
                {"name": "envoy.filters.network.http_connection_manager", "typed_config": {**manager, **client}}
            ],
            **(_tls(item, common) if item.get("tls") else {}),
        }
        for match, client in [*kinds, (peers, common["direct"])]
    ]


def _certificate_path(item: Data) -> str:
    return f"certificates/{item['name']}.json"


def _tls(item: Data, common: Data) -> Data:
    """TLS in a filter chain. The certificate is in a file of its own, so that a new one changes no listener."""
    context = {
        **common["tls_context"],
        "tls_certificate_sds_secret_configs": [
            {"name": item["name"], "sds_config": _config_source(common["directory"], _certificate_path(item))}
        ],
    }
    return {
        **common["tls_filter_chain"],
        "transport_socket": {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": TYPE + "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                "common_tls_context": context,
            },
        },
    }


def _certificate(item: Data, common: Data, pems: dict[str, str]) -> Data:
    """The secret of a listener without its private key, which edge_private_keys returns.

    What comes from an ACME directory is in files on the edge, which Envoy reads again when `served` is replaced.
    """
    certificate: Data
    if "acme" in item["tls"]:
        folder = f"{common['acme_state']}/{item['name']}"
        certificate = {
            "certificate_chain": {"filename": f"{folder}/served/chain.pem"},
            "private_key": {"filename": f"{folder}/served/key.pem"},
            "watched_directory": {"path": folder},
        }
    else:
        certificate = {"certificate_chain": {"inline_string": pems[item["tls"]["certificate"]]}}
    return {
        "@type": TYPE + "envoy.extensions.transport_sockets.tls.v3.Secret",
        "name": item["name"],
        "tls_certificate": certificate,
    }


def edge_private_keys(listeners: list[Data], pems: dict[str, str]) -> dict[str, str]:
    """Path to private key, for each file of edge_files that needs one."""
    return {_certificate_path(item): pems[item["tls"]["key"]] for item in listeners if "key" in (item.get("tls") or {})}


def _endpoints_path(cluster: Data, common: Data) -> str:
    """The path of a cluster's endpoints file, which depends on its members.

    A new path makes Envoy load the changed members with the cluster, and use them once it has checked them all.
    Under the old path, Envoy would use them at once: a member at a new address would be off the ring until it has
    passed a check, and its users would move to other nodes.
    """
    members = json.dumps(endpoints_of(cluster, common), sort_keys=True)
    return f"endpoints/{cluster['name']}-{hashlib.sha256(members.encode()).hexdigest()[:12]}.json"


def policy_of(cluster: Data) -> str:
    """The load balancing policy of a cluster."""
    return str(cluster.get("lb_policy", "RING_HASH"))


def cluster_of(cluster: Data, common: Data) -> Data:
    """The Cluster resource, whose members are in a file of their own."""
    policy = policy_of(cluster)
    resource = {
        "@type": TYPE + "envoy.config.cluster.v3.Cluster",
        "name": cluster["name"],
        "type": "EDS",
        "eds_cluster_config": {"eds_config": _config_source(common["directory"], _endpoints_path(cluster, common))},
        "lb_policy": policy,
    }
    if policy == "RING_HASH":
        resource["ring_hash_lb_config"] = {
            "hash_function": "XX_HASH",
            "minimum_ring_size": 1,
            "maximum_ring_size": LARGEST_RING,
        }
    check = {**common["health_check"], "http_health_check": dict(common["health_check"]["http_health_check"])}
    if "health_path" in cluster:
        check["http_health_check"]["path"] = cluster["health_path"]
    return {**resource, **common["cluster"], "health_checks": [check]}


def _endpoint(item: Data, weight: int) -> Data:
    return {
        "endpoint": {
            "hostname": item["name"],
            "address": {"socket_address": {"address": item["address"], "port_value": int(item["port"])}},
        },
        "metadata": {"filter_metadata": {"envoy.lb": {"hash_key": item["name"]}}},
        "load_balancing_weight": weight,
    }


def endpoints_of(cluster: Data, common: Data) -> Data:
    """The endpoints of a cluster; on a ring, a weight is the number of points.

    Envoy gives the lightest endpoint a whole number of points, one for minimum_ring_size 1, and the others points in
    proportion to their weight. With NOBODY as the lightest endpoint, which is always healthy, a node's points do not
    depend on which other nodes exist or are healthy, except for one point of rounding with unequal weights. So a node
    that fails moves only its own users, which Envoy alone cannot do (issue 22558).
    """
    endpoints = cluster["endpoints"]
    if policy_of(cluster) != "RING_HASH":
        members = [_endpoint(item, int(item.get("weight", 1))) for item in endpoints]
    else:
        nobody = _endpoint(NOBODY, NOBODY["weight"])
        nobody["endpoint"]["health_check_config"] = {"disable_active_health_check": True}
        points = int(common["ring_points_per_weight"])
        members = [nobody, *(_endpoint(item, points * int(item.get("weight", 1))) for item in endpoints)]
    return {
        "@type": TYPE + "envoy.config.endpoint.v3.ClusterLoadAssignment",
        "cluster_name": cluster["name"],
        "endpoints": [{"lb_endpoints": members}],
    }


# The listener and the cluster that give Prometheus Envoy's metrics.
METRICS = "stickyring-metrics"
# Those of docs/operations.md: all of Envoy's would be ten times as many.
METRICS_FILTER = (
    r"^(cluster\..+\.(version|membership_(healthy|total)|upstream_(cx_active|cx_connect_fail|rq_active|rq_retry|rq_timeout|rq_[1-5]xx))"
    r"|http\..+\.downstream_(cx_active|cx_upgrades_active|rq_[1-5]xx)|http_local_rate_limiter\..+|.+\.http_local_rate_limit\..+"
    r"|server\.(days_until_first_cert_expiring|memory_allocated|uptime)|listener\..+\.downstream_global_cx_overflow"
    r"|overload\..+\.active|envoy\.overload_actions\.reset_high_memory_stream\.count)$"
)


def _metrics_cluster(metrics: Data) -> Data:
    """Envoy's own admin interface, of which a route reaches only the metrics."""
    endpoint = {"endpoint": {"address": {"pipe": {"path": metrics["admin_socket"]}}}}
    return {
        "@type": TYPE + "envoy.config.cluster.v3.Cluster",
        "name": METRICS,
        "type": "STATIC",
        "load_assignment": {"cluster_name": METRICS, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def _metrics_listener(metrics: Data) -> Data:
    """Answers GET /metrics to the readers; connections of all others are closed at once, before a request."""
    # With a query, which would become a part of the filter, the path is another one.
    asked = [
        {"name": name, "string_match": {"exact": text}} for name, text in ((":method", "GET"), (":path", "/metrics"))
    ]
    route = {
        "match": {"prefix": "/", "headers": asked},
        "route": {
            "cluster": METRICS,
            "regex_rewrite": {
                "pattern": {"regex": ".*"},
                "substitution": f"/stats/prometheus?filter={quote(METRICS_FILTER)}",
            },
        },
    }
    manager = {
        "@type": TYPE + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": METRICS,
        "common_http_protocol_options": {"idle_timeout": metrics["idle_timeout"]},
        "request_headers_timeout": metrics["headers_timeout"],
        "route_config": {"name": METRICS, "virtual_hosts": [{"name": METRICS, "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": TYPE + "envoy.extensions.filters.http.router.v3.Router"},
            }
        ],
    }
    return {
        "@type": TYPE + "envoy.config.listener.v3.Listener",
        "name": METRICS,
        "address": {"socket_address": _place(metrics)},
        # Prometheus sees the edge also when users hold all connections.
        "ignore_global_conn_limit": True,
        "filter_chains": [
            {
                "filter_chain_match": {"direct_source_prefix_ranges": metrics["readers"]},
                "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}],
            }
        ],
    }


def edge_files(
    listeners: list[Data], clusters: list[Data], common: Data, pems: dict[str, str]
) -> dict[str, list[Data]]:
    """Path of each filesystem xDS file, below its directory, to the resources in it, without private keys.

    Envoy reads only one route configuration, endpoint list or secret from a file, hence a file for each listener and
    cluster. ``common`` is what the role's vars/main.yml composes, ``pems`` has the texts of edge_pem_paths.
    """
    files: dict[str, list[Data]] = {"clusters.json": [cluster_of(item, common) for item in clusters]}
    files |= {_endpoints_path(item, common): [endpoints_of(item, common)] for item in clusters}
    files |= {f"routes/{item['name']}.json": [routes(item, common, pems)] for item in listeners}
    files |= {_certificate_path(item): [_certificate(item, common, pems)] for item in listeners if item.get("tls")}
    files["listeners.json"] = [_listener(item, common) for item in listeners]
    if common["metrics"]["port"]:
        files["clusters.json"].append(_metrics_cluster(common["metrics"]))
        files["listeners.json"].append(_metrics_listener(common["metrics"]))
    return files
