"""Notifications to systemd (sd_notify(3))."""

import logging
import os
import re
import socket

log = logging.getLogger(__name__)


class Manager:
    """The service manager that started this process: systemd, or none (false)."""

    def __init__(self) -> None:
        # Removed, because gunicorn's master would report READY before its worker is.
        self._address = re.sub("^@", "\0", os.environ.pop("NOTIFY_SOCKET", ""))
        # Opened now, so that a worker without free descriptors can still send its heartbeat.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def __bool__(self) -> bool:
        return bool(self._address)

    def tell(self, state: bytes) -> None:
        """Send a state such as READY=1, if there is a manager.

        Raises:
            OSError: it was not sent, for example because systemd is busy.
        """
        if self:
            self._socket.sendto(state, self._address)

    def mention(self, state: bytes) -> None:
        """Send a state; if that fails, skip it."""
        try:
            self.tell(state)
        except OSError:
            log.debug("cannot send %r to systemd", state, exc_info=True)
