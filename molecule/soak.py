#!/usr/bin/env python3
"""Runs for hours what `make test` leaves out: all tests, chaos on CPython and on PyPy, connections that stay open.

If every step succeeds, it writes docs/soak.md. A run that failed or was interrupted is continued by the next one, if
what it judges is still the same. With --check it only checks the age of that report.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import longrun
from longrun import JUDGED, git
from scenarios import EVERY

PROJECT = Path(__file__).parents[1]
REPORT = PROJECT / "docs" / "soak.md"
PYPY = PROJECT / ".artifacts" / "pypy"
DONE = PROJECT / ".artifacts" / "soak.json"
SEEDS = (1, 2, 3, 4)
PYPY_SEED = 5
SESSIONS = 500
MOST_COMMITS = 50
EXAMPLES = """
examples:
  make soak                                  15 operations per seed, connections for one hour
  make soak OPERATIONS=60 HOURS=8
  molecule/soak.py --restart                 do not continue the last run
  molecule/soak.py --check                   only check whether docs/soak.md is too old
"""


class Step(NamedTuple):
    """A command, its purpose, the inventories of its playbooks, and whether later steps need it in the same run."""

    purpose: str
    command: str
    inventory: str = "inventory/lab"
    prepares: bool = False


class Row(NamedTuple):
    """What a step took and said."""

    seconds: float
    last_line: str


def main() -> None:
    """Run, or check; exit with 1 if a step fails or the report is too old."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operations", type=int, default=15, help="operations of chaos for each seed (default 15)")
    parser.add_argument("--hours", type=float, default=1.0, help="hours for which connections stay open (default 1)")
    parser.add_argument("--restart", action="store_true", help="run steps again that the last run has completed")
    parser.add_argument("--check", action="store_true", help="only check the age of docs/soak.md")
    given = parser.parse_args()
    if given.operations < 1 or given.hours <= 0:
        parser.error("--operations and --hours: give more than 0")
    if given.check:
        sys.exit(too_old())
    longrun.heed_interrupts()
    commit, judged = longrun.committed(), longrun.judged()
    PYPY.mkdir(parents=True, exist_ok=True)
    on_pypy = {"stickyring_node_python": "pypy3", "stickyring_artifacts_python_versions": ["3.13", "pypy3.11"]}
    (PYPY / "hosts.json").write_text(json.dumps({"all": {"vars": on_pypy}}))
    if given.restart:
        DONE.unlink(missing_ok=True)
    done = completed(judged)
    rows: list[tuple[Step, Row]] = []
    for step in steps(given.operations, given.hours):
        key = f"{step.inventory} {step.command}"
        if key in done and not step.prepares:
            print(f"==> {step.purpose}: completed by the last run", flush=True)
        else:
            done[key] = run(step)
            DONE.write_text(json.dumps({"judged": judged, "rows": done}))
        rows.append((step, done[key]))
    write(rows, commit)
    DONE.unlink()


def completed(judged: str) -> dict[str, Row]:
    """Return the rows that an unfinished run has left, if it judged the same."""
    left: dict[str, Any] = json.loads(DONE.read_text()) if DONE.exists() else {}
    return {key: Row(*row) for key, row in left["rows"].items()} if left.get("judged") == judged else {}


def steps(operations: int, hours: float) -> list[Step]:
    """Return the steps in their order."""
    both = f"inventory/lab,{PYPY / 'hosts.json'}"
    url = "http://198.51.100.10:9002"
    hold = f"stickyring probe {url} --ids {SESSIONS} --connections 1 --transport websocket --hold {hours * 3600:.0f}"
    chaos = f"molecule/chaos.py --operations {operations} --seed"
    return [
        *(Step("every test of a scenario", f"molecule/scenarios.py {one}") for one in EVERY),
        Step("hosts", "ansible-playbook molecule/shared/create.yml", prepares=True),
        Step("deployed to them", "ansible-playbook site.yml", prepares=True),
        *(Step("chaos", f"{chaos} {seed}") for seed in SEEDS),
        Step("connections that stay", hold),
        Step("nodes change to PyPy", "ansible-playbook site.yml", both, prepares=True),
        Step("chaos on PyPy", f"{chaos} {PYPY_SEED}", both),
        Step("users on PyPy", f"stickyring probe {url} --ids {SESSIONS}"),
        Step("nodes change back", "ansible-playbook site.yml"),
    ]


def run(step: Step) -> Row:
    """Run a step and show its output. Exit with 1 if it fails."""
    print(f"==> {step.purpose}: {step.command}", flush=True)
    began, lines = time.monotonic(), [""]
    environment = {"STICKYRING_SOAK": "1", "ANSIBLE_INVENTORY": step.inventory}
    if longrun.play(shlex.split(step.command), environment, lines.append):
        sys.exit(f"Failed: {step.command}\ndocs/soak.md was not written. Run it again to go on with this step.")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    says = step.command.startswith(("molecule/chaos.py", "stickyring probe"))
    return Row(time.monotonic() - began, last if says else "")


def write(rows: list[tuple[Step, Row]], commit: str) -> None:
    """Write the report."""
    table = [
        f"| {step.purpose} | `{step.command}` | {row.seconds:.0f} | {row.last_line.replace('|', '/')} |"
        for step, row in rows
    ]
    REPORT.write_text(
        "\n".join(
            [
                "# Soak",
                "",
                longrun.origin("make soak", commit, sum(row.seconds for _, row in rows)),
                "Every step has succeeded; a run with a failed step writes no report.",
                "",
                "| what | command | seconds | its last line |",
                "|---|---|---|---|",
                *table,
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
