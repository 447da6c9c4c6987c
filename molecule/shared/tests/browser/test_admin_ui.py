"""Socket.IO's Admin UI as the documentation adds it to an application: a login, then figures of the process."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import socketio
from playwright.sync_api import Browser, expect

APPLICATION = """
from pathlib import Path

import socketio
import stickyring.admin

server = socketio.Server(async_mode="eventlet")
page = stickyring.admin.instrument(server, Path("admin_ui").resolve())
application = socketio.WSGIApp(server, static_files=page)
"""
PASSWORD = "correct horse battery"


@pytest.fixture
def served(tmp_path: Path, programs: Path) -> Iterator[str]:
    """The address of a process of the application, with the page from npm."""
    stickyring = programs / "stickyring"
    subprocess.run([stickyring, "admin-ui", tmp_path / "admin_ui"], check=True, timeout=60)
    (tmp_path / "app.py").write_text(APPLICATION)
    command = [stickyring, "serve", "app:application", "--listen", "127.0.0.1:0", "--node-name", "node1-1"]
    environment = os.environ | {"ADMIN_PASSWORD": PASSWORD}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        told = (json.loads(line) for line in process.stderr or ())
        yield next(f"http://{line['address']}" for line in told if "address" in line)
        process.kill()


def test_an_administrator_logs_in_and_sees_users(served: str, browser: Browser) -> None:
    page = browser.new_page()
    elsewhere: list[str] = []
    page.on("request", lambda request: elsewhere.append(request.url) if served not in request.url else None)
    page.goto(f"{served}/admin-ui/")

    def log_in(password: str) -> None:
        fields: dict[str, Any] = {"Server URL": served, "Username": "admin", "Password": password}
        for name, value in fields.items():
            page.get_by_label(name).fill(value)
        page.get_by_role("button", name="Connect").click()

    log_in("not the password")
    expect(page.get_by_text("authentication failed")).to_be_visible()
    log_in(PASSWORD)
    expect(page.get_by_text("connected", exact=True).first).to_be_visible()
    with socketio.SimpleClient() as user:
        user.connect(served, transports=["websocket"])
        expect(page.locator("tr", has_text="WebSocket").get_by_role("heading")).to_have_text("2")
    websockets = served.replace("http", "ws")
    assert [url for url in elsewhere if not url.startswith(("data:", "blob:", websockets))] == []
