"""The listening socket of a node."""

import socket
from typing import Any

import click

BACKLOG = 2048
"""When a node comes back, its clients connect at once; beyond the backlog they would wait a second for TCP's retry."""


def listen(address: tuple[str, int]) -> socket.socket:
    """Bind and listen; return the socket. gunicorn itself would try five times and log each failure.

    Raises:
        click.ClickException: the address cannot be resolved or bound.
    """
    family, kind, protocol, where = _resolve(address)
    try:
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        # Only a listening socket keeps a second process from binding the same address.
        listener.listen(BACKLOG)
    except OSError as error:
        raise _cannot_listen(address, error) from None
    return listener


def check_address(listener: socket.socket, address: tuple[str, int]) -> None:
    """Check that the listening socket to take over has this address.

    Raises:
        click.ClickException: it has another one.
    """
    host, port, *_ = _resolve(address)[3]
    serving_host, serving_port, *_ = listener.getsockname()
    if host != serving_host or port not in {0, serving_port}:
        raise click.ClickException(
            f"the node listens on {address_text((serving_host, serving_port))}, not on {address_text(address)}: "
            "--replace cannot change the address, restart the node"
        )


def _resolve(address: tuple[str, int]) -> tuple[socket.AddressFamily, socket.SocketKind, int, tuple[Any, ...]]:
    """Return family, kind, protocol and address of the first socket address of a host name."""
    host, port = address
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
        raise _cannot_listen(address, error) from None
    family, kind, protocol, _, where = found[0]
    return family, kind, protocol, where


def _cannot_listen(address: tuple[str, int], error: Exception) -> click.ClickException:
    return click.ClickException(
        f"cannot listen on {address_text(address)}: {getattr(error, 'strerror', None) or error}"
    )


def address_text(address: tuple[str, int]) -> str:
    """Return address:port, an IPv6 address in brackets."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
