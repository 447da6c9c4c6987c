"""All sessions of one probe: it bounds how many open at once, and how long they are held open."""

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import Callable

import aiohttp

from stickyring.tools.probe.failures import Failure
from stickyring.tools.probe.session import Record, Session, User
from stickyring.tools.probe.settings import Dialect, Manner, Shape
from stickyring.tools.probe.targets import Target
from stickyring.tools.probe.transports import connector


class Load:
    """A run of all sessions of a shape against a target; `records` grows as sessions end."""

    def __init__(self, target: Target, dialect: Dialect, shape: Shape, announce: Callable[[str], None]) -> None:
        self.shape = shape
        self.records: list[Record] = []
        self.failed = 0
        self.interrupted = False
        self._target = target
        self._dialect = dialect
        self._announce = announce
        self._slots = asyncio.Semaphore(shape.concurrency)
        self._opening: set[asyncio.Task[None]] = set()
        self._holds: set[asyncio.Timeout] = set()
        self._unsettled = shape.total

    @property
    def held(self) -> int:
        """Number of sessions held open now."""
        return len(self._holds)

    async def run(self) -> None:
        """Run all sessions, or until `interrupt`."""
        nobody = aiohttp.DummyCookieJar()
        users = [
            User(name, aiohttp.CookieJar(unsafe=True), asyncio.Lock())
            if self.shape.keep_cookies
            else User(name, nobody, contextlib.nullcontext())
            for name in self.shape.ids
        ]
        query = f"&{self._target.query}" if self._target.query else ""
        base_url = f"{self._target.origin}{self._dialect.path}?EIO=4{query}"
        async with connector(self._target) as connections, asyncio.TaskGroup() as sessions:
            if self._dialect.event is None:
                self._dialect = await self._find_dialect(connections, base_url)
            # In this order, the sessions of one id are spread over the whole run.
            for number, user, manner in itertools.product(
                range(1, self.shape.connections + 1), users, self.shape.manners
            ):
                await self._slots.acquire()
                if self.interrupted:
                    break
                session = Session(
                    connector=connections,
                    base_url=base_url,
                    dialect=self._dialect,
                    user=user,
                    manner=manner,
                    connection=number,
                )
                self._opening.add(sessions.create_task(self._session(session)))

    def interrupt(self) -> None:
        """Cancel sessions that are opening, close those held open, and start no more."""
        self.interrupted = True
        for task in self._opening:
            task.cancel()
        self._end_holds(0)

    async def _find_dialect(self, connections: aiohttp.BaseConnector, base_url: str) -> Dialect:
        """Return the dialect in which the server answers; the handshake does not show which one that is."""
        user = User(self.shape.ids[0], aiohttp.DummyCookieJar(), contextlib.nullcontext())
        for dialect in (self._dialect, dataclasses.replace(self._dialect, msgpack=True)):
            session = Session(
                connector=connections,
                base_url=base_url,
                dialect=dialect,
                user=user,
                manner=Manner.WEBSOCKET_FIRST,
                connection=0,
            )
            try:
                await session.open()
                await session.close()
            except Failure:
                if not session.begun:
                    break
            else:
                return dialect
            finally:
                await session.abort()
        return self._dialect

    async def _session(self, session: Session) -> None:
        try:
            await self._open(session)
            if self.shape.hold is not None:
                await self._hold(session)
            await session.close()
            session.verify()
        except Failure as failure:
            session.record.cause = str(failure)
            self.failed += 1
        finally:
            await session.abort()
        self.records.append(session.record)

    async def _open(self, session: Session) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            await session.open()
            await session.round_trip()
            session.verify()
        except Failure:
            self._settled()
            raise
        finally:
            self._opening.discard(task)
            self._slots.release()

    async def _hold(self, session: Session) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None) as hold:
                self._holds.add(hold)
                try:
                    self._settled()
                    await session.stay()
                finally:
                    self._holds.discard(hold)

    def _settled(self) -> None:
        """Count a session that has opened or failed to open; the last one starts the hold time of all sessions."""
        self._unsettled -= 1
        if self._unsettled == 0 and self.shape.hold is not None:
            total, held = self.shape.total, len(self._holds)
            self._announce(
                f"all {total} sessions are open" if held == total else f"{held} of {total} sessions are open"
            )
            self._end_holds(0 if self.interrupted else self.shape.hold)

    def _end_holds(self, seconds: float) -> None:
        when = asyncio.get_running_loop().time() + seconds
        for hold in self._holds:
            if not hold.expired():
                hold.reschedule(when)
