"""Fixtures for the tests of parts that need the lab."""

from pathlib import Path

import pytest

from bench.tests.fake_lab import ANSIBLE, PROGRAMS


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """The folder of stand-ins for Ansible and pytest, without hosts."""
    for name in PROGRAMS:
        (tmp_path / name).write_text(ANSIBLE)
        (tmp_path / name).chmod(0o755)
    return tmp_path
