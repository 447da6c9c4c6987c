"""Events between the nodes of a fleet: one stream of Redis or Valkey, which each process reads by position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import socketio

from stickyring.bus.connection import Address
from stickyring.bus.settings import MOST_ENTRIES, RECOVERY_SECONDS

if TYPE_CHECKING:
    from stickyring.bus.async_manager import AsyncManager


def async_manager(*, recovery: bool = False) -> Any:  # noqa: ANN401 - one of two classes
    """Return the client manager of a `socketio.AsyncServer`: of the deployment's bus, or python-socketio's own."""
    if (address := Address.of_deployment()) is None:
        return socketio.AsyncManager()
    from stickyring.bus.async_manager import AsyncManager  # noqa: PLC0415 - redis is needed with a bus only

    return AsyncManager(address, recovery=RECOVERY_SECONDS if recovery else 0.0, most_entries=MOST_ENTRIES)
