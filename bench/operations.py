"""The part "operations": how long Ansible takes for fleets of several sizes, and on which tasks.

The hosts are the lab's. They are created for each size and removed after it, which is not measured.
"""

import configparser
import importlib.metadata
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.lab import CREATE, DESTROY, ROOT, SITE, Control, LabError, Run, before_the_lab, lab, node_name
from bench.report import Figure, Part, Spread, number
from bench.rounds import Rounds

ARTIFACTS, UPDATE = "playbooks/artifacts.yml", "playbooks/rolling_update.yml"
RELEASE = ("-e", "stickyring_node_release=bench")
"""The same content under a new name, which makes a new release."""
COSTLIEST = 10
LOG = "operations"

FIGURES = [
    Figure("fresh", "site.yml on fresh hosts", "s", False, True),
    Figure("no-op", "site.yml that changes nothing", "s", False, True),
    Figure("no-op-cpu", "site.yml that changes nothing, CPU of the controller", "s", False),
    Figure("ping", "ansible -m ping", "s", False, True),
    Figure("status", "stickyring status", "s", False, True),
    Figure("no-op-to-ping", "site.yml that changes nothing, to ansible -m ping", "times", False, True),
    Figure("update", "rolling_update.yml to another release", "s", False, True),
    Figure("add", "site.yml with one node more", "s", False, True),
]
COMMANDS = {
    "fresh": f"ansible-playbook -i N {SITE}",
    "no-op": f"ansible-playbook -i N {SITE}",
    "ping": "ansible -i N all -m ping",
    "status": "stickyring status --inventory N",
    "update": f"ansible-playbook -i N {UPDATE} {' '.join(RELEASE)}",
    "add": f"ansible-playbook -i N+1 {SITE} {' '.join(RELEASE)}",
}


@dataclass(frozen=True)
class Profile:
    """The number of rounds, the sizes in each round in ascending order, and the no-op runs for each size.

    For the sizes in `changed`, a rolling update and the addition of a node are measured too.
    """

    rounds: int
    sizes: tuple[int, ...]
    no_ops: int
    changed: tuple[int, ...]


PROFILES = {
    "quick": Profile(rounds=1, sizes=(3, 6), no_ops=2, changed=(3,)),
    "full": Profile(rounds=1, sizes=(3, 6, 12, 20), no_ops=3, changed=(3, 6, 12, 20)),
}


@dataclass
class Spent:
    """Seconds of each task, by operation and size, in every round."""

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
        LabError: there is a lab already, or an operation fails or has a wrong effect.
    """
    part, spent = _part(profile), Spent()
    with before_the_lab(rounds, LOG) as folder:
        rounds.say("building what the hosts install")
        Control(folder / "artifacts", rounds, LOG).play(profile.sizes[0], ARTIFACTS)
        for index in rounds.go(profile.rounds, "fleets"):
            _sizes(folder / str(index), rounds, part, spent, profile)
    part.more = {"seconds_a_node": {key: spread.as_json() for key, spread in slopes(part).items()}}
    part.more["seconds_of_tasks"] = spent.as_json()
    part.sections = [*_growth(part), "", *_where_the_time_goes(part, spent)]
    return part


def _sizes(folder: Path, rounds: Rounds, part: Part, spent: Spent, profile: Profile) -> None:
    """Measure the fleets of one round, as many as fit the time; the first one always."""
    always, changes = 0.0, 0.0
    for nodes in profile.sizes:
        # An upper bound: larger fleets take less than that, because most tasks run on all hosts at once.
        needed = (always + changes * (nodes in profile.changed)) * (nodes + 1)
        if needed and needed > rounds.left():
            rounds.say(f"the time is up before {nodes} nodes")
            return
        control = Control(folder / str(nodes), rounds, LOG)
        with lab(control, nodes + (nodes in profile.changed)):
            # Without the creation of the first hosts, which may include their image.
            begun = time.monotonic()
            changes = _fleet(control, part, spent, profile, nodes) / (nodes + 1)
        always = (time.monotonic() - begun) / (nodes + 1) - changes


def _fleet(control: Control, part: Part, spent: Spent, profile: Profile, nodes: int) -> float:
    """Measure everything of one size, on hosts on which nothing is installed yet.

    Return the seconds of operations that are not measured for every size.
    """
    size = str(nodes)

    def note(operation: str, run: Run) -> float:
        part.add(size, {operation: run.seconds})
        spent.add(operation, size, run)
        control.rounds.say(f"{size} nodes, {operation}: {run.seconds:.1f} s")
        return run.seconds

    note("fresh", _changing(control.play(nodes, SITE), range(nodes)))
    for _ in range(profile.no_ops):
        run, ping, status = control.play(nodes, SITE), control.ping(nodes), control.status(nodes)
        if changed := run.changed():
            raise LabError(f"a run that should change nothing has changed {', '.join(sorted(changed))}")
        part.add(size, {"no-op-cpu": run.cpu, "ping": ping.seconds, "no-op-to-ping": note("no-op", run) / ping.seconds})
        part.add(size, {"status": status.seconds})
    if nodes not in profile.changed:
        return 0.0
    update = note("update", _changing(control.play(nodes, UPDATE, *RELEASE), range(nodes)))
    return update + note("add", _changing(control.play(nodes + 1, SITE, *RELEASE), [nodes]))


def _changing(run: Run, indices: Iterable[int]) -> Run:
    """Return a run that has changed these nodes.

    Raises:
        LabError: it has not changed them, so its duration means nothing.
    """
    if missing := [node for node in map(node_name, indices) if node not in run.changed()]:
        raise LabError(f"a run that should change {', '.join(missing)} has not")
    return run


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
        f"{forks} forks. Fresh hosts have booted, and nothing else; what they install was built before. No-op runs, "
        "pings and `stickyring status` took turns, over SSH connections that were open already. The work of the hosts "
        "took these cores too, which that of real hosts does not: beside the no-op run stands the CPU time of the "
        "controller alone. The update includes the time for which the first node has to stay, and nobody was "
        "connected. In the commands, N is inventory/lab with so many nodes.",
    )


def slope(seconds: Mapping[int, float]) -> float:
    """Return the seconds per node, by least squares, from the seconds by number of nodes."""
    return statistics.linear_regression(list(seconds), list(seconds.values())).slope


def slopes(part: Part) -> dict[str, Spread]:
    """Return the seconds per node of every figure with two sizes or more, for each round."""
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
