"""Ansible and the hosts of the lab, for the parts of the benchmark that need more than loopback."""

import contextlib
import ipaddress
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from bench.rounds import Rounds

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent
LAB_OWNER = Path("/var/lib/stickyring-lab/owner")
"""This file exists while there is a lab on this machine, and names its owner."""
CREATE, DESTROY, SITE = "molecule/shared/create.yml", "molecule/shared/destroy.yml", "site.yml"
LONGEST_SECONDS = 900.0
ENDING_SECONDS = 10.0
AROUND = "(start, beginnings of plays, end)"

HEADER = re.compile(r"(?:TASK|RUNNING HANDLER) \[(.*)\] \*+$")
RECAP = re.compile(r"(\S+)\s+: ok=\d+\s+changed=(\d+)\s")
PONG = re.compile(r"(\S+) \| SUCCESS =>")


class LabError(Exception):
    """An operation on the lab has failed; the text is one line."""


@dataclass(frozen=True)
class Run:
    """A command that has succeeded: the lines of its output, each with its time in seconds.

    `cpu` are the CPU seconds of the command and its processes on this machine.
    """

    seconds: float
    lines: list[tuple[float, str]]
    cpu: float

    def tasks(self) -> dict[str, float]:
        """Return the seconds of each task, from its header to the next one; their sum is the duration of the run."""
        spent: dict[str, float] = defaultdict(float)
        task, since = AROUND, 0.0
        for moment, line in self.lines:
            header = HEADER.match(line)
            if header or line.startswith("PLAY "):
                spent[task] += moment - since
                task, since = header[1] if header else AROUND, moment
        spent[task] += self.seconds - since
        return dict(spent)

    def changed(self) -> set[str]:
        """Return the hosts that were changed."""
        return {found[1] for _, line in self.lines if (found := RECAP.match(line)) and found[2] != "0"}

    def answered(self) -> set[str]:
        """Return the hosts that have answered a ping."""
        return {found[1] for _, line in self.lines if (found := PONG.match(line))}


class Control:
    """Ansible with inventories and SSH connections that are only for the hosts of one lab."""

    def __init__(self, folder: Path, rounds: Rounds, log: str) -> None:
        self.rounds = rounds
        self._log = rounds.log(log)
        self._folder = folder
        mine = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        self._environment = mine | {
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_NOCOWS": "1",
            # A connection to an earlier host with the same address must not be reused.
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(folder / "ssh"),
        }

    def inventory(self, nodes: int) -> Path:
        """Return the lab's inventory with so many nodes."""
        folder = self._folder / str(nodes)
        if not folder.exists():
            shutil.copytree(ROOT / "inventory/lab", folder)
            groups = yaml.safe_load((folder / "hosts.yml").read_text())
            first = ipaddress.ip_address(next(iter(groups["nodes"]["hosts"].values()))["ansible_host"])
            groups["nodes"]["hosts"] = {
                node_name(index): {"ansible_host": str(first + index)} for index in range(nodes)
            }
            (folder / "hosts.yml").write_text(yaml.safe_dump(groups, sort_keys=False))
        return folder

    def play(self, nodes: int, playbook: str, *options: str) -> Run:
        """Run a playbook for so many nodes."""
        return self.run("ansible-playbook", "-i", str(self.inventory(nodes)), playbook, *options)

    def ping(self, nodes: int) -> Run:
        """Ping the edge and so many nodes; all must answer."""
        run = self.run("ansible", "-i", str(self.inventory(nodes)), "all", "-m", "ping")
        if len(run.answered()) <= nodes:
            raise LabError(f"only {', '.join(sorted(run.answered()))} answered a ping")
        return run

    def status(self, nodes: int) -> Run:
        """Show the state of the edge and so many nodes, in which all must be well."""
        return self.run("stickyring", "status", "--inventory", str(self.inventory(nodes)))

    def run(self, program: str, *arguments: str) -> Run:
        """Run a command to its end; an interrupt ends the command too.

        Raises:
            LabError: it fails, or takes longer than LONGEST_SECONDS.
        """
        lines = []
        begun, used = time.perf_counter(), _cpu_of_commands()
        with subprocess.Popen(
            [str(PROGRAMS / program), *arguments],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            timer = threading.Timer(LONGEST_SECONDS, process.terminate)
            timer.start()
            try:
                for line in process.stdout or ():
                    lines.append((time.perf_counter() - begun, line.rstrip()))
                process.wait()
                seconds = time.perf_counter() - begun
            finally:
                timer.cancel()
                _end(process)
        told = [line for _, line in lines if line]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as output:
            output.writelines(f"{moment:7.2f} {line}\n" for moment, line in lines)
        if process.returncode:
            complaints = [line for line in told if line.startswith(("[ERROR]", "ERROR", "fatal:"))]
            cause = (complaints or told[-1:] or ["nothing"])[0]
            cause = f"it took longer than {LONGEST_SECONDS:g} s" if seconds > LONGEST_SECONDS else cause[:300]
            raise LabError(f"{program} {' '.join(arguments)} has failed, see {self._log}: {cause}")
        return Run(seconds, lines, _cpu_of_commands() - used)


def _cpu_of_commands() -> float:
    """Return the CPU seconds of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _end(process: subprocess.Popen[str]) -> None:
    """End a command that still runs; Ansible passes SIGTERM on to its processes."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_SECONDS)
        process.kill()


def refuse_a_running_lab() -> None:
    """Refuse to run while there is a lab on this machine, whoever owns it.

    Raises:
        LabError: there is one.
    """
    with contextlib.suppress(FileNotFoundError):
        owner = Path(LAB_OWNER.read_text().strip())
        where = f"in {owner} " if owner != ROOT and owner.is_dir() else ""
        raise LabError(f"there is a lab on this machine already: run `make down` {where}first")


@contextlib.contextmanager
def before_the_lab(rounds: Rounds, log: str) -> Iterator[Path]:
    """Give a part that creates labs all cores, an empty log, and a folder that is removed at the end.

    Raises:
        LabError: there is a lab already.
    """
    refuse_a_running_lab()
    rounds.log(log).unlink(missing_ok=True)
    with (
        rounds.every_core(),
        tempfile.TemporaryDirectory(prefix="stickyring-bench-", ignore_cleanup_errors=True) as folder,
    ):
        yield Path(folder)


@contextlib.contextmanager
def lab(control: Control, nodes: int) -> Iterator[None]:
    """Create fresh hosts, and remove them at the end, also after a failure."""
    try:
        control.play(nodes, CREATE)
        yield
    finally:
        with _uninterrupted():
            control.play(nodes, DESTROY)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let nothing but SIGKILL end this process within the block."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(each, lambda *_: None) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


def node_name(index: int) -> str:
    """Return the name of a node in such an inventory; the first index is 0."""
    return f"node{index + 1}"
