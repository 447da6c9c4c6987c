"""The WebSocket of a node on the wire (RFC 6455)."""

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from conftest import RUNTIME, ServeProcess, serving, wait_until

from stickyring.node.websocket import Reader, WebSocket, frame

TEXT, BINARY, CLOSE, PING, PONG = 0x81, 0x82, 0x88, 0x89, 0x8A
KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # section 1.3, with its accept value
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
OFFER = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
LONGEST = 1_000_000


class Client:
    """A connection that can send any bytes, valid or not."""

    def __init__(self, node: ServeProcess, version: str = "13", key: str = KEY, query: str = "") -> None:
        host, _, port = node.address.partition(":")
        self.connection = socket.create_connection((host, int(port)), timeout=10)
        self.received = b""
        self.connection.sendall(
            f"GET /socket.io/?EIO=4&transport=websocket{query} HTTP/1.1\r\nHost: {node.address}\r\n"
            f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            f"Sec-WebSocket-Version: {version}\r\n{OFFER}\r\n".encode()
        )
        while b"\r\n\r\n" not in self.received:
            self._receive()
        head, _, self.received = self.received.partition(b"\r\n\r\n")
        self.head = head.decode().splitlines()

    def send(self, first: int, payload: bytes, mask: bytes = b"\x37\xfa\x21\x3d") -> None:
        size = len(payload)
        if size < 126:
            length = bytes([0x80 | size])
        else:
            length = struct.pack("!BH", 0xFE, size) if size < 65536 else struct.pack("!BQ", 0xFF, size)
        masked = payload if mask == bytes(4) else bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
        self.connection.sendall(bytes([first]) + length + mask + masked)

    def send_in_part(self, first: int, payload: bytes, size: int, step: int | None = None) -> None:
        """Send the beginning of a frame of `size` bytes, `step` bytes at a time."""
        mask = b"\x37\xfa\x21\x3d"
        masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
        length = bytes([0x80 | size]) if size < 126 else struct.pack("!BH", 0xFE, size)
        data = bytes([first]) + length + mask + masked
        for at in range(0, len(data), step or len(data)):
            self.connection.sendall(data[at : at + (step or len(data))])

    def frame(self) -> tuple[int, bytes]:
        """Return the next frame: first byte and payload."""
        first, size = self._take(2)
        if size > 125:
            size = int.from_bytes(self._take(2 if size == 126 else 8), "big")
        return first, self._take(size)

    def ended(self) -> bool:
        return not self.received and not self.connection.recv(1)

    def _take(self, size: int) -> bytes:
        while len(self.received) < size:
            self._receive()
        taken, self.received = self.received[:size], self.received[size:]
        return taken

    def _receive(self) -> None:
        data = self.connection.recv(65536)
        assert data, f"the connection has ended after {self.received!r}"
        self.received += data


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    with serving(tmp_path_factory.mktemp("websocket")) as node:
        yield node


@pytest.fixture
def connect(node: ServeProcess) -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def open_one(**options: str) -> Client:
        clients.append(Client(node, **options))
        return clients[-1]

    yield open_one
    for client in clients:
        client.connection.close()


@pytest.fixture
def client(connect: Callable[..., Client]) -> Client:
    """A client that has joined the namespace and got the welcome."""
    client = connect()
    assert client.frame()[1].startswith(b"0{")
    client.send(TEXT, b"40")
    assert {client.frame()[1][:2] for _ in range(2)} == {b"40", b"42"}
    return client


def message(text: str) -> bytes:
    return f"42{json.dumps(['message', text])}".encode()


def echo(text: str) -> tuple[int, bytes]:
    return TEXT, f"42{json.dumps(['message', f'node#node1-1: {text}'], separators=(',', ':'))}".encode()


def test_the_handshake_accepts_no_compression(connect: Callable[..., Client]) -> None:
    head = connect().head
    assert head[0] == "HTTP/1.1 101 Switching Protocols"
    assert f"Sec-WebSocket-Accept: {ACCEPT}" in head
    assert not [line for line in head if line.lower().startswith("sec-websocket-extensions")]


def test_another_version_gets_a_426_with_the_supported_one(node: ServeProcess, connect: Callable[..., Client]) -> None:
    refused = 'stickyring_handshakes_refused_total{reason="bad_request",transport="websocket"}'
    before = node.metric(refused) if refused in node.get("/metrics").read().decode() else 0
    head = connect(version="8").head
    assert head[0] == "HTTP/1.1 426 Upgrade Required"
    assert "Sec-WebSocket-Version: 13" in head
    assert connect(key="").head[0] == "HTTP/1.1 400 Bad Request"
    assert node.metric(refused) == before + 2


def test_an_upgrade_to_something_else_is_a_request_like_any_other(node: ServeProcess) -> None:
    host, _, port = node.address.partition(":")
    with contextlib.closing(HTTPConnection(host, int(port), timeout=10)) as connection:
        headers = {"Connection": "Upgrade", "Upgrade": "other/1"}
        connection.request("GET", "/socket.io/?EIO=4&transport=polling", headers=headers)
        answer = connection.getresponse()
        assert (answer.status, answer.read()[:2]) == (200, b"0{")


@pytest.mark.parametrize("size", [0, 1, 60, 100, 200, 70_000, LONGEST - 50])
def test_messages_of_all_sizes_come_back(client: Client, size: int) -> None:
    client.send(TEXT, message("x" * size))
    assert client.frame() == echo("x" * size)


def test_a_fragmented_message_with_a_ping_in_between(client: Client) -> None:
    whole = message("in pieces: ✓")
    client.send(0x01, whole[:20])
    client.send(PING, b"are you there")
    client.send(0x00, whole[20:21])
    client.send(0x80, whole[21:])
    assert client.frame() == (PONG, b"are you there")
    assert client.frame()[1] == message("node#node1-1: in pieces: ✓").replace(b", ", b",")


def test_a_frame_that_arrives_byte_by_byte(client: Client) -> None:
    client.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    payload = bytes(byte ^ 7 for byte in message("slow"))
    for byte in bytes([TEXT, 0x80 | len(payload)]) + b"\x07\x07\x07\x07" + payload:
        client.connection.sendall(bytes([byte]))
    assert client.frame() == echo("slow")


def test_answers_stay_whole_and_in_order_when_the_client_does_not_read(client: Client) -> None:
    """The answers exceed the connection's buffers: the node waits in the middle of a frame, then continues."""
    texts = [f"{number} " + "x" * 100_000 for number in range(200)]
    for text in texts:
        client.send(TEXT, message(text), mask=bytes(4))
    assert [client.frame() for _ in texts] == [echo(text) for text in texts]


CROWDED = """
import socketio

server = socketio.Server(async_mode="eventlet", async_handlers=False)
application = socketio.WSGIApp(server)

@server.event
def message(sid, data):
    def speak(name):
        for number in range(8):
            server.emit("text", f"{name} {number} " + "x" * 150_000, to=sid)
            server.sleep(0)
            server.emit("file", {"name": name, "number": number, "content": name.encode() * 150_000}, to=sid)
            server.sleep(0)
    for name in "abcd":
        server.start_background_task(speak, name)
"""


def test_concurrent_senders_do_not_mix_their_frames(serve: Callable[..., ServeProcess], tmp_path: Path) -> None:
    """Many send at once, pings are answered in between, and the client reads slowly."""
    Path(tmp_path, "crowded.py").write_text(CROWDED)
    node = serve("crowded:application")
    client = Client(node)
    client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    assert client.frame()[1].startswith(b"0{")
    client.send(TEXT, b"40")
    assert client.frame()[1].startswith(b"40")
    client.send(TEXT, b'42["message",1]')
    texts: dict[str, list[int]] = {name: [] for name in "abcd"}
    files: dict[str, list[int]] = {name: [] for name in "abcd"}
    pings = pongs = 0
    header = None
    while not all(len(found) == 8 for found in (*texts.values(), *files.values())):
        client.send(PING, b"%d" % pings)
        pings += 1
        first, payload = client.frame()
        while first == PONG:
            assert payload == b"%d" % pongs
            pongs += 1
            first, payload = client.frame()
        if header is not None:
            event = json.loads(header)[1]
            assert (first, payload) == (BINARY, event["name"].encode() * 150_000), "not the attachment"
            files[event["name"]].append(event["number"])
            header = None
        elif payload.startswith(b"451-"):
            header = payload[4:]
        else:
            assert payload.startswith(b'42["text",'), payload[:80]
            name, number, content = json.loads(payload[2:])[1].split(" ")
            assert content == "x" * 150_000
            texts[name].append(int(number))
    assert pongs
    for found in (texts, files):
        assert found == {name: [*range(8)] for name in "abcd"}
    client.connection.close()


class SlowSocket:
    """Accepts the beginning of the first message at once, and everything else only when allowed."""

    def __init__(self) -> None:
        self.sent = b""
        self.waiting, self.free = threading.Event(), threading.Event()

    def send_now(self, data: bytes) -> int:
        self.sent += data[:4]
        return min(4, len(data))

    def sendall(self, data: bytes) -> None:
        self.waiting.set()
        assert self.free.wait(10)
        self.sent += data

    def shutdown(self, _: int) -> None: ...

    def settimeout(self, _: float) -> None: ...

    def recv(self, _: int) -> bytes:
        return b""


class Server:
    max_http_buffer_size = 1000.0

    def __init__(self) -> None:
        self.tasks: list[threading.Thread] = []

    def start_background_task(self, target: Callable[..., object], *args: object) -> None:
        self.tasks.append(threading.Thread(target=target, args=args))
        self.tasks[-1].start()


def test_nothing_is_sent_at_once_while_another_message_is_being_sent() -> None:
    server = Server()
    websocket = WebSocket(lambda _: None, server)
    slow = websocket.socket = SlowSocket()
    assert websocket.send_at_once("ab")
    assert websocket.send_at_once("begun")
    assert slow.waiting.wait(10)
    assert not websocket.send_at_once("cd"), "it would be sent in the middle of another frame"
    server.start_background_task(websocket.send, "next")
    wait_until(lambda: websocket._senders == 2, "another waits")
    slow.free.set()
    for task in server.tasks:
        task.join(10)
    assert slow.sent == frame("ab") + frame("begun") + frame("next")
    assert websocket.send_at_once("cd")


def test_nothing_follows_a_close() -> None:
    websocket = WebSocket(lambda _: None, Server())
    slow = websocket.socket = SlowSocket()
    slow.free.set()
    websocket.fail(1002)
    assert slow.sent == bytes([CLOSE, 2]) + struct.pack("!H", 1002)
    assert not websocket.send_at_once("late")
    with pytest.raises(BrokenPipeError):
        websocket.send("late")
    assert slow.sent.endswith(struct.pack("!H", 1002))


def test_empty_fragments_are_bounded_too(client: Client) -> None:
    """Within seconds; the control: the node answers others meanwhile."""
    piece = b"\x80\0\0\0\0"
    client.connection.settimeout(30)
    client.connection.sendall(b"\x01" + piece)
    for _ in range(LONGEST // 10_000 + 1):
        client.connection.sendall((b"\x00" + piece) * 10_000)
    assert client.frame() == (CLOSE, struct.pack("!H", 1009))


def test_frames_that_arrive_together_cost_no_more_each() -> None:
    """What follows a frame is not copied for it, which would take 300 times as long here instead of 16 times."""

    def seconds(count: int) -> float:
        reader = Reader(LONGEST)
        reader.feed(b"\x81\x80\0\0\0\0" * count)
        began = time.process_time()
        assert sum(1 for _ in iter(reader.next, None)) == count
        return time.process_time() - began

    few = min(seconds(20_000) for _ in range(3))
    assert seconds(320_000) < 64 * few


def test_a_client_that_is_still_sending_gets_the_status(client: Client) -> None:
    """The node keeps reading: closing with unread bytes would reset the connection."""
    client.connection.sendall(b"\x81\xff" + struct.pack("!Q", 9_000_000) + b"\0\0\0\0")
    for _ in range(90):
        client.connection.sendall(100_000 * b"x")
    assert client.frame() == (CLOSE, struct.pack("!H", 1009))
    client.connection.shutdown(socket.SHUT_WR)
    assert client.ended()


@pytest.mark.parametrize("text", [b"", b"x", b"b4000"])
def test_an_invalid_packet_ends_the_session(node: ServeProcess, client: Client, text: bytes) -> None:
    def sessions() -> float:
        return node.metric('stickyring_connections{transport="websocket"}')

    wait_until(lambda: sessions() == 1, "those of other tests have ended")
    lines = len(node.log())
    client.send(TEXT, text)
    assert client.frame() == (CLOSE, struct.pack("!H", 1002))
    client.connection.close()
    wait_until(lambda: sessions() == 0, "the session has ended")
    assert not [line for line in node.log()[lines:] if line["level"] == "ERROR"]


def test_data_of_a_websocket_does_not_reach_another_request(node: ServeProcess, connect: Callable[..., Client]) -> None:
    client = connect()
    sid = json.loads(client.frame()[1][1:])["sid"]
    client.send(TEXT, b"40")
    assert {client.frame()[1][:2] for _ in range(2)} == {b"40", b"42"}
    intruder = connect(query=f"&sid={sid}")
    assert intruder.head[0] == "HTTP/1.1 101 Switching Protocols"
    assert intruder.frame() == (CLOSE, struct.pack("!H", 1002))
    client.send(TEXT, message("still here"))
    assert client.frame() == echo("still here")


def test_an_encoded_name_of_a_parameter_is_the_same_parameter(node: ServeProcess) -> None:
    accepted = 'stickyring_handshakes_accepted_total{transport="polling"}'
    before = node.metric(accepted)
    answer = node.get("/socket.io/?EIO=4&%74ransport=polling&transport=x")
    assert answer.status == 200
    assert node.metric(accepted) == before + 1


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(b"\x81\x01x", 1002, id="no mask"),
        pytest.param(b"\xc1\x81\0\0\0\0x", 1002, id="compressed though that was not taken up"),
        pytest.param(b"\x83\x81\0\0\0\0x", 1002, id="a reserved opcode"),
        pytest.param(b"\x8b\x80\0\0\0\0", 1002, id="a reserved control opcode"),
        pytest.param(b"\x09\x80\0\0\0\0", 1002, id="a ping in pieces"),
        pytest.param(b"\x89\xfe\x00\x7e\0\0\0\0" + 126 * b"x", 1002, id="a long ping"),
        pytest.param(b"\x80\x81\0\0\0\0x", 1002, id="a continuation of nothing"),
        pytest.param(b"\x01\x81\0\0\0\0x\x81\x81\0\0\0\0x", 1002, id="a message within a message"),
        pytest.param(b"\x88\x81\0\0\0\0\x03", 1002, id="half a status"),
        pytest.param(b"\x88\x82\0\0\0\0\x03\xed", 1002, id="a status that may not be sent"),
        pytest.param(b"\x88\x83\0\0\0\0\x03\xe8\xff", 1007, id="a reason that is not UTF-8"),
        pytest.param(b"\x81\x81\0\0\0\0\xff", 1007, id="a text that is not UTF-8"),
        pytest.param(b"\x81\xff" + struct.pack("!Q", LONGEST + 1) + b"\0\0\0\0", 1009, id="too long"),
        pytest.param(
            (b"\x01\xff" + struct.pack("!Q", 600_000) + 4 * b"\0" + 600_000 * b"x")
            + (b"\x80\xff" + struct.pack("!Q", 600_000) + 4 * b"\0" + 600_000 * b"x"),
            1009,
            id="too long in pieces",
        ),
    ],
)
def test_a_breach_of_the_protocol_is_closed_with_its_status(client: Client, sent: bytes, status: int) -> None:
    client.connection.sendall(sent)
    assert client.frame() == (CLOSE, struct.pack("!H", status))
    assert client.ended()


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(b"4\xff", id="a byte that is never there"),
        pytest.param("4żółć".encode() + b"\xf4\x90", id="above U+10FFFF"),
        pytest.param(b"4\xed\xa0", id="a surrogate"),
        pytest.param(b"4\xc0", id="overlong, 2 bytes"),
        pytest.param(b"4\xe0\x80", id="overlong, 3 bytes"),
        pytest.param(b"4\xce4", id="one byte of two"),
    ],
)
@pytest.mark.parametrize("sent", ["in a piece", "in a later piece", "in a piece that is not whole", "byte by byte"])
def test_invalid_utf_8_is_refused_before_the_end_of_the_text(client: Client, bad: bytes, sent: str) -> None:
    """RFC 6455, section 8.1; the client sends neither the rest of the frame nor of the message."""
    match sent:
        case "in a piece":
            client.send(0x01, bad)
        case "in a later piece":
            client.send(0x01, b"4")
            client.send(PING, b"")
            assert client.frame() == (PONG, b"")
            client.send(0x00, bad)
        case "in a piece that is not whole":
            client.send_in_part(0x81, bad, 10_000)
        case _:
            client.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.send(0x01, b"4")
            client.send_in_part(0x80, bad, 10_000, step=1)
    assert client.frame() == (CLOSE, struct.pack("!H", 1007))
    assert client.ended()


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_character_may_be_split_between_fragments_and_reads(client: Client, size: int) -> None:
    client.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    content = message("żółć 𐍈 \U0010ffff" * 3)
    pieces = [content[at : at + size] for at in range(0, len(content), size)]
    for number, piece in enumerate(pieces):
        first = (0x00 if number else 0x01) | (0x80 if number == len(pieces) - 1 else 0)
        client.send_in_part(first, piece, len(piece), step=1)
    assert client.frame() == echo("żółć 𐍈 \U0010ffff" * 3)
    client.send(TEXT, message("next"))
    assert client.frame() == echo("next")


def test_a_close_is_answered_with_its_status(client: Client) -> None:
    client.send(CLOSE, struct.pack("!H", 3000) + b"bye")
    assert client.frame() == (CLOSE, struct.pack("!H", 3000))
    assert client.ended()


def test_broken_connections_do_not_affect_the_node(node: ServeProcess, connect: Callable[..., Client]) -> None:
    before = len(node.log())
    client = connect()
    client.connection.sendall(b"\x81\xfe\x00")  # leaves in the middle of a frame
    client.connection.close()
    assert node.get("/healthz").status == 200
    assert not [line for line in node.log()[before:] if line["level"] in {"WARNING", "ERROR"}]


COUNTED = """
import asyncio
import gc

import greenlet
import socketio

server = socketio.Server(async_mode="eventlet")


@server.event
def threads(sid):
    gc.collect()
    found = [one for one in gc.get_objects() if isinstance(one, greenlet.greenlet | asyncio.Task)]
    return len([one for one in found if not (one.done() if isinstance(one, asyncio.Task) else one.dead)])


application = socketio.WSGIApp(server)
"""


def test_an_idle_session_keeps_nothing_but_its_reader(serve: Callable[..., ServeProcess], tmp_path: Path) -> None:
    """python-engineio alone keeps a writer and a ping too; on asyncio, a session needs no task at all."""
    Path(tmp_path, "counted.py").write_text(COUNTED)
    node = serve("counted:application")
    clients: list[Client] = []

    def join() -> None:
        clients.append(Client(node))
        assert clients[-1].frame()[1].startswith(b"0{")
        clients[-1].send(TEXT, b"40")
        assert clients[-1].frame()[1].startswith(b"40")

    def threads() -> int:
        clients[0].send(TEXT, b'420["threads"]')
        answer = clients[0].frame()[1].decode()
        assert answer.startswith("430[")
        return int(json.loads(answer[3:])[0])

    join()
    before = threads()
    for _ in range(20):
        join()
    assert threads() - before == (0 if RUNTIME == "asgi" else 20)
    for client in clients:
        client.connection.close()


IMPATIENT = """
import socketio

application = socketio.WSGIApp(socketio.Server(async_mode="eventlet", ping_interval=0.4, ping_timeout=0.4))
"""


def test_only_a_client_that_answers_no_ping_is_disconnected(serve: Callable[..., ServeProcess], tmp_path: Path) -> None:
    Path(tmp_path, "impatient.py").write_text(IMPATIENT)
    node = serve("impatient:application")
    silent, alive = Client(node), Client(node)
    began = time.monotonic()
    assert silent.frame()[1].startswith(b"0{")
    assert silent.frame() == (TEXT, b"2")
    assert alive.frame()[1].startswith(b"0{")
    for _ in range(5):
        assert alive.frame() == (TEXT, b"2")
        alive.send(TEXT, b"3")
    assert time.monotonic() - began > 2 * 0.8
    assert silent.frame() == (CLOSE, b"")
    assert silent.ended()
    assert node.metric('stickyring_connections{transport="websocket"}') == 1
    silent.connection.close()
    alive.connection.close()
