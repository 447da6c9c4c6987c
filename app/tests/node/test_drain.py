"""A node that stops or is drained moves all users first; tested without an edge."""

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import socketio
from conftest import STICKYRING, ServeProcess, serving, wait_until
from prometheus_client import CollectorRegistry

from stickyring.node.drain import Drain
from stickyring.node.master import GRACEFUL_SECONDS
from stickyring.node.metrics import MoveMetrics
from stickyring.node.sessions import PATIENCE_SECONDS, SETTLING_SECONDS

APPLICATION = """
import os

import eventlet
import socketio

server = socketio.Server(
    async_mode="eventlet", always_connect=True, serializer=os.environ.get("SERIALIZER", "default")
)

def slow(sid, seconds):
    server.sleep(seconds)
    return "done"

for namespace in ("/", "/room"):
    server.on("slow", slow, namespace=namespace)

@server.event
def failing(sid, content):
    raise ValueError(content)

@server.event
def mark(sid, number):
    with open("marks", "a") as marks:
        print(number, file=marks)

def page(environ, start_response):
    start_response("200 OK", [])
    open("begun", "x").close()
    while not os.path.exists("release"):
        eventlet.sleep(0.05)
    return [b"complete"]

application = socketio.WSGIApp(server, page)
"""
HANDSHAKE = "/socket.io/?EIO=4&transport=polling"
SESSIONS = 30
ACKNOWLEDGEMENTS = 200
DEADLINE = 6


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable[..., ServeProcess]]:
    """Starts the node with a drain timeout in seconds."""
    (tmp_path / "chat.py").write_text(APPLICATION)
    with ExitStack() as running:

        def start(seconds: float = DEADLINE, **environment: Any) -> ServeProcess:
            arguments = ("chat:application", "--drain-timeout", str(seconds), "--control", "control")
            return running.enter_context(serving(tmp_path, *arguments, **environment))

        yield start


class Users:
    """Clients that do not reconnect; `reasons` are those of their disconnects."""

    def __init__(self) -> None:
        self.clients: list[socketio.AsyncClient] = []
        self.reasons: list[str] = []

    async def connect(self, node: ServeProcess, transports: list[str], number: int = 1) -> socketio.AsyncClient:
        for _ in range(number):
            client = socketio.AsyncClient(reconnection=False)
            client.on("disconnect", self.reasons.append)
            await client.connect(node.url, transports=transports, wait_timeout=10)
            self.clients.append(client)
        return client

    async def all_gone(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while len(self.reasons) < len(self.clients) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return len(self.reasons) == len(self.clients)


def command(node: ServeProcess, folder: Path, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen([STICKYRING, name, "--control", folder / "control"], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("transports", [["polling"], ["websocket"]])
def test_sigterm_moves_all_users_and_ends_before_the_deadline(node: Any, transports: list[str]) -> None:
    serve = node()

    async def play() -> None:
        users = Users()
        await users.connect(serve, transports, SESSIONS)
        serve.process.send_signal(signal.SIGTERM)
        assert await users.all_gone(DEADLINE)

    asyncio.run(play())
    began = time.monotonic()
    assert serve.process.wait(DEADLINE) == 0
    assert time.monotonic() - began < DEADLINE - 2
    (drained,) = (line for line in serve.log() if line["message"] == "drained")
    assert (drained["asked"], drained["left"], drained["sessions"]) == (SESSIONS, SESSIONS, 0)


def test_a_drain_waits_for_acknowledgements_and_refuses_new_users(node: Any) -> None:
    serve = node()

    async def play() -> None:
        users = Users()
        client = await users.connect(serve, ["websocket"])
        waiting = asyncio.create_task(client.call("slow", 2.5, timeout=10))
        await asyncio.sleep(0.2)
        assert serve.get("/readyz").status == serve.get(HANDSHAKE).status == 200
        serve.process.send_signal(signal.SIGTERM)
        wait_until(lambda: serve.get("/readyz").status == 503, "it drains")
        # What the client gets if every node refuses: 503 with Retry-After, or an unknown session.
        unknown = f"{HANDSHAKE}&sid=unknown", "/socket.io/?EIO=4&transport=websocket&sid=unknown"
        for path, status in {HANDSHAKE: 503, **dict.fromkeys(unknown, 400)}.items():
            refusal = serve.get(path)
            assert (refusal.status, refusal.headers["x-stickyring-elsewhere"]) == (status, "1")
        assert serve.get("/healthz").status == 200
        assert serve.metric("stickyring_draining") == 1
        assert serve.metric('stickyring_handshakes_refused_total{reason="draining",transport="polling"}') == 1
        assert await waiting == "done"
        assert await users.all_gone(DEADLINE)

    asyncio.run(play())
    assert serve.process.wait(DEADLINE) == 0


@pytest.mark.parametrize("serializer", ["default", "msgpack"])
@pytest.mark.parametrize("how", ["stop", "drain"])
def test_no_acknowledgement_is_lost(node: Any, tmp_path: Path, how: str, serializer: str) -> None:
    """Over each transport, ACKNOWLEDGEMENTS events are being handled when the node begins to move its users."""
    serve = node(20, SERIALIZER=serializer)

    async def connect(transport: str, namespace: str) -> socketio.AsyncClient:
        client = socketio.AsyncClient(serializer=serializer, reconnection=False)
        await client.connect(serve.url, transports=[transport], namespaces=[*{"/", namespace}], wait_timeout=10)
        await client.emit("failing", b"no acknowledgement to wait for", callback=print)
        return client

    async def play() -> None:
        kinds = [(transport, namespace) for transport in ("polling", "websocket") for namespace in ("/", "/room")]
        clients = [await connect(*kind) for kind in kinds]
        asking = asyncio.gather(
            *(
                client.call("slow", 2.5, namespace=namespace, timeout=10)
                for client, (_, namespace) in zip(clients, kinds, strict=True)
                for _ in range(ACKNOWLEDGEMENTS // 2)
            )
        )
        await asyncio.sleep(1)
        began = time.monotonic()
        if how == "stop":
            serve.process.send_signal(signal.SIGTERM)
        else:
            command(serve, tmp_path, "drain")
        assert await asking == ["done"] * 2 * ACKNOWLEDGEMENTS
        await asyncio.gather(*(client.wait() for client in clients))
        assert time.monotonic() - began < 2 * PATIENCE_SECONDS, "it waits for nothing else"

    asyncio.run(play())
    if how == "drain":
        serve.process.send_signal(signal.SIGTERM)
    assert serve.process.wait(20) == 0


def test_a_session_lasts_until_its_client_has_read_what_it_has_polled(node: Any, tmp_path: Path) -> None:
    """A client polls again once it has. A POST that was refused before that would make it drop the answer unread."""
    serve, began = node(20), time.monotonic()
    session = f"{HANDSHAKE}&sid={json.loads(serve.get(HANDSHAKE).read()[1:])['sid']}"
    assert serve.get(session, None, "POST", '40\x1e421["slow",0]').status == 200
    while '431["done"]' not in serve.get(session).read().decode():
        pass
    wait_until(lambda: time.monotonic() - began > SETTLING_SECONDS, "it is no new session")
    draining = command(serve, tmp_path, "drain")
    wait_until(lambda: serve.get("/readyz").status == 503, "it drains")
    unread = time.monotonic()
    while time.monotonic() - unread < PATIENCE_SECONDS / 2:
        assert serve.get(session, None, "POST", '42["mark",1]').status == 200
        time.sleep(0.1)  # a client that writes now and then
    assert serve.get(session).status == 410
    draining.communicate(timeout=20)
    assert draining.returncode == 0
    assert time.monotonic() - unread < 2 * PATIENCE_SECONDS, "it does not wait for more"


@pytest.mark.parametrize("acknowledged", [True, False], ids=["with acknowledgement", "without"])
def test_a_post_is_answered_with_ok_only_if_the_application_gets_it(
    node: Any, tmp_path: Path, acknowledged: bool
) -> None:
    """Also while the node waits for acknowledgements, and accepts no event that asks for one."""
    serve = node(20)
    session = f"{HANDSHAKE}&sid={json.loads(serve.get(HANDSHAKE).read()[1:])['sid']}"
    assert serve.get(session, None, "POST", '40\x1e421["slow",10]').status == 200
    serve.get(session).read()
    # Not a stop, which would close the socket at the end.
    draining = command(serve, tmp_path, "drain")
    wait_until(lambda: serve.get("/readyz").status == 503, "it drains")
    events, answered = f'42{"2" if acknowledged else ""}["mark",{{0}}]\x1e42["mark",{{0}}]', 0
    while (status := serve.get(session, None, "POST", events.format(answered)).status) == 200:
        answered += 1
        time.sleep(0.1)  # a client that writes now and then
    assert status == 400
    assert answered > 1, "at first it accepts events"
    marks = Path(tmp_path, "marks").read_text().split()
    assert marks == [str(number) for number in range(answered) for _ in range(2)]
    draining.communicate(timeout=20)
    assert draining.returncode == 0


def test_a_drain_waits_for_requests_being_answered(node: Any, tmp_path: Path) -> None:
    """The process waits for the application until the deadline, longer than gunicorn itself would."""
    serve = node(60)
    connection = serve.connect(60)
    connection.request("GET", "/page")
    wait_until((tmp_path / "begun").exists, "the request is being answered")
    serve.process.send_signal(signal.SIGTERM)
    wait_until(lambda: serve.get("/readyz").status == 503, "it drains")
    with pytest.raises(subprocess.TimeoutExpired):
        serve.process.wait(GRACEFUL_SECONDS + 2)
    refusal = serve.get("/page")
    assert (refusal.status, refusal.headers["x-stickyring-elsewhere"]) == (503, "1")
    (tmp_path / "release").touch()
    assert connection.getresponse().read() == b"complete"
    assert serve.process.wait(10) == 0


@asynccontextmanager
async def never_answered(serve: ServeProcess) -> AsyncIterator[None]:
    """A user who waits for an acknowledgement that would come long after the node has ended."""
    client = await Users().connect(serve, ["websocket"])
    asking = asyncio.create_task(client.call("slow", 30, timeout=1))
    await asyncio.sleep(0.2)
    yield
    with pytest.raises((socketio.exceptions.TimeoutError, socketio.exceptions.DisconnectedError)):
        await asking


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_second_signal_ends_the_node_at_once(node: Any, second: signal.Signals) -> None:
    serve = node(60)

    async def play() -> None:
        async with never_answered(serve):
            serve.process.send_signal(signal.SIGTERM)
            wait_until(lambda: serve.get("/readyz").status == 503, "it drains")
            serve.process.send_signal(second)
            began = time.monotonic()
            assert await asyncio.to_thread(serve.process.wait, 10) == 0
            assert time.monotonic() - began < GRACEFUL_SECONDS - 1

    asyncio.run(play())


def test_a_drain_ends_at_its_deadline(node: Any) -> None:
    serve = node(1)

    async def play() -> None:
        async with never_answered(serve):
            serve.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert await asyncio.to_thread(serve.process.wait, 15) == 0
            assert 1 < time.monotonic() - began < 6

    asyncio.run(play())
    assert serve.logged("not drained after 1 s: 1 sessions and 0 requests are left")


def test_with_drain_timeout_0_the_node_ends_at_once(node: Any) -> None:
    serve = node(0)

    async def play() -> None:
        await Users().connect(serve, ["websocket"])
        serve.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(serve.process.wait, 10) == 0

    asyncio.run(play())
    assert not serve.logged("drain")


def test_drain_empties_a_running_node_and_undrain_reopens_it(node: Any, tmp_path: Path) -> None:
    serve = node()

    async def play() -> None:
        users = Users()
        await users.connect(serve, ["websocket"], SESSIONS)
        output, _ = await asyncio.to_thread(command(serve, tmp_path, "drain").communicate, timeout=20)
        told = json.loads(output)
        numbers = {"sessions": 0, "requests": 0, "to_move": SESSIONS, "asked": SESSIONS, "left": SESSIONS}
        assert told == {"draining": True, "drained": True} | numbers
        assert await users.all_gone(5)

    asyncio.run(play())
    assert (serve.get("/readyz").status, serve.get(HANDSHAKE).status) == (503, 503)
    assert json.loads(command(serve, tmp_path, "undrain").communicate(timeout=20)[0])["draining"] is False
    assert (serve.get("/readyz").status, serve.get(HANDSHAKE).status) == (200, 200)


def test_undrain_does_not_reopen_a_node_that_is_about_to_stop(node: Any, tmp_path: Path) -> None:
    serve = node()

    async def play() -> None:
        client = await Users().connect(serve, ["websocket"])
        asking = asyncio.create_task(client.call("slow", 2, timeout=10))
        await asyncio.sleep(0.2)
        serve.process.send_signal(signal.SIGTERM)
        wait_until(lambda: serve.get("/readyz").status == 503, "it drains")
        undrain = command(serve, tmp_path, "undrain")
        undrain.communicate(timeout=20)
        assert undrain.returncode == 1
        assert serve.get("/readyz").status == 503
        assert await asking == "done"

    asyncio.run(play())
    assert serve.process.wait(DEADLINE) == 0


def test_a_node_that_still_loads_its_application_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    arguments = ["serve", "slow:application", "--listen", "127.0.0.1:0", "--drain-timeout", "20"]
    process = subprocess.Popen([STICKYRING, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.terminate()
    assert process.wait(10) == 0


class FakeSession:
    """A session that ends at once."""

    def __init__(self, key: str | None = None) -> None:
        self.key = key
        self.began = time.monotonic()
        self.ended = False
        self.asked = False
        self.quiet = True
        self.taking = True

    def see_off(self, done: Callable[[], None]) -> None:
        self.ended = True
        done()


@pytest.fixture
def sessions() -> dict[str, Any]:
    return {f"sid{number}": FakeSession(f"user{number}") for number in range(1000)}


def left(sessions: dict[str, Any]) -> int:
    return sum(session.ended for session in sessions.values())


@pytest.fixture
def drain(sessions: dict[str, Any]) -> Drain:
    return Drain(sessions, set(), MoveMetrics(CollectorRegistry()))


def test_a_second_drain_with_less_time_raises_the_rate(drain: Drain, sessions: dict[str, Any]) -> None:
    drain.begin()
    drain.begin(1, final=True)
    drain.wait(3)
    assert drain.empty
    assert left(sessions) == 1000


def test_undrain_keeps_users_who_were_not_asked_yet(drain: Drain, sessions: dict[str, Any]) -> None:
    drain.begin()
    wait_until(lambda: left(sessions) > 0, "somebody has left")
    assert drain.cancel()
    gone = left(sessions)
    assert gone < 300
    time.sleep(0.5)  # nothing should happen; at 250 a second, 125 more would have left
    assert left(sessions) <= gone + 50
    drain.begin()
    drain.wait(10)
    assert left(sessions) == 1000


def test_a_user_whose_handshake_was_under_way_is_asked_too(drain: Drain, sessions: dict[str, Any]) -> None:
    sessions.clear()
    drain.begin()
    sessions["late"] = FakeSession("late")
    wait_until(lambda: drain.empty, "the late one has left")
    assert drain.progress()["asked"] == 1
