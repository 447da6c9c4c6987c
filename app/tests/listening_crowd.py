"""As `listening_crowd.mjs`, with the asyncio client of python-socketio: python listening_crowd.py COUNT URL..."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import socketio

from stickyring.bus.client import Recovering

TRANSPORTS = (["websocket"], ["polling"], ["polling", "websocket"])


class User:
    """One of them."""

    def __init__(self, number: int, urls: list[str]) -> None:
        self.number, self.urls, self.next = number, urls, number
        self.heard: list[list[Any]] = []
        self.client = socketio.AsyncClient(reconnection_delay=0.2, reconnection_delay_max=0.5, randomization_factor=0)
        self.recovering = Recovering(self.client)
        self.client.on("connect", self._joined)
        self.client.on("disconnect", self._left)
        self.client.on("numbered", self._hear)

    async def connect(self) -> None:
        url = f"{self.urls[self.number % len(self.urls)]}?client_id=python-{self.number}"
        await self.client.connect(url, transports=TRANSPORTS[self.number % 3])

    async def _joined(self) -> None:
        self.heard.append(["connect", self.recovering.recovered()])
        if not self.recovering.recovered():
            await self.client.emit("join", str(self.number % 2))

    async def _left(self, _: str) -> None:
        self.next += 1
        self.client.connection_url = f"{self.urls[self.next % len(self.urls)]}?client_id=python-{self.number}"

    async def _hear(self, *values: object) -> None:
        self.heard.append(["numbered", *values, time.time()])

    async def lose(self) -> None:
        if self.client.eio.ws is not None:
            await self.client.eio.ws.close()
        else:
            await self.client.eio.disconnect(abort=True)


async def main() -> None:
    users = [User(number, sys.argv[2:]) for number in range(int(sys.argv[1]))]
    await asyncio.gather(*(user.connect() for user in users))
    print(json.dumps({"connected": len(users)}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        await asyncio.gather(*(user.lose() for user in random.sample(users, int(line))))
    for user in users:
        print(json.dumps(user.heard))
    await asyncio.gather(*(user.client.shutdown() for user in users))


asyncio.run(main())
