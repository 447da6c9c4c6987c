"""The metrics of a real node: each one changes with what it counts, and docs/operations.md has all of them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import engineio
import pytest
import socketio
import websocket
from conftest import ServeProcess, serving, wait_until

from stickyring.node.metrics import DISCONNECTS
from stickyring.node.operate import ask

OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"
APPLICATION = """
import time
import socketio

server = socketio.Server(async_mode="eventlet")


@server.event
def slow(sid):
    server.sleep(0.3)
    return "done"


@server.event
def busy(sid):
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        pass
    return "done"


@server.event
def flood(sid):
    for _ in range(3):
        server.emit("data", "x" * 500_000, to=sid)


application = socketio.WSGIApp(server)
"""
POLLING = "/socket.io/?EIO=4&transport=polling"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metrics")


@pytest.fixture(scope="module")
def control(folder: Path) -> Path:
    """The control socket of the node."""
    return folder / "control"


@pytest.fixture(scope="module")
def node(folder: Path) -> Iterator[ServeProcess]:
    (folder / "counted.py").write_text(APPLICATION)
    with serving(folder, "counted:application", "--control", "control") as node:
        yield node


def handshake(node: ServeProcess, key: str = "alice") -> str:
    """Begin a polling session that has joined the namespace `/`; return its path."""
    sid = json.loads(node.get(POLLING, {"x-stickyring-key": key}).read()[1:])["sid"]
    path = f"{POLLING}&sid={sid}"
    assert node.get(path, method="POST", body="40").read() == b"ok"
    return path


def ended(node: ServeProcess, reason: str) -> float:
    return node.metric(f'stickyring_disconnects_total{{reason="{reason}"}}')


def rebalance(control: Path, owner: str) -> None:
    sizes = {"minimum_size": 1, "maximum_size": 100}
    ring = {"cluster": "nodes", "policy": "RING_HASH", **sizes, "members": [{"name": owner, "weight": 1}]}
    ask(control, "POST", "/rebalance", {"ring": ring})
    wait_until(lambda: not ask(control, "GET", "/rebalance")["running"], "the rebalance has ended")


def test_the_end_of_a_session_is_counted_by_its_reason(node: ServeProcess, control: Path) -> None:
    durations = "stickyring_session_duration_seconds_count"
    before = node.metric(durations)
    reasons = ("client", "failed", "moved")
    counted = {reason: ended(node, reason) for reason in reasons}

    assert node.get(handshake(node), method="POST", body="1").read() == b"ok"
    wait_until(lambda: ended(node, "client") == counted["client"] + 1, "a client has left")
    assert node.get(handshake(node), method="POST", body="9").status == 400
    wait_until(lambda: ended(node, "failed") == counted["failed"] + 1, "an invalid packet ended a session")
    handshake(node)
    rebalance(control, "node2-1")
    wait_until(lambda: ended(node, "moved") == counted["moved"] + 1, "a session was moved")
    assert node.metric(durations) >= before + 3
    assert ended(node, "other") == 0


@pytest.mark.parametrize(("goodbye", "reason"), [("41", "client"), (None, "transport_close")])
def test_a_client_that_has_left_its_namespaces_is_not_counted_as_lost(
    node: ServeProcess, goodbye: str | None, reason: str
) -> None:
    """As socket.io-client leaves over WebSocket: it sends no CLOSE."""
    before = ended(node, reason)
    connection = websocket.create_connection(f"ws://{node.address}/socket.io/?EIO=4&transport=websocket")
    connection.recv()
    connection.send("40")
    connection.recv()
    if goodbye:
        connection.send(goodbye)
    connection.close()
    wait_until(lambda: ended(node, reason) == before + 1, "it is counted")


def test_every_reason_of_the_engine_has_a_label() -> None:
    reasons = {text for name, text in vars(engineio.Server.reason).items() if not name.startswith("_")}
    assert set(DISCONNECTS) == reasons


def test_the_time_to_an_acknowledgement_is_observed(node: ServeProcess) -> None:
    """An event that asks for none is not."""
    name = "stickyring_acknowledgement_seconds"
    count, seconds = node.metric(f"{name}_count"), node.metric(f"{name}_sum")
    with socketio.SimpleClient() as client:
        client.connect(node.url, transports=["websocket"])
        client.emit("slow")
        assert client.call("slow", timeout=5) == "done"
        assert node.metric(f"{name}_count") == count + 1
        assert 0.29 <= node.metric(f"{name}_sum") - seconds < 5


def test_a_handler_that_blocks_the_event_loop_makes_it_lag(node: ServeProcess) -> None:
    """One that waits does not."""
    late = 'stickyring_loop_lag_seconds_bucket{le="0.05"}'

    def blocked() -> float:
        return node.metric("stickyring_loop_lag_seconds_count") - node.metric(late)

    with socketio.SimpleClient() as client:
        client.connect(node.url, transports=["websocket"])
        measured = node.metric("stickyring_loop_lag_seconds_count")
        wait_until(lambda: node.metric("stickyring_loop_lag_seconds_count") > measured, "the lag is measured")
        before = blocked()
        for _ in range(4):
            assert client.call("busy", timeout=5) == "done"
        wait_until(lambda: blocked() > before, "the loop was late")


def test_what_waits_for_a_client_that_does_not_poll_is_counted(node: ServeProcess) -> None:
    names = ("stickyring_send_queue_bytes", "stickyring_send_queue_largest_bytes")
    idle = handshake(node)
    assert max(map(node.metric, names)) < 10_000
    path = handshake(node)
    node.get(path, method="POST", body='42["flood"]').read()
    wait_until(lambda: min(map(node.metric, names)) >= 1_500_000, "the events wait")
    for one in (path, idle):
        node.get(one, method="POST", body="1").read()
    wait_until(lambda: max(map(node.metric, names)) < 10_000, "nothing waits any more")


def test_sessions_off_the_ring_are_counted_once_a_ring_is_known(node: ServeProcess, control: Path) -> None:
    """Those that arrive later too; the session without a key is on no ring."""
    rebalance(control, "node2-1")
    paths = [handshake(node), handshake(node, "bob"), handshake(node, "")]
    assert node.metric("stickyring_sessions_off_ring") == 2
    rebalance(control, "node1-1")
    assert node.metric("stickyring_sessions_off_ring") == 0
    for path in paths:
        node.get(path, method="POST", body="1").read()


def test_the_progress_of_a_drain_is_counted(node: ServeProcess, control: Path) -> None:
    handshake(node)
    states = ("to_move", "asked", "left")

    def counted() -> list[float]:
        return [node.metric(f'stickyring_drain_sessions{{state="{state}"}}') for state in states]

    assert counted() == [0, 0, 0]
    ask(control, "POST", "/drain")
    wait_until(lambda: counted() == [1, 1, 1], "the user has left")
    ask(control, "POST", "/undrain")
    assert counted() == [0, 0, 0]


def test_the_document_has_every_metric(node: ServeProcess, control: Path) -> None:
    """And no other; those of a bus are of an application that uses one."""
    rebalance(control, "node1-1")
    exposed = set(re.findall(r"^# TYPE (stickyring_\w+) ", node.get("/metrics").read().decode(), re.M))
    table = OPERATIONS.read_text().split("## Metrics")[1].split("Edges have Envoy's metrics")[0]
    documented = set(re.findall(r"`(stickyring_\w+)`", "\n".join(re.findall(r"^\|([^|]+)\|", table, re.M))))
    of_the_bus = {name for name in documented if re.match("stickyring_(bus_|sessions_(not_)?recovered)", name)}
    assert documented - of_the_bus == {name for name in exposed if not name.endswith("_created")}
    assert len(documented) > len(of_the_bus) > 5
