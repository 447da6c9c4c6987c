"""Each bad inventory ends the run with a sentence that names the fault, before any host is touched."""

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
class Judgement:
    """How a run ended, what it said, and whether it got as far as the first host."""

    passed: bool
    said: str
    reached: bool


@pytest.fixture
def judge(inventory: Path, ansible: Any, tmp_path: Path) -> Any:
    """Writes an inventory that differs from the lab's in its hosts and variables, and has site.yml judge it."""

    def run(hosts: str, *options: str, **group_variables: str) -> Judgement:
        copy = tmp_path / "inventory"
        shutil.copytree(inventory, copy)
        (copy / "hosts.yml").write_text(hosts)
        for group, text in group_variables.items():
            with (copy / "group_vars" / f"{group}.yml").open("a") as file:
                file.write(text)
        done = ansible("ansible-playbook", "-i", copy, "site.yml", "--check", "--tags", "always", *options, check=False)
        output = done.stdout + done.stderr
        return Judgement(
            passed=done.returncode == 0,
            said=" ".join(output.split()),
            reached="Find what each node needs" in output,
        )

    return run


def test_the_good_inventory_passes(judge: Any) -> None:
    judgement = judge(HOSTS)
    assert judgement.passed, judgement.said
    assert judgement.reached


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
def test_a_bad_inventory_is_named(judge: Any, hosts: str, message: str) -> None:
    refused(judge(hosts), message)


def test_a_bad_hash_policy_is_named(judge: Any) -> None:
    judgement = judge(HOSTS, edge="stickyring_edge_hash_policies: [{query_param: {name: u}}]\n")
    refused(judgement, "edge1: stickyring_edge_hash_policies: a hash policy has one of")


def test_too_old_an_ansible_is_named(judge: Any) -> None:
    refused(judge(HOSTS, "--extra-vars", "stickyring_ansible_version=99.0"), "is too old: 99.0 or newer is needed")


def refused(judgement: Judgement, message: str) -> None:
    assert not judgement.passed
    assert message in judgement.said
    assert not judgement.reached
