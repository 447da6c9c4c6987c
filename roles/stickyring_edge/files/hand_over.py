"""Starts another Envoy on the ports of the one that runs, and lets that one end once its WebSockets have left.

For `systemctl reload` of the unit. Returns 0 when the new process serves what the old one serves and systemd knows it
as the main process. If it does not within the time, it is ended, the old one stays as it was, and this returns 1.

A process of this program stays until the old Envoy has ended: when no request is left there, or at a deadline.
Meanwhile the old one accepts no connection. Its admin socket is `leaving-ID.sock`, beside the new one's; ID is what it
calls itself to the nodes.
"""

from __future__ import annotations

import argparse
import contextlib
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
"""systemd sets it for the process that it starts, this program for all others."""
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

    def process(self) -> int:
        """Return the number of the process that listens on the socket."""
        try:
            self.connect()
            credentials = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        finally:
            self.close()
        return int(struct.unpack("3i", credentials)[0])

    def listeners(self) -> set[str]:
        """Names of the listeners whose ports are open."""
        return {one["name"] for one in self.get("/listeners?format=json").get("listener_statuses", [])}

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


def start(command: list[str], identity: str) -> Process:
    """Start Envoy as a child of the first process, which learns of its end from then on."""
    reading, writing = os.pipe()
    between = os.fork()
    if not between:
        with contextlib.suppress(OSError):
            pid = os.posix_spawn(command[0], command, {**os.environ, IDENTITY: identity})
            os.write(writing, str(pid).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(between, 0)
    with os.fdopen(reading) as told:
        pid_text = told.read()
    if not pid_text:
        raise NotHandedOver(f"{command[0]} could not be started")
    return Process(int(pid_text))


def wait(what: str, seconds: float, holds: Callable[[], bool]) -> None:
    """Wait until this holds; NotHandedOver after so many seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise NotHandedOver(f"the new Envoy {what} after {seconds:g} s")
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
        self.proof_seconds: float = given.proof_seconds
        self.leaving_seconds: float = given.leaving_seconds
        self.socket: Path = given.admin_socket
        # Beside the socket: number and identity of the process that this program has started last.
        self.note = self.socket.with_name("process")
        self.old = Process(int(os.environ["MAINPID"]))
        self.leaving = self.socket.with_name(f"leaving-{self.identity_of_old()}.sock")

    def identity_of_old(self) -> str:
        """What the old process calls itself; its environment cannot be read from another user namespace."""
        pid, _, identity = self.note.read_text().partition(" ") if self.note.exists() else ("", "", "")
        return identity if pid == str(self.old.pid) else os.environ[IDENTITY]

    def mend(self) -> None:
        """Undo what a killed run has left: its Envoy, and the old one's socket under another name."""
        try:
            listening = Admin(self.socket).process()
        except OSError:
            listening = None
        if listening not in {None, self.old.pid}:
            Process(listening).end()
        if listening != self.old.pid and self.leaving.exists():
            self.leaving.rename(self.socket)

    def begin(self) -> Process:
        """Start the new process and wait until it serves what the old one serves."""
        self.mend()
        served = Admin(self.socket).listeners()
        self.socket.rename(self.leaving)
        identity, new = uuid.uuid4().hex, None
        try:
            new = start(self.command, identity)
            self.prove(new, served)
            self.note.write_text(f"{new.pid} {identity}")
        except BaseException:
            self.go_back(new)
            raise
        return new

    def go_back(self, new: Process | None) -> None:
        """End the new process; the old one stays the only one."""
        if new is not None:
            new.end()
        self.leaving.rename(self.socket)

    def prove(self, new: Process, served: set[str]) -> None:
        """Wait until the new process has the ports open, and finds the endpoints healthy that the old one does."""
        old_admin, new_admin = Admin(self.leaving), Admin(self.socket)

        def serves() -> bool:
            if not new.runs():
                raise NotHandedOver("the new Envoy has ended; the journal says why")
            try:
                return served <= new_admin.listeners() and old_admin.healthy() <= new_admin.healthy()
            except OSError:
                return False

        wait("does not serve what the old one serves", self.proof_seconds, serves)

    def retire(self) -> None:
        """Have the old process accept nobody, and end it once no request is left, or at the deadline."""
        admin, deadline = Admin(self.leaving), time.monotonic() + self.leaving_seconds
        quiet = 0
        while self.old.runs() and time.monotonic() < deadline and quiet < QUIET_LOOKS:
            with contextlib.suppress(OSError):
                for target in ("/drain_listeners", "/healthcheck/fail"):
                    admin.ask("POST", target)
                quiet = 0 if admin.requests() else quiet + 1
            time.sleep(WATCH_SECONDS)
        self.old.end()
        self.leaving.unlink(missing_ok=True)


def hand_over(change: HandOver, report: int) -> None:
    """Do it all; write `ok` or the reason into the descriptor `report` once it is clear that users have a process."""
    try:
        new = change.begin()
        try:
            # Who has called waits no longer if it was ended.
            os.write(report, b"ok")
        except BrokenPipeError:
            change.go_back(new)
            return
        tell_systemd(f"MAINPID={new.pid}")
    except (NotHandedOver, OSError) as error:
        with contextlib.suppress(BrokenPipeError):
            os.write(report, str(error).encode())
        return
    os.close(report)
    change.retire()


def main() -> NoReturn:
    """Run as the unit's ExecReload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--admin-socket", type=Path, required=True, help="of Envoy's admin interface")
    parser.add_argument("--proof-seconds", type=float, default=30, help="for the new process to serve (default 30)")
    parser.add_argument("--leaving-seconds", type=float, default=600, help="for the old process to end (default 600)")
    parser.add_argument("command", nargs="+", help="that starts Envoy")
    change = HandOver(parser.parse_args())
    reading, writing = os.pipe()
    if not os.fork():
        os.close(reading)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        hand_over(change, writing)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        said = told.read()
    if said == "ok":
        sys.exit(0)
    sys.exit(f"Nothing was handed over: {said or 'this program was ended'}")


if __name__ == "__main__":
    main()
