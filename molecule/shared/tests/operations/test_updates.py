"""What an update costs the users, and what becomes of a release that must not be deployed.

The tests are steps: each begins with the releases that the one before has left.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

UPDATE = "playbooks/rolling_update.yml"
FAULTY = {
    "stickyring_node_requirements": "{{ stickyring_project }}/.artifacts/faulty/requirements.txt",
    "stickyring_node_wheelhouse": "{{ stickyring_project }}/.artifacts/faulty/wheelhouse.tar",
    "stickyring_node_start_timeout": "15",
}
BACK_SECONDS = 20


def release(name: str, **variables: str) -> list[str]:
    """The options that deploy a release: the inventory's under another name, unless variables say otherwise."""
    given = {"stickyring_node_release": name, **variables}
    return [word for key, value in given.items() for word in ("-e", f"{key}={value}")]


def test_nothing_is_lost_in_a_rolling_update(residents: Any, run: Any, serving: Any) -> None:
    first = {release for release, _ in serving().values()}
    since = time.monotonic()
    told = run(UPDATE, *release("second"))
    assert {release for release, _ in serving().values()} == {"second"} != first
    residents.settle(BACK_SECONDS)
    disconnects = [one.count("disconnect", since) for one in residents]
    account = r"(\d+) sessions were .* asked for a reconnection (\d+) times; derived are (\d+), 2 a session"
    sessions, asked, derived = map(int, re.search(account, told).groups())
    print(f"disconnects a user: {sum(disconnects) / len(disconnects)} seen, {asked / sessions} told, {derived / sessions} derived")
    assert sessions == len(disconnects)
    assert derived == 2 * sessions
    assert max(disconnects) == 2
    assert asked == pytest.approx(sum(disconnects), rel=0.05), "what is told is not what users have seen"
    assert not [one for one in residents if one.lost]
    assert max(one.count("failed", since) for one in residents) <= 1
    assert "changed=1" not in run(UPDATE, *release("second")), "it is done again"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("crashes_at_start", "this release cannot start"),
        ("never_gets_ready", "did not become healthy"),
        ("dies_young", "after it had become healthy"),
    ],
)
def test_a_bad_release_stops_at_the_first_node(
    residents: Any, run: Any, serving: Any, nodes: Any, fault: str, said: str
) -> None:
    before, since = serving(), time.monotonic()
    told = run(UPDATE, *release(fault, **FAULTY, stickyring_node_application=f"faulty:{fault}()"), fails=True)
    after = serving()
    first = nodes[0].name
    assert told.count("FAILED! =>") + told.count("[ERROR]: Task failed") <= 2, told
    assert f"of release {fault} did not become healthy" in told
    assert "Rolled back to release second, which serves again." in told
    assert said in told
    assert {name: release for name, (release, _) in after.items()} == dict.fromkeys(after, "second")
    assert [name for name in after if after[name] != before[name]] == [first]
    run("playbooks/rebalance.yml")
    residents.settle(BACK_SECONDS)
    assert not [one for one in residents if one.lost]
    untouched = [one for one in residents if one.count("disconnect", since) == 0]
    assert len(untouched) > len(residents.users), "who was not on the first node has noticed"
    run("playbooks/verify.yml")


def test_rollback_of_a_node_and_of_the_fleet(residents: Any, run: Any, serving: Any) -> None:
    before, since = serving(), time.monotonic()
    told = run("playbooks/rollback.yml", "--limit", "node2")
    after = serving()
    assert [name for name in after if after[name] != before[name]] == ["node2"]
    first = after["node2"][0]
    assert f"node2 went back from release second to {first}" in told
    assert "node2 is the oldest" not in told

    refused = run("playbooks/rollback.yml", fails=True)
    assert f"{first} is the oldest release on node2 that has served" in refused
    assert serving() == after, "something was rolled back before the refusal"

    run("playbooks/rollback.yml", "--limit", "node1,node3,edge")
    assert {release for release, _ in serving().values()} == {first}
    run("playbooks/rebalance.yml")
    residents.settle(BACK_SECONDS)
    assert not [one for one in residents if one.lost]
    assert max(one.count("failed", since) for one in residents) <= 1


def test_old_releases_go(run: Any, serving: Any, machine: Any, nodes: Any) -> None:
    for name in ("third", "fourth"):
        run(UPDATE, *release(name, stickyring_node_releases_kept="2", share="100%"))
    assert {release for release, _ in serving().values()} == {"fourth"}
    for node in nodes:
        assert machine(node.name).check_output("ls /opt/stickyring-node/releases").split() == ["fourth", "third"]


@pytest.mark.parametrize(
    ("wanted", "playbook", "task"),
    [
        ("fifth", UPDATE, "stickyring_node : Link the release as current"),
        ("sixth", UPDATE, "stickyring_node : Keep with the release what it serves with"),
        ("sixth", "playbooks/rollback.yml", "stickyring_node : Put back unit, environments and link of the release"),
        ("sixth", "playbooks/rollback.yml", "stickyring_node : Start the instances anew"),
    ],
)
def test_what_was_killed_is_finished_by_the_next_run(
    residents: Any, run: Any, serving: Any, inventory: Path, interrupt: Any, wanted: str, playbook: str, task: str
) -> None:
    interrupt(task, "-i", inventory, playbook, *release(wanted))
    run(UPDATE, *release(wanted))
    assert {release for release, _ in serving().values()} == {wanted}
    residents.settle(BACK_SECONDS)
    assert not [one for one in residents if one.lost]
