"""python-socketio's own client with its default options, polling then upgrade, over a hundred connections."""

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
import pytest
import socketio

IDS = [f"python-{number}" for number in range(20)]
CONNECTIONS_PER_ID = 5


@dataclass
class Found:
    """The results of the sessions; `nodes` has every node that answered an id, by id."""

    nodes: dict[str, set[str]] = field(default_factory=dict)
    transports: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)


async def run_session(url: str, client_id: str, deadline: float, found: Found) -> None:
    answers: asyncio.Queue[str] = asyncio.Queue()
    text = f"hello from {client_id}"
    # Our own HTTP session: closing it ends a poll that a failed session would hold open for a ping interval.
    async with aiohttp.ClientSession() as http:
        log = logging.getLogger("engineio of the test")
        client = socketio.AsyncClient(http_session=http, reconnection=False, engineio_logger=log)
        client.on("message", answers.put)
        try:
            async with asyncio.timeout(deadline):
                await client.connect(f"{url}?client_id={client_id}", wait_timeout=deadline)
                welcome = await answers.get()
                acknowledged = await client.call("message", text, timeout=deadline)
                echo = await answers.get()
                transport = client.transport()
                await client.disconnect()
        except (socketio.exceptions.SocketIOError, TimeoutError) as error:
            found.errors.append(repr(error))
            return
    nodes = {re.fullmatch(r"node#(.+?): welcome", welcome)[1]}
    for answer in (acknowledged, echo):
        nodes.add(re.fullmatch(rf"node#(.+?): {text}", answer)[1])
    found.nodes.setdefault(client_id, set()).update(nodes)
    found.transports[transport] += 1


def run_sessions(url: str, deadline: float) -> Found:
    """Run all sessions at once; each fails if it has not completed after `deadline` seconds."""
    found = Found()

    async def run_all() -> None:
        async with asyncio.TaskGroup() as group:
            for client_id in IDS * CONNECTIONS_PER_ID:
                group.create_task(run_session(url, client_id, deadline, found))

    asyncio.run(run_all())
    return found


def test_python_client_is_sticky(edge_url: Callable[[str], str]) -> None:
    found = run_sessions(edge_url("sticky"), deadline=30)
    assert found.errors == []
    assert found.transports == {"websocket": len(IDS) * CONNECTIONS_PER_ID}
    assert set(found.nodes) == set(IDS)
    assert {user: nodes for user, nodes in found.nodes.items() if len(nodes) != 1} == {}
    assert len(set().union(*found.nodes.values())) > 1, "one node holds all users"


def test_python_client_fails_without_a_key(edge_url: Callable[[str], str], caplog: pytest.LogCaptureFixture) -> None:
    found = run_sessions(edge_url("unkeyed"), deadline=5)
    # A session succeeds only if the upgrade and the polls after it all reach the node of the handshake.
    assert len(found.errors) > len(IDS) * CONNECTIONS_PER_ID / 4
    assert "Unexpected status code 400 in server response" in caplog.text
