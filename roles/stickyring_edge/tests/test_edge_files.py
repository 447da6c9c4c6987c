"""The files that the role composes, and the check of its variables."""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.stickyring.fleet.plugins.filter import edge
from ansible_collections.stickyring.fleet.plugins.plugin_utils import (
    certificates,
    edge_resources,
    edge_routes,
    edge_variables,
)
from certificates import Certificate, jwk, make_certificate, make_key, private_pem
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from stickyring.node import forwarded, sessions, takeover

ROLE = Path(__file__).parents[1]

POLICIES = [
    {"query_parameter": {"name": "client_id"}, "terminal": True},
    {"header": {"header_name": "x-client-id"}, "terminal": True},
    {"cookie": {"name": "stickyring", "ttl": "0s"}},
]
COMMON: dict[str, Any] = {
    "directory": "/etc/x",
    "hash_policies": POLICIES,
    "private_paths": ["/metrics"],
    "paths": [],
    "largest_body": 1000,
    "handshakes": {"rate": 0, "burst": 1, "enforced": True},
    "ring_points_per_weight": 100,
    "listener": {},
    "metrics": {"port": 0},
    "acme_state": "/var/lib/acme",
    "acme_thumbprint": "",
    "tls_context": {"alpn_protocols": ["h2"]},
    "tls_filter_chain": {"transport_socket_connect_timeout": "5s"},
    "http_connection_manager": {
        "http_filters": [{"name": "router"}],
        "upgrade_configs": [{"upgrade_type": "websocket", "filters": [{"name": "router"}]}],
    },
    "trusted_proxies": [],
    "direct": {"use_remote_address": True},
    "forwarded": {"use_remote_address": False},
    "proxy_protocol": [{"name": "proxy_protocol"}],
    "hsts": [],
    "route_configuration": {},
    "route": {"timeout": "60s"},
    "cluster": {},
    "health_check": {"http_health_check": {"path": "/healthz"}},
}
ENDPOINTS = [{"name": f"node{i}-1", "address": f"192.0.2.{i}", "port": 8001} for i in (1, 2, 3)]
CLUSTERS: list[dict[str, Any]] = [
    {"name": "nodes", "endpoints": ENDPOINTS},
    {"name": "first", "endpoints": ENDPOINTS[:1], "health_path": "/ok"},
]
LISTENERS = [
    {"name": "sticky", "port": 9002, "cluster": "nodes"},
    {"name": "single", "port": 9001, "cluster": "first", "address": "127.0.0.1"},
    {"name": "unkeyed", "port": 9003, "cluster": "nodes", "hash_policies": []},
]
TLS = {"certificate": "/tls/chain.pem", "key": "/tls/key.pem"}
PEMS = {"/tls/chain.pem": "CHAIN", "/tls/key.pem": "KEY"}


def compose(listeners: list[dict[str, Any]] = LISTENERS, clusters: list[dict[str, Any]] = CLUSTERS) -> dict[str, Any]:
    files: dict[str, Any] = edge_resources.edge_files(listeners, clusters, COMMON, PEMS)
    return files


def endpoint_files(files: dict[str, Any]) -> set[str]:
    return {path for path in files if path.startswith("endpoints/")}


def test_every_path_that_a_file_names_is_one_of_the_files() -> None:
    files = compose([*LISTENERS, {"name": "safe", "port": 9443, "cluster": "nodes", "tls": TLS}])
    named = [cluster["eds_cluster_config"]["eds_config"] for cluster in files["clusters.json"]]
    for listener in files["listeners.json"]:
        chain = listener["filter_chains"][0]
        named.append(chain["filters"][0]["typed_config"]["rds"]["config_source"])
        if "transport_socket" in chain:
            context = chain["transport_socket"]["typed_config"]["common_tls_context"]
            named += [one["sds_config"] for one in context["tls_certificate_sds_secret_configs"]]
    paths = {source["path_config_source"]["path"] for source in named}
    assert paths == {f"/etc/x/{path}" for path in files if "/" in path}


def weights(files: dict[str, Any], path: str) -> dict[str, int]:
    members = files[path][0]["endpoints"][0]["lb_endpoints"]
    return {member["endpoint"]["hostname"]: member["load_balancing_weight"] for member in members}


def test_changed_members_get_a_new_file_and_endpoints_keep_their_points() -> None:
    points = {}
    for count in (2, 3):
        cluster = {"name": "nodes", "endpoints": ENDPOINTS[:count]}
        files = compose([LISTENERS[0]], [cluster])
        assert files["clusters.json"][0]["ring_hash_lb_config"]["minimum_ring_size"] == 1
        (path,) = endpoint_files(files)
        points[path] = weights(files, path)
    assert list(points.values()) == [
        {"nobody": 1, "node1-1": 100, "node2-1": 100},
        {"nobody": 1, "node1-1": 100, "node2-1": 100, "node3-1": 100},
    ]


def test_a_changed_number_of_points_gets_a_new_file() -> None:
    paths = [
        endpoint_files(edge_resources.edge_files(LISTENERS, CLUSTERS, COMMON | {"ring_points_per_weight": points}, {}))
        for points in (100, 200)
    ]
    assert paths[0].isdisjoint(paths[1])


def test_nobody_is_the_lightest_endpoint_and_always_healthy() -> None:
    files = compose()
    for path in endpoint_files(files):
        nobody, *nodes = files[path][0]["endpoints"][0]["lb_endpoints"]
        assert nobody["endpoint"] == {
            "hostname": "nobody",
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": 1}},
            "health_check_config": {"disable_active_health_check": True},
        }
        assert nobody["load_balancing_weight"] < min(node["load_balancing_weight"] for node in nodes)
        assert not any("health_check_config" in node["endpoint"] for node in nodes)


def test_a_changed_address_gets_a_new_file_and_keeps_its_place_on_the_ring() -> None:
    moved = [CLUSTERS[0] | {"endpoints": [ENDPOINTS[0] | {"address": "192.0.2.99"}, *ENDPOINTS[1:]]}, CLUSTERS[1]]
    before, after = compose(), compose(clusters=moved)
    (path,) = endpoint_files(after) - endpoint_files(before)
    assert [name for name in before if before[name] != after.get(name, before[name])] == ["clusters.json"]
    rings = [files["clusters.json"][0]["ring_hash_lb_config"] for files in (before, after)]
    assert rings[0] == rings[1]
    [_, endpoint, *_others] = after[path][0]["endpoints"][0]["lb_endpoints"]
    assert endpoint["metadata"]["filter_metadata"]["envoy.lb"]["hash_key"] == "node1-1"


def test_other_policies_than_ring_hash_have_no_ring() -> None:
    files = compose(clusters=[{**CLUSTERS[0], "lb_policy": "MAGLEV"}, CLUSTERS[1]])
    cluster = files["clusters.json"][0]
    assert cluster["lb_policy"] == "MAGLEV"
    assert "ring_hash_lb_config" not in cluster
    path = cluster["eds_cluster_config"]["eds_config"]["path_config_source"]["path"].removeprefix("/etc/x/")
    assert weights(files, path) == {"node1-1": 1, "node2-1": 1, "node3-1": 1}


def test_points_are_proportional_to_the_weight() -> None:
    cluster = {"name": "nodes", "endpoints": [ENDPOINTS[0] | {"weight": 3}, *ENDPOINTS[1:]]}
    files = compose([LISTENERS[0]], [cluster])
    (path,) = endpoint_files(files)
    assert weights(files, path) == {"nobody": 1, "node1-1": 300, "node2-1": 100, "node3-1": 100}


def dump(clusters: list[dict[str, Any]], members: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Envoy's /config_dump?include_eds: the clusters, and the lb_endpoints of each by its name."""
    assignments = [{"cluster_name": name, "endpoints": [{"lb_endpoints": hosts}]} for name, hosts in members.items()]
    return {
        "configs": [
            {"@type": "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump", "bootstrap": {}},
            {
                "@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump",
                "dynamic_active_clusters": [{"cluster": cluster} for cluster in clusters],
            },
            {
                "@type": "type.googleapis.com/envoy.admin.v3.EndpointsConfigDump",
                "dynamic_endpoint_configs": [{"endpoint_config": assignment} for assignment in assignments],
            },
            {"@type": "type.googleapis.com/envoy.admin.v3.ListenersConfigDump"},
        ]
    }


def served(policy: dict[str, Any], health: str = "HEALTHY") -> dict[str, Any]:
    """The ring document of an Envoy with two members, the second in this health."""
    hosts = [
        {"endpoint": {"hostname": "node2-1"}, "load_balancing_weight": 3, "health_status": "HEALTHY"},
        {"endpoint": {"hostname": "node1-1"}, "load_balancing_weight": 1, "health_status": health},
    ]
    clusters = [{"name": "other", "lb_policy": "RING_HASH"}, {"name": "nodes", **policy}]
    document: dict[str, Any] = edge.edge_served_ring("nodes", dump(clusters, {"other": [], "nodes": hosts}))
    return document


# As in Envoy's /config_dump: 64-bit numbers are text in JSON.
RING = {"lb_policy": "RING_HASH", "ring_hash_lb_config": {"minimum_ring_size": "400", "maximum_ring_size": "8388608"}}


def test_the_served_ring_has_the_members_as_envoy_orders_them() -> None:
    assert served(RING) == {
        "cluster": "nodes",
        "policy": "RING_HASH",
        "minimum_size": 400,
        "maximum_size": 8388608,
        "members": [
            {"name": "node2-1", "weight": 3, "health": "HEALTHY"},
            {"name": "node1-1", "weight": 1, "health": "HEALTHY"},
        ],
    }


@pytest.mark.parametrize("health", ["UNHEALTHY", "DEGRADED", "UNKNOWN"])
def test_the_served_ring_marks_unhealthy_members(health: str) -> None:
    assert [member["health"] for member in served(RING, health)["members"]] == ["HEALTHY", "UNHEALTHY"]


def test_the_served_ring_of_maglev_has_a_table() -> None:
    document = served({"lb_policy": "MAGLEV"})
    assert (document["policy"], document["table_size"]) == ("MAGLEV", 65537)
    assert "minimum_size" not in document


def test_an_unknown_cluster_has_no_ring() -> None:
    assert edge.edge_served_ring("nodes", {"configs": []}) == {}
    without_members = dump([{"name": "nodes", **RING}], {})
    assert edge.edge_served_ring("nodes", without_members) == {}


def test_the_wanted_ring_is_the_one_that_is_written() -> None:
    document = edge.edge_wanted_ring(CLUSTERS, "nodes", COMMON)
    files = compose()
    written = files["clusters.json"][0]["ring_hash_lb_config"]
    assert document["minimum_size"] == written["minimum_ring_size"]
    (path,) = (path for path in endpoint_files(files) if path.startswith("endpoints/nodes"))
    assert {member["name"]: member["weight"] for member in document["members"]} == weights(files, path)


def test_hash_policies_are_only_in_the_routes() -> None:
    changed = deepcopy(LISTENERS)
    changed[0]["hash_policies"] = [{"header": {"header_name": "x-user"}}]
    before, after = compose(), compose(changed)
    assert [path for path in before if before[path] != after[path]] == ["routes/sticky.json"]
    for files in (before, after):
        [routes] = files["routes/sticky.json"]
        assert all(
            route["route"]["hash_policy"] == [{"filter_state": {"key": "stickyring.key"}}]
            for route in with_nodes(routes)
        )


def with_nodes(routes: dict[str, Any]) -> list[dict[str, Any]]:
    """The routes that lead to a cluster."""
    return [route for route in routes["virtual_hosts"][0]["routes"] if "route" in route]


def test_the_node_gets_the_hashed_key_and_no_key_header_of_the_client() -> None:
    [routes] = compose()["routes/sticky.json"]
    told = {one["header"]["key"]: one["header"]["value"] for one in routes["request_headers_to_add"]}
    assert told == {
        "x-stickyring-key": "%FILTER_STATE(stickyring.key:PLAIN)%",
        "x-stickyring-cluster": "nodes",
        "x-stickyring-client": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
        "x-stickyring-process": "%ENVIRONMENT(INVOCATION_ID)%",
    }
    assert set(routes["request_headers_to_remove"]) == {*told, "x-stickyring-issued"}


def test_the_first_policy_that_finds_a_value_identifies_the_user() -> None:
    """Each value overwrites the one before it, so the first policy comes last."""
    settings = compose()["routes/sticky.json"][0]["typed_per_filter_config"]
    kept = [
        (one["object_key"], one["format_string"]["text_format_source"]["inline_string"])
        for one in settings["stickyring.key"]["on_request_headers"]
    ]
    assert kept == [
        ("stickyring.given", "%DYNAMIC_METADATA(stickyring.cookie:stickyring)%"),
        ("stickyring.given", "%REQ(x-client-id)%"),
        ("stickyring.given", "%QUERY_PARAM(client_id)%"),
        ("stickyring.key", "%UNIQUE_ID%"),
        ("stickyring.key", "%FILTER_STATE(stickyring.given:PLAIN)%"),
    ]
    assert all(one["skip_if_empty"] for one in settings["stickyring.key"]["on_request_headers"])
    [rule] = settings["stickyring.cookies"]["request_rules"]
    assert rule["on_header_present"] == {"metadata_namespace": "stickyring.cookie", "key": "stickyring"}

    more = [*POLICIES, {"cookie": {"name": "later"}}, {"connection_properties": {"source_ip": True}}]
    [routes] = compose([LISTENERS[0] | {"hash_policies": more}])["routes/sticky.json"]
    assert routes["typed_per_filter_config"] == settings, "a request without an earlier value gets the cookie"


@pytest.mark.parametrize(
    ("cookie", "tls", "issued"),
    [
        ({"ttl": "0s"}, False, "; HttpOnly"),
        ({"ttl": "3600s", "path": "/"}, False, "; Max-Age=3600; Path=/; HttpOnly"),
        ({"ttl": "0s", "attributes": [{"name": "SameSite", "value": "Lax"}]}, True, "; Secure; HttpOnly; SameSite=Lax"),
        ({"ttl": "0s", "attributes": [{"name": "Secure"}]}, True, "; HttpOnly; Secure"),
        ({}, False, None),
    ],
)
def test_a_cookie_with_a_ttl_is_issued(cookie: dict[str, Any], tls: bool, issued: str | None) -> None:
    listener = LISTENERS[0] | {"hash_policies": [{"cookie": {"name": "c", **cookie}}]} | ({"tls": TLS} if tls else {})
    [routes] = compose([listener])["routes/sticky.json"]
    given, nothing_given = with_nodes(routes)
    assert "response_headers_to_add" not in given
    headers = [one["header"]["value"] for one in nothing_given.get("response_headers_to_add", [])]
    assert headers == ([] if issued is None else [f"c=%FILTER_STATE(stickyring.key:PLAIN)%{issued}"])


def test_without_a_policy_nothing_is_hashed_or_logged_as_a_key() -> None:
    [routes] = compose()["routes/unkeyed.json"]
    assert routes["typed_per_filter_config"].keys() == {"stickyring.body"}
    assert "hash_policy" not in routes["virtual_hosts"][0]["routes"][-1]["route"]


def test_a_certificate_is_in_a_file_of_its_own_and_its_key_is_not_in_it() -> None:
    listeners = [*LISTENERS[:2], LISTENERS[2] | {"tls": TLS}]
    before, after = compose(), compose(listeners)
    assert {path for path in after if after[path] != before.get(path)} == {
        "listeners.json",
        "certificates/unkeyed.json",
    }
    [secret] = after["certificates/unkeyed.json"]
    assert secret["tls_certificate"] == {"certificate_chain": {"inline_string": "CHAIN"}}
    assert edge_resources.edge_private_keys(listeners, PEMS) == {"certificates/unkeyed.json": "KEY"}
    assert edge_resources.edge_private_keys(LISTENERS, PEMS) == {}
    # A new certificate does not change the listener, so WebSockets stay open.
    renewed = edge_resources.edge_files(listeners, CLUSTERS, COMMON, PEMS | {"/tls/chain.pem": "NEW"})
    assert [path for path in after if after[path] != renewed[path]] == ["certificates/unkeyed.json"]
    assert edge_resources.edge_pem_paths(listeners, "/account.pem") == list(PEMS)


def test_a_certificate_by_acme_is_read_from_files_that_are_replaced_together() -> None:
    listeners = [LISTENERS[0] | {"tls": {"acme": ["chat.example.com", "www.example.com"]}}]
    [secret] = compose(listeners)["certificates/sticky.json"]
    assert secret["tls_certificate"] == {
        "certificate_chain": {"filename": "/var/lib/acme/sticky/served/chain.pem"},
        "private_key": {"filename": "/var/lib/acme/sticky/served/key.pem"},
        "watched_directory": {"path": "/var/lib/acme/sticky"},
    }
    assert edge_resources.edge_private_keys(listeners, {}) == {}
    assert edge_resources.edge_acme_listeners([*LISTENERS, *listeners]) == [
        {"name": "sticky", "names": ["chat.example.com", "www.example.com"]}
    ]
    assert edge_resources.edge_pem_paths(listeners, "/account.pem") == ["/account.pem"]


def test_private_paths_are_answered_before_any_node() -> None:
    private, *public = compose()["routes/sticky.json"][0]["virtual_hosts"][0]["routes"]
    assert private == {"match": {"path": "/metrics"}, "direct_response": {"status": 404}}
    assert [route["match"]["prefix"] for route in public] == ["/"] * len(public)


PATHS = [
    {"prefix": "/upload", "body_limit": "5000"},
    {"prefix": "/events", "timeout": 0},
    {"prefix": "/upload/reports", "timeout": "300", "body_limit": 7000},
]


def body_limits(settings: dict[str, Any]) -> list[int]:
    """The limits in typed_per_filter_config."""
    filters = settings.get("stickyring.body", {}).get("filter_chain", {}).get("filters", [])
    return [one["typed_config"]["max_request_bytes"] for one in filters]


def limits(routes: dict[str, Any]) -> list[tuple[str, str, list[int]]]:
    """Prefix, timeout and own body limit of each route to a cluster."""
    return [
        (
            route["match"].get("path_separated_prefix", "all"),
            route["route"]["timeout"],
            body_limits(route.get("typed_per_filter_config", {})),
        )
        for route in with_nodes(routes)
    ]


@pytest.mark.parametrize("listener", ["sticky", "unkeyed"])
def test_paths_become_routes_the_longest_prefix_first(listener: str) -> None:
    for paths in (PATHS, PATHS[::-1]):
        files = edge_resources.edge_files(LISTENERS, CLUSTERS, COMMON | {"paths": paths}, PEMS)
        [routes] = files[f"routes/{listener}.json"]
        wanted = [
            ("/upload/reports", "300s", [7000]),
            ("/events", "0s", []),
            ("/upload", "60s", [5000]),
            ("all", "60s", []),
        ]
        # Once for requests with a key, and once for those without.
        assert limits(routes) == wanted * (1 if listener == "unkeyed" else 2)
        assert body_limits(routes["typed_per_filter_config"]) == [1000]
        # What a retry needs is kept by the edge, so it does not grow with the allowed body.
        assert {route["request_body_buffer_limit"] for route in with_nodes(routes)} == {1000}


def test_under_a_prefix_users_are_found_as_everywhere() -> None:
    files = edge_resources.edge_files(LISTENERS, CLUSTERS, COMMON | {"paths": PATHS}, PEMS)
    [routes] = files["routes/sticky.json"]
    [plain] = compose()["routes/sticky.json"]
    last, first = with_nodes(plain)[1], with_nodes(plain)[0]
    for count, route in enumerate(with_nodes(routes)):
        expected = first if count <= len(PATHS) else last
        assert route["match"].get("filter_state") == expected["match"].get("filter_state")
        for field in ("request_headers_to_add", "response_headers_to_add"):
            assert route.get(field) == expected.get(field)
        assert route["route"]["hash_policy"] == expected["route"]["hash_policy"]
    # A key that is not valid is refused before a route for requests without a key.
    refusals = [
        count
        for count, route in enumerate(routes["virtual_hosts"][0]["routes"])
        if route.get("direct_response", {}).get("status") == 400
    ]
    assert refusals == [1 + 1 + len(PATHS)]


def test_paths_and_limits_are_only_in_the_routes() -> None:
    before = compose()
    handshakes = {"rate": 10, "burst": 20, "enforced": False}
    changes = {"paths": PATHS, "largest_body": 2000, "handshakes": handshakes}
    after = edge_resources.edge_files(LISTENERS, CLUSTERS, COMMON | changes, PEMS)
    assert {path for path in before if before[path] != after[path]} == {
        f"routes/{item['name']}.json" for item in LISTENERS
    }
    assert before.keys() == after.keys()


def test_a_listener_may_have_paths_of_its_own() -> None:
    listeners = [LISTENERS[0] | {"paths": PATHS[:1]}, LISTENERS[1], LISTENERS[2] | {"paths": []}]
    files = edge_resources.edge_files(listeners, CLUSTERS, COMMON | {"paths": PATHS[1:2]}, PEMS)
    found = {item["name"]: limits(files[f"routes/{item['name']}.json"][0])[0][0] for item in listeners}
    assert found == {"sticky": "/upload", "single": "/events", "unkeyed": "all"}


def test_a_cluster_may_have_a_health_path_of_its_own() -> None:
    checks = [cluster["health_checks"][0]["http_health_check"]["path"] for cluster in compose()["clusters.json"]]
    assert checks == ["/healthz", "/ok"]
    assert COMMON["health_check"]["http_health_check"]["path"] == "/healthz"


def check(
    listeners: list[dict[str, Any]] = LISTENERS,
    clusters: list[dict[str, Any]] = CLUSTERS,
    sha256: str | None = None,
    pems: dict[str, str] | None = None,
    **others: object,
) -> str:
    """The problems of these variables; all others have their defaults."""
    settings = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text())
    settings |= {"stickyring_edge_listeners": listeners, "stickyring_edge_clusters": clusters}
    # A template, and what has no default here.
    settings |= {"stickyring_edge_metrics_address": "0.0.0.0", "stickyring_edge_stopping_timeout": 0}
    settings |= {f"stickyring_edge_{name}": value for name, value in others.items()}
    return " ".join(edge_variables.edge_problems(settings, pems or {}, sha256))


def test_good_variables_have_no_problem() -> None:
    assert check() == ""
    assert check(sha256="0123456789abcdef" * 4) == ""
    assert check(hash_policies=POLICIES) == ""
    assert check(hash_policies=[{"connection_properties": {"source_ip": True}}]) == ""
    assert check(limit_nofile="20000", max_connections="9000", route_timeout="25.5") == ""
    assert check(trusted_proxies=["192.0.2.0/24", "192.0.2.1", "2001:db8::/32"]) == ""
    for hsts in ("max-age=0", "max-age=31536000; includeSubDomains; preload"):
        assert check(hsts=hsts) == ""
    assert check([LISTENERS[0] | {"proxy_protocol": "yes"}], trusted_proxies=["192.0.2.1"]) == ""
    assert check([LISTENERS[0] | {"proxy_protocol": "no"}]) == ""
    assert check([LISTENERS[0], {"name": "redirect", "port": 80, "redirect_port": "443"}]) == ""
    assert "listener lost: give a cluster, or a redirect_port." in check([{"name": "lost", "port": 80}])
    # An address of its own, and both families.
    places: tuple[dict[str, Any], ...] = (
        {"address": "192.0.2.9", "port": 9901},
        {"address": "::", "port": 443},
        {"port": 65535},
    )
    others = [{"name": f"more{i}", "cluster": "nodes", **place} for i, place in enumerate(places)]
    assert check([*LISTENERS, *others]) == ""


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"sha256": "A" * 64}, f"stickyring_edge_envoy_sha256 '{'A' * 64}' is not 64 hexadecimal digits"),
        ({"sha256": "0" * 63}, "is not 64 hexadecimal digits in lower case"),
        ({"limit_nofile": 39999}, "stickyring_edge_limit_nofile 39999 is too low"),
        ({"route_timeout": 25}, "stickyring_edge_route_timeout 25 would end long polls"),
        ({"trusted_proxies": "192.0.2.1"}, "stickyring_edge_trusted_proxies is '192.0.2.1': give a list"),
        ({"trusted_proxies": ["proxy.example"]}, "stickyring_edge_trusted_proxies: 'proxy.example' is no IP address"),
        ({"trusted_proxies": ["192.0.2.1/24"]}, "'192.0.2.1/24' is no IP address and no network such as 192.0.2.0/24"),
        ({"trusted_proxies": ["::1", "0::1/128"]}, "stickyring_edge_trusted_proxies: ::1/128 is listed twice."),
        (
            {"trusted_proxies": ["0.0.0.0/0"]},
            "_proxies: 0.0.0.0/0 is everybody; name the proxies.",
        ),
        ({"hsts": True}, "stickyring_edge_hsts is True: give max-age=SECONDS"),
        ({"hsts": "31536000"}, "stickyring_edge_hsts is '31536000': give max-age=SECONDS"),
        ({"hsts": "max-age=1; preload; x"}, "stickyring_edge_hsts is 'max-age=1; preload; x': give max-age=SECONDS"),
        ({"private_paths": "/metrics"}, "stickyring_edge_private_paths is '/metrics': give a list"),
        ({"private_paths": ["metrics"]}, "stickyring_edge_private_paths: 'metrics' is no path"),
        ({"health_check_path": "healthz"}, "stickyring_edge_health_check_path 'healthz' is no path"),
        ({"log_level": False}, "stickyring_edge_log_level is False: give one of trace, debug"),
        ({"access_log": "maybe"}, "stickyring_edge_access_log is 'maybe': give true or false."),
        ({"request_timeout": -0.5}, "stickyring_edge_request_timeout is -0.5: give a number from 0 to 86400."),
        ({"connect_timeout": 0}, "stickyring_edge_connect_timeout is 0: give a number from 0.1 to 3600."),
        ({"load_timeout": "2.5"}, "stickyring_edge_load_timeout is '2.5': give a whole number from 1 to 3600."),
        ({"max_heap_mib": 1e3}, "stickyring_edge_max_heap_mib is 1000.0: give a whole number from 64"),
        ({"max_connections": "1e3"}, "stickyring_edge_max_connections is '1e3': give a whole number"),
        ({"healthy_timeout": True}, "stickyring_edge_healthy_timeout is True: give a whole number"),
        ({"route_timeout": float("inf")}, "stickyring_edge_route_timeout is inf: give a number"),
    ],
)
def test_each_fault_of_a_single_value_is_reported(others: dict[str, Any], words: str) -> None:
    assert words in check(**others)


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ("/upload", "is '/upload': give a list such as [{prefix: /events, timeout: 0}]."),
        (["/upload"], "is ['/upload']: give a list such as"),
        ([{"timeout": 0}], "is [{'timeout': 0}]: give a list such as"),
        ([{"prefix": "/upload"}], ": /upload sets nothing: give timeout or body_limit."),
        ([{"prefix": "/a", "timeout": 0, "limit": 1}], ": /a has no setting limit; there are timeout and body_limit."),
        ([{"prefix": "/a", "timeout": 0}, {"prefix": "/a", "body_limit": 1}], ": /a is listed twice."),
        ([{"prefix": "/", "timeout": 0}], ": / would cover Socket.IO. For all paths, there are"),
        ([{"prefix": "/socket.io", "timeout": 0}], ": /socket.io is a path of Socket.IO, which has the settings"),
        ([{"prefix": "/chat/socket.io/x", "timeout": 0}], ": /chat/socket.io/x is a path of Socket.IO"),
        ([{"prefix": "upload", "timeout": 0}], ": 'upload' is no prefix: give a path such as /upload"),
        ([{"prefix": "/upload/", "timeout": 0}], ": '/upload/' is no prefix"),
        ([{"prefix": "/a//b", "timeout": 0}], ": '/a//b' is no prefix"),
        ([{"prefix": "/a/../b", "timeout": 0}], ": '/a/../b' is no prefix"),
        ([{"prefix": "/a?b", "timeout": 0}], ": '/a?b' is no prefix"),
        ([{"prefix": "/%61", "timeout": 0}], ": '/%61' is no prefix"),
        ([{"prefix": "/a", "timeout": -1}], ": /a: timeout is -1: give a number from 0 to 86400."),
        ([{"prefix": "/a", "timeout": None}], ": /a: timeout is None: give a number from 0 to 86400."),
        ([{"prefix": "/a", "body_limit": 0}], ": /a: body_limit is 0: give a whole number from 1 to 4294967295."),
        ([{"prefix": "/a", "body_limit": "1e6"}], ": /a: body_limit is '1e6': give a whole number"),
        ([{"prefix": "/a", "body_limit": True}], ": /a: body_limit is True: give a whole number"),
    ],
)
def test_each_fault_of_a_path_is_reported(paths: Any, words: str) -> None:
    assert f"stickyring_edge_paths{words if words[0] == ':' else ' ' + words}" in check(paths=paths)
    listeners = [LISTENERS[0] | {"paths": paths}]
    assert f"listener sticky: paths{words if words[0] == ':' else ' ' + words}" in check(listeners)


def test_good_paths_have_no_problem() -> None:
    assert check(paths=[]) == ""
    assert check(paths=PATHS) == ""
    assert check([LISTENERS[0] | {"paths": PATHS}]) == ""
    assert check(paths=[{"prefix": "/~a/b.c/socket.io2", "timeout": "0.5"}, {"prefix": "/events2", "timeout": 0}]) == ""


def test_paths_have_the_settings_of_the_argument_specs() -> None:
    options = yaml.safe_load((ROLE / "meta" / "argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
    for described in (options["stickyring_edge_paths"], options["stickyring_edge_listeners"]["options"]["paths"]):
        types = {name: option["type"] for name, option in described["options"].items()}
        ranges = {name: type(low).__name__ for name, (low, _) in edge_variables.PATH_SETTINGS.items()}
        assert types == {"prefix": "str", **ranges}


def test_every_number_has_a_range_and_every_log_level_is_accepted() -> None:
    options = yaml.safe_load((ROLE / "meta" / "argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
    numbers = {name: option["type"] for name, option in options.items() if option["type"] in {"int", "float"}}
    ranges = {f"stickyring_edge_{name}": type(low).__name__ for name, (low, _) in edge_variables.RANGES.items()}
    assert ranges == numbers
    assert list(edge_variables.LOG_LEVELS) == options["stickyring_edge_log_level"]["choices"]


@pytest.mark.parametrize(
    ("seconds", "duration"), [(2, "2s"), ("2", "2s"), (60.0, "60s"), ("0.5", "0.5s"), (1e5, "100000s"), (0, "0s")]
)
def test_a_duration_is_the_same_for_every_spelling(seconds: float | str, duration: str) -> None:
    assert edge_routes.edge_duration(seconds) == duration


def test_metrics_have_a_port_of_their_own_for_those_who_read_them() -> None:
    assert check(metrics_port=9902, metrics_readers=["192.0.2.30", "2001:db8::/64"]) == ""
    assert "stickyring_edge_metrics_readers is empty, and so nobody" in check(metrics_port=9902, metrics_readers=[])
    port: dict[str, Any] = {"metrics_port": 9902}
    assert "stickyring_edge_metrics_readers: 'prometheus' of the group monitor" in check(
        metrics_readers=["prometheus"], **port
    )
    assert "stickyring_edge_metrics_readers is '192.0.2.30': give a list" in check(metrics_readers="192.0.2.30", **port)
    assert "stickyring_edge_metrics_port 902 is below 1024." in check(metrics_readers=["192.0.2.30"], metrics_port=902)
    assert "port 9002 on 0.0.0.0 has two listeners" in check(metrics_port=9002, metrics_readers=["192.0.2.30"])
    assert "listener stickyring-metrics: the name is used twice" in check(
        [LISTENERS[0] | {"name": "stickyring-metrics"}]
    )


@pytest.mark.parametrize(
    ("address", "place"),
    [("0.0.0.0", {"address": "0.0.0.0"}), ("::", {"address": "::", "ipv4_compat": True})],
)
def test_metrics_can_be_for_both_families(address: str, place: dict[str, Any]) -> None:
    metrics = {"port": 9902, "address": address, "readers": [], "admin_socket": "/x", "idle_timeout": "1s"}
    common = COMMON | {"metrics": metrics | {"headers_timeout": "1s"}}
    files = edge_resources.edge_files(LISTENERS, CLUSTERS, common, PEMS)
    assert files["listeners.json"][-1]["address"]["socket_address"] == place | {"port_value": 9902}


ACME: dict[str, Any] = LISTENERS[0] | {"tls": {"acme": ["chat.example.com"]}}
REDIRECT: dict[str, Any] = {"name": "http", "port": 80, "redirect_port": 443}


def check_acme(listener: dict[str, Any] = ACME, others: list[dict[str, Any]] | None = None, **settings: Any) -> str:
    pems = {
        "/account.pem": make_key(),
        "/chain.pem": "no key",
        "/ed25519.pem": private_pem(Ed25519PrivateKey.generate()),
    }
    given: dict[str, Any] = {
        f"acme_{name}": value for name, value in {"account_key": "/account.pem", "terms_agreed": True}.items()
    } | {f"acme_{name}": value for name, value in settings.items()}
    return check([listener, *([REDIRECT] if others is None else others)], pems=pems, **given)


def test_certificates_by_acme_have_no_problem() -> None:
    assert check_acme() == ""
    assert check_acme(directory="https://acme.example.com:14000/dir", contact="ops@example.com") == ""


@pytest.mark.parametrize(
    ("tls", "settings", "words"),
    [
        ({"key": "/account.pem"}, {}, "listener sticky: tls.key and tls.acme exclude each other."),
        (
            {"acme": "chat.example.com"},
            {},
            "listener sticky: tls.acme is 'chat.example.com': give a list of host names",
        ),
        ({"acme": []}, {}, "listener sticky: tls.acme is []: give a list of host names"),
        ({"acme": ["*.example.com"]}, {}, "tls.acme: '*.example.com' is no host name that an authority can check"),
        ({"acme": ["edge"]}, {}, "tls.acme: 'edge' is no host name"),
        ({"acme": ["a.example; reboot"]}, {}, "tls.acme: 'a.example; reboot' is no host name"),
        ({"acme": ["192.0.2.1 "]}, {}, "tls.acme: '192.0.2.1 ' is no host name"),
        ({}, {"others": []}, "tls.acme needs a listener with redirect_port, which users reach at port 80"),
        (
            {},
            {"directory": "http://acme.example.com"},
            "stickyring_edge_acme_directory is 'http://acme.example.com': give",
        ),
        ({}, {"contact": "a b"}, "stickyring_edge_acme_contact is 'a b': give an e-mail address"),
        ({}, {"terms_agreed": False}, "stickyring_edge_acme_terms_agreed is False: read the terms of service of https"),
        ({}, {"account_key": ""}, "stickyring_edge_acme_account_key is empty: make one with `openssl genpkey"),
        ({}, {"account_key": "account.pem"}, "stickyring_edge_acme_account_key account.pem is no absolute path"),
        ({}, {"account_key": "/none.pem"}, "stickyring_edge_acme_account_key /none.pem is no file on the controller"),
        ({}, {"account_key": "/chain.pem"}, "stickyring_edge_acme_account_key /chain.pem is no account key in PEM: "),
        ({}, {"account_key": "/ed25519.pem"}, "/ed25519.pem is no account key in PEM: it is no key on P-256 or P-384"),
    ],
)
def test_each_fault_of_acme_is_reported(tls: dict[str, Any], settings: dict[str, Any], words: str) -> None:
    assert words in check_acme(ACME | {"tls": ACME["tls"] | tls}, **settings)


EC_KEY = ec.generate_private_key(ec.SECP384R1())
GOOD_KEYS = [
    jwk(EC_KEY.public_key()),
    jwk(rsa.generate_private_key(65537, 2048).public_key(), kid="this year's", use="sig"),
    jwk(Ed25519PrivateKey.generate().public_key()),
]


def check_token(token: dict[str, Any], *keys: Any, **others: Any) -> str:
    listener = LISTENERS[0] | {"token": {"keys": "/keys.json"} | token} | others
    return check([listener], pems={"/keys.json": json.dumps({"keys": keys}), "/other.json": "[]"})


def test_tokens_have_no_problem() -> None:
    assert check_token({}, *GOOD_KEYS) == ""
    assert check_token({"query": "", "cookie": "login", "paths": ["/", "/ws/socket.io"]}, *GOOD_KEYS) == ""


@pytest.mark.parametrize(
    ("token", "keys", "others", "words"),
    [
        ({"keys": "keys.json"}, GOOD_KEYS, {}, "listener sticky: token.keys keys.json is no absolute path"),
        ({"keys": "/none.json"}, GOOD_KEYS, {}, "token.keys /none.json is no file on the controller."),
        ({"keys": "/other.json"}, GOOD_KEYS, {}, "token.keys /other.json is no JWK Set with keys"),
        ({}, [], {}, "token.keys /keys.json is no JWK Set with keys"),
        ({}, ["text"], {}, "token.keys /keys.json is no JWK Set with keys"),
        ({}, [GOOD_KEYS[0], jwk(EC_KEY)], {}, "token.keys /keys.json: key 2 is a private one"),
        (
            {},
            [{"kty": "oct", "k": "c2VjcmV0"}],
            {},
            "key 1 is symmetric: who can check tokens with it can sign",
        ),
        ({}, [jwk(rsa.generate_private_key(65537, 1024).public_key())], {}, "key 1 has 1024 bits: 2048 or more"),
        ({}, [GOOD_KEYS[0] | {"y": GOOD_KEYS[0]["x"]}], {}, "key 1 is not valid: there are RSA, EC on P-256"),
        ({}, [GOOD_KEYS[0] | {"crv": "secp256k1"}], {}, "key 1 is not valid"),
        ({}, [{"kty": "RSA"}], {}, "key 1 is not valid"),
        ({"query": "a b"}, GOOD_KEYS, {}, "token.query 'a b' is not letters, digits and _.~-"),
        ({"cookie": "a;b"}, GOOD_KEYS, {}, "token.cookie 'a;b' is not letters, digits and _.~-"),
        ({"paths": []}, GOOD_KEYS, {}, "token.paths is []: give a list"),
        ({"paths": ["/./socket.io"]}, GOOD_KEYS, {}, "token.paths: '/./socket.io' is no path such as /socket.io"),
        ({"paths": ["socket.io"]}, GOOD_KEYS, {}, "token.paths: 'socket.io' is no path such as /socket.io"),
        ({}, GOOD_KEYS, {"hash_policies": POLICIES}, "hash_policies and token exclude each other"),
        ({}, GOOD_KEYS, {"redirect_port": 443}, "token and redirect_port exclude each other"),
    ],
)
def test_each_fault_of_tokens_is_reported(
    token: dict[str, Any], keys: list[Any], others: dict[str, Any], words: str
) -> None:
    assert words in check_token(token, *keys, **others)


def test_the_thumbprint_of_an_account_is_that_of_the_rfc() -> None:
    """RFC 7638, section 3.1."""
    modulus = (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknj"
        "hMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQ"
        "vRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzK"
        "nqDKgw"
    )
    numbers = RSAPublicNumbers(65537, int.from_bytes(urlsafe_b64decode(modulus + "==")))
    assert certificates.jwk_thumbprint(numbers.public_key()) == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"


@pytest.mark.parametrize(
    ("listener", "cluster", "endpoint", "words"),
    [
        ({}, {"health_path": "ok"}, {}, "cluster nodes: health_path 'ok' is no path"),
        ({"name": "single"}, {}, {}, "listener single: the name is used twice"),
        ({"name": "a.b"}, {}, {}, "listener a.b: a name is letters"),
        ({"cluster": "none"}, {}, {}, "listener sticky: there is no cluster none"),
        ({"port": 9003}, {}, {}, "port 9003 on 0.0.0.0 has two listeners"),
        ({"port": 9003, "address": "::"}, {}, {}, "port 9003 on :: has two listeners"),
        ({"port": 0}, {}, {}, "listener sticky: port 0 is not from 1 to 65535"),
        ({"port": 65536}, {}, {}, "listener sticky: port 65536 is not from 1 to 65535"),
        ({"redirect_port": 443}, {}, {}, "listener sticky: cluster and redirect_port exclude each other"),
        ({"redirect_port": 443, "tls": {}}, {}, {}, "listener sticky: tls and redirect_port exclude each other"),
        ({"redirect_port": 443, "paths": []}, {}, {}, "listener sticky: paths and redirect_port exclude each other"),
        ({"redirect_port": 0}, {}, {}, "listener sticky: redirect_port is 0: give a whole number from 1 to 65535."),
        ({"proxy_protocol": "v2"}, {}, {}, "listener sticky: proxy_protocol is 'v2': give true or false."),
        (
            {"proxy_protocol": True},
            {},
            {},
            "listener sticky: proxy_protocol needs the proxies in stickyring_edge_trusted_proxies.",
        ),
        ({"address": "edge.example"}, {}, {}, "listener sticky: 'edge.example' is no IP address"),
        ({"tls": None}, {}, {}, "listener sticky: tls is empty: give certificate and key, or acme, or leave it out."),
        ({"tls": {}}, {}, {}, "listener sticky: tls is empty"),
        ({}, {"endpoints": []}, {}, "cluster nodes: the endpoint list is empty"),
        ({}, {"endpoints": ENDPOINTS * 700}, {}, "are more than Envoy's 8388608"),
        ({}, {}, {"name": "node2-1"}, "cluster nodes: endpoint node2-1 is listed twice"),
        ({}, {}, {"address": "192.0.2.2"}, "cluster nodes: 192.0.2.2:8001 is listed twice"),
        ({}, {}, {"address": "node1.example"}, "endpoint node1-1: 'node1.example' is no IP address"),
        ({}, {}, {"weight": 0}, "endpoint node1-1: the weight must be 1 or more"),
        ({}, {}, {"name": "nobody"}, "the endpoint name nobody is reserved"),
        ({"hash_policies": [{}]}, {}, {}, "listener sticky: a hash policy has one of query_parameter"),
        ({"hash_policies": [{"param": {"name": "x"}}]}, {}, {}, "got param"),
        ({"hash_policies": [{"header": {"header_name": "a)%b"}}]}, {}, {}, "header_name 'a)%b' is not letters"),
        ({"hash_policies": [{"header": {"name": "x-user"}}]}, {}, {}, "header needs header_name"),
        ({"hash_policies": [{"header": {"header_name": "u", "regex": 1}}]}, {}, {}, "header has no field regex"),
        (
            {"hash_policies": [{"cookie": {"name": "u", "ttl": "soon"}}]},
            {},
            {},
            "ttl 'soon' is not a number of seconds",
        ),
    ],
)
def test_each_fault_is_reported(
    listener: dict[str, Any], cluster: dict[str, Any], endpoint: dict[str, Any], words: str
) -> None:
    listeners, clusters = deepcopy(LISTENERS), deepcopy(CLUSTERS)
    listeners[0] |= listener
    clusters[0]["endpoints"][0] |= endpoint
    clusters[0] |= cluster
    assert words in check(listeners, clusters)


def test_spellings_of_one_address_count_as_the_same() -> None:
    endpoints = [
        {"name": "a", "address": "2001:db8::1", "port": 1},
        {"name": "b", "address": "2001:DB8:0::1", "port": 1},
    ]
    clusters = [{"name": "nodes", "endpoints": endpoints}]
    assert "cluster nodes: 2001:db8::1:1 is listed twice" in check([LISTENERS[0]], clusters)
    endpoints[1]["address"] = "2001:db8::2"
    assert check([LISTENERS[0]], clusters) == ""


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("other"))


def check_tls(chain: str | None, key: str | None, paths: dict[str, str] = TLS) -> str:
    texts = {"/tls/chain.pem": chain, "/tls/key.pem": key}
    pems = {path: text for path, text in texts.items() if text is not None}
    return check([LISTENERS[0] | {"tls": paths}], pems=pems)


def test_a_certificate_with_its_key_is_accepted(certificate: Certificate, other: Certificate) -> None:
    assert check_tls(certificate.chain, certificate.key) == ""
    assert check_tls(certificate.chain + other.chain, certificate.key) == ""


def test_each_fault_of_a_certificate_is_reported(certificate: Certificate, other: Certificate, tmp_path: Path) -> None:
    chain, key = certificate.chain, certificate.key
    expired = make_certificate(tmp_path, days=0)
    encrypted = load_pem_private_key(key.encode(), None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    where = "listener sticky: tls"
    said = {
        f"{where}.certificate /tls/chain.pem is no file on the controller.": check_tls(None, key),
        f"{where}.key /tls/key.pem is no file on the controller.": check_tls(chain, None),
        f"{where}.key key.pem is no absolute path on the controller.": check_tls(chain, key, TLS | {"key": "key.pem"}),
        f"{where}.certificate /tls/chain.pem has no certificate in PEM.": check_tls(key, key),
        f"{where}.key /tls/key.pem is no private key in PEM.": check_tls(chain, chain),
        f"{where}.key /tls/key.pem is encrypted; the server has no password for it.": check_tls(
            chain, encrypted.decode()
        ),
        f"{where}.key /tls/key.pem does not fit the first certificate of /tls/chain.pem, which must be the server's"
        " own.": check_tls(other.chain + chain, key),
    }
    assert list(said) == list(said.values())
    assert f"{where}.certificate /tls/chain.pem expired on 20" in check_tls(expired.chain, expired.key)


def test_edge_and_node_call_their_headers_the_same() -> None:
    read = {sessions.KEY_VARIABLE, sessions.CLUSTER_VARIABLE, sessions.ISSUED_VARIABLE, sessions.PROCESS_VARIABLE}
    read |= {forwarded.CLIENT_VARIABLE}
    written = {*edge_routes.NODE_HEADERS, edge_routes.ISSUED_HEADER}
    assert {f"HTTP_{name.upper().replace('-', '_')}" for name in written} == read
    assert f"- name: {takeover.ELSEWHERE_HEADER}\n" in (ROLE / "vars" / "main.yml").read_text()


def test_no_listener_is_a_fault() -> None:
    assert "stickyring_edge_listeners is empty" in check([])


def test_defaults_and_argument_specs_agree() -> None:
    defaults = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text())
    specs = yaml.safe_load((ROLE / "meta" / "argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
    assert {name: spec["default"] for name, spec in specs.items() if "default" in spec} == defaults
    required = {name for name, spec in specs.items() if spec.get("required")}
    # A default here would win over what the playbooks compose.
    assert set(specs) - set(defaults) == required | {
        "stickyring_edge_metrics_readers",
        "stickyring_edge_stopping_timeout",
    }
