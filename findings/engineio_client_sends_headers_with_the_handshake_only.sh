#!/bin/sh
# python-engineio 4.15.1: the headers given to a client's connect() are in the handshake, and in no later request while it polls.
#
# Expected: "custom headers to send with the connection requests", so with each request of the connection, as the JavaScript client's
# extraHeaders are.
# Seen: of the handshake, the polls and the POSTs of a connection, only the first has the header, from Client and AsyncClient. A proxy that
# asks each request for a token, or finds the user's node by a header, refuses or misroutes the rest.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
export HOME="$folder"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check python-engineio==4.15.1 requests==2.34.2 aiohttp==3.14.5
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio, sys, threading
from wsgiref.simple_server import WSGIRequestHandler, make_server

import engineio

seen = []
server = engineio.Server(async_mode="threading", allow_upgrades=False)
server.on("message", lambda sid, data: server.send(sid, data))
inner = engineio.WSGIApp(server)


def application(environ, start_response):
    seen.append((environ["REQUEST_METHOD"], "HTTP_X_TOKEN" in environ))
    return inner(environ, start_response)


class Quiet(WSGIRequestHandler):
    def log_message(self, *arguments):
        pass


from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIServer


class Threaded(ThreadingMixIn, WSGIServer):
    daemon_threads = True


listening = make_server("127.0.0.1", 0, application, Threaded, Quiet)
threading.Thread(target=listening.serve_forever, daemon=True).start()
url, given = f"http://127.0.0.1:{listening.server_port}", {"headers": {"X-Token": "t"}, "transports": ["polling"]}


def plain():
    client, heard = engineio.Client(), threading.Event()
    client.on("message", lambda data: heard.set())
    client.connect(url, **given)
    client.send("hello")
    assert heard.wait(10)
    client.disconnect()


async def asynchronous():
    client, heard = engineio.AsyncClient(), asyncio.Event()
    client.on("message", lambda data: heard.set())
    await client.connect(url, **given)
    await client.send("hello")
    await asyncio.wait_for(heard.wait(), 10)
    await client.disconnect()


ended = []
for name, run in (("Client", plain), ("AsyncClient", lambda: asyncio.run(asynchronous()))):
    seen.clear()
    run()
    print(f"{name}: " + ", ".join(f"{method} {'with' if has else 'without'} the header" for method, has in seen))
    ended.append([has for _, has in seen][0] and not any(has for _, has in seen[1:]) and {"GET", "POST"} <= {m for m, _ in seen[1:]})
sys.exit(not all(ended))
PYTHON
