"""One node process takes the place of another on the same listening socket: `stickyring serve --replace`.

The one that comes, the successor, asks the control socket of the one that serves, the incumbent, for its listening
socket, loads its application, and only then has the incumbent retire: accept nothing more, and drain. Connections that
arrive in between wait in the backlog of the socket, which both have. So no edge sees anything, and each user is
disconnected once, when the drain asks him to reconnect. A successor that does not get that far leaves everything as it
was.
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
"""On an answer with it, the edge tries the next node of the ring at once."""
HOP_BY_HOP = frozenset({"HTTP_CONNECTION", "HTTP_KEEP_ALIVE", "HTTP_TE", "HTTP_TRANSFER_ENCODING", "HTTP_UPGRADE"})
OWN_TO_AN_ANSWER = frozenset(
    {"connection", "content-length", "date", "server", "transfer-encoding", "x-content-type-options"}
)
RETIRE_SECONDS = 5
"""How long the incumbent may take to answer: the successor's worker waits for it, and must not be taken for hung."""


class CannotRetireError(Exception):
    """The process that serves cannot be replaced, or not now; the text says why."""


class Incumbent:
    """The process that serves, as its worker stands for it.

    Its worker class may have `retire()`, which accepts nothing more from its return on but what comes by the Unix
    socket whose name it returns (`Predecessor`), and later has the master end as by SIGTERM. Without it, the node can
    be restarted only. `retired` is a byte that its master sees too: 1 as soon as a successor is given its place.
    `Drain.final` is true only later, and before every end: once the drain has begun.
    """

    def __init__(self, worker: Worker, drain: "Drain", retired: mmap.mmap) -> None:
        self._worker = worker
        self._drain = drain
        self._retired = retired

    def hand_over(self) -> dict[str, Any]:
        """Return the answer to `GET /listener`; its `listener` is the descriptor of the listening socket.

        Raises:
            CannotRetireError: it could not retire for the one who asks.
        """
        self._check()
        return {"process": self._worker.ppid, "listener": self._worker.sockets[0].fileno()}

    def retire(self) -> dict[str, Any]:
        """Leave the listening socket to the successor, and end; return the answer to `POST /retire`.

        Raises:
            CannotRetireError: it cannot, and goes on.
        """
        self._check()
        self._retired[0] = 1
        name = self._worker.retire()
        log.info("replaced: accepting nothing more")
        return {"relay": name}

    def _check(self) -> None:
        if not hasattr(self._worker, "retire"):
            name = type(self._worker).__name__
            raise CannotRetireError(f"its worker class {name} cannot be replaced while it serves, restart it")
        if not self._worker.booted:
            raise CannotRetireError("it does not serve yet")
        if self._retired[0] or self._drain.final or not self._worker.alive:
            raise CannotRetireError("the node is about to stop")


class Successor:
    """The process that is to serve, from when it asks for the listening socket until it has taken the place.

    Made in the process that the command began; `fork` goes on in another one, whose worker calls `take_over`. `check`
    may raise click.ClickException, if the listening socket is not the one that is wanted.

    Raises:
        click.ClickException: there is nobody at the control socket `path`, or he cannot be replaced.
    """

    def __init__(self, path: Path, check: Callable[[socket.socket], None]) -> None:
        # First, because only one at a time can have it: whoever answers is replaced by nobody else meanwhile.
        self.control = ControlSocket(path, beside=True)
        try:
            self.listener, self._incumbent = _ask_for_listener(path)
            check(self.listener)
        except click.ClickException:
            self.control.remove()
            raise
        # How far it is, for master and worker.
        self._stage = mmap.mmap(-1, 1)
        self._here, self._there = socket.socketpair()

    def fork(self) -> None:
        """Return in a process that has this one for neither parent nor session; in this one, wait for its outcome.

        Raises:
            click.ClickException: in this one, the other has not taken over; the text is the cause.
            SystemExit: in this one, it has.
        """
        # By way of a third one: systemd supervises its own children only, and orphans are.
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
            log.info("the new process serves, the one before it is about to end")
            sys.exit()
        self.control.remove()
        raise click.ClickException(outcome.decode(errors="replace") or "the new process ended before it served")

    @property
    def failed(self) -> bool:
        """Whether nobody waits for it any more who could say that it has taken over. Asked by the master."""
        # In this order: once this is true, a worker that commits itself later knows it too.
        return self._is_abandoned() and self._stage[0] == WAITING

    @property
    def done(self) -> bool:
        """Whether it has taken over."""
        return self._stage[0] == DONE

    def fail(self, cause: str) -> NoReturn:
        """End this master; the process that waits says why."""
        with suppress(OSError):  # nobody waits for it
            self._there.send(cause.encode()[:4096])
        sys.exit(1)

    def take_over(
        self, master: int, watchdog: float | None, tell_manager: Callable[[bytes], None]
    ) -> "Predecessor | None":
        """Have the incumbent retire, and take its place; called by the worker, before it accepts anything.

        Return it as the one that its sessions' requests are passed on to; None if it is of a release that takes none.

        `master` is the process id of its master, `watchdog` the seconds that systemd is to wait for a beat: 0 without
        end, None as long as so far. `tell_manager` tells systemd something, as sd_notify(3) has it, or raises OSError.

        Raises:
            click.ClickException: this must not or cannot be; the incumbent serves on.
        """
        self._stage[0] = COMMITTED
        if self._is_abandoned() or not self.control.waits or os.getppid() != master:
            raise click.ClickException("nobody waits for the new process any more")
        state = b"MAINPID=%d\nREADY=1" % master
        if watchdog is not None:
            # Otherwise systemd goes on waiting as long as the unit said when the service was started.
            state += b"\nWATCHDOG_USEC=%d" % round(watchdog * 1_000_000)
        # Before the end of the incumbent, which would be the end of the service.
        try:
            tell_manager(state)
        except OSError as error:
            raise click.ClickException(f"systemd does not hear of the new process: {error.strerror}") from None
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
        except OSError:  # there is no way back, and users matter more
            log.exception("what follows from taking over has failed")
        return Predecessor(answer["relay"]) if "relay" in answer else None

    def _is_abandoned(self) -> bool:
        try:
            return not self._there.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False


class Predecessor:
    """A process that was replaced, by the Unix socket on which it answers requests of its sessions until it ends.

    A client that polls sends each request on whichever connection is free, and new connections reach the successor. To
    refuse one would end the session while an acknowledgement is under way, and its event would be handled twice.
    """

    def __init__(self, name: str) -> None:
        self._address = f"\0{name}"

    def ask(
        self, environ: "WSGIEnvironment", body: bytes, seconds: float
    ) -> tuple[str, list[tuple[str, str]], bytes] | None:
        """Return status, headers and body of its answer to a request; None if it has ended, or has no such session.

        It may be silent for so many seconds.
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
        # Of the class that the module has by now: the worker class may have patched it after this one's import.
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._address)


def _ask_for_listener(path: Path) -> tuple[socket.socket, int]:
    """Return the listening socket of the node with that control socket, and its master's process id."""
    answer = ask(path, "GET", "/listener")
    try:
        return socket.socket(fileno=answer["listener"]), answer["process"]
    except KeyError as missing:
        raise click.ClickException(f"the node that serves {path} hands nothing over: no {missing}") from None
