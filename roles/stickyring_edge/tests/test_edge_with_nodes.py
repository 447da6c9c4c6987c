"""Real nodes behind an Envoy with the role's files: which node gets a request, what is refused, what stays open."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import socketio
from certificates import Certificate
from real_nodes import Node, ring_document, serving
from running_envoy import START_SECONDS, Edge, compose, running
from stickyring.ring import Ring

# One node has only IPv6.
NODES = {"node1-1": "127.0.0.1", "node2-1": "127.0.0.1", "node3-1": "::1"}
LISTENERS = ("sticky", "unkeyed", "redirect", "safe")
# The role's are 30, 10, 300 and 30 s.
TIMEOUTS = ("request_timeout", "request_headers_timeout", "downstream_idle_timeout", "upstream_idle_timeout")
TIMEOUT_SECONDS = 1
LARGEST_MESSAGE = 1_000_000
MEGABYTE = 1_000_000
CALL_SECONDS = 30


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[dict[str, Node]]:
    with serving(folder, NODES) as running_nodes:
        yield running_nodes


@pytest.fixture(scope="module")
def edge(folder: Path, certificate: Certificate, nodes: dict[str, Node]) -> Iterator[Edge]:
    """With short timeouts, and everything logged at once."""
    endpoints = [{"name": one.name, "address": one.address, "port": one.port} for one in nodes.values()]
    variables: dict[str, Any] = {f"stickyring_edge_{name}": TIMEOUT_SECONDS for name in TIMEOUTS}
    variables["stickyring_edge_clusters"] = [{"name": "nodes", "endpoints": endpoints}]
    settings: dict[str, dict[str, Any]] = {
        "sticky": {"address": "::"},
        "unkeyed": {"address": "::", "hash_policies": []},
        "redirect": {"redirect_port": 443},
    }
    composed = compose(folder, LISTENERS, certificate, variables, **settings)
    with running(folder, composed, "--file-flush-interval-msec", "50") as running_edge:
        yield running_edge


@pytest.fixture(scope="module")
def ring(edge: Edge) -> Ring:
    """The ring that Envoy serves, as `stickyring whereis` and `rebalance` take it."""
    return Ring.load(ring_document(edge))


@dataclass(frozen=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)


def ask(port: int, head: bytes, body: bytes = b"") -> Answer:
    """Send a request and return the answer. `head` comes without `Connection: close` and the blank line."""
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        received = b""
        # Envoy does not read the rest of a head that is too long.
        with suppress(ConnectionResetError, BrokenPipeError):
            wanted = b"Upgrade" if b"websocket" in head else b"close"
            client.sendall(head.replace(b"\n", b"\r\n") + b"\r\nConnection: " + wanted + b"\r\n\r\n" + body)
        with suppress(ConnectionResetError):
            while not received.startswith(b"HTTP/1.1 101") and (more := client.recv(65536)):
                received += more
    while received.startswith(b"HTTP/1.1 100"):
        received = received.partition(b"\r\n\r\n")[2]
    top, _, rest = received.partition(b"\r\n\r\n")
    status, *lines = top.decode("latin-1").split("\r\n")
    headers = [(name.lower(), value) for name, _, value in (line.partition(": ") for line in lines)]
    if ("transfer-encoding", "chunked") in headers:
        rest = rest.partition(b"\r\n")[2].partition(b"\r\n")[0]
    return Answer(int(status.split()[1]), headers, rest)


def handshake(edge: Edge, case: str, query: str = "", *headers: bytes, listener: str = "sticky") -> Answer:
    """A polling handshake whose path names the case, so that its line in the log can be found."""
    target = f"/socket.io/{case}?EIO=4&transport=polling{query}".encode()
    lines = b"".join(b"\n" + header for header in headers)
    return ask(edge.ports[listener], b"GET " + target + b" HTTP/1.1\nHost: edge" + lines)


def logged(folder: Path, case: str) -> dict[str, Any]:
    """The access log's line of a case."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        for line in (folder / "log").read_text().splitlines():
            if line.startswith("{") and f'"/socket.io/{case}"' in line:
                found: dict[str, Any] = json.loads(line)
                return found
        assert time.monotonic() < deadline, f"no line of {case}"
        time.sleep(0.05)


def parameter(value: str) -> tuple[str, tuple[bytes, ...]]:
    return f"&client_id={value}", ()


def header(*values: str) -> tuple[str, tuple[bytes, ...]]:
    return "", tuple(f"x-client-id: {value}".encode() for value in values)


def cookie(*values: str) -> tuple[str, tuple[bytes, ...]]:
    return "", tuple(f"cookie: {value}".encode() for value in values)


# What a client sends, and the key that results.
SPELLINGS: list[tuple[tuple[str, tuple[bytes, ...]], str]] = [
    (parameter("alice"), "alice"),
    (parameter("%61lice"), "alice"),
    (parameter("a@b"), "a@b"),
    (parameter("a%40b"), "a@b"),
    (parameter("a%20b"), "a b"),
    (parameter("a+b"), "a+b"),
    (parameter("a%2Bb"), "a+b"),
    (parameter("caf%c3%a9"), "café"),
    (parameter("caf%C3%A9"), "café"),
    (parameter("%F0%9F%98%80"), "😀"),
    (parameter("a:/,;b"), "a:/,;b"),
    (parameter("a%3A%2F%2C%3Bb"), "a:/,;b"),
    (parameter("100%25"), "100%"),
    (parameter("100%2541"), "100%41"),
    (parameter("a%26b%3Dc"), "a&b=c"),
    (parameter("%C3%A9" * 4000), "é" * 4000),
    (parameter("k" * 30_000), "k" * 30_000),
    (parameter("100%"), "100%"),
    (parameter("%25REQ(host)%25"), "%REQ(host)%"),
    (parameter("%22quoted%22%5C"), '"quoted"\\'),
    (parameter("first&client_id=second"), "first"),
    (("&client%5Fid=alice", ()), "alice"),
    (("&Client_id=other&client_id=alice", ()), "alice"),
    ((parameter("query")[0], header("header")[1]), "query"),
    ((parameter("")[0], header("header")[1]), "header"),
    (header("alice"), "alice"),
    (header("café"), "café"),
    (header("a%40b"), "a%40b"),
    (header("  padded\t "), "padded"),
    (header("first", "second"), "first"),
    (cookie("stickyring=alice"), "alice"),
    (cookie('stickyring="alice"'), "alice"),
    (cookie("other=1; stickyring=alice; stickyring=bob"), "alice"),
    (cookie("other=1", "stickyring=alice"), "alice"),
    (cookie("xstickyring=bob;stickyring=YWxpY2U="), "YWxpY2U="),
    (("", (*header("")[1], *cookie("stickyring=alice")[1])), "alice"),
]


@pytest.fixture(scope="module")
def asked(edge: Edge) -> list[tuple[str, str, Answer]]:
    """The answer for every spelling, with its case and its key; the sessions stay open."""
    return [
        (f"spelling-{number}", key, handshake(edge, f"spelling-{number}", query, *headers))
        for number, ((query, headers), key) in enumerate(SPELLINGS)
    ]


def test_the_hashed_logged_passed_and_computed_key_are_the_same(
    asked: list[tuple[str, str, Answer]], folder: Path, nodes: dict[str, Node], ring: Ring
) -> None:
    known = {name: node.users() for name, node in nodes.items()}
    for case, key, answer in asked:
        assert answer.status == 200, (case, key, answer)
        node = answer.header("x-served-by")
        assert node == ring.owner(key), (case, key)
        assert logged(folder, case)["key"] == key
        assert key in known[str(node)], (case, key)
        assert answer.header("set-cookie") is None, "a request with a key needs no cookie"
    assert {key for keys in known.values() for key in keys} == {key for _, key in SPELLINGS}
    assert len({answer.header("x-served-by") for _, _, answer in asked}) == len(NODES)


def test_a_rebalance_does_not_move_users_on_their_assigned_node(
    asked: list[tuple[str, str, Answer]], edge: Edge, nodes: dict[str, Node]
) -> None:
    """The control is a ring without one of the nodes."""
    document = ring_document(edge)
    for _ in range(2):
        for node in nodes.values():
            done = node.ask("rebalance", "--ring", "-", text=json.dumps(document))
            assert (done["asked"], done["returned"]) == (0, 0)
            assert done["staying"] > 0
    without = document | {"members": document["members"][:-1]}
    assert nodes["node3-1"].ask("rebalance", "--ring", "-", text=json.dumps(without))["to_move"] > 0


@pytest.mark.parametrize(
    "value",
    ["%00", "a%0Ab", "a%0D%0Ab", "%7F", "a%1Fb", "%20a", "a%20", "%C2%A0%C2%85", "%FF%FE", "caf%C3", "%ED%A0%80"],
)
def test_an_invalid_key_gets_a_400_with_the_reason(edge: Edge, value: str) -> None:
    refused = handshake(edge, "refused", f"&client_id={value}")
    assert refused.status == 400
    assert "user id" in json.loads(refused.body)["message"]
    assert refused.header("x-served-by") in {None, ""}


def test_a_key_header_of_a_client_is_ignored(edge: Edge, folder: Path, ring: Ring) -> None:
    answer = handshake(edge, "forged", "&client_id=honest", b"x-stickyring-key: forged", b"x-stickyring-cluster: x")
    assert answer.header("x-served-by") == ring.owner("honest")
    assert logged(folder, "forged")["key"] == "honest"
    handshake(edge, "forged-unkeyed", "", b"x-stickyring-key: forged", listener="unkeyed")
    assert logged(folder, "forged-unkeyed")["key"] in {None, "-", ""}


def test_nobody_can_ask_users_to_reconnect_through_an_edge(edge: Edge, nodes: dict[str, Node]) -> None:
    """The application answers. The control: the edge itself can."""
    target, body = "/stickyring/reconnect?process=nobody&rate=1", b""

    def answer(port: int) -> bytes:
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("POST", target, body, {"Content-Length": "0"})
        answer = connection.getresponse().read()
        connection.close()
        return answer

    assert answer(edge.ports["sticky"]) == b"http 127.0.0.1"
    assert answer(nodes["node1-1"].port) == b'{"to_move": 0}'


def test_a_session_has_the_request_id_of_the_edges_log(edge: Edge, folder: Path, nodes: dict[str, Node]) -> None:
    """Not that of a client, who could choose somebody else's."""
    handshake(edge, "named", "&client_id=named", b"x-request-id: of-a-client")
    line = logged(folder, "named")
    (session,) = nodes[line["node"]].ask("sessions", "--key", "named")["sessions"]
    assert session["request_id"] == line["request_id"] != "of-a-client"


def visitors(port: int, count: int) -> list[tuple[str | None, str | None]]:
    """Cookie and node of visitors who share a connection, as behind a proxy with keep-alive."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    found = []
    for _ in range(count):
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        answer.read()
        found.append((answer.headers["set-cookie"], answer.headers["x-served-by"]))
    connection.close()
    return found


def test_visitors_on_one_connection_get_different_cookies(edge: Edge) -> None:
    """The control is Envoy's own generated cookie, which depends on the connection's addresses."""
    first = visitors(edge.ports["sticky"], 100)
    assert len({cookie for cookie, _ in first}) == 100
    # More than 100 visitors: with 100, one run in twenty would exceed the bound by chance.
    spread = Counter(node for _, node in first + visitors(edge.ports["sticky"], 900))
    assert spread.keys() == set(NODES)
    assert max(spread.values()) <= 1.3 * 1000 / len(NODES), spread

    files = deepcopy(edge.files)
    [routes] = files["routes/sticky.json"]
    *_, everybody = routes["virtual_hosts"][0]["routes"]
    everybody["route"]["hash_policy"] = [{"cookie": {"name": "stickyring", "ttl": "0s"}}]
    del everybody["response_headers_to_add"]
    assert "failed" not in edge.give(files)
    try:
        assert len(set(visitors(edge.ports["sticky"], 100))) == 1
    finally:
        assert "failed" not in edge.give(edge.files)


def test_a_cookie_keeps_its_visitor_on_a_node_and_needs_no_quotes(edge: Edge, ring: Ring) -> None:
    """Python's cookie jar would escape quotes, and the edge would hash another value."""
    for listener, secure in (("sticky", False), ("safe", True)):
        [(issued, node)] = (
            visitors(edge.ports[listener], 1) if listener == "sticky" else [secure_visitor(edge.ports["safe"])]
        )
        assert issued is not None
        value, *attributes = issued.removeprefix("stickyring=").split("; ")
        assert value.replace("-", "").isalnum()
        assert attributes == ["Path=/", *(["Secure"] if secure else []), "HttpOnly", "SameSite=Lax"]
        assert ring.owner(value) == node
        back = handshake(edge, f"back-{listener}", "", f"cookie: stickyring={value}".encode())
        assert (back.header("x-served-by"), back.header("set-cookie")) == (node, None)


def test_without_an_id_or_a_cookie_requests_of_a_session_reach_different_nodes(edge: Edge) -> None:
    """The negative control of every sticky session; with the cookie, the session continues."""
    opened = handshake(edge, "control")
    sid, cookie = json.loads(opened.body[1:])["sid"], str(opened.header("set-cookie")).partition(";")[0]
    target = f"POST /socket.io/?EIO=4&transport=polling&sid={sid} HTTP/1.1\nHost: edge\nContent-Length: 1"
    forged = f"{target}\nx-stickyring-issued: 0"
    found = Counter(ask(edge.ports["sticky"], forged.encode(), b"3").status for _ in range(30))
    assert found.keys() == {200, 400}
    with_cookie = f"{target}\ncookie: {cookie}"
    assert {ask(edge.ports["sticky"], with_cookie.encode(), b"3").status for _ in range(10)} == {200}


def secure_visitor(port: int) -> tuple[str | None, str | None]:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port), 10)) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: edge\r\nConnection: close\r\n\r\n")
        text = b"".join(iter(lambda: client.recv(65536), b"")).decode()
    headers = dict(line.split(": ", 1) for line in text.split("\r\n\r\n")[0].split("\r\n")[1:])
    return headers.get("set-cookie"), headers.get("x-served-by")


POLL = "/socket.io/?EIO=4&transport=polling&client_id=alice"
WEBSOCKET = POLL.replace("polling", "websocket")
UPGRADE = "\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
LONG_QUERY = "&pad=" + "x" * 12_000
MANY_HEADERS = "".join(f"\nx-header-{number}: 1" for number in range(80))
# The head of a request, and the status that it gets.
HEADS: dict[str, tuple[str, int]] = {
    "HTTP/1.0 with a host": (f"GET {POLL} HTTP/1.0\nHost: edge", 200),
    "HTTP/1.0 without one": (f"GET {POLL} HTTP/1.0\nAccept: */*", 200),
    "a health checker": ("GET /healthz HTTP/1.0\nUser-Agent: checker", 200),
    "Apache HttpClient": (f"GET {POLL} HTTP/1.1\nHost: edge\nUpgrade: TLS/1.2", 200),
    "a header with an underscore": (f"GET {POLL} HTTP/1.1\nHost: edge\nmy_header: 1", 200),
    "a long query": (f"GET {POLL}{LONG_QUERY} HTTP/1.1\nHost: edge", 200),
    "many headers": (f"GET {POLL} HTTP/1.1\nHost: edge{MANY_HEADERS}", 200),
    "a long header": (f"GET {POLL} HTTP/1.1\nHost: edge\nx-token: {'t' * 20_000}", 200),
    "a head beyond the limit": (f"GET {POLL} HTTP/1.1\nHost: edge\nx-token: {'t' * 33_000}", 431),
    "too many headers": (f"GET {POLL} HTTP/1.1\nHost: edge{MANY_HEADERS}{MANY_HEADERS.replace('r-', 'r-b')}", 431),
    "no last slash": (f"GET {POLL.replace('/?', '?')} HTTP/1.1\nHost: edge", 200),
    "two slashes": (f"GET /{POLL} HTTP/1.1\nHost: edge", 200),
    "an absolute target": (f"GET http://edge{POLL} HTTP/1.1\nHost: edge", 200),
    "a port in the host": (f"GET {POLL} HTTP/1.1\nHost: edge:9002", 200),
    "preflight": (f"OPTIONS {POLL} HTTP/1.1\nHost: edge\nOrigin: http://edge\nAccess-Control-Request-Method: GET", 200),
    "an unknown session": (f"GET {POLL}&sid=unknown HTTP/1.1\nHost: edge", 400),
    "an unknown session's packet": (f"POST {POLL}&sid=unknown HTTP/1.1\nHost: edge\nContent-Length: 1", 400),
    "JSONP": (f"GET {POLL}&j=0 HTTP/1.1\nHost: edge", 400),
    "an unknown transport": (f"GET {POLL.replace('polling', 'pigeon')} HTTP/1.1\nHost: edge", 400),
    "metrics": ("GET /metrics HTTP/1.1\nHost: edge", 404),
    "only the head": ("HEAD /page HTTP/1.1\nHost: edge", 200),
    "a dot behind the host": (f"GET {POLL} HTTP/1.1\nHost: edge.", 200),
    "an encoded path": (f"GET {POLL.replace('socket.io', 'socket%2Eio')} HTTP/1.1\nHost: edge", 200),
    "a packet after 100 Continue": (
        f"POST {POLL}&sid=unknown HTTP/1.1\nHost: edge\nExpect: 100-continue\nContent-Length: 1",
        400,
    ),
    "a WebSocket": (f"GET {WEBSOCKET} HTTP/1.1\nHost: edge{UPGRADE}", 101),
    "a WebSocket without the last slash": (f"GET {WEBSOCKET.replace('/?', '?')} HTTP/1.1\nHost: edge{UPGRADE}", 101),
}


@pytest.mark.parametrize("head", HEADS)
def test_which_requests_the_edge_refuses(edge: Edge, head: str) -> None:
    text, status = HEADS[head]
    answer = ask(edge.ports["sticky"], text.encode(), b"3" if text.startswith("POST") else b"")
    assert answer.status == status, answer
    assert not [name for name, _ in answer.headers if name.startswith("x-stickyring")], "an internal header is out"
    if "unknown session" in head:
        assert json.loads(answer.body) == {"code": 1, "message": "Session ID unknown"}
    elif status == 200 and "/socket.io" in text and not text.startswith("OPTIONS"):
        assert b'"sid"' in answer.body
        assert answer.header("x-content-type-options") == "nosniff"


def test_a_header_with_an_underscore_does_not_reach_a_node(edge: Edge, folder: Path, ring: Ring) -> None:
    """Applications would take it for the header with a dash, which only the edge may set."""
    answer = handshake(edge, "underscore", "&client_id=honest", b"x_stickyring_key: forged")
    assert answer.header("x-served-by") == ring.owner("honest")


@pytest.mark.parametrize(("listener", "scheme"), [("sticky", "http"), ("safe", "https")])
def test_the_application_sees_scheme_and_address_of_the_client(edge: Edge, listener: str, scheme: str) -> None:
    async def look() -> str:
        url = f"{scheme}://127.0.0.1:{edge.ports[listener]}/page"
        forged = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "ftp", "x-stickyring-client": "203.0.113.9"}
        async with aiohttp.ClientSession() as session, session.get(url, headers=forged, ssl=False) as answer:
            return await answer.text()

    assert asyncio.run(look()) == f"{scheme} 127.0.0.1"


def test_a_client_with_ipv6_only_is_sticky_on_every_node(edge: Edge, ring: Ring) -> None:
    """Also on the node that has only IPv6. The control is a listener without hash policies."""

    async def look(listener: str, user: str, transport: str) -> tuple[str, str]:
        """The user's node, and what its application knows of the client."""
        url = f"http://[::1]:{edge.ports[listener]}"
        async with socketio.AsyncSimpleClient(reconnection=False) as client:
            await client.connect(f"{url}?client_id={user}", transports=[transport], wait_timeout=2)
            assert await client.call("message", "hello", timeout=10) == "hello"
        async with aiohttp.ClientSession() as session, session.get(f"{url}/page?client_id={user}") as answer:
            return answer.headers["x-served-by"], await answer.text()

    for node in NODES:
        user = next(name for name in map("v6-{}".format, range(100)) if ring.owner(name) == node)
        for transport in ("polling", "websocket"):
            assert asyncio.run(look("sticky", user, transport)) == (node, "http ::1")
    with pytest.raises(socketio.exceptions.SocketIOError):
        for _ in range(8):
            asyncio.run(look("unkeyed", user, "polling"))


# Prints "connected" or the error. Its arguments: a folder with the client in node_modules, the URL, the transport.
JAVASCRIPT = """
const [folder, url, transport] = process.argv.slice(1);
const { io } = require(`${folder}/node_modules/socket.io-client`);
const socket = io(url, { transports: [transport], reconnection: false, rejectUnauthorized: false });
socket.on("connect", () => { console.log("connected"); socket.disconnect(); });
socket.on("connect_error", (error) => console.log(error.message));
"""


@contextmanager
def redirecting(edge: Edge, status: str = "PERMANENT_REDIRECT") -> Iterator[str]:
    """Redirects to the listener with TLS; yields the URL that clients are given."""
    files = deepcopy(edge.files)
    redirect = files["routes/redirect.json"][0]["virtual_hosts"][0]["routes"][0]["redirect"]
    assert redirect["response_code"] == "PERMANENT_REDIRECT"
    redirect |= {"port_redirect": edge.ports["safe"], "response_code": status}
    assert "failed" not in edge.give(files)
    try:
        yield f"http://127.0.0.1:{edge.ports['redirect']}?client_id=alice"
    finally:
        assert "failed" not in edge.give(edge.files)


def test_the_python_client_follows_the_redirect_with_its_posts(edge: Edge) -> None:
    """The control is a 301, after which it sends a GET instead of a POST."""

    async def say(url: str, transport: str) -> str:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False)) as session:
            client = socketio.AsyncClient(http_session=session, reconnection=False)
            await client.connect(url, transports=[transport], wait_timeout=2)
            answer: str = await client.call("message", "hello", timeout=10)
            await client.disconnect()
            return answer

    with redirecting(edge) as url:
        assert [asyncio.run(say(url, transport)) for transport in ("polling", "websocket")] == ["hello"] * 2
    with redirecting(edge, "MOVED_PERMANENTLY") as url, pytest.raises(socketio.exceptions.ConnectionError):
        asyncio.run(say(url, "polling"))


@pytest.mark.parametrize("transport", ["polling", "websocket"])
def test_the_javascript_client_in_nodejs_fails_at_once_instead(edge: Edge, javascript: Path, transport: str) -> None:
    """Whatever the status of the redirect is, so it must be given the https URL, which is the control."""

    def connect(url: str) -> str:
        command = ["node", "-e", JAVASCRIPT, str(javascript), url, transport]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return str(done.stdout)

    said = {"polling": "xhr poll error", "websocket": "websocket error"}[transport]
    for status in ("PERMANENT_REDIRECT", "TEMPORARY_REDIRECT", "MOVED_PERMANENTLY"):
        with redirecting(edge, status) as url:
            assert connect(url) == f"{said}\n", status
    assert connect(f"https://127.0.0.1:{edge.ports['safe']}?client_id=alice") == "connected\n"


async def connected(edge: Edge, listener: str, drops: list[str]) -> socketio.AsyncClient:
    """A WebSocket of a user; `drops` gets the reason of each disconnect."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context))
    client = socketio.AsyncClient(http_session=session, reconnection=False)
    client.on("disconnect", lambda reason: drops.append(str(reason)))
    scheme = "https" if listener == "safe" else "http"
    url = f"{scheme}://127.0.0.1:{edge.ports[listener]}?client_id=alice"
    await client.connect(url, transports=["websocket"])
    return client


async def talk(edge: Edge, listener: str, total: int, size: int, together: int) -> tuple[int, list[str]]:
    """Sends so many bytes in messages of that size; returns the bytes that were echoed, and the drops."""
    drops: list[str] = []
    client = await connected(edge, listener, drops)
    text, back = "x" * size, 0

    async def exchange(count: int) -> None:
        nonlocal back
        for _ in range(count):
            answer = await client.call("message", text, timeout=CALL_SECONDS)
            back += len(answer)

    talking = [asyncio.ensure_future(exchange(total // size // together)) for _ in range(together)]
    while not drops and not all(one.done() for one in talking):
        await asyncio.wait(talking, timeout=0.1)
    for one in talking:
        one.cancel()
    await asyncio.gather(*talking, return_exceptions=bool(drops))
    result = back, [*drops]
    await client.shutdown()
    await client.eio.http.close()
    return result


# Leaves room for the packet around the message: `42["message","..."]` with an id.
LARGEST_TEXT = LARGEST_MESSAGE - 100


@pytest.mark.parametrize("listener", ["sticky", "safe"])
@pytest.mark.parametrize(("size", "together"), [(10_000, 20), (LARGEST_TEXT, 2)], ids=["small", "largest"])
def test_fifty_megabytes_each_way_over_one_websocket(edge: Edge, listener: str, size: int, together: int) -> None:
    total = 50 * MEGABYTE
    back, drops = asyncio.run(talk(edge, listener, total, size, together))
    assert drops == []
    assert back >= total - together * size


def test_the_body_limit_would_end_websockets(edge: Edge) -> None:
    """The negative control of the test above."""
    files = deepcopy(edge.files)
    [listener] = [one for one in files["listeners.json"] if one["name"] == "sticky"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    manager["upgrade_configs"] = [{"upgrade_type": "websocket"}]
    assert any(one["name"] == "stickyring.body" for one in manager["http_filters"])
    assert "failed" not in edge.give(files, may_end_websockets=True)
    try:
        back, drops = asyncio.run(talk(edge, "sticky", 2 * MEGABYTE, 10_000, 1))
        assert drops
        assert back < 2 * MEGABYTE
    finally:
        assert "failed" not in edge.give(edge.files, may_end_websockets=True)


@pytest.mark.parametrize("listener", ["sticky", "safe"])
def test_a_silent_websocket_outlives_every_timeout_of_the_edge(edge: Edge, listener: str) -> None:
    """Timeouts of the route included. The control is a connection without a request, which the same timeouts end."""
    files = deepcopy(edge.files)
    for route in files[f"routes/{listener}.json"][0]["virtual_hosts"][0]["routes"]:
        if "route" in route:
            route["route"]["timeout"] = f"{TIMEOUT_SECONDS}s"

    async def live() -> tuple[str, list[str]]:
        drops: list[str] = []
        assert edge.give(files)["written"] == [f"routes/{listener}.json"]
        client = await connected(edge, listener, drops)
        with socket.create_connection(("127.0.0.1", edge.ports["unkeyed"])) as idle:
            idle.settimeout(10 * TIMEOUT_SECONDS)
            began = time.monotonic()
            assert await asyncio.to_thread(idle.recv, 1) == b""
        await asyncio.sleep(max(0, 3 * TIMEOUT_SECONDS - (time.monotonic() - began)))
        answer = await client.call("message", "still here", timeout=10)
        seen = [*drops]
        await client.shutdown()
        await client.eio.http.close()
        return answer, seen

    try:
        assert asyncio.run(live()) == ("still here", [])
    finally:
        assert "failed" not in edge.give(edge.files)


@pytest.mark.parametrize("listener", ["sticky", "safe"])
def test_no_stream_timeout_has_envoys_default(edge: Edge, listener: str) -> None:
    """Envoy's default ends a WebSocket that is silent for five minutes; no test waits that long."""
    (resource,) = [one for one in edge.files["listeners.json"] if one["name"] == listener]
    for chain in resource["filter_chains"]:
        assert chain["filters"][0]["typed_config"]["stream_idle_timeout"] == "0s"
    routes = edge.files[f"routes/{listener}.json"][0]["virtual_hosts"][0]["routes"]
    idle = [route["route"]["idle_timeout"] for route in routes if "route" in route]
    assert idle == ["0s"] * len(idle)
    assert idle


def test_a_stream_timeout_would_end_a_silent_websocket(edge: Edge) -> None:
    """The negative control of the tests above."""
    files = deepcopy(edge.files)
    for route in files["routes/sticky.json"][0]["virtual_hosts"][0]["routes"]:
        if "route" in route:
            route["route"]["idle_timeout"] = f"{TIMEOUT_SECONDS}s"

    async def live() -> list[str]:
        drops: list[str] = []
        client = await connected(edge, "sticky", drops)
        deadline = time.monotonic() + 10 * TIMEOUT_SECONDS
        while not drops and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await client.shutdown()
        await client.eio.http.close()
        return drops

    assert edge.give(files)["written"] == ["routes/sticky.json"]
    try:
        assert asyncio.run(live())
    finally:
        assert "failed" not in edge.give(edge.files)


async def user_without_cookies(edge: Edge) -> socketio.AsyncClient:
    """With aiohttp, which keeps no cookies for an IP address; by polling it could not connect at all."""
    client = socketio.AsyncClient(reconnection=False)
    await client.connect(f"http://127.0.0.1:{edge.ports['sticky']}", transports=["websocket"])
    return client


def test_a_rebalance_does_not_ask_a_client_again_and_again(edge: Edge, nodes: dict[str, Node], ring: Ring) -> None:
    """Neither a client without cookies, nor one that changes its id."""
    first = next(f"first-{number}" for number in range(100) if ring.owner(f"first-{number}") == "node1-1")
    others = [f"other-{number}" for number in range(20)]
    for number, other in enumerate(others):
        sid = json.loads(handshake(edge, f"changing-{number}", f"&client_id={first}").body[1:])["sid"]
        head = f"POST {POLL.replace('alice', other)}&sid={sid} HTTP/1.1\nHost: edge\nContent-Length: 2"
        assert ask(edge.ports["sticky"], head.encode(), b"40").status == 200

    async def asked() -> list[tuple[int, int]]:
        clients = [await user_without_cookies(edge) for _ in range(12)]
        document = json.dumps(ring_document(edge))
        done = [await asyncio.to_thread(node.ask, "rebalance", "--ring", "-", text=document) for node in nodes.values()]
        alive = all(client.connected for client in clients)
        for client in clients:
            await client.shutdown()
        assert alive
        return [(one["asked"], one["returned"]) for one in done]

    assert asyncio.run(asked()) == [(0, 0)] * len(NODES)
    known: dict[str, set[Any]] = {name: set(node.users()) for name, node in nodes.items()}
    assert first in known["node1-1"]
    assert not set(others) & set.union(*known.values())
