"""A process replaces another one: what users, the edge, the operator and systemd notice."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest
import socketio
from conftest import DEADLINE_SECONDS, STICKYRING, WORKER, ServeProcess, rewrite, serving, wait_until

from stickyring.delivery import Sender
from stickyring.node.control import ControlServer, Refusal
from stickyring.node.operate import ask

APPLICATION = """
import os
import time

import socketio

server = socketio.Server(async_mode="eventlet", always_connect=True)

@server.event
def where(sid):
    return os.getppid()

def page(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getppid()).encode()]

def slow_page(environ, start_response):
    if environ["PATH_INFO"] == "/slow":
        while not os.path.exists("release"):
            time.sleep(0.02)
    return page(environ, start_response)

application = socketio.WSGIApp(server, slow_page)
"""
LOADING = """
import os
import time

open("loading", "w").close()
while not os.path.exists("go"):
    time.sleep(0.02)
from chat import application
"""
HANDSHAKE = "/socket.io/?EIO=4&transport=polling"
USERS = 8
PAUSE_SECONDS = 0.01

Start = Callable[..., ServeProcess]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Start]:
    """Starts the node to replace; its successor is ended after the test too."""
    (tmp_path / "chat.py").write_text(APPLICATION)
    (tmp_path / "loading.py").write_text(LOADING)
    with contextlib.ExitStack() as running:
        yield lambda *arguments, **environment: running.enter_context(
            serving(tmp_path, "chat:application", "--control", "control", *arguments, **environment)
        )
        end_what_serves(tmp_path)


def end_what_serves(folder: Path) -> None:
    if (folder / "control").exists():
        os.kill(master(folder), signal.SIGQUIT)
        wait_until(lambda: not (folder / "control").exists(), "the control socket goes with the node")


def master(folder: Path) -> int:
    """Return the process id of the master that serves the control socket."""
    answer = ask(folder / "control", "GET", "/listener")
    os.close(answer["listener"])
    return int(answer["process"])


def start_replacing(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    rewrite(folder)
    # A new file each time: the new process keeps the command's standard error open.
    (folder / "replaced").unlink(missing_ok=True)
    with (folder / "replaced").open("wb") as output:
        return subprocess.Popen(
            [STICKYRING, "serve", "--replace", "--listen", "127.0.0.1:0", "--node-name", "node1-2", *arguments],
            cwd=folder,
            stdout=output,
            stderr=output,
            env={"PATH": os.environ["PATH"], "STICKYRING_CONTROL": "control"} | WORKER | environment,
        )


def replace(folder: Path, *arguments: str, **environment: str) -> None:
    command = start_replacing(folder, *(arguments or ["chat:application"]), **environment)
    assert command.wait(DEADLINE_SECONDS) == 0, (folder / "replaced").read_text()


def refusal(folder: Path, *arguments: str, **environment: str) -> str:
    """Run a replacement that fails; return the only line of its error."""
    command = start_replacing(folder, *arguments, **environment)
    assert command.wait(DEADLINE_SECONDS) in {1, 2}
    assert not (folder / "control.next").exists()
    (line,) = (folder / "replaced").read_text().splitlines()
    return line


def where(node: ServeProcess) -> int:
    """Return the process id of the master that answers a request on a new connection."""
    return int(node.get("/").read())


class Asking:
    """Calls `ask` again and again in a thread; `faults` are exceptions and statuses other than 200."""

    def __init__(self, ask: Callable[[], int]) -> None:
        self.faults: list[object] = []
        self.number = 0
        self._ask = ask
        self._goes_on = True
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Asking":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._goes_on = False
        self._thread.join()

    def _run(self) -> None:
        while self._goes_on:
            try:
                status = self._ask()
            except (OSError, HTTPException) as error:
                self.faults.append(error)
            else:
                if status != HTTPStatus.OK:
                    self.faults.append(status)
            self.number += 1
            time.sleep(PAUSE_SECONDS)


def shake_hands(node: ServeProcess) -> Asking:
    """Handshakes, each on a new connection."""
    return Asking(lambda: node.get(HANDSHAKE).status)


class User:
    """A client that reconnects by itself, and counts its disconnects."""

    def __init__(self) -> None:
        self.disconnects = 0
        self.client = socketio.AsyncClient(reconnection_delay=0.1, reconnection_delay_max=0.5)
        self.client.on("disconnect", self._count)

    def _count(self, reason: str) -> None:
        self.disconnects += 1

    async def connect(self, node: ServeProcess, transport: str) -> "User":
        await self.client.connect(node.url, transports=[transport], wait_timeout=10)
        return self

    async def where(self) -> int:
        return int(await self.client.call("where", timeout=5))


async def all_came_back(users: list[User], seconds: float = DEADLINE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not all(user.disconnects and user.client.connected for user in users):
        assert time.monotonic() < deadline, [user.disconnects for user in users]
        await asyncio.sleep(0.02)


def test_each_user_is_disconnected_once_and_nobody_is_refused(node: Start, tmp_path: Path) -> None:
    serve = node()

    async def play() -> None:
        users = [await User().connect(serve, transport) for transport in ["polling", "websocket"] * USERS]
        assert {await user.where() for user in users} == {serve.process.pid}
        with shake_hands(serve) as handshakes:
            await asyncio.to_thread(replace, tmp_path)
            successor = master(tmp_path)
            await all_came_back(users)
            assert {await user.where() for user in users} == {successor}
            assert await asyncio.to_thread(serve.process.wait, DEADLINE_SECONDS) == 0
        assert (handshakes.faults, handshakes.number > 100) == ([], True)
        assert [user.disconnects for user in users] == [1] * len(users)
        assert successor != serve.process.pid
        for user in users:
            await user.client.disconnect()

    asyncio.run(play())
    assert where(serve) == master(tmp_path)


def test_no_request_on_a_kept_connection_is_lost(node: Start, tmp_path: Path) -> None:
    """Like an edge, which sends requests on kept connections until an answer closes them."""
    serve = node()
    ended: list[str] = []

    def keep_asking() -> Asking:
        connection = serve.connect()  # reconnects after an answer that closes it

        def ask_again() -> int:
            status, kept, who = request(connection, "/")
            if kept == "close":
                ended.append(who)
            return status

        return Asking(ask_again)

    with contextlib.ExitStack() as clients:
        asking = [clients.enter_context(keep_asking()) for _ in range(USERS)]
        replace(tmp_path)
        wait_until(lambda: len(ended) == USERS, "every connection was closed by an answer")
        assert serve.process.wait(DEADLINE_SECONDS) == 0
    assert [client.faults for client in asking] == [[]] * USERS
    assert ended == [str(serve.process.pid)] * USERS, "and no other connection ends"


def test_no_new_connection_reaches_the_replaced_process(node: Start, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        serve = node(NOTIFY_SOCKET=str(tmp_path / "notify"))
        idle, silent, slow, polling, unheard = (serve.connect() for _ in range(5))
        for kept in (idle, silent):
            assert request(kept, "/") == (200, "keep-alive", str(serve.process.pid))
        sid = json.loads(request(polling, HANDSHAKE)[2][1:])["sid"]
        polling.request("GET", f"{HANDSHAKE}&sid={sid}")
        slow.request("GET", "/slow")
        unheard.connect()
        assert where(serve) == serve.process.pid, "all earlier connections have been accepted"

        replacing = start_replacing(tmp_path, "chat:application")
        wait_until(lambda: serve.logged("replaced: accepting nothing more"), "it retires")
        # A connection without a request yet is answered as before, and so is a kept one.
        for connection in (unheard, idle):
            assert request(connection, "/") == (200, "close", str(serve.process.pid))
        assert replacing.wait(DEADLINE_SECONDS) == 0
        assert silent.sock.recv(1) == b""
        assert answer(polling)[:2] == (410, "close")
        # Only the successor sends systemd its heartbeat.
        manager.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while manager.recv(64):
                pass
        manager.settimeout(1.5)
        with pytest.raises(TimeoutError):
            manager.recv(64)
        # If the successor ends first, no connection is left waiting.
        end_what_serves(tmp_path)
        with pytest.raises(ConnectionRefusedError):
            where(serve)
        (tmp_path / "release").touch()
        assert answer(slow) == (200, "close", str(serve.process.pid))
    assert serve.process.wait(DEADLINE_SECONDS) == 0


def request(connection: HTTPConnection, path: str) -> tuple[int, str, str]:
    connection.request("GET", path)
    return answer(connection)


def answer(connection: HTTPConnection) -> tuple[int, str, str]:
    found = connection.getresponse()
    return found.status, found.getheader("Connection", "keep-alive"), found.read().decode()


def test_a_successor_that_cannot_start_affects_nobody(node: Start, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text('raise ValueError("no database")\n')
    (tmp_path / "dying.py").write_text("import os\nos._exit(1)\n")
    serve = node()

    async def play() -> None:
        user = await User().connect(serve, "websocket")
        with shake_hands(serve) as handshakes:
            line = await asyncio.to_thread(refusal, tmp_path, "broken:application")
            assert line.startswith("Error: cannot load broken:application: ValueError: no database")
            await asyncio.to_thread(dies)
            assert await user.where() == serve.process.pid
        assert (handshakes.faults, user.disconnects) == ([], 0)
        await user.client.disconnect()

    def dies() -> None:
        command = start_replacing(tmp_path, "dying:application")
        assert command.wait(DEADLINE_SECONDS) == 1
        said = (tmp_path / "replaced").read_text().splitlines()
        assert said[-1] == "Error: the new process ended before it served"
        wait_until(lambda: not (tmp_path / "control.next").exists(), "its control socket is removed")

    asyncio.run(play())
    assert master(tmp_path) == serve.process.pid
    # The control: the same command with an application that loads.
    replace(tmp_path)
    assert master(tmp_path) != serve.process.pid


def test_repeated_replacements_with_new_settings(node: Start, tmp_path: Path) -> None:
    serve = node()
    assert 'stickyring_node_info{node="node1-1"' in serve.get("/metrics").read().decode()
    for name in ("second", "third"):
        replace(tmp_path, "chat:application", "--node-name", name)
        assert ask(tmp_path / "control", "GET", "/sessions")["node"] == name
        assert f'stickyring_node_info{{node="{name}"' in serve.get("/metrics").read().decode()
    assert serve.process.wait(DEADLINE_SECONDS) == 0
    assert where(serve) == master(tmp_path)
    # A worker that replaces a dead one does not take over again.
    os.kill(worker(tmp_path), signal.SIGKILL)
    wait_until(lambda: (tmp_path / "replaced").read_text().count("serving ") == 2, "there is a worker again")
    assert where(serve) == master(tmp_path)
    end_what_serves(tmp_path)
    with pytest.raises(ConnectionRefusedError):
        serve.get("/")


def worker(folder: Path) -> int:
    """Return the process id of the newest worker of the newest successor."""
    lines = [json.loads(line) for line in (folder / "replaced").read_text().splitlines()]
    return int([line["pid"] for line in lines if line["message"].startswith("serving ")][-1])


def test_only_one_replacement_at_a_time(node: Start, tmp_path: Path) -> None:
    serve = node()
    first = start_replacing(tmp_path, "loading:application")
    wait_until((tmp_path / "loading").exists, "it loads")
    command = ["serve", "--replace", "--listen", "127.0.0.1:0", "--control", "control", "chat:application"]
    second = subprocess.run(
        [STICKYRING, *command],
        cwd=tmp_path,
        env=os.environ | WORKER,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    cause = "Error: cannot make the control socket control.next: another --replace is under way\n"
    assert (second.returncode, second.stderr) == (1, cause)
    assert where(serve) == serve.process.pid
    (tmp_path / "go").touch()
    assert first.wait(DEADLINE_SECONDS) == 0
    assert where(serve) == master(tmp_path) != serve.process.pid


def test_it_does_not_retire_for_a_caller_that_has_hung_up(node: Start, tmp_path: Path) -> None:
    """A successor hangs up if the answer does not arrive in time."""
    serve = node()
    with socket.socket(socket.AF_UNIX) as asker:
        asker.connect(str(tmp_path / "control"))
        asker.sendall(b"POST /retire HTTP/1.0\r\n\r\n")
    assert where(serve) == master(tmp_path) == serve.process.pid
    # The control: it retires for a successor that waits.
    replace(tmp_path)
    assert len(serve.logged("replaced: accepting nothing more")) == 1
    assert where(serve) == master(tmp_path) != serve.process.pid


@pytest.mark.parametrize("loads", [False, True], ids=["that never loads", "that loads"])
def test_the_new_process_ends_if_the_waiting_command_is_killed(node: Start, tmp_path: Path, loads: bool) -> None:
    """systemd kills a reload that takes too long."""
    serve = node()

    async def play() -> None:
        user = await User().connect(serve, "websocket")
        command = start_replacing(tmp_path, "loading:application")
        await asyncio.to_thread(wait_until, (tmp_path / "loading").exists, "it loads")
        command.kill()
        command.wait()
        if loads:
            (tmp_path / "go").touch()
        gone = lambda: not (tmp_path / "control.next").exists()  # noqa: E731
        await asyncio.to_thread(wait_until, gone, "the new process ends")
        assert await user.where() == serve.process.pid
        assert user.disconnects == 0
        await user.client.disconnect()

    asyncio.run(play())
    assert where(serve) == master(tmp_path) == serve.process.pid


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ([], "--replace needs --control"),
        (["--control", "absent"], "no control socket absent: does the node run, and with --control?"),
        (["--control", "control", "--listen", "127.0.0.1:1"], ", not on 127.0.0.1:1: --replace cannot change the"),
        (["--control", "control", "--listen", "127.0.0.2:0"], ", not on 127.0.0.2:0: --replace cannot change the"),
        (
            ["--control", "control", "--worker-class", "stickyring.node.worker.Nothing"],
            "no worker class stickyring.",
        ),
    ],
)
def test_a_replacement_that_is_not_possible_is_one_line(
    running: tuple[ServeProcess, Path], arguments: list[str], cause: str
) -> None:
    serve, folder = running
    # An empty variable counts as unset.
    assert cause in refusal(folder, "chat:application", *arguments, STICKYRING_CONTROL="")
    assert where(serve) == serve.process.pid


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServeProcess, Path]]:
    folder = tmp_path_factory.mktemp("takeover")
    (folder / "chat.py").write_text(APPLICATION)
    with serving(folder, "chat:application", "--control", "control") as node:
        yield node, folder


@pytest.mark.eventlet
def test_a_worker_class_without_retire_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(
        "import os\ndef application(environ, start_response):\n"
        "    start_response('200 OK', [])\n    return [str(os.getppid()).encode()]\n"
    )
    with serving(tmp_path, "plain:application", "--control", "control", "--worker-class", "gthread") as serve:
        line = refusal(tmp_path, "plain:application")
        cause = "its worker class ThreadWorker does not support --replace: restart the node"
        assert line == f"Error: the node refuses: {cause}"
        assert where(serve) == serve.process.pid


class Faithless:
    """A node that answers for its listening socket without sending it."""

    def answer(self, method: str, target: str, body: bytes) -> tuple[HTTPStatus, dict[str, Any]]:
        return HTTPStatus.OK, {"process": 1}


def test_an_answer_without_the_listening_socket_is_one_line(tmp_path: Path) -> None:
    faithless: Any = Faithless()
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(tmp_path / "control"))
        control.listen()
        threading.Thread(target=ControlServer(control, faithless).run, daemon=True).start()
        line = refusal(tmp_path, "stickyring.echo:create_application()")
    assert line == "Error: the node that serves control does not support --replace: no 'listener'"


class FakeIncumbent:
    """A node with process id 1; `heard` is what systemd had received when the node retired."""

    def __init__(self, manager: socket.socket, listener: socket.socket, refusal: Refusal | None) -> None:
        self._manager = manager
        self._listener = listener
        self._refusal = refusal
        self.heard = b""

    def answer(self, method: str, target: str, body: bytes) -> tuple[HTTPStatus, dict[str, Any]]:
        if (method, target) == ("GET", "/listener"):
            return HTTPStatus.OK, {"process": 1, "listener": self._listener.fileno()}
        assert (method, target) == ("POST", "/retire")
        self.heard = self._manager.recv(64)
        if self._refusal:
            raise self._refusal
        return HTTPStatus.ACCEPTED, {}


@pytest.mark.parametrize(
    ("refusing", "watchdog", "told"),
    [
        (True, "", b""),
        (False, "", b""),
        (False, "2.5", b"\nWATCHDOG_USEC=2500000"),
        (False, "0", b"\nWATCHDOG_USEC=0"),
    ],
)
def test_systemd_is_notified_of_the_new_process_first(
    tmp_path: Path, refusing: bool, watchdog: str, told: bytes
) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "STICKYRING_WATCHDOG": watchdog}
    (tmp_path / "chat.py").write_text(APPLICATION)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        socket.socket(socket.AF_UNIX) as control,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        control.bind(str(tmp_path / "control"))
        control.listen()
        reason = Refusal(HTTPStatus.CONFLICT, "the node is about to stop") if refusing else None
        incumbent: Any = FakeIncumbent(manager, listener, reason)
        threading.Thread(target=ControlServer(control, incumbent).run, daemon=True).start()
        if refusing:
            line = refusal(tmp_path, "chat:application", **environment)
            assert line == "Error: the node refuses: the node is about to stop"
            assert incumbent.heard.startswith(b"MAINPID=")
            assert manager.recv(64) == b"MAINPID=1"
        else:
            replace(tmp_path, **environment)
            assert incumbent.heard == b"MAINPID=%d\nREADY=1" % master(tmp_path) + told
            end_what_serves(tmp_path)


ORDERS = """
import time

import socketio
from stickyring.delivery import Received

server = socketio.Server(async_mode="eventlet", always_connect=True)
received = Received(server)

@server.event
@received.once
def order(sid, goods, message_id=None):
    with open("orders", "a") as lines:
        lines.write(goods + "\\\\n")
    server.sleep(0.3)
    return goods

@server.event
def typing(sid):
    server.emit("seen", to=sid)

application = socketio.WSGIApp(server)
""".replace("\\\\", "\\")


def test_each_order_of_a_polling_user_is_handled_once_in_a_takeover(tmp_path: Path) -> None:
    """Each request of a polling client may use a new connection, which reaches the new process."""
    (tmp_path / "shop.py").write_text(ORDERS)
    until = asyncio.Event()
    bought: list[list[str]] = [[] for _ in range(USERS)]

    async def buy(serve: ServeProcess, name: str, own: list[str]) -> None:
        client = socketio.AsyncClient(reconnection_delay=0.1, reconnection_delay_max=0.5)
        await client.connect(serve.url, transports=["polling"], wait_timeout=10)
        sender = Sender(client)

        async def type_on() -> None:
            while True:
                with contextlib.suppress(socketio.exceptions.BadNamespaceError):
                    await client.emit("typing")
                await asyncio.sleep(0.05)

        typing = asyncio.create_task(type_on())
        while not until.is_set():
            goods = f"{name}-{len(own)}"
            assert await sender.send("order", goods) == goods
            own.append(goods)
        assert not typing.done()
        typing.cancel()
        await client.disconnect()

    async def play() -> None:
        buyers = [asyncio.create_task(buy(serve, f"user{number}", own)) for number, own in enumerate(bought)]
        await asyncio.to_thread(wait_until, (tmp_path / "orders").exists, "they buy")
        await asyncio.to_thread(replace, tmp_path, "shop:application")
        assert await asyncio.to_thread(serve.process.wait, DEADLINE_SECONDS) == 0
        before = [len(own) for own in bought]
        goes_on = lambda: all(len(own) > then + 1 for own, then in zip(bought, before, strict=True))  # noqa: E731
        await asyncio.to_thread(wait_until, goes_on, "all of them buy from the new process")
        until.set()
        await asyncio.gather(*buyers)

    with serving(tmp_path, "shop:application", "--control", "control") as serve:
        try:
            asyncio.run(play())
        finally:
            end_what_serves(tmp_path)
    assert sorted((tmp_path / "orders").read_text().splitlines()) == sorted(itertools.chain(*bought))
