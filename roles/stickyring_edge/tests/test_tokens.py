"""A listener that takes users by a signed token: a real Envoy with the role's files, real nodes, official clients."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jwt
import pytest
import socketio
from ansible_collections.stickyring.fleet.plugins.plugin_utils import edge_routes
from certificates import Certificate, jwk
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from real_nodes import Node, ring_document, serving
from running_envoy import Edge, compose, running
from running_envoy import handshake as secured
from stickyring.ring import Ring

NODES = ("node1-1", "node2-1", "node3-1")
ISSUER, AUDIENCE = "https://login.example.com", "chat"
USERS = [f"user {number}" for number in range(12)]
TRANSPORTS = (["polling"], ["websocket"], ["polling", "websocket"])
JAVASCRIPT = """
const { io } = require(`${process.argv[1]}/node_modules/socket.io-client`);
const [url, transports] = process.argv.slice(2);
const socket = io(url, { transports: JSON.parse(transports), reconnection: false });
socket.on("connect_error", (error) => console.log(error.context?.status ?? error.message));
socket.on("connect", async () => {
  console.log(await socket.timeout(10000).emitWithAck("message", "hello"));
  socket.disconnect();
});
"""
KEYS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
NEW_KEY = ec.generate_private_key(ec.SECP256R1())
FOREIGN_KEY = ec.generate_private_key(ec.SECP256R1())


def key_set(*keys: Any) -> str:
    """The public keys as a JWK Set."""
    return json.dumps({"keys": [jwk(key.public_key()) for key in keys]})


def token(subject: object = "alice", key: Any = KEYS["ES256"], algorithm: str = "ES256", **claims: object) -> str:
    """A token that the listener takes, unless an argument says otherwise; a claim that is None is left out."""
    all_claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": subject, "exp": int(time.time()) + 600, **claims}
    given = {name: value for name, value in all_claims.items() if value is not None}
    # Not by jwt.encode, which refuses some of the claims.
    return jwt.PyJWS().encode(json.dumps(given).encode(), key, algorithm)


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[dict[str, Node]]:
    with serving(folder, dict.fromkeys(NODES, "127.0.0.1")) as running_nodes:
        yield running_nodes


@pytest.fixture(scope="module")
def composed(folder: Path, certificate: Certificate, nodes: dict[str, Node]) -> dict[str, Any]:
    keys = folder / "keys.json"
    keys.write_text(key_set(*KEYS.values()))
    endpoints = [{"name": one.name, "address": one.address, "port": one.port} for one in nodes.values()]
    variables: dict[str, Any] = {"stickyring_edge_clusters": [{"name": "nodes", "endpoints": endpoints}]}
    strict = {"keys": str(keys), "issuer": ISSUER, "audiences": [AUDIENCE], "cookie": "login"}
    other = {"keys": str(keys), "query": "ticket", "paths": ["/ws/socket.io", "/private"]}
    settings: dict[str, Any] = {"strict": {"token": strict}, "safe": {"token": other}}
    return compose(folder, ("strict", "safe"), certificate, variables, **settings)


@pytest.fixture(scope="module")
def edge(folder: Path, composed: dict[str, Any]) -> Iterator[Edge]:
    with running(folder, composed, "--file-flush-interval-msec", "50") as running_edge:
        yield running_edge


@pytest.fixture(scope="module")
def ring(edge: Edge) -> Ring:
    """The ring that Envoy serves."""
    return Ring.load(ring_document(edge))


def ask(edge: Edge, path: str, *headers: str, upgrade: bool = False, method: str = "GET") -> tuple[int, str]:
    """Status of a request, and the node that has answered it."""
    kind = [
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {'A' * 22}==",
    ]
    lines = [f"{method} {path} HTTP/1.1", "Host: edge", *headers, *(kind if upgrade else ["Connection: close"])]
    with socket.create_connection(("127.0.0.1", edge.ports["strict"]), 10) as client:
        client.sendall("\r\n".join([*lines, "", ""]).encode())
        head = b""
        while b"\r\n\r\n" not in head and (more := client.recv(65536)):
            head += more
    first, *lines = head.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    found = dict(line.split(": ", 1) for line in lines)
    return int(first.split()[1]), found.get("x-served-by", "")


def handshake(edge: Edge, given: str = "", *headers: str, transport: str = "polling") -> tuple[int, str]:
    """That of a handshake with `given` as a token in the query."""
    query = f"&token={given}" if given else ""
    path = f"/socket.io/?EIO=4&transport={transport}{query}"
    return ask(edge, path, *headers, upgrade=transport == "websocket")


@pytest.mark.parametrize("transport", ["polling", "websocket"])
def test_the_subject_is_the_users_key_wherever_the_token_is(
    edge: Edge, ring: Ring, nodes: dict[str, Node], transport: str
) -> None:
    chosen = set()
    for user in [*USERS, "café", "a:/,;b"]:
        given, node = token(user), ring.owner(user)
        assert handshake(edge, given, transport=transport) == (200 if transport == "polling" else 101, node)
        assert handshake(edge, "", f"Authorization: Bearer {given}", transport=transport)[1] == node
        assert handshake(edge, "", f"Cookie: other=1; login={given}", transport=transport)[1] == node
        chosen.add(node)
        if transport == "polling":
            assert user in nodes[str(node)].users()
    assert chosen == set(NODES)


def test_any_kind_of_key_can_sign(edge: Edge) -> None:
    assert {handshake(edge, token(key=key, algorithm=name))[0] for name, key in KEYS.items()} == {200}


def test_one_valid_token_of_several_is_not_enough(edge: Edge, ring: Ring) -> None:
    """Of several good ones, the header's counts."""
    header = f"Authorization: Bearer {token('bob')}"
    assert handshake(edge, token("alice"), header) == (200, ring.owner("bob"))
    assert handshake(edge, token("alice", key=FOREIGN_KEY), header) == (401, "")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/private/page", 401),
        ("/private/page?token={}", 401),
        ("/private/page?ticket={}", 200),
        ("/privately", 200),
        ("/ws/socket.io/?EIO=4", 401),
    ],
)
def test_over_tls_with_paths_and_a_parameter_of_ones_own(edge: Edge, path: str, status: int) -> None:
    request = f"GET {path.format(token())} HTTP/1.1\r\nHost: edge\r\nConnection: close\r\n\r\n"
    with secured(edge.ports["safe"]) as client:
        client.sendall(request.encode())
        assert int(client.recv(65536).split()[1]) == status


@pytest.mark.parametrize(
    ("method", "headers", "served"),
    [
        ("OPTIONS", ["Origin: https://chat.example.com", "Access-Control-Request-Method: GET"], True),
        ("OPTIONS", ["Origin: https://chat.example.com"], False),
        ("GET", ["Origin: https://chat.example.com", "Access-Control-Request-Method: GET"], False),
    ],
)
def test_a_browser_may_ask_a_node_whether_it_may_send_a_token(
    edge: Edge, method: str, headers: list[str], served: bool
) -> None:
    status, node = ask(edge, "/socket.io/?EIO=4&transport=polling", *headers, method=method)
    assert (node in NODES, status != 401) == (served, served)


def test_who_begins_too_often_is_refused_before_the_token_is_checked(edge: Edge, composed: dict[str, Any]) -> None:
    files = deepcopy(edge.files)
    common = composed["common"] | {"handshakes": {"rate": 1, "burst": 2, "enforced": True}}
    (item,) = (one for one in composed["listeners"] if one["name"] == "strict")
    files["routes/strict.json"] = [edge_routes.routes(item, common, {item["token"]["keys"]: key_set(NEW_KEY)})]
    assert "failed" not in edge.give(files)
    try:
        assert [handshake(edge, token())[0] for _ in range(3)] == [401, 401, 429]
    finally:
        assert "failed" not in edge.give(edge.files)


FORGED: dict[str, Callable[[], str]] = {
    "missing": lambda: "",
    "no token": lambda: "alice",
    "of another key": lambda: token(key=FOREIGN_KEY),
    "unsigned": lambda: token(key="", algorithm="none"),
    "without an end": lambda: token(exp=None),
    "expired": lambda: token(exp=int(time.time()) - 600),
    "not valid yet": lambda: token(nbf=int(time.time()) + 600),
    "of another issuer": lambda: token(iss="https://elsewhere.example.com"),
    "for somebody else": lambda: token(aud="mail"),
    "without a subject": lambda: token(None),
    "changed": lambda: ".".join([token("alice").rpartition(".")[0], token("mallory").rpartition(".")[2]]),
}


@pytest.mark.parametrize("transport", ["polling", "websocket"])
@pytest.mark.parametrize("which", FORGED)
def test_any_other_token_gets_401(edge: Edge, which: str, transport: str) -> None:
    """403 if it is a good one, but for somebody else."""
    refused = (403 if which == "for somebody else" else 401, "")
    assert handshake(edge, FORGED[which](), transport=transport) == refused
    # An id that other listeners take is no help.
    given = f"{FORGED[which]()}&client_id=alice"
    assert handshake(edge, given, "x-client-id: alice", transport=transport) == refused


def test_a_subject_that_is_no_key_gets_400(edge: Edge) -> None:
    assert handshake(edge, token("a\nb"))[0] == 400


def test_other_paths_need_no_token(edge: Edge) -> None:
    served = {ask(edge, "/page?client_id=alice") for _ in range(30)}
    assert {status for status, _ in served} == {200}
    assert {node for _, node in served} == set(NODES), "nothing but a token has a user's key"


@pytest.mark.parametrize(
    "path", ["/x/../socket.io/", "//socket.io/", "/%73ocket.io/", "/socket%2eio/", "/socket.io/below"]
)
def test_the_path_needs_a_token_however_it_is_written(edge: Edge, path: str) -> None:
    """The control is a token, with which it is served."""
    handshake = f"{path}?EIO=4&transport=polling"
    assert ask(edge, handshake)[0] == 401
    assert ask(edge, f"{handshake}&token={token()}")[0] == 200


def test_the_log_has_the_key_and_no_token(edge: Edge, folder: Path) -> None:
    given = token("somebody to look for")
    assert handshake(edge, given)[0] == 200

    def line() -> str | None:
        return next((one for one in (folder / "log").read_text().splitlines() if "somebody to look for" in one), None)

    deadline = time.monotonic() + 10
    while (found := line()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert json.loads(found)["key"] == "somebody to look for"
    assert given not in (folder / "log").read_text()


@pytest.mark.parametrize("transports", TRANSPORTS, ids="-".join)
def test_the_javascript_client_is_taken_with_a_token_only(edge: Edge, javascript: Path, transports: list[str]) -> None:
    def connect(given: str) -> str:
        url = f"http://127.0.0.1:{edge.ports['strict']}?token={given}"
        command = ["node", "-e", JAVASCRIPT, str(javascript), url, json.dumps(transports)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    assert connect(token()) == "hello"
    assert connect(token(exp=int(time.time()) - 600)) in {"401", "websocket error"}


@pytest.mark.parametrize("transports", TRANSPORTS, ids="-".join)
def test_the_python_client_is_taken_with_a_token_only(edge: Edge, transports: list[str]) -> None:
    async def connect(given: str) -> str:
        client = socketio.AsyncClient(reconnection=False)
        # It would send a header with the handshake only.
        url = f"http://127.0.0.1:{edge.ports['strict']}?token={given}"
        await client.connect(url, transports=transports, wait_timeout=10)
        answer: str = await client.call("message", "hello", timeout=10)
        await client.disconnect()
        return answer

    assert asyncio.run(connect(token())) == "hello"
    with pytest.raises(socketio.exceptions.ConnectionError):
        asyncio.run(connect(token(exp=int(time.time()) - 600)))


def test_keys_change_and_no_user_is_disconnected(edge: Edge, composed: dict[str, Any], folder: Path) -> None:
    """First both are taken, then the new one alone; who polls needs a token of the new one by then."""

    def give(*keys: Any) -> dict[str, Any]:
        files = deepcopy(edge.files)
        for item in composed["listeners"]:
            texts = {item["token"]["keys"]: key_set(*keys)}
            files[f"routes/{item['name']}.json"] = [edge_routes.routes(item, composed["common"], texts)]
        return edge.give(files)

    async def stay() -> list[str]:
        drops: list[str] = []
        clients = [socketio.AsyncClient(reconnection=False) for _ in TRANSPORTS]
        for client, transports in zip(clients, TRANSPORTS, strict=True):
            client.on("disconnect", lambda reason: drops.append(str(reason)))
            url = f"http://127.0.0.1:{edge.ports['strict']}?token={token(' '.join(transports))}"
            await client.connect(url, transports=transports, wait_timeout=10)
        listeners = (folder / "xds" / "listeners.json").read_bytes()
        result = await asyncio.to_thread(give, *KEYS.values(), NEW_KEY)
        assert (set(result["written"]), result["ends"]) == ({"routes/strict.json", "routes/safe.json"}, "")
        assert {handshake(edge, one)[0] for one in (token(), token(key=NEW_KEY))} == {200}
        assert [await one.call("message", "here", timeout=10) for one in clients] == ["here"] * len(TRANSPORTS)
        polling, *others = clients
        await polling.disconnect()
        drops.clear()
        await asyncio.to_thread(give, NEW_KEY)
        statuses = [handshake(edge, one)[0] for one in (token(), token(key=NEW_KEY))]
        assert statuses == [401, 200]
        assert (folder / "xds" / "listeners.json").read_bytes() == listeners
        assert [await one.call("message", "here", timeout=10) for one in others] == ["here"] * len(others)
        seen = [*drops]
        for client in others:
            await client.disconnect()
        return seen

    try:
        assert asyncio.run(stay()) == []
    finally:
        assert "failed" not in edge.give(edge.files)
