"""Edges with the same ring choose the same nodes; while rings differ, no user is moved."""

from __future__ import annotations

import json
import time
from typing import Any
from urllib.request import urlopen

from residents import Residents

USERS = [f"user-{number}" for number in range(200)]
SETTLED_SECONDS = 60
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
