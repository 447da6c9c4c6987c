"""Checks what users have heard: numbered events, each once, in order, without a gap that they were not told of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


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
