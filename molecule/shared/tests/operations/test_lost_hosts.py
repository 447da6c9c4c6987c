"""A host that freezes or vanishes ends a run within a minute, and no other host is changed after that."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

ENDED_SECONDS = 60
ENVIRONMENT = "cat /etc/stickyring-node/1.env"
FAULTS = {
    "freezes": (["pause", "{}"], ["unpause", "{}"]),
    # The link stays up: if it went down, the host would lose its default route for good.
    "vanishes": (
        ["exec", "{}", "ip", "rule", "add", "pref", "1", "blackhole"],
        ["exec", "{}", "ip", "rule", "del", "pref", "1"],
    ),
}


@pytest.fixture
def lost(podman: Any) -> Callable[[str, str], AbstractContextManager[None]]:
    """Freezes or disconnects a host, and brings it back after the block."""

    @contextmanager
    def lose(host: str, fault: str) -> Iterator[None]:
        begin, end = FAULTS[fault]
        podman(host, begin)
        try:
            yield
        finally:
            podman(host, end)

    return lose


@pytest.mark.parametrize(("fault", "playbook"), [("freezes", "playbooks/rolling_update.yml"), ("vanishes", "site.yml")])
def test_a_node_that_is_lost_in_its_restart_ends_the_run_and_the_next_run_completes_it(
    lost: Any,
    started: Any,
    run: Any,
    machine: Any,
    inventory: Path,
    serving: Any,
    nodes: Any,
    fault: str,
    playbook: str,
) -> None:
    first, *others = [node.name for node in nodes]
    setting = f"stickyring_node_environment={{{{ {{'LOST': '{fault}'}} }}}}"
    before = serving()
    with started("ansible-playbook", "-i", inventory, playbook, "-e", setting) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if "stickyring_node : Restart the batch]" in line:
                break
        with lost(first, fault):
            since = time.monotonic()
            said += process.stdout.readlines()
            assert process.wait() != 0, said
            assert time.monotonic() - since < ENDED_SECONDS, said
    reason, ended = said[-2:]
    assert f"{first} could not be reached at `stickyring.fleet.stickyring_node : " in reason
    assert "State of that host: It was being restarted" in ended
    after = serving()
    assert {name: after[name] for name in others} == {name: before[name] for name in others}
    # It is back with the new settings half applied.
    assert "LOST=" in machine(first).check_output(ENVIRONMENT)
    run("site.yml", "-e", "stickyring_node_proving_time=1")
    assert "LOST=" not in machine(first).check_output(ENVIRONMENT)
    assert {name: after[name] for name in others} == {name: serving()[name] for name in others}


def test_site_yml_changes_nothing_if_a_host_cannot_be_reached(run: Any, machine: Any, nowhere: str) -> None:
    said = run("site.yml", "-e", "stickyring_node_release=untouched", "-i", nowhere, fails=True)
    reason = said.split("REASON")[-1]
    assert "edge9 could not be reached at `Reach the host`" in reason
    assert "State of that host: Nothing was changed on any host." in reason
    assert not machine("node1").file("/opt/stickyring-node/releases/untouched").exists


def test_a_second_run_is_refused_and_the_lock_of_a_killed_run_expires(started: Any, inventory: Path, run: Any) -> None:
    with started("ansible-playbook", "-i", inventory, "site.yml") as first:
        assert any("TASK [Refuse a second run]" in line for line in first.stdout)
        assert f"Another run is changing these hosts: process {first.pid} on {os.uname().nodename}, of" in run(
            "playbooks/rebalance.yml", fails=True
        )
        first.kill()
    run("playbooks/rebalance.yml")
