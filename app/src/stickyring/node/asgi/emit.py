"""Emits of a `socketio.AsyncServer` without a task for each client.

python-socketio starts a task for each client that an event goes to, and waits for all of them: over a third of what an
echo costs. A session here sends without waiting (`stickyring.node.asgi.sessions`), so the clients take turns instead.
"""

import asyncio
import logging

import socketio
from engineio.exceptions import EngineIOError
from engineio.packet import MESSAGE
from engineio.packet import Packet as EnginePacket
from socketio.packet import EVENT

from stickyring.node.sessions import TURN_PACKETS

log = logging.getLogger(__name__)

TURN_BYTES = 65536


def emit_without_tasks(server: socketio.AsyncServer) -> None:
    """Replace `emit` of the server's manager, unless the application has another one than python-socketio's own.

    An application that emits again and again without a pause would leave no time to others and to the connections
    themselves. So after TURN_PACKETS packets, or TURN_BYTES, an emit waits until they have had their turn.
    """
    manager, eio = server.manager, server.eio
    theirs = manager.emit
    if getattr(theirs, "__func__", None) is not socketio.AsyncManager.emit:
        return
    packets = size = 0  # since the last pause

    async def emit(
        event: str,
        data: object,
        namespace: str,
        room: object = None,
        *,
        skip_sid: object = None,
        callback: object = None,
        to: object = None,
        **more: object,
    ) -> None:
        nonlocal packets, size
        room = to or room
        if callback:
            # Each client's packet has an id of its own.
            await theirs(event, data, namespace, room=room, skip_sid=skip_sid, callback=callback, **more)
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
                    await eio.send_packet(engine_sid, part)
                except EngineIOError:
                    break  # its session has just ended
                except Exception:
                    log.exception("an event was not sent to a client")
                    break
                packets += 1
                size += len(part.data)
        if packets >= TURN_PACKETS or size >= TURN_BYTES:
            packets = size = 0
            await asyncio.sleep(0)

    manager.emit = emit
