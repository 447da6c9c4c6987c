"""The chaos run executes the chosen operations, and finds a planted fault."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.soak
SEED = "202"  # includes each of the operations
CHAOS = Path(__file__).parents[3] / "chaos.py"


def chaos(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, CHAOS, *options], capture_output=True, text=True, timeout=300, check=False)


def test_it_plays_its_operations_and_all_holds(run: Any) -> None:
    names = ("stop", "kill-worker", "drain", "change-edge")
    done = chaos("--seed", SEED, "--operations", "4", *[word for name in names for word in ("--only", name)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"4 operations .* [12] playbooks killed on the way", done.stdout), done.stdout
    for name in names:
        assert re.search(rf"^ +\d {name} node\d .*held", done.stdout, re.MULTILINE), done.stdout


@pytest.fixture
def without_drain(run: Any) -> Iterator[None]:
    # All nodes at once, to save time.
    options = ("-e", "stickyring_node_proving_time=1", "-e", "stickyring_share=100%")
    run("site.yml", "-e", "stickyring_node_drain_timeout=0", *options)
    yield
    run("site.yml", *options)


@pytest.mark.usefixtures("without_drain")
def test_it_finds_nodes_that_do_not_drain() -> None:
    done = chaos("--operations", "1", "--only", "stop")
    assert done.returncode == 1
    assert "has stopped before all its users had left" in done.stderr
    assert "after: stop node" in done.stderr
