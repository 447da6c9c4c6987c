"""Applications that do more than chat: uploads, passwords, streams of events, MessagePack, Django, several servers.

They are deployed one after the other, and stay: the next scenario deploys what it needs.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
import socketio

PHOTO = b"\xff\xd8\xff\x00" * 750_000
"""Larger than the edge's limit for a body, and smaller than that of its path for uploads."""
REPORT_SECONDS = 3
"""As the application has it."""
DRAIN_SECONDS = 10
"""Far less than what a drain may take."""


def user_of(url: str, name: str) -> str:
    """A user whose requests a node of this name gets."""
    for number in count():
        with urlopen(f"{url}/healthz?client_id=user-{number}", timeout=5) as answer:
            if answer.headers["x-served-by"].rpartition("-")[0] == name:
                return f"user-{number}"
    raise AssertionError


def page(url: str, user: str) -> bytes:
    """The application's first page, from the user's node."""
    with urlopen(f"{url}/?client_id={user}", timeout=5) as answer:
        return bytes(answer.read())


@pytest.fixture(scope="module")
def password(play: Callable[..., str]) -> str:
    """Of the photo wall, which every node now serves; site.yml has proven it with clients that log in."""
    password = secrets.token_hex()
    given = {"stickyring_node_secrets": {"WALL_PASSWORD": password}, "stickyring_probe_auth": {"password": password}}
    play("site.yml", "photo_wall:application", stickyring_node_worker_class="eventlet", **given)
    return password


def test_a_probe_that_cannot_log_in_says_why(password: str, edge_url: Any) -> None:
    command = [Path(sys.executable).with_name("stickyring"), "probe", "--no-echo", "--ids", "3", edge_url("sticky")]
    refused = subprocess.run([*command, "--auth", '{"password": "x"}'], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "wrong password" in refused.stdout + refused.stderr


def test_an_upload_is_in_the_database_for_who_has_the_password(password: str, edge_url: Any) -> None:
    url = edge_url("sticky")
    with urlopen(Request(f"{url}/upload/ada?client_id=ada", PHOTO), timeout=20) as answer:
        assert answer.read() == b"1"
    with socketio.SimpleClient(serializer="msgpack") as client:
        client.connect(f"{url}?client_id=ada", auth={"password": password})
        assert client.call("fetch", "ada") == [PHOTO]
    # The control: on another path, the edge takes no body of this size. It answers before it has read one.
    connection = HTTPConnection(urlsplit(url).netloc, timeout=5)
    connection.putrequest("POST", "/other?client_id=ada")
    connection.putheader("Content-Length", str(len(PHOTO)))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_a_static_file_is_served_through_the_edge(password: str, edge_url: Any) -> None:
    with urlopen(f"{edge_url('sticky')}/style.py?client_id=ada", timeout=5) as answer:
        assert b"a static file" in answer.read()


def test_a_stream_of_events_does_not_hold_up_a_drain_but_a_slow_answer_does(
    password: str, edge_url: Any, nodes: Any, operate: Any
) -> None:
    url, node = edge_url("sticky"), nodes[0]
    user = user_of(url, node.name)
    answered: list[bytes] = []

    def report() -> None:
        with urlopen(f"{url}/reports/slow?client_id={user}", timeout=20) as answer:
            answered.append(answer.read())

    def drained() -> float:
        began = time.monotonic()
        try:
            operate(node, "drain")
            return time.monotonic() - began
        finally:
            operate(node, "undrain")

    with urlopen(f"{url}/events?client_id={user}", timeout=20) as stream:
        assert stream.readline().startswith(b"data: ")
        assert drained() < DRAIN_SECONDS
        assert [stream.readline() for _ in range(3)][1].startswith(b"data: "), "the stream has ended"
    reader = threading.Thread(target=report)
    reader.start()
    while b" 1 reports" not in page(url, user):
        assert reader.is_alive(), "it is answered at once"
    assert REPORT_SECONDS / 2 < drained() < DRAIN_SECONDS
    reader.join()
    assert answered == [b"done"]


@pytest.fixture(scope="module")
def different(password: str, play: Callable[..., str], nodes: Any) -> None:
    """The first node serves a Django site, the others two servers in one application."""
    site, servers = "django_site:application", "two_servers:application"
    choice = f"{{{{ '{site}' if inventory_hostname == '{nodes[0].name}' else '{servers}' }}}}"
    play("site.yml", choice, stickyring_node_worker_class="eventlet")


def test_a_django_site_answers_beside_its_socket_io(different: None, edge_url: Any, nodes: Any, operate: Any) -> None:
    url, node = edge_url("sticky"), nodes[0]
    user = user_of(url, node.name)
    assert page(url, user) == b"site"
    with socketio.SimpleClient() as client:
        client.connect(f"{url}?client_id={user}")
        assert client.call("say", "hello") == "hello"
        assert [session["key"] for session in sessions_of(node, operate)] == [user]


def test_both_servers_of_an_application_are_listed_and_drained(
    different: None, edge_url: Any, nodes: Any, operate: Any
) -> None:
    url, node = edge_url("sticky"), nodes[1]
    user = user_of(url, node.name)
    chat, game = (
        socketio.SimpleClient(reconnection=False),
        socketio.SimpleClient(reconnection=False, serializer="msgpack"),
    )
    with chat, game:
        chat.connect(f"{url}?client_id={user}")
        game.connect(f"{url}?client_id={user}", transports=["polling"], socketio_path="/game/socket.io")
        assert (chat.call("say", "hello"), game.call("move", b"e4")) == ("hello", b"e4")
        found = sessions_of(node, operate)
        assert [(session["key"], session["transport"]) for session in found] == [(user, "websocket"), (user, "polling")]
        try:
            operate(node, "drain")
            assert sessions_of(node, operate) == []
        finally:
            operate(node, "undrain")


def sessions_of(node: Any, operate: Any) -> list[dict[str, Any]]:
    """The sessions on a node, the oldest first."""
    found = [session for text in operate(node, "sessions") for session in json.loads(text)["sessions"]]
    return sorted(found, key=lambda session: -session["seconds"])
