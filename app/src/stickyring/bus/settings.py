"""Times and bounds of the bus, and what a client says to go on with its session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stickyring.bus.offset import Offset

RECOVERED = "stickyring.recovered"
"""In the environ of a `connect` handler: whether its client goes on with the session that it had."""
RECOVERY_SECONDS = 120.0
MOST_ENTRIES = 200_000
"""Of the stream; beyond that, what is kept for recovery is kept for a shorter time."""
REFRESH_SECONDS = 60.0
"""After so long a session is saved again, though nothing but its place in the stream has changed."""
MARGIN_SECONDS = 30.0
"""Events stay in the stream for the time of recovery, that of a refresh, and this."""
SAVED_SECONDS = 0.8
"""How long a client that connects, or a handler that enters a room, waits for the bus; python-socketio's client waits a
second when it reconnects."""
MOST_WAITING = 1000
"""A caller of `emit` waits while so many events are on the way to a bus that is there."""
CALLS_SECONDS = 600.0
TICK_SECONDS = 0.2
TRIM_SECONDS = 5.0
RETRY_SECONDS = 0.5


@dataclass(frozen=True)
class Claim:
    """What a client sends with CONNECT to go on with its session (socket.io 4.6 and later); offset: None before the first
    event, which has one."""

    pid: str
    offset: Offset | None

    @classmethod
    def of(cls, data: Any) -> tuple[Claim | None, Any]:  # noqa: ANN401 - the client's
        """Return the claim in a CONNECT's data, None without one, and the data without it."""
        if not (isinstance(data, dict) and isinstance(data.get("pid"), str)):
            return None, data
        rest = {name: value for name, value in data.items() if name not in {"pid", "offset"}} or None
        offset = data.get("offset")
        try:
            return cls(data["pid"], None if offset is None else Offset.parse(offset)), rest
        except (TypeError, ValueError):
            return None, rest
