"""What an update costs the users, and how the deployment of a faulty release ends.

The tests are steps: each begins with the releases that the previous one has left.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[4]
UPDATE = "playbooks/rolling_update.yml"
ARTIFACTS = PROJECT / ".artifacts" / "faulty"
FAULTY = {
    "stickyring_node_requirements": str(ARTIFACTS / "requirements.txt"),
    "stickyring_node_wheelhouse": str(ARTIFACTS / "wheelhouse.tar"),
    "stickyring_node_start_timeout": "8",
}
USERS = 20
BACK_SECONDS = 20


@pytest.fixture(scope="module", autouse=True)
def wheelhouse(ansible: Any) -> None:
    """Builds the wheelhouse with `faulty`."""
    # Not in the scenario's prepare.yml, which Molecule skips with --shared-state if it has ever run.
    projects = [str(PROJECT / "app"), str(PROJECT / "molecule/shared/faulty_application")]
    variables = {"stickyring_artifacts_directory": str(ARTIFACTS), "stickyring_artifacts_projects": projects}
    role = ["-m", "import_role", "-a", "name=stickyring_artifacts tasks_from=wheelhouse"]
    ansible("ansible", "localhost", *role, "-e", json.dumps(variables))


def faulty(fault: str) -> list[str]:
    """The options that deploy the release `faulty` with this fault; the fault is a setting."""
    return release("faulty", **FAULTY, stickyring_node_application=f"faulty:{fault}()")


def release(name: str, **variables: str) -> list[str]:
    """The options that deploy the inventory's release under another name, with further variables."""
    given = {"stickyring_node_release": name, **variables}
    return [word for key, value in given.items() for word in ("-e", f"{key}={value}")]


def test_settings_are_rolled_back_where_the_release_is_the_same(run: Any, serving: Any, machine: Any) -> None:
    options = ["--limit", "node1,edge", "-e", "stickyring_node_proving_time=1"]
    settings = "cat /etc/stickyring-node/1.env /etc/systemd/system/stickyring-node@.service"
    before, release = machine("node1").check_output(settings), serving()["node1"][0]
    changed = ["-e", "stickyring_node_environment={{ {'TITLE': 'new'} }}", "-e", "stickyring_node_drain_timeout=25"]
    run("playbooks/nodes.yml", *options, *changed)
    after = machine("node1").check_output(settings)
    assert 'TITLE="new"' in after
    told = run("playbooks/rollback.yml", *options)
    assert f"node1 serves release {release} again, with the settings that it had before" in told
    assert machine("node1").check_output(settings) == before


@pytest.mark.parametrize(
    ("name", "mode", "fewest"),
    [("second", [], 2), ("third", ["-e", "stickyring_node_surge=true"], 1)],
    ids=["restart", "surge"],
)
def test_nothing_is_lost_in_a_rolling_update(
    residents: Any, run: Any, serving: Any, name: str, mode: list[str], fewest: int
) -> None:
    before = serving()
    since = time.monotonic()
    told = run(UPDATE, *release(name, stickyring_node_proving_time="2"), *mode)
    after = serving()
    assert {release for release, _ in after.values()} == {name} != {release for release, _ in before.values()}
    assert {process for _, process in after.values()}.isdisjoint(process for _, process in before.values())
    residents.settle(BACK_SECONDS)
    disconnects = [one.count("disconnect", since) for one in residents]
    account = r"(\d+) sessions were .* asked to reconnect (\d+) times \(at most (\d+) are expected, (\d) each\)"
    sessions, asked, expected, each = map(int, re.search(account, told).groups())
    print(f"disconnects of {sessions} users: {sum(disconnects)} seen, {asked} reported, {expected} expected")
    assert sessions == len(disconnects)
    assert (expected, each) == (fewest * sessions, fewest)
    assert max(disconnects) == fewest
    assert asked == pytest.approx(sum(disconnects), rel=0.05), "the reported count is not what users have seen"
    assert not [one for one in residents if one.lost]
    assert max(one.count("failed", since) for one in residents) <= 1


@pytest.mark.parametrize(
    "faults",
    [
        {"node1": ("fails_soon_after_start", "s after it had become healthy")},
        {
            "node1": ("crashes_at_start", "this release cannot start"),
            "node2": ("never_gets_ready", "Failed with result 'timeout'"),
        },
    ],
    ids=["one node", "two at a time"],
)
def test_a_bad_release_stops_at_the_first_share(
    residents: Any, run: Any, serving: Any, faults: dict[str, tuple[str, str]]
) -> None:
    elsewhere = [one for one in residents if one.node.rpartition("-")[0] not in faults]
    before, since = serving(), time.monotonic()
    of_each_node = {name: fault for name, (fault, _) in faults.items()}
    fault = f"{{{{ {of_each_node}[inventory_hostname] | default('crashes_at_start') }}}}"
    told = run(UPDATE, *faulty(fault), "-e", f"stickyring_share={len(faults)}", fails=True)
    after = serving()
    for name, (_, said) in faults.items():
        fatal = re.findall(rf"fatal: \[{name}\]: FAILED! => ((?:(?!fatal: |PLAY RECAP).)*)", told)
        message = next(one for one in fatal if "of release faulty" in one)
        for words in ("did not become healthy", "Rolled back to release third, which serves.", said):
            assert words in message
    assert {name: release for name, (release, _) in after.items()} == dict.fromkeys(after, "third")
    assert {name for name in after if after[name] != before[name]} == set(faults)
    # Users cannot move to a node before the edge finds it healthy.
    run("playbooks/verify.yml", "playbooks/rebalance.yml")
    residents.settle(BACK_SECONDS)
    assert not [one for one in residents if one.lost]
    assert elsewhere
    assert not [one for one in elsewhere if one.count("disconnect", since)]


@pytest.mark.parametrize(
    ("application", "reason"),
    [
        ("faulty:crashes_when_loaded()", "RuntimeError: this release cannot be loaded"),
        ("faulty:never_loads()", "was not loaded within 8 s (stickyring_node_start_timeout)"),
        # app/tests/node/test_application.py has these reasons too.
        *(
            pytest.param(application, reason, marks=pytest.mark.soak)
            for application, reason in (
                ("stickyring.echo:create_asgi_application()", "it is an ASGI application, which EventletWorker"),
                ("faulty:crashes_when_loaded", "if it makes the application, write faulty:crashes_when_loaded()"),
                ("faulty:absent", "Failed to find attribute 'absent' in 'faulty'"),
                ("absent:application", "ModuleNotFoundError: No module named 'absent'"),
                ("faulty:lacks_a_package()", "ModuleNotFoundError: No module named 'database'"),
                ("faulty:has_another_async_mode()", "it asks for an async_mode whose package is not installed"),
            )
        ),
    ],
)
def test_an_application_that_cannot_be_served_stops_at_the_first_node_before_any_restart(
    residents: Any, run: Any, serving: Any, application: str, reason: str
) -> None:
    before, since = serving(), time.monotonic()
    told = run(UPDATE, *release("faulty", **FAULTY, stickyring_node_application=application), fails=True)
    assert time.monotonic() - since < 60
    assert application in told
    assert reason in told
    assert re.findall(r"fatal: \[(\w+)\]", told) == ["node1"]
    assert serving() == before
    assert not [one for one in residents if one.count("disconnect", since) or one.lost]


def test_so_does_a_worker_class_that_does_not_fit_the_application(residents: Any, run: Any, serving: Any) -> None:
    """Without a new release."""
    before, since = serving(), time.monotonic()
    told = run(UPDATE, *release("third", stickyring_node_worker_class="asgi"), fails=True)
    assert "it is a WSGI application, which AsgiWorker does not serve: set stickyring_node_worker_class" in told
    assert re.findall(r"fatal: \[(\w+)\]", told) == ["node1"]
    assert serving() == before
    assert not [one for one in residents if one.count("disconnect", since) or one.lost]


def test_a_release_that_does_not_start_in_surge_mode_affects_no_user(residents: Any, run: Any, serving: Any) -> None:
    before, since = serving(), time.monotonic()
    told = run(UPDATE, *faulty("crashes_at_start"), "-e", "stickyring_node_surge=true", fails=True)
    for words in ("of release faulty", "Rolled back to release third", "this release cannot start"):
        assert words in told
    assert serving() == before
    run(UPDATE, *release("third"))
    assert serving() == before, "the next run has restarted an unchanged node"
    assert not [one for one in residents if one.count("disconnect", since) or one.lost]


def test_a_killed_update_is_completed_by_the_next_run(
    residents: Any, run: Any, serving: Any, machine: Any, nodes: Any, inventory: Path, interrupt: Any
) -> None:
    options = [
        *release("fourth", stickyring_node_releases_kept="2", stickyring_node_proving_time="2"),
        "-e",
        "stickyring_share=2",
    ]
    tasks = ["Link the release as current", "Keep a copy of unit and environments with the release"]
    interrupt([f"stickyring_node : {task}" for task in tasks], "-i", inventory, UPDATE, *options)
    run(UPDATE, *options)
    assert {release for release, _ in serving().values()} == {"fourth"}
    for node in nodes:
        assert machine(node.name).check_output("ls /opt/stickyring-node/releases").split() == ["fourth", "third"]
    residents.settle(BACK_SECONDS)
    assert not [one for one in residents if one.lost]


def test_rollback_of_a_node_and_of_the_fleet(
    residents: Any, run: Any, serving: Any, inventory: Path, interrupt: Any
) -> None:
    options = ["-e", "stickyring_node_proving_time=2"]
    before = serving()
    told = run("playbooks/rollback.yml", "--limit", "node2,edge", *options)
    assert "node2 serves release third again" in told
    assert "so users of the other nodes are not moved. Run playbooks/rebalance.yml to move them." in told
    run("playbooks/rebalance.yml")
    residents.settle(BACK_SECONDS)
    assert any(one.node == "node2-1" for one in residents)
    after = serving()
    assert [name for name in after if after[name] != before[name]] == ["node2"]

    since = time.monotonic()
    options += ["-e", "stickyring_node_surge=true"]
    tasks = ["Restore the unit, the environments and the link of the release", "Restart the batch"]
    interrupt([f"stickyring_node : {task}" for task in tasks], "-i", inventory, "playbooks/rollback.yml", *options)
    run("playbooks/rollback.yml", *options)
    assert {release for release, _ in serving().values()} == {"third"}
    assert serving()["node2"] == after["node2"], "it was rolled back already"
    residents.settle(BACK_SECONDS)
    assert max(one.count("disconnect", since) for one in residents) == 1
    assert not [one for one in residents if one.lost]


@pytest.mark.parametrize(
    "playbook",
    [[UPDATE, *release("fourth")], pytest.param(["playbooks/rollback.yml"], marks=pytest.mark.soak)],
    ids=["update", "rollback"],
)
def test_without_an_edge_nothing_is_restarted(run: Any, serving: Any, nowhere: str, playbook: list[str]) -> None:
    before = serving()
    told = run(*playbook, "-i", nowhere, fails=True)
    assert "edge9 cannot be reached" in told
    assert "Nothing was restarted." in told
    assert serving() == before


@pytest.fixture
def unreachable(machine: Any, edge: Any, hosts: Any) -> Callable[..., AbstractContextManager[None]]:
    """Keeps the edge's host, or only Envoy, from reaching an instance for a block; the node still serves others."""

    @contextmanager
    def cut(name: str, whom: str) -> Iterator[None]:
        node, host = hosts[name].variables, machine(edge.name)
        rule = f"to {node['stickyring_address']} ipproto tcp dport {node['stickyring_node_port']} blackhole"
        if whom == "Envoy":
            uid = host.user("stickyring-edge").uid
            rule = f"uidrange {uid}-{uid} {rule}"
        host.check_output(f"ip rule add {rule}")
        try:
            yield
        finally:
            host.check_output(f"ip rule del {rule}")

    return cut


@pytest.mark.parametrize(
    ("name", "whom"),
    [("fourth", "Envoy"), pytest.param("fifth", "everybody", marks=pytest.mark.soak)],
    ids=["Envoy", "edge"],
)
def test_a_node_that_the_edge_does_not_reach_stops_the_update(
    residents: Any,
    run: Any,
    serving: Any,
    edge: Any,
    unreachable: Callable[..., AbstractContextManager[None]],
    name: str,
    whom: str,
) -> None:
    """When the node is reachable again, the same command completes the update."""
    update = [UPDATE, *release(name, stickyring_node_proving_time="1")]
    before = serving()
    with unreachable("node2", whom):
        told = run(*update, fails=True)
    assert f"{edge.name} cannot reach node2 at " in told.split("REASON")[-1]
    assert "cluster_statuses" not in told, "the message contains all of Envoy's clusters"
    stopped = serving()
    assert {node: release for node, (release, _) in stopped.items()} == {
        "node1": name,
        "node2": name,
        "node3": before["node3"][0],
    }
    assert stopped["node3"] == before["node3"]
    if whom == "everybody":
        # The release from which node3 would be rolled back has served on the other nodes too.
        refused = run("playbooks/rollback.yml", fails=True)
        assert "The nodes would not all go back to the same release" in refused
        assert serving() == stopped

    run(*update)
    after = serving()
    assert {release for release, _ in after.values()} == {name}
    assert [node for node in after if after[node] != stopped[node]] == ["node3"]
    residents.settle(BACK_SECONDS)
    assert not [one for one in residents if one.lost]
