"""Which sessions of this process get an entry of the stream, and what is sent to them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stickyring.bus.entry import Encoded, Entry
from stickyring.bus.kept import Kept
from stickyring.bus.offset import BEGIN, END, Offset, Position
from stickyring.bus.outbox import Outbox

log = logging.getLogger(__name__)

AHEAD_SECONDS = 1.0
"""A node delivers its own events itself when the bus has had no turn for so long."""
MOST_ORIGINS = 10_000
"""Of which a process remembers the number of the last entry; those that have written nothing for longest go first."""


@dataclass
class Counts:
    """What has happened in this process: published, delivered (to sessions) and late events, outages, holes (times at
    which the stream had lost entries), recovered sessions, and those that could not be recovered, by reason."""

    published: int = 0
    refused: int = 0
    read: int = 0
    sent: int = 0
    ahead: int = 0
    outages: int = 0
    holes: int = 0
    recovered: int = 0

    def __post_init__(self) -> None:
        self.not_recovered: dict[str, int] = {}


class Router:
    """The state of one process between its outbox, the stream, and its sessions; it waits for nothing.

    `position`: the last entry read; None before the first contact with the bus. `epoch` names the stream's history.
    `kept`: by namespace and sid, the sessions that can be recovered, if `recovers`. `arriving`: by Engine.IO id and
    namespace, recovered sessions that are about to begin. `delivered`: the number of the last own entry delivered here.
    """

    def __init__(self, manager: Any, outbox: Outbox, *, recovers: bool) -> None:  # noqa: ANN401 - untyped
        self._manager = manager
        self.outbox = outbox
        self.recovers = recovers
        self.position: Position | None = None
        self.epoch = ""
        self.kept: dict[tuple[str, str], Kept] = {}
        self.arriving: dict[tuple[str, str], Kept] = {}
        self.counts = Counts()
        self.delivered = 0
        self._numbers: dict[str, int] = {}
        self._read_before: dict[str, int] = {}

    @property
    def now(self) -> Position:
        """The last entry read, or the beginning."""
        return self.position or BEGIN

    @property
    def alone(self) -> bool:
        """Whether own events are to be delivered without waiting for the bus any longer."""
        return self.outbox.age > AHEAD_SECONDS or self.delivered > self.outbox.read

    def entries_ahead(self) -> Iterator[Entry]:
        """Yield the own entries to deliver now because the bus is away; each once."""
        for entry in self.outbox.after(self.delivered):
            self.delivered = entry.number
            self.counts.ahead += 1
            yield entry

    def arrives(self, position: Position, entry: Entry) -> bool:
        """Note an entry of the stream; return whether it is to be delivered here."""
        self.position = position
        self.counts.read += 1
        # What is written again has lower ones.
        self._numbers[entry.origin] = max(entry.number, self._numbers.pop(entry.origin, 0))
        if len(self._numbers) > MOST_ORIGINS:
            del self._numbers[next(iter(self._numbers))]
        if entry.origin != self.outbox.origin:
            # What this process had read before the stream lost it, its writer may not have read back, and writes again.
            return entry.number > self._read_before.get(entry.origin, 0)
        self.outbox.read_back(entry.number)
        if entry.number <= self.delivered:
            return False
        self.delivered = entry.number
        return True

    def go_on_at(self, end: Position, epoch: str) -> None:
        """Read on at the end of a stream that has lost entries."""
        self.position, self.epoch = end, epoch
        self._read_before = {**self._numbers}

    def go_on(self, kept: Kept, entries: list[tuple[Position, Entry]], reached: Position, written: int) -> None:
        """Prepare a recovered session.

        `entries` are all between what it has got and `reached`, the end of the stream, which this process may not have
        read yet. `written`: the number of the last own entry in the stream before these were read.
        """
        ahead = {} if kept.has is None else {**kept.has.ahead}
        packet_class = self._manager.server.packet_class
        for position, entry in entries:
            if kept.replay(entry, position):
                kept.sends(str(Offset(position, ahead)), position)
                kept.missed.append(Encoded(entry, packet_class).packets(kept.sent))
        for _, entry in entries:
            if entry.origin == self.outbox.origin:
                written = max(written, entry.number)
            if ahead.get(entry.origin, entry.number + 1) <= entry.number:
                del ahead[entry.origin]
        if written > self.outbox.read:
            # This process has not read them yet, and may deliver them without the bus.
            ahead[self.outbox.origin] = max(written, ahead.get(self.outbox.origin, 0))
        kept.has = Offset(reached if kept.has is None else max(reached, kept.has.position), ahead)
        # Own events that are delivered, and not in the stream yet.
        for entry in self.outbox.after(written):
            if entry.number <= self.delivered and kept.replay(entry, END):
                kept.sends(str(Offset(kept.has.position, ahead | {entry.origin: entry.number})), kept.has.position)
                kept.missed.append(Encoded(entry, packet_class).packets(kept.sent))

    def sendings(self, entry: Entry, position: Position | None) -> Iterator[tuple[str, list[Any]]]:
        """Yield the Engine.IO id of each session that an event is for, and the packets to send to it."""
        header, manager = entry.header, self._manager
        event = Encoded(entry, manager.server.packet_class)
        namespace, skipped = header["n"], header.get("x", ())
        offset, lost = str(self._offset()), entry.lost_at
        # The generator of python-socketio yields from a copy.
        for sid, engine_sid in manager.get_participants(namespace, header.get("r")):
            if sid in skipped:
                continue
            self.counts.sent += 1
            kept = self.kept.get((namespace, sid)) if self.recovers else None
            if kept is None:
                yield engine_sid, event.packets()
                continue
            if kept.given_up or lost <= kept.had:
                continue
            if kept.has is not None and kept.has.covers(position, entry.origin, entry.number):
                continue
            kept.sends(offset if kept.has is None else str(self._offset_of(kept, kept.has)), self.now)
            packets = event.packets(kept.sent)
            if kept.held is None:
                yield engine_sid, packets
            else:
                kept.held.append(packets)

    def _offset(self) -> Offset:
        """Return what a session has got when it has got all that this process has delivered."""
        ahead = {self.outbox.origin: self.delivered} if self.delivered > self.outbox.read else {}
        return Offset(self.now, ahead)

    def _offset_of(self, kept: Kept, has: Offset) -> Offset:
        """Return the same for a session that has got more elsewhere."""
        offset = self._offset()
        ahead = {origin: number for origin, number in has.ahead.items() if self._read(origin) < number}
        if not ahead and has.position <= self.now:
            kept.has = None
        return Offset(max(self.now, has.position), ahead | offset.ahead)

    def _read(self, origin: str) -> int:
        return self._numbers.get(origin, 0)
