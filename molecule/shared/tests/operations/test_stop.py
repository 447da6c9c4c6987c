"""What a stop costs the users of a node, and that the node accepts no new users while it stops."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import environment
import pytest
from stickyring.node.rebalance import HANDSHAKES_A_SECOND

UNIT = "stickyring-node@1.service"
USERS = 60
TOLD_SECONDS = 10
HEALTH_CHECK_SECONDS = 2
BACK_SECONDS = 20


def test_a_stop_moves_every_user_and_loses_no_message(residents: Any, machine: Any, run: Any, hosts: Any) -> None:
    """Two of three nodes, one after the other: the second node has the users of the first too."""
    for name in ("node3", "node2"):
        here = [one for one in residents if one.node == f"{name}-1"]
        others = [one for one in residents if one.node != f"{name}-1"]
        since = time.monotonic()
        machine(name).check_output(f"systemctl stop {UNIT}")
        assert time.monotonic() - since < hosts[name].variables["stickyring_node_drain_timeout"]
        residents.settle(BACK_SECONDS)
        for one in here:
            (told,) = (moment - since for moment, what in one.events if what == "disconnect" and moment >= since)
            assert told <= TOLD_SECONDS, one
            assert one.count("failed", since) <= 1, one
        assert not any(one.count("disconnect", since) for one in others)
        taken_in = [moment - since for one in residents for moment, node in one.welcomes if node == f"{name}-1"]
        assert max(taken_in) <= HEALTH_CHECK_SECONDS
        assert not [one for one in residents if one.lost]
    assert len(here) >= USERS

    for name in ("node3", "node2"):
        machine(name).check_output(f"systemctl start {UNIT}")
    run("playbooks/verify.yml")
    run("playbooks/rebalance.yml")
    residents.settle(BACK_SECONDS)


def test_a_drained_node_is_named(run: Any, machine: Any) -> None:
    command = "/opt/stickyring-node/current/bin/stickyring {} --control /run/stickyring-node/1/control.sock"
    machine("node3").check_output(command.format("drain"))
    try:
        for playbook, words in (
            ("playbooks/verify.yml", "node3-1: drained, so it takes no new users until `stickyring undrain`"),
            ("site.yml", "node3 is drained: it takes no new users until `stickyring undrain`"),
        ):
            assert words in run(playbook, fails=True)
    finally:
        machine("node3").check_output(command.format("undrain"))
    run("playbooks/verify.yml")
    run("playbooks/rebalance.yml")


@pytest.fixture
def switch_off(machine: Any, hosts: Any, podman: Any, run: Any) -> Iterator[Callable[[str], None]]:
    """Shuts a host down; at the end starts it, and waits until it has its users again."""
    off: list[str] = []

    def shut_down(name: str) -> None:
        machine(name).run("systemctl poweroff")
        off.append(name)

    yield shut_down
    for name in off:
        environment.wait_until_gone(hosts[name].variables["stickyring_address"])
        podman(name, ["start", "{}"])
        environment.wait_until_there(hosts[name].variables["stickyring_address"])
    run("playbooks/verify.yml")
    run("playbooks/rebalance.yml")


def test_a_host_that_shuts_down_first_moves_its_users(residents: Any, switch_off: Callable[[str], None]) -> None:
    """They leave one after another, not all when the process ends."""
    here = [one for one in residents if one.node == "node3-1"]
    others = [one for one in residents if one not in here]
    since = time.monotonic()
    switch_off("node3")
    residents.wait(lambda: all(one.count("connect", since) for one in here), BACK_SECONDS)
    for one in here:
        assert (one.count("disconnect", since), one.count("connect", since)) == (1, 1), one
        assert one.count("failed", since) <= 1, one
    left = [one.first("disconnect", since) for one in here if "websocket" in one.transports]
    # Websockets of a process that is killed end within 0.1 s.
    assert max(left) - min(left) > len(left) / HANDSHAKES_A_SECOND / 2
    assert not any(one.count("disconnect", since) for one in others)


def test_a_host_serves_again_after_a_boot_without_a_playbook(residents: Any) -> None:
    residents.settle(BACK_SECONDS)
    assert any(one.node == "node3-1" for one in residents)
    assert not [one for one in residents if one.lost]
