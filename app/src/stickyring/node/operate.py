"""The operator's commands on a node's host, over the control socket.

They are `sessions`, `summary`, `rebalance`, `drain` and `undrain`.
"""

import json
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import urlencode

import click

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from stickyring.ring import Ring

ANSWER_SECONDS = 30
SUMMARY_SECONDS = 3
"""An instance that hangs must not hold up the summary of the others."""
POLL_SECONDS = 0.2
FEWEST_RETURNED = 2
RETURNED_SHARE = 0.25
"""A rebalance fails if both are reached, which one user alone cannot cause. If one of two edges has another ring, it
sends back up to half of the users."""
HEARD_SECONDS = 5 * POLL_SECONDS
"""The node reports only its newest rebalance: a command that waited for another command's rebalance leaves that one
this time to read its result."""

with_control = click.option(
    "--control",
    "path",
    type=click.Path(path_type=Path),
    required=True,
    envvar="STICKYRING_CONTROL",
    show_envvar=True,
    help="The instance's control socket, as given to `stickyring serve`.",
)


@click.command()
@click.option("--key", help="Only the sessions of this user.")
@with_control
def sessions(*, key: str | None, path: Path) -> None:
    """Print the open sessions of a node on this host as JSON.

    {"node": NAME, "release": RELEASE, "sessions": [{"key": KEY or null, "cluster": CLUSTER or null, "transport":
    "polling" or "websocket", "seconds": OPEN_FOR, "kept": KEPT, "request_id": ID}]}. CLUSTER is the edge's cluster that
    routes the user. KEPT: whether the bus has the session, so that its client can go on with it on any node. ID: what
    the edge's access log calls the request that began it.

    \b
    Examples:
      stickyring sessions --control /run/stickyring-node/1/control.sock
      stickyring sessions --control /run/stickyring-node/1/control.sock --key alice
    """
    target = "/sessions" if key is None else f"/sessions?{urlencode({'key': key}, errors='surrogateescape')}"
    click.echo(json.dumps(ask(path, "GET", target)))


with_ring = click.option(
    "--ring",
    "document",
    type=click.File(),
    required=True,
    help="File with the ring document that all edges serve; - for standard input.",
)


@click.command()
@with_ring
@click.option(
    "--control",
    "paths",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    help="An instance's control socket; once for each instance.",
)
def summary(*, document: TextIO, paths: tuple[Path, ...]) -> None:
    """Count the users of instances on this host beside a ring, as one line of JSON for each instance.

    {"node": NAME, "release": RELEASE, "sessions": number of them, "users": with a session here, "off_ring": users who
    are assigned to another node, "drain": {"draining", "drained", numbers of sessions}}. A session without a key counts
    as a user. Users of another cluster than the ring's do not count, nor is anybody off an empty ring, {}.
    An instance that does not answer has {"control": PATH, "error": why}.

    \b
    Examples:
      stickyring summary --ring ring.json --control /run/stickyring-node/1/control.sock
      stickyring summary --ring - --control 1/control.sock --control 2/control.sock < ring.json
    """
    from stickyring.ring import Ring, RingError  # noqa: PLC0415 - the other commands of this module do not need it

    try:
        described = json.load(document)
        ring = Ring.load(described) if described else None
    except ValueError as error:  # not JSON, or not UTF-8
        text = f"not a ring: {error}" if isinstance(error, RingError) else f"not JSON: {error}"
        raise click.ClickException(f"{document.name} is {text}") from None
    with ThreadPoolExecutor(len(paths)) as asking:
        for line in asking.map(lambda path: _summary_of(path, ring), paths):
            click.echo(json.dumps(line))


def _summary_of(path: Path, ring: "Ring | None") -> dict[str, Any]:
    try:
        answer = ask(path, "GET", "/sessions", seconds=SUMMARY_SECONDS)
        drain = ask(path, "GET", "/drain", seconds=SUMMARY_SECONDS)
    except click.ClickException as error:
        return {"control": str(path), "error": error.message}
    # Without a ring, all clusters count.
    clusters = {None, *([ring.cluster] if ring else [])}
    counted = [one for one in answer["sessions"] if ring is None or one["cluster"] in clusters]
    keys = list({one["key"] for one in counted} - {None})
    owners = ring.owners(keys) if ring else []
    return {
        "node": answer["node"],
        "release": answer["release"],
        "sessions": len(answer["sessions"]),
        "users": len(keys) + sum(one["key"] is None for one in counted),
        "off_ring": sum(owner != answer["node"] for owner in owners),
        "drain": drain,
    }


@click.command()
@with_ring
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Sessions to ask per second. [default: 250 divided by the number of other nodes on the ring]",
)
@with_control
def rebalance(*, document: TextIO, rate: float | None, path: Path) -> None:
    """Ask a node's moved users to reconnect, and wait for them.

    Moved users are connected here but assigned to another node by the ring. Run this when every edge has the new ring.
    Other users are not affected, nor are sessions without a key or of another cluster than the ring's. If a rebalance
    is running, the command waits for it first.

    Prints JSON with the numbers of sessions to move, staying and without a key at the start, and of those asked, left
    and returned. Exits with 1 if at least two users, and at least a quarter of those asked, come back: then an edge has
    another ring.
    Interrupting the command does not stop the rebalance.

    \b
    Examples:
      stickyring rebalance --control /run/stickyring-node/1/control.sock --ring ring.json
      stickyring rebalance --control /run/stickyring-node/1/control.sock --ring - --rate 20 < ring.json
    """
    try:
        order: dict[str, Any] = {"ring": json.load(document)}
    except ValueError as error:  # not JSON, or not UTF-8
        raise click.ClickException(f"{document.name} is not JSON: {error}") from None
    if rate is not None:
        order["rate"] = rate
    while (begun := _start(path, order)) is None:
        _watch(_progress(path), "asked by the rebalance that is running", lambda: _progress(path), _runs)
        time.sleep(HEARD_SECONDS)
    progress = _watch(begun, "asked to reconnect", lambda: _progress(path), _runs)
    del progress["running"]
    click.echo(json.dumps(progress))
    back, asked = progress["users_returned"], progress["users_asked"]
    result = f"{progress['returned']} sessions are here, but their users are assigned to another node"
    if back >= FEWEST_RETURNED and back >= asked * RETURNED_SHARE:
        raise click.ClickException(f"{result}: an edge has another ring, or hashes another key")
    if back:
        click.echo(f"{result}: {back} of {asked} users", err=True)


@click.command()
@with_control
def drain(*, path: Path) -> None:
    """Empty an instance for maintenance, and wait until users have left.

    A host with several instances has a control socket for each. The instance accepts no new Socket.IO users, answers
    503 at /readyz, and asks all users to reconnect: the edge sends them to the next instance of the ring. It keeps
    running and stays drained until `undrain` or a restart. Prints JSON with numbers of sessions: to move, asked and
    left. Interrupting the command does not stop the drain.

    \b
    Examples:
      stickyring drain --control /run/stickyring-node/1/control.sock
    """
    begun = ask(path, "POST", "/drain")
    progress = _watch(begun, "asked to reconnect", lambda: ask(path, "GET", "/drain"), _drains)
    click.echo(json.dumps(progress))
    if not progress["draining"]:
        raise click.ClickException("the node accepts users again: it was undrained or restarted")


@click.command()
@with_control
def undrain(*, path: Path) -> None:
    """Let a drained node accept users again.

    From now on, users who connect reach it if it is their assigned node. Users who are connected to other nodes stay
    there until the next rebalance.

    \b
    Examples:
      stickyring undrain --control /run/stickyring-node/1/control.sock
    """
    click.echo(json.dumps(ask(path, "POST", "/undrain")))


def _start(path: Path, order: dict[str, Any]) -> dict[str, Any] | None:
    """Start a rebalance; return its progress, or None if another one is running."""
    try:
        return ask(path, "POST", "/rebalance", order)
    except Refused as refused:
        if refused.status != HTTPStatus.CONFLICT:
            raise
        return None


def _watch(
    progress: dict[str, Any],
    label: str,
    ask: Callable[[], dict[str, Any]],
    goes_on: Callable[[dict[str, Any]], bool],
) -> dict[str, Any]:
    """Show how many sessions have been asked while `goes_on`; return the last progress."""
    to_move: int = progress["to_move"]
    # Elsewhere, its first line would be glued to the JSON.
    with click.progressbar(length=to_move, label=label, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        while goes_on(progress):
            time.sleep(POLL_SECONDS)
            progress = ask()
            bar.length = progress["to_move"]
            bar.update(progress["asked"] - bar.pos)
    return progress


def _runs(rebalance: dict[str, Any]) -> bool:
    return bool(rebalance["running"])


def _drains(drain: dict[str, Any]) -> bool:
    return drain["draining"] and not drain["drained"]


def _progress(path: Path) -> dict[str, Any]:
    progress = ask(path, "GET", "/rebalance")
    if "to_move" not in progress:
        raise click.ClickException("the node was restarted, which ended the running rebalance: run it again")
    return progress


class Refused(click.ClickException):
    """The node refused a request; `status` is the HTTP status of its answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"the node refuses: {text}")
        self.status = status


class _UnixConnection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self._path = path
        self.descriptors: list[int] = []

    def connect(self) -> None:
        self.sock = _Socket(self.descriptors)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class _Socket(socket.socket):
    """A Unix socket that appends received file descriptors (SCM_RIGHTS) to `descriptors`."""

    def __init__(self, descriptors: list[int]) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self._descriptors = descriptors

    def recv_into(self, buffer: "WriteableBuffer", nbytes: int = 0, flags: int = 0) -> int:
        room = memoryview(buffer)
        read, passed, *_ = socket.recv_fds(self, nbytes or len(room), 1, flags)
        self._descriptors += passed
        room[: len(read)] = read
        return len(read)


def ask(
    path: Path, method: str, target: str, body: object = None, *, seconds: float = ANSWER_SECONDS
) -> dict[str, Any]:
    """Return the node's answer, decoded from JSON; `listener` in it is a received file descriptor.

    `body` is sent as JSON; `seconds` is the timeout.

    Raises:
        Refused: the node refuses.
        click.ClickException: there is no valid answer.
    """
    connection = _UnixConnection(path, seconds)
    try:
        connection.request(method, target, None if body is None else json.dumps(body))
        response = connection.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
    except FileNotFoundError:
        raise click.ClickException(f"no control socket {path}: does the node run, and with --control?") from None
    except ConnectionRefusedError:
        raise click.ClickException(f"no process serves the control socket {path}: the node does not run") from None
    except (OSError, HTTPException, ValueError) as error:
        raise click.ClickException(f"no answer on the control socket {path}: {error or type(error).__name__}") from None
    finally:
        connection.close()
    if response.status >= HTTPStatus.BAD_REQUEST:
        raise Refused(response.status, answer["error"])
    if connection.descriptors:
        (answer["listener"],) = connection.descriptors
    return answer
