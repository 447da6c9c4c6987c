"""3 to 6 to 3 nodes, one at another address, one dead: only the planned users move, each once.

The tests are steps: each begins with the fleet that the previous one has left.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LIVE_SESSIONS = 200


@pytest.fixture
def live_websockets(programs: Path, edge_url: Any, tmp_path: Path) -> Iterator[Any]:
    """Websockets that do not reconnect; calling it closes them and returns how many were dropped."""
    figures = tmp_path / "figures.json"
    command = [programs / "stickyring", "probe", edge_url("sticky"), "--ids", str(LIVE_SESSIONS), "--connections", "1"]
    options = ["--transport", "websocket", "--concurrency", str(LIVE_SESSIONS), "--hold", "1200", "--json", figures]
    holder = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    for line in holder.stdout:
        if f"all {LIVE_SESSIONS} sessions are open" in line:
            break

    def end() -> int:
        holder.send_signal(signal.SIGINT)
        holder.communicate(timeout=60)
        total = json.loads(figures.read_text())["total"]
        assert total["sessions"] == LIVE_SESSIONS
        return total["dropped"]

    yield end
    holder.kill()
    holder.wait()


def test_three_nodes_join_and_every_websocket_stays(
    residents: Any, fleet: Any, plan: Any, run: Any, watch: Any, live_websockets: Any
) -> None:
    """Without the rebalance, no user is asked to reconnect, but the ring has its new members."""
    fleet.add(4, 5, 6)
    expected = plan()
    assert {node for _, node in expected.moves.values()} == {"node4-1", "node5-1", "node6-1"}
    assert abs(expected.report["moved_share"] - 1 / 2) < 0.03
    run("molecule/shared/create.yml")
    judge = watch()
    since = time.monotonic()
    run("site.yml", "--skip-tags", "rebalance")
    assert live_websockets() == 0
    websockets = [connection for connection in residents if connection.transports == ["websocket"]]
    assert not any(connection.count("disconnect", since) for connection in websockets)

    assert "changed=1" in run("playbooks/rebalance.yml")
    judge(expected)
    assert not plan().report["changes"]
    assert set(re.findall(r"changed=(\d+)", run("playbooks/rebalance.yml"))) == {"0"}, "a user was asked again"


def test_a_node_that_has_just_joined_has_nothing_to_roll_back_to(fleet: Any, ansible: Any, reach: Any) -> None:
    look = "basename $(readlink /opt/stickyring-node/current); systemctl show stickyring-node@1 -P MainPID"
    node = reach("node6")
    before = node.check_output(look)
    options = ["-i", fleet.folder, "--limit", "node6,edge"]
    refused = ansible("ansible-playbook", "playbooks/rollback.yml", *options, check=False)
    assert refused.returncode != 0
    assert f"{before.split()[0]} is the oldest release that has served on node6" in " ".join(refused.stdout.split())
    assert node.check_output(look) == before


def test_a_node_at_another_address_keeps_its_users(
    residents: Any, fleet: Any, plan: Any, run: Any, watch: Any, reach: Any
) -> None:
    """A new host is built while the old one still serves; then the line in the inventory changes."""
    uprooted = frozenset(user for user, homes in residents.homes().items() if homes == {"node2-1"})
    assert uprooted
    fleet.prepare("replacement", "198.51.100.22")
    run("molecule/shared/create.yml")
    fleet.move("node2", "198.51.100.22")
    fleet.prepare("retired", "198.51.100.12")
    expected = plan()
    assert expected.moves == {}
    judge = watch()
    run("site.yml")
    judge(expected, uprooted=uprooted)
    judge = watch()
    switched_off = time.monotonic()
    reach("retired").run("systemctl poweroff")
    residents.wait(
        lambda: all(
            connection.user not in uprooted or connection.events[-1] > (switched_off, "connect")
            for connection in residents
            if connection.transports == ["websocket"]
        ),
        90,
    )
    judge(expected, uprooted=uprooted)


def test_a_node_is_removed(fleet: Any, plan: Any, run: Any, watch: Any, reach: Any) -> None:
    expected = plan("-e", "stickyring_node=node6")
    assert {node for node, _ in expected.moves.values()} == {"node6-1"}
    judge = watch()
    output = " ".join(run("playbooks/remove_node.yml", "-e", "stickyring_node=node6").split())
    judge(expected)
    assert "Delete its line" in output
    assert "Nothing of it is left on the host" in output
    node6 = reach("node6")
    assert not node6.file("/opt/stickyring-node").exists
    assert not node6.file("/etc/systemd/system/stickyring-node@.service").exists
    assert not node6.user("stickyring-node").exists
    assert not node6.process.filter(comm="stickyring")
    fleet.drop("node6")
    assert not plan().report["changes"]


def test_a_dead_node_is_removed(residents: Any, fleet: Any, plan: Any, run: Any, watch: Any, reach: Any) -> None:
    uprooted = frozenset(user for user, homes in residents.homes().items() if homes == {"node5-1"})
    assert uprooted
    expected = plan("-e", "stickyring_node=node5")
    judge = watch()
    reach("node5").run("systemctl poweroff")
    output = " ".join(run("playbooks/remove_node.yml", "-e", "stickyring_node=node5").split())
    assert "It could not be reached" in output
    judge(expected, uprooted=uprooted)
    fleet.drop("node5")


def test_a_deleted_line_takes_a_node_off_the_ring_and_reports_what_still_runs(
    residents: Any, fleet: Any, plan: Any, run: Any, watch: Any, reach: Any
) -> None:
    fleet.drop("node4")
    fleet.prepare("dropped", "198.51.100.14")
    expected = plan()
    assert {node for node, _ in expected.moves.values()} == {"node4-1"}
    judge = watch()
    output = " ".join(run("site.yml").split())
    assert "Off the ring: node4-1 at 198.51.100.14:8001" in output
    # Polling users are on their new node already; a WebSocket stays until its node ends it.
    left = {one.user for one in residents if one.transports == ["websocket"] and one.node == "node4-1"}
    assert left == set(expected.moves)
    reach("dropped").check_output("systemctl disable --now stickyring-node@1")
    judge(expected)


def test_a_killed_run_is_completed_by_the_next(fleet: Any, plan: Any, run: Any, watch: Any, interrupt: Any) -> None:
    """Meanwhile every user has a node, and users who do not move notice nothing."""
    fleet.drop("dropped", group="prepared")
    fleet.add(4)
    expected = plan()
    judge = watch()
    tasks = [
        "stickyring_node : Restart the batch",
        "stickyring_edge : Write the bootstrap",
        "stickyring_node : Ask moved users to reconnect",
    ]
    interrupt(tasks, "-i", fleet.folder, "site.yml")
    members = plan().before.members
    assert {member.name: member.health for member in members} == {f"node{i}-1": "HEALTHY" for i in (1, 2, 3, 4)}
    run("site.yml")
    judge(expected)

    expected = plan("-e", "stickyring_node=node4")
    judge = watch()
    tasks = [
        "stickyring_edge : Write the bootstrap",
        "stickyring_node : Ask moved users to reconnect",
        "stickyring_node : Remove unit, settings and releases",
    ]
    interrupt(tasks, "-i", fleet.folder, "playbooks/remove_node.yml", "-e", "stickyring_node=node4")
    assert "Nothing of it is left on the host" in " ".join(
        run("playbooks/remove_node.yml", "-e", "stickyring_node=node4").split()
    )
    judge(expected)
    fleet.drop("node4")
    assert not plan().report["changes"]


REFUSED = {
    "Name the node to remove with -e stickyring_node=NAME": [],
    "The node and every edge must be part of this run": ["-e", "stickyring_node=node3", "--limit", "edge"],
    "node9 is not in the group `nodes`, which has node1, node2, node3.": ["-e", "stickyring_node=node9"],
}


def test_a_node_that_cannot_be_removed_is_refused(fleet: Any, ansible: Any, plan: Any) -> None:
    def remove(*options: str) -> str:
        done = ansible("ansible-playbook", "-i", fleet.folder, "playbooks/remove_node.yml", *options, check=False)
        assert done.returncode != 0
        return " ".join((done.stdout + done.stderr).split())

    for message, options in REFUSED.items():
        assert message in remove(*options)
    kept = (fleet.folder / "hosts.yml").read_text()
    fleet.drop("node2")
    fleet.drop("node3")
    assert "node1 is the last node" in remove("-e", "stickyring_node=node1")
    (fleet.folder / "hosts.yml").write_text(kept)
    assert not plan().report["changes"]
