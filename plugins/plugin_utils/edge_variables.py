"""Checks of the edge's variables."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from pathlib import PurePath
from typing import Any

from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.stickyring.fleet.plugins.module_utils.host import FIRST_FREE_PORT
from ansible_collections.stickyring.fleet.plugins.plugin_utils.addresses import is_address, network
from ansible_collections.stickyring.fleet.plugins.plugin_utils.certificates import (
    acme_thumbprint,
    certificate_problems,
)
from ansible_collections.stickyring.fleet.plugins.plugin_utils.edge_resources import (
    LARGEST_RING,
    METRICS,
    NOBODY,
    edge_acme_listeners,
    policy_of,
    takes_proxy_protocol,
)
from ansible_collections.stickyring.fleet.plugins.plugin_utils.edge_routes import SOCKET_IO, token_places
from ansible_collections.stickyring.fleet.plugins.plugin_utils.tokens import token_key_problems

Data = dict[str, Any]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
PARAMETER = re.compile(r"[A-Za-z0-9_.~-]+")
HASH_POLICIES = ("query_parameter", "header", "cookie", "connection_properties", "filter_state")
# The field of each kind of policy that names its source, and the other fields that it may have.
NAME_FIELDS = {"query_parameter": "name", "header": "header_name", "cookie": "name", "filter_state": "key"}
OTHER_FIELDS = {"cookie": {"ttl", "path", "attributes"}, "connection_properties": {"source_ip"}}
TTL = re.compile(r"[0-9]+s")
SHA256 = re.compile(r"[0-9a-f]{64}")
PING_INTERVAL = 25
PREFIX = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:@-]+)+")
# What a path may set, with the lowest and the highest value.
PATH_SETTINGS: dict[str, tuple[float, float]] = {"timeout": (0.0, 86400.0), "body_limit": (1, 2**32 - 1)}
# Host names that an ACME challenge over HTTP can be for: with a dot, and without a wildcard.
HOST_NAME = re.compile(r"(?=.{1,253}\Z)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.I)
MAKE_ACCOUNT_KEY = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out PATH"
# RFC 6797, section 6.1.
HSTS = re.compile(r"max-age=[0-9]+(; includeSubDomains)?(; preload)?")
# What str(value) of a boolean may be, in any case.
BOOLEANS = {"true", "false", "yes", "no", "on", "off", "1", "0"}
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
    "handshakes_per_second": (0, 2**32 - 1),
    "handshakes_burst": (1, 2**32 - 1),
    "metrics_port": (0, 65535),
    "reconnects_per_second": (0.1, 10000.0),
    "leaving_timeout": (1, 86400),
    "stopping_timeout": (0, 3600),
    "load_timeout": (1, 3600),
    "healthy_timeout": (0, 86400),
}


def _repeated(values: list[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _canonical(address: str) -> str:
    """The canonical spelling of an IP address; other text is returned unchanged."""
    return str(ipaddress.ip_address(address)) if is_address(address) else address


def _range_problems(settings: Data) -> list[str]:
    """Numbers that are invalid or out of range; a number may be text, as from the command line and INI files."""
    problems = []
    for name, (low, high) in RANGES.items():
        problems += _range_problem(f"stickyring_edge_{name}", settings[f"stickyring_edge_{name}"], low, high)
    return problems


def _range_problem(where: str, value: object, low: float, high: float) -> list[str]:
    whole = isinstance(low, int)
    fraction = "" if whole else r"(\.[0-9]+)?"
    if re.fullmatch(rf"-?(0|[1-9][0-9]*){fraction}", str(value)) and low <= float(str(value)) <= high:
        return []
    kind = "whole number" if whole else "number"
    return [f"{where} is {value!r}: give a {kind} from {low:.10g} to {high:.10g}."]


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
    for name in ("access_log", "handshakes_enforced", "may_end_websockets"):
        value = settings[f"stickyring_edge_{name}"]
        if str(value).lower() not in BOOLEANS:
            problems.append(f"stickyring_edge_{name} is {value!r}: give true or false.")
    hsts = settings["stickyring_edge_hsts"]
    if hsts and not HSTS.fullmatch(str(hsts)):
        problems.append(
            f"stickyring_edge_hsts is {hsts!r}: give max-age=SECONDS, with `; includeSubDomains` and `; preload` behind"
            " it if you want these, or an empty text for none."
        )
    return problems


def _proxy_problems(proxies: object) -> list[str]:
    """What is wrong with the list of trusted proxies."""
    where = "stickyring_edge_trusted_proxies"
    if not isinstance(proxies, list):
        return [f"{where} is {proxies!r}: give a list, [192.0.2.0/24] for example."]
    networks = [network(proxy) for proxy in proxies]
    problems = [
        f"{where}: {proxy!r} is no IP address and no network such as 192.0.2.0/24 or 2001:db8::/32."
        for proxy, found in zip(proxies, networks, strict=True)
        if found is None
    ]
    problems += [f"{where}: {one} is everybody; name the proxies." for one in networks if one and not one.prefixlen]
    return problems + [f"{where}: {one} is listed twice." for one in _repeated([one for one in networks if one])]


def _target_problems(item: Data, clusters: set[str], proxies: list[Any]) -> list[str]:
    """What is wrong with where a listener leads, and with who may connect to it."""
    where = f"listener {item['name']}"
    problems = []
    if "redirect_port" in item:
        problems += _range_problem(f"{where}: redirect_port", item["redirect_port"], 1, 65535)
        problems += [
            f"{where}: {key} and redirect_port exclude each other: it only redirects to https."
            for key in ("cluster", "tls", "hash_policies", "paths", "token")
            if key in item
        ]
    elif "cluster" not in item:
        problems.append(f"{where}: give a cluster, or a redirect_port.")
    elif item["cluster"] not in clusters:
        problems.append(f"{where}: there is no cluster {item['cluster']} in stickyring_edge_clusters.")
    if str(item.get("proxy_protocol", False)).lower() not in BOOLEANS:
        problems.append(f"{where}: proxy_protocol is {item['proxy_protocol']!r}: give true or false.")
    elif takes_proxy_protocol(item) and not proxies:
        problems.append(f"{where}: proxy_protocol needs the proxies in stickyring_edge_trusted_proxies.")
    return problems


def _is_prefix(path: str) -> bool:
    """Whether a path can begin that of a request, which Envoy normalizes."""
    return bool(PREFIX.fullmatch(path)) and not {".", ".."} & {*path.split("/")}


def _path_problems(where: str, paths: object) -> list[str]:
    """What is wrong with the settings of single paths."""
    if not isinstance(paths, list) or not all(isinstance(path, dict) and "prefix" in path for path in paths):
        return [f"{where} is {paths!r}: give a list such as [{{prefix: /events, timeout: 0}}]."]
    problems = [f"{where}: {prefix} is listed twice." for prefix in _repeated([str(path["prefix"]) for path in paths])]
    for path in paths:
        prefix = str(path["prefix"])
        parts = prefix.split("/")
        if prefix == "/":
            problems.append(
                f"{where}: / would cover Socket.IO. For all paths, there are stickyring_edge_route_timeout and"
                " stickyring_edge_max_request_body_bytes."
            )
        elif SOCKET_IO in parts:
            problems.append(
                f"{where}: {prefix} is a path of Socket.IO, which has the settings stickyring_edge_route_timeout and"
                " stickyring_edge_max_request_body_bytes."
            )
        elif not _is_prefix(prefix):
            problems.append(
                f"{where}: {prefix!r} is no prefix: give a path such as /upload, in letters, digits and"
                " -._~!$&'()*+,;=:@, without a slash at its end."
            )
        problems += [
            f"{where}: {prefix} has no setting {key}; there are {' and '.join(PATH_SETTINGS)}."
            for key in sorted(map(str, path.keys() - {"prefix", *PATH_SETTINGS}))
        ]
        if not path.keys() & PATH_SETTINGS:
            problems.append(f"{where}: {prefix} sets nothing: give {' or '.join(PATH_SETTINGS)}.")
        for key, (low, high) in PATH_SETTINGS.items():
            if key in path:
                problems += _range_problem(f"{where}: {prefix}: {key}", path[key], low, high)
    return problems


def _number_problems(settings: Data) -> list[str]:
    problems = []
    files, connections = (int(settings[f"stickyring_edge_{name}"]) for name in ("limit_nofile", "max_connections"))
    if files < 2 * connections:
        problems.append(
            f"stickyring_edge_limit_nofile {files} is too low: a websocket takes two descriptors, so"
            f" stickyring_edge_max_connections {connections} needs {2 * connections} or more. Raise it, or lower"
            f" stickyring_edge_max_connections to {files // 2}."
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
    both = {port for address, port in places if address == "::"}
    places = [("::" if address == "0.0.0.0" and port in both else address, port) for address, port in places]
    for item, (address, port) in zip(listeners, places, strict=True):
        where = f"listener {item['name']}"
        if not 1 <= port <= 65535:
            problems.append(f"{where}: port {port} is not from 1 to 65535.")
        if not is_address(address):
            problems.append(f"{where}: {address!r} is no IP address, and Envoy resolves no names here.")
    return problems + [f"port {port} on {address} has two listeners." for address, port in _repeated(places)]


def _metrics_problems(settings: Data) -> list[str]:
    """What is wrong with who reads Envoy's metrics."""
    where, readers = "stickyring_edge_metrics_readers", settings.get("stickyring_edge_metrics_readers") or []
    if not isinstance(readers, list):
        return [f"{where} is {readers!r}: give a list, [192.0.2.30] for example."]
    if 0 < int(settings["stickyring_edge_metrics_port"]) < FIRST_FREE_PORT:
        return [f"stickyring_edge_metrics_port {settings['stickyring_edge_metrics_port']} is below {FIRST_FREE_PORT}."]
    if int(settings["stickyring_edge_metrics_port"]) and not readers:
        return [f"{where} is empty, and so nobody could read at stickyring_edge_metrics_port: name your Prometheus."]
    return [
        f"{where}: {one!r} of the group monitor, or named there, is no IP address and no network."
        for one in readers
        if network(one) is None
    ]


def _tls_problems(item: Data, pems: dict[str, str]) -> list[str]:
    """What is wrong with the certificate and the key of a listener; ``pems`` has the text of each file that exists."""
    where, tls = f"listener {item['name']}", item["tls"]
    if not tls:
        return [f"{where}: tls is empty: give certificate and key, or acme, or leave it out."]
    if "acme" not in tls:
        missing = [kind for kind in ("certificate", "key") if kind not in tls]
        problems = [f"{where}: tls.{kind} is missing." for kind in missing]
        return problems or certificate_problems(f"{where}: tls.", tls, pems)
    problems = [
        f"{where}: tls.{kind} and tls.acme exclude each other." for kind in ("certificate", "key") if kind in tls
    ]
    names = tls["acme"]
    if not isinstance(names, list) or not names:
        return [
            *problems,
            f"{where}: tls.acme is {names!r}: give a list of host names, [chat.example.com] for example.",
        ]
    return problems + [
        f"{where}: tls.acme: {name!r} is no host name that an authority can check over HTTP, such as chat.example.com."
        for name in names
        if not HOST_NAME.fullmatch(str(name))
    ]


def _token_problems(item: Data, texts: dict[str, str]) -> list[str]:
    """What is wrong with how a listener takes users' tokens; ``texts`` has the text of each file that exists."""
    where, token = f"listener {item['name']}", item["token"]
    if not token or "keys" not in token:
        return [f"{where}: token.keys is missing: give the path of a JWK Set, or leave token out."]
    problems = token_key_problems(f"{where}: token.keys", token["keys"], texts)
    if "hash_policies" in item:
        problems.append(f"{where}: hash_policies and token exclude each other: the token's subject is the user's key.")
    places = token_places(token)
    problems += [
        f"{where}: token.{kind} {places[kind]!r} is not letters, digits and _.~-"
        for kind in ("query", "cookie")
        if places[kind] and not PARAMETER.fullmatch(str(places[kind]))
    ]
    if not isinstance(places["paths"], list) or not places["paths"]:
        problems.append(f"{where}: token.paths is {places['paths']!r}: give a list, [/{SOCKET_IO}] for example.")
        return problems
    return problems + [
        f"{where}: token.paths: {path!r} is no path such as /{SOCKET_IO}, and not /, which is for all."
        for path in places["paths"]
        if path != "/" and not _is_prefix(str(path))
    ]


def _acme_problems(settings: Data, pems: dict[str, str]) -> list[str]:
    """What is wrong with the settings of ACME, if a listener needs them."""
    listeners: list[Data] = settings["stickyring_edge_listeners"]
    if not edge_acme_listeners(listeners):
        return []
    directory, path, contact, agreed = (
        str(settings[f"stickyring_edge_acme_{name}"])
        for name in ("directory", "account_key", "contact", "terms_agreed")
    )
    problems = []
    if not any("redirect_port" in item for item in listeners):
        problems.append(
            "tls.acme needs a listener with redirect_port, which users reach at port 80: the authority asks there."
        )
    if not re.fullmatch(r"https://[!-~]+", directory):
        problems.append(f"stickyring_edge_acme_directory is {directory!r}: give the https URL of the directory.")
    if not re.fullmatch(r"([!-~]+@[!-~]+)?", contact):
        problems.append(f"stickyring_edge_acme_contact is {contact!r}: give an e-mail address, or an empty text.")
    if not boolean(agreed, strict=False):
        problems.append(
            f"stickyring_edge_acme_terms_agreed is {agreed}: read the terms of service of {directory}, and set it to"
            " true."
        )
    where = "stickyring_edge_acme_account_key"
    if not path:
        problems.append(f"{where} is empty: make one with `{MAKE_ACCOUNT_KEY}`, and give its path.")
    elif not PurePath(path).is_absolute():
        problems.append(f"{where} {path} is no absolute path on the controller.")
    elif path not in pems:
        problems.append(f"{where} {path} is no file on the controller: make one with `{MAKE_ACCOUNT_KEY}`.")
    else:
        try:
            acme_thumbprint(pems[path])
        except ValueError as error:
            problems.append(f"{where} {path} is no account key in PEM: {error}.")
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
    proxies = settings["stickyring_edge_trusted_proxies"]
    if problems := _range_problems(settings) + _text_problems(settings, clusters) + _proxy_problems(proxies):
        return problems
    points = int(settings["stickyring_edge_ring_points_per_weight"])
    problems = _number_problems(settings)
    if sha256 is not None and not SHA256.fullmatch(sha256):
        problems.append(f"stickyring_edge_envoy_sha256 {sha256!r} is not 64 hexadecimal digits in lower case.")
    metrics = {
        "name": METRICS,
        "port": settings["stickyring_edge_metrics_port"],
        "address": settings["stickyring_edge_metrics_address"],
    }
    for kind, items in (("listener", listeners), ("cluster", clusters)):
        names = [METRICS, *(item["name"] for item in items)]
        problems += [f"{kind} {name}: the name is used twice." for name in _repeated(names)]
        problems += [
            f"{kind} {name}: a name is letters, digits, _ and -." for name in names if not NAME.fullmatch(name)
        ]
    if not listeners:
        problems.append("stickyring_edge_listeners is empty: the edge would listen nowhere.")
    problems += _place_problems([*listeners, metrics] if int(metrics["port"]) else listeners)
    problems += _metrics_problems(settings)
    known = {item["name"] for item in clusters}
    problems += [problem for item in listeners for problem in _target_problems(item, known, proxies)]
    problems += [problem for item in listeners if "tls" in item for problem in _tls_problems(item, pems)]
    problems += [problem for item in listeners if "token" in item for problem in _token_problems(item, pems)]
    problems += _acme_problems(settings, pems)
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
            if not is_address(e["address"])
        ]
        problems += [
            f"{where}: endpoint {e['name']}: the weight must be 1 or more."
            for e in endpoints
            if int(e.get("weight", 1)) < 1
        ]
        weight = sum(int(endpoint.get("weight", 1)) for endpoint in endpoints)
        if policy_of(cluster) == "RING_HASH" and points * weight + NOBODY["weight"] > LARGEST_RING:
            problems.append(
                f"{where}: {points} points for each of {weight} units of weight, and one for {NOBODY['name']}, are more"
                f" than Envoy's {LARGEST_RING}; lower stickyring_edge_ring_points_per_weight."
            )
    problems += _path_problems("stickyring_edge_paths", settings["stickyring_edge_paths"])
    problems += [
        problem
        for item in listeners
        if "paths" in item
        for problem in _path_problems(f"listener {item['name']}: paths", item["paths"])
    ]
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
