"""A client that keeps many requests just before their end, with a real Envoy: their bodies do not fill its heap.

Everything is on the loopback address. The heap and the client's rate are small, in proportion.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import h2.connection
import h2.events
import pytest
import yaml
from ansible_collections.stickyring.fleet.plugins.module_utils.admin import Admin
from certificates import Certificate
from running_envoy import Edge, Node, Websocket, compose, running, serving

HEAP = 64 * 1024 * 1024
BODY = 1_000_000
REQUESTS = 100
"""As many as a connection with HTTP/2 may have at a time: enough to fill the heap."""
PIECE = 16_384
BYTES_PER_SECOND = 10e6
ENDED = "envoy.overload_actions.reset_high_memory_stream"


class ReadingNode(Node):
    """Reads bodies, and answers when they have ended."""

    def handle(self) -> None:
        # The edge closes the connection of a request that it ends.
        with suppress(ConnectionError):
            super().handle()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.close_connection = True


class Client:
    """Has REQUESTS open on one connection, and begins others for those that end."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._connect()

    def _connect(self) -> None:
        self.socket = socket.create_connection(("127.0.0.1", self.port), 5)
        self.http = h2.connection.H2Connection()
        self.http.initiate_connection()
        self.left: dict[int, int] = {}

    def send(self) -> int:
        """Send a piece of each body, but never the last byte; return how many bytes."""
        try:
            return self._send_pieces()
        except ConnectionError:
            # An edge without memory closes connections.
            self._connect()
            return 0

    def _send_pieces(self) -> int:
        self.socket.setblocking(False)
        with suppress(BlockingIOError):
            data = self.socket.recv(1 << 20)
            if not data:
                raise ConnectionResetError
            self._receive(data)
        while len(self.left) < REQUESTS:
            stream = self.http.get_next_available_stream_id()
            path = f"/socket.io/?client_id={stream}"
            head = {":method": "POST", ":scheme": "http", ":authority": "edge", ":path": path}
            self.http.send_headers(stream, [*head.items(), ("content-length", str(BODY))])
            self.left[stream] = BODY - 1
        sent = sum(map(self._send, [*self.left]))
        self.socket.settimeout(5)
        self.socket.sendall(self.http.data_to_send())
        return sent

    def _receive(self, data: bytes) -> None:
        for event in self.http.receive_data(data):
            if isinstance(event, h2.events.StreamReset | h2.events.StreamEnded):
                self.left.pop(event.stream_id, None)

    def _send(self, stream: int) -> int:
        size = min(PIECE, self.left[stream], self.http.local_flow_control_window(stream))
        # Envoy closes a connection with empty frames.
        if size:
            self.http.send_data(stream, bytes(size))
        self.left[stream] -= size
        return size


@pytest.fixture
def start(tmp_path: Path, certificate: Certificate) -> Iterator[Callable[..., Any]]:
    """Starts an edge with the small heap, also one that ends no requests."""

    @contextmanager
    def started(*, ends_requests: bool = True) -> Iterator[Edge]:
        variables = {
            "stickyring_edge_max_heap_mib": HEAP // 1024**2,
            # Otherwise a slow machine would never fill it.
            "stickyring_edge_request_timeout": 300,
            "stickyring_edge_clusters": [
                {"name": "nodes", "endpoints": [{"name": "node", "address": "127.0.0.1", "port": node}]}
            ],
        }
        composed = compose(tmp_path, ["plain", "safe"], certificate, variables)
        bootstrap = tmp_path / "bootstrap.yaml.j2"
        if not ends_requests:
            settings = yaml.safe_load(bootstrap.read_text())
            manager = settings["overload_manager"]
            manager["actions"] = [one for one in manager["actions"] if one["name"] != ENDED]
            bootstrap.write_text(yaml.safe_dump(settings))
        with running(tmp_path, composed) as edge:
            yield edge

    with serving(ReadingNode) as node:
        yield started


def answer(edge: Edge) -> int:
    """The status that another user gets."""
    connection = HTTPConnection("127.0.0.1", edge.ports["plain"], timeout=10)
    try:
        connection.request("GET", "/socket.io/?client_id=other")
        return connection.getresponse().status
    finally:
        connection.close()


def statuses_while_filled(edge: Edge) -> set[int]:
    """What others get while a client sends twice what the heap can hold, or until they are refused."""
    client, sent, begun, found = Client(edge.ports["plain"]), 0, time.monotonic(), {200}
    while sent < 2 * HEAP and found == {200}:
        if sent < (time.monotonic() - begun) * BYTES_PER_SECOND:
            sent += client.send()
        found.add(answer(edge))
    return found


def test_requests_that_do_not_end_do_not_fill_the_heap(start: Callable[..., Any]) -> None:
    with start() as edge, Websocket(edge, "plain") as websocket:
        assert statuses_while_filled(edge) == {200}
        admin = Admin(edge.admin_socket)
        assert int(admin.get("/memory")["allocated"]) < HEAP
        [ended] = admin.get(f"/stats?format=json&filter={ENDED}.count")["stats"]
        assert ended["value"] > 0
        assert websocket.is_open()


def test_otherwise_they_would(start: Callable[..., Any]) -> None:
    with start(ends_requests=False) as edge:
        assert 503 in statuses_while_filled(edge)
