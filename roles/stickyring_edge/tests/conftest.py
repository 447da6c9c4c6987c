"""Fixtures of the module's tests."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_envoy import FakeEnvoy


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The directory of the files; it does not exist yet, as on a new host."""
    return tmp_path / "etc" / "xds"


@pytest.fixture
def envoy(directory: Path) -> Iterator[FakeEnvoy]:
    fake = FakeEnvoy(directory)
    yield fake
    fake.stop()


@pytest.fixture
def open_port() -> Iterator[int]:
    """A port that accepts connections, as a listener's does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


@pytest.fixture
def no_envoy(tmp_path: Path) -> str:
    """An admin socket that does not exist."""
    return str(tmp_path / "admin.sock")
