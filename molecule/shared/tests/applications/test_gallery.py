"""Applications of other kinds, unchanged: each takes the place of the deployed one, is sticky, counted and drained.

They are deployed one after the other; the next suite, or test_guestbook, deploys what it needs.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import socketio

PROJECT = Path(__file__).parents[4]
TRANSPORTS = (["websocket"], ["polling"], ["polling", "websocket"])
USERS = 12
MOVED_SECONDS = 20
APPLICATIONS = {
    "fastapi_chat:app": ("asgi", "say", ("room", "hello")),
    "flask_rooms:app": ("eventlet", "say", ("room", "hello")),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gallery as a team's project, locked as the README says."""
    folder = tmp_path_factory.mktemp("applications") / "gallery"
    shutil.copytree(PROJECT / "app" / "gallery", folder)
    subprocess.run(["make", "lock", f"PROJECT={folder}"], cwd=PROJECT, check=True)
    return folder


@pytest.fixture(scope="module", params=APPLICATIONS)
def application(request: pytest.FixtureRequest, project: Path, ansible: Any, inventory: Path) -> str:
    """Deployed in place of what was deployed before; site.yml itself proves that it is sticky."""
    worker_class, *_ = APPLICATIONS[request.param]
    settings = {
        "stickyring_artifacts_projects": [str(PROJECT / "app"), str(project)],
        "stickyring_artifacts_lock": str(project / "requirements.lock"),
        "stickyring_node_wheelhouse": "{{ stickyring_artifacts_directory }}/wheelhouse.tar",
        "stickyring_node_application": request.param,
        "stickyring_node_worker_class": worker_class,
        "stickyring_node_proving_time": 0,
        "stickyring_probe_options": ["--no-echo"],
    }
    ansible("ansible-playbook", "-i", inventory, "site.yml", "-e", json.dumps(settings))
    return str(request.param)


class User:
    """A client that reconnects by itself; `nodes` are those that have answered its events, in their order."""

    def __init__(self, name: str, transports: list[str]) -> None:
        self.name, self.transports = name, transports
        self.client = socketio.AsyncClient()
        self.disconnects = 0
        self.client.on("disconnect", self._count)

    def _count(self, reason: str) -> None:
        self.disconnects += 1

    async def __aenter__(self) -> User:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.shutdown()

    async def connect(self, url: str) -> None:
        await self.client.connect(f"{url}?client_id={self.name}", transports=self.transports, wait_timeout=20)


def sessions(machine: Any, nodes: Any) -> dict[str, list[str]]:
    """The instances that hold each user's sessions, as the nodes list them."""
    found: dict[str, list[str]] = {}
    for node in nodes:
        service, count = (node.variables[f"stickyring_node_{name}"] for name in ("service", "instances"))
        for instance in range(1, int(count) + 1):
            control = f"/run/{service}/{instance}/control.sock"
            program = f"/opt/{service}/current/bin/stickyring"
            answer = json.loads(machine(node.name).check_output(f"{program} sessions --control {control}"))
            for session in answer["sessions"]:
                if session["key"] is not None:
                    found.setdefault(session["key"], []).append(answer["node"])
    return found


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + MOVED_SECONDS
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, f"not within {MOVED_SECONDS} s: {what}"


def test_users_are_counted_and_move_when_their_node_drains(
    application: str, edge_url: Any, machine: Any, nodes: Any
) -> None:
    _, event, arguments = APPLICATIONS[application]
    node = nodes[0]
    service, count = (node.variables[f"stickyring_node_{name}"] for name in ("service", "instances"))
    instances = range(1, int(count) + 1)

    def operate(command: str) -> None:
        for instance in instances:
            control = f"--control /run/{service}/{instance}/control.sock"
            machine(node.name).check_output(f"/opt/{service}/current/bin/stickyring {command} {control}")

    async def play() -> None:
        async with AsyncExitStack() as stack:
            users = []
            for number in range(USERS):
                user = await stack.enter_async_context(User(f"user-{number}", TRANSPORTS[number % len(TRANSPORTS)]))
                await user.connect(edge_url("sticky"))
                users.append(user)
                assert await user.client.call(event, arguments, timeout=10) == arguments[-1]
            placed = await asyncio.to_thread(sessions, machine, nodes)
            assert {user.name: len(placed.get(user.name, [])) for user in users} == {user.name: 1 for user in users}
            here = [user for user in users if placed[user.name][0].startswith(f"{node.name}-")]
            assert 0 < len(here) < len(users), "both nodes have users"

            await asyncio.to_thread(operate, "drain")
            await until(
                lambda: all(
                    [one.rpartition("-")[0] for one in sessions(machine, nodes).get(user.name, [])]
                    not in ([], [node.name])
                    for user in here
                ),
                "its users are elsewhere",
            )
            for user in users:
                # The node's instances drain one after the other: the next one may get users of the one before.
                most = len(instances) if user in here else 0
                assert (user in here) <= user.disconnects <= most, user.name
                assert await user.client.call(event, arguments, timeout=10) == arguments[-1]

    try:
        asyncio.run(play())
    finally:
        operate("undrain")


def test_the_probe_finds_it_sticky_and_broken_without_ids(application: str, edge_url: Any) -> None:
    probe = [Path(sys.executable).with_name("stickyring"), "probe", "--no-echo", "--ids", "40"]
    sticky = subprocess.run([*probe, edge_url("sticky")], capture_output=True, text=True, check=False)
    assert sticky.returncode == 0, sticky.stdout + sticky.stderr
    control = subprocess.run([*probe, "--no-key", edge_url("unkeyed")], capture_output=True, text=True, check=False)
    assert control.returncode == 1, control.stdout
    assert "Invalid session" in control.stdout
