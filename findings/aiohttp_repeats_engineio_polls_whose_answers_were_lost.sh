#!/bin/sh
# python-socketio 5.18.1's asyncio client over polling, on aiohttp 3.14.5: if a connection ends while the answer to a poll is on its
# way, as when a proxy restarts, aiohttp repeats the GET on another connection.
#
# Expected: the request fails, and the client disconnects and connects again, so that the application knows that something may be
# missing. A poll is no idempotent request: its answer takes messages out of the server's queue.
# Seen: the second answer has the messages after those of the first one. An event is missing, and the client stays connected.
# The same with a session's `_retry_connection` off: the client disconnects, with the reason `transport error`.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  python-socketio==5.18.1 python-engineio==4.15.1 aiohttp==3.14.5
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import logging

import aiohttp
import socketio
from aiohttp import web

logging.disable()
server = socketio.AsyncServer(async_mode="aiohttp")


async def serve():
    application = web.Application()
    server.attach(application)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, runner.addresses[0][1]


async def proxy(to):
    """Serve a proxy that ends connections instead of passing on an answer with the event `lost`."""

    async def pass_on(reader, writer):
        while data := await reader.read(65536):
            if b'["lost"]' in data:
                break
            writer.write(data)
        writer.close()

    async def connect(reader, writer):
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", to)
        await asyncio.gather(pass_on(reader, upstream_writer), pass_on(upstream_reader, writer))

    started = await asyncio.start_server(connect, "127.0.0.1", 0)
    return started, started.sockets[0].getsockname()[1]


async def seen(port, *, repeats):
    happened, ends = [], asyncio.Event()
    session = aiohttp.ClientSession()
    session._retry_connection = repeats
    client = socketio.AsyncClient(reconnection=False, http_session=session)
    client.on("lost", lambda: happened.append("lost"))

    @client.event
    async def last():
        happened.append("last")
        ends.set()

    @client.event
    async def disconnect(reason):
        happened.append(reason)
        ends.set()

    await client.connect(f"http://127.0.0.1:{port}", transports=["polling"])
    # Such a request is repeated only on a connection that has been used.
    await asyncio.sleep(0.5)
    await server.emit("lost")
    await asyncio.sleep(0.5)
    await server.emit("last")
    await asyncio.wait_for(ends.wait(), 10)
    seen_so_far = [*happened]
    await client.shutdown()
    await session.close()
    return seen_so_far


async def main():
    runner, to = await serve()
    started, port = await proxy(to)
    repeating, failing = await seen(port, repeats=True), await seen(port, repeats=False)
    print("aiohttp's defaults:", repeating)
    print("without repeating:", failing)
    assert repeating == ["last"], "this has changed"
    assert failing == ["transport error"], "this has changed"
    started.close()
    await runner.cleanup()


asyncio.run(main())
PYTHON
