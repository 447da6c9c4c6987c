"""Runs the environment's ansible programs in the project's root, as a user does, and waits for hosts."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import yaml

ADMIN_SOCKET = "/run/stickyring-edge/admin.sock"
PROJECT = Path(__file__).parents[3]
PROGRAMS = Path(sys.executable).parent
SOAK = "STICKYRING_SOAK" in os.environ
"""Whether `make soak` runs, which runs every test."""
CHROMIUM = "/usr/bin/chromium"
"""Debian's browser, because Playwright's own cannot be downloaded from a package mirror."""
# No sandbox, because Chromium has none for root. The rest keeps the browser from contacting anything but the page.
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LONGEST_SECONDS = 900
RUN_VARIABLE = "STICKYRING_TEST_RUN"
"""Tells to which run a process belongs, in its environment."""
GONE_SECONDS = 30
THERE_SECONDS = 30


def lab_address(inventory: Path, number: int) -> str:
    """The address with this number in the lab of an inventory, whose first edge has the tenth."""
    hosts = yaml.safe_load((inventory / "hosts.yml").read_text())
    return str(ipaddress.ip_address(hosts["edge"]["hosts"]["edge1"]["ansible_host"]) - 10 + number)


def wait_until_gone(address: str) -> None:
    """Waits until the address does not answer at all, not even with a notice that it is shutting down."""
    deadline = time.monotonic() + GONE_SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection((address, 22), timeout=1).close()
        except TimeoutError:
            return
        except OSError as error:
            if error.errno == errno.EHOSTUNREACH:
                return
        time.sleep(0.1)
    raise AssertionError(f"{address} still answers after {GONE_SECONDS} s")


def wait_until_there(address: str) -> None:
    """Waits until SSH accepts logins at the address."""
    deadline = time.monotonic() + THERE_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection((address, 22), timeout=1) as connection:
            if connection.recv(1):
                return
        time.sleep(0.1)
    raise AssertionError(f"{address} accepts no login after {THERE_SECONDS} s")


@contextmanager
def started(program: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Starts a program; kills it and its processes here after the block, or after LONGEST_SECONDS."""
    # Molecule turns colours on, whose codes would be inside the lines.
    plain = {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}
    settings = {"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), RUN_VARIABLE: uuid4().hex}
    environment = os.environ | plain | settings
    pipe = subprocess.PIPE
    command = [PROGRAMS / program, *arguments]
    with subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:

        def end() -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # Ansible gives each worker a session of its own, and one may outlive a run that was killed.
            for worker in workers_of(environment[RUN_VARIABLE]):
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)

        timer = threading.Timer(LONGEST_SECONDS, end)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            end()


def workers_of(run: str) -> list[int]:
    """The ids of a run's Ansible processes; its connections by SSH belong to later runs too."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            belongs = f"{RUN_VARIABLE}={run}".encode() in (folder / "environ").read_bytes().split(b"\0")
            if belongs and (folder / "comm").read_text().startswith("ansible"):
                found.append(int(folder.name))
    return found


def run(program: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a program, run("ansible-playbook", "site.yml"), to its end; it must succeed unless `check` is false."""
    with started(program, *arguments) as process:
        output, errors = process.communicate()
    assert not check or process.returncode == 0, output + errors
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def interrupt(tasks: Sequence[str], *arguments: str | Path) -> None:
    """Runs a playbook and kills it and its processes here when it begins a task; once for each task.

    Outside of `make soak`, only for the last task.
    """
    for task in tasks if SOAK else tasks[-1:]:
        begins = f"{task}]"
        told = interrupt_where(re.compile(re.escape(begins)).search, *arguments)
        assert begins in told[-1], f"it ended before {task}: {''.join(told)}"


def interrupt_where(here: Callable[[str], object], *arguments: str | Path) -> list[str]:
    """Runs a playbook and kills it at the first task whose header line matches; returns the lines of its output."""
    told = [""]
    with started("ansible-playbook", *arguments) as play:
        for line in play.stdout or ():
            told.append(line)
            if line.startswith("TASK [") and here(line):
                break
    return told


def javascript_client(folder: Path) -> Path:
    """Installs the pinned JavaScript client in a folder, which is returned: node_modules is in it."""
    for name in ("package.json", "package-lock.json"):
        shutil.copy(PROJECT / "app" / name, folder)
    npm = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(npm, cwd=folder, check=True, timeout=120)
    return folder
