"""The role stickyring_probe with a login, against applications on a real node, and where the login shows up."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
# Of this process alone: the control below shows it to all who look at command lines meanwhile.
TOKEN = f"sesame-{secrets.token_hex(8)}"
APPLICATION = f"""
import socketio

server = socketio.Server(async_mode="eventlet")
inside = socketio.WSGIApp(server)

@server.event
def connect(sid, environ, auth=None):
    token = dict(auth or ()).get("token")
    if "{TOKEN}" not in (environ.get("HTTP_X_LOGIN"), token):
        raise socketio.exceptions.ConnectionRefusedError("bad token " + str(token))

def application(environ, start_response):
    if environ["PATH_INFO"] == "/health":
        start_response("200 OK", [("x-served-by", "node1-1")])
        return [b"ok"]
    return inside(environ, start_response)
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A node whose application refuses whoever does not know the token."""
    folder = tmp_path_factory.mktemp("node")
    (folder / "chat.py").write_text(APPLICATION)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [str(PROGRAMS / "stickyring"), "serve", "--listen", address, "--node-name", "node1-1", "chat:application"]
    with (folder / "log").open("wb") as log:
        node = subprocess.Popen(command, cwd=folder, stderr=log)
    try:
        deadline = time.monotonic() + 15
        while "serving " not in (folder / "log").read_text():
            assert node.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "the node does not serve"
            time.sleep(0.05)
        yield f"http://{address}"
    finally:
        node.kill()
        node.wait()


def run(folder: Path, url: str, *options: str, settings: str = "") -> tuple[int, str]:
    """Run the role with these variables in an inventory; return the status and the output as one line."""
    play = {
        "hosts": "edge",
        "gather_facts": False,
        "roles": [{"role": "stickyring.fleet.stickyring_probe"}],
    }
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    (folder / "hosts.yml").write_text("edge: {hosts: {edge1: {ansible_host: 192.0.2.1}}}\n")
    (folder / "group_vars").mkdir(exist_ok=True)
    (folder / "group_vars" / "all.yml").write_text(
        f"stickyring_probe_urls: [{url}]\nstickyring_probe_ids: 2\n{settings}"
    )
    done = subprocess.run(
        [PROGRAMS / "ansible-playbook", "-i", folder / "hosts.yml", folder / "play.yml", *options],
        cwd=folder,
        env=os.environ
        | {
            "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(PROJECT / "collections"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_REMOTE_TEMP": str(folder / "remote"),
            "ANSIBLE_LOCAL_TEMP": str(folder / "local"),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@contextmanager
def watched(secret: str, folder: Path) -> Iterator[set[str]]:
    """While the block runs, collect command lines, environments and files below `folder` that contain the secret."""
    found: set[str] = set()
    looks = 0
    ended = threading.Event()

    def look() -> None:
        nonlocal looks
        while not ended.is_set():
            files = [*Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/environ")]
            files += [path for name in ("remote", "local") for path in (folder / name).rglob("*")]
            for path in files:
                try:
                    if secret.encode() in path.read_bytes():
                        found.add(str(path))
                except OSError:
                    continue
            looks += 1

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
    assert looks > 5


def vaulted(folder: Path) -> tuple[str, list[str]]:
    """Settings with the token encrypted inline, and the option that decrypts them."""
    (folder / "password").write_text("open")
    option = f"--vault-password-file={folder / 'password'}"
    command = [str(PROGRAMS / "ansible-vault"), "encrypt_string", option, "--name", "vault_probe_token", TOKEN]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert TOKEN not in done.stdout
    return done.stdout, [option]


STICKY = "sticky as far as can be seen: all 8 sessions completed"


@pytest.mark.parametrize(
    "login",
    [
        'stickyring_probe_auth: {token: "{{ vault_probe_token }}"}',
        'stickyring_probe_headers: {X-Login: "{{ vault_probe_token }}"}',
        'stickyring_probe_auth: {a: b}\nstickyring_probe_headers: {X-Other: a b, X-Login: "{{ vault_probe_token }}"}',
    ],
    ids=["auth", "headers", "both"],
)
def test_a_login_from_a_vault_proves_and_shows_up_nowhere(tmp_path: Path, url: str, login: str) -> None:
    secret, options = vaulted(tmp_path)
    settings = f"stickyring_probe_options: [--no-echo]\n{login}\n{secret}\n"
    with watched(TOKEN, tmp_path) as found:
        status, said = run(tmp_path, url, "-vvv", *options, settings=settings)
    assert status == 0, said
    assert STICKY in said
    assert TOKEN not in said
    assert found == set()


def test_on_the_command_line_the_watch_finds_it(tmp_path: Path, url: str) -> None:
    """The negative control of the test above."""
    settings = f'stickyring_probe_options: [--no-echo, --auth, \'{{"token": "{TOKEN}"}}\']\n'
    with watched(TOKEN, tmp_path) as found:
        status, said = run(tmp_path, url, "-vvv", settings=settings)
    assert (status, STICKY in said) == (0, True), said
    assert TOKEN in said
    assert any(name.endswith("/cmdline") for name in found)


def test_a_refused_login_fails_with_the_reason_and_without_the_login(tmp_path: Path, url: str) -> None:
    settings = 'stickyring_probe_options: [--no-echo]\nstickyring_probe_auth: {token: "wrong-0815"}\n'
    status, said = run(tmp_path, url, "-vvv", settings=settings)
    assert status != 0
    assert "Error: login refused: bad token ***" in said
    assert "wrong-0815" not in said
    assert "stickyring_probe : Fail if a probe that logs in has failed" in said


def test_without_a_login_the_reason_says_how_to_log_in(tmp_path: Path, url: str) -> None:
    status, said = run(tmp_path, url, settings="stickyring_probe_options: [--no-echo]\n")
    assert status != 0
    assert "login refused: bad token None; log in with --auth or --header" in said


@pytest.mark.parametrize("name", ["stickyring_probe_auth", "stickyring_probe_headers"])
def test_a_login_of_the_wrong_type_is_refused_without_showing_it(tmp_path: Path, url: str, name: str) -> None:
    status, said = run(tmp_path, url, "-vvv", settings=f"{name}: [{TOKEN}]\n")
    assert status != 0
    assert f"{name}" in said
    assert TOKEN not in said


def test_an_application_without_socketio_is_proven_with_repeated_requests(tmp_path: Path, url: str) -> None:
    for option in ("[--http, /health]", "[--http=/health]"):
        status, said = run(tmp_path, url, settings=f"stickyring_probe_options: {option}\n")
        assert status == 0, said
        assert "sticky: all 6 requests completed, but there was only one node (node1-1)" in said
    status, said = run(tmp_path, url, settings="stickyring_probe_options: [--http, /nothing]\n")
    assert status != 0
    assert "6 of 6 requests failed: 6 x HTTP 404" in said


def test_ids_may_come_from_a_file(tmp_path: Path, url: str) -> None:
    (tmp_path / "ids").write_text("alice\nbob\ncarol\n")
    options = f"stickyring_probe_options: [--no-echo, --ids-file, {tmp_path}/ids]"
    settings = f"stickyring_probe_auth: {{token: {TOKEN}}}\n{options}\n"
    status, said = run(tmp_path, url, settings=settings)
    assert status == 0, said
    assert "all 12 sessions completed" in said


def test_an_edge_without_a_url_is_named(tmp_path: Path) -> None:
    status, said = run(tmp_path, "")
    assert (status, "edge1 was not probed: stickyring_probe_urls is empty." in said) == (0, True), said


def test_with_check_it_sends_nothing(tmp_path: Path, url: str) -> None:
    for login in ("", "stickyring_probe_auth: {token: wrong}\n"):
        status, said = run(tmp_path, url, "--check", settings=login)
        assert status == 0, said
        assert not re.search(r"sticky: |refused", said)
