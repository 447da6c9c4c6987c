"""The echo service on a real node, with python-socketio's own client and with plain HTTP."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import socketio
from conftest import ServeProcess, serving, wait_until

CAP = 3
FILES = {
    "index.html": ("text/html; charset=utf-8", "<p>first</p>"),
    "index2.html": ("text/html; charset=utf-8", "<p>second</p>"),
    "page.css": ("text/css; charset=utf-8", "p {}"),
    "socket.io.min.js": ("javascript; charset=utf-8", "io()"),
}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """A shared node with a low cap; each test must close its connections."""
    folder = tmp_path_factory.mktemp("echo")
    for name, (_, text) in FILES.items():
        Path(folder, name).write_text(text)
    with serving(folder, "stickyring.echo:create_application('.')", "--max-connections", str(CAP)) as node:
        yield node


def total(node: ServeProcess, metric: str, label: str = "") -> float:
    """Return the sum of a metric over both transports, for one value of another label if given."""
    return sum(node.metric(f'{metric}{{{label}transport="{transport}"}}') for transport in ("polling", "websocket"))


def nobody_is_connected(node: ServeProcess) -> bool:
    return total(node, "stickyring_connections") == 0


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("transports", "ends_on"),
    [(["polling"], "polling"), (["websocket"], "websocket"), (["polling", "websocket"], "websocket")],
    ids=["polling", "websocket", "upgrade"],
)
async def test_welcome_echo_and_acknowledgement(node: ServeProcess, transports: list[str], ends_on: str) -> None:
    accepted = f'stickyring_handshakes_accepted_total{{transport="{transports[0]}"}}'

    def counts() -> tuple[float, float, float]:
        received, sent = (
            total(node, "stickyring_messages_total", f'direction="{direction}",') for direction in ("received", "sent")
        )
        return node.metric(accepted), received, sent

    before, logged = counts(), len(node.log())
    got: asyncio.Queue[str] = asyncio.Queue()
    client = socketio.AsyncClient(reconnection=False)
    client.on("message", got.put)
    await client.connect(f"{node.url}?client_id=alice", transports=transports)
    assert client.transport() == ends_on
    assert await asyncio.wait_for(got.get(), 5) == "node#node1-1: welcome"

    assert await client.call("message", "with acknowledgement", timeout=5) == "node#node1-1: with acknowledgement"
    assert await asyncio.wait_for(got.get(), 5) == "node#node1-1: with acknowledgement"
    await client.emit("message", "größer")
    assert await asyncio.wait_for(got.get(), 5) == "node#node1-1: größer"

    # In: connect and two events. Out: connect, welcome, two events and an acknowledgement.
    assert tuple(after - earlier for earlier, after in zip(before, counts(), strict=True)) == (1, 3, 5)
    assert node.metric(f'stickyring_connections{{transport="{ends_on}"}}') == 1
    await client.disconnect()
    wait_until(lambda: nobody_is_connected(node), "no connection is left")
    assert "alice" not in str(node.log())
    # A closed WebSocket is not a failed request: nothing is written to its connection any more.
    assert not [line for line in node.log()[logged:] if line["level"] == "ERROR"]


@pytest.mark.asyncio
async def test_a_message_with_an_id_is_echoed_once(node: ServeProcess) -> None:
    heard: list[tuple[str, ...]] = []
    client = socketio.AsyncClient(reconnection=False)
    client.on("message", lambda *data: heard.append(data))
    await client.connect(node.url, transports=["websocket"])
    for data in [("hello", "0123456789abcdef-1")] * 2 + [("hello", "no id")] * 2:
        assert await client.call("message", data, timeout=5) == "node#node1-1: hello"
    await client.disconnect()
    echo = "node#node1-1: hello"
    assert heard == [("node#node1-1: welcome",), (echo, "0123456789abcdef-1"), (echo,), (echo,)]


@pytest.mark.asyncio
async def test_texts_go_to_everybody_or_to_a_room(node: ServeProcess) -> None:
    clients = [socketio.AsyncSimpleClient(reconnection=False) for _ in range(2)]
    try:
        for client in clients:
            await client.connect(node.url, transports=["websocket"])
            assert (await client.receive(5))[0] == "message"
        ann, bob = clients
        await ann.call("join", "first")
        await ann.call("join", "second")
        await bob.call("say", ("old", "first"))
        await bob.call("say", ("new", "second"))
        await bob.call("say", "all")
        # Each session has a room of its own name, which is not for clients.
        await bob.call("say", ("private", ann.sid))
        await bob.call("say", ("end", "second"))
        heard = [await ann.receive(5) for _ in range(3)]
        assert heard == [
            ["said", "node#node1-1: new", "second"],
            ["said", "node#node1-1: all", None],
            ["said", "node#node1-1: end", "second"],
        ]
    finally:
        for client in clients:
            await client.disconnect()


@pytest.mark.asyncio
async def test_the_cap_refuses_a_websocket_before_it_is_one(node: ServeProcess) -> None:
    *clients, late = [socketio.AsyncClient(reconnection=False) for _ in range(CAP + 1)]
    for client in clients:
        await client.connect(node.url, transports=["websocket"])
    with pytest.raises(socketio.exceptions.ConnectionError):
        await late.connect(node.url, transports=["websocket"])
    assert node.metric('stickyring_handshakes_refused_total{reason="capacity",transport="websocket"}') == 1
    await clients[0].disconnect()
    wait_until(lambda: node.get("/readyz").status == 200, "there is room again")
    await late.connect(node.url, transports=["websocket"])
    for client in (*clients[1:], late):
        await client.disconnect()
    wait_until(lambda: nobody_is_connected(node), "no connection is left")


class PollingSession:
    """A session over plain HTTP requests; `opened` is the answer to the handshake."""

    def __init__(self, node: ServeProcess, headers: dict[str, str] | None = None) -> None:
        self._node = node
        self._path = "/socket.io/?EIO=4&transport=polling"
        self.opened = node.get(self._path, headers)
        if self.opened.status == 200:
            self._path += f"&sid={json.loads(self.opened.read()[1:])['sid']}"

    def receive(self) -> list[str]:
        return self._node.get(self._path).read().decode().split("\x1e")

    def send(self, packet: str) -> None:
        assert self._node.get(self._path, method="POST", body=packet).read() == b"ok"

    def close(self) -> None:
        self.send("1")


def test_the_welcome_comes_after_the_acceptance(node: ServeProcess) -> None:
    session = PollingSession(node)
    session.send("40")
    accepted, welcome = session.receive()
    assert accepted.startswith('40{"sid":')
    assert welcome == '42["message","node#node1-1: welcome"]'
    session.close()


def test_pages_are_served_with_their_types(node: ServeProcess) -> None:
    for name, (content_type, text) in FILES.items():
        answer = node.get(f"/{name}")
        assert (answer.status, answer.read().decode()) == (200, text)
        assert (answer.getheader("Content-Type") or "").endswith(content_type)
    assert node.get("/").read().decode() == FILES["index.html"][1]
    for path in ("/nothing.html", "/../plain.py", "/%2e%2e/stderr-0"):
        assert node.get(path).status == 404


def test_only_pages_of_the_same_origin_connect(node: ServeProcess) -> None:
    def status(origin: str, **headers: str) -> int:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        session = PollingSession(node, {"Origin": origin, **named})
        if session.opened.status == 200:
            session.close()
        return session.opened.status

    assert status("http://chat.example.org", Host="chat.example.org") == 200
    assert status("https://chat.example.org", Host="chat.example.org", X_Forwarded_Proto="https") == 200
    assert status("http://evil.example.org", Host="chat.example.org") == 400


@pytest.mark.asyncio
async def test_sigterm_ends_a_node_with_an_open_websocket(serve: Callable[..., ServeProcess], tmp_path: Path) -> None:
    Path(tmp_path, "socket.io.min.js").touch()
    node = serve("stickyring.echo:create_application('.')")
    client = socketio.AsyncClient(reconnection=False)
    await client.connect(node.url, transports=["websocket"])
    assert await asyncio.to_thread(node.stop) == 0
    await asyncio.wait_for(client.wait(), 5)
