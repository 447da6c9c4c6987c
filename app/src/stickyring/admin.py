"""Socket.IO's Admin UI for an application, behind a password: the processes, their users, and how much they do.

`stickyring admin-ui FOLDER` writes the page into a folder of the application::

    server = socketio.Server(client_manager=stickyring.bus.manager())
    page = stickyring.admin.instrument(server, Path(__file__).with_name("admin_ui"))
    application = socketio.WSGIApp(server, static_files=page)

It is there if the environment has ADMIN_PASSWORD, which is a secret (`stickyring_node_secrets`): at `/admin-ui/` of the
application. Log in as `admin`, with the URL of the application as that of the server. With a bus, it
shows the processes of all nodes. See https://socket.io/docs/v4/admin-ui; python-socketio does the server's part.
"""

import hmac
import mimetypes
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import socketio

from stickyring.bus.outbox import BusFullError

PATH, NAMESPACE, USER = "/admin-ui/", "/admin", "admin"
PASSWORD_VARIABLE = "ADMIN_PASSWORD"
SHORTEST_PASSWORD = 16


def instrument(server: socketio.Server, folder: Path) -> dict[str, dict[str, str]]:
    """Have the server tell the Admin UI what it does; return the page's files, as `static_files` takes them.

    Without a password, it does nothing and returns no files. The namespace `/admin` is the Admin UI's: the application
    must not define handlers for it, which would replace the check of the password.

    Args:
        server: a `socketio.Server` or `socketio.AsyncServer`, before it serves.
        folder: what `stickyring admin-ui` has written.

    Raises:
        FileNotFoundError: there is no page in the folder.
        ValueError: the password has less than 16 characters, or the application has handlers for the namespace.
    """
    password = os.environ.get(PASSWORD_VARIABLE, "")
    if not password:
        return {}
    if len(password) < SHORTEST_PASSWORD:
        raise ValueError(f"{PASSWORD_VARIABLE} has {len(password)} characters: give at least {SHORTEST_PASSWORD}")
    if not (folder / "index.html").is_file():
        raise FileNotFoundError(
            f"{folder / 'index.html'} is missing: run `stickyring admin-ui` where the application's source is, and have"
            " its wheel include the folder"
        )
    if NAMESPACE in server.handlers or NAMESPACE in server.namespace_handlers:
        raise ValueError(f"the application has handlers for the namespace {NAMESPACE}, which is the Admin UI's")

    def is_admin(given: object) -> bool:
        if not (isinstance(given, dict) and given.get("username") == USER and isinstance(given.get("password"), str)):
            return False
        # JSON has texts that are not valid Unicode.
        return hmac.compare_digest(*(text.encode("utf-8", "surrogatepass") for text in (given["password"], password)))

    instrumented = server.instrument(
        auth=is_admin,
        # "development" sends an event for each event of a user, with their cookies.
        mode="production",
        read_only=True,
        server_id=os.environ.get("STICKYRING_NODE_NAME"),
        namespace=NAMESPACE,
    )
    instrumented.sio = _Dropping(server)
    files = {
        f"{PATH}{path.relative_to(folder).as_posix()}": {"filename": str(path), "content_type": _type_of(path)}
        for path in folder.rglob("*")
        if path.is_file()
    }
    return files | {PATH: files[f"{PATH}index.html"]}


class _Dropping:
    """The server, except that it drops events while the bus is full; an error would end the statistics for good."""

    def __init__(self, server: Any) -> None:  # noqa: ANN401 - python-socketio has no type hints
        self._server = server
        self.emit = self._emit_async if isinstance(server, socketio.AsyncServer) else self._emit

    def __getattr__(self, name: str) -> object:
        return getattr(self._server, name)

    def _emit(self, *args: object, **options: object) -> None:
        with suppress(BusFullError):
            self._server.emit(*args, **options)

    async def _emit_async(self, *args: object, **options: object) -> None:
        with suppress(BusFullError):
            await self._server.emit(*args, **options)


def _type_of(path: Path) -> str:
    return mimetypes.guess_type(path.name)[0] or "application/octet-stream"
