#!/bin/sh
# python-socketio 5.18.1's clients over polling: if the server takes longer to answer CONNECT than the client waits for the POST that
# has the CONNECT (request_timeout, 5 s by default), the client believes that it is connected, is not, and never reconnects.
#
# Expected: `connect` raises an error, or the client reconnects as after any lost connection.
# Seen: the write loop ends when the POST times out. The next poll has the answer to CONNECT, and the read loop ends after it. The
# answer is handled in a task after that: `connect` returns, and `connected` is true without a connection. Each attempt to reconnect
# fails because the client is `Already connected`.
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

import socketio
from aiohttp import web

CONNECT_SECONDS, WATCHED_SECONDS = 6, 10
logging.disable(logging.DEBUG)
server = socketio.AsyncServer(async_mode="aiohttp")


@server.event
async def connect(sid, environ):
    await asyncio.sleep(CONNECT_SECONDS)


async def main():
    application = web.Application()
    server.attach(application)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    client = socketio.AsyncClient(reconnection_delay=0.1, reconnection_delay_max=0.1)
    await client.connect(url, transports=["polling"], wait_timeout=15)
    print("after connect:", client.connected)
    seen = set()
    for _ in range(WATCHED_SECONDS * 10):
        await asyncio.sleep(0.1)
        seen.add((client.connected, client.eio.state))
    print(f"in {WATCHED_SECONDS} s after that, connected and the state of the connection: {seen}")
    assert seen == {(True, "disconnected")}, "this has changed"
    await client.shutdown()
    await runner.cleanup()


asyncio.run(main())
PYTHON
