"""What is said of a bus that nodes cannot use."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bus_fleet import Bus
from bus_trio import Trio

from stickyring.bus.check import problem_with
from stickyring.bus.connection import Address


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Bus]:
    """A bus that lets in `nodes`, with what they need, and `reader`, with less."""
    users = tmp_path / "users.acl"
    users.write_text(
        "user default off resetpass ~* &* +@all\n"
        "user nodes on >right ~stickyring:* +@all\nuser reader on >right ~stickyring:* +@all -xadd\n"
    )
    bus = Bus(tmp_path)
    bus.client.connection_pool.connection_kwargs |= {"username": "nodes", "password": "right"}
    bus.start("--aclfile", str(users))
    yield bus
    bus.stop()


def problem(url: str) -> str:
    return problem_with(Address(url, "stickyring"))


def test_a_bus_that_nodes_can_use_has_no_problem_and_keeps_nothing(guarded: Bus) -> None:
    assert problem(f"unix://nodes:right@{guarded.folder}/bus.sock") == ""
    assert guarded.client.xlen("stickyring:check:0") == 0
    assert guarded.client.get("stickyring:check:1") is None


@pytest.mark.parametrize(
    ("login", "sentence"),
    [
        ("nodes:wrong@", "The bus does not accept the user and the password of its URL."),
        ("", "The bus does not accept the user and the password of its URL."),
        ("reader:right@", "The user of the nodes lacks a right on the bus: "),
    ],
)
def test_wrong_logins_are_named(guarded: Bus, login: str, sentence: str) -> None:
    assert problem(f"unix://{login}{guarded.folder}/bus.sock").startswith(sentence)


def test_a_full_memory_is_named(tmp_path: Path) -> None:
    bus = Bus(tmp_path)
    bus.start("--maxmemory", "1", "--maxmemory-policy", "noeviction")
    assert problem(bus.url) == "The memory of the bus is full."
    bus.stop()


def test_a_server_that_is_away_is_named(tmp_path: Path) -> None:
    assert problem(f"unix://{tmp_path}/none.sock").startswith("The bus does not answer: ")


@pytest.mark.parametrize("url", ["redis://nodes:secret/with@127.0.0.1:6379/0", "redis+sentinel://nodes:secret@host/0"])
def test_a_url_that_is_none_is_named_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="the URL of the bus is not valid") as raised:
        Address(url, "stickyring").client(asyncio=False)
    assert "secret" not in "".join(traceback.format_exception(raised.value))


def test_an_old_version_is_named() -> None:
    with answering(b"%2\r\n$5\r\nproto\r\n:3\r\n$7\r\nversion\r\n$6\r\n6.2.14\r\n") as port:
        assert problem(f"redis://127.0.0.1:{port}") == "The bus is version 6.2.14, and 7 or newer is needed."


@contextmanager
def answering(hello: bytes) -> Iterator[int]:
    """A server that answers HELLO, and takes everything else."""

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            while command := connection.recv(10_000):
                connection.sendall(hello if b"HELLO" in command else b"+OK\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join(5)


def test_three_hosts_with_tls_and_what_is_wrong_with_them(trio: Trio) -> None:
    assert problem(trio.url) == ""
    untrusted = trio.url.partition("?")[0]
    assert problem(untrusted) == "The certificate of the bus is not valid: self-signed certificate."
    assert problem(trio.url.replace("/0/bus?", "/0/other?")).startswith("No Sentinel knows a primary of the bus: ")
    assert (
        problem(trio.url.replace("of-the-nodes", "wrong"))
        == "The bus does not accept the user and the password of its URL."
    )
    for replica in trio.servers[1:]:
        trio.kill(replica)
    assert problem(trio.url) == "Too few replicas of the bus follow its primary."


def test_the_check_of_an_application_checks_its_bus(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("stickyring")), "serve", "--check"]
    tried = subprocess.run(
        command,
        env={"STICKYRING_BUS_URL": f"unix://{tmp_path}/none.sock", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert tried.returncode == 1
    assert tried.stderr.splitlines()[-1].startswith("Error: The bus does not answer: ")
