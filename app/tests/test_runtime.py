"""The WSGI layer around an application, without a server: health, readiness, metrics, cap and counts."""

import io
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode
from wsgiref.util import setup_testing_defaults

import pytest
import socketio

from stickyring.runtime import Runtime

CAP = 2


class Answer:
    """What one request got."""

    def __init__(self, application: Runtime, path: str, method: str = "GET", body: str = "", **query: str) -> None:
        environ: dict[str, Any] = {
            "PATH_INFO": path,
            "QUERY_STRING": urlencode(query),
            "REQUEST_METHOD": method,
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.input": io.BytesIO(body.encode()),
        }
        setup_testing_defaults(environ)
        self.text = b"".join(application(environ, self._start_response)).decode()

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: object = None
    ) -> Callable[[bytes], object]:
        self.status = int(status[:3])
        self.headers = dict(headers)
        return lambda _: None


def handshake(runtime: Runtime, protocol: str = "4", transport: str = "polling") -> Answer:
    return Answer(runtime, "/socket.io/", EIO=protocol, transport=transport)


def sid_of(accepted: Answer) -> str:
    return str(json.loads(accepted.text[1:])["sid"])


def sample(runtime: Runtime, name: str) -> float | None:
    for line in Answer(runtime, "/metrics").text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.rpartition(" ")[2])
    return None


@pytest.fixture
def runtime() -> Runtime:
    server = socketio.Server(async_mode="threading", monitor_clients=False)
    return Runtime(socketio.WSGIApp(server), node_name="node1-1", max_connections=CAP)


def test_everything_but_its_own_paths_reaches_the_application() -> None:
    def application(environ: dict[str, Any], start_response: Callable[..., object]) -> list[bytes]:
        start_response("200 OK", [])
        return [environ["PATH_INFO"].encode()]

    runtime = Runtime(application, node_name="node1-1", max_connections=CAP)
    for path in ("/", "/healthz/more", "/socket.io/"):
        assert Answer(runtime, path).text == path
    assert Answer(runtime, "/healthz").text == "ok\n"
    assert Answer(runtime, "/readyz").text == "ready\n"
    assert "process_start_time_seconds" in Answer(runtime, "/metrics").text


def test_a_handshake_above_the_cap_gets_503(runtime: Runtime) -> None:
    for _ in range(CAP):
        assert Answer(runtime, "/readyz").status == 200
        assert handshake(runtime).status == 200
    for transport in ("polling", "websocket"):
        refused = handshake(runtime, transport=transport)
        assert (refused.status, refused.text) == (503, "this node is full\n")
        assert int(refused.headers["Retry-After"]) > 0
        assert sample(runtime, f'stickyring_handshakes_refused_total{{reason="capacity",transport="{transport}"}}') == 1
    assert (Answer(runtime, "/readyz").status, Answer(runtime, "/healthz").status) == (503, 200)
    assert sample(runtime, 'stickyring_handshakes_accepted_total{transport="polling"}') == CAP
    assert sample(runtime, 'stickyring_connections{transport="polling"}') == CAP
    assert sample(runtime, "stickyring_connections_limit") == CAP


def test_a_full_node_still_serves_the_sessions_that_it_has(runtime: Runtime) -> None:
    first, *_ = [sid_of(handshake(runtime)) for _ in range(CAP)]
    answer = Answer(runtime, "/socket.io/", method="POST", EIO="4", transport="polling", sid=first)
    assert answer.status == 200
    assert sample(runtime, 'stickyring_unknown_sessions_total{transport="polling"}') == 0


def test_a_session_that_ended_makes_room(runtime: Runtime) -> None:
    first, *_ = [sid_of(handshake(runtime)) for _ in range(CAP)]
    assert handshake(runtime).status == 503
    Answer(runtime, "/socket.io/", method="POST", body="1", EIO="4", transport="polling", sid=first)
    assert handshake(runtime).status == 200


def test_a_session_of_another_node_is_refused_and_counted(runtime: Runtime) -> None:
    answer = Answer(runtime, "/socket.io/", EIO="4", transport="polling", sid="elsewhere")
    assert (answer.status, answer.text) == (400, '"Invalid session elsewhere"')
    assert sample(runtime, 'stickyring_unknown_sessions_total{transport="polling"}') == 1


@pytest.mark.parametrize("protocol", ["3", "2", ""])
def test_an_older_protocol_gets_a_400_that_says_so(runtime: Runtime, protocol: str) -> None:
    for _ in range(CAP + 1):
        answer = handshake(runtime, protocol=protocol)
        assert answer.status == 400
        assert "unsupported version of the Socket.IO or Engine.IO protocols" in answer.text
    assert sample(runtime, 'stickyring_handshakes_refused_total{reason="protocol",transport="polling"}') == CAP + 1


def test_other_refusals_are_counted_and_clients_make_up_no_labels(runtime: Runtime) -> None:
    assert handshake(runtime, transport="websocket").status == 400  # without an Upgrade header
    assert handshake(runtime, transport="pigeon").status == 400
    for transport in ("websocket", "other"):
        name = f'stickyring_handshakes_refused_total{{reason="bad_request",transport="{transport}"}}'
        assert sample(runtime, name) == 1
    assert "pigeon" not in Answer(runtime, "/metrics").text


def test_each_runtime_counts_for_itself(runtime: Runtime) -> None:
    server = socketio.Server(async_mode="threading", monitor_clients=False)
    other = Runtime(socketio.WSGIApp(server), node_name="node1-2", max_connections=CAP)
    handshake(runtime)
    assert sample(other, 'stickyring_handshakes_accepted_total{transport="polling"}') == 0
