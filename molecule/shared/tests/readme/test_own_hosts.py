"""The README's steps for your own inventory, with the lab's hosts."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).parents[4]
SECTION = (PROJECT / "README.md").read_text().split("## Your application on your machines")[1].split("\n### ")[0]


@pytest.fixture(scope="module")
def commands() -> Iterator[str]:
    """The commands of that section in their order, with the lab's addresses."""
    return iter(re.findall(r"^\$ (.+)$", SECTION.replace("192.0.2.", "198.51.100."), re.M))


@pytest.fixture(scope="module")
def production(inventory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The copy of the example inventory, with the lab's addresses, user and key."""
    lab = yaml.safe_load((inventory / "group_vars" / "all.yml").read_text())
    copy = tmp_path_factory.mktemp("own") / "production"
    shutil.copytree(PROJECT / "inventory" / "example", copy)
    for file in (copy / "hosts.yml", copy / "group_vars" / "all.yml"):
        file.write_text(
            file.read_text().replace("192.0.2.", "198.51.100.").replace("user: admin", f"user: {lab['ansible_user']}")
        )
    with (copy / "group_vars" / "all.yml").open("a") as file:
        file.write(f"ansible_ssh_private_key_file: {lab['ansible_ssh_private_key_file']}\n")
        file.write(f"ansible_ssh_common_args: -o UserKnownHostsFile={copy.parent}/known_hosts\n")
        # An SSH connection that another run left open would not check the host key.
        file.write("ansible_ssh_args: -o ControlPath=none\n")
    return copy


def test_the_steps_up_to_a_deployment(commands: Iterator[str], production: Path, ansible: Any) -> None:
    """A host whose key is not recorded is refused."""
    inventory = ["-i", production]
    assert next(commands) == "make controller"
    assert next(commands) == ". .venv/bin/activate"
    assert next(commands) == "cp -r inventory/example inventory/production"
    assert next(commands) == "export ANSIBLE_INVENTORY=$PWD/inventory/production"
    scan, _, file = next(commands).partition(" >> ")
    assert file == "~/.ssh/known_hosts"
    program, *ping = shlex.split(next(commands))
    assert program == "ansible"
    refused = ansible(program, *ping, *inventory, check=False)
    assert "Host key verification failed" in refused.stdout + refused.stderr
    keys = subprocess.run(shlex.split(scan), capture_output=True, text=True, check=True).stdout
    (production.parent / "known_hosts").write_text(keys)
    assert ansible(program, *ping, *inventory).stdout.count("pong") == 4
    program, *preflight = shlex.split(next(commands))
    ansible(program, *preflight, *inventory)
    assert next(commands) == "ansible-playbook site.yml"
