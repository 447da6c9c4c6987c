"""Events between nodes: the bus as installed, and what users hear while nodes, edge and bus fail or change."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import environment
import pytest
import redis
import redis.exceptions
from bus_crowd import Crowd, Speaking
from lab_bus import (
    EVENT_SECONDS,
    ROOMS,
    SENTINEL,
    UNIT,
    USERS,
    LabBus,
    connect_users,
    metrics,
    wait_until,
    wait_until_all_are_back,
)
from stickyring.bus.emitter import BusAwayError, Emitter

NODE_UNIT = "stickyring-node@1.service"
ROUNDS = 4 if environment.SOAK else 1
MOST_EXPOSED = 2.0


@pytest.mark.once("operations")
def test_it_is_deployed_after_a_check_to_one_host(fleet: LabBus, play: Any) -> None:
    play("molecule/shared/create.yml")
    play("site.yml", "--check")
    play("site.yml")
    anonymous = redis.Redis.from_url(re.sub("//.*@", "//", fleet.url("nodes")))
    with pytest.raises(redis.AuthenticationError):
        anonymous.ping()


def test_it_becomes_three_hosts_with_tls_and_a_second_run_changes_nothing(fleet: LabBus, play: Any) -> None:
    fleet.write("bus1", "bus2", "bus3")
    play("molecule/shared/create.yml")
    play("site.yml")
    assert set(re.findall(r"changed=(\d+)", play("site.yml"))) == {"0"}
    assert "The bus on bus3 stays as it is." in play("playbooks/plan.yml")
    assert "The bus on bus3 restarts: " in play("playbooks/plan.yml", "-e", "stickyring_bus_memory_mib=300")


def test_its_services_are_sandboxed(fleet: LabBus) -> None:
    assert fleet.do("bus1", "systemctl is-system-running").strip() == "running"
    for unit in UNIT, SENTINEL:
        exposure = fleet.do("bus1", f"systemd-analyze security --no-pager {unit}")
        assert float(re.findall(r"exposure level for \S+: ([\d.]+)", exposure)[0]) <= MOST_EXPOSED
        assert fleet.do("bus1", f"systemd-analyze verify /etc/systemd/system/{unit} 2>&1") == ""


def test_an_emitter_can_publish_and_nothing_else(fleet: LabBus) -> None:
    Emitter(fleet.url("emitter")).emit("said", "from a worker", room="nobody")
    worker = fleet.client("emitter")
    for forbidden in (lambda: worker.xrange("stickyring:events"), lambda: worker.set("other", 1), worker.flushall):
        with pytest.raises(redis.exceptions.NoPermissionError):
            forbidden()
    with pytest.raises(BusAwayError, match="NoPermissionError"):
        Emitter(fleet.url("emitter"), "another", timeout=0).emit("said", "to another application")


def test_anybody_may_ask_a_sentinel_for_the_primary_and_nothing_else(fleet: LabBus) -> None:
    client = fleet.client("nodes")
    sentinel = client.connection_pool.sentinel_manager.sentinels[0]
    assert sentinel.sentinel_get_master_addr_by_name("stickyring")
    for forbidden in (
        lambda: sentinel.execute_command("SENTINEL", "FAILOVER", "stickyring"),
        lambda: sentinel.execute_command("SENTINEL", "REMOVE", "stickyring"),
        lambda: sentinel.execute_command("SENTINEL", "MASTER", "stickyring"),
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            forbidden()


def test_users_on_all_nodes_hear_an_emitter(fleet: LabBus, nodes: list[Any], edge_url: Any, javascript: Path) -> None:
    crowd = connect_users(javascript, edge_url("sticky"))
    wait_until_all_are_back(nodes)
    assert all(users for users, _ in map(metrics, nodes))
    with speak(fleet) as speaking:
        wait_until(lambda: speaking.number >= 20, "it has emitted")
    history = crowd.end()
    assert history.faults == []
    assert history.heard >= speaking.number * USERS


@pytest.mark.once("operations")
def test_a_bus_that_nodes_cannot_use_is_refused_before_any_node_changes(
    fleet: LabBus, play: Any, nodes: list[Any]
) -> None:
    before = [fleet.do(node.name, f"systemctl show --property=MainPID {NODE_UNIT}") for node in nodes]
    wrong = fleet.url("nodes").replace("of-the-nodes", "of-nobody").partition("?")[0] + "?ssl_cert_reqs=none"
    told = play("site.yml", "-e", f"stickyring_node_bus_url={wrong}", check=False)
    assert "Error: The bus does not accept the user and the password of its URL." in told
    assert "of-nobody" not in told
    assert [fleet.do(node.name, f"systemctl show --property=MainPID {NODE_UNIT}") for node in nodes] == before


@pytest.mark.once("operations")
def test_users_miss_nothing_unknowingly_whatever_fails_or_changes(
    fleet: LabBus, play: Any, nodes: list[Any], edge: Any, edge_url: Any, javascript: Path
) -> None:
    def on_node(number: int, command: str) -> Callable[[], object]:
        return lambda: fleet.do(nodes[number].name, command)

    def wait(condition: Callable[[], bool]) -> None:
        wait_until(condition, "another host is the primary")

    levels = cycle(("debug", "info"))
    crowd = connect_users(javascript, edge_url("sticky"))
    wait_until_all_are_back(nodes)
    with speak(fleet) as speaking:
        for change in ROUNDS * (
            *(on_node(number, f"systemctl kill --signal KILL {NODE_UNIT}") for number in range(len(nodes))),
            *(partial(fault, wait) for fault in (fleet.restart, fleet.kill, fleet.stop, fleet.freeze, fleet.wipe)),
            lambda: fleet.do(edge.name, "systemctl restart stickyring-edge"),
            on_node(0, f"systemctl restart {NODE_UNIT}"),
            lambda: play("playbooks/rolling_update.yml", "-e", f"stickyring_node_log_level={next(levels)}"),
        ):
            change()
            wait_until_all_are_back(nodes)
    check_that_nobody_missed_anything(crowd, speaking)


@pytest.mark.once("operations")
def test_events_outlive_a_power_cut_of_all_and_an_empty_disk_of_the_primary(fleet: LabBus) -> None:
    stream = "stickyring:events"
    before, primary = len(fleet.client("nodes").xrange(stream)), fleet.primary()
    assert before
    for host in fleet.addresses:
        fleet.do(host, f"systemctl kill --signal=KILL {SENTINEL} {UNIT}; systemctl stop {SENTINEL} {UNIT}")
    fleet.do(primary, "rm -r /var/lib/stickyring-bus /var/lib/stickyring-bus-sentinel")
    for host in sorted(fleet.addresses, key=lambda name: name != primary):
        fleet.do(host, f"systemctl start --no-block {SENTINEL} {UNIT}")

    def is_served() -> bool:
        try:
            return fleet.primary() not in {primary, None} and len(fleet.client("nodes").xrange(stream)) >= before
        except redis.exceptions.RedisError:
            return False

    wait_until(is_served, "another host is the primary, with all events")


@pytest.mark.once("operations")
def test_users_miss_nothing_while_a_host_of_it_is_replaced_and_all_passwords_change(
    fleet: LabBus, play: Any, nodes: list[Any], edge_url: Any, javascript: Path
) -> None:
    leaving = fleet.primary()
    crowd = connect_users(javascript, edge_url("sticky"))
    wait_until_all_are_back(nodes)
    with speak(fleet) as speaking:
        play("playbooks/remove_bus.yml", "-e", f"stickyring_bus={leaving}")
        left = (
            "ls -d /etc/stickyring-bus /var/lib/stickyring-bus* /etc/systemd/system/stickyring-bus* 2>/dev/null | wc -l"
        )
        assert fleet.do(leaving, left).strip() == "0"
        fleet.exchange_passwords()
        play("site.yml")
        wait_until_all_are_back(nodes)
    check_that_nobody_missed_anything(crowd, speaking)


@pytest.mark.soak
def test_it_is_removed_once_no_node_uses_it(fleet: LabBus, play: Any) -> None:
    unused = ("-e", "stickyring_node_bus_url=")
    play("site.yml", *unused)
    for host in fleet.addresses:
        play("playbooks/remove_bus.yml", "-e", f"stickyring_bus={host}", *unused)
        assert "stickyring" not in fleet.do(host, "systemctl list-units --all 'stickyring-bus*'")


def speak(fleet: LabBus) -> Speaking:
    """Emits events to everybody and to the rooms."""
    return Speaking(fleet.url("emitter"), {"all": None, **ROOMS}, timeout=60, pause=EVENT_SECONDS)


def check_that_nobody_missed_anything(crowd: Crowd, speaking: Speaking) -> None:
    """Ends users who have all lost their connections at least once."""
    history = crowd.end()
    print(history)
    assert history.faults == []
    assert history.recovered >= USERS
    assert history.not_recovered <= history.recovered / 1000
    assert history.heard >= speaking.number * USERS
