"""Edges with the same ring choose the same nodes; while rings differ, no user is moved."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import environment
import pytest
from lab_monitor import LabMonitor, wait_for
from residents import Residents

USERS = [f"user-{number}" for number in range(200)]
SETTLED_SECONDS = 60
RUNBOOKS = environment.PROJECT / "docs" / "runbooks.md"
FLEET = "http://127.0.0.1:9090/consoles/fleet.html"
SHOWN_SECONDS, ALERT_SECONDS = 30, 210
WITHOUT_NODE2 = json.dumps({"stickyring_nodes_leaving": ["node2"]})


def homes(edge: Any) -> dict[str, str]:
    """The node that the edge sends each user to."""

    def served_by(user: str) -> str:
        with urlopen(f"{edge.url('sticky')}/healthz?client_id={user}", timeout=5) as answer:
            return answer.headers["x-served-by"]

    return {user: served_by(user) for user in USERS}


def test_edges_choose_the_same_node_for_the_same_user(edges: Any) -> None:
    chosen, *others = map(homes, edges)
    assert others, "the test needs more than one edge"
    assert all(other == chosen for other in others)
    assert len(set(chosen.values())) > 1


def settle(residents: list[Residents], wanted: dict[str, str]) -> None:
    """Waits until all connections of all users are on the wanted nodes."""
    for connected in residents:
        home = {user: {wanted[user]} for user in connected.users}
        connected.wait(lambda one=connected, home=home: one.homes() == home, SETTLED_SECONDS)


def test_no_user_is_asked_to_move_before_every_edge_has_the_ring(
    edges: Any, residents: Any, edge_play: Any, ansible: Any, inventory: Any
) -> None:
    before = homes(edges[0])
    settle(residents, before)
    users = residents[0].users
    since = time.monotonic()

    def disconnects() -> set[tuple[str, int]]:
        """How often the WebSockets of each user were closed."""
        websockets = [one for connected in residents for one in connected if one.transports == ["websocket"]]
        return {(one.user, one.count("disconnect", since)) for one in websockets}

    edge_play("--limit", edges[0].name, "-e", WITHOUT_NODE2)
    after = homes(edges[0])
    assert homes(edges[1]) == before != after
    refused = ansible("ansible-playbook", "-i", inventory, "playbooks/rebalance.yml", check=False)
    assert refused.returncode != 0
    assert "The edges do not serve the same ring" in " ".join(refused.stdout.split())
    moved = {user for user in users if before[user] != after[user]}
    assert moved
    asked = ansible("stickyring", "whereis", next(iter(moved)), "--inventory", inventory, check=False)
    assert (asked.returncode, "the edges disagree" in asked.stdout) == (1, True)
    assert disconnects() == {(user, 0) for user in users}

    edge_play("-e", WITHOUT_NODE2)
    ansible("ansible-playbook", "-i", inventory, "playbooks/rebalance.yml")
    settle(residents, after)
    assert disconnects() == {(user, 1 if user in moved else 0) for user in users}


@pytest.mark.soak
def test_an_edge_with_another_ring_is_shown_at_once_and_alerts_and_the_runbook_helps(
    edges: Any, edge_play: Any, inventory: Path, tmp_path: Path
) -> None:
    """`edge_play` removes at the end what the monitor has added to the edges."""
    monitor = LabMonitor(inventory, tmp_path / "inventory")
    for playbook in "molecule/shared/create.yml", "playbooks/edge.yml", "playbooks/monitor.yml":
        monitor.play(playbook)
    before = homes(edges[0])

    def differing() -> set[str]:
        """The edges of which the page of the fleet says that they are not the same as others."""
        table = monitor.read(FLEET).partition('id="edge_table"')[2].partition("</table>")[0]
        rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in table.split("<tr>")[2:]]
        return {cells[0] for cells in rows if ">no<" in cells[5]}

    assert (monitor.alerts(), differing()) == (set(), set())
    options = ("--limit", edges[0].name, "-e", WITHOUT_NODE2)
    with environment.started("ansible-playbook", "-i", monitor.inventory, "playbooks/edge.yml", *options) as play:
        wait_for(lambda: homes(edges[0]) != before, SETTLED_SECONDS)
        shown = wait_for(lambda: differing() == {edge.name for edge in edges}, SHOWN_SECONDS)
        play.communicate()
        assert play.returncode == 0
    expected = {("StickyringEdgesDisagree", edge.name) for edge in edges}
    fires = wait_for(lambda: monitor.alerts() == expected, ALERT_SECONDS, monitor.alerts)
    print(f"shown after {shown:.0f} s, fires {fires:.0f} s later")
    _, _, section = RUNBOOKS.read_text().partition("## StickyringEdgesDisagree\n")
    (playbook,) = re.findall(r"`ansible-playbook (\S+)`", section.partition("\n## ")[0])
    monitor.play(playbook)
    wait_for(lambda: monitor.alerts() == set(), SETTLED_SECONDS, monitor.alerts)
    assert homes(edges[0]) == homes(edges[1]) == before
