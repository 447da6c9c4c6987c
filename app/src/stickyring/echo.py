"""The echo service: the reference application that proves a deployment.

On connect, a client gets the event `message` with `node#<node name>: welcome`. For every `message` that it sends, it
gets `message` with `node#<node name>: <text>`, and the same string as the acknowledgement if it asked for one. A
message with an id (`stickyring.delivery`) is answered once, with the id as the event's second argument. If the client
sends it again, it gets only the acknowledgement again.

A client is in at most one room, that of its last `join`. For `say` with a text, everybody gets `said` with
`node#<node name>: <text>`, the sender's node; with a text and a room, those in the room get it, and the room. With a
bus, these are the users of all nodes, and users who change nodes keep their session (`stickyring.bus`).
"""

import mimetypes
import os
from pathlib import Path
from typing import Any

import socketio

from stickyring import bus
from stickyring.delivery import Received

PAGES = Path(__file__).with_name("pages")
CLIENT_SCRIPT = "socket.io.min.js"
LONGEST_ROOM = 64
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
    server = socketio.Server(async_mode="eventlet", client_manager=bus.manager(recovery=True), **OPTIONS)

    def welcome(sid: str, environ: dict[str, object]) -> None:
        server.emit("message", f"{prefix}welcome", to=sid)

    def echo(sid: str, text: object = "", *more: object, message_id: str | None = None) -> str:
        answer = f"{prefix}{text}"
        server.emit("message", answer if message_id is None else (answer, message_id), to=sid)
        return answer

    def join(sid: str, room: str) -> None:
        for former in _other_rooms(server, sid):
            server.leave_room(sid, former)
        server.enter_room(sid, _checked(room))

    def say(sid: str, text: object, room: str | None = None) -> None:
        server.emit("said", (f"{prefix}{text}", room), room=None if room is None else _checked(room))

    for name, handler in (("connect", welcome), ("message", Received(server).once(echo)), ("join", join), ("say", say)):
        server.on(name, handler)
    return socketio.WSGIApp(server, static_files=files)


def create_asgi_application(pages: str = str(PAGES)) -> socketio.ASGIApp:
    """Return the same as an ASGI application, for the worker class `asgi`.

    Raises:
        FileNotFoundError: the folder has no JavaScript client, which the pages need.
    """
    files, prefix = _static_files(Path(pages)), _prefix()
    server = socketio.AsyncServer(async_mode="asgi", client_manager=bus.async_manager(recovery=True), **OPTIONS)

    async def welcome(sid: str, environ: dict[str, object]) -> None:
        await server.emit("message", f"{prefix}welcome", to=sid)

    async def echo(sid: str, text: object = "", *more: object, message_id: str | None = None) -> str:
        answer = f"{prefix}{text}"
        await server.emit("message", answer if message_id is None else (answer, message_id), to=sid)
        return answer

    async def join(sid: str, room: str) -> None:
        for former in _other_rooms(server, sid):
            await server.leave_room(sid, former)
        await server.enter_room(sid, _checked(room))

    async def say(sid: str, text: object, room: str | None = None) -> None:
        await server.emit("said", (f"{prefix}{text}", room), room=None if room is None else _checked(room))

    for name, handler in (("connect", welcome), ("message", Received(server).once(echo)), ("join", join), ("say", say)):
        server.on(name, handler)
    return socketio.ASGIApp(server, static_files=files)


def _prefix() -> str:
    return f"node#{os.environ['STICKYRING_NODE_NAME']}: "


def _other_rooms(server: Any, sid: str) -> list[str]:  # noqa: ANN401 - untyped
    """Return the rooms of a session but its own."""
    return [room for room in server.rooms(sid) if room != sid]


def _checked(room: object) -> str:
    """Return a room's name that a client chose, which is no session's id.

    Raises:
        ValueError: it is none of a page's names.
    """
    if not (isinstance(room, str) and 0 < len(room) <= LONGEST_ROOM):
        raise ValueError("not a room")
    return f"room {room}"


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
