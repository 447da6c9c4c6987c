"""Messages with an id: handled once and sent until acknowledged, in threads and on a node that drains or dies."""

import asyncio
import copy
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import socketio
from conftest import STICKYRING, ServeProcess, serving, wait_until

from stickyring import delivery
from stickyring.delivery import Received, Sender

CLIENT = Path(__file__).with_name("sending_client.mjs")
NAME = "0123456789abcdef"
APPLICATION = """
from pathlib import Path
import socketio
from stickyring.delivery import Received

server = socketio.Server(async_mode="eventlet", always_connect=True)
received = Received(server)
handled, gate = Path("handled"), Path("gate")

def note(text, message_id):
    with handled.open("a") as lines:
        lines.write(f"{message_id} {text}\\n")
    return f"noted {text}"

@server.event
@received.once
def at_once(sid, text, message_id=None):
    return note(text, message_id)

@server.event
@received.once
def in_a_while(sid, text, message_id=None):
    answer = note(text, message_id)
    server.sleep(0.05)
    return answer

@server.event
@received.once
def at_the_gate(sid, text, message_id=None):
    answer = note(text, message_id)
    while not gate.exists():
        server.sleep(0.02)
    return answer

@server.event
@received.once
def at_second_try(sid, text, message_id=None):
    answer = note(text, message_id)
    if len(handled.read_text().splitlines()) < 2:
        raise RuntimeError("the first try fails")
    return answer

application = socketio.WSGIApp(server)
"""


def message_id(counter: int, sender: str = NAME) -> str:
    return f"{sender}-{counter}"


class Handler:
    """An event handler that records its calls; `before` is called first each time."""

    def __init__(self, senders: int = 10, before: Callable[[], object] = lambda: None) -> None:
        self.calls: list[tuple[tuple[object, ...], str | None]] = []
        self._before = before
        server = socketio.Server()
        self.not_acknowledged = server.not_handled
        self.event = Received(server, senders).once(self._handle)

    def _handle(self, sid: str, *data: object, message_id: str | None = None) -> str:
        self.calls.append((data, message_id))
        self._before()
        return f"answer {len(self.calls)}"


def test_a_repetition_gets_the_same_answer_and_the_next_message_its_own() -> None:
    handler = Handler()
    answers = [handler.event(sid, "hello", message_id(counter)) for sid, counter in [("a", 1), ("b", 1), ("b", 3)]]
    assert answers == ["answer 1", "answer 1", "answer 2"]
    assert handler.event("b", "hello", message_id(1, sender=NAME[::-1])) == "answer 3"
    assert handler.calls[:2] == [(("hello",), message_id(1)), (("hello",), message_id(3))]


def test_a_message_before_the_last_one_is_neither_handled_nor_acknowledged() -> None:
    handler = Handler()
    handler.event("a", "later", message_id(3))
    assert handler.event("a", "earlier", message_id(2)) is handler.not_acknowledged
    assert [data for data, _ in handler.calls] == [("later",)]


def name(number: int) -> str:
    return f"{number:016}"


def is_remembered(handler: Handler, sender: str) -> bool:
    """Whether a repetition of the sender's first message is recognised; otherwise it is handled again."""
    handled = len(handler.calls)
    handler.event("somebody else", "hello", message_id(1, sender))
    return len(handler.calls) == handled


def test_a_client_that_makes_up_senders_displaces_only_its_own() -> None:
    handler = Handler(senders=20_000)
    handler.event("honest", "hello", message_id(1))
    for number in range(20_100):
        handler.event("attacker", "hello", message_id(1, name(number)))
    assert is_remembered(handler, NAME)
    assert is_remembered(handler, name(20_099))
    assert is_remembered(handler, name(20_100 - delivery.SENDERS_OF_A_CONNECTION))
    assert not is_remembered(handler, name(20_099 - delivery.SENDERS_OF_A_CONNECTION))


def test_a_sender_that_reconnects_counts_for_its_new_connection() -> None:
    handler = Handler(senders=100)
    for connection in range(1000):
        for counter in (connection, connection + 1):
            handler.event(f"connection {connection}", "hello", message_id(max(counter, 1)))
    assert len(handler.calls) == 1000
    for number in range(delivery.SENDERS_OF_A_CONNECTION):
        handler.event("connection 998", "hello", message_id(1, name(number)))
    assert handler.event("connection 999", "hello", message_id(1000)) == "answer 1000"


@pytest.mark.parametrize("answer", ["x" * 100_000, [["x" * 50_000], {"x" * 50_000: None}], b"x" * 100_000])
def test_large_acknowledgements_take_no_more_than_64_mib(answer: object) -> None:
    received = Received(socketio.Server())
    calls: list[str] = []

    def answer_at_length(sid: str, text: str, message_id: str = "") -> object:
        calls.append(message_id)
        return copy.deepcopy(answer)

    event = received.once(answer_at_length)
    for number in range(1000):
        assert event(f"connection {number}", "hello", message_id(1, name(number))) == answer
    event("another", "hello", message_id(1, name(999)))
    event("another", "hello", message_id(1, name(400)))
    assert len(calls) == 1000, "within 64 MiB"
    event("another", "hello", message_id(1, name(300)))
    assert len(calls) == 1001, "beyond"


def test_waiting_messages_are_bounded_and_further_ones_not_acknowledged() -> None:
    gate = threading.Event()
    handler = Handler(before=lambda: gate.wait(10))
    answers: list[object] = []

    def send() -> None:
        answers.append(handler.event("a", "hello", message_id(1)))

    threads = [threading.Thread(target=send) for _ in range(delivery.WAITING_TURNS + 11)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(answers) == 10, "ten are turned away")
    assert answers == [handler.not_acknowledged] * 10
    gate.set()
    for thread in threads:
        thread.join()
    assert answers[10:] == ["answer 1"] * (delivery.WAITING_TURNS + 1)


@pytest.mark.parametrize(
    "data",
    [
        ("hello",),
        (),
        (message_id(1),),  # the only argument is what the user wrote
        (message_id(1), "hello"),
        ("hello", message_id(0)),
        ("hello", "short-1"),
        ("hello", f"{NAME}-01"),
        ("hello", f"{NAME}-"),
        ("hello", f"{NAME}-1\n"),
        ("hello", {"id": message_id(1)}),
    ],
)
def test_without_an_id_every_event_is_handled(data: tuple[object, ...]) -> None:
    handler = Handler()
    assert [handler.event("a", *data), handler.event("a", *data)] == ["answer 1", "answer 2"]
    assert handler.calls == [(data, None)] * 2


def test_a_message_whose_handler_failed_is_handled_again() -> None:
    def fail_once() -> None:
        if len(handler.calls) == 1:
            raise RuntimeError("the first try fails")

    handler = Handler(before=fail_once)
    with pytest.raises(RuntimeError):
        handler.event("a", "hello", message_id(1))
    assert [handler.event("a", "hello", message_id(1)) for _ in range(2)] == ["answer 2"] * 2


def test_only_the_most_recent_senders_are_remembered() -> None:
    handler = Handler(senders=2)
    first, second, third = (f"{NAME}{letter}" for letter in "abc")
    for sender in (first, second, first, third):
        handler.event("a", "hello", message_id(1, sender))
    assert len(handler.calls) == 3
    handler.event("a", "hello", message_id(1, first))
    assert len(handler.calls) == 3
    handler.event("a", "hello", message_id(1, second))
    assert len(handler.calls) == 4


def test_a_repetition_waits_for_the_first_handling_and_other_senders_do_not() -> None:
    may_end = threading.Event()

    def wait_for_the_first() -> None:
        if handler.calls[-1][0] == ("slow",):
            assert may_end.wait(10)

    handler = Handler(before=wait_for_the_first)
    answers: list[object] = []
    threads = [
        threading.Thread(target=lambda: answers.append(handler.event("a", "slow", message_id(1)))) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: handler.calls, "the first handling has begun")
    assert handler.event("a", "quick", message_id(1, sender=NAME[::-1]))
    assert not answers
    assert all(thread.is_alive() for thread in threads)
    may_end.set()
    for thread in threads:
        thread.join(10)
    assert [data for data, _ in handler.calls] == [("slow",), ("quick",)]
    assert len(answers) == 5
    assert len(set(answers)) == 1


class Node:
    """A node with the application above, and its record of what was handled."""

    def __init__(self, serve: ServeProcess, folder: Path) -> None:
        self.serve = serve
        self.folder = folder

    @property
    def handled(self) -> list[list[str]]:
        """`[id, text]` of every handling that has begun."""
        record = self.folder / "handled"
        return [line.split(maxsplit=1) for line in record.read_text().splitlines()] if record.exists() else []

    async def has_handled(self, number: int) -> None:
        await asyncio.to_thread(wait_until, lambda: len(self.handled) >= number, f"{number} handlings have begun")

    def open_gate(self) -> None:
        (self.folder / "gate").touch()

    def kill(self) -> None:
        """Kill the process that serves; gunicorn's master starts another one on the same port."""
        os.kill(self.serve.logged("serving ")[-1]["pid"], signal.SIGKILL)

    def command(self, name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([STICKYRING, name, "--control", self.folder / "control"], stdout=subprocess.PIPE)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    (tmp_path / "chat.py").write_text(APPLICATION)
    with serving(tmp_path, "chat:application", "--control", "control") as serve:
        yield Node(serve, tmp_path)


@asynccontextmanager
async def user(node: Node, transports: list[str] | None = None) -> AsyncIterator[socketio.AsyncClient]:
    client = socketio.AsyncClient()
    async with asyncio.timeout(60):
        await client.connect(node.serve.url, transports=transports or ["websocket"], wait_timeout=10)
        yield client
        await client.shutdown()


@pytest.mark.asyncio
async def test_green_threads_wait_for_the_first_handling_too(node: Node) -> None:
    async with user(node) as client:
        repeated = [
            asyncio.create_task(client.call("at_the_gate", ("hello", message_id(1)), timeout=10)) for _ in range(2)
        ]
        without_id = [asyncio.create_task(client.call("at_the_gate", "hello", timeout=10)) for _ in range(2)]
        await node.has_handled(3)
        await client.call("at_once", "this has overtaken all", timeout=10)
        node.open_gate()
        assert await asyncio.gather(*repeated, *without_id) == ["noted hello"] * 4
    handled = sorted(node.handled)
    assert handled == sorted(
        [[message_id(1), "hello"], ["None", "hello"], ["None", "hello"], ["None", "this has overtaken all"]]
    )


@pytest.mark.asyncio
async def test_a_failed_message_is_sent_again_after_the_timeout(node: Node) -> None:
    async with user(node) as client:
        sender = Sender(client, ack_timeout=0.5)
        assert await sender.send("at_second_try", "hello") == "noted hello"
        assert sender.repeated == 1
    assert len(node.handled) == 2


@pytest.mark.asyncio
async def test_messages_sent_at_the_same_time_go_one_after_the_other(node: Node) -> None:
    async with user(node) as client:
        sender = Sender(client)
        texts = [str(number) for number in range(50)]
        answers = await asyncio.gather(*(sender.send("at_once", text) for text in texts))
        assert answers == [f"noted {text}" for text in texts]
        assert sender.repeated == 0
    assert [text for _, text in node.handled] == texts


@pytest.mark.asyncio
async def test_a_client_that_disconnected_on_purpose_sends_nothing(node: Node) -> None:
    async with user(node) as client:
        sender = Sender(client)
        waiting = asyncio.create_task(sender.send("at_the_gate", "hello"))
        await node.has_handled(1)
        await client.disconnect()
        with pytest.raises(socketio.exceptions.DisconnectedError):
            await waiting
        node.open_gate()
        await client.connect(node.serve.url)
        assert await sender.send("at_once", "back") == "noted back"


@pytest.mark.asyncio
async def test_a_message_waits_if_the_namespace_is_lost_before_the_connection(node: Node) -> None:
    """python-socketio forgets the namespace first; on a slow machine the engine's event comes much later."""
    async with user(node) as client:
        sender = Sender(client)
        del client.namespaces["/"]
        with pytest.raises(socketio.exceptions.BadNamespaceError):
            await client.emit("at_once", "the control")
        waiting = asyncio.create_task(sender.send("at_once", "hello"))
        await asyncio.sleep(0)
        await client.eio.ws.close()
        assert await waiting == "noted hello"
        assert sender.repeated == 0


@pytest.mark.asyncio
async def test_a_message_can_be_given_up(node: Node) -> None:
    async with user(node) as client:
        sender = Sender(client)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await sender.send("at_the_gate", "hello")
        following = asyncio.create_task(sender.send("at_once", "next"))
        await client.call("at_once", "somebody else's", timeout=10)
        assert [text for _, text in node.handled] == ["hello", "somebody else's"], "it did not wait for its turn"
        node.open_gate()
        assert await following == "noted next"


@pytest.mark.asyncio
@pytest.mark.parametrize("transports", [["websocket"], ["polling"]])
async def test_a_drain_waits_for_the_acknowledgement(node: Node, transports: list[str]) -> None:
    async with user(node, transports) as client:
        sender = Sender(client)
        waiting = asyncio.create_task(sender.send("at_the_gate", "hello"))
        await node.has_handled(1)
        draining = node.command("drain")
        await asyncio.to_thread(wait_until, lambda: node.serve.get("/readyz").status == 503, "it drains")
        node.open_gate()
        assert await waiting == "noted hello"
        assert await asyncio.to_thread(draining.wait, 10) == 0
        assert sender.repeated == 0
    assert len(node.handled) == 1


@pytest.mark.asyncio
async def test_a_user_who_is_cut_off_gets_the_answer_after_reconnecting(node: Node) -> None:
    """The node waits four seconds for the acknowledgement; later, the repetition gets the answer."""
    async with user(node) as client:
        sender = Sender(client, ack_timeout=60)  # it does not wait for that
        lost = asyncio.create_task(client.call("at_the_gate", "without id", timeout=30))
        waiting = asyncio.create_task(sender.send("at_the_gate", "hello"))
        await node.has_handled(2)
        draining = node.command("drain")
        await asyncio.to_thread(wait_until, lambda: not client.connected, "it is cut off")
        draining.terminate()
        draining.wait(10)
        assert node.command("undrain").wait(10) == 0
        await asyncio.to_thread(wait_until, lambda: sender.repeated, "it is back")
        node.open_gate()
        assert await waiting == "noted hello"
        assert not lost.done()
        lost.cancel()
    assert sorted(text for _, text in node.handled) == ["hello", "without id"]


@pytest.mark.asyncio
async def test_a_message_is_handled_again_if_the_process_dies_before_its_acknowledgement(node: Node) -> None:
    """The guarantee is at least once: the second time has the same id."""
    async with user(node) as client:
        sender = Sender(client, ack_timeout=60)  # it does not wait for that
        waiting = asyncio.create_task(sender.send("at_the_gate", "hello"))
        await node.has_handled(1)
        node.kill()
        await node.has_handled(2)
        node.open_gate()
        assert await waiting == "noted hello"
        assert sender.repeated == 1
    first, second = node.handled
    assert first == second


class Stream:
    """One sender's numbered messages, each sent when the previous one is acknowledged, until `ended`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ended = False
        self.answers: list[str] = []

    def texts(self) -> Iterator[str]:
        while not self.ended:
            yield f"{self.name}-{len(self.answers) + 1}"

    async def python(self, node: Node, transports: list[str]) -> None:
        async with user(node, transports) as client:
            sender = Sender(client)
            for text in self.texts():
                self.answers.append(await sender.send("in_a_while", text))

    async def javascript(self, node: Node, package: Path) -> None:
        process = await asyncio.create_subprocess_exec(
            *("node", str(CLIENT), str(package), node.serve.url, "in_a_while"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        for text in self.texts():
            process.stdin.write(f"{text}\n".encode())
            self.answers.append((await process.stdout.readline()).decode().strip())
        process.stdin.close()
        assert await process.wait() == 0


class Streams:
    """Concurrent streams: one in Python for each setting of transports, and one in JavaScript."""

    def __init__(self, node: Node, package: Path, *transports: list[str]) -> None:
        self._node = node
        python = {" ".join(setting): setting for setting in transports}
        self._streams = [Stream(name) for name in (*python, "browser")]
        self._running = asyncio.gather(
            *(stream.python(node, setting) for stream, setting in zip(self._streams, python.values(), strict=False)),
            self._streams[-1].javascript(node, package),
        )

    async def go_on(self) -> None:
        """Return when each has 20 more acknowledgements."""
        goals = [len(stream.answers) + 20 for stream in self._streams]

        def reached() -> bool:
            return all(len(stream.answers) >= goal for stream, goal in zip(self._streams, goals, strict=True))

        await asyncio.to_thread(wait_until, reached, "20 more acknowledgements each")

    async def end(self) -> int:
        """Check that each message was acknowledged and handled, in order; return how many were handled again."""
        for stream in self._streams:
            stream.ended = True
        await self._running
        again = 0
        for stream in self._streams:
            counters = range(1, len(stream.answers) + 1)
            assert stream.answers == [f"noted {stream.name}-{counter}" for counter in counters]
            handled = [line for line in self._node.handled if line[1].rpartition("-")[0] == stream.name]
            sender = handled[0][0].partition("-")[0]
            once = [line for line, before in zip(handled, [None, *handled], strict=False) if line != before]
            assert once == [[message_id(counter, sender), f"{stream.name}-{counter}"] for counter in counters]
            again += len(handled) - len(once)
        return again


@pytest.mark.asyncio
async def test_a_drain_loses_no_message_and_handles_none_twice(node: Node, javascript: Path) -> None:
    streams = Streams(node, javascript, ["websocket"], ["polling"], ["polling", "websocket"])
    await streams.go_on()
    assert await asyncio.to_thread(node.command("drain").wait, 20) == 0
    assert await asyncio.to_thread(node.command("undrain").wait, 10) == 0
    await streams.go_on()
    assert await streams.end() == 0


@pytest.mark.asyncio
async def test_killed_processes_lose_no_message_and_repeat_only_those_under_way(node: Node, javascript: Path) -> None:
    streams = Streams(node, javascript, ["websocket"], ["polling"], ["polling", "websocket"])
    await streams.go_on()
    for _ in range(2):
        node.kill()
        await streams.go_on()
    assert 0 < await streams.end() <= 2 * 4, "each kill can hit one message of each sender"
