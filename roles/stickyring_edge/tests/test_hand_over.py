"""Another Envoy takes over the ports of one that runs: no WebSocket ends before its user has left, or a deadline."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest
from ansible_collections.stickyring.fleet.plugins.module_utils.admin import Admin
from certificates import Certificate
from running_envoy import PROJECT, START_SECONDS, Edge, Node, Websocket, compose, running, serving

PROGRAM = PROJECT / "roles" / "stickyring_edge" / "files" / "hand_over.py"
NOTIFIED_SECONDS = 5


RATE = 40
"""Users whom all nodes together ask in a second."""


class AskedNode(Node):
    """Accepts what an edge asks, and notes it."""

    asked: ClassVar[list[tuple[int, str]]] = []
    """The port, and the request's target."""
    status: ClassVar[int] = 202
    to_move: ClassVar[int] = 1
    """The number of users that it says are still to be asked."""

    def do_POST(self) -> None:
        self.asked.append((self.connection.getsockname()[1], self.path))
        body = json.dumps({"to_move": self.to_move}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Unit:
    """What systemd does for the unit: it starts the program for a reload, and hears who is the main process."""

    def __init__(self, edge: Edge, folder: Path) -> None:
        self.edge, self.folder, self.main = edge, folder, edge.pid
        self.settings = folder / "settings.json"
        self.notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notified.bind(str(folder / "notify"))
        self.notified.settimeout(NOTIFIED_SECONDS)
        self.reloads = 0

    def begin(self, *command: str, **seconds: float) -> subprocess.Popen[bytes]:
        """Start the program for a reload, in a process group of its own."""
        self.reloads += 1
        # Not a pipe, which what it starts would keep open.
        with self.error().open("a") as error:
            return subprocess.Popen(
                self.program("reload", "--", *command, **seconds),
                env=os.environ | self.environment(),
                stdout=error,
                stderr=error,
                start_new_session=True,
            )

    def run(self, action: str, **seconds: float) -> str:
        """Run the program for this; return what it prints."""
        command = self.program(action, **seconds)
        return subprocess.run(
            command, env=os.environ | self.environment(), capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()

    def program(
        self,
        *arguments: str,
        proof: float = START_SECONDS,
        leaving: float = 60,
        stopping: float = 60,
        patience: float = 2,
    ) -> list[str]:
        """The command."""
        seconds = {"proof": proof, "leaving": leaving, "stopping": stopping, "patience": patience}
        settings = {f"{name}_seconds": value for name, value in seconds.items()} | {"reconnects_per_second": RATE}
        self.settings.write_text(json.dumps(settings))
        return [
            *(sys.executable, "-I", str(PROGRAM), "--admin-socket", self.edge.admin_socket),
            *("--settings", str(self.settings), *arguments),
        ]

    def environment(self) -> dict[str, str]:
        """What systemd tells the program."""
        return {"MAINPID": str(self.main), "NOTIFY_SOCKET": f"{self.folder}/notify", "INVOCATION_ID": "first"}

    def reload(self, *command: str, **seconds: float) -> tuple[int, str]:
        """Run it with this command, or that of the running Envoy; return its exit code and its error."""
        code = self.begin(*(command or self.edge.command), **seconds).wait(2 * START_SECONDS)
        if code:
            said = self.error().read_text()
            return code, "; ".join(re.findall(r"^Nothing was handed over: .*$", said, re.MULTILINE)) or said
        self.main = int(self.notice("MAINPID"))
        return code, ""

    def notice(self, name: str) -> str:
        """What the program has told systemd under this name."""
        found, _, value = self.notified.recv(100).decode().partition("=")
        assert found == name
        return value

    def hush(self) -> None:
        """Forget what systemd was told."""
        self.notified.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                self.notified.recv(100)
        self.notified.settimeout(NOTIFIED_SECONDS)

    def error(self) -> Path:
        """What the last run and what it has started have said."""
        return self.folder / f"error-{self.reloads}"

    def another(self, *listeners: str) -> list[str]:
        """The command of another Envoy, which serves only these listeners."""
        other = self.folder / f"other{len(listeners)}"
        if not other.exists():
            shutil.copytree(self.edge.directory, other)
            served = json.loads((other / "listeners.json").read_text())
            served["resources"] = [one for one in served["resources"] if one["name"] in listeners]
            (other / "listeners.json").write_text(json.dumps(served))
            text = (self.folder / "bootstrap.yaml").read_text().replace(str(self.edge.directory), str(other))
            (self.folder / f"{other.name}.yaml").write_text(text)
        return [self.edge.command[0], "--config-path", f"{other}.yaml", *self.edge.command[3:]]

    def leaving(self) -> list[Path]:
        """Admin sockets of processes that have handed over."""
        return [*self.folder.glob("leaving-*.sock")]


def until(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def listening(path: str | Path) -> int:
    """The process that listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        return int.from_bytes(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)


def runs(pid: int) -> bool:
    """Whether a process is neither ended nor a zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def unit(folder: Path, certificate: Certificate) -> Iterator[Unit]:
    with serving(AskedNode) as one, serving(AskedNode) as two:
        endpoints = [{"name": f"node{port}", "address": "127.0.0.1", "port": port} for port in (one, two)]
        variables = {"stickyring_edge_clusters": [{"name": "nodes", "endpoints": endpoints}]}
        with running(folder, compose(folder, ("plain", "safe"), certificate, variables)) as edge:
            unit = Unit(edge, folder)
            yield unit
            unit.notified.close()
            for process in {unit.main, listening(edge.admin_socket)} - {edge.pid}:
                os.kill(process, signal.SIGKILL)


@pytest.fixture
def asked() -> Iterator[Callable[[], list[dict[str, list[str]]]]]:
    """What the nodes have been asked since."""
    before = len(AskedNode.asked)

    def since() -> list[dict[str, list[str]]]:
        targets = [urlsplit(target) for _, target in AskedNode.asked[before:]]
        assert {target.path for target in targets} <= {"/stickyring/reconnect"}
        return [parse_qs(target.query) for target in targets]

    yield since
    AskedNode.status, AskedNode.to_move = 202, 1


@pytest.fixture
def websocket(unit: Unit) -> Iterator[Callable[[str], Websocket]]:
    with ExitStack() as stack:
        yield lambda listener: stack.enter_context(Websocket(unit.edge, listener))
    until(lambda: not unit.leaving(), "the old processes have ended")


def told(edge: Edge) -> str:
    """How the edge names itself to a node."""
    connection = http.client.HTTPConnection("127.0.0.1", edge.ports["plain"], timeout=5)
    connection.request("GET", "/?client_id=1")
    headers: dict[str, str] = json.loads(connection.getresponse().read())
    connection.close()
    return next(value for name, value in headers.items() if name.lower() == "x-stickyring-process")


def refused(edge: Edge) -> bool:
    with suppress(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", edge.ports["plain"]), 5).close()
        return False
    return True


def test_websockets_stay_with_the_old_process_until_they_end(unit: Unit, websocket: Any) -> None:
    edge, old, old_process = unit.edge, [websocket("plain"), websocket("safe")], unit.main
    before = told(edge)
    assert unit.reload() == (0, "")
    assert unit.main == listening(edge.admin_socket) != old_process
    assert "failed" not in edge.give(edge.files, state="proven"), "the new process serves the files"
    (leaving,) = unit.leaving()
    until(lambda: before not in {told(edge) for _ in range(20)}, "the old process has closed its ports")
    new = websocket("plain")
    assert all(one.is_open() for one in [*old, new])
    assert Admin(edge.admin_socket).websockets() == {"plain": 1}
    assert Admin(str(leaving)).websockets() == {"plain": 1, "safe": 1}
    for one in old:
        one.socket.close()
    until(lambda: not unit.leaving() and not runs(old_process), "the old process has ended")
    assert new.is_open()


def test_one_after_another_takes_over(unit: Unit, websocket: Any) -> None:
    """Each has its name, and only the last one takes users."""
    opened, names = [], [told(unit.edge)]
    for _ in range(2):
        opened.append(websocket("plain"))
        assert unit.reload() == (0, "")
        until(lambda: {told(unit.edge) for _ in range(20)}.isdisjoint(names), "only the new process has users")
        names.append(told(unit.edge))
    expected = [f"leaving-{name.rpartition('/')[2]}.sock" for name in names[:2]]
    assert sorted(path.name for path in unit.leaving()) == sorted(expected)
    assert all(one.is_open() for one in opened)


def test_at_the_deadline_the_old_process_ends(unit: Unit, websocket: Any) -> None:
    ending, old_process = websocket("plain"), unit.main
    assert unit.reload(leaving=1) == (0, "")
    staying = websocket("plain")
    assert ending.socket.recv(1) == b""
    until(lambda: not unit.leaving() and not runs(old_process), "the old process has ended")
    assert staying.is_open()


def test_if_the_new_process_ends_the_old_one_goes_on(unit: Unit, websocket: Any) -> None:
    edge, here, old_process = unit.edge, websocket("plain"), unit.main
    for command in ([edge.command[0], "--no-such-option"], ["/no/such/program"]):
        assert unit.reload(*command) == (1, "Nothing was handed over: the new Envoy has ended; the journal says why")
        assert listening(edge.admin_socket) == old_process
        assert "failed" not in edge.give(edge.files, state="proven")
    assert here.is_open()


def test_if_the_new_process_does_not_serve_what_the_old_one_does_it_leaves_with_its_users(
    unit: Unit, websocket: Any
) -> None:
    """The port that both have open gives it users meanwhile."""
    edge, old_process, before = unit.edge, unit.main, told(unit.edge)
    program = unit.begin(*unit.another("plain"), proof=5)
    until(lambda: told(edge) != before, "the new process takes users")
    opened = [websocket("plain") for _ in range(20)]
    assert program.wait(START_SECONDS) == 1
    assert "does not serve what the old one serves: it lacks the listeners safe" in unit.error().read_text()
    assert listening(edge.admin_socket) == old_process
    (leaving,) = unit.leaving()
    assert Admin(str(leaving)).websockets()["plain"] > 0, "the control: it has users"
    until(lambda: {told(edge) for _ in range(20)} == {before}, "it has closed its ports")
    assert all(one.is_open() for one in opened)


@pytest.mark.parametrize("killed", ["the program", "all but the new Envoy", "all"])
def test_a_killed_run_is_mended_by_the_next(unit: Unit, websocket: Any, killed: str) -> None:
    edge, here, old_process = unit.edge, websocket("plain"), unit.main
    program = unit.begin(*unit.another(), proof=5)

    def stray() -> int:
        with suppress(OSError):
            return listening(edge.admin_socket)
        return old_process

    until(lambda: stray() != old_process, "the new process has the socket")
    new = stray()
    if killed == "the program":
        # As a reload that takes too long: what it has started goes on for a while, and notices by itself.
        program.kill()
    else:
        for member in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.getsid(int(member.name)) == program.pid and (killed == "all" or int(member.name) != new):
                    os.kill(int(member.name), signal.SIGKILL)
    program.wait(START_SECONDS)
    if killed != "the program":
        unit.run("finish")
        assert not refused(edge), "the main process still serves"
        assert here.is_open()
    assert unit.reload() == (0, "")
    assert unit.main == listening(edge.admin_socket) not in {new, old_process}
    until(lambda: not runs(new), "the stray one has ended")
    assert here.is_open()


@pytest.fixture
def unwatched(unit: Unit, websocket: Any) -> Iterator[Websocket]:
    """A WebSocket of a process that has been replaced; what the reload has started was killed."""
    here: Websocket = websocket("plain")
    program = unit.begin(*unit.edge.command)
    assert program.wait(START_SECONDS) == 0
    unit.main = int(unit.notice("MAINPID"))
    for member in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getsid(int(member.name)) == program.pid and int(member.name) != unit.main:
                os.kill(int(member.name), signal.SIGKILL)
    yield here
    assert unit.reload() == (0, "")


def test_a_process_whose_watcher_was_killed_is_ended_after_the_next_run(unit: Unit, unwatched: Websocket) -> None:
    assert unit.reload() == (0, "")
    assert unwatched.is_open()
    unwatched.socket.close()
    until(lambda: not unit.leaving(), "both have ended")


def test_a_run_that_waits_also_ends_a_process_whose_watcher_was_killed(unit: Unit, unwatched: Websocket) -> None:
    assert unit.run("finish") == "1"
    assert unwatched.is_open(), "the control: it waits for its user"
    unwatched.socket.close()
    assert unit.run("finish") == "0"
    assert not unit.leaving()


def test_the_nodes_are_asked_until_the_old_process_has_ended(unit: Unit, websocket: Any, asked: Any) -> None:
    here = websocket("plain")
    assert asked() == [], "the control"
    assert unit.reload() == (0, "")
    (leaving,) = unit.leaving()
    expected = {"process": [leaving.stem.removeprefix("leaving-")], "rate": [str(RATE / 2)]}
    until(lambda: len(asked()) > 4, "both nodes are asked again, as long as they have users to ask")
    assert len({port for port, _ in AskedNode.asked}) == 2
    here.socket.close()
    until(lambda: not unit.leaving(), "it has ended")
    assert {json.dumps(query) for query in asked()} == {json.dumps(expected)}


def test_a_run_that_changes_several_edges_has_users_asked_at_its_end(unit: Unit, websocket: Any, asked: Any) -> None:
    websocket("plain")
    hold = unit.folder / "hold"
    assert unit.run("hold") == ""
    assert unit.reload() == (0, "")
    begun = time.monotonic()
    until(lambda: time.monotonic() > begun + 2 or asked(), "the control: it holds")
    assert asked() == []
    assert unit.run("finish") == "1"
    assert not hold.exists()
    assert asked(), "that run has them asked"


def test_a_killed_run_does_not_hold_for_ever(unit: Unit, websocket: Any, asked: Any) -> None:
    websocket("plain")
    hold = unit.folder / "hold"
    assert unit.run("hold") == ""
    os.utime(hold, (time.time() - 901,) * 2)
    assert unit.reload() == (0, "")
    until(asked, "the nodes are asked")
    hold.unlink()


def test_a_node_without_users_to_ask_is_asked_less_and_less_often(unit: Unit, websocket: Any, asked: Any) -> None:
    AskedNode.to_move = 0
    here = websocket("plain")
    assert unit.reload() == (0, "")
    until(lambda: len(asked()) >= 2, "both are asked")
    began = time.monotonic()
    until(lambda: len(asked()) >= 6, "both are asked two more times")
    assert time.monotonic() - began > 4, "2 s and 4 s later, where once a second would take 2 s"
    here.socket.close()


def test_a_node_that_does_not_ask_is_named_once(unit: Unit, websocket: Any, asked: Any) -> None:
    AskedNode.status = 404
    here = websocket("plain")
    assert unit.reload() == (0, "")
    until(lambda: len(asked()) >= 4, "they are asked again")
    here.socket.close()
    until(lambda: not unit.leaving(), "it has ended")
    said = [line.partition(";")[0] for line in unit.error().read_text().splitlines() if "does not ask" in line]
    assert sorted(said) == [
        f"127.0.0.1 port {port} does not ask users to reconnect: status 404"
        for port in sorted({port for port, _ in AskedNode.asked})
    ]


@pytest.fixture
def closing(unit: Unit, websocket: Any) -> Iterator[None]:
    """The ports are closed; a reload opens them again."""
    yield
    unit.hush()
    assert unit.reload() == (0, "")


@pytest.mark.usefixtures("closing")
def test_before_a_stop_users_leave(unit: Unit, websocket: Any, asked: Any) -> None:
    """Also those of processes that leave already."""
    names = [told(unit.edge)]
    here = [websocket("plain")]
    assert unit.reload() == (0, "")
    until(lambda: {told(unit.edge) for _ in range(20)}.isdisjoint(names), "only the new process has users")
    names.append(told(unit.edge))
    here.append(websocket("plain"))
    began = time.monotonic()
    stopping = subprocess.Popen(unit.program("stop"), env=os.environ | unit.environment())
    until(lambda: refused(unit.edge), "its ports are closed")
    until(lambda: {query["process"][0] for query in asked()} == {*names}, "the users of both are asked")
    unit.notice("EXTEND_TIMEOUT_USEC")
    assert stopping.poll() is None
    assert all(one.is_open() for one in here)
    for one in here:
        one.socket.close()
    # Nobody else reads what systemd is told, and only so much of it fits in.
    deadline = time.monotonic() + 2 * START_SECONDS
    while stopping.poll() is None and time.monotonic() < deadline:
        unit.hush()
        time.sleep(0.1)
    assert stopping.returncode == 0
    assert time.monotonic() - began < 60


@pytest.mark.usefixtures("closing")
def test_a_stop_takes_no_longer_than_it_may(unit: Unit, websocket: Any) -> None:
    here = websocket("plain")
    assert unit.run("stop", stopping=0) == ""
    assert not refused(unit.edge), "without time, nothing is done"
    began = time.monotonic()
    assert unit.run("stop", stopping=1, patience=60) == ""
    assert unit.run("stop", stopping=60, patience=1) == "", "nobody leaves"
    assert time.monotonic() - began < 10
    assert refused(unit.edge)
    assert here.is_open()


def drain(unit: Unit) -> subprocess.Popen[str]:
    """Begin a drain, which prints its result at the end."""
    command = unit.program("drain", patience=5)
    return subprocess.Popen(command, env=os.environ | unit.environment(), stdout=subprocess.PIPE, text=True)


@pytest.mark.usefixtures("closing")
def test_a_drain_waits_as_long_as_users_leave(unit: Unit, websocket: Any, asked: Any) -> None:
    here = [websocket("plain") for _ in range(2)]
    draining = drain(unit)
    until(asked, "the nodes are asked")
    here[0].socket.close()
    assert draining.communicate(timeout=30)[0] == "1\n"
    assert refused(unit.edge)
    assert here[1].is_open()


def test_a_reload_during_a_drain_opens_the_ports_again(unit: Unit, websocket: Any, asked: Any) -> None:
    here = websocket("plain")
    draining = drain(unit)
    until(asked, "the nodes are asked")
    assert unit.reload(patience=5) == (0, "")
    assert draining.communicate(timeout=30)[0] == "1\n", "it waits for the users of the old process alone"
    assert not refused(unit.edge)
    assert here.is_open()


@pytest.mark.usefixtures("closing")
def test_a_stop_is_asked_for_at_the_rate_that_it_needs(unit: Unit, websocket: Any, asked: Any) -> None:
    opened = [websocket("plain") for _ in range(RATE)]
    unit.run("stop", stopping=1)
    # All within half a second, at both nodes together.
    assert {query["rate"][0] for query in asked()} == {str(float(RATE / 0.5 / 2))}
    for one in opened:
        one.socket.close()


def test_a_drain_of_an_envoy_that_does_not_answer_is_an_error(unit: Unit, tmp_path: Path) -> None:
    command = unit.program("drain", patience=1)
    command[command.index(unit.edge.admin_socket)] = str(tmp_path / "admin.sock")
    done = subprocess.run(command, env=os.environ | unit.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "Envoy does not answer on its admin socket, so its ports may be open\n"


def test_a_stop_of_an_envoy_that_has_ended_is_none(unit: Unit) -> None:
    """systemd names no main process then."""
    environment = {name: value for name, value in os.environ.items() if name != "MAINPID"}
    for action, code in (("stop", 0), ("drain", 1)):
        done = subprocess.run(unit.program(action), env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (code, "Envoy does not run\n" if code else "")


def test_a_run_reports_connections_that_stay_and_goes_on(unit: Unit, websocket: Any, tmp_path: Path) -> None:
    websocket("plain")
    assert unit.reload() == (0, "")
    play = {"hosts": "all", "connection": "local", "gather_facts": False, "any_errors_fatal": True}
    role = {"name": "stickyring.fleet.stickyring_edge", "tasks_from": "left"}
    tasks = [{"ansible.builtin.import_role": role}, {"ansible.builtin.debug": {"msg": "goes on"}}]
    (tmp_path / "play.yml").write_text(json.dumps([play | {"tasks": tasks}]))
    (tmp_path / "edge2").mkdir()
    told = [f"{name}={value}" for name, value in unit.environment().items()]
    *command, _ = ["/usr/bin/env", *told, *unit.program("finish")]
    command[command.index(unit.edge.admin_socket)] = "{{ folder }}/admin.sock"
    given = {
        "__stickyring_edge_hand_over_as_user": " ".join(command),
        "folder": f"{{{{ '{unit.folder}' if inventory_hostname == 'edge1' else '{tmp_path}/edge2' }}}}",
    }
    program = Path(sys.executable).parent / "ansible-playbook"
    done = subprocess.run(
        [program, "-i", "edge1,edge2,", "-e", json.dumps(given), tmp_path / "play.yml"],
        env={"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = " ".join(done.stdout.split())
    assert done.returncode == 0, said
    assert "Replaced processes of Envoy on edge1 have 1 open requests." in said
    assert "Replaced processes of Envoy on edge2" not in said
    assert said.count("goes on") == 2
