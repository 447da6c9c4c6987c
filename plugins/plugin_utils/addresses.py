"""IP addresses as variables have them."""

from __future__ import annotations

import ipaddress


def is_address(value: object) -> bool:
    """Whether the value, as text, is an IP address."""
    try:
        ipaddress.ip_address(str(value))
    except ValueError:
        return False
    return True


def network(value: object) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """The network that a text such as 192.0.2.0/24 or 192.0.2.1 names; None if it names none."""
    try:
        return ipaddress.ip_network(str(value))
    except ValueError:
        return None
