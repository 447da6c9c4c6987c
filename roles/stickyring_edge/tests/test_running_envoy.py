"""A real Envoy with the role's files: TLS, and which changes end WebSockets.

Everything is on the loopback address; the node behind it only opens WebSockets and returns the headers that it got.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stickyring.fleet.plugins.filter import edge as filters
from ansible_collections.stickyring.fleet.plugins.module_utils.admin import Admin
from certificates import Certificate, make_certificate
from running_envoy import START_SECONDS, Edge, Node, Websocket, compose, free_ports, handshake, running, serving

# Websockets of a changed listener end after this many seconds; the role keeps Envoy's default of 600.
DRAIN_SECONDS = 1
# The role's default is 10.
HANDSHAKE_SECONDS = 2
# The role's default is 20 000.
MAX_CONNECTIONS = 40


def serial(port: int) -> int:
    """The serial number of the certificate that a new connection gets."""
    with handshake(port) as client:
        return Certificate.serial_of(client.getpeercert(binary_form=True))


@pytest.fixture(scope="module")
def node() -> Iterator[int]:
    with serving(Node) as port:
        yield port


@pytest.fixture(scope="module")
def composed(folder: Path, certificate: Certificate, node: int) -> dict[str, Any]:
    """What the role composes for a listener with TLS and two without."""
    variables = {
        "stickyring_edge_request_headers_timeout": HANDSHAKE_SECONDS,
        "stickyring_edge_max_connections": MAX_CONNECTIONS,
        "stickyring_edge_clusters": [
            {"name": "nodes", "endpoints": [{"name": "node", "address": "127.0.0.1", "port": node}]}
        ],
    }
    return compose(folder, ("plain", "other", "safe"), certificate, variables)


@pytest.fixture(scope="module")
def process(folder: Path, composed: dict[str, Any]) -> Iterator[Edge]:
    """An Envoy that was started on the role's files."""
    with running(folder, composed, "--drain-time-s", str(DRAIN_SECONDS), "--drain-strategy", "immediate") as edge:
        yield edge


@pytest.fixture
def edge(process: Edge) -> Iterator[Edge]:
    """The same, with the role's files before and after the test."""
    yield process
    assert "failed" not in process.give(process.files, may_end_websockets=True)


@pytest.fixture
def websocket(edge: Edge) -> Iterator[Callable[[str], Websocket]]:
    """Opens WebSockets; at the end closes them and waits until Envoy has noticed."""
    with ExitStack() as stack:
        yield lambda listener: stack.enter_context(Websocket(edge, listener))
    deadline = time.monotonic() + START_SECONDS
    while Admin(edge.admin_socket).websockets():
        assert time.monotonic() < deadline


def test_the_template_lookup_and_the_template_module_render_the_same(folder: Path, composed: dict[str, Any]) -> None:
    """Otherwise the role would see a difference in every run, and restart Envoy."""
    written = {"bootstrap": "bootstrap.yaml", "unit": "stickyring-edge.service.j2"}
    texts = {file["name"]: file["content"] for file in composed["start_files"] if "content" in file}
    assert texts.keys() == written.keys()
    for name, text in texts.items():
        (found,) = folder.glob(f"{written[name]}*")
        assert found.read_text() == text


def test_a_run_shows_the_certificate_and_not_the_key(
    folder: Path, composed: dict[str, Any], certificate: Certificate
) -> None:
    """With -vvv and --diff."""
    shown = composed["told"]
    key, chain = ((text.splitlines()[1]) for text in (certificate.key, certificate.chain))
    assert chain in shown
    assert key not in shown
    assert "version_info" in shown, "no difference is shown"
    secret = folder / "xds" / "certificates" / "safe.json"
    assert key in secret.read_text()
    assert secret.stat().st_mode & 0o777 == 0o640


def test_clients_get_the_certificate_and_either_protocol(edge: Edge, certificate: Certificate) -> None:
    assert serial(edge.ports["safe"]) == certificate.serial
    for offered, chosen in ((("h2", "http/1.1"), "h2"), (("http/1.1",), "http/1.1"), ((), None)):
        with handshake(edge.ports["safe"], *offered) as client:
            assert client.selected_alpn_protocol() == chosen


def test_tls_is_1_2_or_newer(edge: Edge) -> None:
    def speak(version: ssl.TLSVersion) -> str | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        # Otherwise OpenSSL would not offer old versions.
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = version
        with context.wrap_socket(socket.create_connection(("127.0.0.1", edge.ports["safe"]), 5)) as client:
            return client.version()

    assert speak(ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    assert speak(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    with pytest.warns(DeprecationWarning), pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        speak(ssl.TLSVersion.TLSv1_1)


def test_a_connection_without_a_handshake_is_closed(edge: Edge) -> None:
    """The control is a silent connection without TLS, which has the idle timeout."""
    with ExitStack() as stack:
        silent, control = (
            stack.enter_context(socket.create_connection(("127.0.0.1", edge.ports[name]), 4 * HANDSHAKE_SECONDS))
            for name in ("safe", "plain")
        )
        begin = time.monotonic()
        assert silent.recv(1) == b""
        assert 0.5 * HANDSHAKE_SECONDS < time.monotonic() - begin < 3 * HANDSHAKE_SECONDS
        control.setblocking(False)
        with pytest.raises(BlockingIOError):
            control.recv(1)


@pytest.mark.parametrize(("listener", "scheme"), [("safe", "https"), ("plain", "http")])
def test_the_node_gets_the_real_scheme(edge: Edge, listener: str, scheme: str) -> None:
    port = edge.ports[listener]
    with handshake(port) if listener == "safe" else socket.create_connection(("127.0.0.1", port), 5) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: edge\r\nX-Forwarded-Proto: ftp\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(65536), b"")).decode()
    told = {name.lower(): value for name, value in json.loads(answer[answer.index("{") :].split("\r\n")[0]).items()}
    assert told["x-forwarded-proto"] == scheme


def test_new_connections_get_a_new_certificate_and_websockets_stay(edge: Edge, websocket: Any, tmp_path: Path) -> None:
    here = [websocket("safe"), websocket("plain")]
    new = make_certificate(tmp_path)
    files, keys = edge.with_certificate(new)
    result = edge.give(files, private_keys=keys)
    assert (result["written"], result["ends"]) == (["certificates/safe.json"], "")
    assert serial(edge.ports["safe"]) == new.serial
    time_to_drain()
    assert all(one.is_open() for one in here)


def test_a_certificate_that_no_client_will_accept_is_reported(
    edge: Edge, certificate: Certificate, tmp_path: Path
) -> None:
    def proven(days: int) -> tuple[list[str], list[str]]:
        files, keys = edge.with_certificate(make_certificate(tmp_path, days=days))
        edge.give(files, private_keys=keys)
        result = edge.give(files, private_keys=keys, state="proven")
        return result["invalid_certificates"], result.get("warnings", [])

    assert proven(30) == ([], [])
    invalid, soon = proven(10)
    assert invalid == []
    assert re.search(r"the certificate for serial number [0-9a-f]+ expires on 20\d\d-\d\d-\d\d", json.dumps(soon))
    invalid, _ = proven(0)
    assert re.fullmatch(r"the certificate for serial number [0-9a-f]+ expired on 20\d\d-\d\d-\d\d", invalid[0])
    files, keys = edge.with_certificate(make_certificate(tmp_path, names=["stand-in.invalid", "chat.example.com"]))
    edge.give(files, private_keys=keys)
    (told,) = edge.give(files, private_keys=keys, state="proven")["invalid_certificates"]
    assert told.startswith("the certificate for chat.example.com is a stand-in, because")
    assert edge.give(edge.files)["proven"]


def time_to_drain() -> None:
    """Waits until connections of changed listeners have ended."""
    done = time.monotonic() + 2 * DRAIN_SECONDS
    while time.monotonic() < done:
        time.sleep(0.1)


def test_a_key_that_envoy_rejects_is_rolled_back_and_not_shown(
    edge: Edge, certificate: Certificate, tmp_path: Path
) -> None:
    new = make_certificate(tmp_path)
    files, keys = edge.with_certificate(new)
    for wrong in (certificate.key, new.key.replace("\n", "\nx", 1)):
        said = edge.give(files, private_keys=dict.fromkeys(keys, wrong))
        assert "Envoy rejected certificates/safe.json" in said["msg"]
        assert "keeps serving them" in said["msg"]
        assert wrong.splitlines()[1] not in json.dumps(said)
        assert serial(edge.ports["safe"]) == certificate.serial
    assert not edge.give(edge.files)["changed"]


def test_a_listener_gets_tls_and_loses_it_again(edge: Edge) -> None:
    without = deepcopy(edge.files)
    del without["certificates/safe.json"]
    chain = without["listeners.json"][2]["filter_chains"][0]
    del chain["transport_socket"], chain["transport_socket_connect_timeout"]
    assert edge.give(without, private_keys={})["removed"] == ["certificates/safe.json"]
    with pytest.raises(ssl.SSLError):
        serial(edge.ports["safe"])
    assert edge.give(edge.files)["proven"]
    assert serial(edge.ports["safe"])


def changed_listener(edge: Edge, name: str) -> dict[str, Any]:
    """The files with another setting of this listener."""
    files = deepcopy(edge.files)
    (listener,) = (one for one in files["listeners.json"] if one["name"] == name)
    listener["per_connection_buffer_limit_bytes"] += 1
    return files


def test_a_listener_with_websockets_is_not_changed_without_permission(edge: Edge, websocket: Any) -> None:
    here = websocket("plain")
    websocket("plain")
    websocket("safe")
    said = edge.give(changed_listener(edge, "plain"))["msg"]
    assert "so no running service was changed" in said
    assert "listener plain changes: 2 open websockets end." in said
    assert "-e stickyring_edge_may_end_websockets=true" in said
    gone = deepcopy(edge.files)
    del gone["listeners.json"][0], gone["routes/plain.json"]
    assert "listener plain is removed: 2 open websockets end." in edge.give(gone)["msg"]
    assert edge.give(edge.files)["written"] == []
    # In check mode it is reported without a failure. A listener without WebSockets may change.
    said = edge.give(changed_listener(edge, "plain"), _ansible_check_mode=True)
    assert said["ends"] == "listener plain changes: 2 open websockets end"
    assert said["ends"] in json.dumps(said["warnings"])
    assert edge.give(changed_listener(edge, "other"))["written"] == ["listeners.json"]
    time_to_drain()
    assert here.is_open()


def test_with_permission_only_the_changed_listeners_websockets_end(edge: Edge, websocket: Any) -> None:
    """The control of the other tests: this ends WebSockets."""
    ending, staying = websocket("plain"), websocket("safe")
    result = edge.give(changed_listener(edge, "plain"), may_end_websockets=True)
    assert result["ends"] == "listener plain changes: 1 open websocket ends"
    assert ending.socket.recv(1) == b""
    assert staying.is_open()


def test_a_restart_counts_the_websockets_of_all_listeners(
    edge: Edge, websocket: Any, composed: dict[str, Any], tmp_path: Path
) -> None:
    start_files = []
    for file in composed["start_files"]:
        path = tmp_path / file["name"]
        if "link" in file:
            path.symlink_to(file["link"])
        else:
            path.write_text(file["content"])
            path.chmod(0o644)
        start_files.append({**file, "path": str(path)})
    here = [websocket("plain"), websocket("safe")]
    assert edge.give(edge.files, start_files=start_files)["ends"] == ""
    wanted = deepcopy(start_files)
    wanted[0]["link"] = "releases/other"
    wanted[2]["content"] += "#\n"
    said = edge.give(changed_listener(edge, "safe"), start_files=wanted)["msg"]
    assert "the binary changes, the unit changes, listener safe changes: 2 open websockets end." in said
    (tmp_path / "bootstrap").chmod(0o600)
    assert "the bootstrap changes: 2 open websockets end." in edge.give(edge.files, start_files=start_files)["msg"]
    assert all(one.is_open() for one in here)


def test_other_changes_keep_websockets_open(edge: Edge, websocket: Any) -> None:
    here = [websocket("plain"), websocket("safe")]
    files = deepcopy(edge.files)
    files["clusters.json"][0]["connect_timeout"] = "3s"
    for name in ("plain", "safe"):
        route = files[f"routes/{name}.json"][0]["virtual_hosts"][0]["routes"][-1]["route"]
        route["timeout"] = "61s"
        route["hash_policy"].append({"connection_properties": {"source_ip": True}})
    result = edge.give(files)
    assert set(result["written"]) == {"clusters.json", "routes/plain.json", "routes/safe.json"}
    assert (result["ends"], result["proven"]) == ("", True)
    time_to_drain()
    assert all(one.is_open() for one in here)


def test_connections_beyond_the_limit_are_closed_at_once(edge: Edge, websocket: Any) -> None:
    """Open connections stay, and a new one is accepted when one has ended."""
    opened = [websocket("plain") for _ in range(MAX_CONNECTIONS)]
    for listener in ("plain", "other"):
        with (
            socket.create_connection(("127.0.0.1", edge.ports[listener]), 5) as refused,
            suppress(ConnectionResetError),
        ):
            assert refused.recv(1) == b""
    assert all(one.is_open() for one in opened)
    opened.pop().socket.close()
    deadline = time.monotonic() + START_SECONDS
    while len(opened) < MAX_CONNECTIONS:
        assert time.monotonic() < deadline
        with suppress(AssertionError, ConnectionResetError):
            opened.append(websocket("other"))


def test_listeners_that_would_read_keys_differently_are_reported(edge: Edge) -> None:
    def told() -> list[str]:
        dump = Admin(edge.admin_socket).get("/config_dump?resource=dynamic_route_configs")
        found: list[str] = filters.edge_rekeyed(edge.files, dump)
        return found

    assert told() == []
    files = deepcopy(edge.files)
    [routes] = files["routes/plain.json"]
    # As in an earlier version, which hashed the policies in the route.
    for route in routes["virtual_hosts"][0]["routes"]:
        if "route" in route:
            route["route"]["hash_policy"] = [{"query_parameter": {"name": "client_id"}, "terminal": True}]
    [other] = files["routes/other.json"]
    del other["typed_per_filter_config"]["stickyring.key"]["on_request_headers"][1]
    assert "failed" not in edge.give(files)
    assert told() == ["plain", "other"]


def test_the_served_ring_includes_unhealthy_members(edge: Edge) -> None:
    files = deepcopy(edge.files)
    (path,) = [name for name in files if name.startswith("endpoints/")]
    members = files[path][0]["endpoints"][0]["lb_endpoints"]
    members.insert(1, deepcopy(members[-1]))
    members[1]["endpoint"]["hostname"] = "closed"
    members[1]["endpoint"]["address"]["socket_address"]["port_value"] = free_ports(1)[0]
    members[1]["load_balancing_weight"] *= 2
    edge.give(files)
    expected = [
        {
            "name": member["endpoint"]["hostname"],
            "weight": member["load_balancing_weight"],
            "health": "UNHEALTHY" if member["endpoint"]["hostname"] == "closed" else "HEALTHY",
        }
        for member in members
    ]
    deadline = time.monotonic() + START_SECONDS
    ring: dict[str, Any] = {}
    while ring.get("members") != expected:
        assert time.monotonic() < deadline, ring
        answer = Admin(edge.admin_socket).get("/config_dump?include_eds&name_regex=nodes")
        ring = filters.edge_served_ring("nodes", answer)
    assert (ring["policy"], ring["minimum_size"]) == ("RING_HASH", 1)
