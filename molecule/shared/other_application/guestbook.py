"""A guestbook: another team's python-socketio application, with a page, settings and a health path of its own.

Send the event `sign` with a name; all clients get the event `signed` with it, and `/` lists the names, one per line.
"""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import socketio

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

names: list[str] = []
server = socketio.Server(async_mode="eventlet")


@server.event
def sign(sid: str, name: str) -> int:
    """Add a name; acknowledge with the number of names."""
    names.append(name)
    server.emit("signed", name)
    return len(names)


def pages(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
    """Answer `/health` and `/`."""
    title = os.environ.get("GUESTBOOK_TITLE", "Guestbook")
    known = {"/health": "well\n", "/": "\n".join([title, *names]) + "\n"}
    text = known.get(environ["PATH_INFO"])
    start_response("404 Not Found" if text is None else "200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [(text or "not here\n").encode()]


application = socketio.WSGIApp(server, pages)
