"""Starts another Envoy on the ports of the one that runs, and lets that one end once its WebSockets have left.

For `systemctl reload` of the unit. Returns 0 when the new process serves what the old one serves and systemd knows it
as the main process. If it does not within the time, the old one goes on, the new one leaves, and this returns 1.

A process of this program stays until the leaving Envoy has ended: when no request is left there, or at a deadline.
Meanwhile that one accepts no connection. Its admin socket is `leaving-NAME.sock`, beside the other's; NAME is what it
calls itself to the nodes.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import http.client
import json
import os
import select
import signal
import socket
import struct
import sys
import time
import urllib.parse
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

POLL_SECONDS = 0.1
WATCH_SECONDS = 1.0
ADMIN_SECONDS = 5
ENDING_SECONDS = 10
QUIET_LOOKS = 2
"""So many times without a request, because one may come on a connection that is open."""
IDENTITY = "INVOCATION_ID"
"""In the environment, the name of a process: systemd's for the one that it starts, this program's for others."""
TOLD = b"told"
REQUESTS = r"^http\..+\.downstream_rq_active$"


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

    def healthy(self) -> set[str]:
        """The healthy endpoints, each with its cluster."""
        return {
            f"{cluster['name']} {json.dumps(host['address'], sort_keys=True)}"
            for cluster in self.get("/clusters?format=json").get("cluster_statuses", [])
            for host in cluster.get("host_statuses", [])
            if host["health_status"] == {"eds_health_status": "HEALTHY"}
        }

    def requests(self) -> int:
        """Number of requests that users have open, WebSockets among them."""
        stats = self.get(f"/stats?format=json&filter={urllib.parse.quote(REQUESTS)}")["stats"]
        own = "http.admin.downstream_rq_active"
        return sum(one["value"] for one in stats if one.get("name") not in {None, own})


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


class HandOver:
    """The old process, the new one, and the sockets of their admin interfaces."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.command: list[str] = given.command
        settings = json.loads(given.settings.read_text())
        self.proof_seconds: float = settings["proof_seconds"]
        self.leaving_seconds: float = settings["leaving_seconds"]
        self.socket: Path = given.admin_socket
        # A killed run may still be at work; watchers and Envoy do not hold this.
        self.lock = self.socket.with_name("lock").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.old = Process(int(os.environ["MAINPID"]))
        self.new: Process | None = None

    def note_of(self, pid: int) -> Path:
        """Return the file with the name of a process that this program has started.

        Its environment cannot be read: each process of the unit may have a user namespace of its own.
        """
        return self.socket.with_name(f"process-{pid}")

    def leaving(self, process: Process) -> Path:
        """The admin socket of a process that leaves."""
        note = self.note_of(process.pid)
        name = note.read_text().strip() if note.exists() else os.environ[IDENTITY]
        return self.socket.with_name(f"leaving-{name}.sock")

    def mend(self) -> None:
        """Undo what a killed run has left, and go on with the end of processes that leave."""
        mine = self.leaving(self.old)
        listening = listener_of(self.socket)
        if listening not in {None, self.old.pid}:
            stray = Process(listening)
            self.socket.rename(self.leaving(stray))
        if listening != self.old.pid and mine.exists():
            mine.rename(self.socket)
        for path in self.socket.parent.glob("leaving-*.sock"):
            if (pid := listener_of(path)) is None:
                path.unlink(missing_ok=True)
            elif pid != self.old.pid and not os.fork():
                self.lock.close()
                self.retire(Process(pid), path)
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
            return f"it does not find healthy: {', '.join(sorted(endpoints))}"
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

    def retire(self, process: Process, path: Path) -> None:
        """Have a process accept nobody, and end it once no request is left, or at the deadline."""
        admin, deadline = Admin(path), time.monotonic() + self.leaving_seconds
        quiet = 0
        while process.runs() and time.monotonic() < deadline and quiet < QUIET_LOOKS:
            with contextlib.suppress(OSError):
                for target in ("/drain_listeners", "/healthcheck/fail"):
                    admin.ask("POST", target)
                quiet = 0 if admin.requests() else quiet + 1
            time.sleep(WATCH_SECONDS)
        process.end()
        path.unlink(missing_ok=True)
        self.note_of(process.pid).unlink(missing_ok=True)


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
        with contextlib.suppress(OSError):
            caller.sendall(reason.encode())
    caller.close()
    change.lock.close()
    leaving = change.old if told else change.new
    if leaving is not None:
        change.retire(leaving, change.leaving(leaving))


def main() -> NoReturn:
    """Run as the unit's ExecReload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--admin-socket", type=Path, required=True, help="of Envoy's admin interface")
    parser.add_argument(
        "--settings",
        type=Path,
        required=True,
        help="JSON: proof_seconds for the new process to serve, leaving_seconds for the old one to end",
    )
    parser.add_argument("command", nargs="+", help="that starts Envoy")
    change = HandOver(parser.parse_args())
    try:
        change.mend()
    except OSError as error:
        sys.exit(f"Nothing was handed over: {error}")
    mine, other = socket.socketpair()
    if not os.fork():
        mine.close()
        hand_over(change, other)
        os._exit(0)
    other.close()
    change.lock.close()
    said = mine.recv(1000).decode()
    if not said.isdigit():
        sys.exit(f"Nothing was handed over: {said or 'this program was ended'}")
    # systemd takes it from this process alone.
    tell_systemd(f"MAINPID={said}")
    mine.sendall(TOLD)
    sys.exit(0)


if __name__ == "__main__":
    main()
