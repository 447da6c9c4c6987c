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
from typing import Any

import pytest
from ansible_collections.stickyring.fleet.plugins.module_utils.admin import Admin
from certificates import Certificate
from running_envoy import PROJECT, START_SECONDS, Edge, Node, Websocket, compose, running, serving

PROGRAM = PROJECT / "roles" / "stickyring_edge" / "files" / "hand_over.py"
NOTIFIED_SECONDS = 5


class Unit:
    """What systemd does for the unit: it starts the program for a reload, and hears who is the main process."""

    def __init__(self, edge: Edge, folder: Path) -> None:
        self.edge, self.folder, self.main = edge, folder, edge.pid
        self.notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notified.bind(str(folder / "notify"))
        self.notified.settimeout(NOTIFIED_SECONDS)
        self.reloads = 0

    def begin(self, *command: str, proof: float = START_SECONDS, leaving: float = 60) -> subprocess.Popen[bytes]:
        """Start the program in a process group of its own."""
        environment = {"MAINPID": str(self.main), "NOTIFY_SOCKET": f"{self.folder}/notify", "INVOCATION_ID": "first"}
        settings = self.folder / "settings.json"
        settings.write_text(json.dumps({"proof_seconds": proof, "leaving_seconds": leaving}))
        arguments = ["--admin-socket", self.edge.admin_socket, "--settings", str(settings), "--", *command]
        self.reloads += 1
        # Not a pipe, which what it starts would keep open.
        with self.error().open("a") as error:
            return subprocess.Popen(
                [sys.executable, PROGRAM, *arguments],
                env=os.environ | environment,
                stdout=error,
                stderr=error,
                start_new_session=True,
            )

    def reload(self, *command: str, **seconds: float) -> tuple[int, str]:
        """Run it with this command, or that of the running Envoy; return its exit code and its error."""
        code = self.begin(*(command or self.edge.command), **seconds).wait(2 * START_SECONDS)
        if code:
            said = self.error().read_text()
            return code, "; ".join(re.findall(r"^Nothing was handed over: .*$", said, re.MULTILINE)) or said
        self.main = int(self.notified.recv(100).decode().removeprefix("MAINPID="))
        return code, ""

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
    with serving(Node) as port:
        endpoints = [{"name": "node", "address": "127.0.0.1", "port": port}]
        variables = {"stickyring_edge_clusters": [{"name": "nodes", "endpoints": endpoints}]}
        with running(folder, compose(folder, ("plain", "safe"), certificate, variables)) as edge:
            unit = Unit(edge, folder)
            yield unit
            unit.notified.close()
            for process in {unit.main, listening(edge.admin_socket)} - {edge.pid}:
                os.kill(process, signal.SIGKILL)


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
    assert unit.reload() == (0, "")
    assert unit.main == listening(edge.admin_socket) not in {new, old_process}
    until(lambda: not runs(new), "the stray one has ended")
    assert here.is_open()


def test_a_process_whose_watcher_was_killed_is_ended_after_the_next_run(unit: Unit, websocket: Any) -> None:
    here, old_process = websocket("plain"), unit.main
    program = unit.begin(*unit.edge.command)
    assert program.wait(START_SECONDS) == 0
    unit.main = int(unit.notified.recv(100).decode().removeprefix("MAINPID="))
    for member in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getsid(int(member.name)) == program.pid and int(member.name) != unit.main:
                os.kill(int(member.name), signal.SIGKILL)
    assert unit.reload() == (0, "")
    assert here.is_open()
    here.socket.close()
    until(lambda: not runs(old_process) and not unit.leaving(), "both have ended")


def test_a_run_reports_connections_that_stay_and_goes_on(tmp_path: Path) -> None:
    play = {"hosts": "all", "connection": "local", "gather_facts": False, "any_errors_fatal": True}
    role = {"name": "stickyring.fleet.stickyring_edge", "tasks_from": "left"}
    tasks = [{"ansible.builtin.import_role": role}, {"ansible.builtin.debug": {"msg": "goes on"}}]
    given = {"__stickyring_edge_admin_socket": f"{tmp_path}/{{{{ inventory_hostname }}}}/admin.sock"}
    (tmp_path / "play.yml").write_text(json.dumps([play | {"tasks": tasks}]))
    for edge in ("edge1", "edge2"):
        (tmp_path / edge).mkdir()
    (tmp_path / "edge1" / "leaving-first.sock").touch()
    program = Path(sys.executable).parent / "ansible-playbook"
    done = subprocess.run(
        [
            program,
            "-i",
            "edge1,edge2,",
            "-e",
            json.dumps(given | {"__stickyring_edge_patience": 2}),
            tmp_path / "play.yml",
        ],
        env={"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = " ".join(done.stdout.split())
    assert done.returncode == 0, said
    assert "Processes of Envoy on edge1 that were replaced and still have users: 1." in said
    assert "Processes of Envoy on edge2" not in said
    assert said.count("goes on") == 2
