"""The commands by which the operator of a host asks its node and tells it what to do, over its control socket."""

import json
import socket
import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import urlencode

import click

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

ANSWER_SECONDS = 30
POLL_SECONDS = 0.2
FEWEST_RETURNED = 2
RETURNED_SHARE = 0.25
"""What one user cannot reach. An edge with another ring sends back all whom that ring has here: of two edges, half."""
HEARD_SECONDS = 5 * POLL_SECONDS
"""The node tells of its newest rebalance only: a command that waited for another's leaves that one time to hear."""

with_control = click.option(
    "--control",
    "path",
    type=click.Path(path_type=Path),
    required=True,
    envvar="STICKYRING_CONTROL",
    show_envvar=True,
    help="The node's control socket, as given to `stickyring serve`.",
)


@click.command()
@click.option("--key", help="Only the sessions of this user.")
@with_control
def sessions(*, key: str | None, path: Path) -> None:
    """Print who is connected to a node of this host, as JSON.

    {"node": NAME, "sessions": [{"key": KEY or null, "cluster": CLUSTER or null, "transport": "polling" or "websocket",
    "seconds": OPEN_FOR}]}; CLUSTER is the edge's, by which the user came.

    \b
    Examples:
      stickyring sessions --control /run/stickyring-node/1/control.sock
      stickyring sessions --control /run/stickyring-node/1/control.sock --key alice
    """
    target = "/sessions" if key is None else f"/sessions?{urlencode({'key': key}, errors='surrogateescape')}"
    click.echo(json.dumps(ask(path, "GET", target)))


@click.command()
@click.option(
    "--ring", "document", type=click.File(), required=True, help="The ring document that all edges serve; - reads it."
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Sessions to ask a second. [default: 250 divided by the number of other nodes on the ring]",
)
@with_control
def rebalance(*, document: TextIO, rate: float | None, path: Path) -> None:
    """Ask the users of a node whom the ring has elsewhere to reconnect, and wait until they have left.

    Run it when every edge has the new ring: users go where the edge sends them. Users whom the ring has here are not
    touched, nor are sessions without a key or of another cluster than the ring's. One that is running already is waited
    for first. Prints JSON: numbers of sessions that were to move, were staying and were without a key at the beginning,
    and of those that were asked, left, and returned. A few users may return by their own doing. Exits with 1 if two or
    more return, and a quarter of those that were asked, which means that an edge has another ring. Interrupting the
    command does not stop the node.

    \b
    Examples:
      stickyring rebalance --control /run/stickyring-node/1/control.sock --ring ring.json
      stickyring rebalance --control /run/stickyring-node/1/control.sock --ring - --rate 20 < ring.json
    """
    try:
        order: dict[str, Any] = {"ring": json.load(document)}
    except ValueError as error:  # JSON that is none, or bytes that are no text
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
    told = f"{progress['returned']} sessions are here though the ring has their users elsewhere"
    if back >= FEWEST_RETURNED and back >= asked * RETURNED_SHARE:
        raise click.ClickException(f"{told}: an edge has another ring, or sends them by another key")
    if back:
        click.echo(f"{told}: {back} of {asked} users", err=True)


@click.command()
@with_control
def drain(*, path: Path) -> None:
    """Empty a node for maintenance, and wait until everybody has left.

    The node takes no Socket.IO user in any more, says so at /readyz, and asks everybody to reconnect: the edge sends
    them to the next node of the ring. It goes on running, and stays like that until `undrain` or a restart. Prints
    JSON: numbers of sessions that were to move, were asked and left. Interrupting the command does not stop the node
    from draining.

    \b
    Examples:
      stickyring drain --control /run/stickyring-node/1/control.sock
    """
    begun = ask(path, "POST", "/drain")
    progress = _watch(begun, "asked to reconnect", lambda: ask(path, "GET", "/drain"), _drains)
    click.echo(json.dumps(progress))
    if not progress["draining"]:
        raise click.ClickException("the node takes users in again: somebody has undrained it, or it was started anew")


@click.command()
@with_control
def undrain(*, path: Path) -> None:
    """Let a node that was drained take users in again.

    Whoever connects from now on comes to it if the ring has him here. Those who are connected elsewhere stay there
    until the next rebalance.

    \b
    Examples:
      stickyring undrain --control /run/stickyring-node/1/control.sock
    """
    click.echo(json.dumps(ask(path, "POST", "/undrain")))


def _start(path: Path, order: dict[str, Any]) -> dict[str, Any] | None:
    """Begin a rebalance; return its progress, None while another one is running."""
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
    """Show how many sessions have been asked, as long as it goes on; return the last progress."""
    to_move: int = progress["to_move"]
    with click.progressbar(length=to_move, label=label, file=sys.stderr) as bar:
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
        raise click.ClickException(
            "the node was started anew, which ended the rebalance that was running: run it again"
        )
    return progress


class Refused(click.ClickException):
    """The node's refusal of a request, with the `status` of its answer."""

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
    """A Unix socket that adds to `descriptors` what is sent along with the bytes that are read (SCM_RIGHTS)."""

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
    """Return the node's answer, which may take so many seconds; `listener` in it is a descriptor that came along.

    Raises:
        Refused: the node refuses.
        click.ClickException: there is none.
    """
    connection = _UnixConnection(path, seconds)
    try:
        connection.request(method, target, None if body is None else json.dumps(body))
        response = connection.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
    except FileNotFoundError:
        raise click.ClickException(f"no control socket {path}: does the node run, and with --control?") from None
    except ConnectionRefusedError:
        raise click.ClickException(f"nobody serves the control socket {path}: the node does not run") from None
    except (OSError, HTTPException, ValueError) as error:
        raise click.ClickException(f"no answer on the control socket {path}: {error or type(error).__name__}") from None
    finally:
        connection.close()
    if response.status >= HTTPStatus.BAD_REQUEST:
        raise Refused(response.status, answer["error"])
    if connection.descriptors:
        (answer["listener"],) = connection.descriptors
    return answer
