"""What one client may take: so many messages and bytes a second, and so many sessions for the clients of an address."""

import functools
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from stickyring.node.forwarded import canonical

BURST_SECONDS = 10.0
"""A client that has been quiet for so long may send all that it could have sent meanwhile at once."""
KINDS = ("messages", "bytes", "sessions")
NETWORK_BITS = 64
"""The part of an IPv6 address that a provider gives to one customer; the customer chooses the rest."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may take; 0 is no limit. What is not enforced is only counted.

    - `messages`, `size`: what a session may send in a second on average, `size` in bytes.
    - `sessions`: how many sessions the clients of one address may have open here.
    """

    messages: float = 0
    size: float = 0
    sessions: int = 0
    enforced: bool = True


NO_LIMITS = Limits()


@functools.lru_cache(maxsize=4096)
def network_of(address: str) -> str:
    """Return what counts as one address: an IPv4 address, or the network of an IPv6 one."""
    known = canonical(address)
    return str(ipaddress.ip_network((known, NETWORK_BITS), strict=False)) if ":" in known else known or address


class Allowance:
    """The token buckets of one session.

    `on_exceeded` is called with `messages` or `bytes` when the session exceeds that limit for the first time.
    """

    __slots__ = ("_at", "_exceeded", "_limits", "_on_exceeded", "_tokens")

    def __init__(self, limits: Limits, on_exceeded: Callable[[str], None]) -> None:
        self._limits = limits
        self._on_exceeded = on_exceeded
        self._exceeded: set[str] = set()
        self._tokens = [limits.messages * BURST_SECONDS, limits.size * BURST_SECONDS]
        self._at = monotonic()

    def admits(self, messages: int, size: int) -> bool:
        """Return whether the session may send so many messages and bytes more now."""
        now = monotonic()
        passed, self._at = now - self._at, now
        tokens, exceeded = self._tokens, False
        for kind, (rate, spent) in enumerate(((self._limits.messages, messages), (self._limits.size, size))):
            if not rate:
                continue
            tokens[kind] = min(rate * BURST_SECONDS, tokens[kind] + passed * rate) - spent
            if tokens[kind] < 0:
                tokens[kind] = 0
                exceeded = True
                if (name := KINDS[kind]) not in self._exceeded:
                    self._exceeded.add(name)
                    self._on_exceeded(name)
        return not (exceeded and self._limits.enforced)
