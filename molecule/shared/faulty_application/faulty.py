"""The echo service as releases that must not be deployed, each with the fault that its name says."""

import os
import threading
from typing import TYPE_CHECKING

from stickyring.echo import create_application

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

LIFETIME_SECONDS = 10


def crashes_at_start() -> "WSGIApplication":
    """Raise before anything is served."""
    raise RuntimeError("this release cannot start")


def never_gets_ready() -> "WSGIApplication":
    """Wait forever."""
    threading.Event().wait()
    return create_application()


def fails_soon_after_start() -> "WSGIApplication":
    """Serve, and exit without a message after LIFETIME_SECONDS."""
    ending = threading.Timer(LIFETIME_SECONDS, os._exit, (70,))
    ending.daemon = True
    ending.start()
    return create_application()
