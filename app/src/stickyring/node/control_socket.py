"""The listening Unix socket of a node's control server, and its file."""

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

import click


class ControlSocket:
    """A listening Unix socket at `path` for this user only; it replaces a file that no process serves any more.

    With `beside`, the socket is at `path` plus `.next` until `move_in`; only one process can have that at a time. When
    this process ends, it removes the file only if it is still its own.

    Raises:
        click.ClickException: the socket cannot be created.
    """

    def __init__(self, path: Path, *, beside: bool = False) -> None:
        self.path = path
        self._beside = path.with_name(f"{path.name}.next")
        made = self._beside if beside else path
        self.listener = _listen(made, "another --replace is under way" if beside else "another process serves it")
        self._file = _identity(made)

    @property
    def waits(self) -> bool:
        """Whether its file is still there under the name with `.next`."""
        return _identity(self._beside) == self._file

    def move_in(self) -> None:
        """Move its file to `path`, replacing what is there."""
        self._beside.replace(self.path)

    def remove(self) -> None:
        """Remove its file, if it is still its own."""
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
        there = served if path.is_socket() else "the file exists and is not a socket"
        cause = there if error.errno == errno.EADDRINUSE else error.strerror or error
        raise click.ClickException(f"cannot make the control socket {path}: {cause}") from None
    finally:
        os.umask(before)
    return listener


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        # A busy process must not block this.
        caller.setblocking(False)
        return caller.connect_ex(str(path)) != errno.ECONNREFUSED


def _identity(path: Path) -> tuple[int, int] | None:
    """Return the file's device and inode; no other file gets them while the socket is open."""
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None
