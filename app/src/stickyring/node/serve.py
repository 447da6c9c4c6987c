"""`stickyring serve`: one node process around the deployed application."""

import os
import re
import socket
import sys
from pathlib import Path

import click

from stickyring.cli import needing

ECHO_SERVICE = "stickyring.echo:create_application()"
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


class AddressType(click.ParamType[tuple[str, int]]):
    """`address:port`, an IPv6 address in brackets; converted to (address, port)."""

    name = "address:port"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Split and check the value; a host name is resolved when it is bound."""
        found = re.fullmatch(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<host>[^\s:\[\]]+)):(?P<port>[0-9]{1,5})", value)
        if not found or int(found["port"]) > 65535:
            self.fail(f"{value!r} is not address:port, for example 127.0.0.1:8001 or [::1]:8001", param, ctx)
        return found["v6"] or found["host"], int(found["port"])


class NodeNameType(click.ParamType[str]):
    """A name that is valid in a log line, a metric's label, a header and an endpoint's metadata."""

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
    default="eventlet",
    show_default=True,
    envvar="STICKYRING_WORKER_CLASS",
    show_envvar=True,
    help="eventlet for WSGI applications, asgi for ASGI applications, or any worker class of gunicorn.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    default=10000,
    show_default=True,
    envvar="STICKYRING_MAX_CONNECTIONS",
    show_envvar=True,
    help="Most Socket.IO connections; further ones get 503.",
)
@click.option(
    "--messages-per-second",
    type=click.FloatRange(min=0),
    default=0,
    show_default=True,
    envvar="STICKYRING_MESSAGES_PER_SECOND",
    show_envvar=True,
    help="Most messages of one session on average, ten times as many at once; further ones end it. 0 for any number.",
)
@click.option(
    "--bytes-per-second",
    type=click.FloatRange(min=0),
    default=0,
    show_default=True,
    envvar="STICKYRING_BYTES_PER_SECOND",
    show_envvar=True,
    help="The same for the bytes that it sends.",
)
@click.option(
    "--sessions-per-address",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    envvar="STICKYRING_SESSIONS_PER_ADDRESS",
    show_envvar=True,
    help="Most sessions of one client address, or IPv6 /64; further handshakes get 429. 0 for any number.",
)
@click.option(
    "--enforce-limits/--count-limits",
    default=True,
    show_default=True,
    envvar="STICKYRING_ENFORCE_LIMITS",
    show_envvar=True,
    help="Whether sessions above these three limits are ended or refused, or only counted and logged.",
)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    default=30,
    show_default=True,
    envvar="STICKYRING_DRAIN_TIMEOUT",
    show_envvar=True,
    help="Seconds that users get to reconnect elsewhere after SIGTERM; 0 ends the process at once.",
)
@click.option(
    "--control",
    "control_path",
    type=click.Path(path_type=Path),
    envvar="STICKYRING_CONTROL",
    show_envvar=True,
    help="Unix socket for `stickyring sessions`, `summary`, `rebalance`, `drain` and `undrain`. [default: none]",
)
@click.option(
    "--edges",
    "edges_path",
    type=click.Path(path_type=Path),
    envvar="STICKYRING_EDGES",
    show_envvar=True,
    help="File with the IP addresses of the edges, one per line, read again while the node serves. The node trusts "
    "only these about a client's scheme and address, and when they ask for users to reconnect. [default: loopback]",
)
@click.option(
    "--replace",
    is_flag=True,
    help="Replace the process that serves --control, and take over its listening socket.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Only load APPLICATION as a worker does, let it answer a request and a handshake, "
    "then end; --listen is not used.",
)
@click.option(
    "--watchdog",
    type=click.FloatRange(min=0),
    envvar="STICKYRING_WATCHDOG",
    show_envvar=True,
    help="With --replace, the unit's WatchdogSec in seconds, 0 for none: systemd itself applies it only at a start.",
)
@click.option(
    "--log-level",
    type=click.Choice(LOG_LEVELS),
    default="info",
    show_default=True,
    envvar="STICKYRING_LOG_LEVEL",
    show_envvar=True,
    help="Least severe level to log, as JSON lines on standard error.",
)
def serve(
    *,
    application: str,
    address: tuple[str, int],
    node_name: str,
    worker_class: str,
    max_connections: int,
    messages_per_second: float,
    bytes_per_second: float,
    sessions_per_address: int,
    enforce_limits: bool,
    drain_timeout: float,
    control_path: Path | None,
    edges_path: Path | None,
    replace: bool,
    check: bool,
    watchdog: float | None,
    log_level: str,
) -> None:
    """Serve APPLICATION as one instance of a sticky Socket.IO deployment.

    APPLICATION is a WSGI application, or with --worker-class asgi an ASGI application, as `module:attribute` or
    `module:factory()`; the default is the echo service. Its Socket.IO servers may be anywhere in it: a
    `socketio.WSGIApp` or `ASGIApp`, Flask-SocketIO, one mounted in FastAPI or behind a middleware. In WSGI,
    leave out their async_mode; in ASGI, it is 'asgi'. The node answers /healthz, /readyz and /metrics itself.

    SIGTERM drains the node: it refuses new users, asks all users to reconnect, and ends when they have left. A second
    signal, SIGINT or SIGQUIT ends it at once.

    With --replace, a new process loads the application while the old one keeps serving. Then it takes over the
    listening socket, and the old process drains and ends. No connection is refused, and each user reconnects once. The
    release and the settings may differ, but not the address. The command returns when the new process serves. If that
    fails, it reports the cause, and the old process keeps serving.

    With --check, a worker loads the application as if to serve it, lets it answer a request for / and a Socket.IO
    handshake, and ends. It fails with the reason why the application cannot be served, or why nodes cannot use the bus.

    \b
    Examples:
      stickyring serve
      stickyring serve --listen 0.0.0.0:8001 --node-name node1-1
      stickyring serve --control /run/stickyring-node/1/control.sock
      stickyring serve --control /run/stickyring-node/1/control.sock --replace
      stickyring serve chat.server:application --max-connections 20000 --messages-per-second 100
      stickyring serve --worker-class asgi chat.main:app
      stickyring serve --check chat.server:application
      STICKYRING_LISTEN='[::1]:8001' stickyring serve 'chat.server:create(debug=False)'
    """
    with needing("node", "gunicorn", "eventlet", "prometheus_client", "pythonjsonlogger"):
        from stickyring.node import logs  # noqa: PLC0415
        from stickyring.node.control_socket import ControlSocket  # noqa: PLC0415
        from stickyring.node.limits import Limits  # noqa: PLC0415
        from stickyring.node.listener import check_address, listen  # noqa: PLC0415
        from stickyring.node.master import Node, Settings, load_worker_class  # noqa: PLC0415
        from stickyring.node.takeover import Successor  # noqa: PLC0415

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
        Limits(messages_per_second, bytes_per_second, sessions_per_address, enforce_limits),
        check,
    )
    logs.configure(log_level, node_name)
    # The application runs in the worker, a child of this process.
    os.environ["STICKYRING_NODE_NAME"] = node_name
    # Read when eventlet is imported: its own resolver takes a third of a node's start. The worker uses the system's.
    os.environ["EVENTLET_NO_GREENDNS"] = "yes"
    # As with gunicorn, an application in the working directory can be imported.
    sys.path.insert(0, str(Path.cwd()))
    found_class = load_worker_class(worker_class)
    if check:
        Node(settings, found_class, listen(("127.0.0.1", 0)), None).run()
        _check_bus()
        click.echo(f"{application} can be served.")
    elif replace:
        if control_path is None:
            raise click.UsageError("--replace needs --control: the control socket of the process to replace")
        successor = Successor(control_path, lambda listener: check_address(listener, address))
        successor.fork()
        Node(settings, found_class, successor.listener, successor.control, successor).run()
    else:
        listener = listen(address)
        control = None if control_path is None else ControlSocket(control_path)
        Node(settings, found_class, listener, control).run()


def _check_bus() -> None:
    import stickyring.bus  # noqa: PLC0415 - of an application; it takes long

    if (address := stickyring.bus.address()) is not None:
        from stickyring.bus.check import problem_with  # noqa: PLC0415 - redis is needed with a bus only

        if problem := problem_with(address):
            raise click.ClickException(problem)
