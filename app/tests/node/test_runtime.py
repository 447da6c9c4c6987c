"""The WSGI layer around an application, without a server: health, readiness, metrics, cap and counters."""

import gc
import io
import itertools
import json
import threading
import weakref
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode
from wsgiref.util import setup_testing_defaults

import pytest
import socketio

from stickyring.node.application import Application, Paths
from stickyring.node.runtime import Runtime
from stickyring.node.sessions import key_of

CAP = 2


class Answer:
    """The answer to one request."""

    def __init__(
        self, application: Runtime, path: str, method: str = "GET", body: str = "", key: str | None = None, **query: str
    ) -> None:
        environ: dict[str, Any] = {} if key is None else {"HTTP_X_STICKYRING_KEY": key}
        environ |= {
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


def handshake(runtime: Runtime, protocol: str = "4", transport: str = "polling", key: str | None = None) -> Answer:
    return Answer(runtime, "/socket.io/", key=key, EIO=protocol, transport=transport)


def sid_of(accepted: Answer) -> str:
    return str(json.loads(accepted.text[1:])["sid"])


def serving(*servers: socketio.Server) -> Application:
    """Return an application that serves the first server at the default path, and the others at /1, /2 and so on."""
    apps = [socketio.WSGIApp(server, socketio_path=f"/{n or 'socket.io'}") for n, server in enumerate(servers)]
    for outer, inner in itertools.pairwise(apps):
        outer.wsgi_app = inner
    return Application(apps[0], servers, Paths(app.engineio_path.rstrip("/") for app in apps))


def sample(runtime: Runtime, name: str) -> float | None:
    for line in Answer(runtime, "/metrics").text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.rpartition(" ")[2])
    return None


@pytest.fixture
def runtime() -> Runtime:
    server = socketio.Server(async_mode="threading", monitor_clients=False)
    return Runtime(serving(server), node_name="node1-1", max_connections=CAP)


def test_everything_but_its_own_paths_reaches_the_application() -> None:
    def application(environ: dict[str, Any], start_response: Callable[..., object]) -> list[bytes]:
        start_response("200 OK", [])
        return [environ["PATH_INFO"].encode()]

    runtime = Runtime(Application(application), node_name="node1-1", max_connections=CAP)
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
        assert (refused.status, refused.text) == (503, "")
        assert int(refused.headers["Retry-After"]) > 0
        assert sample(runtime, f'stickyring_handshakes_refused_total{{reason="capacity",transport="{transport}"}}') == 1
    assert (Answer(runtime, "/readyz").status, Answer(runtime, "/healthz").status) == (503, 200)
    assert sample(runtime, 'stickyring_handshakes_accepted_total{transport="polling"}') == CAP
    assert sample(runtime, 'stickyring_connections{transport="polling"}') == CAP
    assert sample(runtime, "stickyring_connections_limit") == CAP


def test_a_full_node_still_serves_its_sessions(runtime: Runtime) -> None:
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


@pytest.mark.parametrize("transport", ["polling", "websocket"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_session_of_another_node_is_passed_on_if_its_user_has_a_key(
    runtime: Runtime, method: str, transport: str
) -> None:
    answer = Answer(runtime, "/socket.io/", method, key="alice", EIO="4", transport=transport, sid="elsewhere")
    # The client gets the last node's answer: the protocol's own for an unknown session.
    assert (answer.status, answer.headers["x-stickyring-elsewhere"]) == (400, "1")
    assert json.loads(answer.text) == {"code": 1, "message": "Session ID unknown"}
    assert sample(runtime, f'stickyring_unknown_sessions_total{{transport="{transport}"}}') == 1
    here = sid_of(handshake(runtime, key="alice"))
    pong = Answer(runtime, "/socket.io/", "POST", "3", key="alice", EIO="4", transport="polling", sid=here)
    assert pong.status == 200


def test_a_request_with_an_issued_key_is_not_passed_on(runtime: Runtime) -> None:
    environ = {"PATH_INFO": "/socket.io/", "QUERY_STRING": "EIO=4&transport=polling&sid=elsewhere"}
    environ |= {"HTTP_X_STICKYRING_KEY": "random", "HTTP_X_STICKYRING_ISSUED": "1"}
    setup_testing_defaults(environ)
    begun: list[tuple[str, dict[str, str]]] = []

    def begin(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> Callable[[bytes], object]:
        begun.append((status[:3], dict(headers)))
        return lambda _: None

    body = b"".join(runtime(environ, begin))
    [(status, headers)] = begun
    assert (status, body) == ("400", b'"Invalid session elsewhere"')
    assert "x-stickyring-elsewhere" not in headers


@pytest.mark.parametrize("protocol", ["3", "2", ""])
def test_an_older_protocol_gets_a_400_that_says_so(runtime: Runtime, protocol: str) -> None:
    for _ in range(CAP + 1):
        answer = handshake(runtime, protocol=protocol)
        assert answer.status == 400
        assert "unsupported version of the Socket.IO or Engine.IO protocols" in answer.text
    assert sample(runtime, 'stickyring_handshakes_refused_total{reason="protocol",transport="polling"}') == CAP + 1


def test_other_refusals_are_counted_and_clients_cannot_make_up_labels(runtime: Runtime) -> None:
    assert handshake(runtime, transport="websocket").status == 400  # without an Upgrade header
    assert handshake(runtime, transport="pigeon").status == 400
    for transport in ("websocket", "other"):
        name = f'stickyring_handshakes_refused_total{{reason="bad_request",transport="{transport}"}}'
        assert sample(runtime, name) == 1
    assert "pigeon" not in Answer(runtime, "/metrics").text


@pytest.mark.parametrize(
    ("method", "query"),
    [("GET", {"EIO": "4"}), *((method, {"EIO": "4", "transport": "polling"}) for method in ("POST", "PUT", "HEAD"))],
)
def test_an_invalid_handshake_gets_a_400(runtime: Runtime, method: str, query: dict[str, str]) -> None:
    assert Answer(runtime, "/socket.io/", method, **query).status == 400


def test_packets_and_an_unknown_namespace_are_answered_as_in_the_protocol(runtime: Runtime) -> None:
    sid = sid_of(handshake(runtime))
    assert (request(runtime, sid, "40/nowhere,").text, request(runtime, sid).text) == (
        "ok",
        '44/nowhere,{"message":"Invalid namespace"}',
    )


def test_each_runtime_counts_for_itself(runtime: Runtime) -> None:
    server = socketio.Server(async_mode="threading", monitor_clients=False)
    other = Runtime(serving(server), node_name="node1-2", max_connections=CAP)
    handshake(runtime)
    assert sample(other, 'stickyring_handshakes_accepted_total{transport="polling"}') == 0


def request(runtime: Runtime, sid: str, body: str = "", key: str | None = None) -> Answer:
    """POST packets in a session; without packets, poll."""
    method = "POST" if body else "GET"
    return Answer(runtime, "/socket.io/", method, body, key, EIO="4", transport="polling", sid=sid)


@pytest.mark.parametrize("first", ["alice", None])
def test_a_session_has_the_key_of_its_handshake(runtime: Runtime, first: str | None) -> None:
    """With a later key, which a client may make up, a rebalance would ask users to leave who then come back."""
    sid = sid_of(handshake(runtime, key=first))
    session = runtime.sessions[sid]
    for later in ("bob", None, "", "alice"):
        assert request(runtime, sid, "40", later).status == 200
        assert session.key == first
    assert request(runtime, sid, key="carol").status == 200
    assert session.key == first


@pytest.mark.parametrize("wire", ["größe".encode(), b"caf%C3%A9", b"\xff\xfe"])
def test_a_key_is_the_bytes_on_the_wire(runtime: Runtime, wire: bytes) -> None:
    # PEP 3333 decodes headers as ISO-8859-1.
    sid = sid_of(handshake(runtime, key=wire.decode("latin-1")))
    assert (runtime.sessions[sid].key or "").encode("utf-8", "surrogateescape") == wire


def test_the_key_comes_from_the_edge_and_not_from_the_query() -> None:
    environ: dict[str, object] = {"HTTP_X_STICKYRING_KEY": "größe %41".encode().decode("latin-1")}
    environ["QUERY_STRING"] = "client_id=gr%C3%B6%C3%9Fe%20%2541"
    assert key_of(environ) == "größe %41"
    assert key_of(environ | {"HTTP_X_STICKYRING_KEY": ""}) is None
    assert key_of({"QUERY_STRING": "client_id=alice"}) is None


@pytest.mark.parametrize(("said", "known"), [("nodes", "nodes"), ("", None), (None, None)])
def test_a_session_has_the_cluster_of_its_handshake(runtime: Runtime, said: str | None, known: str | None) -> None:
    session = runtime.sessions[sid_of(handshake(runtime))]
    session.note({} if said is None else {"HTTP_X_STICKYRING_CLUSTER": said})
    assert session.cluster == known


def test_a_session_is_forgotten_however_it_ends() -> None:
    server = socketio.Server(async_mode="threading", monitor_clients=False)
    server.on("connect", lambda sid, environ: None)
    runtime = Runtime(serving(server), node_name="node1-1", max_connections=1000)

    def joined() -> str:
        sid = sid_of(handshake(runtime, key="alice"))
        request(runtime, sid, "40")
        return sid

    ends: list[Callable[[str], object]] = [
        lambda sid: request(runtime, sid, "1"),  # the client's CLOSE
        lambda sid: server.eio.sockets[sid].close(wait=False, reason="server disconnect"),
        lambda sid: server.eio.sockets[sid].close(wait=False, abort=True, reason="ping timeout"),
        lambda sid: runtime.sessions[sid].end(),
    ]
    gone = []
    for end in ends:
        sid = joined()
        session = runtime.sessions[sid]
        gone.append(weakref.ref(session))
        end(sid)
        assert session.ended
        del session
    assert runtime.sessions == {}
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(ends)
    # The control: a session that has not ended is there.
    sid = joined()
    assert [*runtime.sessions] == [sid]


def test_a_handshake_that_the_application_refuses_opens_no_session(runtime: Runtime) -> None:
    assert handshake(runtime, protocol="3").status == 400
    assert handshake(runtime, transport="websocket").status == 400
    assert runtime.sessions == {}


def test_the_waiting_poll_of_a_moved_session_ends_in_an_error(runtime: Runtime) -> None:
    first, second = [sid_of(handshake(runtime)) for _ in range(CAP)]
    request(runtime, first, "40")
    moved = runtime.sessions[first]
    assert "40{" in request(runtime, first).text
    socket: Any = moved.socket
    waiting, receive, polls = threading.Event(), socket.poll, []

    def poll_and_tell() -> object:
        waiting.set()
        return receive()

    socket.poll = poll_and_tell
    poll = threading.Thread(target=lambda: polls.append(request(runtime, first)))
    poll.start()
    assert waiting.wait(5)
    moved.end()
    poll.join()
    assert (polls[0].status, polls[0].headers["Cache-Control"]) == (410, "no-store")
    assert "moved" in polls[0].text
    # Another packet or poll of the client does no harm.
    assert request(runtime, first, "42[]").status == request(runtime, first).status == 400
    assert request(runtime, second, "40").status == 200
    assert "40{" in request(runtime, second).text


def test_without_a_connection_from_gunicorn_the_engines_websocket_is_used() -> None:
    server = socketio.Server(async_mode="threading", monitor_clients=False)
    taken: list[str] = []

    def theirs(_handler: object, _server: object) -> Callable[..., list[bytes]]:
        def answer(environ: dict[str, Any], start_response: Callable[..., object]) -> list[bytes]:
            taken.append(environ["PATH_INFO"])
            return [b"theirs"]

        return answer

    server.eio._async = {**server.eio._async, "websocket": theirs}
    runtime = Runtime(serving(server), node_name="node1-1", max_connections=CAP)
    environ = {
        "PATH_INFO": "/socket.io/",
        "QUERY_STRING": "EIO=4&transport=websocket",
        "HTTP_UPGRADE": "websocket",
        "HTTP_CONNECTION": "Upgrade",
    }
    setup_testing_defaults(environ)
    assert list(runtime(environ, lambda *_: lambda _: None)) == [b"theirs"]
    assert taken == ["/socket.io/"]


def test_the_path_without_its_last_slash_is_the_same(runtime: Runtime) -> None:
    """Swift and Dart clients omit it."""
    accepted = Answer(runtime, "/socket.io", EIO="4", transport="polling")
    assert accepted.status == 200
    assert sid_of(accepted) in runtime.sessions
    assert Answer(runtime, "/socket.iox", EIO="4", transport="polling").status == 404


def test_jsonp_is_refused_and_answers_are_not_sniffed(runtime: Runtime) -> None:
    accepted = handshake(runtime)
    refused = Answer(runtime, "/socket.io/", EIO="4", transport="polling", j="0")
    assert (refused.status, json.loads(refused.text)["code"]) == (400, 3)
    for answer in (accepted, refused, handshake(runtime, protocol="3"), request(runtime, sid_of(accepted), "40")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_the_application_sees_what_the_edge_says_of_the_client() -> None:
    def application(environ: dict[str, Any], start_response: Callable[..., object]) -> list[bytes]:
        start_response("200 OK", [])
        return [f"{environ['wsgi.url_scheme']} {environ['REMOTE_ADDR']}".encode()]

    runtime = Runtime(Application(application), node_name="node1-1", max_connections=CAP)
    said = {"HTTP_X_FORWARDED_PROTO": "https", "HTTP_X_STICKYRING_CLIENT": "198.51.100.7"}
    for peer, seen in (("127.0.0.1", "https 198.51.100.7"), ("192.0.2.1", "http 192.0.2.1")):
        environ: dict[str, Any] = {"PATH_INFO": "/", "QUERY_STRING": "", "REQUEST_METHOD": "GET", "REMOTE_ADDR": peer}
        setup_testing_defaults(environ)
        assert b"".join(runtime(environ | said, lambda *_: lambda _: None)).decode() == seen
