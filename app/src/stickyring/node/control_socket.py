"""The listening Unix socket of a node's control server, and the file by which it is found."""

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

import click


class ControlSocket:
    """A listening Unix socket that only this user may use, in place of one that nobody serves any more.

    With `beside`, it waits under a name of its own next to `path` until `move_in`; at most one of that kind is there at
    a time. The file may be another process's by the time that this one ends: only one's own is removed.

    Raises:
        click.ClickException: it cannot be had.
    """

    def __init__(self, path: Path, *, beside: bool = False) -> None:
        self.path = path
        self._beside = path.with_name(f"{path.name}.next")
        made = self._beside if beside else path
        self.listener = _listen(made, "another --replace is under way" if beside else "another process serves it")
        self._file = _identity(made)

    @property
    def waits(self) -> bool:
        """Whether it is still to be found beside the path."""
        return _identity(self._beside) == self._file

    def move_in(self) -> None:
        """Take the place of whatever is at the path."""
        self._beside.replace(self.path)

    def remove(self) -> None:
        """Remove its file, if that is still its own."""
        for path in (self.path, self._beside):
            if _identity(path) == self._file:
                path.unlink(missing_ok=True)


def _listen(path: Path, served: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        if path.is_socket() and not _is_served(path):
            path.unlink()
        listener.bind(str(path))
        listener.listen()
    except OSError as error:
        there = served if path.is_socket() else "there is something else"
        cause = there if error.errno == errno.EADDRINUSE else error.strerror or error
        raise click.ClickException(f"cannot make the control socket {path}: {cause}") from None
    finally:
        os.umask(before)
    return listener


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        # One that is too busy to take the call must not hold this up.
        caller.setblocking(False)
        return caller.connect_ex(str(path)) != errno.ECONNREFUSED


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file that is; as long as a socket is open, no other file gets its number."""
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None
