#!/usr/bin/env python3
"""Runs the scenarios, and writes what each suite proves and how long it takes into molecule/README.md.

One that measures runs alone. Then two run at any time, each on a lab of its own: one by itself mostly waits.

Of those that were not run, the table keeps the rows. In a soak (molecule/soak.py) the suites run every test, and the
README is not changed.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import longrun

MOLECULE = Path(__file__).parent
README = MOLECULE / "README.md"
ARTIFACTS = MOLECULE.parent / ".artifacts"
SUITES = ARTIFACTS / "suites.jsonl"
ALONE = ("failover",)
"""Measures for how long users notice a fault: while other scenarios take the processors, that would be longer."""
SAME_HOSTS = ("default", "gallery", "scale")
"""Scenarios that deploy inventory/lab, on the same hosts; each first brings them to the inventory's state.

`scale` is last, because it leaves other hosts than it was given.
"""
AFTER = ("debian12",)
"""On the same lab, with hosts of its own."""
BESIDE = ("operations",)
"""On the second lab."""
EVERY = (*ALONE, *SAME_HOSTS, *AFTER, *BESIDE)
SLOWEST = 10
MARKS = ("<!-- The table is written by `make molecule`. -->", "<!-- End of the table. -->")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
ACTION = re.compile(r"^INFO +(?P<scenario>\S+) ➜ (?P<action>\S+): (?P<state>Executing|Executed)")
FAILED_TEST = re.compile(r"(FAILED|ERROR) .*::.*")
REASON = re.compile(r"(?<!\S)E  +\S.*")
FAILED_TASK = re.compile(r"fatal: .*")
TASKS_WORDS = re.compile(r"(msg|stderr|stdout): .*")
LINES_OF_A_REASON = 12
LINES_OF_A_TASK = 60
EXAMPLES = """
examples:
  make molecule                          all of them
  molecule/scenarios.py operations       one, on hosts that it creates and removes
"""
WHAT_ACTIONS_DO = {
    "create": "Makes the hosts.",
    "prepare": "Builds what only this scenario deploys.",
    "check": "`site.yml --check` works on hosts on which nothing is installed.",
    "converge": "`site.yml` deploys everything, and real clients prove that every user stays on one node.",
    "idempotence": "`site.yml` changes nothing the second time.",
    "destroy": "Removes the hosts.",
}


class Row(NamedTuple):
    """One line of the table: what it proves, in how many tests and seconds."""

    scenario: str
    step: str
    proves: str
    tests: int
    seconds: float


def main() -> None:
    """Run the scenarios; exit with the status of the first command that fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"{', '.join(EVERY)}; without any, all")
    chosen = parser.parse_args().scenarios
    if unknown := set(chosen).difference(EVERY):
        parser.error(f"no scenario: {', '.join(sorted(unknown))}; there are {', '.join(EVERY)}")
    longrun.heed_interrupts()
    ARTIFACTS.mkdir(exist_ok=True)
    SUITES.unlink(missing_ok=True)
    first = Lab("first", [["test", "--shared-state", *named(SAME_HOSTS)], ["test", *named(AFTER)]])
    second = Lab("second", [["test", *named(BESIDE)]])
    # A demo may be running on these hosts.
    alone = Lab("only", [["destroy", *named(["default"])], *(["test", *named([one])] for one in chosen or ALONE)])
    try:
        rows = play_side_by_side([alone])
        rows += [] if chosen else play_side_by_side([first, second])
    except Failed as failed:
        print("\n==> What failed:", *failures(failed.log.read_text().splitlines()), sep="\n")
        sys.exit(failed.status)
    tests = [json.loads(line) for line in SUITES.read_text().splitlines()]
    if "STICKYRING_SOAK" not in os.environ:
        write(rows + [suite_row(one) for one in tests], chosen or EVERY)
    slowest = sorted((step for one in tests for step in one["steps"]), key=lambda step: -step[1])[:SLOWEST]
    print(f"\n==> The slowest {SLOWEST} tests, with their shared fixtures:")
    print(*(f"{seconds:6.1f} s  {name}" for name, seconds in slowest), sep="\n")


def named(scenarios: Iterable[str]) -> list[str]:
    """Return the options that choose the scenarios."""
    return [word for scenario in scenarios for word in ("--scenario-name", scenario)]


class Failed(Exception):
    """A command has ended with this status; its words are in the log."""

    def __init__(self, status: int, log: Path) -> None:
        super().__init__(status)
        self.status, self.log = status, log


class Lab(NamedTuple):
    """Commands of Molecule for one lab, one after the other."""

    name: str
    commands: list[list[str]]

    def play(self) -> list[Row]:
        """Run them and return their rows.

        Raises:
            Failed: one has failed, or was interrupted; no further one is run.
        """
        rows: list[Row] = []
        path = ARTIFACTS / f"molecule-{self.name}.log"
        with path.open("w") as log:
            for command in self.commands:
                status, found = play(["molecule", *command], log, f"{self.name} lab | ")
                rows += found if command[0] == "test" else []
                if status:
                    raise Failed(status, path)
        return rows


def play_side_by_side(labs: Sequence[Lab]) -> list[Row]:
    """Run the commands of all labs at the same time; return their rows.

    Raises:
        Failed: one has failed, and those on the other labs have been interrupted.
    """
    rows: list[Row] = []
    with ThreadPoolExecutor() as pool:
        begun = [pool.submit(lab.play) for lab in labs]
        try:
            for ended in as_completed(begun):
                rows += ended.result()
        except (Failed, KeyboardInterrupt):
            longrun.ignore_interrupts()
            longrun.interrupt()
            raise
    return rows


def play(command: list[str], log: TextIO, label: str) -> tuple[int, list[Row]]:
    """Run a command, show and log its output; return its status, and a row for each action but the suites."""
    rows: list[Row] = []
    began = time.monotonic()

    def hear(line: str) -> None:
        nonlocal began
        if (found := ACTION.match(COLOUR.sub("", line))) is None:
            return
        if found["state"] == "Executing":
            began = time.monotonic()
        elif (does := WHAT_ACTIONS_DO.get(found["action"])) is not None:
            rows.append(Row(found["scenario"], found["action"], does, 0, time.monotonic() - began))

    return longrun.play(command, {"COLUMNS": "200"}, hear, log, label), rows


def suite_row(suite: dict[str, Any]) -> Row:
    """Return the row of a suite from the record that its conftest.py wrote; only modules that have run count."""
    folder = MOLECULE / "shared" / "tests" / str(suite["suite"])
    modules = sorted({step.partition("::")[0] for step, _ in suite["steps"]})
    proves = " ".join(first_sentence(folder / module) for module in modules)
    return Row(str(suite["scenario"]), str(suite["suite"]), proves, len(suite["steps"]), suite["seconds"])


def first_sentence(module: Path) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(module.read_text())) or "").partition("\n")[0]


def failures(lines: list[str]) -> Iterable[str]:
    """Yield the beginning of why the first test failed, then each failed test and what failed tasks said."""
    plain = [COLOUR.sub("", line).rstrip() for line in lines]
    yield from [found[0] for line in plain if (found := REASON.search(line))][:LINES_OF_A_REASON]
    for number, line in enumerate(plain):
        if found := FAILED_TEST.search(line):
            yield found[0]
        elif found := FAILED_TASK.search(line):
            yield found[0]
            following = plain[number + 1 : number + LINES_OF_A_TASK]
            ours = itertools.takewhile(lambda line: not FAILED_TASK.search(line) and "TASK [" not in line, following)
            yield from (said[0] for line in ours if (said := TASKS_WORDS.search(line)))


def write(rows: list[Row], ran: Sequence[str]) -> None:
    """Write the table between its marks in the README; scenarios that were not run keep their rows."""
    before, _, rest = README.read_text().partition(MARKS[0])
    written, _, after = rest.partition(MARKS[1])
    for line in written.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in EVERY and cells[0] not in ran:
            rows.append(Row(cells[0], cells[1], cells[2], int(cells[3] or 0), float(cells[4])))
    table = ["| scenario | step or suite | what it proves | tests | seconds |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: EVERY.index(row.scenario)):
        table.append(f"| {row.scenario} | {row.step} | {row.proves} | {row.tests or ''} | {row.seconds:.0f} |")
    table.append(f"| all | | | {sum(row.tests for row in rows)} | {sum(row.seconds for row in rows):.0f} |")
    README.write_text("\n".join([before + MARKS[0], "", *table, "", MARKS[1]]) + after)


if __name__ == "__main__":
    main()
