#!/usr/bin/env python3
"""Writes the roles' variables into the reference tables and the example inventory, or checks these.

A role's meta/argument_specs.yml describes each variable, for the table in its README. Its defaults/main.yml has the
default and the reason, for inventory/example. Both are between two marks; the text around them is written by hand.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).parents[1]
TABLES = tuple(sorted(folder.name for folder in (PROJECT / "roles").glob("stickyring*")))
EXAMPLES = {"stickyring_edge": "edge.yml", "stickyring_node": "nodes.yml", "stickyring_probe": "all.yml"}
TABLE_MARKS = ("<!-- Written by docs/reference.py from meta/argument_specs.yml. -->", "<!-- End of the variables. -->")
EXAMPLE_MARKS = (
    "# All settings of the role with their defaults, written by docs/reference.py from its defaults/main.yml.",
    "# End of the role's settings. What follows is yours.",
)
SET_BY_PLAYBOOKS = {"stickyring_node_prove", "stickyring_node_keep_surplus"}
"""Variables for single plays, which an inventory does not set."""
VARIABLE = re.compile(r"((?:^#.*\n)*)(^(\w+):.*(?:\n .*)*)\n", re.MULTILINE)
"""The reason for a default, the default in all its lines, and the variable's name."""
LONGEST_DEFAULT = 60
EXAMPLES_OF_USE = """
examples:
  docs/reference.py           write tables and example
  docs/reference.py --check   exit with 1 and name the files that are out of date
"""


def main() -> None:
    """Write or check; exit with 1 if a checked file is out of date."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES_OF_USE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    wanted = {PROJECT / "roles" / role / "README.md": (TABLE_MARKS, table(role)) for role in TABLES}
    folder = PROJECT / "inventory" / "example" / "group_vars"
    wanted |= {folder / file: (EXAMPLE_MARKS, example(role)) for role, file in EXAMPLES.items()}
    old = [file for file, (marks, lines) in wanted.items() if put(file, marks, lines, check=check)]
    if check and old:
        sys.exit(f"Run docs/reference.py: {', '.join(str(file.relative_to(PROJECT)) for file in old)}")


def put(file: Path, marks: tuple[str, str], lines: list[str], *, check: bool) -> bool:
    """Put the lines between the marks, unless this is only a check; return whether the file differs."""
    text = file.read_text()
    try:
        before, rest = text.split(f"{marks[0]}\n")
        _, after = rest.split(f"{marks[1]}\n")
    except ValueError:
        sys.exit(f"{file} needs each of these lines once: {marks[0]!r} and {marks[1]!r}")
    new = "\n".join([f"{before}{marks[0]}", "", *lines, "", f"{marks[1]}\n{after}"])
    if new != text and not check:
        file.write_text(new)
    return new != text


def table(role: str) -> list[str]:
    """Return the Markdown table of a role's variables."""
    specs = yaml.safe_load((PROJECT / "roles" / role / "meta" / "argument_specs.yml").read_text())["argument_specs"]
    # The role `stickyring` has no tasks of its own, and so no entry point `main`.
    described = specs["main" if "main" in specs else "preflight"]["options"]
    rows = [
        f"| `{name}` | {default_of(option)} | {html.escape(meaning_of(option), quote=False)} |"
        for name, option in options(described)
    ]
    return ["| variable | default | what it is |", "|---|---|---|", *rows]


def options(described: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every option with its name; nested ones as `listeners[].tls.key`."""
    for name, option in described.items():
        yield f"{prefix}{name}", option
        inner = "[]." if option["type"] == "list" else "."
        yield from options(option.get("options", {}), f"{prefix}{name}{inner}")


def default_of(option: dict[str, Any]) -> str:
    """Return an option's default for the table."""
    if option.get("required"):
        return "required"
    if (value := option.get("default")) is None:
        return ""
    if value == "":
        return "empty"
    text = value
    if not isinstance(value, str):
        text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return f"`{text}`" if len(text) <= LONGEST_DEFAULT else "see below"


def meaning_of(option: dict[str, Any]) -> str:
    """Return what the table says that an option means, with its choices."""
    words = " ".join(option["description"].split())
    choices = ", ".join(f"`{choice}`" for choice in option.get("choices", []))
    return f"{words} One of {choices}." if choices else words


def example(role: str) -> list[str]:
    """Return a role's defaults as comments, without those that playbooks or the role `stickyring` set."""
    composed = SET_BY_PLAYBOOKS | set(
        yaml.safe_load((PROJECT / "roles" / "stickyring" / "defaults" / "main.yml").read_text())
    )
    blocks = []
    for block in (PROJECT / "roles" / role / "defaults" / "main.yml").read_text().split("\n\n"):
        lines = [
            f"{reason}{re.sub('^', '# ', setting, flags=re.MULTILINE)}"
            for reason, setting, name in VARIABLE.findall(f"{block.rstrip()}\n")
            if name not in composed and "{{" not in setting
        ]
        blocks += ["".join(f"{line}\n" for line in lines)] if lines else []
    return "\n".join(blocks).splitlines()


if __name__ == "__main__":
    main()
