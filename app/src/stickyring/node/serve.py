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
    default="stickyring.node.worker.EventletWorker",
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
    type=click.Choice(LOG_LEVELS),
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
    with needing("node", "gunicorn", "eventlet", "prometheus_client", "pythonjsonlogger"):
        from stickyring.node import logs  # noqa: PLC0415
        from stickyring.node.control_socket import ControlSocket  # noqa: PLC0415
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
    )
    logs.configure(log_level, node_name)
    # The application runs in the worker, a child of this process.
    os.environ["STICKYRING_NODE_NAME"] = node_name
    # As gunicorn does: an application beside the working directory can be imported.
    sys.path.insert(0, str(Path.cwd()))
    found_class = load_worker_class(worker_class)
    if replace:
        if control_path is None:
            raise click.UsageError("--replace needs --control: the control socket of the process to replace")
        successor = Successor(control_path, lambda listener: check_address(listener, address))
        successor.fork()
        Node(settings, found_class, successor.listener, successor.control, successor).run()
    else:
        listener = listen(address)
        control = None if control_path is None else ControlSocket(control_path)
        Node(settings, found_class, listener, control).run()
