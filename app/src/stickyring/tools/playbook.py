"""Runs a playbook of this project for a command, which then reads what the playbook has written."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

BANNER = re.compile(r"^REASON \*+$", re.MULTILINE)
"""The line before the reasons at the end of a failed run, by plugins/callback/reason.py."""


class Unknown(click.ClickException):
    """The answer cannot be found."""

    exit_code = 2


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the option `inventory`, and `options` for ansible-playbook after `--`."""
    inventory = click.option(
        "-i",
        "--inventory",
        type=click.Path(exists=True),
        help="As for ansible-playbook. [default: ANSIBLE_INVENTORY, else that of ansible.cfg]",
    )
    options = click.argument("options", metavar="[-- OPTIONS]", nargs=-1, type=click.UNPROCESSED)
    return options(inventory(command))


def play(name: str, variables: Mapping[str, Any], inventory: str | None, options: Sequence[str]) -> None:
    """Run playbooks/<name>.yml of the clone in the current folder, or else stickyring.fleet.<name> of the collection.

    Raises:
        Unknown: the playbook is not found or has failed.
    """
    in_clone, installed = Path("playbooks", f"{name}.yml"), f"stickyring.fleet.{name}"
    playbook = str(in_clone) if in_clone.is_file() else installed
    command = [str(Path(sys.executable).with_name("ansible-playbook")), playbook]
    command += ["--extra-vars", json.dumps(variables)]
    command += ["--inventory", inventory] if inventory else []
    command += options
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unknown(f"cannot run {command[0]}: {error.strerror}") from None
    if done.returncode and f"{installed} could not be found" in done.stderr:
        raise Unknown(
            f"there is no {in_clone} here, and the collection stickyring.fleet is not installed: run this in the"
            " clone's folder, or install the collection"
        )
    if done.returncode:
        said = (done.stdout + done.stderr).strip()
        raise Unknown(f"{playbook} failed:\n{BANNER.split(said)[-1].strip() or said}")
