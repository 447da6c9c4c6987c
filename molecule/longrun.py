"""What long runs share: commands that are shown and end with the run, and reports that name their commit."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

PROJECT = Path(__file__).parents[1]
running: set[int] = set()
"""The process groups of the commands that `play` runs at the moment."""
ending = threading.Event()
"""Set by `interrupt`; what is begun after that is interrupted too."""
JUDGED = ("plugins", "roles", "playbooks", "app/src")


def heed_interrupts() -> None:
    """Have SIGINT and SIGTERM raise KeyboardInterrupt.

    SIGINT too: a shell starts background commands with it ignored, and their children would inherit that.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def ignore_interrupts() -> None:
    """Let what follows run to its end: a second interrupt would leave something behind."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def play(
    command: Sequence[str],
    environment: Mapping[str, str],
    hear: Callable[[str], None],
    log: TextIO | None = None,
    label: str = "",
) -> int:
    """Run a command at the project's root and return its status; its output is shown, and heard, line by line.

    With a log, its errors too, and all is kept there. The label stands before each line that is shown. When this is
    interrupted, so is the command with all that it has started.
    """
    with subprocess.Popen(
        command,
        cwd=PROJECT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if log else None,
        text=True,
        start_new_session=True,
    ) as process:
        running.add(process.pid)
        try:
            if ending.is_set():
                interrupt()
            for line in process.stdout or ():
                print(f"{label}{line}", end="", flush=True)
                if log:
                    log.write(line)
                    log.flush()
                hear(line)
        except KeyboardInterrupt:
            interrupt()
            # Read to the end: subprocess would wait only a quarter of a second.
            for line in process.stdout or ():
                if log:
                    log.write(line)
            process.wait()
            raise
        finally:
            running.discard(process.pid)
    return process.returncode


def interrupt() -> None:
    """Interrupt the commands that `play` runs, with all that they have started."""
    ending.set()
    for group in {*running}:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGINT)


def committed() -> str:
    """Return the commit that a report names; exit where what it judges is not committed."""
    if dirty := git("status", "--porcelain", *JUDGED):
        sys.exit(f"Commit your changes first, because the report names a commit:\n{dirty}")
    return git("rev-parse", "--short", "HEAD")


def judged() -> str:
    """Return what identifies the committed state of what a report judges."""
    return " ".join(git("rev-parse", *(f"HEAD:{folder}" for folder in JUDGED)).split())


def origin(command: str, commit: str, seconds: float) -> str:
    """Return the sentence of a report that says where it is from."""
    moment, machine = datetime.now(UTC).isoformat(timespec="minutes"), f"{os.cpu_count()} cores, {platform.release()}"
    return f"`{command}` wrote this on {moment}, commit {commit}, {machine}, after {seconds / 3600:.1f} hours."


def git(*arguments: str) -> str:
    """Return what git says."""
    return subprocess.run(["git", *arguments], cwd=PROJECT, check=True, capture_output=True, text=True).stdout.strip()
