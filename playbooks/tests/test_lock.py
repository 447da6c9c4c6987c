"""Who gets the lock that lets one run at a time change the hosts: the shell lines of tasks/lock.yml themselves."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml

PLAYBOOKS = Path(__file__).parents[1]
[TAKE, _] = yaml.safe_load((PLAYBOOKS / "tasks" / "lock.yml").read_text())
[[GIVE_BACK]] = [play["tasks"] for play in yaml.safe_load((PLAYBOOKS / "unlock.yml").read_text())]
OWN = "here 100 17 laptop of me"


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def run(script: str, lock: Path, values: dict[str, str]) -> str:
    """Run the shell lines with these values in place of their templates; return what they say."""
    script = script.replace("/run/stickyring.lock", str(lock))
    for template, value in values.items():
        assert template in script
        script = script.replace(template, value)
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout


def take(lock: Path, place: str = "here", process: int = 100) -> str:
    """What a run is told that finds processes 100 and 200 where it is; nothing if it has the lock."""
    values = {
        "{{ __stickyring_run_place }}": place,
        "{{ __stickyring_run_process }}": str(process),
        "{{ __stickyring_run_silence }}": "17",
        "{{ __processes | quote }}": "'1 100 200'",
        "{{ __machine | quote }}": "laptop",
        "{{ __user | quote }}": "me",
    }
    return run(TAKE["ansible.builtin.raw"], lock, values)


def give_back(lock: Path, place: str = "here", process: int = 100) -> None:
    own = "{{ (__stickyring_run_place ~ ' ' ~ __stickyring_run_process) | quote }}"
    assert run(GIVE_BACK["ansible.builtin.raw"], lock, {own: f"'{place} {process}'"}) == ""


@pytest.mark.parametrize(
    ("held", "age", "told"),
    [
        (None, 0, False),
        (OWN, 0, False),
        ("here 200 15 desk of you", 0, True),
        ("there 200 15 desk of you", 0, True),
        # Its process is gone: it was killed, or has failed.
        ("here 300 15 desk of you", 0, False),
        # Whether that of another machine is gone cannot be known.
        ("there 300 15 desk of you", 14 * 60, True),
        ("there 300 15 desk of you", 16 * 60, False),
        # It waits for users, for a day if need be.
        ("there 300 1455 desk of you", 1454 * 60, True),
        ("there 300 1455 desk of you", 1456 * 60, False),
        # A clock that was set back makes it no older.
        ("there 300 15 desk of you", -3600, True),
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
        _, process, minutes, machine, *who = held.split()
        assert said.startswith(f"HELD on {machine}, process {process}, {' '.join(who)}; its last sign was at ")
        assert said.endswith(f" and counts for {minutes} minutes HELD\n")


def test_a_run_renews_its_lock(lock: Path) -> None:
    assert not take(lock)
    os.utime(lock, (0, 0))
    assert not take(lock)
    assert take(lock, place="there")


def test_nobody_gives_back_the_lock_of_another_run(lock: Path) -> None:
    take(lock)
    give_back(lock, process=200)
    give_back(lock, place="there")
    assert lock.read_text().strip() == OWN
    give_back(lock)
    assert not lock.exists()
    give_back(lock)
    assert not take(lock, process=200)
