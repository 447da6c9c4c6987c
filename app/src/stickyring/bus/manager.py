"""The client managers that a Socket.IO server gets, one for green threads and one for asyncio."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import socketio

from stickyring.bus.connection import Address
from stickyring.bus.entry import CALL, CLOSE, DISCONNECT, ENTER, EVENT, LEAVE, encode, event_of, header_of
from stickyring.bus.stream import Stream
from stickyring.bus.waiting import AsyncWaiting, GreenWaiting, Waiting, run, settle


class BusManager(socketio.base_manager.BaseManager):
    """What both have in common: what python-socketio's manager does, for the sessions of all nodes.

    The application may set `on_loss`, a function that is called when the bus has lost events.
    """

    on_loss: Callable[[], Any] | None = None

    def __init__(self, address: Address, wait: Waiting, *, recovery: float, most_entries: int) -> None:
        super().__init__()
        self.stream = Stream(self, address, wait, recovery=recovery, most_entries=most_entries)

    def set_server(self, server: Any) -> None:  # noqa: ANN401 - untyped
        """Take the server whose sessions these are."""
        super().set_server(server)
        self.stream.recovery.wrap(server)

    def initialize(self) -> None:
        """Begin to read and write; python-socketio calls this before the first session."""
        super().initialize()
        self.stream.start()

    async def _end_if_lost(self, sid: str, namespace: str) -> None:
        """End a session whose connection was lost while its `connect` handler ran: python-socketio does not."""
        engine_sid, server = self.eio_sid_from_sid(sid, namespace), self.server
        socket = server.eio.sockets.get(engine_sid)
        if socket is None or socket.closing or socket.closed:
            await settle(server._handle_disconnect(engine_sid, namespace, server.reason.TRANSPORT_CLOSE))

    def basic_disconnect(self, sid: str, namespace: str, **more: object) -> None:
        """Forget a session."""
        super().basic_disconnect(sid, namespace, **more)
        self.stream.recovery.forget(sid, namespace)

    async def _emit(  # noqa: PLR0917 - as python-socketio's
        self,
        event: str,
        data: object,
        namespace: str | None,
        room: Any,  # noqa: ANN401 - as python-socketio's
        skip_sid: str | list[str] | None,
        callback: Callable[..., Any] | None,
    ) -> None:
        header = header_of(namespace, room, skip_sid)
        text, attachments = encode(event_of(event, data), self.server.packet_class)
        if callback is None:
            await self.stream.publish(EVENT, header, text, attachments)
        elif room is None:
            raise ValueError("an acknowledgement is of one session: name its room")
        else:
            await self.stream.publish(CALL, header | {"i": self.stream.expect(callback)}, text, attachments)

    async def _can_disconnect(self, sid: str, namespace: str | None) -> bool:
        namespace = namespace or "/"
        if not self.stream.is_here(sid, namespace):
            await self.stream.publish(DISCONNECT, {"n": namespace, "s": sid})
            return False
        # Its client gets first what was emitted before.
        await self.stream.deliver_own()
        return bool(self.is_connected(sid, namespace))

    async def _enter_room(self, sid: str, namespace: str, room: Hashable, eio_sid: str | None) -> None:
        if not self.stream.is_here(sid, namespace):
            await self.stream.publish(ENTER, {"n": namespace, "s": sid, "r": room})
            return
        await self.stream.deliver_own()
        self.stream.enter(sid, namespace, room, eio_sid)
        await self.stream.recovery.saved(sid, namespace)

    async def _leave_room(self, sid: str, namespace: str, room: Hashable) -> None:
        if not self.stream.is_here(sid, namespace):
            await self.stream.publish(LEAVE, {"n": namespace, "s": sid, "r": room})
            return
        await self.stream.deliver_own()
        self.stream.leave(sid, namespace, room)

    async def _close_room(self, room: Hashable, namespace: str | None) -> None:
        await self.stream.publish(CLOSE, {"n": namespace or "/", "r": room})

    async def _members(self, room: Hashable, namespace: str | None, timeout: float) -> set[str]:
        return await self.stream.presence.ask(header_of(namespace, room, None), timeout)


class Manager(BusManager, socketio.Manager):
    """The client manager of a `socketio.Server` on eventlet or gevent."""

    def __init__(self, address: Address, *, recovery: float, most_entries: int) -> None:
        super().__init__(address, GreenWaiting(self._spawn), recovery=recovery, most_entries=most_entries)

    def _spawn(self, *call: Any) -> None:  # noqa: ANN401 - a function and its arguments
        self.server.start_background_task(*call)

    def emit(  # noqa: PLR0917 - as python-socketio's
        self,
        event: str,
        data: object,
        namespace: str | None = None,
        room: Any = None,  # noqa: ANN401 - as python-socketio's
        skip_sid: str | list[str] | None = None,
        callback: Callable[..., Any] | None = None,
        to: Any = None,  # noqa: ANN401 - as python-socketio's
        **more: Any,  # noqa: ANN401 - as python-socketio's
    ) -> None:
        """Send an event to sessions of all nodes; with `ignore_queue`, to those of this process.

        Raises:
            BusFullError: the bus is away, and too many events wait for it.
        """
        if more.get("ignore_queue"):
            socketio.Manager.emit(self, event, data, namespace or "/", to or room, skip_sid, callback)
        else:
            run(self._emit(event, data, namespace, to or room, skip_sid, callback))

    def can_disconnect(self, sid: str, namespace: str | None) -> bool:
        """Return whether a session is one of this process; otherwise ask its process to disconnect it."""
        return run(self._can_disconnect(sid, namespace))

    def pre_connect(self, eio_sid: str, namespace: str) -> str | None:
        """Begin a session, or go on with one; return its sid."""
        sid = self.stream.recovery.go_on(eio_sid, namespace)
        if sid is None:
            sid = super().pre_connect(eio_sid, namespace)
            self.stream.recovery.begin(eio_sid, sid, namespace)
        return sid

    def connect(self, sid: str, namespace: str) -> str:
        """Note that a session is connected."""
        sid = super().connect(sid, namespace)
        run(self._end_if_lost(sid, namespace))
        return sid

    def enter_room(self, sid: str, namespace: str, room: Hashable, eio_sid: str | None = None) -> None:
        """Add a session to a room, on whatever node it is."""
        run(self._enter_room(sid, namespace, room, eio_sid))

    def leave_room(self, sid: str, namespace: str, room: Hashable) -> None:
        """Remove a session from a room, on whatever node it is."""
        run(self._leave_room(sid, namespace, room))

    def close_room(self, room: Hashable, namespace: str | None = None) -> None:
        """Remove all sessions of all nodes from a room."""
        run(self._close_room(room, namespace))

    def members(self, room: Hashable, namespace: str | None, timeout: float) -> set[str]:
        """Return the sids of a room, of all nodes."""
        return run(self._members(room, namespace, timeout))


class AsyncManager(BusManager, socketio.AsyncManager):
    """The client manager of a `socketio.AsyncServer`."""

    def __init__(self, address: Address, *, recovery: float, most_entries: int) -> None:
        super().__init__(address, AsyncWaiting(), recovery=recovery, most_entries=most_entries)

    async def emit(  # noqa: PLR0917 - as python-socketio's
        self,
        event: str,
        data: object,
        namespace: str | None = None,
        room: Any = None,  # noqa: ANN401 - as python-socketio's
        skip_sid: str | list[str] | None = None,
        callback: Callable[..., Any] | None = None,
        to: Any = None,  # noqa: ANN401 - as python-socketio's
        **more: Any,  # noqa: ANN401 - as python-socketio's
    ) -> None:
        """Send an event to sessions of all nodes; with `ignore_queue`, to those of this process.

        Raises:
            BusFullError: the bus is away, and too many events wait for it.
        """
        if more.get("ignore_queue"):
            await socketio.AsyncManager.emit(self, event, data, namespace or "/", to or room, skip_sid, callback)
        else:
            await self._emit(event, data, namespace, to or room, skip_sid, callback)

    async def can_disconnect(self, sid: str, namespace: str | None) -> bool:
        """Return whether a session is one of this process; otherwise ask its process to disconnect it."""
        return await self._can_disconnect(sid, namespace)

    async def pre_connect(self, eio_sid: str, namespace: str) -> str | None:
        """Begin a session, or go on with one; return its sid."""
        sid = self.stream.recovery.go_on(eio_sid, namespace)
        if sid is None:
            sid = await super().pre_connect(eio_sid, namespace)
            self.stream.recovery.begin(eio_sid, sid, namespace)
        return sid

    async def connect(self, sid: str, namespace: str) -> str:
        """Note that a session is connected."""
        sid = await super().connect(sid, namespace)
        await self._end_if_lost(sid, namespace)
        return sid

    async def enter_room(self, sid: str, namespace: str, room: Hashable, eio_sid: str | None = None) -> None:
        """Add a session to a room, on whatever node it is."""
        await self._enter_room(sid, namespace, room, eio_sid)

    async def leave_room(self, sid: str, namespace: str, room: Hashable) -> None:
        """Remove a session from a room, on whatever node it is."""
        await self._leave_room(sid, namespace, room)

    async def close_room(self, room: Hashable, namespace: str | None = None) -> None:
        """Remove all sessions of all nodes from a room."""
        await self._close_room(room, namespace)

    async def members(self, room: Hashable, namespace: str | None, timeout: float) -> set[str]:
        """Return the sids of a room, of all nodes."""
        return await self._members(room, namespace, timeout)
