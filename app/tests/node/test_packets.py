"""What clients send to a running node arrives complete and in order, or the session ends at once with an error."""

import asyncio
import contextlib
import json
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from http.client import HTTPConnection, HTTPResponse, RemoteDisconnected
from pathlib import Path
from typing import Any

import engineio.json
import pytest
import socketio
from conftest import RUNTIME, ServeProcess, serving, wait_until
from test_websocket import BINARY, CLOSE, TEXT
from test_websocket import Client as RawWebSocket

from stickyring.node.packets import Json, checked

CLIENT = Path(__file__).with_name("burst_client.mjs")
LONGEST = 100_000
UNANSWERED = 0
APPLICATION = f"""
import socketio
import stickyring.node.gate
import stickyring.node.sessions

stickyring.node.gate.JOIN_SECONDS = 4
stickyring.node.sessions.UPGRADE_SECONDS = 1
server = socketio.Server(
    async_mode="eventlet", async_handlers=False, max_http_buffer_size={LONGEST}, ping_timeout=3
)
notes, left = {{}}, []

@server.event
def connect(sid, environ):
    notes[sid] = []

@server.event
def disconnect(sid, reason):
    del notes[sid]
    if reason != "client disconnect":
        left.append(reason)

@server.event
def note(sid, number, attachment=b""):
    notes[sid].append([number, len(attachment)])

@server.event
def noted(sid):
    return notes[sid]

@server.event
def census(sid):
    places = sum(len(rooms[None]) for rooms in server.manager.rooms.values())
    return [len(server.environ), places, len(notes), left]

@server.event
def flood(sid, messages):
    for number in range(messages):
        server.emit("flood", "x" * {LONGEST - 100}, to=sid)

@server.event
def fail(sid, *arguments):
    raise RuntimeError("an event handler fails")

@server.event
def no_json(sid):
    return object()

@server.event
def ask(sid):
    server.emit("asked", to=sid, callback=fail)

@server.event
def turn_out(sid):
    engine_sid = server.manager.eio_sid_from_sid(sid, "/")
    try:
        server.disconnect(server.manager.sid_from_eio_sid(engine_sid, "/leaving"), namespace="/leaving")
    except RuntimeError as error:
        return str(error)

@server.on("connect", namespace="/closed")
def connect_nobody(sid, environ):
    raise RuntimeError("a connect handler fails")

@server.on("connect", namespace="/wrong")
def connect_wrong(sid):
    pass

@server.on("connect", namespace="/leaving")
def connect_leaving(sid, environ):
    pass

@server.on("disconnect", namespace="/leaving")
def leave(sid, reason):
    raise RuntimeError("a disconnect handler fails")

application = socketio.WSGIApp(server)
"""
NOTE = '42["note",1]'
PLACEHOLDER = '{"_placeholder":true,"num":%d}'


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("packets")
    Path(folder, "application.py").write_text(APPLICATION)
    with serving(folder, "application:application") as node:
        yield node


@pytest.mark.parametrize(
    "data", [["said", 10**99, -1, 0.5, None, True], ["said", {"ü": "\u2028", "a": []}], [], "text"]
)
def test_json_is_that_of_python_engineio(data: object) -> None:
    text = Json.dumps(data, separators=(",", ":"))
    assert text == engineio.json.dumps(data, separators=(",", ":"))
    assert Json.loads(text) == engineio.json.loads(text) == data


def test_the_json_of_an_application_stays_its_own() -> None:
    class WithItsOwnModule(socketio.packet.Packet):  # type: ignore[misc]
        json = json

    class WithItsOwnCode(socketio.packet.Packet):  # type: ignore[misc]
        def encode(self) -> str:
            return str(self.json.dumps(self.data, default=str))

    assert checked(WithItsOwnModule, LONGEST).json is json
    assert checked(WithItsOwnCode, LONGEST).json is engineio.json
    assert checked(socketio.packet.Packet, LONGEST).json is Json


class Polling:
    """A session over HTTP that has joined the namespace `/`."""

    def __init__(self, node: ServeProcess) -> None:
        self.node = node
        self.path = "/socket.io/?EIO=4&transport=polling"
        self.sid = json.loads(self.poll()[1][1:])["sid"]
        self.path += f"&sid={self.sid}"
        assert self.post("40") == 200
        self.take('40{"sid"')

    def poll(self, timeout: float = 10) -> tuple[int, str]:
        with contextlib.closing(self.node.connect(timeout)) as connection:
            connection.request("GET", self.path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def post(self, body: str | bytes | Iterator[bytes], **headers: str) -> int:
        with contextlib.closing(self.node.connect(10)) as connection:
            content = body.encode() if isinstance(body, str) else body
            connection.request("POST", self.path, content, headers, encode_chunked="Transfer-Encoding" in headers)
            return connection.getresponse().status

    def post_raw(self, head: str, body: bytes, end: bool = True) -> int:
        """Send a head and a part of a body; with `end`, then shut down sending."""
        host, _, port = self.node.address.partition(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"POST {self.path} HTTP/1.1\r\nHost: {host}\r\n{head}\r\n\r\n".encode() + body)
            if end:
                connection.shutdown(socket.SHUT_WR)
            answer = HTTPResponse(connection)
            with contextlib.suppress(RemoteDisconnected):
                answer.begin()
                return answer.status
            return UNANSWERED

    def take(self, beginning: str) -> str:
        """Poll until a packet begins with `beginning`, and return the rest of it."""
        for _ in range(100):
            status, body = self.poll()
            assert status == 200, body
            for packet in body.split("\x1e"):
                if packet.startswith(beginning):
                    return packet.removeprefix(beginning)
        pytest.fail(f"no packet begins with {beginning}")

    def call(self, event: str, *arguments: object) -> Any:
        assert self.post(f"427{json.dumps([event, *arguments])}") == 200
        answer = json.loads(self.take("437"))
        return answer[0] if answer else None

    def close(self) -> None:
        self.post("1")


class Frames:
    """A session over WebSocket that has joined the namespace `/`, or an upgrade to it."""

    def __init__(self, node: ServeProcess, query: str = "") -> None:
        self.raw = RawWebSocket(node, query=query)
        if not query:
            assert self.raw.frame()[1].startswith(b"0{")
            self.raw.send(TEXT, b"40")
            assert self.raw.frame()[1].startswith(b"40{")

    def send(self, text: str) -> None:
        self.raw.send(TEXT, text.encode(), mask=bytes(4))

    def status(self) -> int | None:
        """Wait for the closing frame and return its status."""
        while (found := self.raw.frame())[0] != CLOSE:
            pass
        return int.from_bytes(found[1], "big") if found[1] else None

    def leave(self) -> None:
        self.raw.send(CLOSE, b"")
        self.status()

    def vanish(self) -> None:
        """Reset the connection."""
        self.raw.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.raw.connection.close()


def connections(node: ServeProcess) -> float:
    return sum(node.metric(f'stickyring_connections{{transport="{name}"}}') for name in ("polling", "websocket"))


def failures(node: ServeProcess, reason: str) -> float:
    return node.metric(f'stickyring_sessions_failed_total{{reason="{reason}"}}')


def census(node: ServeProcess) -> tuple[int, int, int]:
    """What the application knows apart from this session: sessions, clients in all namespaces, clients in `/`."""
    session = Polling(node)
    sessions, places, here, _ = session.call("census")
    session.close()
    return sessions - 1, places - 1, here - 1


def left(node: ServeProcess) -> list[str]:
    """The reasons of all disconnects from `/` so far, except those by the client itself."""
    session = Polling(node)
    *_, reasons = session.call("census")
    session.close()
    return list(reasons)


@pytest.fixture(autouse=True)
def everything_is_forgotten(node: ServeProcess) -> Iterator[None]:
    yield
    wait_until(lambda: connections(node) == 0, "every session has ended", seconds=45)
    wait_until(lambda: census(node) == (0, 0, 0), "the application has forgotten them")


@pytest.fixture
def in_background() -> Iterator[Callable[..., "Future[Any]"]]:
    with ThreadPoolExecutor() as pool:
        yield pool.submit


BURSTS = [17, 1000]


def expected(count: int, attachment: int = 0) -> list[list[int]]:
    return [[number, attachment] for number in range(count)]


def javascript_burst(
    node: ServeProcess, package: Path, count: int, attachment: int = 0, **options: object
) -> list[list[int]]:
    command = ["node", str(CLIENT), str(package), node.url, str(count), str(attachment), json.dumps(options)]
    run = subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert run.stdout, run.stderr
    noted: list[list[int]] = json.loads(run.stdout)
    return noted


@pytest.mark.parametrize("count", BURSTS)
def test_a_burst_of_the_javascript_client_arrives_whole_and_in_order(
    node: ServeProcess, javascript: Path, count: int
) -> None:
    assert javascript_burst(node, javascript, count, transports=["polling"]) == expected(count)


@pytest.mark.parametrize("transports", [["polling"], ["websocket"], ["polling", "websocket"]])
@pytest.mark.parametrize("force", [True, False])
def test_attachments_arrive_as_base64_and_as_they_are(
    node: ServeProcess, javascript: Path, transports: list[str], force: bool
) -> None:
    noted = javascript_burst(node, javascript, 40, 1000, transports=transports, forceBase64=force)
    assert noted == expected(40, 1000)


@pytest.mark.parametrize("count", BURSTS)
def test_a_burst_of_the_python_client_arrives_whole_and_in_order(node: ServeProcess, count: int) -> None:
    client = socketio.Client(reconnection=False)
    client.connect(node.url, transports=["polling"])
    for number in range(count):
        client.emit("note", number)
    assert client.call("noted", timeout=30) == expected(count)
    client.eio.queue.join()  # while sending, it would leave without a CLOSE
    client.disconnect()


@pytest.mark.asyncio
@pytest.mark.parametrize("count", BURSTS)
async def test_a_burst_of_the_asynchronous_python_client_arrives_whole_and_in_order(
    node: ServeProcess, count: int
) -> None:
    client = socketio.AsyncClient(reconnection=False)
    await client.connect(node.url, transports=["polling"])
    await asyncio.gather(*(client.emit("note", number) for number in range(count)))
    assert await client.call("noted", timeout=30) == expected(count)
    await client.eio.queue.join()
    await client.disconnect()


@pytest.mark.asyncio
async def test_a_burst_to_the_python_client_arrives_whole(node: ServeProcess) -> None:
    """It accepts 16 packets at once, and drops the connection if there are more."""
    heard: list[str] = []
    client = socketio.AsyncClient(reconnection=False)
    client.on("flood", heard.append)
    await client.connect(node.url, transports=["polling"])
    await client.call("flood", 50, timeout=30)
    assert len(heard) == 50
    await client.eio.queue.join()
    await client.disconnect()


def test_a_chunked_body_is_read(node: ServeProcess) -> None:
    session = Polling(node)
    packets = "\x1e".join([NOTE] * 100).encode()
    pieces = (packets[start : start + 7] for start in range(0, len(packets), 7))
    assert session.post(pieces, **{"Transfer-Encoding": "chunked"}) == 200
    assert session.call("noted") == [[1, 0]] * 100
    session.close()


def fill(size: int) -> str:
    """A payload of `size` bytes that begins with NOTE."""
    head = f'{NOTE}\x1e42["note","'
    return f'{head}{"x" * (size - len(head) - 2)}"]'


def test_a_body_of_the_largest_size_is_read(node: ServeProcess) -> None:
    session = Polling(node)
    assert session.post(fill(LONGEST)) == 200
    assert session.post(iter([fill(LONGEST).encode()]), **{"Transfer-Encoding": "chunked"}) == 200
    assert len(session.call("noted")) == 4
    assert session.post("") == 200
    session.close()


CUT_SHORT = 400 if RUNTIME == "eventlet" else UNANSWERED
"""uvicorn closes a connection on which the client sends nothing more."""
BODIES: dict[str, tuple[int, Callable[[Polling], int]]] = {
    "too long": (413, lambda session: session.post(fill(LONGEST + 1))),
    "too long in chunks": (
        413,
        lambda session: session.post(iter([fill(LONGEST + 1).encode()]), **{"Transfer-Encoding": "chunked"}),
    ),
    "shorter than its length": (CUT_SHORT, lambda session: session.post_raw("Content-Length: 100", NOTE.encode())),
    "longer than its length": (400, lambda session: session.post_raw("Content-Length: 8", NOTE.encode())),
    "ends before its last chunk": (
        CUT_SHORT,
        lambda session: session.post_raw("Transfer-Encoding: chunked", b"c\r\n" + NOTE.encode() + b"\r\n"),
    ),
    "invalid chunks": (400, lambda session: session.post_raw("Transfer-Encoding: chunked", b"zz\r\n")),
    "not UTF-8": (400, lambda session: session.post(NOTE.encode() + b'\x1e42["note","\xff"]')),
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_that_cannot_be_read_ends_the_session(node: ServeProcess, kind: str) -> None:
    status, post = BODIES[kind]
    session, before = Polling(node), left(node)
    assert post(session) == status
    assert session.poll()[0] == 400
    assert left(node) == [*before, "transport error"]


def test_a_body_that_does_not_arrive_ends_the_session(node: ServeProcess) -> None:
    session = Polling(node)
    assert session.post_raw("Content-Length: 9", b"42", end=False) == 400


NO_PACKETS = {
    "nothing": "",
    "no type": "abc",
    **{f"type {number}": str(number) for number in (0, 2, 5, 6, 7, 9)},
    "a digit of another script": "\N{ARABIC-INDIC DIGIT FOUR}2[]",
    "invalid base64": "bAAAAA",
    "not a Socket.IO packet": "4",
    "no text": "4null",
    "an object": '4{"a":1}',
    "too deep": f"4{'[' * 50_000}",
    **{f"Socket.IO type {number}": f"4{number}[]" for number in (4, 7, 8, 9)},
    "an event without data": "42",
    "an event that is not a list": '42{"a":1}',
    "an event that is a text": '42"note"',
    "an event without a name": "42[]",
    "an event whose name is null": "42[null]",
    "an event whose name is an object": "42[{}]",
    "an event that is cut off": '42["note",',
    "an event with an integer of over a hundred digits": f'42["note",{10**100}]',
    "an event that is too deep": f"42{'[' * 50_000}",
    "the server's own connect": '42["connect",{}]',
    "the server's own disconnect": '42["disconnect","x"]',
    "an invalid id": '42abc["note",1]',
    "an id that is too long": f"42{'1' * 101}[]",
    "an acknowledgement without id": "43[]",
    "an acknowledgement with id 0": "430[]",
    "an acknowledgement that is not a list": "431{}",
    "an event for a namespace that it has not joined": '42/leaving,["note",1]',
    "the same with an acknowledgement": '42/leaving,1["note",1]',
    "the same with an attachment": '451-/leaving,["note",{"_placeholder":true,"num":0}]',
    "too many attachments": '4599999999999-["note"]',
    "an attachment of nothing": "bAAAA",
    "a connect handler that fails": "40/closed,",
    "a connect handler with other arguments": "40/wrong,",
}


@pytest.mark.parametrize("kind", NO_PACKETS)
def test_an_invalid_packet_ends_a_polling_session(
    node: ServeProcess, in_background: Callable[..., "Future[Any]"], kind: str
) -> None:
    session, before = Polling(node), left(node)
    waiting = in_background(session.poll)
    assert session.post("\x1e".join([NOTE, NO_PACKETS[kind], NOTE])) == 400
    assert waiting.result(10)[0] == 400
    assert session.post(NOTE) == 400
    assert left(node) == [*before, "transport error"]


@pytest.mark.parametrize("kind", NO_PACKETS)
def test_an_invalid_packet_ends_a_websocket_session(node: ServeProcess, kind: str) -> None:
    session, before = Frames(node), left(node)
    session.send(NO_PACKETS[kind])
    assert session.status() == (None if "handler" in kind else 1002)
    # The client leaves the connection open, but its session has ended.
    wait_until(lambda: connections(node) == 0, "its place is free", seconds=4)
    assert left(node) == [*before, "transport error"]
    session.vanish()


@pytest.mark.parametrize(
    "attachment",
    [TEXT, BINARY],
    ids=["a text instead of an attachment", "an attachment that the event does not know"],
)
def test_an_invalid_attachment_ends_the_session(node: ServeProcess, attachment: int) -> None:
    session = Frames(node)
    session.send(f'451-["note",{PLACEHOLDER % 1}]')
    session.raw.send(attachment, b'2["note",1]')
    assert session.status() == 1002
    session.vanish()


def test_attachments_are_bounded_and_may_be_none(node: ServeProcess) -> None:
    session = Frames(node)
    session.send('450-["note",1]')
    session.send(f'459-["note",2,{PLACEHOLDER % 0}]')
    for _ in range(9):
        session.raw.send(BINARY, b"x" * LONGEST, mask=bytes(4))
    session.send('427["noted"]')
    assert session.raw.frame()[1] == f"437[[[1,0],[2,{LONGEST}]]]".encode()
    before = failures(node, "too_long")
    session.send('459999999999-["note",1]')
    for _ in range(10):
        session.raw.send(BINARY, b"x" * LONGEST, mask=bytes(4))
    assert session.status() == 1002
    assert failures(node, "too_long") == before + 1
    session.vanish()


def test_an_error_of_an_event_handler_does_not_end_the_session(node: ServeProcess) -> None:
    session = Polling(node)
    for event in ("fail", "no_json", "nobody_handles_it"):
        assert session.post(f'421["{event}"]') == 200
    assert session.post('42["ask"]') == 200
    number = session.take("42").removesuffix('["asked"]')
    assert session.post(f"43{number}[]") == 200
    assert session.post("437[]") == 200  # nobody has asked for it
    assert session.call("noted") == []
    assert len(node.logged("an event handler has failed")) >= 2
    assert len(node.logged("the callback of an acknowledgement has failed")) == 1
    session.close()


def test_a_client_is_removed_if_its_disconnect_handler_fails_for_the_application(node: ServeProcess) -> None:
    session = Polling(node)
    assert session.post("40/leaving,") == 200
    session.take("40/leaving,")
    assert session.call("turn_out") == "a disconnect handler fails"
    assert census(node) == (1, 1, 1)
    session.close()


@pytest.mark.parametrize("end", ["41/leaving,", "1", "abc"])
def test_a_client_is_removed_if_its_disconnect_handler_fails(node: ServeProcess, end: str) -> None:
    session = Polling(node)
    assert session.post("40/leaving,") == 200
    session.take("40/leaving,")
    assert census(node) == (1, 2, 1)
    session.post(end)
    assert census(node) == ((1, 1, 1) if end == "41/leaving," else (0, 0, 0))
    session.close()


BROKEN_UPGRADES: dict[str, list[tuple[int, bytes]]] = {
    "another probe": [(TEXT, b"2prob")],
    "no probe": [(TEXT, b"5")],
    "a binary probe": [(BINARY, b"2probe")],
    "invalid text": [(TEXT, b"\xff")],
    "no frame": [(0x83, b"")],
    "a message for the upgrade": [(TEXT, b"2probe"), (TEXT, NOTE.encode())],
    "nothing for the upgrade": [(TEXT, b"2probe"), (TEXT, b"")],
    "something binary for the upgrade": [(TEXT, b"2probe"), (BINARY, b"5")],
}
ABANDONED_UPGRADES: dict[str, tuple[list[str], Callable[[Frames], object]]] = {
    "reset before the probe": ([], Frames.vanish),
    "closed before the probe": ([], Frames.leave),
    "reset after the probe": (["2probe"], Frames.vanish),
    "closed after the probe": (["2probe"], Frames.leave),
    "silent after the probe": (["2probe"], Frames.status),
}


@pytest.mark.parametrize("kind", BROKEN_UPGRADES)
def test_an_upgrade_that_breaks_the_protocol_ends_the_session(
    node: ServeProcess, in_background: Callable[..., "Future[Any]"], kind: str
) -> None:
    session, before = Polling(node), left(node)
    upgrade = Frames(node, f"&sid={session.sid}")
    for first, payload in BROKEN_UPGRADES[kind]:
        upgrade.raw.send(first, payload)
    assert upgrade.status() in {1002, 1007}
    wait_until(lambda: connections(node) == 0, "its place is free", seconds=4)
    assert session.poll()[0] == 400
    assert left(node) == [*before, "transport error"]
    upgrade.vanish()


@pytest.mark.parametrize("kind", ABANDONED_UPGRADES)
def test_after_an_abandoned_upgrade_polls_wait_again(
    node: ServeProcess, in_background: Callable[..., "Future[Any]"], kind: str
) -> None:
    session = Polling(node)
    upgrade = Frames(node, f"&sid={session.sid}")
    texts, leave = ABANDONED_UPGRADES[kind]
    for text in texts:
        upgrade.send(text)
        assert upgrade.raw.frame()[1] == b"3probe"
        assert session.poll() == (200, "6")
        # Only one upgrade at a time.
        assert Frames(node, f"&sid={session.sid}").status() == 1002
    leave(upgrade)

    polls = []

    def waits() -> bool:
        polls.append(in_background(session.poll))
        return not wait([polls[-1]], timeout=0.5).done

    wait_until(waits, "a poll waits")
    assert session.post('427["noted"]') == 200
    assert polls[-1].result(10) == (200, "437[[]]")
    upgrade.raw.connection.close()
    # Another upgrade can succeed.
    again = Frames(node, f"&sid={session.sid}")
    again.send("2probe")
    assert again.raw.frame()[1] == b"3probe"
    again.send("5")
    again.send('427["noted"]')
    assert again.raw.frame() == (TEXT, b"437[[]]"), "the NOOP that ends a poll is not sent over the WebSocket"
    # A second WebSocket is closed, and the first one goes on.
    assert Frames(node, f"&sid={session.sid}").status() == 1002
    again.send('428["noted"]')
    assert again.raw.frame() == (TEXT, b"438[[]]")
    again.vanish()


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_closing_the_connection_of_a_waiting_poll_ends_the_session(node: ServeProcess, reset: bool) -> None:
    """As in Node.js: the session of a closed page or a dead client ends before its ping timeout."""
    session, before = Polling(node), left(node)
    poll = node.connect(10)
    poll.request("GET", session.path)
    if reset:
        poll.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    poll.close()
    wait_until(lambda: connections(node) == 0, "its place is free", seconds=4)
    assert left(node) == [*before, "transport close"]
    assert session.poll()[0] == 400


def test_another_poll_ends_the_session_and_the_waiting_poll(node: ServeProcess) -> None:
    """As in Node.js. Its client has lost the first one's connection, and perhaps an answer with it."""
    session, before = Polling(node), left(node)
    polls = [node.connect(10) for _ in range(2)]
    for poll in polls:
        poll.request("GET", session.path)
    answers = [poll.getresponse() for poll in polls]
    waiting, another = sorted(answers, key=lambda answer: answer.status)
    assert (waiting.status, waiting.read()) == (200, b"1")
    assert another.status == 400
    assert left(node) == [*before, "transport close"]
    assert session.poll()[0] == 400


def test_extra_bytes_after_a_waiting_poll_do_not_end_the_session(node: ServeProcess) -> None:
    session = Polling(node)
    with contextlib.closing(node.connect(10)) as poll:
        poll.request("GET", session.path)
        poll.sock.sendall(b"\r\n")
        assert session.post('427["noted"]') == 200
        assert poll.getresponse().read() == b"437[[]]"
    assert session.call("noted") == []
    session.close()


def test_a_method_of_no_transport_is_a_bad_request(node: ServeProcess) -> None:
    session = Polling(node)
    for path in ("/socket.io/?EIO=4&transport=polling", session.path):
        assert node.get(path, method="PUT").status == 400
    session.close()


def test_an_incomplete_upgrade_request_opens_no_session(node: ServeProcess) -> None:
    session = Polling(node)
    for path in ("/socket.io/?EIO=4&transport=websocket", session.path):
        host, _, port = node.address.partition(":")
        with contextlib.closing(HTTPConnection(host, int(port), timeout=10)) as connection:
            upgrade = {"Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x"}
            connection.request("GET", path, headers=upgrade)
            assert connection.getresponse().status == 400
    assert connections(node) == 1
    session.close()


@pytest.mark.parametrize("transport", [Polling, Frames])
def test_a_session_ends_if_its_client_does_not_read(
    node: ServeProcess, transport: type[Polling] | type[Frames]
) -> None:
    """A node queues 64 of the largest messages for it; the kernel's buffers hold some more."""
    session: Any = transport(node)
    before, memory = failures(node, "unread"), node.metric("process_resident_memory_bytes")
    getattr(session, "post" if transport is Polling else "send")('42["flood",1000]')
    wait_until(lambda: failures(node, "unread") == before + 1, "the session has failed")
    wait_until(lambda: connections(node) == 0, "its place is free")
    assert node.metric("process_resident_memory_bytes") - memory < 3 * 64 * LONGEST
    getattr(session, "close" if transport is Polling else "vanish")()


@pytest.mark.parametrize("transport", [Polling, Frames])
def test_a_client_that_reads_may_get_more_than_the_queue_holds(
    node: ServeProcess, transport: type[Polling] | type[Frames]
) -> None:
    session: Any = transport(node)
    for _ in range(3):
        if isinstance(session, Polling):
            session.call("flood", 40)
        else:
            session.send('427["flood",40]')
            while session.raw.frame()[1] != b"437[]":
                pass
    getattr(session, "close" if transport is Polling else "vanish")()


def test_a_websocket_that_closes_without_reading_frees_its_place(node: ServeProcess) -> None:
    session = Frames(node)
    session.send('42["flood",60]')
    session.raw.send(CLOSE, b"")
    wait_until(lambda: connections(node) == 0, "its place is free", seconds=10)
    session.vanish()


def test_a_session_that_joins_no_namespace_ends(node: ServeProcess) -> None:
    joined = Polling(node)
    before = failures(node, "unjoined")
    strangers = [RawWebSocket(node)]
    path = "/socket.io/?EIO=4&transport=polling"
    sid = json.loads(node.get(path).read()[1:])["sid"]
    assert strangers[0].frame()[1].startswith(b"0{")
    wait_until(lambda: failures(node, "unjoined") == before + 2, "both are ended")
    assert strangers[0].frame()[0] == CLOSE
    assert node.get(f"{path}&sid={sid}").status == 400
    assert joined.call("noted") == []
    joined.close()
    strangers[0].connection.close()


JSON_APPLICATION = """
import datetime
import decimal
import json
import socketio

class Json:
    class Error(Exception):
        pass

    @staticmethod
    def dumps(value, **options):
        return json.dumps(value, default=str, sort_keys=True, **options)

    @staticmethod
    def loads(text, **options):
        try:
            return json.loads(text, parse_float=decimal.Decimal, **options)
        except ValueError:
            raise Json.Error from None

server = socketio.Server(async_mode="eventlet", json=Json)

@server.event
def number(sid, value):
    return [type(value).__name__, datetime.date(2026, 1, 2), value]

application = socketio.WSGIApp(server)
"""


@pytest.mark.asyncio
async def test_an_application_may_have_a_json_module_of_its_own(tmp_path: Path) -> None:
    Path(tmp_path, "application.py").write_text(JSON_APPLICATION)
    with serving(tmp_path, "application:application") as node:
        for transports in (["polling"], ["websocket"]):
            client = socketio.AsyncClient(reconnection=False)
            await client.connect(node.url, transports=transports)
            answer = await client.call("number", 0.10, timeout=10)
            assert answer == ["Decimal", "2026-01-02", "0.1"]
            await client.disconnect()
        path = "/socket.io/?EIO=4&transport=polling"
        path += f"&sid={json.loads((await asyncio.to_thread(node.get, path)).read()[1:])['sid']}"
        assert (await asyncio.to_thread(node.get, path, None, "POST", "42[")).status == 400
