"""A gunicorn worker for ASGI applications, on asyncio with uvloop: uvicorn's HTTP, and WebSockets of this package.

Among the well-kept ASGI servers, uvicorn's protocol can be used with another accept loop and other WebSockets by what
it documents. The rest of `stickyring.node.worker` is here as well: it survives running out of file descriptors, leaves
idle connections to the edge when it ends, and hands its listening socket over.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from typing import Any
from urllib.parse import unquote

import uvloop
from gunicorn.workers.base import Worker
from uvicorn.config import Config
from uvicorn.lifespan.on import LifespanOn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from stickyring.node.asgi.gate import CHANNEL
from stickyring.node.asgi.websocket import Channel, WebSocket
from stickyring.node.descriptors import OUT_OF_RESOURCES, Reserve
from stickyring.node.websocket import VERSION

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
ACCEPT_PAUSE_SECONDS = 0.2
MOST_AT_ONCE = 64
"""How many connections are accepted before others get their turn."""
RELAY_BACKLOG = 2048
GOING_AWAY = 1001
LARGEST_HEAD, MOST_FIELDS = 131_072, 200
"""More than the edge's own limits, 32 KiB a field and 100 fields."""
LAST_REQUEST_SECONDS = 1.0
"""When the worker retires: how long it waits for the first or next request of a connection."""
TICK_SECONDS = 0.02


class AsgiWorker(Worker):
    """The worker class `asgi`; it uses the settings of gunicorn that `EventletWorker` uses."""

    asgi = True

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.retired = False
        self.connections: set[Connection] = set()
        self.channels: set[Channel] = set()  # of connections that are WebSockets
        self.server_state = ServerState()
        self._listeners: list[socket.socket] = []
        self._reserve: Reserve | None = None
        self._warned = False
        self._told = False  # that it ends at once
        self._tasks: set[asyncio.Future[object]] = set()

    def init_process(self) -> None:
        """Make the event loop, in which the application is imported."""
        self.loop = uvloop.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self._ended = asyncio.Event()
        super().init_process()

    def init_signals(self) -> None:
        """Have the event loop handle signals."""
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        handlers = {
            signal.SIGTERM: self._stop,
            signal.SIGINT: self._stop_at_once,
            signal.SIGQUIT: self._stop_at_once,
            signal.SIGUSR1: self.log.reopen_files,
            signal.SIGWINCH: lambda: None,
        }
        for number, handler in handlers.items():
            self.loop.add_signal_handler(number, handler)

    def load_wsgi(self) -> None:
        """Load the application, and await its lifespan's startup: before that, it does not serve.

        Raises:
            SystemExit: it does not start.
        """

        async def load() -> None:
            super(AsgiWorker, self).load_wsgi()
            self.config = Config(
                self.wsgi,
                http=Connection,
                ws="none",
                lifespan="auto",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=self.cfg.keepalive,
            )
            self.config.load()
            self.lifespan = LifespanOn(self.config)
            await self.lifespan.startup()

        self.loop.run_until_complete(load())
        if self.lifespan.should_exit:
            self.app.refuse("its lifespan startup has failed")
        # Otherwise each full collection walks all that was imported, while every user waits.
        gc.collect()
        gc.freeze()

    @property
    def exhausted(self) -> bool:
        """Whether connections are refused because file descriptors have run out."""
        return self._reserve is not None and self._reserve.exhausted

    @property
    def refused(self) -> int:
        """How many connections were refused for that reason."""
        return 0 if self._reserve is None else self._reserve.refused

    def run(self) -> None:
        """Accept and serve until SIGTERM or until the master is gone, then let running requests finish."""
        self.loop.run_until_complete(self._serve())

    def retire(self) -> str:
        """Leave the listening socket to another process, as `EventletWorker.retire`; called in another thread."""
        return asyncio.run_coroutine_threadsafe(self._retire(), self.loop).result()

    async def _serve(self) -> None:
        self._reserve = Reserve()
        self._listeners = [listener.sock for listener in self.sockets]
        for listener in self._listeners:
            listener.setblocking(False)
            self._listen(listener)
        while self.alive and self.ppid == os.getppid():
            self.notify()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), HEARTBEAT_SECONDS)
        self._stop_accepting()
        # Idle connections stay open: the edge may just be sending a request on one.
        self._let_requests_be_the_last()
        if not self._told:
            # End before graceful_timeout, when the master kills.
            seconds = max(self.cfg.graceful_timeout - HEARTBEAT_SECONDS, 0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    if self.wsgi.drain.final:
                        await asyncio.to_thread(self.app.draining.join, seconds)
                    await self.wsgi.end()
                    for channel in [*self.channels]:
                        channel.end(GOING_AWAY)
                    while self.connections or self.channels:
                        await asyncio.sleep(TICK_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_SECONDS / 2):
                    await self.lifespan.shutdown()

    def _stop(self) -> None:
        self.alive = False
        self._ended.set()

    def _stop_at_once(self) -> None:
        self._told = True
        self._stop()

    async def _retire(self) -> str:
        self.retired = True
        self._stop_accepting()
        relayed = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        relayed.bind("")
        relayed.listen(RELAY_BACKLOG)
        relayed.setblocking(False)
        self._listeners = [relayed]
        self._listen(relayed)
        # Idle connections stay open for one more request: one may be on its way.
        self._let_requests_be_the_last()
        self._keep(asyncio.ensure_future(self._end_when_all_are_heard()))
        name: bytes = relayed.getsockname()
        return name[1:].decode()

    async def _end_when_all_are_heard(self) -> None:
        # The drain must not refuse the first request of a connection that was accepted before it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_REQUEST_SECONDS):
                await asyncio.sleep(TICK_SECONDS)
                while any(not connection.busy for connection in self.connections):
                    await asyncio.sleep(TICK_SECONDS)
        for connection in self.connections:
            if not connection.busy:
                connection.end()
        os.kill(self.ppid, signal.SIGTERM)

    def _let_requests_be_the_last(self) -> None:
        """Close each busy connection after its current request."""
        for connection in self.connections:
            connection.let_request_be_the_last()

    def _listen(self, listener: socket.socket) -> None:
        self.loop.add_reader(listener.fileno(), self._accept, listener)

    def _stop_accepting(self) -> None:
        for listener in self._listeners:
            self.loop.remove_reader(listener.fileno())
            listener.close()
        self._listeners = []

    def _accept(self, listener: socket.socket) -> None:
        """Accept what waits; log when descriptors run out and when they are back."""
        for _ in range(MOST_AT_ONCE):
            try:
                client, _address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # Other errors (ECONNABORTED, a network error of the peer) concern only the one lost connection.
                if error.errno not in OUT_OF_RESOURCES or self._reserve is None:
                    continue
                if not self._warned:
                    self.log.warning("refusing connections for now: %s", error.strerror)
                self._warned = True
                if self._reserve.refuse(listener):
                    return
                self.loop.remove_reader(listener.fileno())
                self.loop.call_later(ACCEPT_PAUSE_SECONDS, self._listen_again, listener)
                return
            if self._warned and not self.exhausted:
                self.log.warning("accepting connections again")
                self._warned = False
            client.setblocking(False)
            self._keep(
                asyncio.ensure_future(self.loop.connect_accepted_socket(lambda: Connection(worker=self), client))
            )

    def _listen_again(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            self._listen(listener)

    def _keep(self, task: "asyncio.Future[Any]") -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP connection; a WebSocket leaves it for one of `stickyring.node.asgi.websocket`."""

    def __init__(self, *, worker: AsgiWorker, **_: object) -> None:
        super().__init__(config=worker.config, server_state=worker.server_state, app_state=worker.lifespan.state)
        self._worker = worker
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = self._fields = 0

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401 - a transport of either event loop
        """Begin."""
        super().connection_made(transport)
        self._worker.connections.add(self)
        self._expect_a_head()

    def on_message_begin(self) -> None:
        """Begin a request's head."""
        super().on_message_begin()
        self._head_bytes = self._fields = 0
        self._expect_a_head()

    def on_url(self, url: bytes) -> None:
        """Take a part of the target."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a field of the head."""
        self._fields += 1
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > LARGEST_HEAD or self._fields > MOST_FIELDS:
            raise ValueError("the head is too large")

    def _expect_a_head(self) -> None:
        """Close the connection if the next head takes too long; afterwards, uvicorn's own timer waits for the next."""
        self._forget_the_head()
        self._head_timer = self.loop.call_later(self.timeout_keep_alive, self.transport.close)

    def _forget_the_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._forget_the_head()
        self._worker.connections.discard(self)
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        """Begin a request; the worker may want it to be the connection's last."""
        self._forget_the_head()
        super().on_headers_complete()
        if self._worker.retired or not self._worker.alive:
            self.let_request_be_the_last()

    def let_request_be_the_last(self) -> None:
        """Close the connection after the request that is being answered."""
        if self.busy:
            self.cycle.keep_alive = False

    def end(self) -> None:
        """Close the idle connection, unless a request has arrived, which will be its last."""
        connection = self.transport.get_extra_info("socket")
        try:
            waiting = _has_unread_bytes(connection.fileno())
        except OSError:
            waiting = False
        if not waiting:
            self.transport.close()

    def _should_upgrade_to_ws(self) -> bool:
        return True

    def handle_websocket_upgrade(self) -> None:
        """Offer the WebSocket to the application, and leave the connection to it."""
        headers = dict(self.headers)
        if self.busy or self.scope["method"] != "GET":
            self.send_400_response("Not a WebSocket handshake.")
            return
        url = self.url.partition(b"?")
        self.connections.discard(self)
        self._worker.connections.discard(self)
        websocket = WebSocket(self.transport, headers.get(b"sec-websocket-key", b"").decode("latin-1"))
        valid = headers.get(b"sec-websocket-version") == VERSION.encode() and b"sec-websocket-key" in headers
        channel = Channel(websocket, valid=valid)
        path = self.root_path + unquote(url[0].decode("latin-1"))
        scope = {
            **self.scope,
            "type": "websocket",
            "scheme": "ws",
            "path": path,
            "raw_path": url[0],
            "query_string": url[2],
            "subprotocols": [
                one.strip() for one in headers.get(b"sec-websocket-protocol", b"").decode("latin-1").split(",") if one
            ],
            "extensions": {"websocket.http.response": {}},
            CHANNEL: channel,
        }
        self.transport.set_protocol(websocket)
        self._worker.channels.add(channel)
        websocket.on_lost = lambda: self._worker.channels.discard(channel)
        self._worker._keep(asyncio.ensure_future(self._offer(channel, scope)))

    async def _offer(self, channel: Channel, scope: dict[str, Any]) -> None:
        try:
            await self.app(scope, channel.receive, channel.send)
        except Exception:
            log.exception("Error handling WebSocket %s", scope["path"])
            channel.end(1011)
        else:
            if not channel.taken:
                channel.end(1000)


def _has_unread_bytes(descriptor: int) -> bool:
    """Return whether a connection has bytes that nobody has read."""
    duplicate = socket.socket(fileno=os.dup(descriptor))
    with duplicate:
        try:
            return bool(duplicate.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False
