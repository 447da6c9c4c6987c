"""The echo service as releases that must not be deployed; what each is called is what it does."""

import os
import threading
from typing import TYPE_CHECKING

from stickyring.echo import create_application

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

LIFETIME_SECONDS = 10


def crashes_at_start() -> "WSGIApplication":
    """Raise, before anything is served."""
    raise RuntimeError("this release cannot start")


def never_gets_ready() -> "WSGIApplication":
    """Wait for something that does not come."""
    threading.Event().wait()
    return create_application()


def dies_young() -> "WSGIApplication":
    """Serve, and end after LIFETIME_SECONDS without a word."""
    ending = threading.Timer(LIFETIME_SECONDS, os._exit, (70,))
    ending.daemon = True
    ending.start()
    return create_application()
