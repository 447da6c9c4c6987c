"""All sessions of one probe: it bounds how many open at once, and how long they are held open."""

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator

import aiohttp

from stickyring.tools.probe.failures import Failure, Rejected
from stickyring.tools.probe.page import Page
from stickyring.tools.probe.session import Record, Session, User
from stickyring.tools.probe.settings import Dialect, Manner, Parser, Shape
from stickyring.tools.probe.targets import Target
from stickyring.tools.probe.transports import connector


class Load:
    """A run of all sessions of a shape against a target; `records` grows as sessions end.

    The first session opens alone. If the application rejects it, `rejected` is set to the reason and no other session
    begins: further attempts could lock an account.
    """

    def __init__(self, target: Target, dialect: Dialect, shape: Shape, announce: Callable[[str], None]) -> None:
        self.shape = shape
        self.records: list[Record] = []
        self.failed = 0
        self.interrupted = False
        self.rejected: str | None = None
        self._target = target
        self._dialect = dialect
        self._announce = announce
        self._slots = asyncio.Semaphore(shape.concurrency)
        self._opening: set[asyncio.Task[None]] = set()
        self._holds: set[asyncio.Timeout] = set()
        self._unsettled = shape.total
        self._begun = asyncio.Event()
        self._url = f"{target.origin}{dialect.path}"

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
        async with connector(self._target) as connections, asyncio.TaskGroup() as sessions:
            if self._dialect.event is None and self._dialect.parser is None and Manner.HTTP not in self.shape.manners:
                await self._find_parser(connections)
            for number, user, manner in self._order(users):
                await self._slots.acquire()
                if self.interrupted or self.rejected:
                    break
                work = (
                    self._page(self._new_page(connections, user))
                    if manner is Manner.HTTP
                    else self._session(self._new_session(connections, user, manner, number))
                )
                self._opening.add(sessions.create_task(work))
                await self._begun.wait()

    def _order(self, users: list[User]) -> Iterator[tuple[int, User, Manner]]:
        """Yield the sessions in an order that spreads those of one id over the whole run.

        Each round has another order, the same in every run: otherwise an edge that takes the nodes in turn would look
        sticky whenever the number of sessions in a round is a multiple of the number of nodes.
        """
        for number in range(1, self.shape.connections + 1):
            for user in random.Random(number).sample(users, len(users)):
                for manner in self.shape.manners:
                    yield number, user, manner

    def interrupt(self) -> None:
        """Cancel sessions that are opening, close those held open, and start no more."""
        self.interrupted = True
        # A task that is cancelled before it runs sets nothing.
        self._begun.set()
        for task in self._opening:
            task.cancel()
        self._end_holds(0)

    def _new_session(self, connections: aiohttp.BaseConnector, user: User, manner: Manner, number: int) -> Session:
        return Session(
            connector=connections,
            url=self._url,
            query=self._target.query,
            dialect=self._dialect,
            user=user,
            manner=manner,
            connection=number,
        )

    def _new_page(self, connections: aiohttp.BaseConnector, user: User) -> Page:
        return Page(connector=connections, url=self._url, query=self._target.query, dialect=self._dialect, user=user)

    async def _find_parser(self, connections: aiohttp.BaseConnector) -> None:
        """Take the parser that the server answers, or the default; the handshake does not show which one it is."""
        user = User(self.shape.ids[0], aiohttp.DummyCookieJar(), contextlib.nullcontext())
        for parser in Parser:
            self._dialect = dataclasses.replace(self._dialect, parser=parser)
            session = self._new_session(connections, user, Manner.WEBSOCKET_FIRST, 0)
            try:
                await session.open()
                await session.close()
            except Rejected as rejected:
                self.rejected = self._dialect.without_secrets(str(rejected))
                return
            except Failure:
                if not session.record.begun:
                    break
            else:
                return
            finally:
                await session.abort()
        self._dialect = dataclasses.replace(self._dialect, parser=Parser.DEFAULT)

    def _failed(self, record: Record, failure: Failure) -> None:
        record.cause = self._dialect.without_secrets(str(failure))
        if isinstance(failure, Rejected) and not self._begun.is_set():
            self.rejected = record.cause
        self.failed += 1

    async def _page(self, page: Page) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            await page.get()
        except Failure as failure:
            self._failed(page.record, failure)
        finally:
            self._begun.set()
            self._opening.discard(task)
            self._slots.release()
            await page.abort()
        self.records.append(page.record)

    async def _session(self, session: Session) -> None:
        try:
            await self._open(session)
            if self.shape.hold is not None:
                await self._hold(session)
            await session.close()
            session.record.verify()
        except Failure as failure:
            self._failed(session.record, failure)
        finally:
            self._begun.set()
            await session.abort()
        self.records.append(session.record)

    async def _open(self, session: Session) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            await session.open()
            await session.round_trip()
            session.record.verify()
            self._begun.set()
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
