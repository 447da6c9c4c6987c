"""A gunicorn worker on eventlet: one green thread per connection, thousands of long-lived connections in a process.

gunicorn dropped its own such worker in release 26. This one serves `socketio.WSGIApp` over polling, WebSocket and the
upgrade between them (gunicorn passes the connection as `gunicorn.socket` in the WSGI environ). It survives running out
of file descriptors: until some are free again, it answers new connections so that the edge tries the next node.
"""

import contextlib
import functools
import os
import platform
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import Any

import eventlet
import eventlet.green.socket
import eventlet.hubs
import eventlet.patcher
import eventlet.tpool
import eventlet.wsgi
from eventlet.greenio import GreenSocket
from gunicorn.http.message import Request
from gunicorn.workers.base_async import AsyncWorker

from stickyring.node.connection import Connection
from stickyring.node.descriptors import OUT_OF_RESOURCES, Reserve

HEARTBEAT_SECONDS = 1.0
ACCEPT_PAUSE_SECONDS = 0.2
RELAY_BACKLOG = 2048
SUCCESSORS_ADDRESS = "127.0.0.1"
"""The client address of requests that the successor passes on: a Unix socket has none."""
LAST_REQUEST_SECONDS = 1.0
"""When the worker retires: how long it waits for the first or next request of a connection."""
TICK_SECONDS = 0.02
EVENTLET_SKIP_VARIABLE = "PYTEST_CURRENT_TEST"
RESOLVERS = ("getaddrinfo", "gethostbyaddr", "gethostbyname", "gethostbyname_ex", "getnameinfo")


class EventletWorker(AsyncWorker):
    """The worker class `stickyring.node.worker.EventletWorker` for gunicorn 27 and eventlet 0.41.

    It uses these settings of gunicorn: `worker_connections` (most green threads; further connections wait in the
    backlog), `keepalive` (seconds that a connection may wait for the head of its next request) and `graceful_timeout`
    (seconds between SIGTERM and the master's SIGKILL).
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self._retired = False
        self._acceptors: list[Any] = []
        self._listeners: list[GreenSocket] = []
        # Connections before their first request, and those between two requests.
        self._unheard: set[Connection] = set()
        self._idle: set[Connection] = set()
        self._requests: set[Request] = set()
        self._reserve: Reserve | None = None

    def init_process(self) -> None:
        """Patch the standard library before the application is imported; the master stays unpatched."""
        # Set explicitly: the asyncio hub, which EVENTLET_HUB can select, fails with gunicorn's signal handling.
        eventlet.hubs.use_hub("epolls")
        with _uncounted_locks():
            eventlet.monkey_patch()
        _resolve_in_threads()
        # The standard library's sendfile refuses non-blocking sockets, and all of eventlet's are non-blocking.
        self.cfg.set("sendfile", False)
        super().init_process()

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
        connections = eventlet.GreenPool(self.worker_connections)
        self._reserve = Reserve()
        self._listeners = [GreenSocket(listener.sock) for listener in self.sockets]
        self._acceptors = [eventlet.spawn(self._accept, listener, connections) for listener in self._listeners]

        while self.alive and self.ppid == os.getppid():
            self.notify()
            self._wait_for_signal(HEARTBEAT_SECONDS)

        self._stop_accepting()
        # Idle connections stay open: the edge may just be sending a request on one.
        self._let_requests_be_the_last()
        # End before graceful_timeout, when the master kills.
        with eventlet.Timeout(max(self.cfg.graceful_timeout - HEARTBEAT_SECONDS, 0), False):
            connections.waitall()

    def retire(self) -> str:
        """Leave the listening socket to another process, close connections, and have the master drain and end.

        Accepted connections are answered, but each carries at most one more request, so the edge soon sends nothing
        here. New requests of sessions that are still here reach the other process, which passes them on to the Unix
        socket whose name is returned (Linux's abstract namespace, without the leading NUL byte).
        """
        self._retired = True
        self._stop_accepting()
        relayed = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        relayed.bind("")
        relayed.listen(RELAY_BACKLOG)
        listener = GreenSocket(relayed)
        self._listeners = [listener]
        self._acceptors = [eventlet.spawn(self._accept, listener, eventlet.GreenPool(self.worker_connections))]
        # Idle connections stay open for one more request: one may be on its way.
        self._let_requests_be_the_last()
        eventlet.spawn(self._end_when_all_are_heard)
        name: bytes = relayed.getsockname()
        return name[1:].decode()

    def _let_requests_be_the_last(self) -> None:
        """Close each busy connection after its current request."""
        for request in self._requests:
            request.force_close()

    def _end_when_all_are_heard(self) -> None:
        # The drain must not refuse the first request of a connection that was accepted before it.
        with eventlet.Timeout(LAST_REQUEST_SECONDS, False):
            eventlet.sleep(TICK_SECONDS)
            while self._unheard or self._idle:
                eventlet.sleep(TICK_SECONDS)
        for client in self._idle:
            # A request that has already arrived can still be read.
            _stop_reading(client.fd)
        os.kill(self.ppid, signal.SIGTERM)

    def _stop_accepting(self) -> None:
        # kill() lets accepted connections start before the listener is closed; they do not need it any more.
        for acceptor in self._acceptors:
            acceptor.kill()
        for listener in self._listeners:
            listener.close()

    def _wait_for_signal(self, seconds: float) -> None:
        """Return at the next signal or after `seconds`: gunicorn writes a byte into this pipe for every signal."""
        with eventlet.Timeout(seconds, False):
            eventlet.hubs.trampoline(self.PIPE[0], read=True)
            os.read(self.PIPE[0], 4096)

    def _accept(self, listener: GreenSocket, connections: eventlet.GreenPool) -> None:
        """Give every connection a green thread, for ever; log when descriptors run out and when they are back."""
        warned = False
        while True:
            try:
                client, address = listener.fd.accept()
            except BlockingIOError:
                eventlet.hubs.trampoline(listener, read=True)
                continue
            except OSError as error:
                # Other errors (ECONNABORTED, a network error of the peer) concern only the one lost connection.
                if error.errno in OUT_OF_RESOURCES:
                    if not warned:
                        self.log.warning("refusing connections for now: %s", error.strerror)
                    warned = True
                    # Let other green threads run, which may free descriptors.
                    refused = self._reserve is not None and self._reserve.refuse(listener.fd)
                    eventlet.sleep(0 if refused else ACCEPT_PAUSE_SECONDS)
                continue
            if warned and not self.exhausted:
                self.log.warning("accepting connections again")
                warned = False
            connections.spawn_n(self.handle, listener, Connection(client), address)

    def handle(self, listener: GreenSocket, client: Connection, address: object) -> None:
        """Serve one connection."""
        self._unheard.add(client)
        try:
            super().handle(listener, client, address or (SUCCESSORS_ADDRESS, 0))
        finally:
            self._unheard.discard(client)
            self._idle.discard(client)
        client.serve_on()

    def handle_request(self, listener_name: object, request: Request, client: Connection, address: object) -> bool:
        """Serve one request, and keep track of the connection's state."""
        self._unheard.discard(client)
        self._idle.discard(client)
        if self._retired:
            request.force_close()
        self._requests.add(request)
        client.hold()
        try:
            if isinstance(listener_name, bytes):
                listener_name = (SUCCESSORS_ADDRESS, 0)
            answered = super().handle_request(listener_name, request, client, address)
        finally:
            self._requests.discard(request)
            client.release()
        if client.handed_over:
            # A middleware has answered for the WebSocket. Nothing more may be read here.
            raise StopIteration
        self._idle.add(client)
        return bool(answered)

    def timeout_ctx(self) -> eventlet.Timeout:
        """Bound the wait for a request; without one, gunicorn closes the connection."""
        return eventlet.Timeout(self.cfg.keepalive, False)

    def is_already_handled(self, respiter: object) -> bool:
        """Tell gunicorn that the connection was a WebSocket, so that it writes nothing more to it."""
        if getattr(eventlet.wsgi.WSGI_LOCAL, "already_handled", False):
            raise StopIteration
        return bool(super().is_already_handled(respiter))

    def handle_quit(self, sig: signal.Signals, frame: FrameType | None) -> None:
        """End at once (SIGINT, SIGQUIT); in a green thread, because gunicorn's handler sleeps and the hub must not."""
        eventlet.spawn(super().handle_quit, sig, frame)

    def handle_usr1(self, sig: signal.Signals, frame: FrameType | None) -> None:
        """Reopen log files; in a green thread, because that takes locks, and the hub must not wait for them."""
        eventlet.spawn(super().handle_usr1, sig, frame)


@contextlib.contextmanager
def _uncounted_locks() -> Iterator[None]:
    """On PyPy, keep eventlet from counting the locks that it has not patched, which walks all memory each time.

    It would warn of the locks of functools.lru_cache, which PyPy has in Python. They are harmless: no green thread
    holds one while another runs. eventlet itself skips the count when this variable is set.
    """
    if platform.python_implementation() != "PyPy":
        yield
        return
    os.environ[EVENTLET_SKIP_VARIABLE] = "stickyring on PyPy"
    try:
        yield
    finally:
        del os.environ[EVENTLET_SKIP_VARIABLE]


def _resolve_in_threads() -> None:
    """Have the system resolve names, in threads, so that the worker serves others meanwhile.

    eventlet's own resolver (greendns) does not know nsswitch.conf.
    """
    system, threads = eventlet.patcher.original("socket"), eventlet.patcher.original("threading")
    workers_thread = threads.get_ident()

    def resolve(name: str, *arguments: object, **options: object) -> object:
        function = getattr(system, name)
        if threads.get_ident() != workers_thread:
            return function(*arguments, **options)
        return eventlet.tpool.execute(function, *arguments, **options)

    for name in RESOLVERS:
        for module in (socket, eventlet.green.socket):
            setattr(module, name, functools.partial(resolve, name))


def _stop_reading(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RD)
