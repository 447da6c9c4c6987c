"""The eventlet worker under gunicorn, over real connections."""

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ServeProcess, serving, wait_until

from stickyring.node.master import GRACEFUL_SECONDS

DESCRIPTORS = 64

APPLICATION = """
import _socket
import socket
import sys
import time

import eventlet.patcher

resolve = _socket.getaddrinfo

def slow(*arguments):
    eventlet.patcher.original("time").sleep(3.0)
    return resolve(*arguments)

def application(environ, start_response):
    start_response("200 OK", [])
    if environ["PATH_INFO"] == "/file":
        return environ["wsgi.file_wrapper"](open(__file__, "rb"))
    if environ["PATH_INFO"] == "/slow":
        time.sleep(0.5)
    if environ["PATH_INFO"] == "/stuck":
        eventlet.patcher.original("time").sleep(3)
    if environ["PATH_INFO"] == "/modules":
        return [str(sum(name.startswith("dns.") for name in sys.modules)).encode()]
    if environ["PATH_INFO"] == "/resolve":
        _socket.getaddrinfo = slow
        socket.create_connection((environ["SERVER_NAME"], int(environ["SERVER_PORT"]))).close()
    return [b"answer"]
"""


STUCK_SECONDS = 3.0
RESOLVING_SECONDS = 3.0


@pytest.fixture
def application(tmp_path: Path) -> str:
    Path(tmp_path, "plain.py").write_text(APPLICATION)
    return "plain:application"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("worker")
    Path(folder, "plain.py").write_text(APPLICATION)
    with serving(folder, "plain:application") as node:
        yield node


def answers(node: ServeProcess) -> bool:
    connection = node.connect(timeout=0.5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """systemd's notification socket, at `notify` in the test's folder."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(2 * STUCK_SECONDS)
        yield listening


def test_it_survives_running_out_of_descriptors(
    serve: Callable[..., ServeProcess], application: str, tmp_path: Path, manager: socket.socket
) -> None:
    node = serve(application, descriptors=DESCRIPTORS, NOTIFY_SOCKET=str(tmp_path / "notify"))
    assert answers(node)
    (warning,) = node.logged("too low for 10000 connections")
    assert warning["level"] == "WARNING"

    host, _, port = node.address.partition(":")
    held = [socket.create_connection((host, int(port))) for _ in range(DESCRIPTORS)]
    wait_until(lambda: node.logged("refusing connections for now: Too many open files"), "the node is exhausted")
    manager.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while manager.recv(64):
            pass
    manager.settimeout(2 * STUCK_SECONDS)
    assert manager.recv(64) == b"WATCHDOG=1", "systemd would kill it"
    for _ in range(DESCRIPTORS):
        refusal = node.get("/healthz")
        assert (refusal.status, refusal.getheader("x-stickyring-elsewhere")) == (503, "1")
    assert len(node.logged("refusing connections")) == 1, "it must not log every attempt"

    for connection in held:
        connection.close()
    wait_until(lambda: answers(node) and node.logged("accepting connections again"), "the node answers again")
    assert len(node.logged("accepting connections again")) == 1
    assert node.metric("stickyring_connections_refused_total") >= DESCRIPTORS


def test_without_descriptors_no_session_begins_on_an_open_connection(
    serve: Callable[..., ServeProcess],
) -> None:
    """Its next request could use a new connection, which would be refused."""
    node = serve("stickyring.echo:create_application()", descriptors=DESCRIPTORS)
    kept = node.connect()

    def asked(query: str) -> tuple[int, str | None, bytes]:
        kept.request("GET", f"/socket.io/?EIO=4&transport=polling{query}")
        answer = kept.getresponse()
        return answer.status, answer.getheader("x-stickyring-elsewhere"), answer.read()

    status, elsewhere, body = asked("")
    assert (status, elsewhere) == (200, None)
    sid = json.loads(body[1:])["sid"]
    host, _, port = node.address.partition(":")
    held = [socket.create_connection((host, int(port))) for _ in range(DESCRIPTORS)]
    wait_until(lambda: node.logged("refusing connections for now"), "the node is exhausted")
    assert asked("") == (503, "1", b"")
    kept.request("POST", f"/socket.io/?EIO=4&transport=polling&sid={sid}", "40")
    assert kept.getresponse().read() == b"ok"
    assert asked(f"&sid={sid}")[:2] == (200, None), "open sessions stay"
    for connection in held:
        connection.close()
    wait_until(lambda: asked("")[0] == 200, "it takes sessions again")
    assert node.metric('stickyring_handshakes_refused_total{reason="descriptors",transport="polling"}') >= 1


def test_a_slow_request_does_not_delay_others(node: ServeProcess) -> None:
    slow = node.connect()
    slow.request("GET", "/slow")
    assert answers(node)
    assert slow.getresponse().read() == b"answer"


@pytest.mark.eventlet
def test_a_name_that_resolves_slowly_does_not_delay_others(
    serve: Callable[..., ServeProcess], application: str
) -> None:
    node = serve(application)
    resolving, began = node.connect(), time.monotonic()
    resolving.request("GET", "/resolve")
    wait_until(lambda: answers(node), "it answers others")
    assert time.monotonic() - began < RESOLVING_SECONDS, "only when the name was resolved"
    assert resolving.getresponse().read() == b"answer"
    assert time.monotonic() - began >= RESOLVING_SECONDS, "the system has not resolved it"
    assert node.get("/modules").read() == b"0", "eventlet's own resolver takes a third of the start"


def test_a_connection_carries_several_requests(node: ServeProcess) -> None:
    connection = node.connect()
    for _ in range(3):
        connection.request("GET", "/")
        answer = connection.getresponse()
        assert (answer.read(), answer.getheader("Connection", "keep-alive")) == (b"answer", "keep-alive")


@pytest.mark.eventlet
def test_an_application_may_answer_with_a_file(node: ServeProcess) -> None:
    assert node.get("/file").read() == APPLICATION.encode()


def test_sigterm_lets_a_running_request_end(serve: Callable[..., ServeProcess], application: str) -> None:
    node = serve(application)
    slow = node.connect()
    slow.request("GET", "/slow", headers={"Connection": "close"})
    assert answers(node)
    assert node.stop() == 0
    assert slow.getresponse().read() == b"answer"
    assert not answers(node)


def test_after_sigterm_a_kept_connection_carries_one_more_request(
    serve: Callable[..., ServeProcess], application: str
) -> None:
    node = serve(application)
    kept = node.connect()
    kept.request("GET", "/")
    assert kept.getresponse().read() == b"answer"
    node.process.terminate()
    wait_until(lambda: not answers(node), "it accepts nothing more")
    kept.request("GET", "/")
    answer = kept.getresponse()
    assert (answer.status, answer.getheader("x-stickyring-elsewhere")) == (503, "1")
    assert answer.getheader("Connection") == "close"
    assert node.process.wait(GRACEFUL_SECONDS) == 0


def test_a_worker_whose_master_is_gone_ends(serve: Callable[..., ServeProcess], application: str) -> None:
    node = serve(application)
    os.kill(node.process.pid, signal.SIGKILL)
    node.process.wait()
    wait_until(lambda: not answers(node), "the worker ends")


@pytest.mark.eventlet
def test_systemd_gets_ready_and_a_heartbeat_while_the_loop_runs(
    serve: Callable[..., ServeProcess], application: str, tmp_path: Path, manager: socket.socket
) -> None:
    node = serve(application, NOTIFY_SOCKET=str(tmp_path / "notify"))
    assert manager.recv(64) == b"READY=1"
    assert manager.recv(64) == b"WATCHDOG=1"
    manager.recv(64)
    beat = time.monotonic()
    assert manager.recv(64) == b"WATCHDOG=1"
    assert 0.5 < time.monotonic() - beat < 1.5
    beat = time.monotonic()
    assert node.get("/stuck").status == 200
    manager.recv(64)
    assert time.monotonic() - beat >= STUCK_SECONDS
