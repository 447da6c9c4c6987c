"""Events between the nodes of a fleet: one stream of Redis or Valkey, which each process reads by position."""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import socketio

if TYPE_CHECKING:
    from stickyring.bus.connection import Address

URL_VARIABLE = "STICKYRING_BUS_URL"
NAME_VARIABLE = "STICKYRING_BUS_NAME"
DEFAULT_NAME = "stickyring"
RECOVERY_SECONDS = 120.0
"""For how long a client may be away and go on with its session, if the application gives no number."""
MOST_ENTRIES = 200_000
"""Of the stream; beyond that, what is kept for recovery is kept for a shorter time."""
MEMBERS_SECONDS = 10.0
"""How long `members` waits for the answers of all processes."""


def manager(*, recovery: bool | float = False) -> Any:  # noqa: ANN401 - one of two classes
    """Return the client manager of a `socketio.Server`, or of Flask-SocketIO.

    It is that of the deployment's bus. Without one, it is python-socketio's own, for one process. With `recovery`,
    clients go on with their session if they were away for at most so many seconds, or RECOVERY_SECONDS; each event then
    has one more argument, as Socket.IO's connection state recovery wants it.
    """
    if (found := address()) is None:
        return socketio.Manager()
    from stickyring.bus.manager import Manager  # noqa: PLC0415 - redis is needed with a bus only

    return Manager(found, recovery=_seconds(recovery), most_entries=MOST_ENTRIES)


def async_manager(*, recovery: bool | float = False) -> Any:  # noqa: ANN401 - one of two classes
    """Return the same for a `socketio.AsyncServer`."""
    if (found := address()) is None:
        return socketio.AsyncManager()
    from stickyring.bus.manager import AsyncManager  # noqa: PLC0415 - redis is needed with a bus only

    return AsyncManager(found, recovery=_seconds(recovery), most_entries=MOST_ENTRIES)


def members(server: Any, room: Hashable, namespace: str = "/", *, timeout: float = MEMBERS_SECONDS) -> set[str]:  # noqa: ANN401 - untyped
    """Return the sids of who is in a room of a `socketio.Server`, on all nodes; with None for it, in the namespace.

    All processes at the bus are asked. Without a bus, there is one.

    Raises:
        TimeoutError: some have not answered in time, or the bus is away.
        BusFullError: the bus is away, and too much waits for it.
        TypeError: the server has a manager of another kind, which does not know the users of other processes.
    """
    if hasattr(server.manager, "members"):
        found: set[str] = server.manager.members(room, namespace, timeout)
        return found
    return _members_here(server, room, namespace)


async def async_members(
    server: Any,  # noqa: ANN401 - untyped
    room: Hashable,
    namespace: str = "/",
    *,
    timeout: float = MEMBERS_SECONDS,
) -> set[str]:
    """Return the same for a `socketio.AsyncServer`."""
    if hasattr(server.manager, "members"):
        found: set[str] = await server.manager.members(room, namespace, timeout)
        return found
    return _members_here(server, room, namespace)


def _members_here(server: Any, room: Hashable, namespace: str) -> set[str]:  # noqa: ANN401 - untyped
    if type(server.manager) not in {socketio.Manager, socketio.AsyncManager}:
        raise TypeError(f"{type(server.manager).__name__} knows the users of its own process only")
    return {sid for sid, _ in server.manager.get_participants(namespace, room)}


def _seconds(recovery: float) -> float:
    return RECOVERY_SECONDS if recovery is True else float(recovery)


def address() -> Address | None:
    """Return where the deployment's bus is, None without one."""
    if not (url := os.environ.get(URL_VARIABLE)):
        return None
    from stickyring.bus.connection import Address  # noqa: PLC0415 - redis is needed with a bus only

    return Address(url, os.environ.get(NAME_VARIABLE) or DEFAULT_NAME)
