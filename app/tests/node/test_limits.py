"""A client that takes more than it may loses its session or gets none, or is only counted."""

import json
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path

import pytest
from conftest import ServeProcess, serving, wait_until
from test_packets import Frames, Polling, failures

from stickyring.node import limits
from stickyring.node.limits import BURST_SECONDS, Allowance, Limits, network_of

MESSAGES, BYTES = 10, 2000
"""A second."""
BURST = int(MESSAGES * BURST_SECONDS)
POLICY_VIOLATION = 1008
NOTE = '42["note",1]'
APPLICATION = """
import socketio

server = socketio.Server(async_mode="eventlet")

@server.event
def note(sid, content):
    return len(str(content))

application = socketio.WSGIApp(server)
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("limits")
    Path(folder, "chat.py").write_text(APPLICATION)
    settings = ("--messages-per-second", str(MESSAGES), "--bytes-per-second", str(BYTES))
    with serving(folder, "chat:application", *settings) as node:
        yield node


def over(node: ServeProcess, limit: str) -> float:
    return node.metric(f'stickyring_sessions_over_limit_total{{limit="{limit}"}}')


def test_what_is_not_used_is_saved_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    told: list[str] = []
    monkeypatch.setattr(limits, "monotonic", lambda: now)
    allowance = Allowance(Limits(messages=MESSAGES, size=BYTES), told.append)
    assert all(allowance.admits(1, 0) for _ in range(BURST))
    assert not allowance.admits(1, 0)
    now = 1.0
    assert all(allowance.admits(1, 0) for _ in range(MESSAGES))
    assert not allowance.admits(1, 0)
    assert told == ["messages"], "once"
    now = 1000.0
    assert allowance.admits(BURST, 0)
    assert not allowance.admits(1, 0), "what is saved has a bound"
    assert allowance.admits(0, int(BYTES * BURST_SECONDS))
    assert not allowance.admits(0, 1)
    assert told == ["messages", "bytes"]
    other = Allowance(Limits(size=BYTES), told.append)
    assert other.admits(10**9, 0), "0 is no limit"


def test_a_client_that_polls_and_sends_too_many_messages_gets_an_error(node: ServeProcess) -> None:
    before = failures(node, "flooding"), over(node, "messages")
    session = Polling(node)
    assert session.post("\x1e".join([NOTE] * (BURST - 20))) == 200
    assert session.call("note", 1) == 1
    assert session.post("\x1e".join([NOTE] * 60)) == 400
    assert session.poll()[0] == 400
    assert (failures(node, "flooding"), over(node, "messages")) == (before[0] + 1, before[1] + 1)


def test_a_websocket_with_too_many_messages_is_closed(node: ServeProcess) -> None:
    before = failures(node, "flooding"), over(node, "messages")
    session = Frames(node)
    for _ in range(BURST - 20):
        session.send(NOTE)
    session.send('421["note",1]')
    assert session.raw.frame()[1] == b"431[1]", "so many at once are allowed"
    for _ in range(60):
        session.send(NOTE)
    assert session.status() == POLICY_VIOLATION
    wait_until(lambda: failures(node, "flooding") == before[0] + 1, "the session has failed")
    assert over(node, "messages") == before[1] + 1


@pytest.mark.parametrize("transport", ["polling", "websocket"])
def test_bytes_are_limited_too(node: ServeProcess, transport: str) -> None:
    before = failures(node, "flooding"), over(node, "bytes")
    packet = f"42{json.dumps(['note', 'x' * BYTES])}"
    if transport == "polling":
        session = Polling(node)
        statuses = [session.post(packet) for _ in range(int(BURST_SECONDS) + 3)]
        assert statuses.count(200) >= BURST_SECONDS - 2
        assert statuses[-1] == 400
    else:
        frames = Frames(node)
        for _ in range(int(BURST_SECONDS) + 3):
            frames.send(packet)
        assert frames.status() == POLICY_VIOLATION
    wait_until(lambda: failures(node, "flooding") == before[0] + 1, "the session has failed")
    assert over(node, "bytes") == before[1] + 1


def test_limits_that_are_not_enforced_are_counted_and_logged(tmp_path: Path) -> None:
    (tmp_path / "chat.py").write_text(APPLICATION)
    with serving(tmp_path, "chat:application", "--messages-per-second", "1", "--count-limits") as node:
        session = Polling(node)
        assert session.post("\x1e".join([NOTE] * 100)) == 200
        assert session.call("note", "abc") == 3
        assert (failures(node, "flooding"), over(node, "messages"), over(node, "bytes")) == (0, 1, 0)
        (line,) = node.logged("over the limit")
        assert (line["sid"], line["limit"], line["enforced"]) == (session.sid, "messages", False)
        session.close()


def test_without_limits_nothing_is_counted(tmp_path: Path) -> None:
    (tmp_path / "chat.py").write_text(APPLICATION)
    with serving(tmp_path, "chat:application") as node:
        session = Polling(node)
        for _ in range(3):
            assert session.post("\x1e".join([NOTE] * 1000)) == 200
        assert session.call("note", "abc") == 3
        assert (failures(node, "flooding"), over(node, "messages"), over(node, "bytes")) == (0, 0, 0)
        session.close()


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::", "2001:db8:1:3::/64"),
        ("", ""),
    ],
)
def test_ipv6_addresses_of_one_customer_count_together(address: str, network: str) -> None:
    assert network_of(address) == network


def handshake(node: ServeProcess, client: str, transport: str = "polling") -> HTTPResponse:
    """The answer to a handshake that an edge passes on."""
    headers = {"x-stickyring-client": client, "x-request-id": f"of {client}"}
    if transport == "websocket":
        headers |= {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        headers |= {"Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
    return node.get(f"/socket.io/?EIO=4&transport={transport}", headers)


def refused(node: ServeProcess) -> float:
    sample = 'stickyring_handshakes_refused_total{{reason="address",transport="{}"}}'
    return sum(node.metric(sample.format(transport)) for transport in ("polling", "websocket"))


def test_an_address_has_only_so_many_sessions(tmp_path: Path) -> None:
    (tmp_path / "chat.py").write_text(APPLICATION)
    with serving(tmp_path, "chat:application", "--sessions-per-address", "3") as node:
        sids = [json.loads(handshake(node, "192.0.2.7").read()[1:])["sid"] for _ in range(3)]
        for transport in ("polling", "websocket"):
            answer = handshake(node, "192.0.2.7", transport)
            assert (answer.status, answer.getheader("Retry-After")) == (429, "5")
        assert (refused(node), over(node, "sessions")) == (2, 2)
        assert [line["client"] for line in node.logged("over the limit")] == ["192.0.2.7"], "once"
        assert handshake(node, "192.0.2.8").status == 200, "others are not affected"
        assert node.get(f"/socket.io/?EIO=4&transport=polling&sid={sids[0]}", method="POST", body="1").status == 200
        wait_until(lambda: handshake(node, "192.0.2.7").status == 200, "the ended session has made place")
        assert handshake(node, "192.0.2.7").status == 429
        for last in range(3):
            assert handshake(node, f"2001:db8::{last}").status == 200
        assert handshake(node, "2001:db8::3").status == 429
        assert handshake(node, "2001:db8:0:1::3").status == 200


def test_too_many_sessions_of_an_address_are_only_counted_if_you_say_so(tmp_path: Path) -> None:
    (tmp_path / "chat.py").write_text(APPLICATION)
    with serving(tmp_path, "chat:application", "--sessions-per-address", "1", "--count-limits") as node:
        assert [handshake(node, "192.0.2.7").status for _ in range(3)] == [200] * 3
        assert (refused(node), over(node, "sessions")) == (0, 2)
        (line,) = node.logged("over the limit")
        assert (line["client"], line["limit"], line["enforced"]) == ("192.0.2.7", "sessions", False)
        assert line["request_id"] == "of 192.0.2.7"


def test_without_a_limit_an_address_has_any_number_of_sessions(tmp_path: Path) -> None:
    (tmp_path / "chat.py").write_text(APPLICATION)
    with serving(tmp_path, "chat:application") as node:
        assert [handshake(node, "192.0.2.7").status for _ in range(50)] == [200] * 50
        assert (refused(node), over(node, "sessions")) == (0, 0)
