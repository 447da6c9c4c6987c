"""Emits of a `socketio.AsyncServer` without a task for each client.

python-socketio starts a task for each client that an event goes to, and waits for all of them: over a third of what an
echo costs. A session here sends without waiting (`stickyring.node.asgi.sessions`), so the clients take turns instead.
"""

import asyncio
import logging
import time

import socketio
from engineio.exceptions import EngineIOError
from engineio.packet import MESSAGE
from engineio.packet import Packet as EnginePacket
from socketio.packet import EVENT

from stickyring.node.sessions import TURN_PACKETS

log = logging.getLogger(__name__)

TURN_BYTES = 65536
TURN_SECONDS = 0.005


def emit_without_tasks(server: socketio.AsyncServer) -> None:
    """Replace `emit` of the server's manager, unless the application has another one than python-socketio's own.

    Queue managers, such as Redis', and python-socketio's admin instrumentation have another one.

    python-socketio's lets others have a turn each time, and the connections send meanwhile. This one does so if the
    last turn was TURN_SECONDS, TURN_PACKETS or TURN_BYTES ago: for applications that emit while they work, or without
    a pause.
    """
    manager = server.manager
    theirs = manager.emit
    if getattr(theirs, "__func__", None) is not socketio.AsyncManager.emit:
        return
    # Since the last turn of others.
    packets = size = 0
    turned = time.monotonic()

    async def emit(  # noqa: PLR0917 - as python-socketio's
        event: str,
        data: object,
        namespace: str,
        room: object = None,
        skip_sid: object = None,
        callback: object = None,
        to: object = None,
        **more: object,
    ) -> None:
        nonlocal packets, size, turned
        room = to or room
        if callback:
            # Each client's packet has an id of its own.
            await theirs(event, data, namespace, room=room, skip_sid=skip_sid, callback=callback, **more)
            return
        if namespace not in manager.rooms:
            return
        arguments = list(data) if isinstance(data, tuple) else [] if data is None else [data]
        encoded = server.packet_class(EVENT, namespace=namespace, data=[event, *arguments]).encode()
        parts = [EnginePacket(MESSAGE, part) for part in (encoded if isinstance(encoded, list) else [encoded])]
        skipped = skip_sid if isinstance(skip_sid, list) else [skip_sid]
        for sid, engine_sid in manager.get_participants(namespace, room):
            if sid in skipped:
                continue
            for part in parts:
                try:
                    await server._send_eio_packet(engine_sid, part)
                except EngineIOError:
                    break  # its session has just ended
                except Exception:
                    log.exception("an event was not sent to a client")
                    break
                packets += 1
                size += len(part.data)
        if packets >= TURN_PACKETS or size >= TURN_BYTES or time.monotonic() - turned >= TURN_SECONDS:
            await asyncio.sleep(0)
            packets = size = 0
            turned = time.monotonic()

    manager.emit = emit
