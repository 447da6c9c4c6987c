"""Shared by all parts of the benchmark: rounds within a time limit, cores, logs and progress."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


class CoresError(Exception):
    """The machine has too few cores; the text is one line."""


class Rounds:
    """Rounds of one run: `folder` has the installed contenders and the servers' logs; `limit` is in seconds.

    The process itself, which makes the load, is pinned to the first core that it may use, servers to the last.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder = folder
        self._begun = time.monotonic()
        self._limit = limit
        self._cores = sorted(os.sched_getaffinity(0))
        if len(self._cores) < 2:
            raise CoresError("two cores are needed: one for the load and one for the servers")
        self.load_core, self.server_core = self._cores[0], self._cores[-1]
        os.sched_setaffinity(0, {self.load_core})

    @contextlib.contextmanager
    def every_core(self) -> Iterator[None]:
        """Use all cores within the block, for work that is not measured."""
        os.sched_setaffinity(0, self._cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, {self.load_core})

    def left(self) -> float:
        """Return the seconds until the limit."""
        return self._begun + self._limit - time.monotonic()

    def go(self, number: int, what: str) -> Iterator[int]:
        """Count rounds, and stop before one that would exceed the limit; the first one always runs."""
        longest = 0.0
        for index in range(number):
            begun = time.monotonic()
            if index and begun + longest > self._begun + self._limit:
                self.say(f"{what}: time limit reached after {index} of {number} rounds")
                return
            self.say(f"{what}: round {index + 1} of {number}")
            yield index
            longest = max(longest, time.monotonic() - begun)

    @staticmethod
    def rotated(items: Sequence[Item], number: int) -> list[Item]:
        """Return the items in the order of a round; each round begins with another one."""
        at = number % len(items)
        return [*items[at:], *items[:at]]

    @staticmethod
    def groups(items: Sequence[Item], number: int, together: int) -> list[list[Item]]:
        """Return groups of `together` items, or of all if there are fewer, with each item in `number` groups.

        A group begins where the previous one has ended, so that items are grouped with changing others. Only the last
        group may be smaller.
        """
        size = min(together, len(items))
        turns = [*items] * number
        return [turns[at : at + size] for at in range(0, len(turns), size)]

    def log(self, name: str) -> Path:
        """Return the file for a server's output."""
        return self.folder / "logs" / f"{name}.log"

    def say(self, text: str) -> None:
        """Print the progress of the run."""
        print(f"{time.monotonic() - self._begun:6.0f} s  {text}", file=sys.stderr, flush=True)
