"""The entries that a process has read last: when many users come back at a time, each needs them."""

from __future__ import annotations

from bisect import bisect_right
from operator import itemgetter

from stickyring.bus.entry import Entry
from stickyring.bus.offset import BEGIN, Position
from stickyring.bus.outbox import ENTRY_BYTES

MOST_ENTRIES = 10_000
MOST_BYTES = 16 * 1024 * 1024


class Recent:
    """All entries after the position `since`, in order and bounded: the oldest go first."""

    def __init__(self) -> None:
        self.restart(BEGIN)

    def restart(self, position: Position) -> None:
        """Forget all, and begin after a position."""
        self.since = position
        self._entries: list[tuple[Position, Entry]] = []
        self._bytes = 0

    def add(self, position: Position, entry: Entry) -> None:
        """Add the next entry."""
        self._entries.append((position, entry))
        self._bytes += _size(entry)
        if len(self._entries) > MOST_ENTRIES or self._bytes > MOST_BYTES:
            # Many at a time, because the others move up.
            gone = len(self._entries) // 10 + 1
            self.since = self._entries[gone - 1][0]
            self._bytes -= sum(_size(one) for _, one in self._entries[:gone])
            del self._entries[:gone]

    def extend(self, since: Position, entries: list[tuple[Position, Entry]]) -> bool:
        """Add those between a position and the oldest one; return whether there is room for them."""
        size = sum(_size(one) for _, one in entries)
        if len(self._entries) + len(entries) > MOST_ENTRIES or self._bytes + size > MOST_BYTES:
            return False
        self._entries[:0] = entries
        self._bytes += size
        self.since = since
        return True

    def after(self, position: Position) -> list[tuple[Position, Entry]]:
        """Return the entries after a position, which is not before `since`."""
        return self._entries[bisect_right(self._entries, position, key=itemgetter(0)) :]


def _size(entry: Entry) -> int:
    return ENTRY_BYTES + len(entry.data) + sum(map(len, entry.attachments))
