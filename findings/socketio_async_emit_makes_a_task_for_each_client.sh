#!/bin/sh
# python-socketio 5.18.1: AsyncServer.emit starts an asyncio task for each client that it sends to, even for a single one, and does
# not tell its caller when all of them fail.
#
# Expected: sending to one client with `await server.emit(..., to=sid)` costs a call; an error reaches who awaits it.
# Seen: one task for one client, 100 for a room of 100, though each task only puts a packet into a queue. If sending raises for every
# client, emit returns as if nothing had happened, and asyncio logs "Task exception was never retrieved" some time later.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check python-socketio==5.18.1 python-engineio==4.15.1
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import gc

import socketio

CLIENTS = 100
server = socketio.AsyncServer(async_mode="asgi")


async def tasks_of(work):
    """Return how many tasks `work` starts."""
    loop, started = asyncio.get_running_loop(), []

    def count(loop, coroutine, **options):
        started.append(coroutine)
        return asyncio.Task(coroutine, loop=loop, **options)

    loop.set_task_factory(count)
    await work
    loop.set_task_factory(None)
    return len(started)


async def main():
    async def send_packet(sid, packet):
        """Stands for the connections."""

    async def fail(sid, packet):
        raise ConnectionError("this connection is broken")

    server.eio.send_packet = send_packet
    sids = [await server.manager.connect(f"connection {number}", "/") for number in range(CLIENTS)]
    one = await tasks_of(server.emit("news", 1, to=sids[0]))
    all_of_them = await tasks_of(server.emit("news", 1))
    print(f"tasks of an emit to one client: {one}, to {CLIENTS} clients: {all_of_them}")
    assert (one, all_of_them) == (1, CLIENTS), "this has changed"

    logged = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context["message"]))
    server.eio.send_packet = fail
    await server.emit("news", 2)
    gc.collect()
    print(f"every send failed, and emit raised nothing; later asyncio logged {len(logged)} times: {logged[0]}")
    assert logged == ["Task exception was never retrieved"] * CLIENTS, "this has changed"


asyncio.run(main())
PYTHON
