"""Which run gets the lock; the tests run the shell lines of tasks/lock.yml."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml

PLAYBOOKS = Path(__file__).parents[1]
[TAKE, _] = yaml.safe_load((PLAYBOOKS / "parts" / "tasks" / "lock.yml").read_text())
[[GIVE_BACK]] = [play["tasks"] for play in yaml.safe_load((PLAYBOOKS / "parts" / "unlock.yml").read_text())]
OWN = "here 100 17 laptop of me"


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def run(script: str, lock: Path, values: dict[str, str]) -> str:
    """Run the shell lines with these values in place of their templates; return what they print."""
    script = script.replace("/run/stickyring.lock", str(lock))
    for template, value in values.items():
        assert template in script
        script = script.replace(template, value)
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout


def take(lock: Path, place: str = "here", process: int = 100) -> str:
    """What the task prints on a machine with processes 100 and 200; nothing if the run has the lock."""
    values = {
        "{{ __stickyring_run_place }}": place,
        "{{ __stickyring_run_process }}": str(process),
        "{{ __stickyring_run_silence }}": "17",
        "{{ __processes | quote }}": "'1 100 200'",
        "{{ __machine | quote }}": "laptop",
        "{{ __user | quote }}": "me",
    }
    return run(TAKE["ansible.builtin.raw"], lock, values)


def release(lock: Path, place: str = "here", process: int = 100) -> None:
    own = "{{ (__stickyring_run_place ~ ' ' ~ __stickyring_run_process) | quote }}"
    assert run(GIVE_BACK["ansible.builtin.raw"], lock, {own: f"'{place} {process}'"}) == ""


@pytest.mark.parametrize(
    ("held", "age", "refused"),
    [
        (None, 0, False),
        (OWN, 0, False),
        ("here 200 15 desk of you", 0, True),
        ("there 200 15 desk of you", 0, True),
        # Its process is gone: the run was killed, or failed.
        ("here 300 15 desk of you", 0, False),
        # Whether a process on another machine is gone cannot be known.
        ("there 300 15 desk of you", 14 * 60, True),
        ("there 300 15 desk of you", 16 * 60, False),
        # A drain may take a day.
        ("there 300 1455 desk of you", 1454 * 60, True),
        ("there 300 1455 desk of you", 1456 * 60, False),
        # A clock that was set back does not make the lock older.
        ("there 300 15 desk of you", -3600, True),
    ],
)
def test_which_run_gets_the_lock(lock: Path, held: str | None, age: float, refused: bool) -> None:
    if held is not None:
        lock.write_text(f"{held}\n")
        os.utime(lock, (time.time() - age,) * 2)
    said = take(lock)
    assert bool(said) == refused, said
    assert lock.read_text().strip() == (held if refused else OWN)
    if refused and held is not None:
        _, process, minutes, machine, *who = held.split()
        assert said.startswith(f"HELD process {process} on {machine}, {' '.join(who)}, last active at ")
        assert said.endswith(f" (lock: {minutes} minutes) HELD\n")


def test_a_run_renews_its_lock(lock: Path) -> None:
    assert not take(lock)
    os.utime(lock, (0, 0))
    assert not take(lock)
    assert take(lock, place="there")


def test_a_run_does_not_release_the_lock_of_another_run(lock: Path) -> None:
    take(lock)
    release(lock, process=200)
    release(lock, place="there")
    assert lock.read_text().strip() == OWN
    release(lock)
    assert not lock.exists()
    release(lock)
    assert not take(lock, process=200)
