"""Applications of every shape: which are served with all that a node promises, and how the others are refused."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import socketio
from conftest import DEADLINE_SECONDS, STICKYRING, ServeProcess, serving, wait_until

from stickyring.node.master import GRACEFUL_SECONDS
from stickyring.node.operate import ask
from stickyring.node.takeover import ELSEWHERE_HEADER

GALLERY = Path(__file__).parents[2] / "gallery"
SHAPES = {
    "flask_rooms:app": ("say", ("room", "hello"), {}),
    "django_site:application": ("say", ("hello",), {}),
    "two_servers:application": ("say", ("hello",), {}),
    "two_servers:application /game": ("move", (b"e4",), {"serializer": "msgpack"}),
    "fastapi_chat:app": ("say", ("room", "hello"), {}),
    "photo_wall:application": ("say", ("hello",), {"serializer": "msgpack"}),
}
PASSWORD = "for tests"
ASGI = ("fastapi_chat:app", "stickyring.echo:create_asgi_application()")


def worker_class(application: str) -> tuple[str, ...]:
    return ("--worker-class", "asgi") if application in ASGI else ()


def check(folder: Path, application: str, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [STICKYRING, "serve", "--check", application, *worker_class(application), *options],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(GALLERY), "WALL_PASSWORD": PASSWORD},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


@pytest.fixture(params=SHAPES)
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[ServeProcess, str, Any]]:
    application, _, prefix = request.param.partition(" ")
    options = ("--control", "control", *worker_class(application))
    with serving(tmp_path, application, *options, PYTHONPATH=str(GALLERY), WALL_PASSWORD=PASSWORD) as process:
        yield process, f"{prefix}/socket.io", SHAPES[request.param]


@pytest.mark.parametrize("transport", ["polling", "websocket"])
def test_the_gate_stands_before_every_server(
    node: tuple[ServeProcess, str, Any], transport: str, tmp_path: Path
) -> None:
    process, path, (event, arguments, options) = node
    lost: list[str] = []
    with socketio.SimpleClient(reconnection=False, **options) as client:
        headers, auth = {"X-Stickyring-Key": "alice"}, {"password": PASSWORD}
        client.connect(process.url, headers, auth, [transport], socketio_path=path)
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


@pytest.mark.parametrize("application", dict.fromkeys(shape.partition(" ")[0] for shape in SHAPES))
def test_the_cap_refuses_newcomers(tmp_path: Path, application: str) -> None:
    options = ("--max-connections", "1", *worker_class(application))
    with serving(tmp_path, application, *options, PYTHONPATH=str(GALLERY), WALL_PASSWORD=PASSWORD) as node:
        handshake = "/socket.io/?EIO=4&transport=polling"
        assert [node.get(handshake).status for _ in range(2)] == [200, 503]


def test_the_cap_is_for_all_servers_together(tmp_path: Path) -> None:
    with serving(tmp_path, "two_servers:application", "--max-connections", "2", PYTHONPATH=str(GALLERY)) as node:
        handshake = "socket.io/?EIO=4&transport=polling"
        assert [node.get(f"{mount}/{handshake}").status for mount in ("", "/game", "/game", "")] == [200, 200, 503, 503]
        assert node.metric('stickyring_connections{transport="polling"}') == 2


def test_what_is_no_socket_io_reaches_the_application(node: tuple[ServeProcess, str, Any]) -> None:
    process, *_ = node
    assert process.get("/nowhere").status == 404
    assert process.get("/healthz").read() == b"ok\n"


ANSWERING = """
import socketio

server = socketio.Server()
inner = socketio.WSGIApp(server)
server.on("say", lambda sid, text: text)


def generator(environ, start_response):
    yield from inner(environ, start_response)


def catching(environ, start_response):
    try:
        return inner(environ, start_response)
    except StopIteration:
        start_response("500 Internal Server Error", [("Content-Length", "4")])
        return [b"oops"]
"""


@pytest.mark.parametrize("middleware", ["generator", "catching"])
def test_a_middleware_that_answers_for_a_websocket_does_not_break_it(tmp_path: Path, middleware: str) -> None:
    """The end of a request without an answer, which gunicorn marks with StopIteration, is unknown to many of them."""
    (tmp_path / "answering.py").write_text(ANSWERING)
    with serving(tmp_path, f"answering:{middleware}") as node, socketio.SimpleClient(reconnection=False) as client:
        client.connect(node.url, transports=["websocket"])
        assert [client.call("say", text) for text in ("one", "two")] == ["one", "two"]
        assert node.metric('stickyring_connections{transport="websocket"}') == 1
        client.disconnect()
        wait_until(lambda: node.metric('stickyring_connections{transport="websocket"}') == 0, "it is forgotten")


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
        (
            "from aiohttp import web; own = web.Application()",
            "own",
            "it is an application of aiohttp, which only the server of aiohttp can serve",
        ),
        ("", "fails", "it fails on a request for /: LookupError: no such thing ("),
        ("", "answers_text", "is no WSGI answer: it begins with 't'"),
        ("", "nothing", "Failed to find attribute 'nothing'"),
        ("import psycopg", "flask", "ModuleNotFoundError: No module named 'psycopg' ("),
        ("import os; os.kill(os.getpid(), 9)", "flask", "its process ended meanwhile"),
        ("import socketio; lone = socketio.Server()", "flask", "a socketio.Server that no socketio.WSGIApp serves"),
        ("import engineio; e = engineio.WSGIApp(engineio.Server())", "flask", "an engineio.Server without Socket.IO"),
        (
            "import socketio as s; e = s.WSGIApp(s.Server(async_mode='gevent_uwsgi'))",
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


@pytest.mark.parametrize("application", [*SHAPES, "stickyring.echo:create_application()", *ASGI])
def test_a_check_listens_nowhere_and_ends_well(tmp_path: Path, application: str) -> None:
    run = check(tmp_path, application.partition(" ")[0])
    assert (run.returncode, run.stdout) == (0, f"{application.partition(' ')[0]} can be served.\n")
    assert "serving" not in run.stderr


NESTED = """
import fastapi, flask
import socketio as s
from starlette.middleware.gzip import GZipMiddleware

site, api = flask.Flask("site"), fastapi.FastAPI()

@site.route("/")
@site.route("/<path:anything>")
def page(anything=""):
    return "a page"
"""


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("site", "s.WSGIApp(s.Server(), site)"),
        ("site", "s.WSGIApp(s.Server(), site.wsgi_app)"),
        ("api", "s.ASGIApp(s.AsyncServer(async_mode='asgi'), api)"),
        ("api", "s.ASGIApp(s.AsyncServer(async_mode='asgi'), GZipMiddleware(api))"),
    ],
)
def test_the_application_inside_a_middleware_is_refused(tmp_path: Path, inner: str, outer: str) -> None:
    (tmp_path / "nested.py").write_text(f"{NESTED}\nouter = {outer}\n")
    worker = "asgi" if inner == "api" else "eventlet"
    refused, served = (check(tmp_path, f"nested:{name}", "--worker-class", worker) for name in (inner, "outer"))
    assert refused.stderr.splitlines()[-1].endswith("which is in the middleware around it: name nested:outer")
    assert (refused.returncode, served.returncode) == (1, 0)


def test_a_middleware_that_took_the_place_of_the_application_is_no_other_one(tmp_path: Path) -> None:
    """As Flask's documentation writes it."""
    (tmp_path / "nested.py").write_text(f"{NESTED}\nsite.wsgi_app = s.WSGIApp(s.Server(), site.wsgi_app)\n")
    run = check(tmp_path, "nested:site")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("def wrong(): pass", "it is no coroutine function (scope, receive, send); if it makes the application, write"),
        ("def wrong(debug=0, name=1): pass", "it is no coroutine function (scope, receive, send); if it makes"),
        ("def wrong(scope, receive, send): pass", "it takes (scope, receive, send), but is no coroutine function"),
        ("def wrong(environ, start_response): pass", "it is a WSGI application"),
        ("async def wrong(scope): pass", "it does not take a request (scope, receive, send); if it makes"),
    ],
)
def test_what_asgi_cannot_call_is_refused_as_what_it_is(tmp_path: Path, source: str, cause: str) -> None:
    (tmp_path / "wrong.py").write_text(source)
    run = check(tmp_path, "wrong:wrong", "--worker-class", "asgi")
    assert run.returncode == 1
    assert cause in run.stderr.splitlines()[-1]


def test_an_async_mode_that_does_not_fit_the_worker_is_refused(tmp_path: Path) -> None:
    for source, worker, advice in (
        ("application = s.WSGIApp(s.Server(async_mode='gevent'))", "eventlet", "'eventlet' or 'threading': set it, or"),
        # An AsyncServer without async_mode takes aiohttp where it is installed.
        ("application = s.ASGIApp(s.AsyncServer())", "asgi", "but AsgiWorker needs 'asgi': set it"),
    ):
        (tmp_path / "other.py").write_text(f"import socketio as s\n{source}\n")
        run = check(tmp_path, "other:application", "--worker-class", worker)
        assert run.returncode == 1
        assert advice in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("worker", ["gthread", "sync"])
def test_a_worker_class_that_has_a_thread_for_each_user_is_refused(tmp_path: Path, worker: str) -> None:
    (tmp_path / "threaded.py").write_text(
        "import socketio as s\napplication = s.WSGIApp(s.Server(async_mode='threading'))\n"
    )
    run = check(tmp_path, "threaded:application", "--worker-class", worker)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].endswith("(--worker-class) to eventlet, gevent or asgi")


def test_the_mode_threading_has_green_threads(tmp_path: Path) -> None:
    """Many applications of Flask-SocketIO ask for it."""
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nimport socketio as s\nserver = s.Server(async_mode='threading')\n"
        "application = s.WSGIApp(server)\n"
        "@server.event\ndef say(sid, seconds):\n"
        "    time.sleep(seconds)\n    return seconds\n"
    )
    with serving(tmp_path, "threaded:application") as node:
        with socketio.SimpleClient() as slow, socketio.SimpleClient() as quick:
            for client, transport in ((slow, "polling"), (quick, "websocket")):
                client.connect(node.url, transports=[transport])
            slow.client.emit("say", 5, callback=lambda _: None)
            began = time.monotonic()
            assert quick.call("say", 0) == 0
            assert time.monotonic() - began < 4, "one handler has held up another"
        assert node.stop() == 0


@pytest.fixture
def fastapi(tmp_path: Path) -> Iterator[ServeProcess]:
    with serving(tmp_path, "fastapi_chat:app", "--worker-class", "asgi", PYTHONPATH=str(GALLERY)) as node:
        yield node


def test_lifespan_events_reach_the_application(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with serving(tmp_path, "fastapi_chat:app", "--worker-class", "asgi", PYTHONPATH=str(GALLERY)) as node:
        assert json.loads(node.get("/").read()) == {"started": ["database"]}
        assert node.stop() == 0
    assert capfd.readouterr().out == "closed database\n"


def test_an_application_that_does_not_start_is_refused(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(
        "async def application(scope, receive, send):\n"
        "    assert scope['type'] == 'lifespan'\n"
        "    await receive()\n"
        "    await send({'type': 'lifespan.startup.failed', 'message': 'no database'})\n"
    )
    run = check(tmp_path, "late:application", "--worker-class", "asgi")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "Error: cannot load late:application: its lifespan startup has failed"


def test_websockets_of_the_application_work(fastapi: ServeProcess) -> None:
    async def play() -> list[str]:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{fastapi.url}/plain") as websocket:
            texts = ["first", "x" * 1_000_000, "last"]
            for text in texts:
                await websocket.send_str(text)
            assert [await websocket.receive_str(timeout=5) for _ in texts] == texts
            await websocket.close()
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await session.ws_connect(f"{fastapi.url}/none")
        return [str(refused.value.status)]

    assert asyncio.run(play()) == ["403"]


def test_a_stream_of_events_does_not_hold_a_drain(fastapi: ServeProcess) -> None:
    stream = fastapi.get("/events")
    assert stream.readline() == b"data: here\n"
    began = time.monotonic()
    assert fastapi.stop() == 0
    assert time.monotonic() - began < GRACEFUL_SECONDS + 2, "the drain timeout is 30 s"


def test_a_handler_that_blocks_the_loop_stops_the_heartbeat(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(
        "import time\n"
        "async def application(scope, receive, send):\n"
        "    assert scope['type'] == 'http'\n"
        "    if scope['path'] == '/stuck':\n"
        "        time.sleep(3)\n"
        "    await send({'type': 'http.response.start', 'status': 204, 'headers': []})\n"
        "    await send({'type': 'http.response.body', 'body': b''})\n"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(6)
        options = ("--worker-class", "asgi")
        with serving(tmp_path, "stuck:application", *options, NOTIFY_SOCKET=str(tmp_path / "notify")) as node:
            assert manager.recv(64) == b"READY=1"
            assert manager.recv(64) == b"WATCHDOG=1"
            manager.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while manager.recv(64):
                    pass
            assert node.get("/stuck").status == 204
            heard = 0
            with contextlib.suppress(BlockingIOError):
                while manager.recv(64):
                    heard += 1
            assert heard <= 1, "of the three seconds at most their beginning"
            manager.settimeout(6)
            assert manager.recv(64) == b"WATCHDOG=1", "then it goes on"


def test_a_stream_at_the_root_passes_the_check(tmp_path: Path) -> None:
    """Starlette waits for its client to leave, which the check must let it do."""
    (tmp_path / "streaming.py").write_text(
        "import asyncio\n"
        "from fastapi import FastAPI\n"
        "from fastapi.responses import StreamingResponse\n"
        "app = FastAPI()\n"
        "@app.get('/')\n"
        "async def stream():\n"
        "    async def endless():\n"
        "        while True:\n"
        "            yield 'more'\n"
        "            await asyncio.sleep(0.1)\n"
        "    return StreamingResponse(endless())\n"
    )
    run = check(tmp_path, "streaming:app", "--worker-class", "asgi")
    assert run.returncode == 0, run.stderr


def test_a_session_has_one_websocket_at_a_time(fastapi: ServeProcess) -> None:
    """However many its client opens before it upgrades: they would be connections above the cap."""

    async def play() -> None:
        async with aiohttp.ClientSession() as session:
            handshake = f"{fastapi.url}/socket.io/?EIO=4&transport="
            async with session.get(f"{handshake}polling") as answer:
                sid = json.loads((await answer.text())[1:])["sid"]
            opened = [await session.ws_connect(f"{handshake}websocket&sid={sid}") for _ in range(3)]
            for second in opened[1:]:
                message = await second.receive(timeout=5)
                assert message.type in {aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED}
            await opened[0].send_str("2probe")
            assert await opened[0].receive_str(timeout=5) == "3probe"

    asyncio.run(play())


def test_a_websocket_of_the_application_does_not_hold_a_drain_and_is_closed_at_the_end(fastapi: ServeProcess) -> None:
    async def play() -> tuple[int | None, float]:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{fastapi.url}/plain") as websocket:
            await websocket.send_str("here")
            assert await websocket.receive_str(timeout=5) == "here"
            began = time.monotonic()
            fastapi.process.terminate()
            message = await websocket.receive(timeout=10)
            return message.data, time.monotonic() - began

    status, seconds = asyncio.run(play())
    assert status == 1001
    assert seconds < GRACEFUL_SECONDS, "the drain timeout is 30 s"
