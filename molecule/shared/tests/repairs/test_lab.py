"""The lab on this machine: it has one owner, and missing parts are created again."""

import re
import subprocess
from pathlib import Path
from typing import Any

import environment
import pytest

PROJECT = Path(__file__).parents[4]


@pytest.mark.parametrize("playbook", ["create", "destroy"])
def test_another_clone_is_refused(playbook: str, inventory: Any, ansible: Any, tmp_path: Path) -> None:
    done = ansible(
        "ansible-playbook",
        "-i",
        inventory,
        f"molecule/shared/{playbook}.yml",
        "-e",
        f"stickyring_lab_owner={tmp_path}",
        check=False,
    )
    assert done.returncode != 0
    output = " ".join((done.stdout + done.stderr).split())
    assert f"The lab on this machine belongs to {PROJECT}: run `make down` there first." in output
    ansible("ansible", "-i", inventory, "all", "-m", "ansible.builtin.ping")


def test_a_host_with_a_failed_unit_is_kept(inventory: Any, ansible: Any, machine: Any) -> None:
    node = machine("node1")
    node.run("systemd-run --quiet --unit=fails --wait false")
    try:
        assert node.run("systemctl is-system-running").stdout.strip() == "degraded"
        told = ansible("ansible-playbook", "-i", inventory, "molecule/shared/create.yml").stdout
        assert set(re.findall(r"changed=(\d+)", told)) == {"0"}
    finally:
        node.run("systemctl reset-failed fails")


@pytest.mark.soak
def test_a_lab_that_lost_a_host_and_a_route_is_repaired(inventory: Any, ansible: Any, machine: Any, hosts: Any) -> None:
    subnet = environment.lab_address(inventory, 0) + "/25"
    kept = machine("node1").check_output("cat /proc/sys/kernel/random/boot_id; stat --format=%Y /proc/1")
    machine("node2").run("systemctl poweroff")
    environment.wait_until_gone(hosts["node2"].variables["stickyring_address"])
    subprocess.run(["ip", "route", "delete", "blackhole", subnet, "metric", "4000"], check=True)

    ansible("ansible-playbook", "-i", inventory, "molecule/shared/create.yml")
    again = ansible("ansible-playbook", "-i", inventory, "molecule/shared/create.yml").stdout

    assert set(re.findall(r"changed=(\d+)", again)) == {"0"}
    route = ["ip", "route", "show", "type", "blackhole", subnet]
    assert subprocess.run(route, check=True, capture_output=True, text=True).stdout
    assert machine("node1").check_output("cat /proc/sys/kernel/random/boot_id; stat --format=%Y /proc/1") == kept
    assert not machine("node2").file("/opt/stickyring-node").exists, "node2 was not created again"
    ansible("ansible-playbook", "-i", inventory, "site.yml")
    assert machine("node2").service("stickyring-node@1").is_running
