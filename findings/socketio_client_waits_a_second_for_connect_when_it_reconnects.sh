#!/bin/sh
# python-socketio 5.18.1: a client that was connected with wait_timeout=10 waits 1 s for the server's answer to CONNECT when it
# reconnects by itself.
#
# Expected: reconnection takes the parameters of the connection that it replaces, as it does with URL, headers, transports and auth.
# Seen: with a server whose connect handler takes 2 s, the first connection succeeds, and each reconnection gives up after 1 s, opens
# the next connection, and so on: the connect handler runs again and again, and the client never comes back.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  python-socketio==5.18.1 python-engineio==4.15.1 aiohttp==3.13.2
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import logging

import socketio
from aiohttp import web

logging.disable()
CONNECT_SECONDS, WATCHED_SECONDS = 2, 12
server = socketio.AsyncServer(async_mode="aiohttp")
sessions = []


@server.event
async def connect(sid, environ):
    sessions.append(sid)
    await asyncio.sleep(CONNECT_SECONDS)


async def main():
    application = web.Application()
    server.attach(application)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    client = socketio.AsyncClient(reconnection_delay=0.1, reconnection_delay_max=0.1)
    await client.connect(f"http://127.0.0.1:{port}", transports=["websocket"], wait_timeout=10)
    print("connected with wait_timeout=10, sessions:", len(sessions))
    await client.eio.ws.close()
    back = 0
    for _ in range(WATCHED_SECONDS * 10):
        await asyncio.sleep(0.1)
        back += client.connected
    print(f"{WATCHED_SECONDS} s after a lost connection: sessions opened: {len(sessions) - 1}, connected: {back > 5}")
    assert len(sessions) - 1 >= 4, "this has changed"
    assert back <= 5, "this has changed"
    await client.shutdown()
    await runner.cleanup()


asyncio.run(main())
PYTHON
