#!/bin/sh
# python-engineio 4.15.1: what a server announces as pingInterval is its ping interval without the part below a second.
#
# Expected: milliseconds, as the protocol has them: 2500 for ping_interval=2.5, as pingTimeout is 1500 for ping_timeout=1.5.
# Seen: 2000 beside 1500; 0 for an interval below a second. The pings themselves come in the interval that was asked for. A client
# that gives up after pingInterval + pingTimeout without a ping waits for less than it should.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check python-engineio==4.15.1 simple-websocket==1.1.0
"$folder/venv/bin/python" - <<'PYTHON'
import json

import engineio

seen = []
for interval in (3, 2.5, 0.5):
    server = engineio.Server(async_mode="threading", ping_interval=interval, ping_timeout=1.5, monitor_clients=False)
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/engine.io/", "QUERY_STRING": "EIO=4&transport=polling"}
    body = b"".join(server.handle_request(environ, lambda status, headers: None))
    opened = json.loads(body.decode()[1:])
    seen.append((interval, opened["pingInterval"], opened["pingTimeout"]))
    print(f"ping_interval={interval}: pingInterval {opened['pingInterval']}, pingTimeout {opened['pingTimeout']}")
assert seen == [(3, 3000, 1500), (2.5, 2000, 1500), (0.5, 0, 1500)], "this has changed"
PYTHON
