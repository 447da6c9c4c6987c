"""What a worker does when it has no file descriptors left for the connections that arrive."""

import contextlib
import errno
import math
import os
import socket
import time

OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors of accept(2) that leave the connection in the backlog until the process has resources again."""
RECOVERED_SECONDS = 1.0
"""After the last refusal, descriptors count as exhausted for this long."""
READABLE_BYTES = 65536


class Reserve:
    """A spare descriptor, with which connections are refused while there is no other; `refused` counts them."""

    def __init__(self) -> None:
        self._spare = _spare_descriptor()
        self._refused_at = -math.inf
        self.refused = 0

    @property
    def exhausted(self) -> bool:
        """Whether connections are refused because file descriptors have run out."""
        return time.monotonic() < self._refused_at + RECOVERED_SECONDS

    def refuse(self, listener: socket.socket) -> bool:
        """Answer a connection from the backlog with 503, using the spare descriptor; return whether that worked.

        Otherwise the connection would hang: to the edge it looks accepted, and health checks use a connection of their
        own. Nothing here may yield, because another green thread would take the descriptor.
        """
        # Imported here: this module is imported before a worker patches the standard library.
        from stickyring.node.takeover import ELSEWHERE_HEADER  # noqa: PLC0415

        self._refused_at = time.monotonic()
        if self._spare is not None:
            os.close(self._spare)
        try:
            client, _ = listener.accept()
        except OSError:
            return False
        else:
            with client:
                client.setblocking(False)
                # Closing with unread data would reset the connection and could lose the answer.
                with contextlib.suppress(OSError):
                    client.recv(READABLE_BYTES)
                head = (f"{ELSEWHERE_HEADER}: 1", "Content-Length: 0", "Connection: close")
                with contextlib.suppress(OSError):
                    client.send("\r\n".join(["HTTP/1.1 503 Service Unavailable", *head, "", ""]).encode())
            self.refused += 1
            return True
        finally:
            self._spare = _spare_descriptor()


def _spare_descriptor() -> int | None:
    """Return a descriptor to keep in reserve; None if there is none."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
