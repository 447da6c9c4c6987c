"""Events from processes that have no users: workers, jobs, other services."""

from __future__ import annotations

import os
import secrets
import time

import redis
import socketio.packet

from stickyring.bus.connection import APPEND, Address, append_arguments
from stickyring.bus.entry import EVENT, Entry, encode, event_of, header_of

RETRY_SECONDS = 0.2


class BusAwayError(Exception):
    """The bus has not accepted an event in time. It may have it all the same."""


class Emitter:
    """Emits to the users of all nodes, from a process that is none; it blocks until the bus has the event.

    Of the bus it needs EVAL, with XADD, GET and SET in it, on the keys `NAME:events` and `NAME:written:*`; with
    Sentinels also WAIT. It is for one thread at a time.
    """

    def __init__(self, url: str, name: str = "stickyring", *, timeout: float = 10.0) -> None:
        self._address = Address(url, name)
        self._timeout = timeout
        self._begin()

    def _begin(self) -> None:
        """Number the events anew, as another origin; after a fork, the child does it too."""
        self._pid = os.getpid()
        self._redis = self._address.client(asyncio=False)
        self._origin = secrets.token_hex(8)
        self._number = 0

    def emit(
        self,
        event: str,
        data: object = None,
        namespace: str | None = None,
        room: object = None,
        skip_sid: str | list[str] | None = None,
    ) -> None:
        """Send an event; all is as for `Server.emit`. It is tried again for `timeout` seconds, and arrives once.

        Raises:
            BusAwayError: the bus is away, or refuses.
        """
        if self._pid != os.getpid():
            self._begin()
        text, attachments = encode(event_of(event, data), socketio.packet.Packet)
        self._number += 1
        header = header_of(namespace, room, skip_sid)
        entry = Entry(EVENT, self._origin, self._number, header, text, attachments)
        keys, arguments = self._address.append_keys(self._origin), append_arguments([(entry, entry.fields())])
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                self._write(keys, arguments)
            except (redis.RedisError, OSError) as error:
                if time.monotonic() > deadline:
                    raise BusAwayError(f"{type(error).__name__}: {error}") from error
                time.sleep(RETRY_SECONDS)
            else:
                return

    def _write(self, keys: list[str], arguments: list[str | bytes | int]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.eval(APPEND, len(keys), *keys, *arguments)
        self._address.add_wait(pipeline)
        self._address.confirmed(pipeline.execute())
