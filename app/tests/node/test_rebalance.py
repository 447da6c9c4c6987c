"""Rebalancing two real nodes behind a tiny edge, with JavaScript and Python clients."""

import asyncio
import json
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import socketio
from conftest import STICKYRING, ServeProcess, serving, wait_until
from edge import Edge

from stickyring.ring import Ring

CLIENT = Path(__file__).with_name("reconnecting_client.mjs")
TRANSPORTS = (["polling"], ["websocket"], ["polling", "websocket"])

APPLICATION = """
import json, os
import socketio

def create():
    name = os.environ["STICKYRING_NODE_NAME"]
    server = socketio.Server(async_mode="eventlet", always_connect=True)
    ended = []

    @server.event
    def connect(sid, environ):
        server.send(f"node#{name}: welcome", to=sid)

    @server.event
    def disconnect(sid, reason):
        ended.append([sid, reason])

    @server.event
    def slow(sid, seconds):
        server.sleep(seconds)
        return name

    def tell(environ, start_response):
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(ended).encode()]

    return socketio.WSGIApp(server, tell)
"""


def document(*names: str) -> dict[str, Any]:
    members = [{"name": name, "weight": 1} for name in names]
    sizes = {"minimum_size": 200 * len(names), "maximum_size": 8388608}
    return {"cluster": "nodes", "policy": "RING_HASH", **sizes, "members": members}


ONE, BOTH = Ring.load(document("node1-1")), Ring.load(document("node1-1", "node2-1"))
USERS = [f"user{number}" for number in range(400)]


class Fleet:
    """Two nodes with all users on the first, and a new ring that assigns half of them to the second."""

    def __init__(self, nodes: dict[str, ServeProcess], folder: Path) -> None:
        self.nodes = nodes
        self._folder = folder
        self.moving = iter([user for user in USERS if BOTH.owner(user) == "node2-1"])
        self.staying = iter([user for user in USERS if BOTH.owner(user) == "node1-1"])

    def edge(self) -> Edge:
        return Edge(ONE, {name: node.address for name, node in self.nodes.items()})

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the first node's control socket."""
        return subprocess.run(
            [STICKYRING, *arguments, "--control", self._folder / "node1-1" / "control"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def rebalance(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        ring = self._folder / "ring.json"
        ring.write_text(json.dumps(document(*BOTH.names)))
        return self.command("rebalance", "--ring", str(ring), *arguments)

    def sessions(self) -> list[dict[str, Any]]:
        done = self.command("sessions")
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout)["sessions"])

    def ended(self) -> dict[str, str]:
        """The sessions on the first node whose disconnect handler ran, with its reason."""
        ended = json.loads(self.nodes["node1-1"].get("/").read())
        assert len(dict(ended)) == len(ended), "a disconnect handler ran twice"
        return dict(ended)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")

    def node(name: str) -> Any:
        home = folder / name
        home.mkdir()
        Path(home, "chat.py").write_text(APPLICATION)
        return serving(home, "chat:create()", "--node-name", name, "--control", "control")

    with node("node1-1") as first, node("node2-1") as second:
        yield Fleet({"node1-1": first, "node2-1": second}, folder)


class User:
    """One client; `events` are its connect, disconnect, message and connect_error, in order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.events: list[tuple[str, str]] = []

    def all(self, event: str) -> list[str]:
        return [detail for name, detail in self.events if name == event]

    def welcomed_by(self, node: str) -> bool:
        return f"node#{node}: welcome" in self.all("message")


class PythonUser(User):
    """One client of python-socketio, with its session id and calls that wait for an acknowledgement."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.client = socketio.AsyncClient()
        self.client.on("connect", lambda: self.events.append(("connect", self.sid)))
        for event in ("message", "disconnect", "connect_error"):
            self.client.on(event, lambda detail, event=event: self.events.append((event, detail)))

    @property
    def sid(self) -> str:
        return str(self.client.sid)

    async def ask(self, event: str, data: object) -> str:
        return str(await self.client.call(event, data, timeout=10))


@asynccontextmanager
async def python_user(edge: Edge, key: str | None, transports: list[str]) -> AsyncIterator[PythonUser]:
    user = PythonUser(f"python {transports}")
    await user.client.connect(edge.url if key is None else f"{edge.url}?client_id={key}", transports=transports)
    yield user
    await user.client.disconnect()


@asynccontextmanager
async def engine_user(edge: Edge, key: str, transports: list[str]) -> AsyncIterator[User]:
    client, user = socketio.async_client.engineio.AsyncClient(), User(f"engine {transports}")
    client.on("disconnect", lambda reason: user.events.append(("disconnect", reason)))
    await client.connect(f"{edge.url}?client_id={key}", transports=transports, engineio_path="socket.io")
    yield user
    await client.disconnect()


@asynccontextmanager
async def javascript_user(package: Path, edge: Edge, key: str, transports: list[str]) -> AsyncIterator[User]:
    user = User(f"JavaScript {transports}")
    process = await asyncio.create_subprocess_exec(
        *("node", str(CLIENT), str(package), f"{edge.url}?client_id={key}", *transports),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    async def listen(output: asyncio.StreamReader) -> None:
        async for line in output:
            event = json.loads(line)
            user.events.append((event["event"], event["detail"]))

    listening = asyncio.create_task(listen(process.stdout))
    yield user
    process.stdin.close()
    await process.wait()
    await listening


async def until(question: Callable[[], object], what: str) -> None:
    await asyncio.to_thread(wait_until, question, what)


@pytest.mark.asyncio
async def test_moved_users_reach_their_assigned_node_and_nobody_else_moves(fleet: Fleet, javascript: Path) -> None:
    async with AsyncExitStack() as stack:
        edge = stack.enter_context(fleet.edge())
        python, engine, browsers = [], [], []
        for transports in TRANSPORTS:
            key = fleet.moving
            browsers.append(await stack.enter_async_context(javascript_user(javascript, edge, next(key), transports)))
            python.append(await stack.enter_async_context(python_user(edge, next(key), transports)))
            engine.append(await stack.enter_async_context(engine_user(edge, next(key), transports)))
        staying = [await stack.enter_async_context(python_user(edge, next(fleet.staying), t)) for t in TRANSPORTS]
        staying.append(await stack.enter_async_context(python_user(edge, None, ["websocket"])))
        users = [*browsers, *python]
        await until(lambda: all(user.welcomed_by("node1-1") for user in [*users, *staying]), "all are welcome")
        await until(lambda: browsers[-1].all("upgrade"), "the JavaScript client has upgraded")
        sids = [user.sid for user in staying]

        edge.ring = BOTH
        done = await asyncio.to_thread(fleet.rebalance)
        assert done.returncode == 0, done.stderr
        numbers = json.loads(done.stdout)
        expected = {"to_move": 9, "staying": 3, "without_key": 1, "asked": 9, "left": 9, "returned": 0}
        expected |= {"users_asked": 9, "users_returned": 0}
        assert expected.items() <= numbers.items()

        await until(lambda: all(user.welcomed_by("node2-1") for user in users), "all who moved are welcome again")
        for user in users:
            assert len(user.all("connect")) == 2, user.name
            assert user.all("connect_error") == [], user.name
        # After a closed WebSocket and a failed poll, clients reconnect by themselves.
        assert [user.all("disconnect") for user in browsers] == [
            ["transport error"],
            ["transport close"],
            ["transport close"],
        ]
        assert [user.all("disconnect") for user in [*python, *engine]] == [["transport error"]] * 6
        assert [len(user.all("reconnect_attempt")) for user in browsers] == [1, 1, 1]

        assert [user.events for user in staying] == [
            [("connect", sid), ("message", "node#node1-1: welcome")] for sid in sids
        ]
        assert [user.sid for user in staying] == sids
        # The plain Engine.IO clients never joined a namespace, so the application does not know them.
        assert [*fleet.ended().values()] == ["transport close"] * 6

        again = await asyncio.to_thread(fleet.rebalance)
        assert {"to_move": 0, "asked": 0, "staying": 3, "without_key": 1}.items() <= json.loads(again.stdout).items()
        assert [user.sid for user in staying] == sids
        node = fleet.nodes["node1-1"]
        assert node.metric("stickyring_rebalances_total") == 2
        assert node.metric("stickyring_sessions_moved_total") == 9
        assert len(node.logged("rebalanced: 9 sessions left")) == 1
    assert not [line for line in node.log() if line["level"] == "ERROR" and "Invalid session" not in line["message"]]
    assert not re.search(r"user\d", str(node.log())), "a log names no user"


@pytest.mark.asyncio
async def test_nothing_under_way_is_lost_and_returning_users_are_reported(fleet: Fleet) -> None:
    with fleet.edge() as edge:  # with the old ring; otherwise polling would lose what is under way
        async with AsyncExitStack() as stack:
            users = [await stack.enter_async_context(python_user(edge, next(fleet.moving), t)) for t in TRANSPORTS[:2]]
            requests = [asyncio.create_task(user.ask("slow", 1.5)) for user in users]
            plain = stack.enter_context(plain_websocket(fleet.nodes["node1-1"], next(fleet.moving)))
            done = await asyncio.to_thread(fleet.rebalance)

            for user, request in zip(users, requests, strict=True):
                assert await request == "node1-1"
                # Back on the same node, and not asked a second time.
                assert len(user.all("disconnect")) == 1
                assert len(user.all("connect")) == 2
            assert done.returncode == 1
            assert {"to_move": 3, "asked": 3, "left": 3, "returned": 2}.items() <= json.loads(done.stdout).items()
            assert "2 sessions are here, but their users are assigned to another node" in done.stderr.splitlines()[-1]
            assert fleet.nodes["node1-1"].logged("2 sessions came back")[0]["level"] == "WARNING"

            assert plain.recv(4096) == b"\x88\x00", "RFC 6455: a close frame without a status"
            for frame in (b"\x81\x81\0\0\0\0" + b"2", b"\x88\x80\0\0\0\0"):
                plain.sendall(frame)  # a message under way, and the client's own close frame
            assert plain.recv(4096) == b"", "the connection closes without a reset"


@pytest.mark.asyncio
async def test_one_user_who_comes_back_does_not_fail_the_rebalance(fleet: Fleet) -> None:
    """In the test above two of two come back, and it fails; a single client must not fail a deployment."""
    async with AsyncExitStack() as stack:
        edge = stack.enter_context(fleet.edge())
        stubborn = await stack.enter_async_context(python_user(edge, next(fleet.moving), ["websocket"]))
        done = await asyncio.to_thread(fleet.rebalance)
        assert len(stubborn.all("connect")) == 2
        assert done.returncode == 0, done.stderr
        figures = json.loads(done.stdout)
        assert (figures["returned"], figures["users_returned"], figures["users_asked"]) == (1, 1, 1)
        assert "1 of 1 users" in done.stderr.splitlines()[-1]


@contextmanager
def plain_websocket(node: ServeProcess, key: str) -> Iterator[socket.socket]:
    host, _, port = node.address.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(
            b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: node\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            b"x-stickyring-key: %s\r\n\r\n" % key.encode()
        )
        wait_until(lambda: b'0{"sid"' in client.recv(4096), "the session is open")
        yield client
