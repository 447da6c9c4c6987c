"""One plain HTTP request, for applications without Socket.IO, and the record of what it saw."""

import time

import aiohttp
from yarl import URL

from stickyring.tools.probe.failures import Failure, refusal
from stickyring.tools.probe.session import Record, User, http_session, step
from stickyring.tools.probe.settings import Dialect, Manner

CHUNK = 65536


class Page:
    """A GET on a connection of its own; its record has the node, and the time of the answer as a round trip.

    `url` is the URL of the page without a query; `query` is sent with every request, and the id after it.
    """

    def __init__(self, *, connector: aiohttp.BaseConnector, url: str, query: str, dialect: Dialect, user: User) -> None:
        self.record = Record(user.name, Manner.HTTP)
        self._dialect = dialect
        self._user = user
        self._http = http_session(connector, dialect, user)
        key = None if dialect.key_param is None else f"{dialect.key_param}={user.name}"
        parameters = "&".join(filter(None, (query, key)))
        # Already encoded: request exactly what the user typed.
        self._url = URL(f"{url}?{parameters}" if parameters else url, encoded=True)

    async def get(self) -> None:
        """Request the page and read all of it; a redirect is an answer and is not followed.

        Raises:
            Rejected: the answer is 401.
            Failure: another answer from 400, none in time, or one that does not name the node.
        """
        async with self._user.visit:
            await step("answer", self._dialect.timeout, self._get())

    async def _get(self) -> None:
        begin = time.perf_counter()
        async with self._http.get(self._url, allow_redirects=False) as response:
            node = response.headers.get(self._dialect.node_header)
            if node:
                self.record.header_nodes.add(node)
            if response.status >= 400:
                body = await response.content.read(512)
                raise refusal(response.status, body.decode(errors="replace"))
            async for _ in response.content.iter_chunked(CHUNK):
                pass
        self.record.round_trips.append(time.perf_counter() - begin)
        if not node:
            raise Failure(f"no {self._dialect.node_header} header in the answer")
        self.record.opened = True

    async def abort(self) -> None:
        """Free the connection."""
        await self._http.close()
