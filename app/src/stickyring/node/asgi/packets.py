"""The checks of `stickyring.node.packets` for a `socketio.AsyncServer`."""

import logging
from collections.abc import Callable, Coroutine
from typing import Any

import socketio

from stickyring.node.packets import (
    ATTACHMENTS,
    UNKNOWN_NAMESPACE,
    HandlerError,
    checked,
)

log = logging.getLogger(__name__)


def check_packets(server: socketio.AsyncServer) -> None:
    """Make a Socket.IO server raise an error for each invalid packet, and isolate errors of the application.

    As `stickyring.node.packets.check_packets`, through the same private names.
    """
    server.packet_class = checked(server.packet_class, ATTACHMENTS * int(server.eio.max_http_buffer_size))
    manager, disconnect = server.manager, server.disconnect
    handle_connect, handle_disconnect = server._handle_connect, server._handle_disconnect
    send_packet = server._send_packet

    async def forget(sid: str | None, namespace: str) -> None:
        # As python-socketio does after a handler returns.
        if sid is not None:
            await manager.disconnect(sid, namespace, ignore_queue=True)

    async def send_as_clients_read_it(engine_sid: str, packet: Any) -> None:  # noqa: ANN401 - python-socketio has no types
        # socket.io-client reads `message` of an object; of python-socketio's plain text it would show "undefined".
        if packet.packet_type == socketio.packet.CONNECT_ERROR and isinstance(packet.data, str):
            packet.data = UNKNOWN_NAMESPACE
        await send_packet(engine_sid, packet)

    async def connect_or_raise(engine_sid: str, namespace: str | None, data: object) -> None:
        try:
            await handle_connect(engine_sid, namespace, data)
        except Exception as error:
            log.exception("a connect handler has failed")
            await forget(manager.sid_from_eio_sid(engine_sid, namespace or "/"), namespace or "/")
            raise HandlerError from error

    async def handle_disconnect_and_forget(engine_sid: str, namespace: str | None, reason: str | None = None) -> None:
        try:
            await handle_disconnect(engine_sid, namespace, reason)
        except Exception:
            log.exception("a disconnect handler has failed")
            await forget(manager.sid_from_eio_sid(engine_sid, namespace or "/"), namespace or "/")

    async def disconnect_and_forget(sid: str, namespace: str | None = None, ignore_queue: bool = False) -> None:
        try:
            await disconnect(sid, namespace=namespace, ignore_queue=ignore_queue)
        except Exception:
            await forget(sid, namespace or "/")
            raise

    server.disconnect, server._send_packet = disconnect_and_forget, send_as_clients_read_it
    server._handle_connect, server._handle_disconnect = connect_or_raise, handle_disconnect_and_forget
    server._handle_event_internal = _logging("an event handler has failed", server._handle_event_internal)
    server._handle_ack = _logging("the callback of an acknowledgement has failed", server._handle_ack)


def _logging(
    message: str, call: Callable[..., Coroutine[Any, Any, object]]
) -> Callable[..., Coroutine[Any, Any, None]]:
    """Return a coroutine function that awaits `call`, and logs `message` if it raises."""

    async def call_and_log(*args: object) -> None:
        try:
            await call(*args)
        except Exception:
            log.exception(message)

    return call_and_log
