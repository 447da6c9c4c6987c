"""Envoy resources of the edge, composed from the role's variables."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

Data = dict[str, Any]

TYPE = "type.googleapis.com/"
RING_POLICIES = ("RING_HASH", "MAGLEV")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
PARAMETER = re.compile(r"[A-Za-z0-9_.~-]+")
HASH_POLICIES = ("query_parameter", "header", "cookie", "connection_properties", "filter_state")
# The field of each kind of policy that names its source, and the other fields that it may have.
NAME_FIELDS = {"query_parameter": "name", "header": "header_name", "cookie": "name", "filter_state": "key"}
OTHER_FIELDS = {"cookie": {"ttl", "path", "attributes"}, "connection_properties": {"source_ip"}}
TTL = re.compile(r"[0-9]+s")
# Envoy's own upper bound for the points of one ring.
LARGEST_RING = 8 * 1024 * 1024
# Set by the edge only: the key that was hashed, the cluster whose ring it was hashed for, the client's address.
NODE_HEADERS = ("x-stickyring-key", "x-stickyring-cluster", "x-stickyring-client")
# Marks a request whose key the edge has generated.
ISSUED_HEADER = "x-stickyring-issued"
# Envoy's filter state in a request: the key as the client gave it, and the key that is hashed, logged and passed on.
GIVEN, KEY = "stickyring.given", "stickyring.key"
# A key is UTF-8 without control characters (C0, DEL, C1), and without a blank at either end, which headers would lose.
# Envoy matches byte by byte, hence the forms of UTF-8 (RFC 3629, section 4).
KEY_CHARACTER = (
    r"(?:[\x21-\x7e]|\xc2[\xa0-\xbf]|[\xc3-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}"
    r"|\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2})"
)
GOOD_KEY = f"{KEY_CHARACTER}(?: *{KEY_CHARACTER})*"
ANY_KEY = "(?s).+"
# In the form of Engine.IO's own errors, whose code 3 is a bad request.
BAD_KEY = json.dumps(
    {
        "code": 3,
        "message": "Bad request: a user id is UTF-8 without control characters, and no blank at either end",
    }
)
# Envoy's own default for the slots of a Maglev table.
MAGLEV_TABLE = 65537
# See _endpoints. Nothing listens at this address of the edge itself, so a request that meets it is retried at the next
# point of the ring.
NOBODY: Data = {"name": "nobody", "address": "127.0.0.1", "port": 1, "weight": 1}
SHA256 = re.compile(r"[0-9a-f]{64}")
PING_INTERVAL = 25
LOG_LEVELS = ("trace", "debug", "info", "warning", "error", "critical", "off")
# The lowest and the highest value of every variable that is a number; a float where fractions are meant.
RANGES: dict[str, tuple[float, float]] = {
    "ring_points_per_weight": (1, LARGEST_RING),
    "health_check_interval": (0.1, 3600.0),
    "health_check_jitter": (0.0, 3600.0),
    "health_check_timeout": (0.1, 3600.0),
    "health_check_unhealthy_threshold": (1, 1000),
    "health_check_healthy_threshold": (1, 1000),
    "route_timeout": (0.0, 86400.0),
    "request_timeout": (0.0, 86400.0),
    "request_headers_timeout": (0.0, 86400.0),
    "downstream_idle_timeout": (0.0, 86400.0),
    "connect_timeout": (0.1, 3600.0),
    "upstream_idle_timeout": (0.0, 86400.0),
    "upstream_user_timeout": (0.0, 3600.0),
    "upstream_keepalive_time": (1, 32767),
    "upstream_keepalive_interval": (1, 32767),
    "upstream_keepalive_probes": (1, 127),
    "circuit_breaker_max_connections": (1, 2**32 - 1),
    "circuit_breaker_max_requests": (1, 2**32 - 1),
    "circuit_breaker_max_pending_requests": (1, 2**32 - 1),
    "max_connections": (1, 2**29),
    "max_heap_mib": (64, 2**24),
    "limit_nofile": (1024, 2**30),
    "connection_buffer_kib": (1, 2**20),
    "max_request_body_bytes": (1, 2**32 - 1),
    "trusted_hops": (0, 100),
    "load_timeout": (1, 3600),
    "healthy_timeout": (0, 86400),
}


def _repeated(values: list[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _canonical(address: str) -> str:
    """The canonical spelling of an IP address; other text is returned unchanged."""
    return str(ipaddress.ip_address(address)) if _is_address(address) else address


def _range_problems(settings: Data) -> list[str]:
    """Numbers that are invalid or out of range; a number may be text, as from the command line and INI files."""
    problems = []
    for name, (low, high) in RANGES.items():
        value = settings[f"stickyring_edge_{name}"]
        whole = isinstance(low, int)
        fraction = "" if whole else r"(\.[0-9]+)?"
        if not re.fullmatch(rf"-?(0|[1-9][0-9]*){fraction}", str(value)) or not low <= float(value) <= high:
            kind = "whole number" if whole else "number"
            problems.append(f"stickyring_edge_{name} is {value!r}: give a {kind} from {low:.10g} to {high:.10g}.")
    return problems


def _text_problems(settings: Data, clusters: list[Data]) -> list[str]:
    """Lists, paths, levels and booleans that are something else: YAML reads an unquoted `off` as a boolean."""
    problems = []
    paths = settings["stickyring_edge_private_paths"]
    if not isinstance(paths, list):
        problems.append(f"stickyring_edge_private_paths is {paths!r}: give a list, [/metrics] for example.")
        paths = []
    checked = {"stickyring_edge_health_check_path": settings["stickyring_edge_health_check_path"]}
    checked |= {
        f"cluster {item['name']}: health_path": item["health_path"] for item in clusters if "health_path" in item
    }
    problems += [
        f"{where} {path!r} is no path: give / and visible ASCII characters."
        for where, path in [*checked.items(), *(("stickyring_edge_private_paths:", path) for path in paths)]
        if not re.fullmatch(r"/[!-~]*", str(path))
    ]
    level = settings["stickyring_edge_log_level"]
    if level not in LOG_LEVELS:
        problems.append(f"stickyring_edge_log_level is {level!r}: give one of {', '.join(LOG_LEVELS)}, in quotes.")
    for name in ("access_log", "may_end_websockets"):
        value = settings[f"stickyring_edge_{name}"]
        if str(value).lower() not in {"true", "false", "yes", "no", "on", "off", "1", "0"}:
            problems.append(f"stickyring_edge_{name} is {value!r}: give true or false.")
    return problems


def edge_duration(seconds: float | str) -> str:
    """Seconds in the notation of Envoy's google.protobuf.Duration, the same for a number and its text."""
    return f"{float(seconds):.9f}".rstrip("0").rstrip(".") + "s"


def _number_problems(settings: Data) -> list[str]:
    problems = []
    files, connections = (int(settings[f"stickyring_edge_{name}"]) for name in ("limit_nofile", "max_connections"))
    if files < 2 * connections:
        problems.append(
            f"stickyring_edge_limit_nofile {files} is too low: a websocket takes two descriptors, so"
            f" stickyring_edge_max_connections {connections} needs {2 * connections} or more."
        )
    if float(settings["stickyring_edge_route_timeout"]) <= PING_INTERVAL:
        problems.append(
            f"stickyring_edge_route_timeout {settings['stickyring_edge_route_timeout']} would end long polls: more than"
            f" {PING_INTERVAL}, the ping interval of Engine.IO, is needed."
        )
    return problems


def _place_problems(listeners: list[Data]) -> list[str]:
    problems = []
    places = [(_canonical(item.get("address", "0.0.0.0")), int(item["port"])) for item in listeners]
    for item, (address, port) in zip(listeners, places, strict=True):
        where = f"listener {item['name']}"
        if not 1024 <= port <= 65535:
            problems.append(f"{where}: port {port} is not from 1024 to 65535; Envoy has no privilege for lower ports.")
        if not _is_address(address):
            problems.append(f"{where}: {address!r} is no IP address, and Envoy resolves no names here.")
    return problems + [f"port {port} on {address} has two listeners." for address, port in _repeated(places)]


def edge_pem_paths(listeners: list[Data]) -> list[str]:
    """Paths on the controller of the certificates and keys of all listeners, each once."""
    paths = [item["tls"][kind] for item in listeners if item.get("tls") for kind in ("certificate", "key")]
    return list(dict.fromkeys(paths))


def _tls_problems(item: Data, pems: dict[str, str]) -> list[str]:
    """What is wrong with the certificate and the key of a listener; ``pems`` has the text of each file that exists."""
    tls = item["tls"]
    where = f"listener {item['name']}"
    if not tls:
        return [f"{where}: tls is empty: give certificate and key, or leave it out."]
    problems = []
    for kind in ("certificate", "key"):
        if not PurePath(tls[kind]).is_absolute():
            problems.append(f"{where}: tls.{kind} {tls[kind]} is no absolute path on the controller.")
        elif tls[kind] not in pems:
            problems.append(f"{where}: tls.{kind} {tls[kind]} is no file on the controller.")
    if problems:
        return problems
    try:
        certificate = x509.load_pem_x509_certificates(pems[tls["certificate"]].encode())[0]
    except ValueError:
        return [f"{where}: tls.certificate {tls['certificate']} has no certificate in PEM."]
    if certificate.not_valid_after_utc < datetime.now(UTC):
        problems.append(
            f"{where}: tls.certificate {tls['certificate']} expired on {certificate.not_valid_after_utc:%F}."
        )
    try:
        key = load_pem_private_key(pems[tls["key"]].encode(), password=None)
    except TypeError:
        return [*problems, f"{where}: tls.key {tls['key']} is encrypted; Envoy has no password for it."]
    except ValueError:
        return [*problems, f"{where}: tls.key {tls['key']} is no private key in PEM."]
    public = (
        one.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        for one in (certificate.public_key(), key.public_key())
    )
    if len(set(public)) > 1:
        problems.append(
            f"{where}: tls.key {tls['key']} does not fit the first certificate of {tls['certificate']}, which must be"
            " the server's own."
        )
    return problems


def edge_problems(settings: Data, pems: dict[str, str], sha256: str | None = None) -> list[str]:
    """What is wrong with the edge's variables, one sentence each; empty when nothing is.

    ``settings`` has the variables to check by their names, typed as the role's argument_specs say. ``pems`` has the
    text of each file of edge_pem_paths that exists. ``sha256`` is checked if it is known; before the run has built
    the binary, it is None.
    """
    listeners: list[Data] = settings["stickyring_edge_listeners"]
    clusters: list[Data] = settings["stickyring_edge_clusters"]
    hash_policies: list[Data] = settings["stickyring_edge_hash_policies"]
    # The checks below calculate with these values.
    if problems := _range_problems(settings) + _text_problems(settings, clusters):
        return problems
    points = int(settings["stickyring_edge_ring_points_per_weight"])
    problems = _number_problems(settings)
    if sha256 is not None and not SHA256.fullmatch(sha256):
        problems.append(f"stickyring_edge_envoy_sha256 {sha256!r} is not 64 hexadecimal digits in lower case.")
    for kind, items in (("listener", listeners), ("cluster", clusters)):
        names = [item["name"] for item in items]
        problems += [f"{kind} {name}: the name is used twice." for name in _repeated(names)]
        problems += [
            f"{kind} {name}: a name is letters, digits, _ and -." for name in names if not NAME.fullmatch(name)
        ]
    if not listeners:
        problems.append("stickyring_edge_listeners is empty: the edge would listen nowhere.")
    problems += _place_problems(listeners)
    known = {item["name"] for item in clusters}
    problems += [
        f"listener {item['name']}: there is no cluster {item['cluster']} in stickyring_edge_clusters."
        for item in listeners
        if item["cluster"] not in known
    ]
    problems += [problem for item in listeners if "tls" in item for problem in _tls_problems(item, pems)]
    for cluster in clusters:
        endpoints = cluster["endpoints"]
        where = f"cluster {cluster['name']}"
        if not endpoints:
            problems.append(f"{where}: the endpoint list is empty, so the edge would refuse every user.")
        if any(endpoint["name"] == NOBODY["name"] for endpoint in endpoints):
            problems.append(f"{where}: the endpoint name {NOBODY['name']} is reserved.")
        problems += [f"{where}: endpoint {name} is listed twice." for name in _repeated([e["name"] for e in endpoints])]
        problems += [
            f"{where}: {address}:{port} is listed twice."
            for address, port in _repeated([(_canonical(e["address"]), int(e["port"])) for e in endpoints])
        ]
        problems += [
            f"{where}: endpoint {e['name']}: {e['address']!r} is no IP address, and Envoy resolves no names here."
            for e in endpoints
            if not _is_address(e["address"])
        ]
        problems += [
            f"{where}: endpoint {e['name']}: the weight must be 1 or more."
            for e in endpoints
            if int(e.get("weight", 1)) < 1
        ]
        weight = sum(int(endpoint.get("weight", 1)) for endpoint in endpoints)
        if _policy(cluster) == "RING_HASH" and points * weight + NOBODY["weight"] > LARGEST_RING:
            problems.append(
                f"{where}: {points} points for each of {weight} units of weight, and one for {NOBODY['name']}, are more"
                f" than Envoy's {LARGEST_RING}; lower stickyring_edge_ring_points_per_weight."
            )
    lists = {"stickyring_edge_hash_policies": hash_policies}
    lists |= {f"listener {item['name']}": item.get("hash_policies") or [] for item in listeners}
    problems += [
        problem for where, policies in lists.items() for one in policies for problem in _policy_problems(where, one)
    ]
    return problems


def _policy_problems(where: str, policy: Data) -> list[str]:
    kinds = [key for key in policy if key != "terminal"]
    if len(kinds) != 1 or kinds[0] not in HASH_POLICIES:
        return [f"{where}: a hash policy has one of {', '.join(HASH_POLICIES)}; got {', '.join(kinds) or 'none'}."]
    (kind,) = kinds
    settings, needed = policy[kind], NAME_FIELDS.get(kind)
    unknown = sorted(settings.keys() - {needed} - OTHER_FIELDS.get(kind, set()))
    problems = [f"{where}: the hash policy {kind} has no field {field}." for field in unknown]
    if needed and not settings.get(needed):
        problems.append(f"{where}: the hash policy {kind} needs {needed}.")
    elif needed and not PARAMETER.fullmatch(settings[needed]):
        problems.append(f"{where}: the hash policy's {needed} {settings[needed]!r} is not letters, digits and _.~-")
    if not TTL.fullmatch(str(settings.get("ttl", "0s"))):
        problems.append(f"{where}: the cookie's ttl {settings['ttl']!r} is not a number of seconds such as 3600s.")
    return problems


def _config_source(directory: str, path: str) -> Data:
    folder = f"{directory}/{path}".rpartition("/")[0]
    return {
        "resource_api_version": "V3",
        "path_config_source": {"path": f"{directory}/{path}", "watched_directory": {"path": folder}},
    }


def _listener(item: Data, common: Data) -> Data:
    manager = {
        **common["http_connection_manager"],
        "stat_prefix": item["name"],
        "rds": {
            "route_config_name": item["name"],
            "config_source": _config_source(common["directory"], f"routes/{item['name']}.json"),
        },
    }
    chain: Data = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    if item.get("tls"):
        chain |= _tls(item, common)
    return {
        "@type": TYPE + "envoy.config.listener.v3.Listener",
        "name": item["name"],
        "address": {"socket_address": {"address": item.get("address", "0.0.0.0"), "port_value": int(item["port"])}},
        **common["listener"],
        "filter_chains": [chain],
    }


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


def _certificate(item: Data, pems: dict[str, str]) -> Data:
    """The secret of a listener without its private key, which edge_private_keys returns."""
    return {
        "@type": TYPE + "envoy.extensions.transport_sockets.tls.v3.Secret",
        "name": item["name"],
        "tls_certificate": {"certificate_chain": {"inline_string": pems[item["tls"]["certificate"]]}},
    }


def edge_private_keys(listeners: list[Data], pems: dict[str, str]) -> dict[str, str]:
    """Path to private key, for each file of edge_files that needs one."""
    return {_certificate_path(item): pems[item["tls"]["key"]] for item in listeners if item.get("tls")}


def _given(policy: Data) -> str:
    """Envoy's substitution for the decoded value that a hash policy reads; empty if a request has none."""
    if "query_parameter" in policy:
        return f"%QUERY_PARAM({policy['query_parameter']['name']})%"
    if "header" in policy:
        return f"%REQ({policy['header']['header_name']})%"
    if "cookie" in policy:
        # Where the filter `stickyring.cookies` has put it.
        return f"%DYNAMIC_METADATA(stickyring.cookie:{policy['cookie']['name']})%"
    if "filter_state" in policy:
        return f"%FILTER_STATE({policy['filter_state']['key']}:PLAIN)%"
    return "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"


def _key_filters(policies: list[Data]) -> Data:
    """Per-route settings of the filters that find the key of a request, before the route is chosen by it.

    They are in the routes because a changed listener would drop its WebSockets.
    """

    def kept(key: str, factory: str, value: str) -> Data:
        text = {"text_format_source": {"inline_string": value}, "omit_empty_values": True}
        return {"object_key": key, "factory_key": factory, "skip_if_empty": True, "format_string": text}

    # A request without a key gets a cookie, so policies after the cookie never apply.
    issued = _issued_cookie(policies)
    asked = policies[: [policy.get("cookie") for policy in policies].index(issued) + 1] if issued else policies
    # Later values overwrite earlier ones, so the first policy comes last.
    values = [kept(GIVEN, "envoy.string", _given(policy)) for policy in reversed(asked)]
    if issued:
        # Random for each request, not for each connection.
        values.append(kept(KEY, "envoy.hashable_string", "%UNIQUE_ID%"))
    values.append(kept(KEY, "envoy.hashable_string", f"%FILTER_STATE({GIVEN}:PLAIN)%"))
    rules = [
        {"cookie": name, "on_header_present": {"metadata_namespace": "stickyring.cookie", "key": name}}
        for name in (policy["cookie"]["name"] for policy in asked if "cookie" in policy)
    ]
    settings = {
        "stickyring.key": {
            "@type": TYPE + "envoy.extensions.filters.http.set_filter_state.v3.Config",
            "on_request_headers": values,
        }
    }
    if rules:
        settings["stickyring.cookies"] = {
            "@type": TYPE + "envoy.extensions.filters.http.header_to_metadata.v3.Config",
            "request_rules": rules,
        }
    return settings


def _issued_cookie(policies: list[Data]) -> Data | None:
    """The cookie for clients that give no key: the first one with a ttl, as in Envoy's own hash policies."""
    return next((policy["cookie"] for policy in policies if "ttl" in policy.get("cookie", {})), None)


def _set_cookie(cookie: Data, *, secure: bool) -> Data:
    """The response header that gives a client its generated key."""
    seconds = int(cookie["ttl"].removesuffix("s"))
    attributes = [
        f"{one['name']}={one['value']}" if one.get("value") else one["name"] for one in cookie.get("attributes", [])
    ]
    parts = [
        f"{cookie['name']}=%FILTER_STATE({KEY}:PLAIN)%",
        *([f"Max-Age={seconds}"] if seconds else []),
        *([f"Path={cookie['path']}"] if cookie.get("path") else []),
        *(["Secure"] if secure and not any(one.lower() == "secure" for one in attributes) else []),
        "HttpOnly",
        *attributes,
    ]
    return {"header": {"key": "set-cookie", "value": "; ".join(parts)}, "append_action": "APPEND_IF_EXISTS_OR_ADD"}


def _routes(item: Data, common: Data) -> Data:
    policies: list[Data] = item["hash_policies"] if "hash_policies" in item else common["hash_policies"]
    resource = {
        "@type": TYPE + "envoy.config.route.v3.RouteConfiguration",
        "name": item["name"],
        **common["route_configuration"],
    }
    # Headers from the client are removed before a route adds its own.
    resource["most_specific_header_mutations_wins"] = True
    resource["request_headers_to_remove"] = [*NODE_HEADERS, ISSUED_HEADER]
    resource["request_headers_to_add"] = [
        {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
        for name, value in zip(
            NODE_HEADERS,
            (f"%FILTER_STATE({KEY}:PLAIN)%", item["cluster"], "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"),
            strict=True,
        )
    ]
    private = [{"match": {"path": path}, "direct_response": {"status": 404}} for path in common["private_paths"]]
    # A retry sends the whole body again. Envoy's own limit is the connection's buffer, far below the allowed body size.
    everything = {
        "match": {"prefix": "/"},
        "route": {"cluster": item["cluster"], **common["route"]},
        "request_body_buffer_limit": common["largest_body"],
    }
    routes = [everything]
    if policies:
        resource["typed_per_filter_config"] = _key_filters(policies)
        everything["route"]["hash_policy"] = [{"filter_state": {"key": KEY}}]
        cookie = _issued_cookie(policies)
        added: Data = {}
        if cookie:
            added["request_headers_to_add"] = [{"header": {"key": ISSUED_HEADER, "value": "1"}}]
            added["response_headers_to_add"] = [_set_cookie(cookie, secure="tls" in item)]
        routes = [
            {**everything, "match": _with_key(GOOD_KEY)},
            {"match": _with_key(ANY_KEY), "direct_response": {"status": 400, "body": {"inline_string": BAD_KEY}}},
            {**everything, **added},
        ]
    resource["virtual_hosts"] = [{"name": item["name"], "domains": ["*"], "routes": [*private, *routes]}]
    return resource


def _with_key(regex: str) -> Data:
    return {"prefix": "/", "filter_state": [{"key": GIVEN, "string_match": {"safe_regex": {"regex": regex}}}]}


def _endpoints_path(cluster: Data, common: Data) -> str:
    """The path of a cluster's endpoints file, which depends on its members.

    A new path makes Envoy load the changed members with the cluster, and use them once it has checked them all.
    Under the old path, Envoy would use them at once: a member at a new address would be off the ring until it has
    passed a check, and its users would move to other nodes.
    """
    members = json.dumps(_endpoints(cluster, common), sort_keys=True)
    return f"endpoints/{cluster['name']}-{hashlib.sha256(members.encode()).hexdigest()[:12]}.json"


def _policy(cluster: Data) -> str:
    return str(cluster.get("lb_policy", "RING_HASH"))


def _cluster(cluster: Data, common: Data) -> Data:
    policy = _policy(cluster)
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


def _endpoints(cluster: Data, common: Data) -> Data:
    """The endpoints of a cluster; on a ring, a weight is the number of points.

    Envoy gives the lightest endpoint a whole number of points, one for minimum_ring_size 1, and the others points in
    proportion to their weight. With NOBODY as the lightest endpoint, which is always healthy, a node's points do not
    depend on which other nodes exist or are healthy, except for one point of rounding with unequal weights. So a node
    that fails moves only its own users, which Envoy alone cannot do (issue 22558).
    """
    endpoints = cluster["endpoints"]
    if _policy(cluster) != "RING_HASH":
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


def edge_files(
    listeners: list[Data], clusters: list[Data], common: Data, pems: dict[str, str]
) -> dict[str, list[Data]]:
    """Path of each filesystem xDS file, below its directory, to the resources in it, without private keys.

    Envoy reads only one route configuration, endpoint list or secret from a file, hence a file for each listener and
    cluster. ``common`` is what the role's vars/main.yml composes, ``pems`` has the texts of edge_pem_paths.
    """
    files: dict[str, list[Data]] = {"clusters.json": [_cluster(item, common) for item in clusters]}
    files |= {_endpoints_path(item, common): [_endpoints(item, common)] for item in clusters}
    files |= {f"routes/{item['name']}.json": [_routes(item, common)] for item in listeners}
    files |= {_certificate_path(item): [_certificate(item, pems)] for item in listeners if item.get("tls")}
    files["listeners.json"] = [_listener(item, common) for item in listeners]
    return files


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
    if _policy(cluster) not in RING_POLICIES:
        return {}
    members = [
        {"name": item["endpoint"]["hostname"], "weight": item["load_balancing_weight"]}
        for item in _endpoints(cluster, common)["endpoints"][0]["lb_endpoints"]
    ]
    return _ring_document(_cluster(cluster, common), members)


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
            "edge_pem_paths": edge_pem_paths,
            "edge_private_keys": edge_private_keys,
            "edge_problems": edge_problems,
            "edge_duration": edge_duration,
            "edge_files": edge_files,
            "edge_rekeyed": edge_rekeyed,
            "edge_served_ring": edge_served_ring,
            "edge_wanted_ring": edge_wanted_ring,
        }
