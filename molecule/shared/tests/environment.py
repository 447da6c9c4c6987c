"""The environment's ansible programs, run at the project's root as a user runs them there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROJECT = Path(__file__).parents[3]
PROGRAMS = Path(sys.executable).parent
LONGEST_SECONDS = 900


@contextmanager
def started(program: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Starts one of them, of which nothing goes on here after the block."""
    # Molecule asks for colours, whose codes stand between the words at each line's end.
    plain = {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}
    environment = os.environ | plain | {"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")}
    pipe = subprocess.PIPE
    command = [PROGRAMS / program, *arguments]
    with subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run(program: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs one to its end, which has to be a good one unless told otherwise: run("ansible-playbook", "site.yml").
    Raises:
        subprocess.TimeoutExpired: it takes too long.
    """
    with started(program, *arguments) as process:
        output, errors = process.communicate(timeout=LONGEST_SECONDS)
    assert not check or process.returncode == 0, output + errors
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def interrupt(task: str, *arguments: str | Path) -> None:
    """Runs a playbook and kills it, with all that it has started here, when it begins the task."""
    told = [""]
    with started("ansible-playbook", *arguments) as play:
        for line in play.stdout or ():
            told.append(line)
            if line.startswith("TASK [") and f"{task}]" in line:
                break
    assert f"{task}]" in told[-1], f"it has ended before {task}: {''.join(told)}"
