#!/usr/bin/env python3
"""Runs for hours what `make test` leaves out: all tests, chaos on CPython and on PyPy, connections that stay open.

If every step succeeds, it writes docs/soak.md. With --check it only checks the age of that report.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import longrun
from longrun import JUDGED, git

PROJECT = Path(__file__).parents[1]
REPORT = PROJECT / "docs" / "soak.md"
PYPY = PROJECT / ".artifacts" / "pypy"
SEEDS = (1, 2, 3, 4)
PYPY_SEED = 5
SESSIONS = 500
MOST_COMMITS = 50
EXAMPLES = """
examples:
  make soak                                  15 operations per seed, connections for one hour
  make soak OPERATIONS=60 HOURS=8
  molecule/soak.py --check                   only check whether docs/soak.md is too old
"""


class Step(NamedTuple):
    """A command, its purpose, and the inventories of its playbooks."""

    purpose: str
    command: str
    inventory: str = "inventory/lab"


def main() -> None:
    """Run, or check; exit with 1 if a step fails or the report is too old."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operations", type=int, default=15, help="operations of chaos for each seed (default 15)")
    parser.add_argument("--hours", type=float, default=1.0, help="hours for which connections stay open (default 1)")
    parser.add_argument("--check", action="store_true", help="only check the age of docs/soak.md")
    given = parser.parse_args()
    if given.operations < 1 or given.hours <= 0:
        parser.error("--operations and --hours: give more than 0")
    if given.check:
        sys.exit(too_old())
    longrun.heed_interrupts()
    commit, began = longrun.committed(), time.monotonic()
    PYPY.mkdir(parents=True, exist_ok=True)
    on_pypy = {"stickyring_node_python": "pypy3", "stickyring_artifacts_python_versions": ["3.13", "pypy3.11"]}
    (PYPY / "hosts.json").write_text(json.dumps({"all": {"vars": on_pypy}}))
    rows = [row(step) for step in steps(given.operations, given.hours)]
    write(rows, commit, time.monotonic() - began)


def steps(operations: int, hours: float) -> list[Step]:
    """Return the steps in their order."""
    both = f"inventory/lab,{PYPY / 'hosts.json'}"
    url = "http://198.51.100.10:9002"
    hold = f"stickyring probe {url} --ids {SESSIONS} --connections 1 --transport websocket --hold {hours * 3600:.0f}"
    chaos = f"molecule/chaos.py --operations {operations} --seed"
    return [
        Step("every test of all suites", "molecule/scenarios.py"),
        Step("hosts", "ansible-playbook molecule/shared/create.yml"),
        Step("deployed to them", "ansible-playbook site.yml"),
        *(Step("chaos", f"{chaos} {seed}") for seed in SEEDS),
        Step("connections that stay", hold),
        Step("nodes change to PyPy", "ansible-playbook site.yml", both),
        Step("chaos on PyPy", f"{chaos} {PYPY_SEED}", both),
        Step("users on PyPy", f"stickyring probe {url} --ids {SESSIONS}"),
        Step("nodes change back", "ansible-playbook site.yml"),
    ]


def row(step: Step) -> str:
    """Run a step and show its output; return its row of the table. Exit with 1 if it fails."""
    print(f"==> {step.purpose}: {step.command}", flush=True)
    began, lines = time.monotonic(), [""]
    environment = {"STICKYRING_SOAK": "1", "ANSIBLE_INVENTORY": step.inventory}
    if longrun.play(shlex.split(step.command), environment, lines.append):
        sys.exit(f"Failed: {step.command}\ndocs/soak.md was not written.")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    said = last if step.command.startswith(("molecule/chaos.py", "stickyring probe")) else ""
    return f"| {step.purpose} | `{step.command}` | {time.monotonic() - began:.0f} | {said.replace('|', '/')} |"


def write(rows: list[str], commit: str, seconds: float) -> None:
    """Write the report."""
    REPORT.write_text(
        "\n".join(
            [
                "# Soak",
                "",
                longrun.origin("make soak", commit, seconds),
                "Every step has succeeded; a run with a failed step writes no report.",
                "",
                "| what | command | seconds | its last line |",
                "|---|---|---|---|",
                *rows,
                "",
            ]
        )
    )


def too_old() -> str | None:
    """Return a message if the report is missing or too old, else None."""
    found = re.search(r", commit ([0-9a-f]+),", REPORT.read_text()) if REPORT.exists() else None
    if found is None:
        return "docs/soak.md is missing or names no commit: run `make soak`"
    if not (PROJECT / ".git").exists() or git("rev-parse", "--is-shallow-repository") == "true":
        print("The age of docs/soak.md is not checked: the commit is not in this clone's history.")
        return None
    commits = int(git("rev-list", "--count", f"{found[1]}..HEAD", "--", *JUDGED))
    if commits > MOST_COMMITS:
        age = f"docs/soak.md is {commits} commits to {', '.join(JUDGED)} old"
        return f"{age}, more than {MOST_COMMITS}: run `make soak`"
    return None


if __name__ == "__main__":
    main()
