"""Fixtures of the tests of the role, its module and a running Envoy."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import Certificate, make_certificate
from fake_envoy import FakeEnvoy
from running_envoy import PROJECT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a running Envoy and its nodes have their files."""
    return tmp_path_factory.mktemp("edge")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pinned JavaScript client in node_modules."""
    folder = tmp_path_factory.mktemp("javascript")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(PROJECT / "app" / name, folder)
    subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, check=True, timeout=60)
    return folder


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
