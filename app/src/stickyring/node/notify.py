"""What a node tells systemd, as sd_notify(3) describes it."""

import logging
import os
import re
import socket

log = logging.getLogger(__name__)


class Manager:
    """The service manager that has started this process: systemd, if there is one."""

    def __init__(self) -> None:
        # Taken away from gunicorn, whose master would say that it is ready before its worker is.
        self._address = re.sub("^@", "\0", os.environ.pop("NOTIFY_SOCKET", ""))
        # Opened now: a worker that has no descriptor left has to be able to say that it lives.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def __bool__(self) -> bool:
        return bool(self._address)

    def tell(self, state: bytes) -> None:
        """Tell it, if it is there: READY=1, for example.

        Raises:
            OSError: systemd is busy, for example.
        """
        if self:
            self._socket.sendto(state, self._address)

    def mention(self, state: bytes) -> None:
        """Tell it; one that is busy hears the next time."""
        try:
            self.tell(state)
        except OSError:
            log.debug("systemd does not take %r", state, exc_info=True)
