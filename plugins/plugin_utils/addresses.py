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
