"""The tests of this suite look at each edge in turn, and so do the fixtures that are about one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host


@pytest.fixture(scope="module")
def edge(host: Host, hosts: dict[str, Any]) -> Any:
    """The edge that is being looked at."""
    return hosts[host.backend.host]


@pytest.fixture(scope="module")
def edge_url(edge: Any) -> Callable[[str], str]:
    """The address of one of its listeners, by the listener's name."""
    return edge.url
