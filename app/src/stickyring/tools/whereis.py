"""`stickyring whereis`: a user's assigned node, and the nodes that hold their sessions now."""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from stickyring.ring import Ring, RingError
from stickyring.tools.playbook import Unknown, play, with_options

EPILOG = """\b
Examples:
  stickyring whereis alice
  stickyring whereis alice --live
  stickyring whereis alice@example.com --inventory inventory/production
  stickyring whereis alice --live -- --ask-become-pass

\b
Exit status: 0 all agree; 1 the edges disagree, a session is not on the assigned node,
or a host did not answer; 2 the answer is not known.
"""


@click.command(epilog=EPILOG)
@click.argument("user", metavar="ID")
@click.option("--live", is_flag=True, help="Also ask all nodes for sessions of this user.")
@with_options
def whereis(*, user: str, options: tuple[str, ...], live: bool, inventory: str | None) -> None:
    """Show the assigned node of user ID, from the rings of all edges.

    ID is the user's id as the application knows it, without percent-encoding. It asks the edges, and with --live the
    nodes, over SSH like any playbook: with the clone's playbook in its folder, elsewhere with that of the collection
    stickyring.fleet. OPTIONS after -- are passed to ansible-playbook: -k, -K, --vault-password-file and others.
    """
    with tempfile.TemporaryDirectory() as folder:
        answers = _ask(user, live, inventory, options, Path(folder))
    owners = {edge: _owner(edge, ring, user) for edge, ring in answers["rings"].items()}
    told = sorted(set(owners.values()))
    if len(told) == 1:
        click.echo(f"{user} is assigned to {told[0]}")
    else:
        click.echo(f"the edges disagree about {user}: {', '.join(f'{edge} assigns {owners[edge]}' for edge in owners)}")
    agreed = len(told) == 1
    if live:
        clusters = {ring["cluster"] for ring in answers["rings"].values()}
        agreed = _tell_sessions(answers["nodes"], told, clusters) and agreed
        agreed = _tell_silent(answers["silent"]) and agreed
        if not answers["silent"] and not any(answer["sessions"] for answer in answers["nodes"]):
            click.echo("  no session is open")
    sys.exit(0 if agreed else 1)


def _ask(user: str, live: bool, inventory: str | None, options: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run the playbook and return its result.

    {"rings": {edge: ring document}, "nodes": [answer of `stickyring sessions`, one per instance],
    "silent": [host that did not answer]}

    Raises:
        Unknown: the playbook is not found or has failed, or the inventory has no edge.
    """
    # Ansible's copy does not create a file's folder.
    for kind in ("rings", "sessions"):
        (folder / kind).mkdir()
    play(
        "whereis",
        {"stickyring_id": user, "stickyring_live": live, "stickyring_directory": str(folder)},
        inventory,
        options,
    )
    rings = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("rings/*.json"))}
    if not rings:
        raise Unknown("the inventory has no edge")
    told = {file.name: file.read_text().strip() for file in sorted(folder.glob("sessions/*"))}
    return {
        "rings": rings,
        "nodes": [json.loads(line) for text in told.values() for line in text.splitlines()],
        "silent": [host for host, text in told.items() if not text],
    }


def _owner(edge: str, document: dict[str, Any], user: str) -> str:
    if not document:
        raise Unknown(f"{edge} serves no ring yet")
    try:
        return Ring.load(document).owner(user)
    except RingError as error:
        raise Unknown(f"{edge}: {error}") from None


def _tell_sessions(nodes: list[dict[str, Any]], owners: list[str], clusters: set[str]) -> bool:
    """Print sessions by node; return whether all are on the assigned node. Those of other clusters do not count."""
    astray = 0
    for answer in nodes:
        for session in answer["sessions"]:
            cluster = session.get("cluster")
            mark = ""
            if cluster is not None and cluster not in clusters:
                mark = f" (cluster {cluster})"
            elif answer["node"] not in owners:
                astray += 1
                mark = ", not the assigned node"
            kept = ", kept by the bus" if session.get("kept") else ""
            click.echo(f"  {answer['node']}: {session['transport']}, open for {session['seconds']:.0f} s{kept}{mark}")
    if astray:
        click.echo(f"{astray} of these sessions are not on the assigned node: run playbooks/rebalance.yml")
    return not astray


def _tell_silent(hosts: list[str]) -> bool:
    """Print the hosts that did not answer; return whether there are none."""
    for host in hosts:
        click.echo(f"  {host}: no answer")
    if hosts:
        click.echo(f"sessions on {', '.join(hosts)} are not known: do the nodes run there?")
    return not hosts
