"""One entry of the stream, and the event in it as clients get it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import socketio.packet
from engineio.packet import MESSAGE
from engineio.packet import Packet as EnginePacket

from stickyring.bus.offset import END, Position

EVENT, CALL, ANSWER, DISCONNECT, ENTER, LEAVE, CLOSE, MOVED, WHO = (
    "event",
    "call",
    "answer",
    "disconnect",
    "enter",
    "leave",
    "close",
    "moved",
    "who",
)
"""Kinds of entries: an event; one whose acknowledgement is wanted, and that; what is done to the session of another
node; a session that is on the origin now; the question who is in a room."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry. Each `origin` numbers its own from 1 on, without a gap.

    `header` has one letter a thing: n namespace, r room or rooms, x skipped sids, s sid, i id of a call or a
    question, o the origin of a call, l where the stream had it before it lost it.
    `data` is the JSON text of an event's name and arguments (or of an acknowledgement's), in which placeholders stand
    for the binary `attachments` as in Socket.IO's protocol.
    """

    kind: str
    origin: str
    number: int
    header: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    attachments: tuple[bytes, ...] = ()

    def fields(self) -> list[str | bytes]:
        """Return the names and values that Redis stores, except origin and number."""
        found: list[str | bytes] = ["k", self.kind, "h", json.dumps(self.header, separators=(",", ":")), "d", self.data]
        if self.attachments:
            # In one piece: a script of Redis handles at most some thousand values.
            found += ["a", ",".join(str(len(one)) for one in self.attachments), "b", b"".join(self.attachments)]
        return found

    @property
    def lost_at(self) -> Position:
        """Where the stream had it before it lost it; the end of all positions if it is there for the first time."""
        return Position.parse(self.header["l"]) if "l" in self.header else END

    @classmethod
    def of(cls, stored: Mapping[bytes, bytes]) -> Entry:
        """Return the entry that Redis has stored.

        Raises:
            KeyError, ValueError: something else has written it.
        """
        return cls(
            stored[b"k"].decode(),
            stored[b"o"].decode(),
            int(stored[b"q"]),
            json.loads(stored[b"h"]),
            stored[b"d"].decode(),
            tuple(_split(stored[b"b"], map(int, stored[b"a"].split(b",")))) if b"a" in stored else (),
        )


def _split(joined: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    at = 0
    for size in sizes:
        yield joined[at : at + size]
        at += size


def header_of(namespace: str | None, room: object, skipped: str | list[str] | None) -> dict[str, Any]:
    """Return the header of an event as python-socketio's `emit` understands these."""
    header: dict[str, Any] = {"n": namespace or "/"}
    if room is not None:
        header["r"] = list(room) if isinstance(room, tuple | set) else room
    if skipped:
        header["x"] = skipped if isinstance(skipped, list) else [skipped]
    return header


def event_of(name: str, data: object) -> list[Any]:
    """Return the name and the arguments of an event as python-socketio's `emit` understands `data`."""
    if isinstance(data, tuple):
        return [name, *data]
    return [name] if data is None else [name, data]


def encode(arguments: list[Any], packet_class: Any) -> tuple[str, tuple[bytes, ...]]:  # noqa: ANN401 - untyped
    """Return the JSON text and the attachments of an event's name and arguments, or of an acknowledgement's."""
    plain, attachments = arguments, []
    if packet_class.data_is_binary(arguments):
        plain, attachments = packet_class.deconstruct_binary(arguments)
    return packet_class.json.dumps(plain, separators=(",", ":")), tuple(map(bytes, attachments))


def decode(entry: Entry, packet_class: Any) -> list[Any]:  # noqa: ANN401 - untyped
    """Return what was encoded."""
    data: list[Any] = packet_class.json.loads(entry.data)
    return packet_class.reconstruct_binary(data, list(entry.attachments)) if entry.attachments else data


class Encoded:
    """An event in the packets of a Socket.IO server, encoded at most once for each offset and acknowledgement id."""

    def __init__(self, entry: Entry, packet_class: Any) -> None:  # noqa: ANN401 - untyped
        self._entry = entry
        self._packet_class = packet_class
        self._packets: dict[str, list[Any]] = {}

    def packets(self, offset: str = "") -> list[Any]:
        """Return its Engine.IO packets; `offset` becomes the last argument."""
        if (packets := self._packets.get(offset)) is None:
            packets = self._packets[offset] = self._encode(offset)
        return packets

    def with_id(self, number: int) -> list[Any]:
        """Return its Engine.IO packets for a client that is to acknowledge it."""
        return self._encode("", number)

    def _encode(self, offset: str, number: int | None = None) -> list[Any]:
        entry, namespace = self._entry, self._entry.header["n"]
        if self._packet_class.encode is not socketio.packet.Packet.encode:
            data = decode(entry, self._packet_class) + ([offset] if offset else [])
            made = self._packet_class(socketio.packet.EVENT, namespace=namespace, data=data, id=number).encode()
            return [EnginePacket(MESSAGE, part) for part in (made if isinstance(made, list) else [made])]
        # What python-socketio makes of it, without decoding the JSON text.
        attachments = entry.attachments
        kind = f"{socketio.packet.BINARY_EVENT}{len(attachments)}-" if attachments else str(socketio.packet.EVENT)
        text = "".join(
            (
                kind,
                "" if namespace == "/" else f"{namespace},",
                "" if number is None else str(number),
                f'{entry.data[:-1]},"{offset}"]' if offset else entry.data,
            )
        )
        return [EnginePacket(MESSAGE, part) for part in (text, *attachments)]
