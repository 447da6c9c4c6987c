"""One node process replaces another on the same listening socket: `stickyring serve --replace`.

The new process, the successor, gets the listening socket from the serving process, the incumbent, over its control
socket. It loads its application, and only then has the incumbent retire: accept nothing more, and drain. Connections
that arrive in between wait in the backlog of the shared socket. So edges notice nothing, and each user is disconnected
once, when the drain asks them to reconnect. If the successor fails before that, the incumbent keeps serving.
"""

import logging
import mmap
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from gunicorn.workers.base import Worker

from stickyring.node.control_socket import ControlSocket
from stickyring.node.operate import ask

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from stickyring.node.drain import Drain

log = logging.getLogger(__name__)

WAITING, COMMITTED, DONE = range(3)
TAKEN = b"\0taken"
ELSEWHERE_HEADER = "x-stickyring-elsewhere"
"""The edge retries a request at the next node of the ring if the answer has this header."""
HOP_BY_HOP = frozenset({"HTTP_CONNECTION", "HTTP_KEEP_ALIVE", "HTTP_TE", "HTTP_TRANSFER_ENCODING", "HTTP_UPGRADE"})
OWN_TO_AN_ANSWER = frozenset(
    {"connection", "content-length", "date", "server", "transfer-encoding", "x-content-type-options"}
)
RETIRE_SECONDS = 5
"""How long the incumbent may take to answer: the successor's worker waits, and must not look hung."""


class CannotRetireError(Exception):
    """The serving process cannot be replaced, or not now; the text says why."""


class Incumbent:
    """The serving process, as seen in its worker.

    Its worker class may have `retire()`. That stops accepting connections except on the Unix socket whose name it
    returns (`Predecessor`), and later ends the master as by SIGTERM. Without it, the node can only be restarted.
    `retired` is a byte shared with the master: 1 as soon as a successor takes over. `Drain.final` becomes true later,
    and before any other end: when the drain begins.
    """

    def __init__(self, worker: Worker, drain: "Drain", retired: mmap.mmap) -> None:
        self._worker = worker
        self._drain = drain
        self._retired = retired

    def hand_over(self) -> dict[str, Any]:
        """Return the answer to `GET /listener`; its `listener` is the descriptor of the listening socket.

        Raises:
            CannotRetireError: it could not retire.
        """
        self._check()
        return {"process": self._worker.ppid, "listener": self._worker.sockets[0].fileno()}

    def retire(self) -> dict[str, Any]:
        """Leave the listening socket to the successor, and end; return the answer to `POST /retire`.

        Raises:
            CannotRetireError: it cannot, and keeps serving.
        """
        self._check()
        self._retired[0] = 1
        name = self._worker.retire()
        log.info("replaced: accepting nothing more")
        return {"relay": name}

    def _check(self) -> None:
        if not hasattr(self._worker, "retire"):
            name = type(self._worker).__name__
            raise CannotRetireError(f"its worker class {name} does not support --replace: restart the node")
        if not self._worker.booted:
            raise CannotRetireError("the node does not serve yet")
        if self._retired[0] or self._drain.final or not self._worker.alive:
            raise CannotRetireError("the node is about to stop")


class Successor:
    """The new process, from its request for the listening socket until it has taken over.

    The command creates it; after `fork` it goes on in another process, whose worker calls `take_over`. `check` may
    raise click.ClickException if the listening socket is not the wanted one.

    Raises:
        click.ClickException: no process serves the control socket `path`, or it cannot be replaced.
    """

    def __init__(self, path: Path, check: Callable[[socket.socket], None]) -> None:
        # First, because only one process at a time can have it: so no other successor replaces the incumbent.
        self.control = ControlSocket(path, beside=True)
        try:
            self.listener, self._incumbent = _ask_for_listener(path)
            check(self.listener)
        except click.ClickException:
            self.control.remove()
            raise
        # Shared by master and worker.
        self._stage = mmap.mmap(-1, 1)
        self._here, self._there = socket.socketpair()

    def fork(self) -> None:
        """Return in a new process, outside this one's session and not its child; here, wait for the outcome.

        Raises:
            click.ClickException: in this process: the new one has not taken over; the text is the cause.
            SystemExit: in this process: the new one has taken over.
        """
        # Forked twice: systemd supervises only its own children, and it adopts orphans.
        between = os.fork()
        if not between:
            os.setsid()
            if os.fork():
                os._exit(0)
            self._here.close()
            return
        os.waitpid(between, 0)
        for unused in (self._there, self.listener, self.control.listener):
            unused.close()
        try:
            outcome = self._here.recv(4096)
        except ConnectionError:
            outcome = b""
        if outcome == TAKEN:
            log.info("the new process serves, the old one is about to end")
            sys.exit()
        self.control.remove()
        raise click.ClickException(outcome.decode(errors="replace") or "the new process ended before it served")

    @property
    def failed(self) -> bool:
        """Whether the waiting command has ended before the takeover. For the master."""
        # In this order: a worker that commits later than this sees it too.
        return self._is_abandoned() and self._stage[0] == WAITING

    @property
    def done(self) -> bool:
        """Whether it has taken over."""
        return self._stage[0] == DONE

    def fail(self, cause: str) -> NoReturn:
        """Send the cause to the waiting command, and end this master."""
        with suppress(OSError):  # the command has ended
            self._there.send(cause.encode()[:4096])
        sys.exit(1)

    def take_over(
        self, master: int, watchdog: float | None, tell_manager: Callable[[bytes], None]
    ) -> "Predecessor | None":
        """Have the incumbent retire, and take over; called by the worker before it accepts anything.

        Return the incumbent, for requests of its sessions; None if its release accepts none.

        `master` is the process id of this worker's master. `watchdog` is how many seconds systemd waits for a
        heartbeat: 0 for ever, None as before. `tell_manager` sends systemd a state (sd_notify(3)), or raises OSError.

        Raises:
            click.ClickException: it cannot take over; the incumbent keeps serving.
        """
        self._stage[0] = COMMITTED
        if self._is_abandoned() or not self.control.waits or os.getppid() != master:
            raise click.ClickException("the command that started the new process has ended")
        state = b"MAINPID=%d\nREADY=1" % master
        if watchdog is not None:
            # Otherwise systemd keeps the value that the unit had when the service was started.
            state += b"\nWATCHDOG_USEC=%d" % round(watchdog * 1_000_000)
        # Before the incumbent ends, which would otherwise end the service.
        try:
            tell_manager(state)
        except OSError as error:
            raise click.ClickException(f"cannot notify systemd of the new process: {error.strerror}") from None
        try:
            answer = ask(self.control.path, "POST", "/retire", seconds=RETIRE_SECONDS)
        except click.ClickException:
            with suppress(OSError):
                tell_manager(b"MAINPID=%d" % self._incumbent)
            raise
        self._stage[0] = DONE
        try:
            self.control.move_in()
            self._there.send(TAKEN)
        except OSError:  # too late to go back, and serving users matters more
            log.exception("cannot finish taking over")
        return Predecessor(answer["relay"]) if "relay" in answer else None

    def _is_abandoned(self) -> bool:
        try:
            return not self._there.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False


class Predecessor:
    """A replaced process; `name` is the abstract Unix socket on which it answers its sessions' requests until it ends.

    A polling client uses any free connection for a request, and new connections reach the successor. If the successor
    rejected the request, the session would end with an acknowledgement under way, and the event would be handled twice.
    """

    def __init__(self, name: str) -> None:
        self._address = f"\0{name}"

    def ask(
        self, environ: "WSGIEnvironment", body: bytes, seconds: float
    ) -> tuple[str, list[tuple[str, str]], bytes] | None:
        """Return status, headers and body of its answer to a request; None if it has ended or has no such session.

        `seconds` bounds each wait for the answer.
        """
        headers = {
            name.removeprefix("HTTP_").replace("_", "-"): value
            for name, value in environ.items()
            if name.startswith("HTTP_") and name not in HOP_BY_HOP
        }
        headers |= {"CONTENT-LENGTH": str(len(body)), "CONNECTION": "close"}
        if content_type := environ.get("CONTENT_TYPE"):
            headers["CONTENT-TYPE"] = content_type
        connection = _Relay(self._address, seconds)
        try:
            connection.request(environ["REQUEST_METHOD"], environ["RAW_URI"], body, headers)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, HTTPException):
            return None
        finally:
            connection.close()
        if answer.getheader(ELSEWHERE_HEADER):
            return None
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in OWN_TO_AN_ANSWER]
        return f"{answer.status} {answer.reason}", kept, content


class _Relay(HTTPConnection):
    def __init__(self, address: str, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self._address = address

    def connect(self) -> None:
        # The module's current class: the worker class may have patched it after this module's import.
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._address)


def _ask_for_listener(path: Path) -> tuple[socket.socket, int]:
    """Return the listening socket of the node that serves `path`, and its master's process id."""
    answer = ask(path, "GET", "/listener")
    try:
        return socket.socket(fileno=answer["listener"]), answer["process"]
    except KeyError as missing:
        raise click.ClickException(f"the node that serves {path} does not support --replace: no {missing}") from None
