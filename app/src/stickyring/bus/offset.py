"""Where a reader of the bus is: a position in the stream, and what it has got ahead of the stream."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

_TEXT = re.compile(r"(?P<ms>\d{1,16})-(?P<n>\d{1,16})(?P<ahead>(?:\+[0-9a-f]{16}:\d{1,16}){0,16})")
"""With few processes: a longer one would be sent with each event."""


class Position(NamedTuple):
    """The id of an entry of the stream: milliseconds of the bus' clock, and a counter within them."""

    ms: int
    n: int

    @classmethod
    def parse(cls, text: str | bytes) -> Position:
        """Return the position that Redis writes as `<ms>-<n>`."""
        ms, _, n = (text.decode() if isinstance(text, bytes) else text).partition("-")
        return cls(int(ms), int(n))

    def __str__(self) -> str:
        return f"{self.ms}-{self.n}"

    @property
    def before(self) -> Position:
        """The last one before it, which no entry may have."""
        return Position(self.ms, self.n - 1) if self.n else Position(self.ms - 1, 2**53)


BEGIN, END = Position(0, 0), Position(10**16, 0)
"""Before and after all entries; the second also stands for the position of one that the stream does not have yet."""


@dataclass(frozen=True, slots=True)
class Offset:
    """What a client has got: all entries up to `position`, and of some origins those up to a number.

    `ahead` maps an origin to a number. A node delivers its own events before the stream has them when the bus is away.
    Clients get the offset as text, which they send back as it is: `<ms>-<n>`, then `+<origin>:<number>` for each.
    """

    position: Position
    ahead: dict[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Offset:
        """Return the offset that a client sent.

        Raises:
            ValueError: no node has written that text.
        """
        found = _TEXT.fullmatch(text)
        if found is None:
            raise ValueError("not an offset")
        parts = (part.split(":") for part in found["ahead"].split("+")[1:])
        return cls(Position(int(found["ms"]), int(found["n"])), {origin: int(number) for origin, number in parts})

    def __str__(self) -> str:
        return str(self.position) + "".join(f"+{origin}:{number}" for origin, number in self.ahead.items())

    def covers(self, position: Position | None, origin: str, number: int) -> bool:
        """Return whether the client has got an entry; `position` is None for one that the stream does not have yet."""
        if position is not None and position <= self.position:
            return True
        return number <= self.ahead.get(origin, 0)
