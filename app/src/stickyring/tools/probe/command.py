"""The command `stickyring probe`."""

import asyncio
import gc
import re
import resource
import sys
from pathlib import Path
from typing import TextIO

import click
from click.core import ParameterSource

from stickyring.cli import needing
from stickyring.tools.probe.arguments import TOKEN, Refused, made_ids, read_ids, read_login
from stickyring.tools.probe.settings import SESSIONS, Dialect, Manner, Parser, Shape
from stickyring.tools.probe.targets import NothingListensError, TargetError

DEFAULT_IDS = 60
MOST_SESSIONS = 200_000
# A session has one connection, or two while it polls (GET and POST); these files are for the process itself.
SPARE_FILES = 100
GARBAGE_THRESHOLD = 50_000

# Socket.IO ends a namespace with a comma, and clients take what follows `?` for a query.
NAMESPACE = re.compile(r"/[^\s,?]*")
PATH = re.compile(r"/[^\s?#]*", re.ASCII)

EPILOG = """\b
Examples:
  stickyring probe http://127.0.0.1:9002
  stickyring probe http://127.0.0.1:9002 --no-key            what fails without a user id?
  stickyring probe http://127.0.0.1:9002 --ids 500 --json result.json
  stickyring probe http://127.0.0.1:9002 --ids 200 --connections 1 \\
      --transport websocket --hold 60                        do live sessions survive a change?
  stickyring probe https://chat.example.com --i-own-this-target \\
      --path /ws/socket.io/ --key-param user --no-echo       your own application
  stickyring probe http://127.0.0.1:9002 --no-echo \\
      --namespace /chat --auth @login.json                   with a login
  stickyring probe http://127.0.0.1:9002 --http /            without Socket.IO

\b
Every user of this machine can read a command line (ps). Give secrets as @FILE, or
as @- on standard input; the probe keeps these out of its output.

\b
Exit status: 0 sticky; 1 not sticky, not proven, or login refused; 2 bad usage, or load
on the target is not allowed; 130 interrupted.
For a private certificate authority, set the environment variable SSL_CERT_FILE.
"""


@click.command(epilog=EPILOG)
@click.argument("url")
@click.option(
    "transports",
    "--transport",
    type=click.Choice([manner.value for manner in SESSIONS]),
    multiple=True,
    help="Probe only this transport; repeatable. websocket-first falls back to polling. [default: all four]",
)
@click.option("--no-upgrade", is_flag=True, help="Leave out the transport upgrade: the server allows no upgrades.")
@click.option(
    "--http",
    metavar="PATH",
    help="For an application without Socket.IO: GET this path, and take the node from the node header. A status of "
    "400 or more is a failure; a redirect is not followed.",
)
@click.option("count", "--ids", type=click.IntRange(min=1), help=f"Number of ids. [default: {DEFAULT_IDS}]")
@click.option("--id-prefix", default="user-", show_default=True, help="Ids are PREFIX00001, PREFIX00002, ...")
@click.option(
    "--ids-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Read the ids from FILE, one per line.",
)
@click.option(
    "--connections",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Sessions per id and transport; with --http, requests per id.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Sessions opening at the same time.",
)
@click.option(
    "--hold",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Keep all sessions open together for SECONDS, with an echo every 5 s, and count dropped ones. Prints "
    "`all N sessions are open` when they are.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="Timeout of each step of a session.",
)
@click.option(
    "--auth",
    metavar="JSON|@FILE",
    help="Log in with this object, the payload of the Socket.IO connect (`auth` in clients). @FILE reads it from FILE, "
    "@- from standard input.",
)
@click.option(
    "headers",
    "-H",
    "--header",
    multiple=True,
    metavar="'NAME: VALUE'|@FILE",
    help="Send this header with every request; repeatable. @FILE reads headers from FILE, one per line; @- from "
    "standard input, after the line of --auth @-.",
)
@click.option("--namespace", default="/", show_default=True, help="Socket.IO namespace to connect to.")
@click.option(
    "--parser",
    type=click.Choice([parser.value for parser in Parser]),
    help='The application\'s parser of packets; msgpack is socket.io-msgpack-parser, in Python serializer="msgpack". '
    "[default: default; with --no-echo, the one that the application answers]",
)
@click.option("--path", default="/socket.io/", show_default=True, help="Path of the Socket.IO endpoint.")
@click.option("--key-param", default="client_id", show_default=True, help="Query parameter that carries the id.")
@click.option("--key-header", metavar="NAME", help="Send the id in this header instead.")
@click.option("--no-key", is_flag=True, help="Send no id: the negative control.")
@click.option(
    "--keep-cookies",
    is_flag=True,
    help="Keep the edge's cookies as a browser does, one jar per id. By default cookies are dropped.",
)
@click.option(
    "--node-header",
    default="x-served-by",
    show_default=True,
    help="Response header that names the node. Without this header, texts like `node#NAME: welcome` name the node.",
)
@click.option("--event", default="message", show_default=True, help="Event that the application echoes.")
@click.option(
    "--no-echo",
    is_flag=True,
    help="The application has no echo: time an answer of Socket.IO itself.",
)
@click.option("json_file", "--json", type=click.File("w", lazy=False), metavar="FILE", help="Write the result to FILE.")
@click.option(
    "owned",
    "--i-own-this-target",
    is_flag=True,
    help="Allow load on a target outside this machine and the lab.",
)
@click.pass_context
def probe(
    context: click.Context,
    *,
    url: str,
    transports: tuple[str, ...],
    no_upgrade: bool,
    http: str | None,
    count: int | None,
    id_prefix: str,
    ids_file: Path | None,
    connections: int,
    concurrency: int,
    hold: float | None,
    timeout: float,
    auth: str | None,
    headers: tuple[str, ...],
    namespace: str,
    parser: str | None,
    path: str,
    key_param: str,
    key_header: str | None,
    no_key: bool,
    keep_cookies: bool,
    node_header: str,
    event: str,
    no_echo: bool,
    json_file: TextIO | None,
    owned: bool,
) -> None:
    """Prove that the deployment at URL keeps every id on one node.

    The probe opens real Socket.IO sessions (Engine.IO 4) over every transport: handshake, connect, echo, disconnect.
    Every HTTP request uses a new TCP connection, so that only the edge can keep a session on one node. Parameters in
    the query of URL are added to every request.

    The first session opens alone. If the application refuses its login, the probe ends with the application's reason.
    """
    check(context)
    login = read_login(auth, headers)
    if key_header and key_header.lower() in {name.lower() for name, _ in login.headers}:
        raise Refused(f"--key-header and --header both set {key_header}")
    manners = [manner for manner in SESSIONS if not transports or manner in transports]
    if no_upgrade and Manner.UPGRADE in manners:
        manners.remove(Manner.UPGRADE)
    shape = Shape(
        ids=made_ids(id_prefix, count or DEFAULT_IDS) if ids_file is None else read_ids(ids_file),
        manners=manners if http is None else [Manner.HTTP],
        connections=connections,
        concurrency=concurrency,
        hold=hold,
        keep_cookies=keep_cookies,
    )
    if shape.total > MOST_SESSIONS and not owned:
        raise Refused(
            f"{shape.total} {shape.noun} are more than {MOST_SESSIONS}: use --i-own-this-target to allow that"
        )
    allow_files(shape)
    dialect = Dialect(
        path=http or path,
        key_param=None if no_key or key_header else key_param,
        key_header=key_header,
        node_header=node_header,
        event=None if no_echo else event,
        namespace=namespace,
        auth=login.auth,
        headers=login.headers,
        secrets=login.secrets,
        parser=None if parser is None else Parser(parser),
        timeout=timeout,
    )
    with needing("probe", "aiohttp", "msgpack", "rich"):
        from stickyring.tools.probe.run import judge_and_measure, publish  # noqa: PLC0415
    # Nearly all garbage is freed by reference counting; frequent collections would cost a fifth of the time.
    gc.set_threshold(GARBAGE_THRESHOLD)
    try:
        report = asyncio.run(judge_and_measure(url, dialect, shape, owned=owned))
    except NothingListensError as error:
        raise click.ClickException(str(error)) from error
    except TargetError as error:
        raise Refused(str(error)) from error
    sys.exit(publish(report, json_file))


def check(context: click.Context) -> None:
    """Refuse values that are not valid, and options that contradict each other."""
    given = context.params
    for one, other in (("no_key", "key_header"), ("count", "ids_file")):
        if given[one] and given[other]:
            raise Refused(f"{name_of(context, one)} and {name_of(context, other)} contradict each other")
    if given["no_upgrade"] and Manner.UPGRADE in given["transports"]:
        raise Refused("--no-upgrade and --transport upgrade contradict each other")
    for option in ("key_header", "node_header", "key_param"):
        if given[option] is not None and not TOKEN.fullmatch(given[option]):
            raise Refused(f"{name_of(context, option)}: {given[option]!r} is not a valid name")
    for option in ("path", "http"):
        if given[option] is not None and not PATH.fullmatch(given[option]):
            raise Refused(f"--{option}: {given[option]!r} must start with / and contain no space, ? or #")
    if not NAMESPACE.fullmatch(given["namespace"]):
        raise Refused(f"--namespace: {given['namespace']!r} must start with / and contain no space, comma or ?")
    if given["http"] is None:
        return
    for option in ("transports", "no_upgrade", "hold", "auth", "namespace", "parser", "path", "event", "no_echo"):
        if context.get_parameter_source(option) is ParameterSource.COMMANDLINE:
            raise Refused(f"--http and {name_of(context, option)} contradict each other")
    if given["connections"] == 1:
        raise Refused("--http needs --connections 2 or more: a single request cannot show that an id stays on its node")


def name_of(context: click.Context, parameter: str) -> str:
    """Return the long name of an option."""
    return next(option.opts[-1] for option in context.command.params if option.name == parameter)


def allow_files(shape: Shape) -> None:
    """Raise this process's limit of open files to the hard limit, and refuse a shape that needs more."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    together = min(shape.concurrency, shape.total)
    needed = 2 * together + (shape.total if shape.hold is not None else 0) + SPARE_FILES
    if limit != resource.RLIM_INFINITY and needed > limit:
        raise Refused(f"this needs about {needed} open files; the limit is {limit} (ulimit -Hn): use fewer sessions")
