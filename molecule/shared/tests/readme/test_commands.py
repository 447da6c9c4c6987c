"""The commands of the README, run as an operator types them."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[4] / "README.md"


def operating_commands() -> list[list[str]]:
    section = README.read_text().split("## Operate")[1].split("\n## ")[0]
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^\$ (.+)$", section, re.M)]
    # After a first deployment there is nothing to roll back to: the suite `operations` tests that.
    return [command for command in commands if "playbooks/rollback.yml" not in command]


@pytest.mark.parametrize("command", operating_commands(), ids=" ".join)
def test_it_succeeds_on_a_deployed_inventory(command: list[str], inventory: Any, ansible: Any, edge_url: Any) -> None:
    program, *arguments = command
    arguments = [edge_url("sticky") if word == "http://198.51.100.10:9002" else word for word in arguments]
    if program == "ansible-playbook" or arguments == ["status"]:
        arguments += ["-i", inventory]
    output = ansible(program, *arguments).stdout
    if program == "ansible-playbook":
        assert set(re.findall(r"changed=(\d+)", output)) == {"0"}, output
