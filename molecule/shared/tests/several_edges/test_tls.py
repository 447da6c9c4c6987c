"""The TLS listener; certificates and everything but listeners change without an effect on users."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

SESSIONS = 20


def listener(edge: Any) -> dict[str, Any]:
    return next(one for one in edge.variables["stickyring_edge_listeners"] if one["name"] == "safe")


def place(edge: Any) -> str:
    """Address and port of the listener with TLS."""
    return edge.url("safe").removeprefix("https://")


def serial(edge: Any) -> int:
    """The serial number of the certificate that a new connection gets."""
    address, port = place(edge).split(":")
    return x509.load_pem_x509_certificate(ssl.get_server_certificate((address, int(port))).encode()).serial_number


def serial_of(path: Path | str) -> int:
    return x509.load_pem_x509_certificate(Path(path).read_bytes()).serial_number


@pytest.fixture
def renewed(edges: Any, tmp_path: Path) -> dict[str, str]:
    """Another certificate of the edges with another key, as the `tls` of a listener."""
    names = ",".join(f"IP:{edge.variables['stickyring_address']}" for edge in edges)
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"),
            *("-days", "2", "-subj", "/CN=edge", "-addext", f"subjectAltName={names}"),
            *("-keyout", tmp_path / "key.pem", "-out", tmp_path / "chain.pem"),
        ],
        check=True,
        capture_output=True,
    )
    return {"certificate": str(tmp_path / "chain.pem"), "key": str(tmp_path / "key.pem")}


@pytest.fixture
def sessions(edges: Any, programs: Path, tmp_path: Path) -> Iterator[Any]:
    """Websockets over TLS to every edge, which do not reconnect; calling it closes them and returns the drops."""
    with ExitStack() as stack:
        holders = []
        for edge in edges:
            options = ["--transport", "websocket", "--connections", "1", "--ids", str(SESSIONS), "--hold", "600"]
            holder = subprocess.Popen(
                [programs / "stickyring", "probe", edge.url("safe"), *options, "--json", tmp_path / edge.name],
                env=os.environ | {"SSL_CERT_FILE": listener(edge)["tls"]["certificate"]},
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(holder.wait)
            stack.callback(holder.kill)
            holders.append(holder)
        for holder in holders:
            assert any(f"all {SESSIONS} sessions are open" in line for line in holder.stdout)

        def end() -> list[int]:
            totals = []
            for edge, holder in zip(edges, holders, strict=True):
                holder.send_signal(signal.SIGINT)
                holder.communicate(timeout=60)
                totals.append(json.loads((tmp_path / edge.name).read_text())["total"])
            assert all(total["sessions"] == SESSIONS for total in totals)
            return [total["dropped"] for total in totals]

        yield end


WEBSOCKET = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}


@pytest.mark.parametrize(("transport", "headers", "welcome"), [("polling", {}, 200), ("websocket", WEBSOCKET, 101)])
def test_a_page_of_the_same_host_is_accepted(edges: Any, transport: str, headers: dict[str, str], welcome: int) -> None:
    """Engine.IO compares a browser's Origin with the scheme that the edge passes on, and with the host."""
    for edge in edges:
        trusted = ssl.create_default_context(cafile=listener(edge)["tls"]["certificate"])
        # Without the port of https, as browsers send it.
        own = f"https://{place(edge)}".removesuffix(":443")
        for origin, status in ((own, welcome), ("https://elsewhere.example", 400)):
            connection = HTTPSConnection(place(edge), context=trusted, timeout=5)
            path = f"/socket.io/?EIO=4&transport={transport}&client_id=safe"
            connection.request("GET", path, headers=headers | {"Origin": origin})
            assert connection.getresponse().status == status
            connection.close()


def test_a_body_without_a_length_is_read_to_its_end(edges: Any) -> None:
    """Over HTTP/2."""
    events = "\x1e".join(f'42{number}["message","{number}"]' for number in range(1, 101))
    for edge in edges:
        certificate = listener(edge)["tls"]["certificate"]
        connection = HTTPSConnection(place(edge), context=ssl.create_default_context(cafile=certificate), timeout=10)
        path = "/socket.io/?EIO=4&transport=polling&client_id=safe"

        def poll(path: str, connection: HTTPSConnection = connection) -> str:
            connection.request("GET", path)
            return connection.getresponse().read().decode()

        def post(path: str, *pieces: str, url: str = edge.url("safe"), certificate: str = certificate) -> str:
            command = ["node", "--input-type=module", "--eval", POST_WITHOUT_LENGTH, url, certificate, path, *pieces]
            return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

        path += f"&sid={json.loads(poll(path)[1:])['sid']}"
        assert post(path, "4", "0") == "200"
        assert post(path, *(events[start : start + 50] for start in range(0, len(events), 50))) == "200"
        answers: list[str] = []
        while not any(answer.startswith("43100[") for answer in answers):
            answers += poll(path).split("\x1e")
        assert [answer.split("[")[0] for answer in answers if answer.startswith("43")] == [
            f"43{n}" for n in range(1, 101)
        ]
        assert post(path, events, "\x1eno packet") == "400"
        connection.close()


POST_WITHOUT_LENGTH = """
import { readFileSync } from "node:fs";
import { connect } from "node:http2";
const [url, certificate, path, ...pieces] = process.argv.slice(1);
const session = connect(url, { ca: readFileSync(certificate) });
const request = session.request({ ":method": "POST", ":path": path });
request.on("response", (headers) => console.log(headers[":status"]));
request.on("end", () => session.close()).resume();
for (const piece of pieces) request.write(piece);
request.end();
"""


def test_only_envoy_can_read_the_key(edges: Any, machine: Any) -> None:
    for edge in edges:
        file = machine(edge.name).file("/etc/stickyring-edge/xds/certificates/safe.json")
        assert (file.user, file.group, file.mode) == ("root", "stickyring-edge", 0o640)
        assert "PRIVATE KEY" in file.content_string


def test_changes_without_a_listener_or_a_restart_affect_no_user(
    edges: Any,
    residents: Any,
    sessions: Any,
    edge_play: Any,
    listeners: Any,
    processes: Any,
    renewed: dict[str, str],
    programs: Path,
) -> None:
    """A renewed certificate, another policy at the end of the list, other timeouts of routes and clusters."""
    before, since = processes(), time.monotonic()
    assert {serial(edge) for edge in edges} == {serial_of(listener(edges[0])["tls"]["certificate"])}
    policies = edges[0].variables["stickyring_edge_hash_policies"] + [{"connection_properties": {"source_ip": True}}]
    changes = {
        "stickyring_edge_hash_policies": policies,
        "stickyring_edge_connect_timeout": 3,
        "stickyring_edge_route_timeout": 65,
    }
    said = edge_play(*listeners("safe", tls=renewed), "-e", json.dumps(changes), "-vvv", "--diff").stdout
    key, chain = (Path(renewed[kind]).read_text().splitlines()[1] for kind in ("key", "certificate"))
    assert chain in said
    assert key not in said
    assert {serial(edge) for edge in edges} == {serial_of(renewed["certificate"])}
    assert processes() == before
    counts = [
        (one.count("disconnect", since), one.count("failed", since)) for connected in residents for one in connected
    ]
    assert set(counts) == {(0, 0)}
    assert sessions() == [0] * len(edges)
    # A client that trusts only the new certificate is served, over every transport.
    environment = os.environ | {"SSL_CERT_FILE": renewed["certificate"]}
    for edge in edges:
        probe = [programs / "stickyring", "probe", edge.url("safe"), "--ids", "5", "--connections", "1"]
        subprocess.run(probe, env=environment, check=True, capture_output=True, timeout=120)


def test_a_key_that_does_not_fit_reaches_no_edge(
    edges: Any, edge_play: Any, listeners: Any, renewed: dict[str, str]
) -> None:
    mixed = renewed | {"key": listener(edges[0])["tls"]["key"]}
    refused = edge_play(*listeners("safe", tls=mixed), check=False)
    assert refused.returncode != 0
    assert "does not fit the first certificate of" in " ".join(refused.stdout.split())
    assert {serial(edge) for edge in edges} == {serial_of(listener(edges[0])["tls"]["certificate"])}
