"""Many users, and a check of what they hear: numbered events, each once, in order, without a gap unknown to them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stickyring.bus.emitter import BusAwayError, Emitter

JAVASCRIPT, PYTHON = (Path(__file__).with_name(f"listening_crowd.{kind}") for kind in ("mjs", "py"))


@dataclass
class History:
    """What went wrong for users, and how often they went on with their session or were told that they did not.

    Of the events that a user has missed, `lost` counts those without a new session in between, from which the user
    would know, and `told` the others. `late`: the most seconds from when an event was due to when a user had it.
    """

    gaps: int = 0
    lost: int = 0
    told: int = 0
    repeated: int = 0
    disordered: int = 0
    heard: int = 0
    late: float = 0.0
    recovered: int = 0
    not_recovered: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, heard: Iterable[list[Any]], *, until: int = 0) -> None:
        """Add one user: ["connect", RECOVERED], or ["numbered", ROOM, NUMBER, ...], in each room from 1 on.

        With `until`, there is only the room `all`, whose numbers end with this one, and a user who hears others than
        all of them has missed some. After NUMBER there may be when the event was due and, last, when it was heard.
        """
        last: dict[str, int] = {"all": 0} if until else {}
        missed: dict[tuple[str, int], bool] = {}
        told: set[str] = set()
        first = True
        for event in (*heard, *([["end", "all", until + 1]] if until else [])):
            if event[0] == "connect":
                self.recovered += bool(event[1])
                self.not_recovered += not event[1] and not first
                told = {*last} if not event[1] and not first else told
                first = False
                continue
            name, room, number, *more = event
            self.heard += name == "numbered"
            if len(more) > 1 and isinstance(more[0], int | float):
                self.late = max(self.late, more[-1] - more[0])
            before = last.get(room, number - 1)
            if number <= before:
                if missed.pop((room, number), None) is None:
                    self.repeated += 1
                else:
                    self.disordered += 1
                self.faults.append(f"{room}: {number} after {before}")
            elif number != before + 1:
                missed |= dict.fromkeys(((room, one) for one in range(before + 1, number)), room in told)
                if room not in told:
                    self.gaps += 1
                    self.faults.append(f"{room}: {number} after {before}")
            told.discard(room)
            last[room] = max(number, before)
        self.told += sum(missed.values())
        self.lost += len(missed) - sum(missed.values())


class Crowd:
    """Clients that go from one URL to the next when they lose their connections.

    `count` are JavaScript's, of a `package`, and as many as `python` are python-socketio's, each kind in a process.
    """

    def __init__(self, package: Path, count: int, urls: list[str], *, python: int = 0) -> None:
        programs = [(["node", str(JAVASCRIPT), str(package)], count), ([sys.executable, str(PYTHON)], python)]
        self._processes = [
            subprocess.Popen([*program, str(number), *urls], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for program, number in programs
            if number
        ]
        for process in self._processes:
            assert process.stdout is not None
            assert "connected" in process.stdout.readline()

    def lose(self, count: int) -> None:
        """Have some of each kind lose their connections."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{count}\n")
            process.stdin.flush()

    def end(self, *, until: int = 0) -> History:
        """End them; return what they have heard, of `until` events if this is known."""
        history = History()
        for process in self._processes:
            output, _ = process.communicate(timeout=20)
            for line in output.splitlines():
                history.add(json.loads(line), until=until)
        return history


class Speaking:
    """Emits numbered events, from a process that is no node; `pause`: seconds between two.

    `rooms` maps what stands in an event as its room to where it is emitted: None is everybody.
    """

    def __init__(self, url: str, rooms: Mapping[str, str | None], *, timeout: float = 30, pause: float = 0.05) -> None:
        self._emitter = Emitter(url, timeout=timeout)
        self._rooms = rooms
        self._pause = pause
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: BusAwayError | None = None
        self.number = 0

    def _run(self) -> None:
        try:
            while not self._ends.wait(self._pause):
                self.number += 1
                for name, room in self._rooms.items():
                    self._emitter.emit("numbered", (name, self.number), room=room)
        except BusAwayError as error:
            self._error = error

    def __enter__(self) -> Speaking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
