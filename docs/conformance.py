"""Echoes that the protocol suites of socketio/socket.io expect; `python conformance.py engine|chat` runs the stock way.

Under `stickyring serve` they are `conformance:engine()` and `conformance:chat()`, and `conformance:engine("asgi")` and
`conformance:chat("asgi")` with the worker class `asgi`. The first answers each message of Engine.IO, the second has
the events and namespaces that the suite of Socket.IO expects.
"""

import sys
from typing import Any

import socketio

KINDS = {"eventlet": (socketio.Server, socketio.WSGIApp), "asgi": (socketio.AsyncServer, socketio.ASGIApp)}


def engine(kind: str = "eventlet") -> object:
    """Return the application for the suite of Engine.IO."""
    server, middleware = _server(kind)
    server.eio.on("message", server.eio.send)
    return middleware(server, socketio_path="engine.io")


def chat(kind: str = "eventlet") -> object:
    """Return the application for the suite of Socket.IO."""
    server, middleware = _server(kind)
    for namespace in ("/", "/custom"):

        def greet(sid: str, environ: dict[str, Any], auth: object, namespace: str = namespace) -> None:
            emit("auth", auth or {}, to=sid, namespace=namespace)

        server.on("connect", greet, namespace)

    def answer(sid: str, *arguments: object) -> None:
        emit("message-back", arguments, to=sid)

    def emit(*arguments: object, **options: object) -> None:
        server.start_background_task(server.emit, *arguments, **options)

    server.on("message", answer)
    server.on("message-with-ack", lambda sid, *arguments: arguments)
    return middleware(server)


def _server(kind: str) -> tuple[Any, Any]:
    server, middleware = KINDS[kind]
    return server(async_mode=kind, ping_interval=0.3, ping_timeout=0.2, always_connect=True), middleware


if __name__ == "__main__":
    import eventlet
    import eventlet.wsgi

    eventlet.wsgi.server(eventlet.listen(("127.0.0.1", 3000)), {"engine": engine, "chat": chat}[sys.argv[1]]())
