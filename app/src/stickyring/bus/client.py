"""Connection state recovery for python-socketio's clients, which do not have it; the JavaScript client does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import socketio
import socketio.exceptions
import socketio.packet

from stickyring.bus.offset import Offset
from stickyring.bus.waiting import AsyncWaiting, GreenWaiting, settle

CONNECT_SECONDS = 15.0
"""How long a client waits for the answer to its CONNECT, if its `connect` is not given another time.

While another host of the bus takes over, this takes longer than python-socketio's defaults: a second when a client
reconnects, and five for the POST that has the CONNECT.
"""


@dataclass
class _Session:
    pid: str = ""
    offset: str = ""
    recovered: bool = False


class Recovering:
    """Has a `socketio.Client` or `socketio.AsyncClient` go on with its session when it reconnects.

    Make it before the client connects. Events that were missed come after the client's `connect` event; ask
    `recovered` in its handler, and get the state anew if it is false. Handlers do not get the argument that a server
    with recovery adds to each event. It works through private names of python-socketio's clients.
    """

    def __init__(self, client: socketio.Client | socketio.AsyncClient) -> None:
        self._sessions: dict[str, _Session] = {}
        self._connect, self._event, self._send = client._handle_connect, client._handle_event, client._send_packet
        waiting = AsyncWaiting() if client.is_asyncio_based() else GreenWaiting(client.start_background_task)
        self._client, self._engine = client, client.eio
        self._open, client.connect = client.connect, waiting.function(self._on_open)
        self._engine.request_timeout = max(self._engine.request_timeout, CONNECT_SECONDS)
        self._reason, self._lose = "", self._engine.handlers["disconnect"]
        self._engine.on("disconnect", waiting.function(self._on_lost))
        self._request = self._engine._send_request
        if client.is_asyncio_based():
            self._engine._send_request = self._on_request
        client._handle_connect = waiting.function(self._on_connect)
        client._handle_event = waiting.function(self._on_event)
        client._send_packet = waiting.function(self._on_send)

    async def _on_open(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - `connect`'s
        reconnects = self._client._reconnect_task is not None
        await settle(self._open(*arguments, **{"wait_timeout": CONNECT_SECONDS, **options}))
        if self._engine.state == "connected":
            return
        # The connection ended just before the answer to CONNECT was handled. python-socketio takes it for connected,
        # and does not reconnect: its task still runs, or finds that the client is connected.
        self._client.connected = False
        reasons = self._engine.reason
        if self._reason in {reasons.CLIENT_DISCONNECT, reasons.SERVER_DISCONNECT}:
            return
        if reconnects or self._client._reconnect_task is None:
            raise socketio.exceptions.ConnectionError("The connection was lost while it was made.")

    async def _on_lost(self, reason: str) -> None:
        self._reason = reason
        await settle(self._lose(reason))

    async def _on_request(self, *request: Any, **more: Any) -> Any:  # noqa: ANN401 - python-engineio's
        # aiohttp repeats a GET whose connection ends before the answer. The answer to another poll has other messages,
        # and those of the first one would be missing, unnoticed.
        if self._engine.http is not None:
            self._engine.http._retry_connection = False
        return await self._request(*request, **more)

    def recovered(self, namespace: str = "/") -> bool:
        """Return whether the last connection went on with the session before it, and nothing is missing."""
        return self._session(namespace).recovered

    def _session(self, namespace: str | None) -> _Session:
        return self._sessions.setdefault(namespace or "/", _Session())

    async def _on_connect(self, namespace: str | None, data: dict[str, Any] | None) -> None:
        session, pid = self._session(namespace), (data or {}).get("pid", "")
        session.recovered = bool(pid) and pid == session.pid
        session.pid = pid
        await settle(self._connect(namespace, data))

    async def _on_event(self, namespace: str | None, number: int | None, data: list[Any]) -> None:
        session = self._session(namespace)
        if session.pid and number is None and isinstance(data[-1], str):
            try:
                session.offset = str(Offset.parse(data[-1]))
            except ValueError:
                pass  # an argument of the application
            else:
                data = data[:-1]
        await settle(self._event(namespace, number, data))

    async def _on_send(self, packet: Any) -> None:  # noqa: ANN401 - untyped
        session = self._session(packet.namespace)
        if packet.packet_type == socketio.packet.CONNECT and session.pid:
            claim = {"pid": session.pid} | ({"offset": session.offset} if session.offset else {})
            packet.data = claim | (packet.data or {})
        await settle(self._send(packet))
