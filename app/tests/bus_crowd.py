"""Many users, and a check of what they hear: numbered events, each once, in order, without a gap unknown to them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("listening_crowd.mjs")


@dataclass
class History:
    """What went wrong for users, and how often they went on with their session or were told that they did not."""

    gaps: int = 0
    repeated: int = 0
    heard: int = 0
    recovered: int = 0
    not_recovered: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, heard: Iterable[list[Any]]) -> None:
        """Add one user: ["connect", RECOVERED], or ["numbered", ROOM, NUMBER], with numbers from 1 on for each room."""
        last: dict[str, int] = {}
        told: set[str] = set()
        first = True
        for event in heard:
            if event[0] == "connect":
                self.recovered += bool(event[1])
                self.not_recovered += not event[1] and not first
                told = {*last} if not event[1] else told
                first = False
                continue
            _, room, number, *_ = event
            self.heard += 1
            before = last.get(room)
            if before is not None and number <= before:
                self.repeated += 1
                self.faults.append(f"{room}: {number} after {before}")
            elif before is not None and number != before + 1 and room not in told:
                self.gaps += 1
                self.faults.append(f"{room}: {number} after {before}")
            told.discard(room)
            last[room] = max(number, before or 0)


class Crowd:
    """JavaScript clients in one process, which go from one URL to the next when they lose their connections."""

    def __init__(self, package: Path, count: int, urls: list[str]) -> None:
        command = ["node", str(PROGRAM), str(package), str(count), *urls]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline()) == {"connected": count}

    def lose(self, count: int) -> None:
        """Have some of them lose their connections."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()

    def end(self) -> History:
        """End them; return what they have heard."""
        output, _ = self._process.communicate(timeout=20)
        history = History()
        for line in output.splitlines():
            history.add(json.loads(line))
        return history
