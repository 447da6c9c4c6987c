"""The echo service as releases that must not be deployed, each with the fault that its name says.

The first four fail wherever they are loaded. The others fail only in a unit of systemd, as if its sandbox refused
something: the check before a deployment cannot find them.
"""

import importlib
import os
import threading
from typing import TYPE_CHECKING

import socketio
from stickyring.echo import create_application

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

LIFETIME_SECONDS = 10
AS_A_UNIT = "INVOCATION_ID" in os.environ


def crashes_when_loaded() -> "WSGIApplication":
    """Raise before anything is served."""
    raise RuntimeError("this release cannot be loaded")


def never_loads() -> "WSGIApplication":
    """Wait forever."""
    threading.Event().wait()
    return create_application()


def lacks_a_package() -> "WSGIApplication":
    """Import what no release has."""
    importlib.import_module("database")
    return create_application()


def has_another_async_mode() -> "WSGIApplication":
    """Serve with a Socket.IO server for another worker class."""
    return socketio.WSGIApp(socketio.Server(async_mode="gevent"))


def crashes_at_start() -> "WSGIApplication":
    """Raise before anything is served."""
    if AS_A_UNIT:
        raise RuntimeError("this release cannot start")
    return create_application()


def never_gets_ready() -> "WSGIApplication":
    """Wait forever."""
    if AS_A_UNIT:
        threading.Event().wait()
    return create_application()


def fails_soon_after_start() -> "WSGIApplication":
    """Serve, and exit without a message after LIFETIME_SECONDS."""
    ending = threading.Timer(LIFETIME_SECONDS, os._exit, (70,))
    ending.daemon = True
    ending.start()
    return create_application()
