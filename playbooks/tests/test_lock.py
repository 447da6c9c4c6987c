"""Who gets the lock that lets one run at a time change the hosts: the shell lines of tasks/lock.yml themselves."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml

[TAKE, _] = yaml.safe_load((Path(__file__).parents[1] / "tasks" / "lock.yml").read_text())
OWN = "here 100 of me"


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def take(lock: Path, machine: str = "here", process: int = 100) -> str:
    """What a run is told that finds processes 100 and 200 on its machine; nothing if it has the lock."""
    script = TAKE["ansible.builtin.raw"].replace("/run/stickyring.lock", str(lock))
    for template, value in {
        "{{ __machine | quote }}": machine,
        "{{ __process }}": str(process),
        "{{ __processes | quote }}": "'1 100 200'",
        "{{ __user | quote }}": "me",
    }.items():
        assert template in script
        script = script.replace(template, value)
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize(
    ("held", "age", "told"),
    [
        (None, 0, False),
        (OWN, 0, False),
        ("here 200 of you", 0, True),
        ("there 200 of you", 0, True),
        # Its process is gone: it was killed, or has failed.
        ("here 300 of you", 0, False),
        # Whether that of another machine is gone cannot be known.
        ("there 300 of you", 14 * 60, True),
        ("there 300 of you", 16 * 60, False),
        # A clock that was set back makes it no older.
        ("there 300 of you", -3600, True),
    ],
)
def test_who_gets_the_lock(lock: Path, held: str | None, age: float, told: bool) -> None:
    if held is not None:
        lock.write_text(f"{held}\n")
        os.utime(lock, (time.time() - age,) * 2)
    said = take(lock)
    assert bool(said) == told, said
    assert lock.read_text().strip() == (held if told else OWN)
    if told and held is not None:
        machine, process, *who = held.split()
        assert said.startswith(f"on {machine}, process {process}, {' '.join(who)}; its last sign was at ")


def test_a_run_renews_its_lock(lock: Path) -> None:
    assert not take(lock)
    os.utime(lock, (0, 0))
    assert not take(lock)
    assert take(lock, machine="there")
