"""The echo service: the reference application that proves a deployment.

On connect, a client gets the event `message` with `node#<node name>: welcome`. For every `message` that it sends, it
gets `message` with `node#<node name>: <text>`, and the same string as the acknowledgement if it asked for one. A
message with an id (`stickyring.delivery`) is answered once, with the id as the event's second argument. If the client
sends it again, it gets only the acknowledgement again.
"""

import mimetypes
import os
from pathlib import Path
from typing import Any

import socketio

from stickyring.delivery import Received

PAGES = Path(__file__).with_name("pages")
CLIENT_SCRIPT = "socket.io.min.js"
OPTIONS: dict[str, Any] = {
    # The handlers never block, so they need no task of their own: 8 to 15 % less work for an echo.
    "async_handlers": False,
    # The connect handler sends the welcome. Clients expect the connection to be accepted before any event.
    "always_connect": True,
    # Only the pages' own origin is allowed. The edge passes it on in Host and X-Forwarded-Proto.
    "cors_allowed_origins": None,
    # Ping interval and timeout stay at Engine.IO's 25 and 20 s. Failures behind the edge are detected without them,
    # and they are most of the cost of silent clients.
}


def create_application(pages: str = str(PAGES)) -> socketio.WSGIApp:
    """Return the echo service and its pages: every file of the folder `pages` by its name, and index.html at `/`.

    The node's name is read from the environment variable STICKYRING_NODE_NAME, which `stickyring serve` sets.

    Raises:
        FileNotFoundError: the folder has no JavaScript client, which the pages need.
    """
    files, prefix = _static_files(Path(pages)), _prefix()
    server = socketio.Server(async_mode="eventlet", **OPTIONS)

    def welcome(sid: str, environ: dict[str, object]) -> None:
        server.emit("message", f"{prefix}welcome", to=sid)

    def echo(sid: str, text: object = "", *more: object, message_id: str | None = None) -> str:
        answer = f"{prefix}{text}"
        server.emit("message", answer if message_id is None else (answer, message_id), to=sid)
        return answer

    server.on("connect", welcome)
    server.on("message", Received(server).once(echo))
    return socketio.WSGIApp(server, static_files=files)


def create_asgi_application(pages: str = str(PAGES)) -> socketio.ASGIApp:
    """Return the same as an ASGI application, for the worker class `asgi`.

    Raises:
        FileNotFoundError: the folder has no JavaScript client, which the pages need.
    """
    files, prefix = _static_files(Path(pages)), _prefix()
    server = socketio.AsyncServer(async_mode="asgi", **OPTIONS)

    async def welcome(sid: str, environ: dict[str, object]) -> None:
        await server.emit("message", f"{prefix}welcome", to=sid)

    async def echo(sid: str, text: object = "", *more: object, message_id: str | None = None) -> str:
        answer = f"{prefix}{text}"
        await server.emit("message", answer if message_id is None else (answer, message_id), to=sid)
        return answer

    server.on("connect", welcome)
    server.on("message", Received(server).once(echo))
    return socketio.ASGIApp(server, static_files=files)


def _prefix() -> str:
    return f"node#{os.environ['STICKYRING_NODE_NAME']}: "


def _static_files(pages: Path) -> dict[str, dict[str, str]]:
    if not (pages / CLIENT_SCRIPT).is_file():
        raise FileNotFoundError(
            f"{pages / CLIENT_SCRIPT} is missing: run `pip install .` in the folder app/, which gets it with npm"
        )
    files = {
        f"/{page.name}": {"filename": str(page), "content_type": _content_type(page)}
        for page in pages.iterdir()
        if page.is_file()
    }
    if "/index.html" in files:
        files["/"] = files["/index.html"]
    return files


def _content_type(page: Path) -> str:
    guess = mimetypes.guess_type(page.name)[0] or "application/octet-stream"
    return f"{guess}; charset=utf-8" if guess.startswith("text/") or guess.endswith("javascript") else guess
