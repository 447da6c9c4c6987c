"""What the bus keeps of a session, so that another node can go on with it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from stickyring.bus.entry import CLOSE, DISCONNECT, ENTER, EVENT, LEAVE, Entry
from stickyring.bus.offset import BEGIN, Offset, Position

PAUSE_MILLISECONDS = 10_000
MOST_PAUSES = 5
"""Of a session: as many as it can have until its node notices that its client is gone (45 seconds by default)."""


def new_pid() -> str:
    """Return a secret that names a session."""
    return secrets.token_urlsafe(18)


class Stay:
    """When a session was in a room: after the entry at `since`, up to that at `until`, None while it is in it."""

    __slots__ = ("room", "since", "until")

    def __init__(self, room: Hashable, since: Position, until: Position | None = None) -> None:
        self.room = room
        self.since = since
        self.until = until

    def covers(self, position: Position) -> bool:
        """Return whether an event at this position was for a session that was in the room."""
        return self.since < position and (self.until is None or position <= self.until)


@dataclass(slots=True)
class Kept:
    """A session of one namespace, with what is needed to go on with it elsewhere.

    - sid: its Socket.IO session id; pid: the secret that its client sends to go on
    - began: the position at which it first joined; epoch: the history of the stream that this position is of, empty
      before its process' first contact with the bus
    - stays: in which rooms it was when; data: the application's session
    - sent: the offset of the last event sent to it, as text, empty before the first one; sent_at: when, in milliseconds
      of the bus' clock
    - pauses: a line for each, with the offset of the event that was the last one for a while, and the position of the
      next one. Its client may not have got that one, and what was before it may be gone from the stream
    - has: what its client has got anyway, which is not sent to it again
    - had: up to where its client had got the stream in another session, before this one
    - missed: the packets of events that are sent to it once its client is told that it is connected; held: those of
      events that come meanwhile, sent after these; None once it is connected
    - given_up: whether its connection is about to end, because it may have missed events or goes on elsewhere; it gets
      no more
    - disconnected: whether the application has disconnected it while it was away
    - leaves_for_good: whether its client has left on purpose, or was disconnected
    - ended: up to where it was here; saved_at: when, on the monotonic clock
    - of a recovered one, `seen`: up to where its stays are known; `start`: after which its client has missed events
    """

    sid: str
    namespace: str
    began: Position
    epoch: str
    pid: str = field(default_factory=new_pid)
    stays: list[Stay] = field(default_factory=list)
    sent: str = ""
    sent_at: int = 0
    pauses: str = ""
    has: Offset | None = None
    had: Position = BEGIN
    data: dict[str, Any] = field(default_factory=dict)
    recovered: bool = False
    missed: list[list[Any]] = field(default_factory=list)
    held: list[list[Any]] | None = field(default_factory=list)
    leaves_for_good: bool = True
    given_up: bool = False
    disconnected: bool = False
    ended: Position | None = None
    saved_at: float = 0.0
    seen: Position = BEGIN
    start: Position = BEGIN

    def sends(self, offset: str, position: Position) -> None:
        """Note the offset of the event at a position, which is sent to it."""
        if position.ms - self.sent_at > PAUSE_MILLISECONDS:
            lines = (*self.pauses.splitlines(), f"{self.sent} {position}")
            self.pauses = "\n".join(lines[-MOST_PAUSES:])
        self.sent, self.sent_at = offset, position.ms

    def enter(self, room: Hashable, position: Position) -> None:
        """Note that it is in a room from now on."""
        if room != self.sid and not any(stay.room == room and stay.until is None for stay in self.stays):
            self.stays.append(Stay(room, position))

    def leave(self, room: Hashable, position: Position) -> None:
        """Note that it has left a room."""
        for stay in self.stays:
            if stay.room == room and stay.until is None:
                stay.until = position

    def forget_before(self, position: Position) -> None:
        """Forget rooms that it had left before what the stream still has."""
        self.stays = [stay for stay in self.stays if stay.until is None or stay.until > position]

    @property
    def rooms(self) -> list[Hashable]:
        """The rooms that it is in, without its own."""
        return [stay.room for stay in self.stays if stay.until is None]

    def replay(self, entry: Entry, position: Position) -> bool:
        """Take an entry that came while it was away; return whether it is an event that its client has missed."""
        header = entry.header
        if header.get("n") != self.namespace:
            return False
        if position > self.seen:
            if entry.kind in {ENTER, LEAVE} and header["s"] == self.sid:
                (self.enter if entry.kind == ENTER else self.leave)(header["r"], position)
            elif entry.kind == CLOSE:
                self.leave(header["r"], position)
            elif entry.kind == DISCONNECT and header["s"] == self.sid:
                self.disconnected = True
        if entry.kind != EVENT or position <= self.start or self.sid in header.get("x", ()):
            return False
        if entry.lost_at <= self.had:
            return False
        if self.has is not None and self.has.covers(position, entry.origin, entry.number):
            return False
        room = header.get("r")
        wanted = room if isinstance(room, list) else [room]
        return (
            room is None
            or self.sid in wanted
            or any(stay.room in wanted and stay.covers(position) for stay in self.stays)
        )

    def to_json(self, seen: Position) -> str:
        """Return it as text; nothing but `sent` was sent to its client up to the position `seen`.

        Raises:
            TypeError, ValueError: the application's data or a room cannot be written as JSON.
        """
        return json.dumps(
            {
                "sid": self.sid,
                "namespace": self.namespace,
                "began": str(self.began),
                "sent": self.sent,
                "pauses": self.pauses,
                "had": str(self.had),
                "seen": str(seen),
                "epoch": self.epoch,
                "stays": [[stay.room, str(stay.since), stay.until and str(stay.until)] for stay in self.stays],
                "data": self.data,
            },
            separators=(",", ":"),
        )


def recover(text: bytes, pid: str, offset: Offset | None, epoch: str) -> Kept | None:
    """Return a session of another connection or node.

    `offset` is what the client says that it has got, None if it has got no event. Return None if the session is of
    another epoch: the stream has lost entries since.
    """
    found = json.loads(text)
    if found["epoch"] != epoch:
        return None
    kept = Kept(found["sid"], found["namespace"], Position.parse(found["began"]), epoch, pid, recovered=True)
    kept.data, kept.sent, kept.has = found["data"], str(offset or ""), offset
    kept.pauses, kept.had = found.get("pauses", ""), Position.parse(found.get("had", str(BEGIN)))
    after = dict(line.split(" ") for line in kept.pauses.splitlines())
    kept.stays = [
        Stay(_hashable(room), Position.parse(since), until and Position.parse(until))
        for room, since, until in found["stays"]
    ]
    kept.seen = Position.parse(found["seen"])
    # It has got all that was sent to it up to then, all before what came after a pause, or what its offset says.
    if kept.sent == found["sent"]:
        since = kept.seen
    else:
        since = Position.parse(after[kept.sent]).before if kept.sent in after else kept.began
    kept.start = max(since, offset.position) if offset else since
    return kept


def _hashable(room: Any) -> Hashable:  # noqa: ANN401 - from JSON
    return tuple(room) if isinstance(room, list) else room
