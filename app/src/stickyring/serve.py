"""`stickyring serve`: one node process, which is gunicorn's master with one worker around the deployed application."""

import importlib
import logging
import mmap
import os
import re
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import gunicorn.util
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.errors import AppImportError, HaltServer
from gunicorn.sock import TCP6Socket, TCPSocket
from gunicorn.workers.base import Worker

from stickyring import logs
from stickyring.control_socket import ControlSocket
from stickyring.takeover import Incumbent, Successor

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from stickyring.drain import Drain

log = logging.getLogger(__name__)

ECHO_SERVICE = "stickyring.echo:create_application()"
KEEPALIVE_SECONDS = 75
"""Longer than the edge keeps an idle connection: when only the edge closes one, no request meets it closing."""
GRACEFUL_SECONDS = 3
"""Requests end in milliseconds; a poll or a WebSocket does not end by itself, and waiting longer helps neither."""
HUNG_SECONDS = 30
LARGEST_FIELD = 65536
MOST_FIELDS = 200
LISTENING, DRAINED = b"l", b"d"
TICK_SECONDS = 0.1
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
BACKLOG = 2048
"""Clients of a node that comes back connect at once; those beyond it would wait for TCP's next try, a second."""
SPARE_DESCRIPTORS = 64
"""What a node needs beside its connections: listener, logs, epoll, scrapes and health checks."""


@dataclass(frozen=True)
class Settings:
    """What the flags and the environment ask for."""

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


class AddressType(click.ParamType[tuple[str, int]]):
    """`address:port`; an IPv6 address stands in brackets. Becomes (address, port)."""

    name = "address:port"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Split and check the value; a name in place of the address is resolved when it is bound."""
        found = re.fullmatch(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<host>[^\s:\[\]]+)):(?P<port>[0-9]{1,5})", value)
        if not found or int(found["port"]) > 65535:
            self.fail(f"{value!r} is not address:port, for example 127.0.0.1:8001 or [::1]:8001", param, ctx)
        return found["v6"] or found["host"], int(found["port"])


class NodeNameType(click.ParamType[str]):
    """A name that can stand in a log line, a metric's label, a header and an endpoint's metadata."""

    name = "name"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the value."""
        if not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?", value):
            self.fail(f"{value!r} may hold letters, digits, dots, dashes and underscores only", param, ctx)
        return value


def default_node_name() -> str:
    """Return `<short host name>-<instance>`, the name under which the edge knows this node."""
    return f"{socket.gethostname().split('.')[0]}-{os.environ.get('STICKYRING_INSTANCE') or 1}"


@click.command()
@click.argument("application", default=ECHO_SERVICE)
@click.option(
    "--listen",
    "address",
    type=AddressType(),
    default="127.0.0.1:8001",
    show_default=True,
    envvar="STICKYRING_LISTEN",
    show_envvar=True,
    help="Where to accept connections.",
)
@click.option(
    "--node-name",
    type=NodeNameType(),
    default=default_node_name,
    show_default="<short host name>-<STICKYRING_INSTANCE or 1>",
    envvar="STICKYRING_NODE_NAME",
    show_envvar=True,
    help="The endpoint's name at the edge.",
)
@click.option(
    "--worker-class",
    default="stickyring.worker.EventletWorker",
    show_default=True,
    envvar="STICKYRING_WORKER_CLASS",
    show_envvar=True,
    help="Any gunicorn worker class.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    default=10000,
    show_default=True,
    envvar="STICKYRING_MAX_CONNECTIONS",
    show_envvar=True,
    help="Socket.IO connections above which new ones get 503.",
)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    default=30,
    show_default=True,
    envvar="STICKYRING_DRAIN_TIMEOUT",
    show_envvar=True,
    help="Seconds that SIGTERM gives users to go elsewhere before the process ends; 0 ends it at once.",
)
@click.option(
    "--control",
    "control_path",
    type=click.Path(path_type=Path),
    envvar="STICKYRING_CONTROL",
    show_envvar=True,
    help="Unix socket for `stickyring sessions`, `rebalance`, `drain` and `undrain`; none without it.",
)
@click.option(
    "--edges",
    "edges_path",
    type=click.Path(path_type=Path),
    envvar="STICKYRING_EDGES",
    show_envvar=True,
    help="File with the IP addresses of the edges, one a line, read again while the node serves: who is believed about "
    "scheme and address of a client. [default: loopback]",
)
@click.option(
    "--replace",
    is_flag=True,
    help="Take the place of the process that serves --control, on its listening socket.",
)
@click.option(
    "--watchdog",
    type=click.FloatRange(min=0),
    envvar="STICKYRING_WATCHDOG",
    show_envvar=True,
    help="With --replace, the unit's WatchdogSec in seconds, 0 for none: systemd itself heeds it only at a start.",
)
@click.option(
    "--log-level",
    type=click.Choice(logs.LEVELS),
    default="info",
    show_default=True,
    envvar="STICKYRING_LOG_LEVEL",
    show_envvar=True,
    help="What to log on standard error, as JSON lines.",
)
def serve(
    *,
    application: str,
    address: tuple[str, int],
    node_name: str,
    worker_class: str,
    max_connections: int,
    drain_timeout: float,
    control_path: Path | None,
    edges_path: Path | None,
    replace: bool,
    watchdog: float | None,
    log_level: str,
) -> None:
    """Serve APPLICATION as one node of a sticky Socket.IO deployment.

    APPLICATION is `module:attribute` or `module:factory()`, a WSGI application; without it the echo service is served.
    A python-socketio application is a `socketio.WSGIApp` with async_mode='eventlet'. /healthz, /readyz and /metrics are
    answered for it.

    SIGTERM drains the node first: it takes nobody in, asks everybody to reconnect elsewhere, and ends when they have
    left. A second signal, or SIGINT or SIGQUIT, ends it at once.

    With --replace, a new process of whatever release and settings loads the application while the one that serves the
    control socket goes on; then it takes over the listening socket, and the other one drains and ends. Nobody is
    refused, and each user reconnects once. The command ends when the new process serves; if it cannot, with the cause,
    and nothing has changed. It keeps the address.

    \b
    Examples:
      stickyring serve
      stickyring serve --listen 0.0.0.0:8001 --node-name node1-1
      stickyring serve --control /run/stickyring-node/1/control.sock
      stickyring serve --control /run/stickyring-node/1/control.sock --replace
      stickyring serve chat.server:application --max-connections 20000
      STICKYRING_LISTEN='[::1]:8001' stickyring serve 'chat.server:create(debug=False)'
    """
    settings = Settings(
        application,
        address,
        node_name,
        worker_class,
        max_connections,
        drain_timeout,
        control_path,
        edges_path,
        watchdog,
        log_level,
    )
    logs.configure(log_level, node_name)
    # The application runs in the worker, a child of this process.
    os.environ["STICKYRING_NODE_NAME"] = node_name
    # As gunicorn does: an application beside the working directory can be imported.
    sys.path.insert(0, str(Path.cwd()))
    found_class = _worker_class(worker_class)
    if replace:
        if control_path is None:
            raise click.UsageError("--replace needs --control: the control socket of the process to replace")
        successor = Successor(control_path, lambda listener: _check_address(listener, address))
        successor.fork()
        Node(settings, found_class, successor.listener, successor.control, successor).run()
    else:
        listener = _listen(address)
        control = None if control_path is None else ControlSocket(control_path)
        Node(settings, found_class, listener, control).run()


class Node(BaseApplication):
    """gunicorn, set up from `Settings` instead of from its own command line."""

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
        self._address = _address_text(listener.getsockname()[:2])
        self.listener = listener
        self._refusal_reader, self._refusal_writer = os.pipe()
        os.set_blocking(self._refusal_reader, False)
        # Taken away from gunicorn, whose master would say that it is ready before its worker is.
        self._manager_address = re.sub("^@", "\0", os.environ.pop("NOTIFY_SOCKET", ""))
        # Opened now: a worker that has no descriptor left has to be able to say that it lives.
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.setblocking(False)
        # By this the master tells its worker to drain, and hears when that is done.
        self._drain_here, self._drain_there = socket.socketpair()
        self._retired = mmap.mmap(-1, 1)
        super().__init__()

    def load_config(self) -> None:
        """Set what differs from gunicorn's defaults."""
        for name, value in {
            "bind": self._address,  # told only: the master is given the socket
            "workers": 1,  # the sessions of Socket.IO live in one process
            "worker_class": self._worker_class,
            "worker_connections": 1_000_000,  # no cap: at its limit connections hang, those of health checks too
            "keepalive": KEEPALIVE_SECONDS,
            # Above what an edge lets through, which is 32 KiB and 100 fields; it adds a few.
            "limit_request_line": 0,
            "limit_request_field_size": LARGEST_FIELD,
            "limit_request_fields": MOST_FIELDS,
            "forwarded_allow_ips": "",  # stickyring.forwarded knows whom to believe
            "graceful_timeout": GRACEFUL_SECONDS,
            # For a worker that hangs. systemd's watchdog waits as long as the unit says; and with 0 here every class
            # beats twice a second.
            "timeout": 0 if self._manager_address else HUNG_SECONDS,
            "preload_app": False,  # the worker class patches the standard library before the application is imported
            "control_socket_disable": True,
            "backlog": BACKLOG,
            "logger_class": logs.GunicornLogger,
            "loglevel": self._settings.log_level,
            "errorlog": None,  # no handler of gunicorn's own
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
            # The worker, a fork of this process, leaves through here as well.
            if os.getpid() == master:
                if refusal := self._refusal():
                    if self.successor is not None:
                        self.successor.fail(refusal)
                    raise click.ClickException(refusal) from None
                log.info("stopped")
            raise
        finally:
            if self._control is not None and os.getpid() == master:
                self._control.remove()

    def load(self) -> "WSGIApplication":
        """Import the application, in the worker; one that cannot be had ends the master."""
        # Imported here, because python-socketio and the metrics' locks have to see the standard library as the worker
        # class has patched it.
        from stickyring.control import Control, ControlServer  # noqa: PLC0415
        from stickyring.forwarded import Edges  # noqa: PLC0415
        from stickyring.runtime import Runtime  # noqa: PLC0415

        try:
            application = gunicorn.util.import_app(self._settings.application)
        except (Exception, SystemExit) as error:
            log.debug("the application cannot be loaded", exc_info=True)
            self._refuse(f"cannot load {self._settings.application}: {_describe(error)}")
        name = self._settings.node_name
        edges = Edges(self._settings.edges)
        limit = self._settings.max_connections
        self._runtime = runtime = Runtime(application, node_name=name, max_connections=limit, edges=edges)
        # Only ours has it: other worker classes let connections wait.
        worker = self._worker
        runtime.heed(lambda: getattr(worker, "exhausted", False))
        incumbent = Incumbent(worker, runtime.drain, self._retired)
        if self._control is not None:
            control = Control(name, runtime.sessions, runtime.move_metrics, runtime.drain, incumbent)
            server = ControlServer(self._control.listener, control)
            threading.Thread(target=server.run, daemon=True).start()
        threading.Thread(target=self._drain_when_told, args=(runtime.drain,), daemon=True).start()
        return runtime

    def _drain_when_told(self, drain: "Drain") -> None:
        # Made anew by descriptor, as the worker class has patched sockets or not.
        told = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=os.dup(self._drain_there.fileno()))
        told.send(LISTENING)
        told.recv(1)
        drain.begin(self._settings.drain_timeout, final=True)
        drain.wait(self._settings.drain_timeout)
        told.send(DRAINED)

    def drain(self, goes_on: Callable[[], bool]) -> None:
        """Have the worker drain, in the master; return when it has, and as soon as `goes_on` says no.

        A worker that has no application yet has no users either, and is not waited for.
        """
        if not self._settings.drain_timeout or LISTENING not in self._heard(0):
            return
        self._drain_here.send(b"drain")
        deadline = time.monotonic() + self._settings.drain_timeout
        while goes_on() and time.monotonic() < deadline:
            if DRAINED in self._heard(TICK_SECONDS):
                return

    @property
    def retired(self) -> bool:
        """Whether another process has taken the place of this one, as master and worker know."""
        return bool(self._retired[0])

    def _heard(self, seconds: float) -> bytes:
        """What the worker has told, within that time."""
        return self._drain_here.recv(64) if select.select([self._drain_here], [], [], seconds)[0] else b""

    def _refuse(self, cause: str) -> NoReturn:
        """Hand the cause to the master, end it, and end this worker."""
        os.write(self._refusal_writer, cause.encode()[:4096])
        if os.getppid() == self._worker.ppid:  # and not whoever has inherited this one
            os.kill(self._worker.ppid, signal.SIGTERM)
        sys.exit()

    def _refusal(self) -> str:
        try:
            return os.read(self._refusal_reader, 4096).decode(errors="replace")
        except BlockingIOError:
            return ""

    def _begin_with(self, master: Arbiter, worker: Worker) -> None:
        self._worker = worker
        self._heard(0)  # what the worker before has told is no longer true

    def _begin_to_serve(self, worker: Worker) -> None:
        if self.successor is None or self.successor.done:
            self._mention(b"READY=1")
        else:
            try:
                predecessor = self.successor.take_over(worker.ppid, self._settings.watchdog, self._tell_manager)
                self._runtime.succeed(predecessor)
            except click.ClickException as error:
                self._refuse(error.message)
        if self._manager_address:
            beat = worker.notify

            # A worker that is stuck beats no more, whatever its master does; and one that was replaced must not hide
            # that its successor is stuck.
            def beat_aloud() -> None:
                beat()
                if not self.retired:
                    self._mention(b"WATCHDOG=1")

            worker.notify = beat_aloud
        log.info(
            "serving %s on %s",
            self._settings.application,
            self._address,
            extra={"address": self._address, "worker_class": self._settings.worker_class},
        )

    def _mention(self, state: bytes) -> None:
        """Tell systemd; one that is busy hears the next beat."""
        try:
            self._tell_manager(state)
        except OSError:
            log.debug("systemd does not take %r", state, exc_info=True)

    def _tell_manager(self, state: bytes) -> None:
        """Tell systemd, if that runs this process, as sd_notify(3) has it.

        Raises:
            OSError: systemd is busy, for example.
        """
        if self._manager_address:
            self._manager.sendto(state, self._manager_address)


class _Master(Arbiter):
    """gunicorn's master, which lets its worker drain before it stops it gracefully."""

    def start(self) -> None:
        """Take the listening socket over with its family, of which gunicorn would tell PyPy a wrong one."""
        listener: socket.socket = self.app.listener
        kind = TCP6Socket if listener.family == socket.AF_INET6 else TCPSocket
        name = listener.getsockname()
        self.LISTENERS = [kind(name, self.cfg, self.log, fd=listener.detach())]
        super().start()

    def manage_workers(self) -> None:
        """Keep a worker; but a successor that cannot take over any more ends, and so does who has been replaced."""
        if self.app.retired and not self.WORKERS:
            raise HaltServer("the worker has ended after it was replaced", 0)
        if (successor := self.app.successor) is not None and not successor.done:
            if successor.failed:
                raise HaltServer("nobody waits for the new process any more", 1)
            if self.worker_age and not self.WORKERS:
                raise HaltServer("the new process's worker has ended before it served", 1)
        super().manage_workers()

    def stop(self, graceful: bool = True) -> None:
        """Stop the worker; at once, if a signal comes while it drains."""
        if self.app.retired:
            # Held on to, it would keep connections waiting should the one that accepts end first.
            while self.LISTENERS:
                self.LISTENERS.pop().close()
        if graceful:
            self.app.drain(self._is_served)
            graceful = not self._told_again
        super().stop(graceful)

    _told_again = False

    def _is_served(self) -> bool:
        """Whether there is a worker to wait for, and no further signal."""
        try:
            self.reap_workers()
        except HaltServer:  # the worker has ended with an error, which is an end all the same
            return False
        while not self.SIG_QUEUE.empty():
            self._told_again |= self.SIG_QUEUE.get_nowait() in ENDING_SIGNALS
        return bool(self.WORKERS) and not self._told_again


def _worker_class(path: str) -> type[Worker]:
    try:
        found = gunicorn.util.load_class(path)
    except (RuntimeError, ImportError, AttributeError, ValueError) as error:
        # gunicorn's message holds a whole traceback, its context is the plain cause.
        raise click.ClickException(f"no worker class {path}: {_one_line(error.__context__ or error)}") from None
    if not (isinstance(found, type) and issubclass(found, Worker)):
        raise click.ClickException(f"no worker class {path}: it is not derived from gunicorn.workers.base.Worker")
    return found


def _listen(address: tuple[str, int]) -> socket.socket:
    """Bind and listen here, where a failure is one line: gunicorn would try five times and log each."""
    family, kind, protocol, where = _resolve(address)
    try:
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        # Only a listening socket keeps a second process from taking the same address.
        listener.listen(BACKLOG)
    except OSError as error:
        raise _cannot_listen(address, error) from None
    return listener


def _check_address(listener: socket.socket, address: tuple[str, int]) -> None:
    """Refuse to take over the listening socket of another address than the one that is asked for."""
    host, port, *_ = _resolve(address)[3]
    serving_host, serving_port, *_ = listener.getsockname()
    if host != serving_host or port not in {0, serving_port}:
        raise click.ClickException(
            f"the node listens on {_address_text((serving_host, serving_port))} and not on {_address_text(address)}: "
            "an address cannot be taken over, restart the node"
        )


def _resolve(address: tuple[str, int]) -> tuple[socket.AddressFamily, socket.SocketKind, int, tuple[Any, ...]]:
    """Return family, kind, protocol and address of the first socket address that the name has."""
    host, port = address
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # the latter from a host name that no resolver can take
        raise _cannot_listen(address, error) from None
    family, kind, protocol, _, where = found[0]
    return family, kind, protocol, where


def _cannot_listen(address: tuple[str, int], error: Exception) -> click.ClickException:
    return click.ClickException(
        f"cannot listen on {_address_text(address)}: {getattr(error, 'strerror', None) or error}"
    )


def _address_text(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _raise_descriptor_limit(max_connections: int) -> None:
    """Raise the soft limit as far as the hard one allows, and say so when the cap cannot be reached."""
    needed = max_connections + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        log.warning(
            "%d file descriptors are allowed, too few for %d connections: raise LimitNOFILE or lower --max-connections",
            hard,
            max_connections,
        )


def _describe(error: BaseException) -> str:
    """Return the error in one line, with the place in the application's own code where it was raised."""
    if isinstance(error, AppImportError):
        return str(error)
    loaders = (__file__, gunicorn.util.__file__, importlib.__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in loaders and not frame.filename.startswith("<frozen")
    ]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{_one_line(error)}{place}"


def _one_line(error: BaseException) -> str:
    return " ".join("".join(traceback.format_exception_only(error)).split())
