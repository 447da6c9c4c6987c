"""When an edge's process leaves, the users of its WebSockets are asked to reconnect, and nobody else."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import socketio
from conftest import ServeProcess, wait_until

OLD, OTHER, NEW = "old", "other", "new"
SLOW = 2
"""A rate at which a run with two users takes a second."""


@pytest.fixture
def node(serve: Callable[..., ServeProcess], tmp_path: Path) -> ServeProcess:
    (tmp_path / "socket.io.min.js").touch()
    return serve("stickyring.echo:create_application('.')")


HANGING = """
import os, socketio
server = socketio.Server(async_mode="eventlet")

@server.event
def disconnect(sid, reason):
    while not os.path.exists("go"):
        server.sleep(0.05)

application = socketio.WSGIApp(server)
"""


@pytest.fixture
def connect(node: ServeProcess) -> Iterator[Callable[..., socketio.Client]]:
    """Connects a client that does not reconnect, with headers as the edge sets them."""
    with ExitStack() as stack:

        def connected(process: str | None, *transports: str) -> socketio.Client:
            client = socketio.Client(reconnection=False)
            client.connect(
                node.url, headers={} if process is None else {"x-stickyring-process": process}, transports=[*transports]
            )
            stack.callback(client.disconnect)
            return client

        yield connected


def ask(node: ServeProcess, query: dict[str, object], **headers: str) -> tuple[int, dict[str, Any]]:
    """Ask as an edge does; return status and answer."""
    connection = node.connect()
    connection.request("POST", f"/stickyring/reconnect?{urlencode(query)}", headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, json.loads(body) if response.getheader("Content-Type") == "application/json" else {}


def test_only_the_websockets_of_the_leaving_process_reconnect(
    node: ServeProcess, connect: Callable[..., socketio.Client]
) -> None:
    leaving = [connect(OLD, "websocket"), connect(OLD, "polling", "websocket")]
    wait_until(lambda: all(client.transport() == "websocket" for client in leaving), "the second one is upgraded")
    staying = [connect(NEW, "websocket"), connect(OLD, "polling"), connect(None, "websocket")]
    assert ask(node, {"process": OLD, "rate": 1000}) == (202, {"to_move": 2})
    wait_until(lambda: not any(client.connected for client in leaving), "they are disconnected")
    assert all(client.connected for client in staying)
    wait_until(lambda: ask(node, {"process": OLD, "rate": 1000}) == (202, {"to_move": 0}), "nobody is left to ask")
    assert node.metric("stickyring_sessions_moved_total") == len(leaving)


def test_the_edge_may_ask_again_and_for_another_process_meanwhile(
    node: ServeProcess, connect: Callable[..., socketio.Client]
) -> None:
    leaving = [connect(OLD, "websocket") for _ in range(2)]
    assert ask(node, {"process": OLD, "rate": SLOW})[0] == 202
    leaving.append(connect(OTHER, "websocket"))

    def all_have_left() -> bool:
        for process in (OTHER, OLD):
            assert ask(node, {"process": process, "rate": 1000})[0] == 202
        return not any(client.connected for client in leaving)

    wait_until(all_have_left, "all of them are disconnected")
    assert node.metric("stickyring_sessions_moved_total") == len(leaving)


def test_a_disconnect_handler_that_hangs_keeps_nobody_from_being_asked(
    serve: Callable[..., ServeProcess], tmp_path: Path
) -> None:
    (tmp_path / "hanging.py").write_text(HANGING)
    node = serve("hanging:application")
    for number in range(2):
        client = socketio.Client(reconnection=False)
        client.connect(node.url, headers={"x-stickyring-process": OLD}, transports=["websocket"])

        def asked(wanted: int = number + 1) -> bool:
            ask(node, {"process": OLD, "rate": 1000})
            return node.metric("stickyring_sessions_moved_total") == wanted

        wait_until(asked, "it is asked")
    (tmp_path / "go").touch()


def test_nobody_can_ask_through_an_edge(node: ServeProcess, connect: Callable[..., socketio.Client]) -> None:
    """The application answers instead."""
    staying = connect(OLD, "websocket")
    assert ask(node, {"process": OLD, "rate": 1000}, **{"x-stickyring-client": "198.51.100.7"})[0] == 404
    assert ask(node, {"process": NEW, "rate": 1000})[0] == 202
    assert staying.connected
    assert node.metric("stickyring_sessions_moved_total") == 0


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ({"rate": 1}, "not one process and one rate, a number"),
        ({"process": OLD}, "not one process and one rate, a number"),
        ({"process": OLD, "rate": "fast"}, "not one process and one rate, a number"),
        ({"process": OLD, "rate": 0}, "rate: 0 is not a number above 0, up to 10000"),
        ({"process": OLD, "rate": "nan"}, "rate: nan is not a number above 0, up to 10000"),
    ],
)
def test_an_invalid_request_is_refused(node: ServeProcess, query: dict[str, object], error: str) -> None:
    assert ask(node, query) == (400, {"error": error})
