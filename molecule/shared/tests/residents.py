"""Users who stay connected and send messages while the fleet changes, and a record of what they notice."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import socketio
from stickyring.delivery import Sender

TRANSPORTS = (["websocket"], ["polling"], ["polling", "websocket"])
ANSWER_SECONDS = 60.0
POLL_SECONDS = 0.1
GOODBYE_SECONDS = 30


@dataclass
class Connection:
    """One connection of a user: real client, default reconnection, one transport setting.

    pause: seconds between an acknowledgement and the next message; node: the node that welcomed it last; events: (time,
    "connect", "disconnect" or "failed") in their order; welcomes: (time, node); answers: (sent at, acknowledged at) of
    its numbered messages; repeated: when messages were sent that had to be sent again; lost: messages that were not
    acknowledged within `answer` seconds, or wrongly.
    """

    user: str
    transports: list[str]
    pause: float = 1.0
    answer: float = ANSWER_SECONDS
    node: str = ""
    events: list[tuple[float, str]] = field(default_factory=list)
    welcomes: list[tuple[float, str]] = field(default_factory=list)
    answers: list[tuple[float, float]] = field(default_factory=list, repr=False)
    repeated: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def note(self, event: str) -> None:
        self.events.append((time.monotonic(), event))

    def count(self, event: str, since: float) -> int:
        return sum(1 for moment, what in self.events if what == event and moment >= since)

    def first(self, event: str, since: float) -> float:
        """The time of the first such event since then."""
        return next(moment for moment, what in self.events if what == event and moment >= since)

    async def live(self, url: str, ended: asyncio.Event) -> None:
        """Connects, and sends messages until the end."""
        client = socketio.AsyncClient()
        client.on("message", self.hear)
        client.on("connect", lambda: self.note("connect"))
        client.on("disconnect", lambda reason: self.left())
        client.on("connect_error", lambda data: self.note("failed"))
        sender = Sender(client)
        await client.connect(f"{url}?client_id={self.user}", transports=self.transports, wait_timeout=20)
        while not ended.is_set():
            await self.talk(sender)
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), self.pause)
        # Unlike disconnect(), shutdown() also stops a pending reconnect.
        await client.shutdown()

    async def talk(self, sender: Sender) -> None:
        began, repeated = time.monotonic(), sender.repeated
        text = f"message {len(self.answers)}"
        try:
            async with asyncio.timeout(self.answer):
                answer = await sender.send("message", text)
        except TimeoutError:
            answer = ""
        if not answer.endswith(f": {text}"):
            self.lost.append(text)
        self.answers.append((began, time.monotonic()))
        if sender.repeated > repeated:
            self.repeated.append(began)

    def silence(self, since: float) -> float:
        """The longest time since then between two acknowledgements, the pause included."""
        times = [answered for _, answered in self.answers if answered > since]
        return max(later - earlier for earlier, later in pairwise(times))

    def left(self) -> None:
        self.node = ""
        self.note("disconnect")

    def hear(self, text: str, *_: str) -> None:
        """Notes which node welcomes it; a message's id follows, and with recovery its offset."""
        if text.endswith(": welcome"):
            self.node = text.removeprefix("node#").removesuffix(": welcome")
            self.welcomes.append((time.monotonic(), self.node))


def tell_of_errors(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # python-engineio leaves broken connections to the garbage collector, and aiohttp reports each at length.
    if not context["message"].startswith("Unclosed "):
        loop.default_exception_handler(context)


class Residents:
    """Connections in a thread of their own: one for each user and transport setting."""

    def __init__(
        self,
        url: str,
        users: list[str],
        pause: float = 1.0,
        transports: tuple[list[str], ...] = TRANSPORTS,
        answer: float = ANSWER_SECONDS,
    ) -> None:
        self._url = url
        self._goodbye = answer + GOODBYE_SECONDS
        self.users = users
        self.connections = [Connection(user, one, pause, answer) for user in users for one in transports]
        self._ended = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(tell_of_errors)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._tasks: list[Any] = []

    def __enter__(self) -> Residents:
        self._thread.start()
        self._tasks = [self._spawn(connection.live(self._url, self._ended)) for connection in self.connections]
        return self

    def __exit__(self, *error: object) -> None:
        self._spawn(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)

    async def _end(self) -> None:
        """Waits until every connection is closed."""
        # Without cancellation, which a waiting client may swallow.
        self._ended.set()
        _, left = await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()}, timeout=self._goodbye)
        assert not left, left

    def _spawn(self, work: Coroutine[Any, Any, None]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def __iter__(self) -> Iterator[Connection]:
        return iter(self.connections)

    def homes(self) -> dict[str, set[str]]:
        """Each user's nodes; an empty name stands for a connection that is down."""
        found = defaultdict(set)
        for connection in self.connections:
            found[connection.user].add(connection.node)
        return dict(found)

    def settle(self, seconds: float) -> None:
        """Waits until every user has all connections, on one node."""
        self.wait(lambda: all(len(home) == 1 and "" not in home for home in self.homes().values()), seconds)

    def wait_for_answers(self, since: float, seconds: float) -> None:
        """Waits until every connection has sent a message after that time and got the acknowledgement."""
        self.wait(lambda: all(one.answers and one.answers[-1][0] > since for one in self.connections), seconds)

    def wait(self, condition: Callable[[], bool], seconds: float) -> float:
        """Waits until the condition holds; returns how long that took, or raises TimeoutError."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                astray = [(user, home) for user, home in self.homes().items() if len(home) > 1 or "" in home]
                raise TimeoutError(f"not in {seconds} s; {len(astray)} users are not on one node: {astray[:5]}")
            for task in self._tasks:
                if task.done():
                    task.result()
            time.sleep(POLL_SECONDS)
        return time.monotonic() - began
