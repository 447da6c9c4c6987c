"""A client's connection on eventlet, optimised for answers sent in one piece and for mostly idle WebSockets.

For each wait, eventlet's own socket registers and unregisters with epoll, and sets and clears a timer. This one can
stay registered, and checks the clock once per timeout.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import eventlet
import eventlet.hubs
from eventlet.greenio import GreenSocket

INTERIM = b"HTTP/1.1 1"
"""Start of an interim answer: another answer or another protocol follows (RFC 9110, 15.2)."""


class Connection(GreenSocket):
    """An accepted connection, read by one green thread."""

    def __init__(self, accepted: socket.socket) -> None:
        # The patched standard library's accept() has already wrapped it.
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self._watching = False
        self._reader: Any = None
        self._listener: Any = None
        self._timer: Any = None
        self._deadline = 0.0
        self._holding = False
        self._held = b""
        self._serve: Callable[[], object] | None = None
        del self.close  # eventlet's own, which ignores a waiting reader

    def watch(self) -> None:
        """Stay registered with epoll from the next wait until the end; after that only `recv` and sending work."""
        self._watching = True

    def hand_over(self, serve: Callable[[], object]) -> None:
        """Have `serve_on` call this after the request, whose memory is then free.

        Until then, nothing can be sent, and the connection cannot be closed: whatever the request still does, such as
        an answer of a middleware that does not expect a WebSocket, is not for the client.
        """
        self._serve = serve

    @property
    def handed_over(self) -> bool:
        """Whether it waits for `serve_on`."""
        return self._serve is not None

    def serve_on(self) -> None:
        """Call what the connection was handed over to, and close it."""
        if self._serve is not None:
            serve, self._serve = self._serve, None
            try:
                serve()
            finally:
                self.close()

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """Return at most `bufsize` bytes, waiting for the first of them; none when the client has closed.

        Raises:
            TimeoutError: nothing has arrived within the timeout.
        """
        if self._held:
            self.release()
        if not self._watching:
            return super().recv(bufsize, flags)  # type: ignore[no-any-return]
        while True:
            self._wait_until_readable()
            try:
                return self.fd.recv(bufsize, flags)  # type: ignore[no-any-return]
            except BlockingIOError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                return b""

    @contextlib.contextmanager
    def heeding_its_end(self, then: Callable[[], object]) -> Iterator[None]:
        """Call `then`, in a green thread of its own, if the client closes the connection before the block ends.

        Nothing may read meanwhile: the client waits for an answer. If the client sends something, its end is not
        detected.
        """
        hub = eventlet.hubs.get_hub()
        listener: Any = None

        def look(_: object) -> None:
            forget()
            try:
                ended = not self.fd.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return
            except OSError:
                ended = True
            if ended:
                eventlet.spawn(then)

        def forget(_: object = None) -> None:
            nonlocal listener
            if listener is not None:
                hub.remove(listener)
                listener = None

        listener = hub.add(hub.READ, self.fd.fileno(), look, forget, forget)
        try:
            yield
        finally:
            forget()

    def _wait_until_readable(self) -> None:
        if self._reader is not None:
            raise RuntimeError("another green thread reads this connection")
        hub = eventlet.hubs.get_hub()
        self._reader = reader = eventlet.getcurrent()
        try:
            if self._listener is None:
                self._listener = hub.add(hub.READ, self.fd.fileno(), self._wake, reader.throw, self._mark_as_closed)
            self._start_the_clock()
            hub.switch()
        finally:
            self._reader = None

    def _wake(self, _: object) -> None:
        if self._reader is not None:
            self._reader.switch()
        elif self._listener is not None:
            # Nobody reads now, and epoll would report the data again and again.
            self._forget()

    def _start_the_clock(self) -> None:
        if self._timeout is not None:
            self._deadline = time.monotonic() + self._timeout
            if self._timer is None:
                self._timer = eventlet.hubs.get_hub().schedule_call_global(self._timeout, self._look_at_the_clock)

    def _stop_the_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_at_the_clock(self) -> None:
        self._timer = None
        if self._reader is None or self._timeout is None:
            return
        left = self._deadline - time.monotonic()
        if left <= 0:
            self._reader.throw(TimeoutError("timed out"))
        else:
            self._timer = eventlet.hubs.get_hub().schedule_call_global(left, self._look_at_the_clock)

    def _forget(self) -> None:
        listener, self._listener = self._listener, None
        eventlet.hubs.get_hub().remove(listener)

    def settimeout(self, howlong: float | None) -> None:
        """Bound each wait for bytes to `howlong` seconds; on a watched connection, a wait under way too."""
        super().settimeout(howlong)
        self._stop_the_clock()
        if self._reader is not None:
            self._start_the_clock()

    def close(self) -> None:
        """Close the connection; if a green thread is reading, it sees the end and closes it."""
        if self._serve is not None:
            return
        self._holding, self._held = False, b""
        if self._reader is not None:
            with contextlib.suppress(OSError):
                self.fd.shutdown(socket.SHUT_RDWR)
            return
        if self._listener is not None:
            self._forget()
        self._stop_the_clock()
        self.fd.close()

    def hold(self) -> None:
        """Hold back the next data, the head of an answer, to send it with what follows or on `release`."""
        self._holding = True

    def release(self) -> None:
        """Send what is held back."""
        self._holding = False
        if self._held:
            self.sendall(b"")

    def sendall(self, data: bytes, flags: int = 0) -> None:
        """Send all of `data`, or hold it back (see `hold`)."""
        if self._serve is not None:
            return
        if self._holding:
            self._holding = False
            if not data.startswith(INTERIM):
                self._held = data
                return
        if self._held:
            data, self._held = self._held + data, b""
        super().sendall(data, flags)

    def shutdown(self, how: int) -> None:
        """Shut the connection down, unless it is handed over."""
        if self._serve is None:
            self.fd.shutdown(how)

    def send_now(self, data: bytes) -> int:
        """Send as much of `data` as possible without waiting; return the number of bytes sent."""
        try:
            return self.fd.send(data)  # type: ignore[no-any-return]
        except OSError:
            return 0
