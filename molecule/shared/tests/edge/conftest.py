"""This suite tests each edge in turn; these fixtures are for the edge under test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host


@pytest.fixture(scope="module")
def edge(host: Host, hosts: dict[str, Any]) -> Any:
    """The edge under test."""
    return hosts[host.backend.host]


@pytest.fixture(scope="module")
def edge_url(edge: Any) -> Callable[[str], str]:
    """The address of one of its listeners, by the listener's name."""
    return edge.url
