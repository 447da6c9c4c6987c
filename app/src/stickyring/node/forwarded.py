"""The scheme and the address of a request's client, as an edge tells them; nobody else is believed.

An edge ends TLS and the client's connection, so a node's own connection says neither. What an edge sends:
`X-Forwarded-Proto`, http or https, and `x-stickyring-client`, an IP address.
"""

import ipaddress
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = logging.getLogger(__name__)

SCHEME_VARIABLE = "HTTP_X_FORWARDED_PROTO"
CLIENT_VARIABLE = "HTTP_X_STICKYRING_CLIENT"
SCHEMES = ("http", "https")
FRESH_SECONDS = 1.0
"""How long a list of edges is taken for what the file has."""
LOOPBACK = ("127.0.0.1", "::1")


class Edges:
    """Who is believed: the addresses in a file, one a line, as it is now; loopback without a file, and without a line.

    The file is read again while the node serves, since a restart would cost users more than another edge is worth.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._addresses = frozenset(LOOPBACK)
        self._read_at = -FRESH_SECONDS

    def tell(self, environ: "WSGIEnvironment") -> None:
        """Put into `wsgi.url_scheme` and REMOTE_ADDR what the peer says of its client, if it is an edge."""
        if _canonical(environ.get("REMOTE_ADDR", "")) not in self._believed():
            return
        if (scheme := environ.get(SCHEME_VARIABLE)) in SCHEMES:
            environ["wsgi.url_scheme"] = scheme
        if client := _canonical(environ.get(CLIENT_VARIABLE, "")):
            environ["REMOTE_ADDR"] = client

    def _believed(self) -> frozenset[str]:
        if self._path is not None and time.monotonic() - self._read_at >= FRESH_SECONDS:
            self._read_at = time.monotonic()
            try:
                lines = self._path.read_text().split()
            except OSError as error:
                log.warning("cannot read the addresses of the edges: %s", error)
                lines = []
            self._addresses = frozenset(filter(None, map(_canonical, lines or LOOPBACK)))
        return self._addresses


def _canonical(address: str) -> str:
    """Return the one spelling of an IP address, that of IPv4 where IPv6 maps it; empty for what is none."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return ""
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)
