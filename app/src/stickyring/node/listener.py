"""The listening socket of a node."""

import socket
from typing import Any

import click

BACKLOG = 2048
"""Clients of a node that comes back connect at once; those beyond it would wait for TCP's next try, a second."""


def listen(address: tuple[str, int]) -> socket.socket:
    """Bind and listen here, where a failure is one line: gunicorn would try five times and log each."""
    family, kind, protocol, where = _resolve(address)
    try:
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        # Only a listening socket keeps a second process from taking the same address.
        listener.listen(BACKLOG)
    except OSError as error:
        raise _cannot_listen(address, error) from None
    return listener


def check_address(listener: socket.socket, address: tuple[str, int]) -> None:
    """Refuse to take over the listening socket of another address than the one that is asked for."""
    host, port, *_ = _resolve(address)[3]
    serving_host, serving_port, *_ = listener.getsockname()
    if host != serving_host or port not in {0, serving_port}:
        raise click.ClickException(
            f"the node listens on {address_text((serving_host, serving_port))} and not on {address_text(address)}: "
            "an address cannot be taken over, restart the node"
        )


def _resolve(address: tuple[str, int]) -> tuple[socket.AddressFamily, socket.SocketKind, int, tuple[Any, ...]]:
    """Return family, kind, protocol and address of the first socket address that the name has."""
    host, port = address
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # the latter from a host name that no resolver can take
        raise _cannot_listen(address, error) from None
    family, kind, protocol, _, where = found[0]
    return family, kind, protocol, where


def _cannot_listen(address: tuple[str, int], error: Exception) -> click.ClickException:
    return click.ClickException(
        f"cannot listen on {address_text(address)}: {getattr(error, 'strerror', None) or error}"
    )


def address_text(address: tuple[str, int]) -> str:
    """Return address:port, with the brackets that an IPv6 address has there."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
