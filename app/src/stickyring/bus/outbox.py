"""What a process has published and not yet read back from the stream."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from stickyring.bus.entry import Entry

MOST_ENTRIES = 10_000
MOST_BYTES = 32 * 1024 * 1024
BATCH_ENTRIES, BATCH_BYTES = 500, 1024 * 1024
ENTRY_BYTES = 700
"""What an entry takes beside its data."""


class BusFullError(Exception):
    """The bus is away or too slow, and what waits for it has reached its bound: the event was not accepted."""


class Unread(NamedTuple):
    """An entry, what Redis will store of it, its size in memory in bytes, and since when it waits."""

    entry: Entry
    fields: list[str | bytes]
    size: int
    since: float


class Outbox:
    """Bounded; in order. An entry stays until this process has read it from the stream, and is written again if the bus
    may have lost it: the bus itself ignores a number that it has. Meanwhile its position is known, if the bus told it.

    `last` is the number of the newest entry, `read` that of the newest one that the stream is known to have.
    """

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.last = 0
        self.read = 0
        self._written = 0
        self._positions: dict[int, str] = {}
        self._waiting: deque[Unread] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, kind: str, header: dict[str, object], data: str = "", attachments: tuple[bytes, ...] = ()) -> Entry:
        """Add an entry, and return it.

        Raises:
            BusFullError: the bound is reached.
            TypeError: the header, such as a room, cannot be written as JSON.
        """
        entry = Entry(kind, self.origin, self.last + 1, header, data, attachments)
        fields = entry.fields()
        size = ENTRY_BYTES + sum(map(len, fields))
        if len(self._waiting) >= MOST_ENTRIES or self._bytes + size > MOST_BYTES:
            raise BusFullError(f"{len(self._waiting)} events wait for the bus")
        self.last += 1
        self._bytes += size
        self._waiting.append(Unread(entry, fields, size, time.monotonic()))
        return entry

    def unwritten(self) -> list[tuple[Entry, list[str | bytes]]]:
        """Return the oldest entries that are not written, and their fields, as many as are written in one go."""
        size = 0
        found: list[tuple[Entry, list[str | bytes]]] = []
        for one in itertools.islice(self._waiting, max(0, self._written - self.read), None):
            size += one.size
            if found and (size > BATCH_BYTES or len(found) == BATCH_ENTRIES):
                break
            found.append((one.entry, one.fields))
        return found

    def wrote(self, number: int, positions: Sequence[bytes] = ()) -> None:
        """Note that the bus has accepted the entries up to this number, the last ones at these positions."""
        self._written = max(self._written, number)
        numbers = range(number - len(positions) + 1, number + 1)
        # It may have read some of them already.
        self._positions |= {one: at.decode() for one, at in zip(numbers, positions, strict=True) if one > self.read}

    def rewrite(self) -> None:
        """Write all again that has not been read: the bus may have lost it."""
        self._written = self.read

    def note_loss(self) -> None:
        """Note in each entry where the stream had it before it lost it: somebody may have got it there."""
        for index, one in enumerate(self._waiting):
            if (position := self._positions.pop(one.entry.number, None)) is not None:
                one.entry.header.setdefault("l", position)
                self._waiting[index] = one._replace(fields=one.entry.fields())

    def read_back(self, number: int) -> None:
        """Forget the entries up to this number: the stream has them."""
        while self._waiting and self._waiting[0].entry.number <= number:
            gone = self._waiting.popleft()
            self._bytes -= gone.size
            self._positions.pop(gone.entry.number, None)
        self.read = max(self.read, number)

    def after(self, number: int) -> Iterator[Entry]:
        """Yield the entries with higher numbers."""
        yield from [one.entry for one in self._waiting if one.entry.number > number]

    @property
    def age(self) -> float:
        """Seconds since the oldest entry was added; 0 without any."""
        return time.monotonic() - self._waiting[0].since if self._waiting else 0.0
