"""Socket.IO's Admin UI: its page from npm, its password, and what it sees of one process and of all at a bus."""

import os
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import socketio
from bus_fleet import Bus
from conftest import STICKYRING, ServeProcess, serving

APPLICATION = """
from pathlib import Path

import socketio
import stickyring.admin
import stickyring.bus

server = socketio.Server(async_mode="eventlet", client_manager=stickyring.bus.manager())
page = stickyring.admin.instrument(server, Path("admin_ui").resolve())
application = socketio.WSGIApp(server, static_files=page)
"""
PASSWORD = "correct horse battery"
Start = Callable[..., ServeProcess]


@pytest.fixture
def node(tmp_path: Path) -> Any:
    """Starts a node with a page that says where it comes from."""
    with ExitStack() as stack:

        def start(name: str, more: str = "", **environment: Any) -> ServeProcess:
            folder = tmp_path / name
            (folder / "admin_ui" / "img").mkdir(parents=True)
            (folder / "admin_ui" / "index.html").write_text("<title>Admin UI</title>")
            (folder / "admin_ui" / "img" / "logo.svg").write_text("<svg/>")
            (folder / "app.py").write_text(APPLICATION + more)
            return stack.enter_context(serving(folder, "app:application", "--node-name", name, **environment))

        yield start


def statistics(node: ServeProcess, password: str, wanted: set[str]) -> dict[str, Any]:
    """What the processes tell an administrator, by their names, once the wanted ones have."""
    found: dict[str, Any] = {}
    with socketio.SimpleClient() as client:
        login = {"username": "admin", "password": password}
        client.connect(node.url, auth=login, namespace="/admin", transports=["websocket"])
        while not wanted <= found.keys():
            event, *told = client.receive(timeout=10)
            if event == "server_stats":
                found[told[0]["serverId"]] = told[0]
    return found


FULL_ONCE = """
from stickyring.bus.outbox import BusFullError

emit, refused = server.manager.emit, []

def full_once(event, *args, **options):
    if event == "server_stats" and not refused:
        refused.append(event)
        raise BusFullError("full")
    return emit(event, *args, **options)

server.manager.emit = full_once
"""


def test_statistics_continue_after_a_full_bus(node: Start) -> None:
    one = node("node1-1", more=FULL_ONCE, ADMIN_PASSWORD=PASSWORD)
    assert statistics(one, PASSWORD, {"node1-1"})["node1-1"]["uptime"] > 3, "not the first ones, after two seconds"


def test_an_administrator_sees_the_process(node: Start) -> None:
    one = node("node1-1", ADMIN_PASSWORD=PASSWORD)
    with socketio.SimpleClient() as user:
        user.connect(one.url, transports=["websocket"])
        told = statistics(one, PASSWORD, {"node1-1"})["node1-1"]
    assert told["clientsCount"] == 2
    assert {space["name"]: space["socketsCount"] for space in told["namespaces"]}["/admin"] == 1


@pytest.mark.parametrize("password", ["", "wrong", PASSWORD[:-1], "\ud800", None, ["a"]])
def test_nobody_else_sees_it(node: Start, password: Any) -> None:
    one = node("node1-1", ADMIN_PASSWORD=PASSWORD)
    for login in ({"username": "admin", "password": password}, {"username": "root", "password": PASSWORD}, password):
        with socketio.SimpleClient() as client, pytest.raises(socketio.exceptions.ConnectionError):
            client.connect(one.url, auth=login, namespace="/admin")


def test_its_page_is_served(node: Start) -> None:
    one = node("node1-1", ADMIN_PASSWORD=PASSWORD)
    for path, kind, text in (
        ("/admin-ui/", "text/html", b"<title>Admin UI</title>"),
        ("/admin-ui/img/logo.svg", "image/svg+xml", b"<svg/>"),
    ):
        answer = one.get(path)
        assert (answer.status, answer.headers.get_content_type(), answer.read()) == (200, kind, text)
    assert one.get("/admin-ui/../app.py").status == 404


def test_without_a_password_there_is_none(node: Start) -> None:
    one = node("node1-1")
    assert one.get("/admin-ui/").status == 404
    with socketio.SimpleClient() as client, pytest.raises(socketio.exceptions.ConnectionError):
        client.connect(one.url, auth={"username": "admin", "password": ""}, namespace="/admin")


@pytest.mark.parametrize(
    ("password", "page", "before", "message"),
    [
        ("too short", True, "", "ADMIN_PASSWORD has 9 characters: give at least 16"),
        (PASSWORD, False, "", "index.html is missing"),
        (PASSWORD, True, 'server.on("connect", print, "/admin")\n', "has handlers for the namespace /admin"),
        (PASSWORD, True, 'server.register_namespace(socketio.Namespace("/admin"))\n', "has handlers for the namespace"),
    ],
)
def test_what_would_not_be_safe_is_refused(
    tmp_path: Path, password: str, page: bool, before: str, message: str
) -> None:
    (tmp_path / "app.py").write_text(APPLICATION.replace("page =", f"{before}page ="))
    if page:
        (tmp_path / "admin_ui").mkdir()
        (tmp_path / "admin_ui" / "index.html").touch()
    environment = os.environ | {"ADMIN_PASSWORD": password}
    command = [str(STICKYRING), "serve", "--check", "app:application"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert message in done.stderr


def test_with_a_bus_it_shows_the_processes_of_all_nodes(node: Start, bus: Bus) -> None:
    one, other = (node(name, ADMIN_PASSWORD=PASSWORD, STICKYRING_BUS_URL=bus.url) for name in ("node1-1", "node2-1"))
    # A process tells once somebody has been there.
    with socketio.SimpleClient() as user:
        user.connect(other.url, transports=["websocket"])
        told = statistics(one, PASSWORD, {"node1-1", "node2-1"})
    assert told["node2-1"]["clientsCount"] == 1


@pytest.mark.eventlet
def test_the_page_comes_from_npm_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "admin_ui"

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [str(STICKYRING), "admin-ui", str(folder), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run().returncode == 0
    index = (folder / "index.html").read_text()
    assert "https://" not in index
    assert "css/materialdesignicons.min.css" in index
    assert (folder / "css" / "materialdesignicons.min.css").is_file()
    assert (folder / "fonts" / "materialdesignicons-webfont.woff2").is_file()
    assert not [*folder.rglob("*.map")]
    again = run()
    assert (again.returncode, again.stderr) == (1, f"Error: {folder} exists: --replace replaces it\n")
    assert run("--replace").returncode == 0
    assert index == (folder / "index.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["admin_ui"]


@pytest.mark.eventlet
def test_nothing_but_a_page_is_replaced(tmp_path: Path) -> None:
    """A slip of the hand would name the application's own folder."""
    package, link = tmp_path / "chat", tmp_path / "link"
    package.mkdir()
    (package / "index.html").write_text("<title>Chat</title>")
    link.symlink_to(package)
    for folder in package, link, package / "index.html":
        command = [str(STICKYRING), "admin-ui", str(folder), "--replace"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (1, f"Error: {folder} is not a folder that this command has written\n")
    assert (package / "index.html").read_text() == "<title>Chat</title>"
