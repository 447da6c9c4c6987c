"""A node's process: gunicorn's master, with one worker around the deployed application."""

import logging
import mmap
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click
import gunicorn.util
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer
from gunicorn.sock import TCP6Socket, TCPSocket
from gunicorn.workers.base import Worker

from stickyring.node import logs
from stickyring.node.control_socket import ControlSocket
from stickyring.node.listener import BACKLOG, address_text
from stickyring.node.logs import one_line
from stickyring.node.notify import Manager
from stickyring.node.takeover import Incumbent, Successor

if TYPE_CHECKING:
    from stickyring.node.asgi.runtime import AsyncRuntime
    from stickyring.node.drain import Drain
    from stickyring.node.limits import Limits
    from stickyring.node.runtime import Runtime

log = logging.getLogger(__name__)

KEEPALIVE_SECONDS = 75
"""Longer than the edge keeps an idle connection: only the edge closes one, so no request hits a closing connection."""
GRACEFUL_SECONDS = 3
"""Requests end in milliseconds. Polls and WebSockets do not end by themselves, so waiting longer does not help."""
HUNG_SECONDS = 30
LARGEST_FIELD = 65536
MOST_FIELDS = 200
WORKER_CLASSES = {"eventlet": "stickyring.node.worker.EventletWorker", "asgi": "stickyring.node.asgi.worker.AsgiWorker"}
LISTENING, DRAINED = b"l", b"d"
CHECKED = "checked"
"""In place of a cause: the application can be served."""
TICK_SECONDS = 0.1
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
SPARE_DESCRIPTORS = 64
"""File descriptors beside those of connections: listener, logs, epoll, scrapes and health checks."""


@dataclass(frozen=True)
class Settings:
    """The settings from flags and environment; `drain_timeout` and `watchdog` in seconds."""

    application: str
    address: tuple[str, int]
    node_name: str
    worker_class: str
    max_connections: int
    drain_timeout: float
    control: Path | None
    edges: Path | None
    watchdog: float | None
    log_level: str
    limits: "Limits"
    check: bool = False


class Node(BaseApplication):
    """gunicorn, configured from `Settings` instead of its own command line."""

    def __init__(
        self,
        settings: Settings,
        worker_class: type[Worker],
        listener: socket.socket,
        control: ControlSocket | None,
        successor: Successor | None = None,
    ) -> None:
        self.successor = successor
        self._settings = settings
        self._control = control
        self._worker_class = worker_class
        self._address = address_text(listener.getsockname()[:2])
        self.listener = listener
        self._refusal_reader, self._refusal_writer = os.pipe()
        os.set_blocking(self._refusal_reader, False)
        self._manager = Manager()
        # Over these, the master tells its worker to drain, and the worker reports when it is done.
        self._drain_here, self._drain_there = socket.socketpair()
        self._retired = mmap.mmap(-1, 1)
        super().__init__()

    def load_config(self) -> None:
        """Set the settings that differ from gunicorn's defaults."""
        for name, value in {
            "bind": self._address,  # for information: the master gets the socket itself
            "workers": 1,  # Socket.IO sessions live in one process
            "worker_class": self._worker_class,
            "worker_connections": 1_000_000,  # no cap: at the limit, connections hang, including health checks
            "keepalive": KEEPALIVE_SECONDS,
            # More than the edge's own limits, 32 KiB and 100 fields, since it adds a few headers.
            "limit_request_line": 0,
            "limit_request_field_size": LARGEST_FIELD,
            "limit_request_fields": MOST_FIELDS,
            "forwarded_allow_ips": "",  # stickyring.node.forwarded decides whom to trust
            "graceful_timeout": GRACEFUL_SECONDS,
            # For a worker that hangs. Under systemd, the unit's watchdog does this; with 0 here, every worker class
            # sends a heartbeat twice a second.
            "timeout": 0 if self._manager else HUNG_SECONDS,
            "preload_app": False,  # the worker class patches the standard library before the application is imported
            "control_socket_disable": True,
            "backlog": BACKLOG,
            "logger_class": logs.GunicornLogger,
            "loglevel": self._settings.log_level,
            "errorlog": None,  # gunicorn adds no handler of its own
            "pre_fork": self._begin_with,
            "post_worker_init": self._begin_to_serve,
        }.items():
            self.cfg.set(name, value)

    def run(self) -> None:
        """Serve until a signal ends the process.

        Raises:
            click.ClickException: the worker could not load the application.
        """
        _raise_descriptor_limit(self._settings.max_connections)
        master = os.getpid()
        try:
            _Master(self).run()
        except SystemExit:
            # The worker is a fork of this process and exits through here too.
            if os.getpid() == master:
                if (refusal := self._refusal()) == CHECKED:
                    return
                if self._settings.check:
                    refusal = refusal or f"cannot load {self._settings.application}: its process ended meanwhile"
                if refusal:
                    if self.successor is not None:
                        self.successor.fail(refusal)
                    raise click.ClickException(refusal) from None
                log.info("stopped")
            raise
        finally:
            if self._control is not None and os.getpid() == master:
                self._control.remove()

    def load(self) -> "Runtime | AsyncRuntime":
        """Import the application in the worker; if that fails, end the master with the cause."""
        # Imported here, because python-socketio and the metrics' locks must see the standard library as the worker
        # class has patched it.
        from stickyring.node.application import CannotBeServedError, load  # noqa: PLC0415
        from stickyring.node.control import Control, ControlServer  # noqa: PLC0415
        from stickyring.node.forwarded import Edges  # noqa: PLC0415

        path = self._settings.application
        try:
            application = load(path, self._worker_class)
        except CannotBeServedError as error:
            log.debug("the application cannot be loaded", exc_info=True)
            self.refuse(str(error))
        name = self._settings.node_name
        edges = Edges(self._settings.edges)
        limit = self._settings.max_connections
        make = self._runtime_class()
        self._runtime = runtime = make(
            application, node_name=name, max_connections=limit, edges=edges, limits=self._settings.limits
        )
        # Only our worker classes have these: others let connections wait.
        worker = self._worker
        runtime.heed(lambda: getattr(worker, "exhausted", False), lambda: getattr(worker, "refused", 0))
        incumbent = Incumbent(worker, runtime.drain, self._retired)
        if self._control is not None:
            control = Control(
                name, runtime.sessions, runtime.move_metrics, runtime.drain, incumbent, is_kept=runtime.is_kept
            )
            server = ControlServer(self._control.listener, control)
            threading.Thread(target=server.run, daemon=True).start()
        self.draining = threading.Thread(target=self._drain_when_told, args=(runtime.drain,), daemon=True)
        self.draining.start()
        return runtime

    def _runtime_class(self) -> "type[Runtime] | type[AsyncRuntime]":
        # Imported here for the reason given in load().
        if getattr(self._worker_class, "asgi", False):
            from stickyring.node.asgi.runtime import AsyncRuntime  # noqa: PLC0415

            return AsyncRuntime
        from stickyring.node.runtime import Runtime  # noqa: PLC0415

        return Runtime

    def _drain_when_told(self, drain: "Drain") -> None:
        # A new object for the same descriptor, because the worker class may have patched sockets.
        told = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=os.dup(self._drain_there.fileno()))
        told.send(LISTENING)
        told.recv(1)
        drain.begin(self._settings.drain_timeout, final=True)
        drain.wait(self._settings.drain_timeout)
        told.send(DRAINED)

    def drain(self, goes_on: Callable[[], bool]) -> None:
        """In the master: have the worker drain. Return when it has, at its deadline, or once `goes_on()` is false.

        A worker that has not loaded its application has no users, so it need not drain.
        """
        if not self._settings.drain_timeout or LISTENING not in self._heard(0):
            return
        self._drain_here.send(b"drain")
        deadline = time.monotonic() + self._settings.drain_timeout
        while goes_on() and time.monotonic() < deadline:
            if DRAINED in self._heard(TICK_SECONDS):
                return

    @property
    def checks(self) -> bool:
        """Whether it only tries to load the application."""
        return self._settings.check

    @property
    def retired(self) -> bool:
        """Whether another process has replaced this one; shared by master and worker."""
        return bool(self._retired[0])

    def _heard(self, seconds: float) -> bytes:
        """Return what the worker has sent, waiting for at most that time."""
        return self._drain_here.recv(64) if select.select([self._drain_here], [], [], seconds)[0] else b""

    def refuse(self, cause: str) -> NoReturn:
        """In the worker: end the node, because the application cannot be served."""
        self._refuse(f"cannot load {self._settings.application}: {cause}")

    def _refuse(self, cause: str) -> NoReturn:
        """Send the cause (or CHECKED) to the master, end the master, and end this worker."""
        os.write(self._refusal_writer, cause.encode()[:4096])
        if os.getppid() == self._worker.ppid:  # not a process that adopted this worker
            os.kill(self._worker.ppid, signal.SIGTERM)
        # Does not wait for threads that the application has started.
        sys.stdout.flush()
        os._exit(0)

    def _refusal(self) -> str:
        try:
            return os.read(self._refusal_reader, 4096).decode(errors="replace")
        except BlockingIOError:
            return ""

    def _begin_with(self, master: Arbiter, worker: Worker) -> None:
        self._worker = worker
        self._heard(0)  # discard what the previous worker sent

    def _begin_to_serve(self, worker: Worker) -> None:
        if self._settings.check:
            self._try_once(worker)
        if self.successor is None or self.successor.done:
            self._manager.mention(b"READY=1")
        else:
            try:
                predecessor = self.successor.take_over(worker.ppid, self._settings.watchdog, self._manager.tell)
                self._runtime.succeed(predecessor)
            except click.ClickException as error:
                self._refuse(error.message)
        if self._manager:
            beat = worker.notify

            # The worker itself sends the watchdog's heartbeat, so a hung worker is detected. A replaced worker sends
            # none: it must not hide that its successor hangs.
            def beat_aloud() -> None:
                beat()
                if not self.retired:
                    self._manager.mention(b"WATCHDOG=1")

            worker.notify = beat_aloud
        log.info(
            "serving %s on %s",
            self._settings.application,
            self._address,
            extra={"address": self._address, "worker_class": self._settings.worker_class},
        )

    def _try_once(self, worker: Worker) -> NoReturn:
        from stickyring.node.application import CannotBeServedError  # noqa: PLC0415

        try:
            state = worker.lifespan.state if getattr(worker, "asgi", False) else {}
            tried = self._runtime.try_once(self._settings.application, state)
            if tried is not None:
                worker.loop.run_until_complete(tried)
        except CannotBeServedError as error:
            self.refuse(str(error))
        self._refuse(CHECKED)


class _Master(Arbiter):
    """gunicorn's master, which drains its worker before it stops it."""

    def start(self) -> None:
        """Use the listening socket with its own family: on PyPy, gunicorn would detect a wrong one."""
        listener: socket.socket = self.app.listener
        kind = TCP6Socket if listener.family == socket.AF_INET6 else TCPSocket
        name = listener.getsockname()
        self.LISTENERS = [kind(name, self.cfg, self.log, fd=listener.detach())]
        super().start()

    def manage_workers(self) -> None:
        """Keep one worker running, except in a replaced process and in a successor that can no longer take over."""
        if self.app.retired and not self.WORKERS:
            raise HaltServer("the worker has ended after it was replaced", 0)
        if (successor := self.app.successor) is not None and not successor.done:
            if successor.failed:
                raise HaltServer("the command that started the new process has ended", 1)
            if self.worker_age and not self.WORKERS:
                raise HaltServer("the new process's worker ended before it served", 1)
        if self.app.checks and self.worker_age and not self.WORKERS:
            raise HaltServer("the worker ended before it had loaded the application", 1)
        super().manage_workers()

    def stop(self, graceful: bool = True) -> None:
        """Drain and stop the worker; stop it at once if another signal arrives while it drains."""
        if self.app.retired:
            # An open listener would keep connections waiting if the successor ended first.
            while self.LISTENERS:
                self.LISTENERS.pop().close()
        if graceful:
            self.app.drain(self._is_served)
            graceful = not self._told_again
        super().stop(graceful)

    _told_again = False

    def _is_served(self) -> bool:
        """Whether the worker still runs and no further signal has arrived."""
        try:
            self.reap_workers()
        except HaltServer:  # the worker ended with an error
            return False
        while not self.SIG_QUEUE.empty():
            self._told_again |= self.SIG_QUEUE.get_nowait() in ENDING_SIGNALS
        return bool(self.WORKERS) and not self._told_again


def load_worker_class(path: str) -> type[Worker]:
    """Return the worker class named `path`: one of WORKER_CLASSES, or any of gunicorn's (module.Class).

    Raises:
        click.ClickException: there is no such class.
    """
    path = WORKER_CLASSES.get(path, path)
    try:
        found = gunicorn.util.load_class(path)
    except (RuntimeError, ImportError, AttributeError, ValueError) as error:
        # gunicorn's message is a whole traceback; the exception's context is the cause.
        raise click.ClickException(f"no worker class {path}: {one_line(error.__context__ or error)}") from None
    if not (isinstance(found, type) and issubclass(found, Worker)):
        raise click.ClickException(f"no worker class {path}: it is not derived from gunicorn.workers.base.Worker")
    return found


def _raise_descriptor_limit(max_connections: int) -> None:
    """Raise the soft limit for `max_connections`, and warn if the hard limit is too low for it."""
    needed = max_connections + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        log.warning(
            "the limit of %d file descriptors is too low for %d connections: raise LimitNOFILE or lower "
            "--max-connections",
            hard,
            max_connections,
        )
