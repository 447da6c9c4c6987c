"""Uploads into a database, behind a password; a stream of events, a slow report, a static file, packets in MessagePack.

Deploy `photo_wall:application` with the secret WALL_PASSWORD, which clients give as `auth={"password": ...}`.
"""

import os
import sqlite3
from collections.abc import Iterator

import socketio
from flask import Flask, Response, request

PASSWORD = os.environ["WALL_PASSWORD"]
REPORT_SECONDS = 3

database = sqlite3.connect(":memory:", check_same_thread=False)
database.execute("CREATE TABLE photos (owner TEXT, content BLOB)")
reports: list[object] = []
pages = Flask(__name__, static_folder=None)
server = socketio.Server(serializer="msgpack")
application = socketio.WSGIApp(server, pages, static_files={"/style.py": {"filename": __file__}})


@pages.get("/")
def index() -> str:
    """Show the numbers of photos, and of reports that are being made."""
    return f"{count()} photos, {len(reports)} reports"


@pages.post("/upload/<owner>")
def upload(owner: str) -> str:
    """Keep a photo, whatever its bytes are."""
    with database:
        database.execute("INSERT INTO photos VALUES (?, ?)", (owner, request.get_data()))
    return str(count())


@pages.get("/events")
def events() -> Response:
    """Send an event a second, for ever."""

    def numbers() -> Iterator[str]:
        while True:
            yield f"data: {count()}\n\n"
            server.sleep(1)

    return Response(numbers(), content_type="text/event-stream")


@pages.get("/reports/slow")
def report() -> str:
    """Answer after some seconds."""
    reports.append(request)
    server.sleep(REPORT_SECONDS)
    reports.pop()
    return "done"


@server.event
def connect(sid: str, environ: dict[str, object], auth: dict[str, str] | None) -> None:
    """Refuse a client without the password."""
    if (auth or {}).get("password") != PASSWORD:
        raise socketio.exceptions.ConnectionRefusedError("wrong password")


@server.event
def fetch(sid: str, owner: str) -> list[bytes]:
    """Return an owner's photos."""
    return [content for (content,) in database.execute("SELECT content FROM photos WHERE owner = ?", (owner,))]


@server.event
def say(sid: str, text: str) -> str:
    """Acknowledge a text."""
    return text


def count() -> int:
    """Return the number of photos."""
    return int(database.execute("SELECT count(*) FROM photos").fetchone()[0])
