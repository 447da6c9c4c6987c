#!/bin/sh
# python-socketio 5.18.1: an event for a namespace that its client is not in is logged and dropped, and the POST that brought it
# is answered with 200 OK; one with an attachment ends in an exception instead, and the same POST is answered with OK as well.
#
# Expected: one way for both, which the client can tell: socket.io for Node.js closes the connection.
# Seen: OK for both, no disconnect for either, and the event reaches no handler. Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check python-socketio==5.18.1 python-engineio==4.15.1
"$folder/venv/bin/python" - <<'PYTHON'
import io
import json
import logging

import socketio

logging.disable()
server = socketio.Server(async_mode="threading", async_handlers=False, monitor_clients=False)
handled, left = [], []
for namespace in ("/", "/room"):
    server.on("connect", lambda sid, environ: None, namespace=namespace)
    server.on("note", lambda sid, *arguments: handled.append(arguments), namespace=namespace)
    server.on("disconnect", lambda sid, reason: left.append(reason), namespace=namespace)


def ask(method, query, body=b""):
    environ = {
        "REQUEST_METHOD": method, "PATH_INFO": "/socket.io/", "QUERY_STRING": f"EIO=4&transport=polling{query}",
        "CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body),
    }
    statuses = []
    answer = b"".join(server.handle_request(environ, lambda status, headers: statuses.append(status)))
    return statuses[0], answer.decode()


sid = json.loads(ask("GET", "")[1][1:])["sid"]
seen = []
for packets in ("40", '42["note",1]', '42/room,["note",2]', '451-/room,["note",{"_placeholder":true,"num":0}]', '42["note",3]'):
    seen.append(ask("POST", f"&sid={sid}", packets.encode()))
    print(packets, *seen[-1])
print("handled:", handled, "ended:", left)
assert seen == [("200 OK", "OK")] * 5, "this has changed"
assert (handled, left) == ([(1,), (3,)], []), "this has changed"
PYTHON
