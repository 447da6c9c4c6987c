"""A run with a bad inventory fails with a message that names the fault, before any host is contacted."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HOSTS = """\
edge:
  hosts:
    edge1: {ansible_host: 198.51.100.10}
nodes:
  hosts:
    node1: {ansible_host: 198.51.100.11}
    node2: {ansible_host: 198.51.100.12}
"""


@dataclass(frozen=True)
class Result:
    """How a run ended, its output, and whether it reached the first host."""

    passed: bool
    said: str
    reached: bool


@pytest.fixture
def check(inventory: Path, ansible: Any, tmp_path: Path) -> Any:
    """Writes an inventory that differs from the lab's in hosts and variables, and lets site.yml check it."""

    def run(hosts: str, *options: str, **group_variables: str) -> Result:
        copy = tmp_path / "inventory"
        shutil.copytree(inventory, copy)
        (copy / "hosts.yml").write_text(hosts)
        for group, text in group_variables.items():
            with (copy / "group_vars" / f"{group}.yml").open("a") as file:
                file.write(text)
        done = ansible("ansible-playbook", "-i", copy, "site.yml", "--check", "--tags", "always", *options, check=False)
        output = done.stdout + done.stderr
        return Result(
            passed=done.returncode == 0,
            said=" ".join(output.split()),
            reached="Find what each node needs" in output,
        )

    return run


def test_the_good_inventory_passes(check: Any) -> None:
    result = check(HOSTS)
    assert result.passed, result.said
    assert result.reached


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (HOSTS.split("nodes:", maxsplit=1)[0], "The group `nodes` has no host"),
        ("nodes:" + HOSTS.split("nodes:")[1], "The group `edge` has no host"),
        (HOSTS.replace("node2", "node1"), "Found duplicate mapping key 'node1'"),
        (HOSTS.replace("100.12", "100.11"), "node1 and node2 have the same address 198.51.100.11"),
        (HOSTS.replace("100.12}", "100.12, stickyring_node_name: node1}"), "node1 and node2 have the same name node1"),
        (
            HOSTS.replace("100.10}", "100.10, stickyring_edge_admin_port: 9901}"),
            "unknown variable stickyring_edge_admin",
        ),
        (HOSTS.replace("100.12}", "100.12, stickyring_node_prot: 1}"), "did you mean stickyring_node_port?"),
        (HOSTS.replace("100.12}", "100.12, stickyring_node_instances: none}"), "node2: stickyring_node_instances is"),
    ],
)
def test_a_bad_inventory_is_named(check: Any, hosts: str, message: str) -> None:
    refused(check(hosts), message)


def test_a_bad_hash_policy_is_named(check: Any) -> None:
    result = check(HOSTS, edge="stickyring_edge_hash_policies: [{query_param: {name: u}}]\n")
    refused(result, "edge1: stickyring_edge_hash_policies: a hash policy has one of")


def test_too_old_an_ansible_is_named(check: Any) -> None:
    refused(check(HOSTS, "--extra-vars", "stickyring_ansible_version=99.0"), "is too old: 99.0 or newer is needed")


def refused(result: Result, message: str) -> None:
    assert not result.passed
    assert message in result.said
    assert not result.reached
