"""What the tests of parts that need the lab share."""

from pathlib import Path

import pytest

from bench.tests.fake_lab import ANSIBLE, PROGRAMS


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """The folder of an Ansible and a pytest that have no hosts, and do as if."""
    for name in PROGRAMS:
        (tmp_path / name).write_text(ANSIBLE)
        (tmp_path / name).chmod(0o755)
    return tmp_path
