"""An edge that the internet reaches: addresses of both families, proxies in front, http beside https.

A real Envoy with the role's files; everything is on the loopback addresses. The node returns the headers that it got.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stickyring.fleet.plugins.module_utils.admin import Admin
from ansible_collections.stickyring.fleet.plugins.plugin_utils.certificates import acme_thumbprint
from certificates import Certificate, make_certificate, make_key
from cryptography import x509
from running_envoy import START_SECONDS, Edge, Node, Websocket, compose, free_ports, handshake, running, serving

# Proxies and clients are at addresses of their own. 127.0.0.4 is a proxy behind the other two.
PROXY, INNER_PROXY, CLIENT = "127.0.0.2", "127.0.0.4", "127.0.0.9"
TRUSTED = ["127.0.0.2/31", INNER_PROXY, "2001:db8::/32"]
USER, FORGED = "203.0.113.9", "198.51.100.66"
HSTS = "max-age=31536000; includeSubDomains"
LISTENERS = ("plain", "dual", "proxied", "proxied_tls", "redirect", "issued", "safe")
MAX_BODY = 1000
EXPOSURE_LIMIT = 2.0
BURST = 3
MOST_METRICS = 50_000
"""Bytes of a scrape."""
MANY_ADDRESSES = 40
"""More than Envoy remembers by default."""


@pytest.fixture(scope="module")
def edge(folder: Path, certificate: Certificate) -> Iterator[Edge]:
    """All its ports are above 1024."""
    tls = {"certificate": str(certificate.chain_path), "key": str(certificate.key_path)}
    settings: dict[str, dict[str, Any]] = {
        "dual": {"address": "::"},
        "proxied": {"proxy_protocol": True},
        "proxied_tls": {"proxy_protocol": True, "tls": tls},
        "redirect": {"redirect_port": 443},
        "issued": {"tls": {"acme": ["chat.example.com"]}},
    }
    issue(folder / "acme" / "issued", certificate)
    account = folder / "account.pem"
    account.write_text(make_key())
    [metrics_port] = free_ports(1)
    with serving(Node) as node:
        variables = {
            "stickyring_edge_trusted_proxies": TRUSTED,
            "stickyring_edge_hsts": HSTS,
            "stickyring_edge_max_request_body_bytes": MAX_BODY,
            "stickyring_edge_handshakes_per_second": 1,
            "stickyring_edge_handshakes_burst": BURST,
            "stickyring_edge_acme_account_key": str(account),
            "stickyring_edge_metrics_port": metrics_port,
            "stickyring_edge_metrics_address": "127.0.0.1",
            "stickyring_edge_metrics_readers": [PROXY],
            "stickyring_edge_acme_terms_agreed": True,
            "__stickyring_edge_acme_state": str(folder / "acme"),
            "stickyring_edge_clusters": [
                {"name": "nodes", "endpoints": [{"name": "node", "address": "127.0.0.1", "port": node}]}
            ],
        }
        composed = compose(folder, LISTENERS, certificate, variables, **settings)
        with running(folder, composed, "--file-flush-interval-msec", "50") as running_edge:
            # Sessions that an address may begin again would make the tests depend on their speed.
            for path, (resource, *_) in running_edge.files.items():
                if limit := resource.get("typed_per_filter_config", {}).get("stickyring.handshakes"):
                    assert limit["descriptors"][0]["token_bucket"].pop("fill_interval") == "1s", path
                    limit["descriptors"][0]["token_bucket"]["fill_interval"] = "3600s"
            assert "failed" not in running_edge.give(running_edge.files)
            running_edge.ports["metrics"] = metrics_port
            yield running_edge


def issue(folder: Path, certificate: Certificate) -> None:
    """Have Envoy read another certificate, as the script of the role does."""
    version = folder / f"version.{certificate.serial}"
    version.mkdir(parents=True)
    (version / "chain.pem").write_text(certificate.chain)
    (version / "key.pem").write_text(certificate.key)
    (folder / "served.new").symlink_to(version.name)
    (folder / "served.new").rename(folder / "served")


def receive(client: socket.socket) -> bytes:
    """One answer, or what the edge sends until it closes the connection; a reset counts as closing."""
    received = b""
    with suppress(ConnectionResetError):
        while not is_complete(received) and (more := client.recv(65536)):
            received += more
    return received


def is_complete(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"^content-length: (\d+)", head, re.MULTILINE)
    return bool(end and length) and len(body) >= int(length[1] if length else 0)


def send(port: int, text: str | bytes, source: str = CLIENT, preamble: bytes = b"", *, tls: bool = False) -> bytes:
    """What comes back for a request, sent from this address of the loopback network."""
    raw = text.encode().replace(b"\n", b"\r\n") if isinstance(text, str) else text
    with (
        socket.create_connection(("127.0.0.1", port), 5, source_address=(source, 0)) as connected,
        suppress(BrokenPipeError, ConnectionResetError),
    ):
        connected.sendall(preamble)
        with handshake(connected) if tls else connected as client:
            client.sendall(raw)
            return receive(client)
    return b""


def headers_of(answer: bytes) -> dict[str, str]:
    """Name, in lower case, to value."""
    lines = answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


def told(answer: bytes) -> dict[str, str]:
    """The headers that the node got."""
    assert answer.startswith(b"HTTP/1.1 200"), answer
    found: dict[str, str] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return {name.lower(): value for name, value in found.items()}


def request(*lines: str) -> str:
    return "\n".join(["GET /page HTTP/1.1", "Host: edge", "Connection: close", *lines, "", ""])


def forwarded(*addresses: str) -> str:
    """A request with what proxies write, and clients forge."""
    return request(
        *(f"X-Forwarded-For: {address}" for address in addresses),
        "X-Forwarded-Proto: https",
        "x-forwarded-HOST: chat.example.com",
        "X-Forwarded-Port: 443",
        f"Forwarded: for={FORGED}",
        f"X-Real-IP: {FORGED}",
        f"x-envoy-external-address: {FORGED}",
    )


@pytest.mark.parametrize("listener", ["plain", "dual"])
def test_a_client_cannot_forge_its_address_scheme_or_host(edge: Edge, listener: str) -> None:
    """The control is the same request of a trusted proxy."""
    seen = told(send(edge.ports[listener], forwarded(FORGED), CLIENT))
    assert (seen["x-stickyring-client"], seen["x-forwarded-proto"]) == (CLIENT, "http")
    assert FORGED not in json.dumps(seen)
    assert not seen.keys() & {"x-forwarded-host", "x-forwarded-port"}
    seen = told(send(edge.ports[listener], forwarded(USER), PROXY))
    assert (seen["x-stickyring-client"], seen["x-forwarded-proto"]) == (USER, "https")
    assert seen["x-forwarded-host"] == "chat.example.com"
    # A proxy may not know these, and pass on what its user has sent.
    assert FORGED not in json.dumps(seen)


@pytest.mark.parametrize(
    ("addresses", "client"),
    [
        ([], PROXY),
        ([USER], USER),
        ([f"{FORGED}, {USER}"], USER),
        ([FORGED, USER], USER),
        ([f"{FORGED}, {USER}, {INNER_PROXY}"], USER),
        (["2001:db8::1, 2001:DB9::1"], "2001:db9::1"),
        ([f"{USER}, 2001:db8::1"], USER),
        (["unknown"], PROXY),
        ([f"{USER}:40000"], PROXY),
    ],
)
def test_the_client_is_the_last_address_that_is_no_trusted_proxy(edge: Edge, addresses: list[str], client: str) -> None:
    assert told(send(edge.ports["plain"], forwarded(*addresses), PROXY))["x-stickyring-client"] == client


def test_key_log_and_node_have_the_same_client(edge: Edge, folder: Path) -> None:
    files = deepcopy(edge.files)
    for value in files["routes/plain.json"][0]["typed_per_filter_config"]["stickyring.key"]["on_request_headers"]:
        value["format_string"]["text_format_source"]["inline_string"] = "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"
    assert "failed" not in edge.give(files)
    try:
        seen = told(send(edge.ports["plain"], forwarded("192.0.2.55"), PROXY))
    finally:
        assert "failed" not in edge.give(edge.files)
    assert seen["x-stickyring-client"] == seen["x-stickyring-key"] == "192.0.2.55"
    deadline = time.monotonic() + START_SECONDS
    while '"client":"192.0.2.55"' not in (folder / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def version_1(source: str) -> bytes:
    family = "TCP6" if ":" in source else "TCP4"
    return f"PROXY {family} {source} {'::1' if ':' in source else '127.0.0.1'} 40000 443\r\n".encode()


def version_2(source: str) -> bytes:
    """A header of version 2 for a connection over IPv4."""
    addresses = socket.inet_aton(source) + socket.inet_aton("127.0.0.1") + struct.pack("!HH", 40000, 443)
    return b"\r\n\r\n\x00\r\nQUIT\n\x21\x11" + struct.pack("!H", len(addresses)) + addresses


@pytest.mark.parametrize(("listener", "scheme"), [("proxied", "http"), ("proxied_tls", "https")])
@pytest.mark.parametrize(
    ("preamble", "client"),
    [(version_1(USER), USER), (version_2(USER), USER), (version_1("2001:db9::7"), "2001:db9::7")],
)
def test_a_trusted_proxy_names_its_client_by_proxy_protocol(
    edge: Edge, listener: str, scheme: str, preamble: bytes, client: str
) -> None:
    """And the client's own X-Forwarded-* still count for nothing."""
    answer = send(edge.ports[listener], forwarded(FORGED), PROXY, preamble, tls=scheme == "https")
    seen = told(answer)
    assert (seen["x-stickyring-client"], seen["x-forwarded-proto"]) == (client, scheme)
    assert FORGED not in json.dumps(seen)


def test_headers_of_a_trusted_proxy_behind_another_count(edge: Edge) -> None:
    seen = told(send(edge.ports["proxied"], forwarded(USER), PROXY, version_1(INNER_PROXY)))
    assert (seen["x-stickyring-client"], seen["x-forwarded-proto"]) == (USER, "https")


@pytest.mark.parametrize(
    ("listener", "source", "preamble"),
    [
        ("proxied", CLIENT, version_1(USER)),
        ("proxied", CLIENT, version_2(USER)),
        ("proxied", CLIENT, version_1(PROXY)),
        ("proxied", CLIENT, b""),
        ("proxied", PROXY, b""),
        ("proxied_tls", CLIENT, version_1(USER)),
    ],
)
def test_a_proxied_listener_refuses_everything_else(edge: Edge, listener: str, source: str, preamble: bytes) -> None:
    """Others than the proxies, whatever they say, and connections without the header."""
    try:
        answer = send(edge.ports[listener], forwarded(FORGED), source, preamble, tls=listener == "proxied_tls")
    except OSError:
        answer = b""
    assert answer == b""


@pytest.mark.parametrize("source", [CLIENT, PROXY])
def test_other_listeners_refuse_a_proxy_protocol_header(edge: Edge, source: str) -> None:
    answer = send(edge.ports["plain"], request(), source, version_1(USER))
    assert answer.startswith(b"HTTP/1.1 400"), answer


@pytest.mark.parametrize(("address", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_a_listener_serves_both_families(edge: Edge, address: str, family: int) -> None:
    """And a client over IPv4 has its usual address. The control is a listener at 127.0.0.1."""
    with closing(socket.create_connection((address, edge.ports["dual"]), 5)) as client:
        assert client.family == family
        client.sendall(request().replace("\n", "\r\n").encode())
        assert told(receive(client))["x-stickyring-client"] == address
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("::1", edge.ports["plain"]), 5)


UPGRADE = (
    "Connection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
)
# A request, and its status.
REQUESTS: dict[str, tuple[str, int]] = {
    "a node": (request(), 200),
    "a private path": (request().replace("/page", "/metrics"), 404),
    "an invalid key": (request().replace("/page", "/page?client_id=%00"), 400),
    "a body beyond the limit": (request(f"Content-Length: {MAX_BODY + 1}").replace("GET", "POST"), 413),
    "a head beyond the limit": (request(f"x-token: {'t' * 33_000}"), 431),
    "a redirect of Envoy's own": (request().replace("/page", "/a%2Fb"), 307),
    "a head that is not HTTP": ("nonsense\n\n", 400),
    "no host": ("GET / HTTP/1.1\nConnection: close\n\n", 400),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_every_answer_over_tls_has_hsts(edge: Edge, case: str) -> None:
    """The control is the same request without TLS."""
    text, status = REQUESTS[case]
    secure, plain = (send(edge.ports[name], text, tls=name == "safe") for name in ("safe", "plain"))
    for answer in (secure, plain):
        assert answer.startswith(f"HTTP/1.1 {status}".encode()), answer
    assert headers_of(secure).get("strict-transport-security") == HSTS
    assert b"strict-transport-security" not in plain.lower()


def begun(edge: Edge, count: int, source: str, *lines: str, query: str = "EIO=4&transport=polling") -> list[int]:
    """The statuses of so many handshakes, one after the other."""
    text = request(*lines).replace("/page", f"/socket.io/?{query}")
    return [int(send(edge.ports["plain"], text, source).split()[1]) for _ in range(count)]


def test_an_address_begins_only_so_many_sessions_and_its_open_ones_go_on(edge: Edge) -> None:
    source = "127.0.1.1"
    assert begun(edge, BURST + 1, source) == [200] * BURST + [429]
    refused = send(edge.ports["plain"], request().replace("/page", "/socket.io/?transport=polling&EIO=4"), source)
    assert refused.startswith(b"HTTP/1.1 429"), refused
    assert headers_of(refused)["retry-after"] == "1"
    opening = request().replace("Connection: close", UPGRADE).replace("/page", "/socket.io/?EIO=4&transport=websocket")
    assert send(edge.ports["plain"], opening, source).startswith(b"HTTP/1.1 429")
    assert begun(edge, BURST, source, query="EIO=4&transport=polling&sid=any") == [200] * BURST
    assert send(edge.ports["plain"], request(), source).startswith(b"HTTP/1.1 200")
    assert begun(edge, 1, "127.0.1.2") == [200], "the limit is not for each address"
    assert begun(edge, 1, source, query="EIO=4&transport=polling&sid=") == [429], "this begins a session"


def test_websockets_count_as_well(edge: Edge) -> None:
    source = "127.0.1.3"
    opening = request().replace("Connection: close", UPGRADE).replace("/page", "/socket.io/?EIO=4&transport=websocket")
    for _ in range(BURST):
        with socket.create_connection(("127.0.0.1", edge.ports["plain"]), 5, source_address=(source, 0)) as client:
            client.sendall(opening.replace("\n", "\r\n").encode())
            assert client.recv(65536).startswith(b"HTTP/1.1 101")
    assert begun(edge, 1, source) == [429]


def test_behind_a_proxy_each_user_counts_and_behind_others_only_the_proxy(edge: Edge) -> None:
    for user in ("203.0.113.1", "203.0.113.2"):
        assert begun(edge, BURST + 1, PROXY, f"X-Forwarded-For: {user}") == [200] * BURST + [429]
    forged = [
        status for user in range(BURST + 1) for status in begun(edge, 1, "127.0.1.4", f"X-Forwarded-For: 1.2.3.{user}")
    ]
    assert forged == [200] * BURST + [429]


def test_the_addresses_of_an_ipv6_network_count_together(edge: Edge) -> None:
    together = [f"X-Forwarded-For: 2001:db9::{host}" for host in range(BURST + 1)]
    assert [begun(edge, 1, PROXY, line) for line in together] == [[200]] * BURST + [[429]]
    assert begun(edge, 1, PROXY, "X-Forwarded-For: 2001:db9:0:1::1") == [200]


def test_it_remembers_many_addresses(edge: Edge) -> None:
    users = [f"X-Forwarded-For: 192.0.2.{number}" for number in range(MANY_ADDRESSES)]
    begun(edge, BURST, PROXY, users[0])
    for line in users:
        begun(edge, 1, PROXY, line)
    assert begun(edge, 1, PROXY, users[0]) == [429]


def test_a_limit_that_is_not_enforced_only_counts(edge: Edge) -> None:
    source, counter = "127.0.1.5", "stickyring.handshakes.http_local_rate_limit.rate_limited"

    def counted() -> int:
        answer = Admin(edge.admin_socket).get(f"/stats?format=json&filter=^{counter}$")
        return int(answer["stats"][0]["value"])

    files = deepcopy(edge.files)
    limit = files["routes/plain.json"][0]["typed_per_filter_config"]["stickyring.handshakes"]
    limit["filter_enforced"]["default_value"]["numerator"] = 0
    assert "failed" not in edge.give(files)
    try:
        before = counted()
        assert begun(edge, BURST + 2, source) == [200] * (BURST + 2)
        assert counted() == before + 2
    finally:
        assert "failed" not in edge.give(edge.files)


def test_a_websocket_and_an_answer_without_a_node_have_hsts(edge: Edge) -> None:
    opening = request().replace("Connection: close", UPGRADE).replace("\n", "\r\n").encode()
    with handshake(edge.ports["safe"]) as client:
        client.sendall(opening)
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 101"), answer
    assert headers_of(answer)["strict-transport-security"] == HSTS
    files = deepcopy(edge.files)
    (path,) = [name for name in files if name.startswith("endpoints/")]
    (port,) = free_ports(1)
    files[path][0]["endpoints"][0]["lb_endpoints"][-1]["endpoint"]["address"]["socket_address"]["port_value"] = port
    assert "failed" not in edge.give(files)
    try:
        answer = send(edge.ports["safe"], request(), tls=True)
    finally:
        assert "failed" not in edge.give(edge.files)
    assert answer.startswith(b"HTTP/1.1 503"), answer
    assert headers_of(answer)["strict-transport-security"] == HSTS


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS"])
def test_a_redirect_keeps_host_path_and_query(edge: Edge, method: str) -> None:
    target = "/socket.io/?EIO=4&transport=polling&client_id=a%40b&x=%2F"
    for host, wanted in (("chat.example.com", "chat.example.com"), ("[::1]:80", "[::1]"), ("edge:8080", "edge")):
        text = f"{method} {target} HTTP/1.1\nHost: {host}\nConnection: close\nContent-Length: 1\n\n3"
        answer = send(edge.ports["redirect"], text)
        assert answer.startswith(b"HTTP/1.1 308"), answer
        assert headers_of(answer)["location"] == f"https://{wanted}{target}"


def test_metrics_are_for_their_readers_and_nothing_else_is_at_their_port(edge: Edge, certificate: Certificate) -> None:
    send(edge.ports["plain"], request())
    asked = "GET /metrics HTTP/1.1\nHost: edge\nConnection: close\n\n"
    read = send(edge.ports["metrics"], asked, PROXY)
    assert read.startswith(b"HTTP/1.1 200"), read
    assert b'envoy_http_downstream_rq_xx{envoy_response_code_class="2",envoy_http_conn_manager_prefix="plain"}' in read
    assert b'envoy_cluster_membership_healthy{envoy_cluster_name="nodes"}' in read
    assert b'envoy_cluster_version{envoy_cluster_name="nodes"}' in read
    days = int(re.findall(rb"^envoy_server_days_until_first_cert_expiring{} (\d+)$", read, re.MULTILINE)[0])
    assert 0 < days <= 30
    assert len(read) < MOST_METRICS
    # The control: another address. It is closed before it asks, so strangers cannot hold connections.
    assert send(edge.ports["metrics"], asked, CLIENT) == b""
    with socket.create_connection(("127.0.0.1", edge.ports["metrics"]), 5, source_address=(CLIENT, 0)) as silent:
        assert silent.recv(1) == b""
    for other in (
        "GET /",
        "GET /config_dump",
        "GET /metrics/x",
        "GET /stats/prometheus",
        "POST /metrics",
        "POST /quitquitquit",
    ):
        assert send(edge.ports["metrics"], asked.replace("GET /metrics", other), PROXY).startswith(b"HTTP/1.1 404"), (
            other
        )
    # A query would widen the filter.
    for query in ("?filter=.", "?%7C.", "?|."):
        assert send(edge.ports["metrics"], asked.replace("/metrics", "/metrics" + query), PROXY).startswith(
            b"HTTP/1.1 4"
        )


def test_a_challenge_of_acme_is_answered_where_everything_else_is_redirected(edge: Edge, folder: Path) -> None:
    token = "LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0"
    asked = f"/.well-known/acme-challenge/{token}"
    answer = send(edge.ports["redirect"], request().replace("/page", f"{asked}?x=1"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    thumbprint = acme_thumbprint((folder / "account.pem").read_text())
    assert body == f"{token}.{thumbprint}".encode()
    for other in (f"{asked}/x", f"{asked}.txt", "/.well-known/acme-challenge/", "/x" + asked):
        assert b" 308 " in send(edge.ports["redirect"], request().replace("/page", other)).splitlines()[0]
    # Only where it is redirected: over TLS, and on other ports, the path is the application's.
    assert thumbprint.encode() not in send(edge.ports["plain"], request().replace("/page", asked))


def test_a_renewed_certificate_is_served_at_once_and_websockets_stay(
    edge: Edge, folder: Path, tmp_path: Path, certificate: Certificate
) -> None:
    def serial() -> int:
        text = ssl.get_server_certificate(("127.0.0.1", edge.ports["issued"]))
        return x509.load_pem_x509_certificate(text.encode()).serial_number

    assert serial() == certificate.serial
    with Websocket(edge, "issued") as websocket:
        renewed = make_certificate(tmp_path)
        issue(folder / "acme" / "issued", renewed)
        deadline = time.monotonic() + 5
        while serial() != renewed.serial:
            assert time.monotonic() < deadline
        assert websocket.is_open()
        assert not edge.give(edge.files)["changed"], "the next run has nothing to do"


def test_another_port_is_in_the_redirect(edge: Edge) -> None:
    files = deepcopy(edge.files)
    files["routes/redirect.json"][0]["virtual_hosts"][0]["routes"][-1]["redirect"]["port_redirect"] = 8443
    assert "failed" not in edge.give(files)
    try:
        answer = send(edge.ports["redirect"], request())
    finally:
        assert "failed" not in edge.give(edge.files)
    assert headers_of(answer)["location"] == "https://edge:8443/page"


def look_at(unit: Path) -> dict[str, str]:
    """What systemd makes of a unit: some of its settings, and its exposure."""
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settings = dict(line.split("=", 1) for line in unit.read_text().splitlines() if re.match(r"\w+=", line))
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([0-9.]+)", text)
    return settings | {"exposure": exposure}


def test_only_a_port_below_1024_gives_the_unit_a_capability(
    edge: Edge, folder: Path, certificate: Certificate, tmp_path: Path
) -> None:
    endpoints = [{"name": "node", "address": "127.0.0.1", "port": 8001}]
    variables = {"stickyring_edge_clusters": [{"name": "nodes", "endpoints": endpoints}]}
    compose(tmp_path, ("plain", "safe"), certificate, variables, plain={"port": 1023})
    found = []
    for place in (folder, tmp_path):
        unit = (place / "stickyring-edge.service.j2").rename(place / "stickyring-edge.service")
        unit.write_text(re.sub("^ExecStart=.*", "ExecStart=/bin/true", unit.read_text(), flags=re.MULTILINE))
        seen = look_at(unit)
        assert float(seen["exposure"]) <= EXPOSURE_LIMIT, seen
        found.append([seen[name] for name in ("CapabilityBoundingSet", "AmbientCapabilities", "PrivateUsers")])
    assert found == [["", "", "yes"], ["CAP_NET_BIND_SERVICE", "CAP_NET_BIND_SERVICE", "no"]]
