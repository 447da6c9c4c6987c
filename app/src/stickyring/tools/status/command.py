"""The command `stickyring status`."""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from stickyring.cli import needing
from stickyring.tools.playbook import Unknown, play, with_options
from stickyring.tools.status.fleet import Fleet, fleet_of

CONNECT_SECONDS = 5
WATCH_SECONDS = 3.0
EPILOG = """\b
Examples:
  stickyring status
  stickyring status --watch
  stickyring status --json --inventory inventory/production
  stickyring status -- --ask-become-pass

\b
Exit status: 0 all is well; 1 something is wrong, and it says what; 2 the state is not known.
"""


@click.command(epilog=EPILOG)
@click.option("--watch", is_flag=True, help=f"Ask again {WATCH_SECONDS:g} s after each answer, until Ctrl-C.")
@click.option("as_json", "--json", is_flag=True, help="Print JSON; with --watch, one line for each answer.")
@with_options
def status(*, watch: bool, as_json: bool, inventory: str | None, options: tuple[str, ...]) -> None:
    """Show the fleet in one table: edges, instances, users, and what is wrong.

    For each instance: its release, its sessions, its users, their share of all users beside the share that its weight
    is due, users who are assigned to another instance (off ring), whether it serves or drains, and for how many edges
    it is healthy. For each edge, the digest of its ring, which must be the same on all.

    It asks all hosts over SSH like any playbook: with the clone's playbook in its folder, elsewhere with that of the
    collection stickyring.fleet. OPTIONS after -- are passed to ansible-playbook: -k, -K, --vault-password-file and
    others. With --watch, a host that does not answer keeps its last answer, and is named.
    """
    if not watch:
        fleet = fleet_of(_ask(inventory, options))
        if as_json:
            click.echo(json.dumps(fleet.as_json(), indent=2))
        else:
            with needing("plan", "rich"):
                from stickyring.tools.status.report import table_of  # noqa: PLC0415
                from stickyring.tools.terminal import console_for_stdout  # noqa: PLC0415
            console_for_stdout().print(table_of(fleet))
        sys.exit(2 if not fleet.known else 1 if fleet.problems else 0)
    try:
        _watch(as_json, inventory, options)
    except KeyboardInterrupt:
        sys.exit(0)


def _watch(as_json: bool, inventory: str | None, options: Sequence[str]) -> None:
    kept: dict[str, Any] = {}
    if as_json:
        while True:
            kept, fleet, stale = _keep(kept, _ask(inventory, options))
            click.echo(json.dumps({**fleet.as_json(), "last_answers_of": stale}))
            time.sleep(WATCH_SECONDS)
    with needing("plan", "rich"):
        from rich.console import Group  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        from stickyring.tools.status.report import table_of  # noqa: PLC0415
        from stickyring.tools.terminal import console_for_stdout  # noqa: PLC0415
    console = console_for_stdout()
    shown = Group()
    while True:
        said = ""
        try:
            kept, fleet, stale = _keep(kept, _ask(inventory, options))
            shown = Group(table_of(fleet))
            said = f"No answer now, so this is the last one: {', '.join(stale)}." if stale else ""
        except Unknown as error:
            if not kept:
                raise
            said = f"No answer now, so this is the last one. {error.message}"
        console.clear()
        console.print(Text.assemble((f"{datetime.now():%H:%M:%S} ", "dim"), (said, "bold red")), Text(), shown)
        time.sleep(WATCH_SECONDS)


def _ask(inventory: str | None, options: Sequence[str]) -> dict[str, Any]:
    """Run the playbook and return the answers, as `fleet_of` takes them.

    Raises:
        Unknown: the playbook is not found or has failed, or the inventory has no edge and no node.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = [f"--timeout={CONNECT_SECONDS}", *options]
        play("status", {"stickyring_directory": folder}, inventory, given)
        # In the order of the inventory, in which they were written.
        files = sorted(Path(folder).iterdir(), key=lambda file: file.stat().st_mtime_ns)
        answers = {file.name: json.loads(file.read_text()) for file in files}
    if not answers:
        raise Unknown("the inventory has no edge and no node")
    return answers


def _keep(kept: dict[str, Any], new: dict[str, Any]) -> tuple[dict[str, Any], Fleet, list[str]]:
    """Put the last answers of hosts that do not answer now in the place of theirs.

    Returns the answers, the fleet that they describe with the problems of now, and the names of these hosts.
    """
    now = fleet_of(new)
    answering = {edge.name for edge in now.edges if not edge.error} | {bus.name for bus in now.bus if not bus.error}
    answering |= {one.host for one in now.instances if not one.error}
    stale = [host for host in new if host not in answering and host in kept]
    both = {host: kept[host] if host in stale else answer for host, answer in new.items()}
    return both, replace(fleet_of(both), problems=now.problems), stale
