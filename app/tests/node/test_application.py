"""Applications of every shape: which are served with all that a node promises, and how the others are refused."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import socketio
from conftest import DEADLINE_SECONDS, STICKYRING, ServeProcess, serving, wait_until

from stickyring.node.operate import ask
from stickyring.node.takeover import ELSEWHERE_HEADER

GALLERY = Path(__file__).parents[2] / "gallery"
SHAPES = {
    "flask_rooms:app": ("say", ("room", "hello"), {}),
    "django_site:application": ("say", ("hello",), {}),
    "two_servers:application": ("say", ("hello",), {}),
    "two_servers:application /game": ("move", (b"e4",), {"serializer": "msgpack"}),
}


def check(folder: Path, application: str, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [STICKYRING, "serve", "--check", application, *options],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(GALLERY)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


@pytest.fixture(params=SHAPES)
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[ServeProcess, str, Any]]:
    application, _, prefix = request.param.partition(" ")
    with serving(tmp_path, application, "--control", "control", PYTHONPATH=str(GALLERY)) as process:
        yield process, f"{prefix}/socket.io", SHAPES[request.param]


@pytest.mark.parametrize("transport", ["polling", "websocket"])
def test_the_gate_stands_before_every_server(
    node: tuple[ServeProcess, str, Any], transport: str, tmp_path: Path
) -> None:
    process, path, (event, arguments, options) = node
    lost: list[str] = []
    with socketio.SimpleClient(reconnection=False, **options) as client:
        client.connect(process.url, transports=[transport], socketio_path=path, headers={"X-Stickyring-Key": "alice"})
        client.client.on("disconnect", lost.append)
        assert client.call(event, arguments) == arguments[-1]
        assert process.metric(f'stickyring_connections{{transport="{transport}"}}') == 1
        (session,) = ask(tmp_path / "control", "GET", "/sessions")["sessions"]
        assert (session["key"], session["transport"]) == ("alice", transport)
        ask(tmp_path / "control", "POST", "/drain")
        wait_until(lambda: lost, "the client is asked to reconnect")
        assert process.metric("stickyring_sessions_moved_total") == 1
    assert process.get("/readyz").status == 503
    refused = process.get(f"/{path}/?EIO=4&transport=polling".replace("//", "/"))
    assert (refused.status, refused.headers[ELSEWHERE_HEADER]) == (503, "1")


def test_the_cap_is_for_all_servers_together(tmp_path: Path) -> None:
    with serving(tmp_path, "two_servers:application", "--max-connections", "2", PYTHONPATH=str(GALLERY)) as node:
        handshake = "socket.io/?EIO=4&transport=polling"
        assert [node.get(f"{mount}/{handshake}").status for mount in ("", "/game", "/game", "")] == [200, 200, 503, 503]
        assert node.metric('stickyring_connections{transport="polling"}') == 2


def test_what_is_no_socket_io_reaches_the_application(node: tuple[ServeProcess, str, Any]) -> None:
    process, *_ = node
    assert process.get("/nowhere").status == 404
    assert process.get("/healthz").read() == b"ok\n"


WRONG = """
import socketio
from flask import Flask
from flask_socketio import SocketIO

flask = Flask(__name__)
chat = SocketIO(flask)
server = socketio.Server()
class Site:
    def __call__(self, environ, start_response): return []
def make(): return flask
def make_with_options(debug=False, name="chat"): return flask
async def asgi(scope, receive, send): pass
def fails(environ, start_response): raise LookupError("no such thing")
def answers_text(environ, start_response):
    start_response("200 OK", [])
    return "text"
number = 7
"""


@pytest.mark.parametrize(
    ("source", "name", "cause"),
    [
        ("", "chat", "it is a SocketIO of Flask-SocketIO: name the Flask application, such as wrong:app"),
        ("", "server", "it is a socketio.Server: name its application, socketio.WSGIApp(server)"),
        ("", "number", "it is a int, which cannot be called"),
        ("", "Site", "it is a class: write wrong:Site() to make"),
        ("", "make", "it does not take a request (environ, start_response); if it makes the application, write"),
        ("", "make_with_options", "it returns an object of Flask, which is no WSGI answer; if it makes the"),
        ("", "asgi", "it is an ASGI application"),
        ("", "fails", "it fails on a request for /: LookupError: no such thing ("),
        ("", "answers_text", "is no WSGI answer: it begins with 't'"),
        ("", "nothing", "Failed to find attribute 'nothing'"),
        ("import psycopg", "flask", "ModuleNotFoundError: No module named 'psycopg' ("),
        ("import os; os.kill(os.getpid(), 9)", "flask", "its process ended meanwhile"),
        ("import socketio; lone = socketio.Server()", "flask", "a socketio.Server that no socketio.WSGIApp serves"),
        ("import engineio; e = engineio.WSGIApp(engineio.Server())", "flask", "an engineio.Server without Socket.IO"),
        (
            "import socketio as s; e = s.WSGIApp(s.Server(async_mode='gevent'))",
            "flask",
            "whose package is not installed (",
        ),
    ],
)
def test_a_wrong_application_is_refused_in_one_line(tmp_path: Path, source: str, name: str, cause: str) -> None:
    wrong = WRONG if name == "server" else WRONG.replace("server = ", "")
    (tmp_path / "wrong.py").write_text(f"{source}\n{wrong}")
    run = check(tmp_path, f"wrong:{name}")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(f"Error: cannot load wrong:{name}: ")
    assert cause in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("application", [*SHAPES, "stickyring.echo:create_application()"])
def test_a_check_listens_nowhere_and_ends_well(tmp_path: Path, application: str) -> None:
    run = check(tmp_path, application.partition(" ")[0])
    assert (run.returncode, run.stdout) == (0, "")
    assert "serving" not in run.stderr


def test_an_async_mode_that_does_not_fit_the_worker_is_refused(tmp_path: Path) -> None:
    run = check(tmp_path, "flask_rooms:app", "--worker-class", "gthread")
    assert run.returncode == 1
    assert "its async_mode is 'eventlet', but ThreadWorker needs 'threading'" in run.stderr
