"""Settings of single paths, with a real Envoy: timeouts, bodies, retries, and what a change of them does to WebSockets.

Everything is on the loopback address. The nodes send events, answer late, and return the digest of a body.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from hashlib import sha256
from http.client import HTTPConnection, HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ansible_collections.stickyring.fleet.plugins.plugin_utils import edge_routes
from certificates import make_certificate
from running_envoy import Edge, Node, Websocket, compose, running, serving

# The role's default is 60, and at least the ping interval.
ROUTE_TIMEOUT = 1
# Nodes send their second event, or their answer, after this time.
LATE = 2 * ROUTE_TIMEOUT
# The role's default is 30.
REQUEST_TIMEOUT = 4
DRAIN_SECONDS = 1
DEFAULT_BODY = 1_000_000
LARGEST_UPLOAD = 20_000_000
PATHS = [
    {"prefix": "/reports", "timeout": 10 * LATE},
    {"prefix": "/upload", "body_limit": LARGEST_UPLOAD},
    {"prefix": "/upload/small", "timeout": 10 * LATE},
    {"prefix": "/events", "timeout": 0},
]
EVENTS = (b"data: first\n\n", b"data: second\n\n")


class SlowNode(Node):
    """Sends two events to clients that accept them; other answers to a GET are late as well."""

    refuses: ClassVar[bool] = False

    def do_GET(self) -> None:
        if self.headers.get("Accept") == "text/event-stream":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Content-Length", str(sum(map(len, EVENTS))))
            self.end_headers()
            self.wfile.write(EVENTS[0])
            time.sleep(LATE)
            # The edge may have ended the stream.
            with suppress(ConnectionError):
                self.wfile.write(EVENTS[1])
            return
        if not self.headers.get("Upgrade"):
            time.sleep(LATE if "late" in self.path else 0)
        with suppress(ConnectionError):
            super().do_GET()

    def do_POST(self) -> None:
        rest = int(self.headers["Content-Length"])
        if self.refuses:
            self.close_connection = True
            self.respond(503, b"", ("x-stickyring-elsewhere", "1"))
            return
        digest = sha256()
        while rest and (data := self.rfile.read1(min(rest, 65536))):
            digest.update(data)
            rest -= len(data)
        if not rest:
            self.respond(200, digest.hexdigest().encode())

    def respond(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class DrainingNode(SlowNode):
    """Sends requests to the next node of the ring, as a node that drains does."""

    refuses = True


@pytest.fixture(scope="module")
def composed(folder: Path) -> Iterator[dict[str, Any]]:
    with serving(SlowNode) as serves, serving(DrainingNode) as drains:
        ports = {"whole": [("node", serves)], "draining": [("node", serves), ("draining", drains)]}
        variables = {
            "stickyring_edge_paths": PATHS,
            "stickyring_edge_request_timeout": REQUEST_TIMEOUT,
            "stickyring_edge_clusters": [
                {
                    "name": name,
                    "endpoints": [{"name": node, "address": "127.0.0.1", "port": port} for node, port in nodes],
                }
                for name, nodes in ports.items()
            ],
        }
        settings = {"plain": {"cluster": "whole"}, "retried": {"cluster": "draining"}, "safe": {"cluster": "whole"}}
        names = ("plain", "retried", "safe")
        yield compose(folder, names, make_certificate(folder), variables, **settings)


def with_nodes(files: dict[str, Any], listener: str) -> list[dict[str, Any]]:
    """The routes of a listener that lead to nodes."""
    return [route for route in files[f"routes/{listener}.json"][0]["virtual_hosts"][0]["routes"] if "route" in route]


@pytest.fixture(scope="module")
def edge(folder: Path, composed: dict[str, Any]) -> Iterator[Edge]:
    options = ("--drain-time-s", str(DRAIN_SECONDS), "--drain-strategy", "immediate")
    with running(folder, composed, *options) as running_edge:
        for name in running_edge.ports:
            for route in with_nodes(running_edge.files, name):
                if "prefix" in route["match"]:
                    route["route"]["timeout"] = f"{ROUTE_TIMEOUT}s"
        assert running_edge.give(running_edge.files)["proven"]
        yield running_edge


def request(
    edge: Edge, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[HTTPResponse, bytes]:
    """The response, and what came of its body."""
    connection = HTTPConnection("127.0.0.1", edge.ports["plain"], timeout=10 * LATE)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    try:
        text = response.read()
    except IncompleteRead as cut:
        text = cut.partial
    connection.close()
    return response, text


@pytest.mark.parametrize("query", ["", "?client_id=alice"])
@pytest.mark.parametrize(
    ("path", "events"), [("/events", 2), ("/events/news", 2), ("/eventsource", 1), ("/news", 1), ("/reports/live", 2)]
)
def test_an_event_stream_stays_open_under_its_prefix(edge: Edge, path: str, query: str, events: int) -> None:
    """The controls are paths that no prefix matches: the route timeout cuts their stream."""
    response, text = request(edge, "GET", path + query, Accept="text/event-stream")
    assert response.status == 200
    assert text == b"".join(EVENTS[:events])


def test_a_quiet_stream_is_not_idle(edge: Edge) -> None:
    """Envoy's default for the idle time of a stream is five minutes; no test waits that long."""
    for listener in edge.ports:
        routes = with_nodes(edge.files, listener)
        assert {route["route"]["idle_timeout"] for route in routes} == {"0s"}
        assert any(route["match"].get("path_separated_prefix") == "/events" for route in routes)


@pytest.mark.parametrize(("path", "status"), [("/reports/2026?late", 200), ("/reports?late", 200), ("/x?late", 504)])
def test_an_answer_may_take_longer_under_its_prefix(edge: Edge, path: str, status: int) -> None:
    assert request(edge, "GET", path)[0].status == status


@pytest.mark.parametrize("query", ["", "?client_id=alice"])
@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("/upload", LARGEST_UPLOAD),
        ("/upload/photos", LARGEST_UPLOAD),
        ("//upload/./x/../photos", LARGEST_UPLOAD),
        ("/up%6Coad", LARGEST_UPLOAD),
        ("/uploads", DEFAULT_BODY),
        ("/Upload", DEFAULT_BODY),
        ("/other", DEFAULT_BODY),
        # Nothing is inherited from the shorter prefix.
        ("/upload/small", DEFAULT_BODY),
        ("/upload/small/x", DEFAULT_BODY),
    ],
)
def test_a_body_may_be_larger_under_its_prefix(edge: Edge, path: str, query: str, limit: int) -> None:
    body = b"0123456789" * (limit // 10)
    response, text = request(edge, "POST", path + query, body)
    assert (response.status, text) == (200, sha256(body).hexdigest().encode())
    # The body is not sent: the length alone is refused.
    connection = HTTPConnection("127.0.0.1", edge.ports["plain"], timeout=10)
    connection.putrequest("POST", path + query)
    connection.putheader("Content-Length", str(limit + 1))
    connection.endheaders()
    response = connection.getresponse()
    assert (response.status, response.headers["x-served-by"]) == (413, None)
    connection.close()


def test_an_invalid_key_is_refused_under_a_prefix_too(edge: Edge) -> None:
    assert request(edge, "POST", "/upload?client_id=%00", b"x")[0].status == 400


def test_a_visitor_gets_a_cookie_under_a_prefix_too(edge: Edge) -> None:
    response, _ = request(edge, "POST", "/upload", b"x")
    assert response.headers["set-cookie"].startswith("stickyring=")
    assert request(edge, "POST", "/upload?client_id=alice", b"x")[0].headers["set-cookie"] is None


def upload(port: int, path: str, size: int, begin: int, pause: float) -> tuple[int, bytes, str | None]:
    """Send the first bytes, pause, and send the rest; status, body and node of the response."""
    body = b"0123456789" * (size // 10)
    connection = HTTPConnection("127.0.0.1", port, timeout=10 * LATE)
    connection.putrequest("POST", path)
    connection.putheader("Content-Length", str(size))
    connection.endheaders(body[:begin])
    time.sleep(pause)
    with suppress(ConnectionError):
        connection.send(body[begin:])
    response = connection.getresponse()
    text = response.read()
    connection.close()
    assert response.status != 200 or text == sha256(body).hexdigest().encode()
    return response.status, text, response.headers["x-served-by"]


def test_the_timeout_of_a_route_does_not_count_while_a_body_is_sent(edge: Edge) -> None:
    status, _, node = upload(edge.ports["plain"], "/other", DEFAULT_BODY, 1000, LATE)
    assert (status, node) == (200, "node")


def test_the_request_timeout_is_for_every_path(edge: Edge) -> None:
    """Envoy has it for a listener only."""
    status, _, _ = upload(edge.ports["plain"], "/upload", LARGEST_UPLOAD, 1000, REQUEST_TIMEOUT + 1)
    assert status == 408


def test_a_large_body_reaches_the_next_node_if_the_first_one_refuses_it_in_time(edge: Edge) -> None:
    """What has come before the refusal is sent again; a body that may have been lost in part is not."""
    port = edge.ports["retried"]
    served = {upload(port, f"/upload?client_id=user-{user}", LARGEST_UPLOAD, 100_000, 0.3)[::2] for user in range(8)}
    assert served == {(200, "node")}
    # The control: some of these users belong to the node that drains.
    refused = deepcopy(edge.files)
    for route in with_nodes(refused, "retried"):
        route["request_body_buffer_limit"] = 1000
    assert "failed" not in edge.give(refused)
    try:
        statuses = {upload(port, f"/upload?client_id=user-{user}", 200_000, 100_000, 0.3)[0] for user in range(8)}
    finally:
        assert "failed" not in edge.give(edge.files)
    # The refusal itself, or Envoy's own answer if the rest of the body comes while it sends the request again.
    assert 200 in statuses
    assert statuses - {200}
    assert statuses <= {200, 503, 507}


def test_a_changed_path_changes_only_routes_and_ends_no_websocket(
    edge: Edge, composed: dict[str, Any], folder: Path
) -> None:
    listeners = (folder / "xds" / "listeners.json").read_bytes()
    files = deepcopy(edge.files)
    common = composed["common"] | {"paths": [{"prefix": "/upload", "body_limit": 2_000_000}], "largest_body": 5000}
    for item in composed["listeners"]:
        files[f"routes/{item['name']}.json"] = [edge_routes.routes(item, common, {})]
    with Websocket(edge, "plain") as plain, Websocket(edge, "safe") as safe:
        planned = edge.give(files, _ansible_check_mode=True)
        assert (planned["changed"], planned["ends"]) == (True, "")
        result = edge.give(files)
        assert set(result["written"]) == {f"routes/{name}.json" for name in edge.ports}
        assert (result["ends"], result["proven"]) == ("", True)
        assert (folder / "xds" / "listeners.json").read_bytes() == listeners
        done = time.monotonic() + 2 * DRAIN_SECONDS
        while time.monotonic() < done:
            assert plain.is_open()
            assert safe.is_open()
            time.sleep(0.1)
        for path, size, status in (
            ("/upload", 2_000_000, 200),
            ("/upload", 2_000_001, 413),
            ("/upload/small", 2_000_000, 200),
            ("/other", 5000, 200),
            ("/other", 5001, 413),
        ):
            assert request(edge, "POST", path, b"x" * size)[0].status == status, (path, size)
        assert "failed" not in edge.give(edge.files)
        assert plain.is_open()
