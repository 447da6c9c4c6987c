"""The part "bus" measures real nodes at a real bus, and a run in which users do not get what they should fails."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import bus, report
from bench.bus import CONTROL, NODEJS_RECOVERY, RECOVERY_ASGI, REDIS_ASGI, TAKEOVER, Fault, Profile, ReplicatedBus
from bench.contenders import Contender, _serve, install, node_modules, running
from bench.load import LoadError, Loop, Wire, broadcast, listening, open_sessions
from bench.rounds import Rounds
from bench.tests.test_bench import CONTEXT

ROOT = Path(__file__).parents[2]
# A node has two users: one of the frozen node's waits for its events, whoever it is that reconnects meanwhile.
PROFILE = Profile(
    rounds=1, members=9, seconds=0.3, fault_rounds=1, faults=(Fault(bus.FREEZE_NODE, 1.0, losing=1), CONTROL), users=6
)
WRONG = """
import socketio

server = socketio.Server(async_mode="eventlet", async_handlers=False)

@server.event
def publish(sid, room, number, text):
    {}

application = socketio.WSGIApp(server)
"""


@pytest.fixture
def rounds(tmp_path: Path) -> Iterator[Rounds]:
    """Rounds of a short run; the cores of the test process are restored."""
    before = os.sched_getaffinity(0)
    yield Rounds(tmp_path, 120)
    os.sched_setaffinity(0, before)


def on_asgi(key: str, manager: str) -> Contender:
    """A contender on this Python."""
    application = f"application:asgi_broadcasting('{manager}')"
    return Contender(
        key, manager, lambda port: [*_serve([sys.executable], port), "--worker-class=asgi", application], {}
    )


def test_a_run_measures_broadcasts_and_what_users_miss(
    tmp_path: Path, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "AFTER_SECONDS", 3.0)
    monkeypatch.setattr(bus, "DRAIN_SECONDS", 1.0)
    client = install(tmp_path, "client", node_modules, ROOT / "app/package-lock.json")
    compared = [on_asgi(RECOVERY_ASGI, "ours-recovery"), on_asgi(REDIS_ASGI, "redis")]
    part = bus.compare(rounds, PROFILE, compared, "a Python", client)
    report.write(part, tmp_path / "output", CONTEXT)
    written = json.loads((tmp_path / "output/bus.json").read_text())
    for key, figure in written["figures"].items():
        assert figure["found"][RECOVERY_ASGI]["min"] > 0, key
    frozen, away = written["faults"].values()
    assert [frozen[key][0]["lost"] for key in (RECOVERY_ASGI, REDIS_ASGI)] == [0, 0]
    assert all(frozen[key][0]["late"] > 0.5 for key in frozen)
    assert frozen[RECOVERY_ASGI][0]["recovered"] > 0
    assert frozen[REDIS_ASGI][0]["not_recovered"] > 0
    assert all(away[RECOVERY_ASGI][0][name] == 0 for name in ("lost", "told", "repeated", "disordered"))
    assert away[RECOVERY_ASGI][0]["late"] > CONTROL.seconds - 1
    assert away[REDIS_ASGI][0]["lost"] > CONTROL.seconds * bus.PACED_RATE / bus.NODES
    table = (tmp_path / "output/bus.md").read_text()
    assert f"| {CONTROL.title} | {bus.MISSED['lost']} | 0 | " in table
    assert f"| {CONTROL.title} | {bus.MISSED['disordered']} |" not in table


def test_a_run_finds_what_users_miss_when_another_host_of_the_bus_takes_over(
    tmp_path: Path, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "_take_turns", lambda *_: None)
    monkeypatch.setattr(bus, "AFTER_SECONDS", 8.0)
    client = install(tmp_path, "client", node_modules, ROOT / "app/package-lock.json")
    compared = [on_asgi(RECOVERY_ASGI, "ours-recovery"), on_asgi(REDIS_ASGI, "redis")]
    part = bus.compare(rounds, replace(PROFILE, faults=(Fault(TAKEOVER),)), compared, "a Python", client)
    (found,) = part.more["faults"].values()
    assert all(found[RECOVERY_ASGI][0][name] == 0 for name in ("lost", "told", "repeated", "disordered"))
    assert all(found[key][0]["recovered"] == found[key][0]["not_recovered"] == 0 for key in found)
    assert found[RECOVERY_ASGI][0]["late"] > ReplicatedBus.down_after_seconds
    assert found[REDIS_ASGI][0]["lost"] > ReplicatedBus.down_after_seconds * bus.PACED_RATE / bus.NODES


def test_a_takeover_that_does_not_come_fails_the_run(rounds: Rounds) -> None:
    with ReplicatedBus(rounds.folder / "bus", rounds.server_core) as replicated:
        with replicated.disturbed(TAKEOVER), pytest.raises(LoadError, match="none has taken over"):
            replicated.check()
        assert replicated.cpu_seconds() > 0


def test_who_is_left_out_of_a_fault_has_a_dash(tmp_path: Path, rounds: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "_take_turns", lambda *_: None)
    missing = SimpleNamespace(**dict.fromkeys(bus.MISSED, 6))
    monkeypatch.setattr(bus, "_disturb", lambda _, group, *__: {one.key: missing for one in group})
    compared = [on_asgi(REDIS_ASGI, "redis"), on_asgi(NODEJS_RECOVERY, "Node.js")]
    part = bus.compare(rounds, replace(PROFILE, faults=(CONTROL, Fault(TAKEOVER))), compared, "a Python", tmp_path)
    lost = [line for line in part.sections if bus.MISSED["lost"] in line]
    assert [line.split(" | ")[2:] for line in lost] == [["1.00", "1.00 |"], ["1.00", "- |"]]
    assert any("Node.js was not measured there: a dash" in line for line in part.sections)


def test_a_check_that_finds_nothing_where_something_is_missed_fails_the_run(
    tmp_path: Path, rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "_take_turns", lambda *_: None)
    nothing = SimpleNamespace(**dict.fromkeys(bus.MISSED, 0))
    monkeypatch.setattr(bus, "_disturb", lambda _, group, *__: {one.key: nothing for one in group})
    with pytest.raises(LoadError, match="bus stopped for 5 s: no user of redis misses an event: the check is wrong"):
        bus.compare(rounds, PROFILE, [on_asgi(REDIS_ASGI, "redis")], "a Python", tmp_path)


@pytest.mark.parametrize(
    ("does", "cause"),
    [
        pytest.param("pass", "not everybody gets every event within 1 s", id="nothing"),
        pytest.param("server.emit('numbered', (room, number + 1, text))", "sends event 2 after 0", id="a gap"),
        pytest.param(
            "[server.emit('numbered', (room, number, text)) for _ in '12']", "sends event 1 after 1", id="twice"
        ),
        pytest.param("server.emit('numbered', (room, number, text), to=sid)", "not everybody gets", id="to one"),
        pytest.param("server.emit('numbered', (room, number, 'else'))", "instead of an event", id="something else"),
    ],
)
def test_what_does_not_broadcast_fails_the_run(
    tmp_path: Path, rounds: Rounds, monkeypatch: pytest.MonkeyPatch, does: str, cause: str
) -> None:
    monkeypatch.setattr("bench.load.ANSWER_SECONDS", 1.0)
    (tmp_path / "wrong.py").write_text(WRONG.format(does))
    wrong = Contender(
        "wrong",
        "Wrong",
        lambda port: [*_serve([sys.executable], port), "wrong:application"],
        {"PYTHONPATH": str(tmp_path)},
    )
    wires: list[Wire] = []
    with (
        running(wrong, rounds.server_core, tmp_path / "log") as server,
        contextlib.closing(Loop()) as loop,
        pytest.raises(LoadError, match=f"Wrong.* {cause}"),
    ):
        open_sessions(loop, server.target, wires, 3, listening)
        broadcast(loop, wires, server.cpu_seconds, seconds=0.2)
