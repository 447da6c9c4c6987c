"""Lets an Envoy end once its users have left, and starts another one on its ports before.

A process that leaves accepts no connection, and the nodes are told to ask the users of its WebSockets to reconnect
(`stickyring.node.reconnect`). Its admin socket is `leaving-NAME.sock`, beside the other's; NAME is what it calls itself
to the nodes.

- `reload`, for `systemctl reload` of the unit: starts another Envoy on the ports of the one that runs. Returns 0 when
  the new process serves what the old one serves and systemd knows it as the main process. If it does not within the
  time, the old one goes on, the new one leaves, and this returns 1. A process of this program stays until the leaving
  Envoy has ended: when no request is left there, or at a deadline.
- `stop`, before the unit stops: has every process leave, and returns when no request is left, or at a deadline.
- `drain`, for maintenance: has every process leave, and waits while users do. Prints how many requests are left.
- `hold`, before a run that reloads several edges: nobody is asked for HOLD_SECONDS, or until another command than
  `reload` runs, or a reload fails. Otherwise users whom one edge asks may go to an edge that is still to be reloaded,
  and would be asked again.
- `finish`, at the end of such a run: has the users of processes that leave asked, waits while users leave, and ends
  processes that are empty. Prints how many requests are left.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import http.client
import json
import math
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.parse
import uuid
from collections.abc import Callable, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NoReturn

POLL_SECONDS = 0.1
WATCH_SECONDS = 1.0
ADMIN_SECONDS = 5
ENDING_SECONDS = 10
NODE_SECONDS = 2
FASTEST_RATE = 10_000
"""The most that a node accepts."""
MOST_THREADS = 16
LONGEST_PAUSE_SECONDS = 30
MOST_SECONDS = 600
"""For a run of a playbook, which has to renew its lock."""
ASKING_SHARE = 0.5
EXTENSION_SECONDS = 30
"""That systemd waits longer for a stop, each time that it is told."""
NOBODY = "127.0.0.1", 1
"""An endpoint of each ring, always healthy, where nothing listens."""
HOLD, HOLD_SECONDS = "hold", 900
QUIET_LOOKS = 2
"""So many times without a request, because one may come on a connection that is open."""
IDENTITY = "INVOCATION_ID"
"""In the environment, the name of a process: systemd's for the one that it starts, this program's for others."""
TOLD = b"told"
OPEN, OWN = r"^http\..+\.downstream_(rq_active|cx_upgrades_active)$", "http.admin."


class NotHandedOver(Exception):
    """The old process goes on as before; the message says why."""


class Process:
    """A process, which may have ended."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor: int | None = None
        with contextlib.suppress(ProcessLookupError):
            self._descriptor = os.pidfd_open(pid)

    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._descriptor is not None and not select.select([self._descriptor], [], [], 0)[0]

    def end(self) -> None:
        """End it, at once if it does not heed SIGTERM."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._descriptor is None or not self.runs():
                return
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)
            select.select([self._descriptor], [], [], ENDING_SECONDS)


class Admin(http.client.HTTPConnection):
    """Envoy's admin interface on a Unix socket; methods raise OSError if it does not answer."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=ADMIN_SECONDS)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))

    def ask(self, method: str, target: str) -> bytes:
        """Return the body of its answer."""
        try:
            self.request(method, target)
            answer = self.getresponse()
            body = answer.read()
        except http.client.HTTPException as error:
            raise OSError(f"{self._path}: {error!r}") from error
        finally:
            self.close()
        if answer.status != http.client.OK:
            raise OSError(f"{self._path}: {method} {target}: status {answer.status}")
        return body

    def get(self, target: str) -> Any:  # noqa: ANN401 - JSON
        """Return the JSON of its answer."""
        try:
            return json.loads(self.ask("GET", target))
        except ValueError as error:
            raise OSError(f"{self._path}: {target}: {error}") from error

    def listeners(self) -> set[str]:
        """Names of the listeners."""
        return {one["name"] for one in self.get("/listeners?format=json").get("listener_statuses", [])}

    def serves(self) -> bool:
        """Whether the ports of the listeners have been opened."""
        stats = self.get("/stats?format=json&filter=^listener_manager.workers_started$")["stats"]
        return self.ask("GET", "/ready").strip() == b"LIVE" and [one["value"] for one in stats] == [1]

    def healthy(self) -> set[tuple[str, str, int]]:
        """The healthy endpoints: cluster, address and port."""
        return {
            (cluster["name"], address["address"], address["port_value"])
            for cluster in self.get("/clusters?format=json").get("cluster_statuses", [])
            for host in cluster.get("host_statuses", [])
            if (address := host["address"].get("socket_address"))
            and host["health_status"] == {"eds_health_status": "HEALTHY"}
        }

    def open(self) -> tuple[int, int]:
        """Numbers of requests that users have open, and of WebSockets among them."""
        stats = self.get(f"/stats?format=json&filter={urllib.parse.quote(OPEN)}")["stats"]
        found = [(one["name"], one["value"]) for one in stats if not one.get("name", OWN).startswith(OWN)]
        websockets = [value for name, value in found if name.endswith("upgrades_active")]
        return sum(value for _, value in found) - sum(websockets), sum(websockets)


def listener_of(path: Path) -> int | None:
    """Return the process that listens on a Unix socket; None if nobody does."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return None
    return int(struct.unpack("3i", credentials)[0])


def start(command: list[str], note: Callable[[int], Path]) -> Process:
    """Start Envoy as a child of the first process, which learns of its end from then on; note its name."""
    reading, writing = os.pipe()
    between = os.fork()
    if not between:
        try:
            if not os.fork():
                name = uuid.uuid4().hex
                note(os.getpid()).write_text(f"{name}\n")
                os.write(writing, str(os.getpid()).encode())
                os.execve(command[0], command, {**os.environ, IDENTITY: name})
        except OSError as error:
            print(error, file=sys.stderr)
        finally:
            os._exit(1)
    os.close(writing)
    os.waitpid(between, 0)
    with os.fdopen(reading) as told:
        pid = told.read()
    if not pid:
        raise NotHandedOver("the new Envoy could not be started; the journal says why")
    return Process(int(pid))


def wait_for(missing: Callable[[], str], deadline: float, otherwise: str) -> None:
    """Wait until nothing is missing; at the deadline, NotHandedOver with this sentence and what is missing."""
    while True:
        try:
            what = missing()
        except OSError as error:
            what = str(error)
        if not what:
            return
        if time.monotonic() > deadline:
            raise NotHandedOver(f"{otherwise}: {what}")
        time.sleep(POLL_SECONDS)


def tell_systemd(text: str) -> None:
    """Send a message as sd_notify(3) does."""
    address = os.environ["NOTIFY_SOCKET"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifying:
        notifying.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        notifying.sendall(text.encode())


class Leaving:
    """A process that accepts nobody any more, and what its admin socket says."""

    def __init__(self, process: Process, path: Path, name: str) -> None:
        self.process, self.path = process, path
        self.answered = False
        self.websockets = 0
        self._requests = 0
        self._name = name
        self._quiet = 0
        self._pauses: dict[tuple[str, int], tuple[float, float]] = {}
        self._said: set[str] = set()

    @property
    def empty(self) -> bool:
        """Whether it has ended, or no request has been found for a while."""
        return not self.process.runs() or self._quiet >= QUIET_LOOKS

    @property
    def requests(self) -> int:
        """Number of open requests when it was last looked at, WebSockets among them; none once it is empty."""
        return 0 if self.empty else self._requests

    def look(self) -> None:
        """Have it accept nobody, and count the open requests."""
        if listener_of(self.path) != self.process.pid:
            # A reload has given its socket to another process since.
            self.path = self.path.with_name(f"leaving-{self._name}.sock")
            if listener_of(self.path) != self.process.pid:
                return
        admin = Admin(self.path)
        with contextlib.suppress(OSError):
            for target in ("/drain_listeners", "/healthcheck/fail"):
                admin.ask("POST", target)
            self._requests, self.websockets = admin.open()
            self.answered = True
            self._quiet = 0 if self._requests else self._quiet + 1

    def ask(self, rate: float) -> None:
        """Have the nodes ask its users, so many a second; those that have nobody to ask, less and less often."""
        if not self.websockets:
            return
        try:
            nodes = sorted({(address, port) for _, address, port in Admin(self.path).healthy()} - {NOBODY})
        except OSError:
            return
        due = [node for node in nodes if time.monotonic() >= self._pauses.get(node, (0, 0))[0]]
        if not due:
            return
        query = urllib.parse.urlencode({"process": self._name, "rate": min(rate / len(nodes), FASTEST_RATE)})
        with ThreadPoolExecutor(min(len(due), MOST_THREADS)) as asking:
            answers = [*asking.map(lambda node: self._ask_one(node, query), due)]
        for node, found in zip(due, answers, strict=True):
            _, pause = self._pauses.get(node, (0, WATCH_SECONDS))
            pause = WATCH_SECONDS if found else min(2 * pause, LONGEST_PAUSE_SECONDS)
            self._pauses[node] = time.monotonic() + pause, pause

    def _ask_one(self, node: tuple[str, int], query: str) -> bool:
        """Return whether the node has users to ask."""
        address, port = node
        found, problem = False, ""
        connection = http.client.HTTPConnection(address, port, timeout=NODE_SECONDS)
        try:
            connection.request("POST", f"/stickyring/reconnect?{query}")
            answer = connection.getresponse()
            if answer.status == http.client.ACCEPTED:
                found = json.loads(answer.read())["to_move"] > 0
            else:
                problem = f"status {answer.status}; does it trust this edge, and have the edge's release?"
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            problem = str(error) or repr(error)
        finally:
            connection.close()
        said = f"{address} port {port} does not ask users to reconnect: {problem}"
        if problem and said not in self._said:
            self._said.add(said)
            print(said, file=sys.stderr)
        return found


def told_about(unit: str) -> dict[str, str]:
    """What systemd tells processes of a unit."""
    command = ["systemctl", "show", "--property=MainPID", "--property=InvocationID", unit]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    shown = dict(line.split("=", 1) for line in lines)
    return {"MAINPID": shown["MainPID"], IDENTITY: shown["InvocationID"]}


class HandOver:
    """The old process, the new one, and the sockets of their admin interfaces."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.command: list[str] = given.command
        settings = json.loads(given.settings.read_text())
        self.proof_seconds: float = settings["proof_seconds"]
        self.leaving_seconds: float = settings["leaving_seconds"]
        self.stopping_seconds: float = settings["stopping_seconds"]
        self.patience_seconds: float = settings["patience_seconds"]
        self.rate: float = settings["reconnects_per_second"]
        self.socket: Path = given.admin_socket
        self.hold: Path = self.socket.with_name(HOLD)
        self.lock: IO[str] | None = None
        self.old = Process(int(os.environ["MAINPID"]))
        self.new: Process | None = None

    def take_lock(self) -> None:
        """Wait until no other run hands over; a killed one may still be at work. Watchers and Envoy do not hold it."""
        self.lock = self.socket.with_name("lock").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)

    def release_lock(self) -> None:
        """Let another run hand over."""
        if self.lock is not None:
            self.lock.close()

    def note_of(self, pid: int) -> Path:
        """Return the file with the name of a process that this program has started.

        Its environment cannot be read: each process of the unit may have a user namespace of its own.
        """
        return self.socket.with_name(f"process-{pid}")

    def name_of(self, process: Process) -> str:
        """What a process calls itself to the nodes."""
        note = self.note_of(process.pid)
        return note.read_text().strip() if note.exists() else os.environ[IDENTITY]

    def leaving(self, process: Process) -> Path:
        """The admin socket of a process that leaves."""
        return self.socket.with_name(f"leaving-{self.name_of(process)}.sock")

    def all_leaving(self, besides: Set[int | None]) -> list[Leaving]:
        """Return the processes that leave, but these; sockets on which nobody listens are removed."""
        found = []
        for path in self.socket.parent.glob("leaving-*.sock"):
            if (pid := listener_of(path)) is None:
                path.unlink(missing_ok=True)
            elif pid not in besides:
                found.append(Leaving(Process(pid), path, path.stem.removeprefix("leaving-")))
        return found

    def mend(self) -> None:
        """Undo what a killed run has left, and go on with the end of processes that leave."""
        mine = self.leaving(self.old)
        listening = listener_of(self.socket)
        if listening not in {None, self.old.pid}:
            stray = Process(listening)
            self.socket.rename(self.leaving(stray))
        if listening != self.old.pid and mine.exists():
            mine.rename(self.socket)
        for leaving in self.all_leaving({self.old.pid}):
            if not os.fork():
                self.release_lock()
                self.retire(leaving)
                os._exit(0)

    def begin(self) -> Process:
        """Start the new process and return it once it serves what the old one serves.

        Raises:
            NotHandedOver, OSError: it does not within the time.
        """
        deadline = time.monotonic() + self.proof_seconds
        served: set[str] = set()

        def known() -> str:
            served.update(Admin(self.socket).listeners())
            return ""

        wait_for(known, deadline, "the running Envoy does not answer")
        self.socket.rename(self.leaving(self.old))
        self.new = start(self.command, self.note_of)
        old_admin, new_admin = Admin(self.leaving(self.old)), Admin(self.socket)
        otherwise = "the new Envoy does not serve what the old one serves"
        wait_for(lambda: self.missing(new_admin, old_admin, served), deadline, otherwise)
        return self.new

    def missing(self, new: Admin, old: Admin, served: set[str]) -> str:
        """What the new process lacks of what the old one serves; empty for nothing, also if the old one has ended."""
        if self.new is not None and not self.new.runs():
            raise NotHandedOver("the new Envoy has ended; the journal says why")
        if not new.serves():
            return "its ports are not open"
        if listeners := served - new.listeners():
            return f"it lacks the listeners {', '.join(sorted(listeners))}"
        if self.old.runs() and (endpoints := old.healthy() - new.healthy()):
            return f"it does not find healthy: {', '.join(' '.join(map(str, one)) for one in sorted(endpoints))}"
        return ""

    def go_back(self) -> None:
        """Make the old process the only one again. The new one leaves, because users may have found it."""
        if self.new is not None:
            if listener_of(self.socket) == self.new.pid:
                self.socket.rename(self.leaving(self.new))
            else:
                self.new.end()
        if (mine := self.leaving(self.old)).exists():
            mine.rename(self.socket)

    def retire(self, leaving: Leaving) -> None:
        """End a process once it is empty, or at the deadline; return at once if another run watches it."""
        with self.note_of(leaving.process.pid).with_suffix(".watched").open("w") as watched:
            try:
                fcntl.flock(watched, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            self.see_off([leaving], self.leaving_seconds)
            self.end(leaving)

    def end(self, leaving: Leaving) -> None:
        """End a process that leaves."""
        leaving.process.end()
        note = self.note_of(leaving.process.pid)
        for path in (leaving.path, note, note.with_suffix(".watched")):
            path.unlink(missing_ok=True)

    def stop(self) -> None:
        """Have every process leave, at most for the time that a stop may take."""
        if self.stopping_seconds:
            self.see_off(self.everyone(), self.stopping_seconds, self.patience_seconds, stops=True)

    def drain(self) -> int:
        """Have every process leave, and wait while users do; return the number of open requests.

        Raises:
            NotHandedOver: the main process does not answer.
        """
        main, *others = self.everyone()
        self.see_off([main, *others], MOST_SECONDS, self.patience_seconds)
        if not main.answered:
            raise NotHandedOver("Envoy does not answer on its admin socket, so its ports may be open")
        return sum(one.requests for one in (main, *others))

    def finish(self) -> int:
        """Have users of processes that leave asked, and end empty ones; return the number of open requests."""
        # A run that hands over, or was killed, may call the main process one that leaves.
        self.take_lock()
        every = self.all_leaving({self.old.pid, listener_of(self.socket)})
        self.release_lock()
        self.hold.unlink(missing_ok=True)
        self.see_off(every, MOST_SECONDS, self.patience_seconds)
        for one in every:
            if one.empty:
                self.end(one)
        return sum(one.requests for one in every)

    def everyone(self) -> list[Leaving]:
        """Return all processes, the main one first, each as one that leaves; from now on, users are asked."""
        self.take_lock()
        main = Process(listener_of(self.socket) or self.old.pid)
        every = [Leaving(main, self.socket, self.name_of(main)), *self.all_leaving({main.pid})]
        self.release_lock()
        self.hold.unlink(missing_ok=True)
        return every

    def see_off(self, every: list[Leaving], seconds: float, patience: float = math.inf, *, stops: bool = False) -> None:
        """Wait until these are empty, at most for so long, and while within `patience` the number of requests falls.

        For a stop, users are asked fast enough to have left after half of the time.
        """
        began = fell = time.monotonic()
        fewest: float = math.inf
        while True:
            for one in every:
                one.look()
            rate = max(self.rate, sum(one.websockets for one in every) / (seconds * ASKING_SHARE) if stops else 0)
            if not self.holds():
                for one in every:
                    one.ask(rate)
            now, requests = time.monotonic(), sum(one.requests for one in every)
            if requests < fewest:
                fewest, fell = requests, now
            if all(one.empty for one in every) or now - began > seconds or now - fell > patience:
                return
            if stops:
                tell_systemd(f"EXTEND_TIMEOUT_USEC={EXTENSION_SECONDS * 10**6}")
            time.sleep(WATCH_SECONDS)

    def holds(self) -> bool:
        """Whether nobody is to be asked yet."""
        try:
            return bool(time.time() - self.hold.stat().st_mtime < HOLD_SECONDS)
        except FileNotFoundError:
            return False


def hand_over(change: HandOver, caller: socket.socket) -> None:
    """Do it all in a process that stays: tell the caller who the new process is, or why there is none."""
    reason = ""
    try:
        caller.sendall(str(change.begin().pid).encode())
        told = caller.recv(len(TOLD)) == TOLD
    # Whatever it is, the old process must have its socket again.
    except Exception as error:
        reason, told = str(error) or repr(error), False
    if not told:
        change.go_back()
        change.hold.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            caller.sendall(reason.encode())
    caller.close()
    change.release_lock()
    leaving = change.old if told else change.new
    if leaving is not None:
        change.retire(Leaving(leaving, change.leaving(leaving), change.name_of(leaving)))


def reload(change: HandOver) -> NoReturn:
    """Start another Envoy on the ports of the one that runs."""
    change.take_lock()
    try:
        change.mend()
    except OSError as error:
        change.hold.unlink(missing_ok=True)
        sys.exit(f"Nothing was handed over: {error}")
    mine, other = socket.socketpair()
    if not os.fork():
        mine.close()
        hand_over(change, other)
        os._exit(0)
    other.close()
    change.release_lock()
    said = mine.recv(1000).decode()
    if not said.isdigit():
        sys.exit(f"Nothing was handed over: {said or 'this program was ended'}")
    # systemd takes it from this process alone.
    tell_systemd(f"MAINPID={said}")
    mine.sendall(TOLD)
    sys.exit(0)


def main() -> NoReturn:
    """Run as the unit's ExecReload and ExecStop, and by playbooks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--admin-socket", type=Path, required=True, help="of Envoy's admin interface")
    parser.add_argument(
        "--settings",
        type=Path,
        required=True,
        help="JSON: proof_seconds for a new process to serve, leaving_seconds for an old one to end, stopping_seconds "
        "for a stop (0: at once), patience_seconds for the next user to leave; and reconnects_per_second, at all nodes",
    )
    parser.add_argument(
        "--unit", help="that systemd is asked about; not needed for a process of the unit, which is told"
    )
    parser.add_argument("action", choices=["reload", "stop", "drain", "hold", "finish"])
    parser.add_argument("command", nargs="*", help="that starts Envoy, for reload")
    given = parser.parse_args()
    if given.action == "hold":
        given.admin_socket.with_name(HOLD).touch()
        sys.exit(0)
    if given.unit:
        os.environ |= told_about(given.unit)
    if not int(os.environ.get("MAINPID") or 0):
        # systemd stops a unit whose main process has ended by itself.
        sys.exit(0 if given.action == "stop" else "Envoy does not run")
    change = HandOver(given)
    match given.action:
        case "reload":
            reload(change)
        case "stop":
            change.stop()
        case "drain":
            try:
                print(change.drain())
            except NotHandedOver as reason:
                sys.exit(str(reason))
        case "finish":
            print(change.finish())
    sys.exit(0)


if __name__ == "__main__":
    main()
