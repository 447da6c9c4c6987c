"""Other people's kinds of applications: sticky, listed, counted, drained, stopped and updated, under load.

They are deployed one after the other, and stay: the next scenario deploys what it needs.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import environment
import pytest
import socketio

TRANSPORTS = (["websocket"], ["polling"], ["polling", "websocket"])
USERS = [f"user-{number}" for number in range(300 if environment.SOAK else 120)]
PAUSE_SECONDS = 5.0
ANSWER_SECONDS = 5.0
"""How long a client waits for an acknowledgement; python-socketio's does so even if it is disconnected meanwhile."""
RETRY_SECONDS = 0.5
SILENCE_SECONDS = 2 * ANSWER_SECONDS + PAUSE_SECONDS
MOVED_SECONDS = 20
START_SECONDS = 60
TICK_SECONDS = 10
"""Each application sends a tick every three seconds."""
MOST_AT_ONCE = 20
"""How many connect at the same time; a storm is another suite's subject."""
APPLICATIONS = {"fastapi_chat:app": "asgi", "flask_rooms:app": "eventlet"}


@pytest.fixture(scope="module", params=APPLICATIONS)
def run(request: pytest.FixtureRequest, play: Callable[..., str]) -> Callable[..., str]:
    """Runs playbooks for the application, which has taken the place of what was deployed before."""
    run = partial(play, application=request.param, stickyring_node_worker_class=APPLICATIONS[request.param])
    run("site.yml")
    return run


class User:
    """A client that reconnects by itself, and says something every few seconds.

    answered: when its words were acknowledged; wrong: acknowledgements that are not what was said, or did not come
    although it stayed connected; refused: why it could not connect at first; failed: how often it could not reconnect.
    """

    def __init__(self, name: str, transports: list[str]) -> None:
        self.name, self.transports = name, transports
        self.client = socketio.AsyncClient()
        self.disconnects = 0
        self.answered: list[float] = []
        self.wrong: list[object] = []
        self.refused: socketio.exceptions.ConnectionError | None = None
        self.failed = 0
        self.client.on("disconnect", self._count)
        self.client.on("connect_error", self._fail)

    def _count(self, reason: str) -> None:
        self.disconnects += 1

    def _fail(self, data: object) -> None:
        self.failed += 1

    async def live(self, url: str, connecting: asyncio.Semaphore, ended: asyncio.Event) -> None:
        try:
            async with connecting:
                await self.client.connect(f"{url}?client_id={self.name}", transports=self.transports, wait_timeout=20)
        except socketio.exceptions.ConnectionError as error:
            self.refused = error
            return
        while not ended.is_set():
            heard = await self._talk(f"message {len(self.answered)}")
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), PAUSE_SECONDS if heard else RETRY_SECONDS)
        await self.client.shutdown()

    async def _talk(self, text: str) -> bool:
        disconnects = self.disconnects
        try:
            answer = await self.client.call("say", (self.name, text), timeout=ANSWER_SECONDS)
        except socketio.exceptions.BadNamespaceError:
            return False  # it is being moved
        except socketio.exceptions.TimeoutError:
            if self.disconnects == disconnects:
                self.wrong.append(f"{text}: no acknowledgement")
            return False
        self.answered.append(time.monotonic())
        if answer != text:
            self.wrong.append(answer)
        return True

    def silence(self, since: float) -> float:
        """The longest time since then without an acknowledgement, in seconds."""
        times = [since, *(moment for moment in self.answered if moment > since), time.monotonic()]
        return max(later - earlier for earlier, later in pairwise(times))


class Users:
    """All of them, in an event loop and thread of their own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.all = [User(name, TRANSPORTS[number % len(TRANSPORTS)]) for number, name in enumerate(USERS)]
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=asyncio.run, args=[self._live()], daemon=True)

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        connecting = asyncio.Semaphore(MOST_AT_ONCE)
        await asyncio.gather(*(user.live(self._url, connecting, self._ended) for user in self.all))

    def __enter__(self) -> Users:
        self._thread.start()
        until(lambda: all(user.answered or user.refused for user in self.all), "all are answered", START_SECONDS)
        assert not [(user.name, user.transports, user.refused) for user in self.all if user.refused]
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()


@pytest.fixture(scope="module")
def users(run: Any, edge_url: Any) -> Iterator[list[User]]:
    """Users over all transports; none of them is answered wrongly."""
    with Users(edge_url("sticky")) as users:
        yield users.all
    assert not [user for user in users.all if user.wrong]


def sessions(operate: Any, nodes: Any) -> dict[str, list[str]]:
    """The instances that hold each user's sessions, as the nodes list them."""
    found: dict[str, list[str]] = {}
    for answer in (json.loads(text) for node in nodes for text in operate(node, "sessions")):
        for session in answer["sessions"]:
            if session["key"] is not None:
                found.setdefault(session["key"], []).append(answer["node"])
    return found


def until(condition: Callable[[], bool], what: str, seconds: float = MOVED_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        # Without a pause, this thread would hold up that of the clients.
        time.sleep(0.1)


@pytest.fixture
def homes(operate: Any, nodes: Any) -> Callable[..., dict[str, str]]:
    """The host of each user's session, of all nodes or some; a user without one, or with two, is left out."""
    return lambda some=nodes: {
        user: places[0].rpartition("-")[0]
        for user, places in sessions(operate, some).items()
        if user in USERS and len(places) == 1
    }


def test_each_session_is_listed_and_counted(users: list[User], homes: Any, nodes: Any) -> None:
    placed = homes()
    assert placed.keys() == set(USERS)
    for node in nodes:
        here = [user for user in USERS if placed[user] == node.name]
        assert 0 < len(here) < len(users), "every node has users"
        counted = 0.0
        for instance in range(int(node.variables["stickyring_node_instances"])):
            port = int(node.variables["stickyring_node_port"]) + instance
            with urlopen(f"http://{node.variables['stickyring_address']}:{port}/metrics", timeout=10) as answer:
                lines = answer.read().decode().splitlines()
            counted += sum(float(line.split()[-1]) for line in lines if line.startswith("stickyring_connections{"))
        assert counted == len(here)


def test_a_room_and_the_background_task_reach_every_tab(run: Any, edge_url: Any) -> None:
    """The tabs of one user, who are on one node."""
    with socketio.SimpleClient() as one, socketio.SimpleClient() as other:
        for tab, transport in ((one, "polling"), (other, "websocket")):
            tab.connect(f"{edge_url('sticky')}?client_id=ada", transports=[transport])
        assert one.call("join", "room") == "room"
        assert other.call("say", ("room", "hello")) == "hello"
        for tab, wanted in ((one, {"said", "tick"}), (other, {"tick"})):
            heard = set()
            while not wanted <= heard:
                event, *data = tab.receive(timeout=TICK_SECONDS)
                assert event != "said" or (tab, data) == (one, ["hello"])
                heard.add(event)


@pytest.mark.parametrize("way", ["drain", "stop"])
def test_a_node_that_is_drained_or_stopped_has_no_users_until_a_rebalance_brings_them_back(
    users: list[User], run: Any, homes: Any, operate: Any, machine: Any, nodes: Any, way: str
) -> None:
    node, before, since = nodes[0], homes(), time.monotonic()
    answering = nodes if way == "drain" else nodes[1:]
    counted = [(user.disconnects, user.failed) for user in users]
    instances = int(node.variables["stickyring_node_instances"])
    units = " ".join(f"{node.variables['stickyring_node_service']}@{number}" for number in range(1, instances + 1))
    try:
        operate(node, "drain") if way == "drain" else machine(node.name).check_output(f"systemctl stop {units}")
        until(
            lambda: (placed := homes(answering)).keys() == set(USERS) and node.name not in placed.values(),
            "its users are elsewhere",
        )
    finally:
        operate(node, "undrain") if way == "drain" else machine(node.name).check_output(f"systemctl start {units}")
    for user, (disconnects, failed) in zip(users, counted, strict=True):
        # The node's instances drain one after the other: the next one may get users of the one before.
        most = instances if before[user.name] == node.name else 0
        assert bool(most) <= user.disconnects - disconnects <= most, user.name
        assert user.failed - failed <= 1, user.name
    # Users cannot move to a node before the edge finds it healthy.
    run("playbooks/verify.yml")
    run("playbooks/rebalance.yml")
    until(lambda: homes() == before, "every user is at home")
    assert max(user.silence(since) for user in users) < SILENCE_SECONDS


@pytest.mark.parametrize("other", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["one way", "other way"])
def test_an_update_moves_users_as_often_as_it_says(users: list[User], run: Any, homes: Any, other: bool) -> None:
    """FastAPI in surge mode and Flask with restarts, or the other way round."""
    surge = (run.keywords["application"] == "fastapi_chat:app") != other
    since, before = time.monotonic(), [user.disconnects for user in users]
    release = f"second-{surge}".lower()
    told = run(
        "playbooks/rolling_update.yml", stickyring_node_release=release, stickyring_node_surge=surge, stickyring_share=1
    )
    until(lambda: homes().keys() == set(USERS), "every user is on one node")
    disconnects = [user.disconnects - earlier for user, earlier in zip(users, before, strict=True)]
    account = r"(\d+) sessions were .* asked to reconnect (\d+) times \(at most (\d+) are expected, (\d) each\)"
    found, asked, _, each = map(int, re.search(account, told).groups())
    assert found == len(users)
    assert asked == pytest.approx(sum(disconnects), rel=0.05), "the reported count is not what users have seen"
    assert min(disconnects) >= 1
    assert max(disconnects) <= each
    assert max(user.silence(since) for user in users) < SILENCE_SECONDS


def test_the_probe_finds_it_sticky_and_broken_without_ids(run: Any, edge_url: Any) -> None:
    probe = [Path(sys.executable).with_name("stickyring"), "probe", "--no-echo", "--ids", "40"]
    sticky = subprocess.run([*probe, edge_url("sticky")], capture_output=True, text=True, check=False)
    assert sticky.returncode == 0, sticky.stdout + sticky.stderr
    control = subprocess.run([*probe, "--no-key", edge_url("unkeyed")], capture_output=True, text=True, check=False)
    assert control.returncode == 1, control.stdout
    assert "Invalid session" in control.stdout
