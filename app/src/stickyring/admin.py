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
from pathlib import Path

import socketio

PATH, NAMESPACE, USER = "/admin-ui/", "/admin", "admin"
PASSWORD_VARIABLE = "ADMIN_PASSWORD"
SHORTEST_PASSWORD = 16


def instrument(
    server: socketio.Server, folder: Path, *, mode: str = "production", read_only: bool = True
) -> dict[str, dict[str, str]]:
    """Have the server tell the Admin UI what it does; return the page's files, as `static_files` takes them.

    Without a password, it does nothing and returns no files.

    Args:
        server: a `socketio.Server` or `socketio.AsyncServer`, before it serves.
        folder: what `stickyring admin-ui` has written.
        mode: `production` shows processes and figures. `development` also shows each user, room and event, and sends
            an event to the Admin UI for each event of a user, which is for few users.
        read_only: whether the Admin UI cannot send events, move users to rooms or disconnect them.

    Raises:
        FileNotFoundError: there is no page in the folder.
        ValueError: the password has less than 16 characters.
    """
    password = os.environ.get(PASSWORD_VARIABLE, "")
    if not password:
        return {}
    if len(password) < SHORTEST_PASSWORD:
        raise ValueError(f"{PASSWORD_VARIABLE} has {len(password)} characters: give at least {SHORTEST_PASSWORD}")
    if not (folder / "index.html").is_file():
        raise FileNotFoundError(f"{folder / 'index.html'} is missing: run `stickyring admin-ui {folder}`")

    def is_admin(given: object) -> bool:
        if not (isinstance(given, dict) and given.get("username") == USER and isinstance(given.get("password"), str)):
            return False
        return hmac.compare_digest(given["password"].encode(), password.encode())

    server.instrument(
        auth=is_admin,
        mode=mode,
        read_only=read_only,
        server_id=os.environ.get("STICKYRING_NODE_NAME"),
        namespace=NAMESPACE,
    )
    files = {
        f"{PATH}{path.relative_to(folder).as_posix()}": {"filename": str(path), "content_type": _type_of(path)}
        for path in folder.rglob("*")
        if path.is_file()
    }
    return files | {PATH: files[f"{PATH}index.html"]}


def _type_of(path: Path) -> str:
    return mimetypes.guess_type(path.name)[0] or "application/octet-stream"
