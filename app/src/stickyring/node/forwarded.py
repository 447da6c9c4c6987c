"""The scheme and the address of a request's client, from headers that only edges are trusted to send.

The edge terminates TLS and the client's connection, so the node's own connection shows neither. The edge sends
`X-Forwarded-Proto`, http or https, and `x-stickyring-client`, an IP address.
"""

import functools
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
"""How long the list of edges is cached before the file is read again."""
LOOPBACK = ("127.0.0.1", "::1")


class Edges:
    """The trusted addresses: those in a file, one per line; loopback without a file or if the file is empty.

    The file is read again while the node serves, so that a new edge does not need a restart.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._addresses = frozenset(LOOPBACK)
        self._read_at = -FRESH_SECONDS

    def tell(self, environ: "WSGIEnvironment") -> bool:
        """Set `wsgi.url_scheme` and REMOTE_ADDR to what the peer's headers say, if it is an edge.

        Return whether it is an edge's own request: for a user, an edge names the address.
        """
        if canonical(environ.get("REMOTE_ADDR", "")) not in self._believed():
            return False
        if (scheme := environ.get(SCHEME_VARIABLE)) in SCHEMES:
            environ["wsgi.url_scheme"] = scheme
        if client := canonical(environ.get(CLIENT_VARIABLE, "")):
            environ["REMOTE_ADDR"] = client
        return CLIENT_VARIABLE not in environ

    def _believed(self) -> frozenset[str]:
        if self._path is not None and time.monotonic() - self._read_at >= FRESH_SECONDS:
            self._read_at = time.monotonic()
            try:
                lines = self._path.read_text().split()
            except OSError as error:
                log.warning("cannot read the addresses of the edges: %s", error)
                lines = []
            self._addresses = frozenset(filter(None, map(canonical, lines or LOOPBACK)))
        return self._addresses


@functools.lru_cache(maxsize=4096)
def canonical(address: str) -> str:
    """Return an IP address in canonical form, an IPv4-mapped one as IPv4; empty if it is not an address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return ""
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)
