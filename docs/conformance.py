"""Echoes that the protocol suites of socketio/socket.io expect; `python conformance.py engine|chat` runs the stock way.

Under `stickyring serve` they are `conformance:engine` and `conformance:chat`. The first answers each message of
Engine.IO, the second has the events and namespaces that the suite of Socket.IO expects.
"""

import sys
from typing import Any

import eventlet
import eventlet.wsgi
import socketio

OPTIONS = {"async_mode": "eventlet", "ping_interval": 0.3, "ping_timeout": 0.2, "always_connect": True}


def _engine() -> socketio.WSGIApp:
    server = socketio.Server(**OPTIONS)
    server.eio.on("message", server.eio.send)
    return socketio.WSGIApp(server, socketio_path="engine.io")


def _chat() -> socketio.WSGIApp:
    server = socketio.Server(**OPTIONS)
    for namespace in ("/", "/custom"):

        def greet(sid: str, environ: dict[str, Any], auth: object, namespace: str = namespace) -> None:
            server.emit("auth", auth or {}, to=sid, namespace=namespace)

        server.on("connect", greet, namespace)

    def answer(sid: str, *arguments: object) -> None:
        server.emit("message-back", arguments, to=sid)

    server.on("message", answer)
    server.on("message-with-ack", lambda sid, *arguments: arguments)
    return socketio.WSGIApp(server)


engine, chat = _engine(), _chat()

if __name__ == "__main__":
    eventlet.wsgi.server(eventlet.listen(("127.0.0.1", 3000)), {"engine": engine, "chat": chat}[sys.argv[1]])
