#!/bin/sh
# python-socketio 5.18.1's clients over polling: if a POST is refused while a poll is open, an acknowledgement in the poll's answer is
# received and thrown away.
#
# Expected: `call` returns the acknowledgement that has arrived.
# Seen: the write loop ends with the refused POST, and the read loop after the poll's answer. Packets are handled in tasks, which run
# after the client has forgotten its callbacks: `Unknown callback received, ignoring`, and `call` raises TimeoutError. So a server that
# ends a session has to wait for the next poll, or the client sends an event again that was acknowledged.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  python-socketio==5.18.1 python-engineio==4.15.1 aiohttp==3.14.5
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import json
import logging

import socketio
from aiohttp import web

OPEN = {"sid": "engine", "upgrades": [], "pingInterval": 25000, "pingTimeout": 20000, "maxPayload": 1000000}
answers = asyncio.Queue()
refused = asyncio.Event()


async def poll(request):
    if "sid" not in request.query:
        return web.Response(text=f"0{json.dumps(OPEN)}")
    return web.Response(text=await answers.get())


async def post(request):
    packet = await request.text()
    if packet.startswith("40"):
        answers.put_nowait('40{"sid":"session"}')
    elif "typing" in packet:
        refused.set()
        return web.Response(status=400)
    return web.Response(text="ok")


async def acknowledge():
    await refused.wait()
    await asyncio.sleep(0.05)  # the refusal comes first
    answers.put_nowait('430["done"]')


async def main():
    application = web.Application()
    application.add_routes([web.get("/socket.io/", poll), web.post("/socket.io/", post)])
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    lines = []
    log = logging.getLogger("client")
    log.setLevel(logging.INFO)
    log.addHandler(handler := logging.Handler())
    handler.emit = lambda record: lines.append(record.getMessage())
    client = socketio.AsyncClient(reconnection=False, logger=log, engineio_logger=log)
    await client.connect(f"http://127.0.0.1:{runner.addresses[0][1]}", transports=["polling"])
    asking = asyncio.create_task(client.call("order", timeout=5))
    await asyncio.sleep(0.2)
    late = asyncio.create_task(acknowledge())
    await client.emit("typing")
    result = (await asyncio.gather(asking, return_exceptions=True))[0]
    await late
    seen = [line for line in lines if "done" in line or "callback" in line]
    print("call:", repr(result))
    print("log:", *seen, sep="\n  ")
    assert isinstance(result, socketio.exceptions.SocketIOError), "this has changed"
    assert any("done" in line for line in seen) and "Unknown callback received, ignoring." in seen, "this has changed"
    await client.shutdown()
    await runner.cleanup()


asyncio.run(main())
PYTHON
