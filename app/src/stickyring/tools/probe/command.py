"""The command `stickyring probe`."""

import asyncio
import gc
import re
import resource
import sys
from pathlib import Path
from typing import TextIO

import click

from stickyring.cli import needing
from stickyring.tools.probe.settings import Dialect, Manner, Shape
from stickyring.tools.probe.targets import NothingListensError, TargetError

DEFAULT_IDS = 60
MOST_SESSIONS = 200_000
# A session has one connection, or two while it polls (GET and POST); these files are for the process itself.
SPARE_FILES = 100
GARBAGE_THRESHOLD = 50_000

# RFC 3986, unreserved: characters that no client or edge rewrites.
PLAIN_ID = re.compile(r"[A-Za-z0-9._~-]+")
# RFC 9110, token.
TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")

EPILOG = """\b
Examples:
  stickyring probe http://127.0.0.1:9002
  stickyring probe http://127.0.0.1:9002 --no-key            what fails without a user id?
  stickyring probe http://127.0.0.1:9002 --ids 500 --json result.json
  stickyring probe http://127.0.0.1:9002 --ids 200 --connections 1 \\
      --transport websocket --hold 60                        do live sessions survive a change?
  stickyring probe https://chat.example.com --i-own-this-target \\
      --path /ws/socket.io/ --key-param user --no-echo       your own application

\b
Exit status: 0 sticky; 1 not sticky, or not proven; 2 bad usage, or load on the target
is not allowed; 130 interrupted.
For a private certificate authority, set the environment variable SSL_CERT_FILE.
"""


class Refused(click.ClickException):
    """Bad usage, reported in one line without click's usage text."""

    exit_code = 2


@click.command(epilog=EPILOG)
@click.argument("url")
@click.option(
    "transports",
    "--transport",
    type=click.Choice([manner.value for manner in Manner]),
    multiple=True,
    help="Probe only this transport; repeatable. websocket-first falls back to polling. [default: all four]",
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
    help="Sessions per id and transport.",
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
    help="Response header that names the node. Without it, texts like `node#NAME: welcome` name it.",
)
@click.option("--event", default="message", show_default=True, help="Event that the application echoes.")
@click.option(
    "--no-echo",
    is_flag=True,
    help="The application has no echo: time an answer of Socket.IO itself, with the default serializer or msgpack.",
)
@click.option("json_file", "--json", type=click.File("w", lazy=False), metavar="FILE", help="Write the result to FILE.")
@click.option(
    "owned",
    "--i-own-this-target",
    is_flag=True,
    help="Allow load on a target outside this machine and the lab.",
)
def probe(
    *,
    url: str,
    transports: tuple[str, ...],
    count: int | None,
    id_prefix: str,
    ids_file: Path | None,
    connections: int,
    concurrency: int,
    hold: float | None,
    timeout: float,
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
    """
    if no_key and key_header:
        raise Refused("--no-key and --key-header contradict each other")
    if count is not None and ids_file is not None:
        raise Refused("--ids and --ids-file contradict each other")
    for option, name in (("--key-header", key_header), ("--node-header", node_header), ("--key-param", key_param)):
        if name is not None and not TOKEN.fullmatch(name):
            raise Refused(f"{option}: {name!r} is not a valid name")
    if not path.startswith("/") or not path.isascii() or re.search(r"[\s?#]", path):
        raise Refused(f"--path: {path!r} must start with / and contain no space, ? or #")
    shape = Shape(
        ids=made_ids(id_prefix, count or DEFAULT_IDS) if ids_file is None else read_ids(ids_file),
        manners=[manner for manner in Manner if not transports or manner in transports],
        connections=connections,
        concurrency=concurrency,
        hold=hold,
        keep_cookies=keep_cookies,
    )
    if shape.total > MOST_SESSIONS and not owned:
        raise Refused(f"{shape.total} sessions are more than {MOST_SESSIONS}: use --i-own-this-target to allow that")
    allow_files(shape)
    dialect = Dialect(
        path=path,
        key_param=None if no_key or key_header else key_param,
        key_header=key_header,
        node_header=node_header,
        event=None if no_echo else event,
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


def made_ids(prefix: str, count: int) -> list[str]:
    """Return `count` ids, PREFIX00001 and so on, the same in every run."""
    if prefix and not PLAIN_ID.fullmatch(prefix):
        raise Refused(f"--id-prefix: {prefix!r} needs percent-encoding; use letters, digits and . _ ~ -")
    return [f"{prefix}{number:05}" for number in range(1, count + 1)]


def read_ids(file: Path) -> list[str]:
    """Return the ids in `file`, one per line; empty lines are skipped."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"--ids-file: cannot read {file}: {error}") from error
    ids: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name:
            continue
        if not PLAIN_ID.fullmatch(name):
            raise Refused(f"{file}, line {number}: {name!r} needs percent-encoding; use letters, digits and . _ ~ -")
        if name in ids:
            raise Refused(f"{file}, line {number}: {name} is already on line {ids[name]}")
        ids[name] = number
    if not ids:
        raise Refused(f"{file} contains no id")
    return list(ids)


def allow_files(shape: Shape) -> None:
    """Raise this process's limit of open files to the hard limit, and refuse a shape that needs more."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    together = min(shape.concurrency, shape.total)
    needed = 2 * together + (shape.total if shape.hold is not None else 0) + SPARE_FILES
    if limit != resource.RLIM_INFINITY and needed > limit:
        raise Refused(f"this needs about {needed} open files; the limit is {limit} (ulimit -Hn): use fewer sessions")
