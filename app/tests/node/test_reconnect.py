"""When an edge's process is replaced, the users of its WebSockets are asked to reconnect, and nobody else."""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import socketio
from conftest import STICKYRING, ServeProcess, wait_until

OLD, NEW = "old", "new"


@pytest.fixture
def node(serve: Callable[..., ServeProcess], tmp_path: Path) -> ServeProcess:
    (tmp_path / "socket.io.min.js").touch()
    return serve("stickyring.echo:create_application('.')", "--control", "control")


@pytest.fixture
def connect(node: ServeProcess) -> Iterator[Callable[..., socketio.Client]]:
    """Connects a client that does not reconnect, with headers as the edge sets them."""
    with ExitStack() as stack:

        def connected(process: str | None, *transports: str, cluster: str | None = "nodes") -> socketio.Client:
            client = socketio.Client(reconnection=False)
            headers = {"x-stickyring-process": process, "x-stickyring-cluster": cluster}
            given = {name: value for name, value in headers.items() if value is not None}
            client.connect(node.url, headers=given, transports=[*transports])
            stack.callback(client.disconnect)
            return client

        yield connected


def ask(folder: Path, *arguments: str) -> dict[str, float]:
    """Run the command; return what it prints."""
    command: list[str | Path] = [STICKYRING, "reconnect", "--control", folder / "control", *arguments]
    answer: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return answer


def test_only_the_websockets_of_the_replaced_process_reconnect(
    connect: Callable[..., socketio.Client], tmp_path: Path
) -> None:
    leaving = [connect(OLD, "websocket"), connect(OLD, "polling", "websocket")]
    wait_until(lambda: all(client.transport() == "websocket" for client in leaving), "the second one is upgraded")
    staying = [connect(NEW, "websocket"), connect(OLD, "polling"), connect(None, "websocket")]
    numbers = ask(tmp_path, "--process", OLD, "--rate", "1000")
    assert {name: numbers[name] for name in ("to_move", "asked", "left")} == {"to_move": 2, "asked": 2, "left": 2}
    wait_until(lambda: not any(client.connected for client in leaving), "they are disconnected")
    assert all(client.connected for client in staying)
    assert ask(tmp_path, "--process", OLD)["asked"] == 0, "a second run finds nobody"


def test_the_empty_name_is_that_of_an_edge_that_names_no_process(
    connect: Callable[..., socketio.Client], tmp_path: Path
) -> None:
    leaving, staying = connect(None, "websocket"), [connect(NEW, "websocket"), connect(None, "websocket", cluster=None)]
    assert ask(tmp_path, "--process", "")["left"] == 1
    wait_until(lambda: not leaving.connected, "it is disconnected")
    assert all(client.connected for client in staying), "the second one came through no edge"
