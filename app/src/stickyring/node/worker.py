"""A gunicorn worker on eventlet: one green thread a connection, thousands of long-lived ones in a process.

gunicorn had such a worker until 25.3 and dropped it in 26. This one carries `socketio.WSGIApp` over polling, WebSocket
and the upgrade between them (gunicorn hands the connection over as `gunicorn.socket` in the WSGI environ). It outlives
running out of file descriptors: new connections are refused until there are some again, in the way that has the edge
try the next node.
"""

import contextlib
import errno
import math
import os
import platform
import signal
import socket
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import eventlet
import eventlet.hubs
import eventlet.wsgi
from eventlet.greenio import GreenSocket
from gunicorn.http.message import Request
from gunicorn.workers.base_async import AsyncWorker

from stickyring.node.connection import Connection

HEARTBEAT_SECONDS = 1.0
ACCEPT_PAUSE_SECONDS = 0.2
RELAY_BACKLOG = 2048
RECOVERED_SECONDS = 1.0
"""How long nobody was refused when descriptors are said to be back."""
SUCCESSORS_ADDRESS = "127.0.0.1"
"""Whom a request seems to come from that the successor passes on; a Unix socket has no address."""
LAST_REQUEST_SECONDS = 1.0
"""How long connections may take to bring their first or next request, when the worker retires."""
TICK_SECONDS = 0.02
OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""What accept(2) answers while the connection stays in the backlog, waiting for the process to have room again."""
READABLE_BYTES = 65536
EVENTLET_SKIP_VARIABLE = "PYTEST_CURRENT_TEST"


class EventletWorker(AsyncWorker):
    """The worker class `stickyring.node.worker.EventletWorker` for gunicorn 27 and eventlet 0.41.

    Of gunicorn's settings it heeds `worker_connections` (green threads at most; beyond it connections wait in the
    backlog), `keepalive` (seconds that a connection may wait for its next request, and for that request's head) and
    `graceful_timeout` (seconds between SIGTERM and the master's SIGKILL).
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self._retired = False
        self._acceptors: list[Any] = []
        self._listeners: list[GreenSocket] = []
        # Connections that have not asked anything yet, and those between two requests.
        self._unheard: set[Connection] = set()
        self._idle: set[Connection] = set()
        self._requests: set[Request] = set()
        self._spare: int | None = None
        self._refused_at = -math.inf

    def init_process(self) -> None:
        """Make the standard library cooperative before the application is imported; the master stays as it is."""
        # Named, because the hub that EVENTLET_HUB=asyncio asks for does not live with gunicorn's signal handling.
        eventlet.hubs.use_hub("epolls")
        with _uncounted_locks():
            eventlet.monkey_patch()
        # sendfile(2) in the standard library refuses sockets that do not block, and all of eventlet's are such.
        self.cfg.set("sendfile", False)
        super().init_process()

    @property
    def exhausted(self) -> bool:
        """Whether connections are being refused, because descriptors have run out."""
        return time.monotonic() < self._refused_at + RECOVERED_SECONDS

    @property
    def _refusal(self) -> bytes:
        # Imported here: at the module's own import, the standard library is not patched yet.
        from stickyring.node.takeover import ELSEWHERE_HEADER  # noqa: PLC0415

        head = ("HTTP/1.1 503 Service Unavailable", f"{ELSEWHERE_HEADER}: 1", "Content-Length: 0", "Connection: close")
        return "\r\n".join([*head, "", ""]).encode()

    def run(self) -> None:
        """Accept and serve until SIGTERM or until the master is gone, then let running requests end."""
        connections = eventlet.GreenPool(self.worker_connections)
        self._spare = _spare_descriptor()
        self._listeners = [GreenSocket(listener.sock) for listener in self.sockets]
        self._acceptors = [eventlet.spawn(self._accept, listener, connections) for listener in self._listeners]

        while self.alive and self.ppid == os.getppid():
            self.notify()
            self._wait_for_signal(HEARTBEAT_SECONDS)

        self._stop_accepting()
        # Not the idle ones: an edge that keeps connections may just be sending on one.
        self._let_requests_be_the_last()
        # The master kills at graceful_timeout; ending before it means ending by ourselves.
        with eventlet.Timeout(max(self.cfg.graceful_timeout - HEARTBEAT_SECONDS, 0), False):
            connections.waitall()

    def retire(self) -> str:
        """Leave the listening socket to another process, use up the connections, and have the master drain and end.

        What is accepted is answered, and each connection carries one more request at most, so that an edge that keeps
        connections soon sends nothing here any more. Requests of sessions that are still here reach the other process
        from now on: it passes them on to the Unix socket whose name is returned, in Linux's abstract namespace and
        without the NUL byte that it begins with.
        """
        self._retired = True
        self._stop_accepting()
        relayed = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        relayed.bind("")
        relayed.listen(RELAY_BACKLOG)
        listener = GreenSocket(relayed)
        self._listeners = [listener]
        self._acceptors = [eventlet.spawn(self._accept, listener, eventlet.GreenPool(self.worker_connections))]
        # Not the idle ones: a request that is on its way to one would meet it closed. After the next it is used up.
        self._let_requests_be_the_last()
        eventlet.spawn(self._end_when_all_are_heard)
        name: bytes = relayed.getsockname()
        return name[1:].decode()

    def _let_requests_be_the_last(self) -> None:
        """Have those that are being answered be their connections' last."""
        for request in self._requests:
            request.force_close()

    def _end_when_all_are_heard(self) -> None:
        # Whoever has been accepted and is about to ask did not come to a node that drains.
        with eventlet.Timeout(LAST_REQUEST_SECONDS, False):
            eventlet.sleep(TICK_SECONDS)
            while self._unheard or self._idle:
                eventlet.sleep(TICK_SECONDS)
        for client in self._idle:
            # A request that is there already can still be read.
            _stop_reading(client.fd)
        os.kill(self.ppid, signal.SIGTERM)

    def _stop_accepting(self) -> None:
        # Killing lets others run: what was accepted has begun, and needs the listener no more, when that is closed.
        for acceptor in self._acceptors:
            acceptor.kill()
        for listener in self._listeners:
            listener.close()

    def _wait_for_signal(self, seconds: float) -> None:
        """Return at the next signal, at the latest after `seconds`: every signal writes a byte into the base's pipe."""
        with eventlet.Timeout(seconds, False):
            eventlet.hubs.trampoline(self.PIPE[0], read=True)
            os.read(self.PIPE[0], 4096)

    def _accept(self, listener: GreenSocket, connections: eventlet.GreenPool) -> None:
        """Give every connection a green thread, for ever; one line when descriptors run out, one when they are back."""
        warned = False
        while True:
            try:
                client, address = listener.fd.accept()
            except BlockingIOError:
                eventlet.hubs.trampoline(listener, read=True)
                continue
            except OSError as error:
                # Anything else (ECONNABORTED, a network error of the peer's) concerns the one connection that is gone.
                if error.errno in OUT_OF_RESOURCES:
                    if not warned:
                        self.log.warning("refusing connections for now: %s", error.strerror)
                    warned, self._refused_at = True, time.monotonic()
                    # Others run meanwhile, who may give descriptors back.
                    eventlet.sleep(0 if self._refuse(listener.fd) else ACCEPT_PAUSE_SECONDS)
                continue
            if warned and not self.exhausted:
                self.log.warning("accepting connections again")
                warned = False
            connections.spawn_n(self.handle, listener, Connection(client), address)

    def _refuse(self, listener: socket.socket) -> bool:
        """Answer a connection from the backlog with 503, on the descriptor kept for it; return whether that was done.

        Left waiting, it would hang: the edge took it for accepted, as its health checks come by a connection that they
        have. Nothing in here lets others run, who would take the descriptor.
        """
        if self._spare is not None:
            os.close(self._spare)
        try:
            client, _ = listener.accept()
        except OSError:
            return False
        else:
            with client:
                client.setblocking(False)
                # Closed with something unread, the connection would be reset, and the answer maybe lost.
                with contextlib.suppress(OSError):
                    client.recv(READABLE_BYTES)
                with contextlib.suppress(OSError):
                    client.send(self._refusal)
            return True
        finally:
            self._spare = _spare_descriptor()

    def handle(self, listener: GreenSocket, client: Connection, address: object) -> None:
        """Serve one connection."""
        self._unheard.add(client)
        try:
            super().handle(listener, client, address or (SUCCESSORS_ADDRESS, 0))
        finally:
            self._unheard.discard(client)
            self._idle.discard(client)

    def handle_request(self, listener_name: object, request: Request, client: Connection, address: object) -> bool:
        """Serve one request, and know meanwhile and afterwards what the connection is doing."""
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
        self._idle.add(client)
        return bool(answered)

    def timeout_ctx(self) -> eventlet.Timeout:
        """Bound the wait for a request; gunicorn closes the connection when it ends without one."""
        return eventlet.Timeout(self.cfg.keepalive, False)

    def is_already_handled(self, respiter: object) -> bool:
        """Tell gunicorn that a WebSocket has used the connection up: nothing may be written to it any more."""
        if getattr(eventlet.wsgi.WSGI_LOCAL, "already_handled", False):
            raise StopIteration
        return bool(super().is_already_handled(respiter))

    def handle_quit(self, sig: signal.Signals, frame: FrameType | None) -> None:
        """End at once (SIGINT, SIGQUIT); in a green thread, as the base's handler sleeps and the hub must not."""
        eventlet.spawn(super().handle_quit, sig, frame)

    def handle_usr1(self, sig: signal.Signals, frame: FrameType | None) -> None:
        """Reopen log files; in a green thread, as that takes locks, which the hub must not wait for."""
        eventlet.spawn(super().handle_usr1, sig, frame)


@contextlib.contextmanager
def _uncounted_locks() -> Iterator[None]:
    """On PyPy, keep eventlet from counting the locks that it has not patched: that takes a walk of all memory each.

    It would warn of those of functools.lru_cache, which PyPy has in Python, and which no green thread holds while
    another one runs. The variable is the one by which eventlet itself knows where the count means nothing.
    """
    if platform.python_implementation() != "PyPy":
        yield
        return
    os.environ[EVENTLET_SKIP_VARIABLE] = "stickyring on PyPy"
    try:
        yield
    finally:
        del os.environ[EVENTLET_SKIP_VARIABLE]


def _spare_descriptor() -> int | None:
    """A descriptor to have one to give away; None if there is none."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _stop_reading(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RD)
