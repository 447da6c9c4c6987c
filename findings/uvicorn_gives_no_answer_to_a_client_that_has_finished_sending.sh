#!/bin/sh
# uvicorn 0.54.0 (httptools and h11): a client that ends its side of the connection after a whole request gets no answer.
#
# Expected: TCP connections can be half-closed. A client that shuts down sending after its request (`nc -N`, some proxies and scripts)
# still reads, and gets the answer, as from gunicorn 27.0.1 with its gthread worker.
# Seen: if the application needs a moment, uvicorn closes the connection without a byte. The application runs to its end. With an
# answer that is ready at once, the client may get it or not.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check uvicorn==0.54.0 httptools==0.9.0 h11==0.16.0 gunicorn==27.0.1
cat > "$folder/application.py" <<'PYTHON'
import asyncio
import time


async def asgi(scope, receive, send):
    if scope["type"] != "http":
        raise RuntimeError("only HTTP")
    await asyncio.sleep(0.3)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
    await send({"type": "http.response.body", "body": b"answer"})
    print("the application has answered", flush=True)


def wsgi(environ, start_response):
    time.sleep(0.3)
    start_response("200 OK", [("Content-Length", "6")])
    return [b"answer"]
PYTHON
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import signal
import socket
import subprocess
import sys
import time

folder = sys.argv[1]
uvicorn = [f"{folder}/venv/bin/uvicorn", "--log-level", "critical", "--lifespan", "off"]
servers = {
    "uvicorn, httptools": [*uvicorn, "--http", "httptools", "--port", "{}", "application:asgi"],
    "uvicorn, h11": [*uvicorn, "--http", "h11", "--port", "{}", "application:asgi"],
    "gunicorn, gthread": [f"{folder}/venv/bin/gunicorn", "--worker-class", "gthread", "--bind", "127.0.0.1:{}", "application:wsgi"],
}


def ask(port, half_closed):
    deadline = time.monotonic() + 10
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=5)
            break
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    with connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        if half_closed:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while data := connection.recv(4096):
            received += data
        return received.endswith(b"answer")


for name, command in servers.items():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with open(f"{folder}/out", "w") as out:
        process = subprocess.Popen([one.format(port) for one in command], cwd=folder, stdout=out, stderr=subprocess.DEVNULL)
        try:
            whole, half_closed = ask(port, False), ask(port, True)
            time.sleep(0.6)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(20)
    said = open(f"{folder}/out").read().count("the application has answered")
    print(f"{name}: open connection: {whole}, half-closed connection: {half_closed}, application finished: {said or 'not counted'}")
    assert whole
    assert half_closed == name.startswith("gunicorn"), "this has changed"
    assert said == (2 if name.startswith("uvicorn") else 0), "this has changed"
PYTHON
