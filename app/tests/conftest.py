"""Fixtures that run a real `stickyring serve` process on a free loopback port."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any, TypeVar

import pytest

import stickyring.echo

pytest_plugins = ("bus_fleet",)
APP = Path(__file__).parents[1]
STICKYRING = Path(sys.executable).with_name("stickyring")
DEADLINE_SECONDS = 15.0

Answer = TypeVar("Answer")


def wait_until(question: Callable[[], Answer], what: str, seconds: float = DEADLINE_SECONDS) -> Answer:
    """Return the first true answer; fail if there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := question():
            return answer
        time.sleep(0.02)
    pytest.fail(f"not within {seconds} s: {what}")


class ServeProcess:
    """A running `stickyring serve`: `address` is host:port once it serves."""

    def __init__(self, process: subprocess.Popen[bytes], stderr: Path) -> None:
        self.process = process
        self._stderr = stderr
        self.address = ""

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def log(self) -> list[dict[str, Any]]:
        """Return the log so far; every line on standard error must be a JSON object."""
        return [json.loads(line) for line in self._stderr.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def logged(self, message: str) -> list[dict[str, Any]]:
        return [line for line in self.log() if message in line["message"]]

    def connect(self, timeout: float = 5.0) -> HTTPConnection:
        return HTTPConnection(self.address, timeout=timeout)

    def get(
        self, path: str, headers: dict[str, str] | None = None, method: str = "GET", body: str | None = None
    ) -> HTTPResponse:
        """Send one request on a new connection; read() of the result returns the body."""
        connection = self.connect()
        connection.request(method, path, body, headers or {})
        return connection.getresponse()

    def metric(self, sample: str) -> float:
        """Return the value of a sample, named as in the exposition; 0 when it is not there."""
        for line in self.get("/metrics").read().decode().splitlines():
            if line.startswith(f"{sample} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_SECONDS)


COROUTINES = "emit|send|sleep|disconnect|call|enter_room|leave_room|close_room|get_session|save_session"


def as_asgi(source: str) -> str:
    """Return a WSGI application of these tests as an ASGI application: an AsyncServer, and its pages in threads."""
    blocks = re.split(r"(?m)^(?=(?: *@.*\n)* *(?:def |application = ))", source)
    for number, block in enumerate(blocks):
        if not re.search(r"^ *def \w+\(sid|\bserver\.(?:emit|sleep)\(", block, re.M):
            continue
        block = re.sub(r"^( *)def ", r"\1async def ", block, flags=re.M)  # noqa: PLW2901
        block = re.sub(rf"\bserver\.({COROUTINES})\(", r"await server.\1(", block)  # noqa: PLW2901
        blocks[number] = re.sub(r"\b(?:time|eventlet)\.sleep\(", "await asyncio.sleep(", block)
    source = "".join(blocks).replace("eventlet.sleep(", "time.sleep(").replace("import eventlet\n", "")
    source = source.replace('async_mode="eventlet"', 'async_mode="asgi"').replace(
        "socketio.Server(", "socketio.AsyncServer("
    )
    source = source.replace("stickyring.bus.members(", "await stickyring.bus.async_members(")
    source = source.replace("bus.manager(", "bus.async_manager(").replace(" socketio.RedisM", " socketio.AsyncRedisM")
    source = source.replace("stickyring.node.gate", "stickyring.node.asgi.gate")
    source = source.replace("stickyring.node.sessions", "stickyring.node.asgi.sessions")
    source = re.sub(r"socketio\.WSGIApp\(server, (\w+)\)", r"socketio.ASGIApp(server, WsgiToAsgi(\1))", source)
    source = source.replace("socketio.WSGIApp(", "socketio.ASGIApp(")
    if "def application(environ" in source:
        source += "\napplication = WsgiToAsgi(application)\n"
    return f"import asyncio\nimport time\n{WSGI_TO_ASGI}\n{source}"


def rewrite(directory: Path) -> None:
    """Rewrite the applications in a folder for the worker class under test."""
    for path in directory.glob("*.py"):
        source = path.read_text()
        if RUNTIME == "asgi" and ("WSGIApp(" in source or "def application(environ" in source):
            path.write_text(as_asgi(source))
        if RUNTIME == "gevent":
            path.write_text(source.replace("eventlet", "gevent"))


WSGI_TO_ASGI = """
class WsgiToAsgi:
    def __init__(self, application):
        self.application = application

    async def __call__(self, scope, receive, send):
        assert scope["type"] == "http", scope["type"]
        begun = []
        environ = {"PATH_INFO": scope["path"], "REQUEST_METHOD": scope["method"]}
        answer = lambda: b"".join(self.application(environ, lambda *head: begun.append(head)))
        body = await asyncio.to_thread(answer)
        headers = [(name.lower().encode(), value.encode()) for name, value in begun[0][1]]
        await send({"type": "http.response.start", "status": int(begun[0][0][:3]), "headers": headers})
        await send({"type": "http.response.body", "body": body})
"""
RUNTIME = os.environ.get("STICKYRING_TEST_RUNTIME", "eventlet")
"""Which worker class serves the tests' applications: eventlet, or asgi or gevent, for which they are rewritten."""
WORKER = {"STICKYRING_WORKER_CLASS": RUNTIME}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is of the eventlet worker alone."""
    if RUNTIME != "eventlet":
        left_out = [item for item in items if item.get_closest_marker("eventlet")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@contextmanager
def serving(
    directory: Path, *arguments: str, descriptors: int | None = None, **environment: str
) -> Iterator[ServeProcess]:
    """Run `stickyring serve` in `directory`, which may contain applications; the block runs while it serves."""
    rewrite(directory)
    if RUNTIME != "eventlet" and (not arguments or arguments[0].startswith("--")):
        arguments = ("stickyring.echo:create_application()", *arguments)
    if RUNTIME == "asgi":
        arguments = tuple(one.replace("echo:create_application", "echo:create_asgi_application") for one in arguments)
    if RUNTIME == "gevent":
        source = Path(stickyring.echo.__file__).read_text().replace("__file__", repr(stickyring.echo.__file__))
        Path(directory, "gevent_echo.py").write_text(source.replace("eventlet", "gevent"))
        arguments = tuple(one.replace("stickyring.echo:", "gevent_echo:") for one in arguments)
    limit = [] if descriptors is None else ["prlimit", f"--nofile={descriptors}:{descriptors}"]
    command = [*limit, str(STICKYRING), "serve", "--listen", "127.0.0.1:0", "--node-name", "node1-1", *arguments]
    stderr = directory / "stderr"
    with stderr.open("wb") as output:
        process = subprocess.Popen(
            command, stderr=output, cwd=directory, env={"PATH": os.environ["PATH"]} | WORKER | environment
        )
    node = ServeProcess(process, stderr)
    try:
        wait_until(lambda: node.logged("serving ") or process.poll() is not None, "the node serves")
        assert process.poll() is None, stderr.read_text()
        node.address = node.logged("serving ")[0]["address"]
        yield node
    finally:
        if process.poll() is None:
            # SIGTERM would wait for connections that a test left open.
            process.send_signal(signal.SIGQUIT)
            process.wait(DEADLINE_SECONDS)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., ServeProcess]]:
    """A function that runs `serving` in the test's own folder until the end of the test."""
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(serving(tmp_path, *arguments, **options))


@pytest.fixture(scope="session")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pinned JavaScript client in node_modules."""
    folder = tmp_path_factory.mktemp("javascript")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(APP / name, folder)
    subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, check=True, timeout=60)
    return folder
