"""The effective state of the edge: what Envoy has loaded, where it listens and what it logs."""

import asyncio
import json
import re
import time
from http.client import HTTPConnection
from itertools import count
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import socketio
from environment import ADMIN_SOCKET
from testinfra.host import Host
from xxhash import xxh64_intdigest

testinfra_hosts = ["ansible://edge?sudo=true"]

EXPOSURE_LIMIT = 2.0
CAP_NET_BIND_SERVICE = 1 << 10
UNIT = "stickyring-edge.service"


@pytest.fixture
def config(ask_envoy: Any, edge: Any) -> dict[str, Any]:
    """Envoy's config_dump, its sections by type."""
    dump = ask_envoy(edge, "config_dump?include_eds")
    return {section["@type"].rsplit(".", 1)[1]: section for section in dump["configs"]}


def test_it_runs_and_is_enabled(host: Host) -> None:
    assert host.service(UNIT).is_running
    assert host.service(UNIT).is_enabled


def test_the_exposure_is_small(host: Host) -> None:
    verdict = host.run(f"systemd-analyze security --no-pager {UNIT}").stdout
    exposure = float(re.search(r"Overall exposure level for \S+: ([0-9.]+)", verdict)[1])
    assert exposure <= EXPOSURE_LIMIT, verdict


def test_the_sandbox_is_in_force(host: Host, edge: Any) -> None:
    pid = host.check_output(f"systemctl show {UNIT} --property=MainPID --value")
    status = dict(re.findall(r"^(\w+):\s+(.+)$", host.file(f"/proc/{pid}/status").content_string, re.M))
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    low = any(one["port"] < 1024 for one in edge.variables["stickyring_edge_listeners"])
    allowed = CAP_NET_BIND_SERVICE if low else 0
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == allowed
    assert host.check_output(f"ps -o user:32= -p {pid}") != "root"


def test_it_listens_where_the_inventory_says_and_nowhere_else(host: Host, edge: Any) -> None:
    pid = host.check_output(f"systemctl show {UNIT} --property=MainPID --value")
    lines = host.check_output("ss --listening --tcp --numeric --processes --no-header").splitlines()
    sockets = {line.split()[3] for line in lines if f"pid={pid}," in line}
    # `*` is a socket for both families.
    addresses = {"::": "*"}
    wanted = {
        f"{addresses.get(one.get('address'), '0.0.0.0')}:{one['port']}"
        for one in edge.variables["stickyring_edge_listeners"]
    }
    assert sockets == wanted


def test_only_root_reaches_the_admin_interface(host: Host) -> None:
    program = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    asked = host.run("setpriv --reuid=nobody --regid=nogroup --clear-groups python3 -c %s %s", program, ADMIN_SOCKET)
    assert "PermissionError" in asked.stderr
    assert host.run("python3 -c %s %s", program, ADMIN_SOCKET).rc == 0


def test_the_ring_has_the_members_of_the_inventory_with_their_points(config: dict[str, Any], edge: Any) -> None:
    loaded = {
        one["endpoint_config"]["cluster_name"]: {
            (
                endpoint["metadata"]["filter_metadata"]["envoy.lb"]["hash_key"],
                endpoint["endpoint"]["address"]["socket_address"]["address"],
                endpoint["endpoint"]["address"]["socket_address"]["port_value"],
                endpoint["load_balancing_weight"],
            )
            for locality in one["endpoint_config"]["endpoints"]
            for endpoint in locality["lb_endpoints"]
        }
        for one in config["EndpointsConfigDump"]["dynamic_endpoint_configs"]
    }
    points = edge.variables["stickyring_edge_ring_points_per_weight"]
    assert loaded == {
        cluster["name"]: {
            ("nobody", "127.0.0.1", 1, 1),
            *(
                (one["name"], one["address"], one["port"], points * one.get("weight", 1))
                for one in cluster["endpoints"]
            ),
        }
        for cluster in edge.variables["stickyring_edge_clusters"]
    }


def test_the_balancing_is_by_ring(config: dict[str, Any], edge: Any) -> None:
    clusters = {
        one["cluster"]["name"]: one["cluster"] for one in config["ClustersConfigDump"]["dynamic_active_clusters"]
    }
    for wanted in edge.variables["stickyring_edge_clusters"]:
        loaded = clusters[wanted["name"]]
        assert loaded["lb_policy"] == wanted.get("lb_policy", "RING_HASH")
        assert loaded["ring_hash_lb_config"]["minimum_ring_size"] == "1"


def test_every_request_is_hashed_by_its_key_where_the_inventory_names_users(config: dict[str, Any], edge: Any) -> None:
    loaded = {
        one["route_config"]["name"]: one["route_config"] for one in config["RoutesConfigDump"]["dynamic_route_configs"]
    }
    common = edge.variables["stickyring_edge_hash_policies"]
    for listener in edge.variables["stickyring_edge_listeners"]:
        served, policies = loaded[listener["name"]], listener.get("hash_policies", common)
        routes = [route["route"] for route in served["virtual_hosts"][0]["routes"] if "route" in route]
        hashed = [{"filter_state": {"key": "stickyring.key"}}] if policies else []
        assert routes, "no route"
        assert [route.get("hash_policy", []) for route in routes] == [hashed] * len(routes)
        values = served.get("typed_per_filter_config", {}).get("stickyring.key", {}).get("on_request_headers", [])
        given = [one for one in values if one["object_key"] == "stickyring.given"]
        assert len(given) == len(policies)


def test_the_answer_names_the_node_that_served(edge_url: Any, edge: Any) -> None:
    sticky = next(one for one in edge.variables["stickyring_edge_clusters"] if one["name"] == "nodes")
    names = {one["name"] for one in sticky["endpoints"]}
    served = set()
    for number in range(40):
        with urlopen(f"{edge_url('sticky')}/healthz?client_id=user-{number}", timeout=5) as answer:
            served.add(answer.headers["x-served-by"])
    assert served == names


def test_the_edge_hides_the_metrics_of_the_nodes(edge: Any, edge_url: Any) -> None:
    with pytest.raises(HTTPError) as refused:
        urlopen(f"{edge_url('sticky')}/metrics", timeout=5)
    assert refused.value.code == 404
    node = next(one for one in edge.variables["stickyring_edge_clusters"] if one["name"] == "nodes")["endpoints"][0]
    with urlopen(f"http://{node['address']}:{node['port']}/metrics", timeout=5) as answer:
        assert b"stickyring_connections" in answer.read()


@pytest.mark.parametrize(("announced", "status"), [(1_000, 200), (1_000_001, 413)])
def test_an_oversize_body_is_refused_before_it_is_sent(edge_url: Any, announced: int, status: int) -> None:
    connection = HTTPConnection(edge_url("sticky").removeprefix("http://"), timeout=5)
    connection.putrequest("POST", "/healthz?client_id=big")
    connection.putheader("Content-Length", str(announced))
    connection.endheaders(b"4" * announced if status == 200 else None)
    assert connection.getresponse().status == status
    connection.close()


def paths_of(edge: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """The settings of paths in the inventory, by listener and prefix."""
    return {
        listener["name"]: {one["prefix"]: one for one in listener.get("paths", edge.variables["stickyring_edge_paths"])}
        for listener in edge.variables["stickyring_edge_listeners"]
    }


def status_of_announced(url: str, path: str, size: int) -> int:
    """The status of a POST whose body is announced and never sent."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=5)
    connection.putrequest("POST", path)
    connection.putheader("Content-Length", str(size))
    connection.endheaders()
    status = connection.getresponse().status
    connection.close()
    return status


def test_a_body_may_be_larger_under_its_prefix(edge_url: Any, edge: Any) -> None:
    """No application of the lab has such a path, so a node answers 404 at once."""
    default = edge.variables["stickyring_edge_max_request_body_bytes"]
    limits = {path: one["body_limit"] for path, one in paths_of(edge)["sticky"].items() if "body_limit" in one}
    assert limits, "no path to test"
    for prefix, limit in limits.items():
        for path in (prefix, f"{prefix}/below", f"{prefix}?client_id=big"):
            assert status_of_announced(edge_url("sticky"), path, limit) == 404
            assert status_of_announced(edge_url("sticky"), path, limit + 1) == 413
        assert status_of_announced(edge_url("sticky"), f"{prefix}2", default) == 404
        assert status_of_announced(edge_url("sticky"), f"{prefix}2", default + 1) == 413


def test_the_routes_have_the_timeouts_of_the_paths(config: dict[str, Any], edge: Any) -> None:
    """Whether a stream of events stays open is tested with an Envoy on the loopback address."""
    default = edge.variables["stickyring_edge_route_timeout"]
    found: dict[str, dict[str | None, float]] = {}
    for one in config["RoutesConfigDump"]["dynamic_route_configs"]:
        served = one["route_config"]
        routes = [route for route in served["virtual_hosts"][0]["routes"] if "route" in route]
        found[served["name"]] = {
            route["match"].get("path_separated_prefix"): float(route["route"]["timeout"].removesuffix("s"))
            for route in routes
        }
        assert {route["route"]["idle_timeout"] for route in routes} == {"0s"}
    assert found == {
        listener: {None: default} | {prefix: one.get("timeout", default) for prefix, one in paths.items()}
        for listener, paths in paths_of(edge).items()
    }


@pytest.fixture(scope="module")
def unplaced(edge: Any) -> str:
    """A user whose point belongs to the endpoint `nobody`."""
    points = edge.variables["stickyring_edge_ring_points_per_weight"]
    endpoints = next(one for one in edge.variables["stickyring_edge_clusters"] if one["name"] == "nodes")["endpoints"]
    own = xxh64_intdigest(b"nobody_0")
    # The owner is the first point at or above the user's hash.
    before = max(
        point
        for one in endpoints
        for number in range(points)
        if (point := xxh64_intdigest(f"{one['name']}_{number}".encode())) < own
    )
    return next(user for user in map("user-{}".format, count()) if before < xxh64_intdigest(user.encode()) <= own)


@pytest.mark.parametrize("transport", ["polling", "websocket"])
@pytest.mark.parametrize("size", [1_000, 900_000])
def test_a_user_on_the_point_of_nobody_is_served(edge_url: Any, unplaced: str, transport: str, size: int) -> None:
    async def talk() -> str:
        async with socketio.AsyncSimpleClient() as client:
            url = f"{edge_url('sticky')}?client_id={unplaced}"
            await client.connect(url, transports=[transport], wait_timeout=10)
            return await client.call("message", "4" * size, timeout=10)

    assert asyncio.run(talk()).endswith(": " + "4" * size)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_forwarded_headers_count_only_from_trusted_proxies(edge: Any, edge_url: Any, scheme: str) -> None:
    """Engine.IO compares a browser's Origin with the scheme that the edge passes on."""
    place = edge_url("sticky").removeprefix("http://")
    connection = HTTPConnection(place, timeout=5)
    headers = {"Origin": f"{scheme}://{place}", "X-Forwarded-Proto": scheme}
    connection.request("GET", "/socket.io/?EIO=4&transport=polling&client_id=proxied", headers=headers)
    trusted = bool(edge.variables["stickyring_edge_trusted_proxies"])
    assert connection.getresponse().status == (200 if trusted or scheme == "http" else 400)
    connection.close()


def logged(host: Host, key: str) -> list[dict[str, Any]]:
    """The access log's lines with a key; waits for the first one."""
    deadline = time.monotonic() + 10
    while True:
        lines = host.check_output(f"journalctl --unit={UNIT} --output=cat --no-pager --since=-1min").splitlines()
        found = [
            line for line in map(json.loads, (one for one in lines if one.startswith("{"))) if line.get("key") == key
        ]
        if found or time.monotonic() > deadline:
            return found


def test_the_access_log_has_key_node_and_duration(host: Host, edge_url: Any) -> None:
    key = f"log-{time.monotonic_ns()}"
    with urlopen(f"{edge_url('sticky')}/healthz?client_id={key}&secret=1", timeout=5) as answer:
        node = answer.headers["x-served-by"]
    (line,) = logged(host, key)
    assert (line["node"], line["path"], line["response_code"]) == (node, "/healthz", 200)
    assert line["duration_ms"] >= 0
    assert "secret" not in json.dumps(line)


def test_a_websocket_is_logged_while_it_is_open(host: Host, edge_url: Any) -> None:
    key = f"log-{time.monotonic_ns()}"

    async def open_websocket() -> list[dict[str, Any]]:
        client = socketio.AsyncClient(reconnection=False)
        await client.connect(f"{edge_url('sticky')}?client_id={key}", transports=["websocket"], wait_timeout=10)
        lines = await asyncio.to_thread(logged, host, key)
        await client.disconnect()
        return lines

    lines = asyncio.run(open_websocket())
    assert [line["upgrade"] for line in lines] == ["websocket"]
    assert lines[0]["node"]
