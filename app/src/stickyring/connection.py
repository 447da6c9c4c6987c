"""A client's connection on eventlet, made for a WebSocket: many small messages each way, and mostly waiting for one.

For each wait, eventlet's own socket tells epoll that it waits and that it no longer does, and sets and clears a timer.
This one stays registered, and looks at the clock once a timeout.
"""

import contextlib
import socket
import time
from typing import Any

import eventlet
import eventlet.hubs
from eventlet.greenio import GreenSocket


class Connection(GreenSocket):
    """An accepted connection, which one green thread reads.

    `send_at_once` may be called by any green thread, also while another one is in `sendall`.
    """

    def __init__(self, accepted: socket.socket) -> None:
        # accept(2) in the patched standard library has wrapped it already.
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self._reader: Any = None
        self._listener: Any = None
        self._timer: Any = None
        self._deadline = 0.0
        self._sending = False
        self._rest: Any = None
        self._holding = False
        self._held = b""
        del self.close  # eventlet's, which forgets who waits

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """Return at most `bufsize` bytes, waiting for the first of them; none when the client has ended."""
        if self._held:
            self.release()
        while True:
            self._wait_until_readable()
            try:
                return self.fd.recv(bufsize, flags)  # type: ignore[no-any-return]
            except BlockingIOError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                return b""

    def recv_into(self, buffer: bytearray | memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """Read into a buffer, as `recv` does."""
        data = self.recv(nbytes or len(buffer), flags)
        buffer[: len(data)] = data
        return len(data)

    def _wait_until_readable(self) -> None:
        hub = eventlet.hubs.get_hub()
        self._reader = eventlet.getcurrent()
        if self._listener is None:
            self._listener = hub.add(hub.READ, self.fd.fileno(), self._wake, self._reader.throw, self._mark_as_closed)
        self._start_the_clock()
        try:
            hub.switch()
        finally:
            self._reader = None

    def _wake(self, _: object) -> None:
        if self._reader is not None:
            self._reader.switch()
        elif self._listener is not None:
            # Nobody reads for now: epoll would tell it over and over.
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
        """Bound each wait for bytes, one that has begun included, to so many seconds."""
        super().settimeout(howlong)
        self._stop_the_clock()
        if self._reader is not None:
            self._start_the_clock()

    def close(self) -> None:
        """Close it; whoever reads meets its end, and closes it again."""
        if self._reader is not None:
            with contextlib.suppress(OSError):
                self.fd.shutdown(socket.SHUT_RDWR)
            return
        if self._listener is not None:
            self._forget()
        self._stop_the_clock()
        self.fd.close()

    def hold(self) -> None:
        """Send what is sent next, the head of an answer, together with what follows, or when it is released."""
        self._holding = True

    def release(self) -> None:
        """Hold nothing back any more."""
        self._holding = False
        if self._held:
            self.sendall(b"")

    def sendall(self, data: bytes, flags: int = 0) -> None:
        """Send all of it, after what others are sending."""
        if self._holding:
            self._holding, self._held = False, data
            return
        if self._held:
            data, self._held = self._held + data, b""
        if self._rest is not None:
            self._rest.wait()
        self._sending = True
        try:
            super().sendall(data, flags)
        finally:
            self._sending = False

    def send_at_once(self, data: bytes) -> bool:
        """Send it without waiting, if nobody else is sending; return whether it is on its way, all of it."""
        if self._sending or self._held or self._rest is not None:
            return False
        try:
            sent = self.fd.send(data)
        except OSError:
            return False
        if sent < len(data):
            self._rest = eventlet.spawn(self._send_rest, data[sent:])
        return True

    def _send_rest(self, data: bytes) -> None:
        try:
            super().sendall(data)
        except OSError:
            # What has begun cannot be left out: nothing can follow it.
            with contextlib.suppress(OSError):
                self.fd.shutdown(socket.SHUT_RDWR)
        finally:
            self._rest = None
