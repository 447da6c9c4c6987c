"""A bus on a socket of its own, nodes with an application that uses it, and clients of them."""

from __future__ import annotations

import json
import queue
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import redis
from bus_trio import Trio, server_program
from conftest import ServeProcess, serving, wait_until

CLIENT = Path(__file__).with_name("listening_client.mjs")
APPLICATION = """
import uuid
import socketio
import stickyring.bus

server = socketio.Server(
    async_mode="eventlet", client_manager={manager}, ping_interval={pings}, ping_timeout={pings}
)

def tell_of_loss():
    server.emit("loss", None)

server.manager.on_loss = tell_of_loss

@server.event
def connect(sid, environ, auth=None):
    if (auth or {{}}).get("slow"):
        server.enter_room(sid, "slow")
        server.sleep(3)
    if {hello}:
        server.emit("hello", [environ.get("stickyring.recovered"), auth], to=sid)

@server.event
def disconnect(sid, reason):
    if {goodbye}:
        server.emit("left", sid, room="nobody")
        for other, _ in [*server.manager.get_participants("/", "partners")]:
            if other != sid:
                server.leave_room(other, "partners")

@server.event
def join(sid, room):
    server.enter_room(sid, room)
    return server.rooms(sid)

@server.event
def leave(sid, room):
    server.leave_room(sid, room)

@server.event
def say(sid, room, *texts):
    server.emit("said", texts, room=room, skip_sid=None)

@server.event
def others(sid, text):
    server.emit("said", text, skip_sid=sid)

@server.event
def note(sid, value):
    server.save_session(sid, dict(noted=value))

@server.event
def noted(sid):
    return server.get_session(sid)

def count():
    # One room for everybody, and one for each third.
    run, number = uuid.uuid4().hex, 0
    while True:
        number += 1
        server.emit("numbered", (run, number))
        server.sleep(0.05)

@server.event
def send_many(sid, count, size):
    for _ in range(count):
        server.emit("many", [b"x"] * size if count == 1 else "x" * size, room="nobody")
        server.sleep(0.01)

@server.event
def fill(sid):
    try:
        while True:
            server.emit("filled", "x" * 100_000, room="nobody is here")
    except Exception as error:
        return type(error).__name__

@server.event
def begin_to_count(sid):
    server.start_background_task(count)

@server.event
def file(sid, numbers):
    server.emit("file", bytes(numbers))

@server.event
def enter(sid, other, room):
    server.enter_room(other, room)

@server.event
def who(sid, room, seconds):
    try:
        return sorted(stickyring.bus.members(server, room, timeout=seconds))
    except Exception as error:
        return type(error).__name__ + ": " + str(error)

@server.event
def close(sid, room):
    server.close_room(room)

@server.event
def bye(sid, other):
    server.emit("said", "bye", to=other)
    server.disconnect(other)

@server.event
def ask(sid, other):
    return server.call("asked", "who", to=other, timeout=5)

application = socketio.WSGIApp(server)
"""


def application(manager: str, *, hello: bool = False, goodbye: bool = False, pings: int = 20) -> str:
    """Return the source of an application: a handler that greets, one that does things when a client has left."""
    return APPLICATION.format(manager=manager, hello=hello, goodbye=goodbye, pings=pings)


class Bus:
    """A Redis server of these tests alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"unix://{folder}/bus.sock"
        self.client = redis.Redis.from_url(self.url)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        command = ["redis-server", "--port", "0", "--unixsocket", f"{self.folder}/bus.sock", "--dir", str(self.folder)]
        with (self.folder / "bus.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--save", "", "--appendonly", "yes", *options],
                executable=server_program(),
                stdout=log,
                stderr=log,
            )
        wait_until(self._answers, "the bus answers")

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False

    def stop(self, *, kill: bool = False) -> None:
        if self._process is not None:
            self.freeze(frozen=False)
            self._process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            self._process.wait(10)
            self._process = None

    def remove_data(self) -> None:
        shutil.rmtree(self.folder / "appendonlydir")

    def freeze(self, *, frozen: bool = True) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)


def worker_of(node: ServeProcess) -> int:
    found = subprocess.run(["pgrep", "-P", str(node.process.pid)], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[0])


class Client:
    """One JavaScript client; `heard` has what it printed and no test has taken."""

    def __init__(self, package: Path, node: ServeProcess, *transports: str) -> None:
        self.node = node
        command = ["node", str(CLIENT), str(package), node.url, *transports]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.heard: queue.Queue[list[Any]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._process.stdout or ():
            self.heard.put(json.loads(line))

    def do(self, *order: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def ask(self, *event: object) -> Any:
        """Emit an event, and return its acknowledgement; what it hears meanwhile stays in `heard`."""
        self.do("emit", *event)
        return self.until("ack")[1]

    def until(self, name: str, seconds: float = 10.0) -> list[Any]:
        """Return the next event with this name; those before it stay in `heard`."""
        others, deadline = [], time.monotonic() + seconds
        try:
            while True:
                event = self.heard.get(timeout=max(0.0, deadline - time.monotonic()))
                if event[0] == name:
                    return event
                others.append(event)
        except queue.Empty:
            pytest.fail(f"no {name} within {seconds} s: {others}")
        finally:
            rest = [self.heard.get_nowait() for _ in range(self.heard.qsize())]
            for one in (*others, *rest):
                self.heard.put(one)

    def said(self, count: int, seconds: float = 10.0) -> list[Any]:
        """Return the first argument of the next events `said`, at least so many."""
        found: list[Any] = []
        deadline = time.monotonic() + seconds
        while len(found) < count and time.monotonic() < deadline:
            found += self._taken("said")
            time.sleep(0.01)
        return found

    def _taken(self, name: str) -> list[Any]:
        events = [self.heard.get_nowait() for _ in range(self.heard.qsize())]
        for one in events:
            if one[0] != name:
                self.heard.put(one)
        return [one[1] for one in events if one[0] == name]

    def away(self, node: ServeProcess) -> None:
        """Lose the connection; the next one will be to a node."""
        self.node = node
        self.do("away", node.url)
        self.until("disconnect")

    def back(self) -> list[Any]:
        """Connect again; return sid, whether recovered, and pid."""
        self.do("back")
        return self.until("connect")[1:]

    def pause(self, *, ends: bool = False) -> None:
        """Stand still, as if it had vanished."""
        self._process.send_signal(signal.SIGCONT if ends else signal.SIGSTOP)

    def end(self) -> None:
        """Disconnect, and end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


Node: TypeAlias = Callable[..., ServeProcess]
Connect: TypeAlias = Callable[..., Client]


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    """A running bus."""
    found = Bus(tmp_path)
    found.start()
    yield found
    found.stop()


@pytest.fixture
def trio(tmp_path: Path) -> Iterator[Trio]:
    """A running bus of three."""
    found = Trio(tmp_path)
    try:
        found.start()
        yield found
    finally:
        found.stop()


@pytest.fixture
def node(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., ServeProcess]]:
    """Starts a node of the application; its name is the first argument."""

    bus = request.getfixturevalue("trio" if "trio" in request.fixturenames else "bus")

    def start(
        name: str,
        manager: str = "stickyring.bus.manager(recovery=True)",
        *,
        hello: bool = True,
        goodbye: bool = False,
        pings: int = 20,
        port: int = 0,
    ) -> ServeProcess:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "app.py").write_text(application(manager, hello=hello, goodbye=goodbye, pings=pings))
        arguments = ("app:application", "--control", "control", "--listen", f"127.0.0.1:{port}")
        return stack.enter_context(serving(folder, *arguments, STICKYRING_BUS_URL=bus.url))

    with ExitStack() as stack:
        yield start


@pytest.fixture
def client(javascript: Path) -> Iterator[Callable[..., Client]]:
    """Connects a JavaScript client to a node; returns it when it is connected, with its connect event in `heard`."""
    clients: list[Client] = []

    def connect(node: ServeProcess, *transports: str) -> Client:
        clients.append(Client(javascript, node, *(transports or ("websocket",))))
        return clients[-1]

    yield connect
    for one in clients:
        one.end()
