"""The part "operations": how long Ansible takes for fleets of several sizes, and on which tasks.

The hosts are the lab's. They are made for each size and removed after it, and both is outside of what is measured.
"""

import configparser
import contextlib
import importlib.metadata
import ipaddress
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from bench.report import Figure, Part, Spread, number
from bench.rounds import Rounds

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent
LAB_OWNER = Path("/var/lib/stickyring-lab/owner")
"""There while there is a lab on this machine; it has one owner."""
CREATE, DESTROY = "molecule/shared/create.yml", "molecule/shared/destroy.yml"
ARTIFACTS, SITE, UPDATE = "playbooks/artifacts.yml", "site.yml", "playbooks/rolling_update.yml"
RELEASE = ("-e", "stickyring_node_release=bench")
"""The content is the one that is there: a new name is a new release."""
LONGEST_SECONDS = 900.0
ENDING_SECONDS = 10.0
COSTLIEST = 10
AROUND = "(start, beginnings of plays, end)"

HEADER = re.compile(r"(?:TASK|RUNNING HANDLER) \[(.*)\] \*+$")
RECAP = re.compile(r"(\S+)\s+: ok=\d+\s+changed=(\d+)\s")
PONG = re.compile(r"(\S+) \| SUCCESS =>")

FIGURES = [
    Figure("fresh", "site.yml on fresh hosts", "s", False, True),
    Figure("no-op", "site.yml that changes nothing", "s", False, True),
    Figure("ping", "ansible -m ping", "s", False, True),
    Figure("no-op-to-ping", "site.yml that changes nothing, to ansible -m ping", "times", False, True),
    Figure("update", "rolling_update.yml to another release", "s", False, True),
    Figure("add", "site.yml with one node more", "s", False, True),
]
COMMANDS = {
    "fresh": f"ansible-playbook -i N {SITE}",
    "no-op": f"ansible-playbook -i N {SITE}",
    "ping": "ansible -i N all -m ping",
    "update": f"ansible-playbook -i N {UPDATE} {' '.join(RELEASE)}",
    "add": f"ansible-playbook -i N+1 {SITE} {' '.join(RELEASE)}",
}


class OperationError(Exception):
    """An operation cannot be measured; the text is one line."""


@dataclass(frozen=True)
class Profile:
    """Rounds, the numbers of nodes in each of them, in ascending order, and the no-op runs for each of these.

    Of the sizes in `changed` a rolling update and the addition of a node are measured too.
    """

    rounds: int
    sizes: tuple[int, ...]
    no_ops: int
    changed: tuple[int, ...]


PROFILES = {
    "quick": Profile(rounds=1, sizes=(3, 6), no_ops=2, changed=(3,)),
    "full": Profile(rounds=2, sizes=(3, 6, 12, 20), no_ops=3, changed=(3, 6, 12, 20)),
}


@dataclass(frozen=True)
class Run:
    """A command that has ended well: its output's lines, each with the second at which it came."""

    seconds: float
    lines: list[tuple[float, str]]

    def tasks(self) -> dict[str, float]:
        """Return the seconds of each task, from its header to the next one; all together they are the run's."""
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

    def __init__(self, folder: Path, rounds: Rounds) -> None:
        self.rounds = rounds
        self._folder = folder
        mine = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        self._environment = mine | {
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_NOCOWS": "1",
            # No host is reached over a connection to one that had its address before.
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(folder / "ssh"),
        }

    def inventory(self, nodes: int) -> Path:
        """Return an inventory that is the lab's, with so many nodes."""
        folder = self._folder / str(nodes)
        if not folder.exists():
            shutil.copytree(ROOT / "inventory/lab", folder)
            groups = yaml.safe_load((folder / "hosts.yml").read_text())
            first = ipaddress.ip_address(next(iter(groups["nodes"]["hosts"].values()))["ansible_host"])
            groups["nodes"]["hosts"] = {_node(index): {"ansible_host": str(first + index)} for index in range(nodes)}
            (folder / "hosts.yml").write_text(yaml.safe_dump(groups, sort_keys=False))
        return folder

    def play(self, nodes: int, playbook: str, *options: str) -> Run:
        """Run a playbook for so many nodes."""
        return self.run("ansible-playbook", "-i", str(self.inventory(nodes)), playbook, *options)

    def ping(self, nodes: int) -> Run:
        """Have every host of so many nodes, and the edge, answer."""
        run = self.run("ansible", "-i", str(self.inventory(nodes)), "all", "-m", "ping")
        if len(run.answered()) <= nodes:
            raise OperationError(f"only {', '.join(sorted(run.answered()))} answered a ping")
        return run

    def run(self, program: str, *arguments: str) -> Run:
        """Run a command to its end. When this is interrupted, so is the command.

        Raises:
            OperationError: it fails, or takes longer than LONGEST_SECONDS.
        """
        lines = []
        begun = time.perf_counter()
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
        log = self.rounds.log("operations")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as output:
            output.writelines(f"{moment:7.2f} {line}\n" for moment, line in lines)
        if process.returncode:
            complaints = [line for line in told if line.startswith(("[ERROR]", "ERROR", "fatal:"))]
            cause = (complaints or told[-1:] or ["nothing"])[0]
            cause = f"it took longer than {LONGEST_SECONDS:g} s" if seconds > LONGEST_SECONDS else cause[:300]
            raise OperationError(f"{program} {' '.join(arguments)} has failed, see {log}: {cause}")
        return Run(seconds, lines)


def _end(process: subprocess.Popen[str]) -> None:
    """End a command that is still there; Ansible passes SIGTERM on to what it has started."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_SECONDS)
        process.kill()


@dataclass
class Spent:
    """Seconds of each task: of each operation and size, in every round."""

    rounds: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)

    def add(self, operation: str, size: str, run: Run) -> None:
        """Add a run."""
        self.rounds.setdefault(operation, {}).setdefault(size, []).append(run.tasks())

    def medians(self, operation: str, size: str) -> dict[str, float]:
        """Return the median of each task's seconds, the costliest task first."""
        rounds = self.rounds.get(operation, {}).get(size, [])
        names = {name for tasks in rounds for name in tasks}
        medians = {name: statistics.median(tasks.get(name, 0.0) for tasks in rounds) for name in names}
        return dict(sorted(medians.items(), key=lambda item: (-item[1], item[0])))

    def as_json(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return all medians, to the millisecond."""
        return {
            operation: {
                size: {task: round(seconds, 3) for task, seconds in self.medians(operation, size).items()}
                for size in sizes
            }
            for operation, sizes in self.rounds.items()
        }


def measure(rounds: Rounds, profile: Profile) -> Part:
    """Measure every size, as many as fit the time.

    Raises:
        OperationError: there is a lab already, or an operation fails or does something else than it should.
    """
    refuse_a_running_lab()
    rounds.log("operations").unlink(missing_ok=True)
    part, spent = _part(profile), Spent()
    with (
        rounds.every_core(),
        tempfile.TemporaryDirectory(prefix="stickyring-bench-", ignore_cleanup_errors=True) as folder,
    ):
        rounds.say("building what the hosts install")
        Control(Path(folder, "artifacts"), rounds).play(profile.sizes[0], ARTIFACTS)
        for index in rounds.go(profile.rounds, "fleets"):
            _sizes(Path(folder, str(index)), rounds, part, spent, profile)
    part.more = {"seconds_a_node": {key: spread.as_json() for key, spread in slopes(part).items()}}
    part.more["seconds_of_tasks"] = spent.as_json()
    part.sections = [*_growth(part), "", *_where_the_time_goes(part, spent)]
    return part


def _sizes(folder: Path, rounds: Rounds, part: Part, spent: Spent, profile: Profile) -> None:
    """Measure the fleets of one round, as many as fit the time; the first one always."""
    always, changes = 0.0, 0.0
    for nodes in profile.sizes:
        # Larger fleets take less than as much longer: most tasks run on all hosts at once.
        needed = (always + changes * (nodes in profile.changed)) * (nodes + 1)
        if needed and needed > rounds.left():
            rounds.say(f"the time is up before {nodes} nodes")
            return
        begun = time.monotonic()
        control = Control(folder / str(nodes), rounds)
        with _lab(control, nodes + (nodes in profile.changed)):
            changes = _fleet(control, part, spent, profile, nodes) / (nodes + 1)
        always = (time.monotonic() - begun) / (nodes + 1) - changes


def refuse_a_running_lab() -> None:
    """Refuse to go on while there is a lab on this machine, whoever has made it.

    Raises:
        OperationError: there is one.
    """
    with contextlib.suppress(FileNotFoundError):
        owner = Path(LAB_OWNER.read_text().strip())
        where = f"in {owner} " if owner != ROOT and owner.is_dir() else ""
        raise OperationError(f"there is a lab on this machine already: run `make down` {where}first")


@contextlib.contextmanager
def _lab(control: Control, nodes: int) -> Iterator[None]:
    """Make fresh hosts, and remove them at the end, whatever that is."""
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


def _fleet(control: Control, part: Part, spent: Spent, profile: Profile, nodes: int) -> float:
    """Measure everything of one size, on hosts on which nothing is installed yet.

    Return the seconds of what is not measured of every size.
    """
    size = str(nodes)

    def note(operation: str, run: Run) -> float:
        part.add(size, {operation: run.seconds})
        spent.add(operation, size, run)
        control.rounds.say(f"{size} nodes, {operation}: {run.seconds:.1f} s")
        return run.seconds

    note("fresh", _changing(control.play(nodes, SITE), range(nodes)))
    for _ in range(profile.no_ops):
        run, ping = control.play(nodes, SITE), control.ping(nodes)
        if changed := run.changed():
            raise OperationError(f"a run that should change nothing has changed {', '.join(sorted(changed))}")
        part.add(size, {"ping": ping.seconds, "no-op-to-ping": note("no-op", run) / ping.seconds})
    if nodes not in profile.changed:
        return 0.0
    update = note("update", _changing(control.play(nodes, UPDATE, *RELEASE), range(nodes)))
    return update + note("add", _changing(control.play(nodes + 1, SITE, *RELEASE), [nodes]))


def _changing(run: Run, indices: Iterable[int]) -> Run:
    """Return a run that has changed these nodes.

    Raises:
        OperationError: it has not, so it is no measure of what was asked for.
    """
    if missing := [node for node in map(_node, indices) if node not in run.changed()]:
        raise OperationError(f"a run that should change {', '.join(missing)} has not")
    return run


def _node(index: int) -> str:
    return f"node{index + 1}"


def _part(profile: Profile) -> Part:
    configuration = configparser.ConfigParser()
    configuration.read(ROOT / "ansible.cfg")
    forks, version = configuration["defaults"]["forks"], importlib.metadata.version("ansible-core")
    sizes = [str(nodes) for nodes in profile.sizes]
    titles = {figure.key: figure.title for figure in FIGURES}
    return Part(
        "operations",
        "Operations",
        FIGURES,
        {size: f"{size} nodes" for size in sizes},
        {
            "fresh hosts, made before": f"ansible-playbook -i N+1 {CREATE}",
            **{titles[operation]: command for operation, command in COMMANDS.items()},
            "in the end": f"ansible-playbook {DESTROY}",
        },
        sizes[0],
        setting=f"The hosts were the lab's, on this machine, and shared its cores with ansible-core {version} and its "
        f"{forks} forks. Fresh hosts have booted, and nothing else; what they install was built before. No-op runs and "
        "pings took turns, over SSH connections that were open already. The update includes the time for which the "
        "first node has to stay, and nobody was connected. In the commands, N is inventory/lab with so many nodes.",
    )


def slope(seconds: Mapping[int, float]) -> float:
    """Return the seconds a node, by least squares, of the seconds by number of nodes."""
    return statistics.linear_regression(list(seconds), list(seconds.values())).slope


def slopes(part: Part) -> dict[str, Spread]:
    """Return the seconds a node of every figure that was measured at two sizes or more; round by round."""
    found = {}
    for figure in part.figures:
        by_size = part.found.get(figure.key, {})
        if figure.unit == "s" and len(by_size) > 1:
            rounds = zip(*by_size.values(), strict=False)
            sizes = [int(size) for size in by_size]
            found[figure.key] = Spread.of([slope(dict(zip(sizes, one, strict=True))) for one in rounds])
    return found


def _growth(part: Part) -> list[str]:
    found = slopes(part)
    rows = [f"| {figure.title} | {found[figure.key]} |" for figure in part.figures if figure.key in found]
    return (
        [
            "## Growth",
            "",
            "Seconds for each node more, by least squares over the sizes: the median, in parentheses the least and the "
            "greatest round.",
            "",
            "| figure | s/node |",
            "|---|---|",
            *rows,
        ]
        if rows
        else ["## Growth", "", "One size says nothing about growth."]
    )


def _where_the_time_goes(part: Part, spent: Spent) -> list[str]:
    largest = list(part.found["fresh"])[-1]
    lines = [
        "## Where the time goes",
        "",
        "Seconds from a task's beginning to that of the next, on all hosts together.",
    ]
    for figure in part.figures:
        if figure.key not in ("no-op", "fresh"):
            continue
        tasks, whole = spent.medians(figure.key, largest), part.spread(figure.key, largest)
        lines += [
            "",
            f"| {figure.title}, {part.titles[largest]}: {whole} s, of which | s |",
            "|---|---|",
            *(f"| {task.replace('|', '/')} | {number(seconds)} |" for task, seconds in [*tasks.items()][:COSTLIEST]),
        ]
    return lines
