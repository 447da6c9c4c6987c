"""The results of a part of the benchmark, as JSON, as a Markdown table, and as plots."""

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from stickyring.tools.plan import plot

COLORS = ("#2f6f9f", "#7fb0d0", "#c3ccd6", "#946c00", "#b5483a", "#5b7f4f", "#8a6aa8")
STYLE = plot.STYLE | {"font.size": 9}
ENOUGH = 2.0
"""How many times as fast as the fastest contender the stub must be; then the load is not the limit."""
ALONE = 90.0
"""Percent of its core that a server uses under full load when nothing else runs there."""
TITLE_WIDTH = 60
PACKAGES = ("stickyring", "gunicorn", "eventlet", "python-socketio", "python-engineio")


@dataclass(frozen=True)
class Figure:
    """A figure; `more_is_better` is None if neither is better. Those that are `drawn` are plotted."""

    key: str
    title: str
    unit: str
    more_is_better: bool | None
    drawn: bool = False


@dataclass(frozen=True)
class Spread:
    """The median, the least and the greatest of a figure's rounds."""

    median: float
    least: float
    greatest: float
    rounds: list[float]

    @classmethod
    def of(cls, rounds: list[float]) -> "Spread":
        """Return the spread of one or more rounds."""
        return cls(statistics.median(rounds), min(rounds), max(rounds), rounds)

    def __str__(self) -> str:
        """Return `median (least to greatest)`, or the value of a single round."""
        several = f" ({number(self.least)} to {number(self.greatest)})" if len(self.rounds) > 1 else ""
        return f"{number(self.median)}{several}"

    def as_json(self) -> dict[str, Any]:
        """Return the spread with all rounds."""
        return {"median": self.median, "min": self.least, "max": self.greatest, "rounds": self.rounds}


@dataclass
class Part:
    """One part of the benchmark: its figures, and each contender's result of every round.

    `base` is the contender that ratios refer to. `stub`, if there is a load, shows the limit of the load; it is no
    contender. `setting` says what ran where. `commands` are by contender or purpose. `sections` are further lines of
    Markdown, `more` further items of the JSON.
    """

    key: str
    title: str
    figures: list[Figure]
    titles: dict[str, str]
    commands: dict[str, str]
    base: str
    stub: str = ""
    setting: str = "The servers had one core, the load another."
    sections: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    found: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, contender: str, found: dict[str, float]) -> None:
        """Add a contender's result of a round."""
        for figure, value in found.items():
            self.found.setdefault(figure, {}).setdefault(contender, []).append(value)

    @property
    def contenders(self) -> list[str]:
        """The keys of the contenders."""
        return [key for key in self.titles if key != self.stub]

    def spread(self, figure: str, contender: str) -> Spread | None:
        """Return the spread of a figure, or None if it was not measured."""
        rounds = self.found.get(figure, {}).get(contender)
        return Spread.of(rounds) if rounds else None

    def ratio(self, figure: str, contender: str, base: str) -> Spread | None:
        """Return the ratio to another contender, computed for each round."""
        rounds = self.found.get(figure, {})
        pairs = list(zip(rounds.get(contender, []), rounds.get(base, []), strict=False))
        return Spread.of([one / other for one, other in pairs]) if pairs and all(pair[1] for pair in pairs) else None

    def disturbed(self) -> list[str]:
        """Return the contenders that did not get their whole core under full load."""
        busy = [found for key, found in self.found.items() if key.startswith("busy@") and key != "busy@1"]
        return [key for key in self.contenders if any(statistics.median(found[key]) < ALONE for found in busy)]

    def bounds(self) -> dict[str, tuple[str, Spread]]:
        """For each rate that the stub has too: the fastest contender, and how many times as fast the stub is."""
        bounds = {}
        for figure in self.figures:
            if not figure.key.startswith(("echoes@", "handshakes@")) or not self.spread(figure.key, self.stub):
                continue
            found = self.found[figure.key]
            measured = [key for key in self.contenders if key in found]
            fastest = max(measured, key=lambda key: statistics.median(found[key]))
            if spread := self.ratio(figure.key, self.stub, fastest):
                bounds[figure.key] = (fastest, spread)
        return bounds


def number(value: float) -> str:
    """Return a number with three significant digits."""
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\N{NO-BREAK SPACE}")
    return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def write(part: Part, folder: Path, context: dict[str, Any]) -> list[Path]:
    """Write PART.json, .md and .svg, all of them aside and then renamed into place. Return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{part.key}-", dir=folder))
    try:
        (aside / f"{part.key}.json").write_text(json.dumps(as_json(part, context), indent=1) + "\n")
        (aside / f"{part.key}.md").write_text(as_markdown(part, context))
        with mpl.rc_context(STYLE):
            picture = draw(part)
            picture.savefig(aside / f"{part.key}.svg", metadata={"Date": None})
        return [written.replace(folder / written.name) for written in sorted(aside.iterdir())]
    finally:
        shutil.rmtree(aside)


def context(command: str, profile: str, cores: tuple[int, int]) -> dict[str, Any]:
    """Return the command, date, machine and versions of the run."""
    return {
        "command": command,
        "profile": profile,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "load_core": cores[0],
            "server_core": cores[1],
            "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
            "kernel": platform.release(),
            "load_average_at_the_end": os.getloadavg()[0],
        },
        "versions": {
            "the benchmark's own Python": platform.python_version(),
            **_commit(),
            **_nodejs(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
    }


@functools.cache
def _commit() -> dict[str, str]:
    """Return the commit that is measured, if the tree is a clone; called before anything is written into it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return {} if done.returncode else {"commit": done.stdout.strip()}


def _nodejs() -> dict[str, str]:
    """Return the version of Node.js, if it is installed."""
    if not shutil.which("node"):
        return {}
    return {"Node.js": subprocess.run(["node", "--version"], check=True, capture_output=True, text=True).stdout.strip()}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def as_json(part: Part, context: dict[str, Any]) -> dict[str, Any]:
    """Return all results: for each figure and contender the rounds and the ratio to the base."""
    figures = {}
    for figure in part.figures:
        spreads = {key: spread for key in part.titles if (spread := part.spread(figure.key, key))}
        ratios = {key: ratio for key in part.contenders if (ratio := part.ratio(figure.key, key, part.base))}
        figures[figure.key] = {
            "title": figure.title,
            "unit": figure.unit,
            "more_is_better": figure.more_is_better,
            "found": {key: spread.as_json() for key, spread in spreads.items()},
            f"ratio_to_{part.base}": {key: ratio.as_json() for key, ratio in ratios.items()},
        }
    bounds = {
        figure: {"fastest": fastest, "stub_times_as_fast": spread.as_json(), "enough": spread.median >= ENOUGH}
        for figure, (fastest, spread) in part.bounds().items()
    }
    return {
        **context,
        "setting": part.setting,
        "contenders": {key: {"title": title, "command": part.commands.get(key)} for key, title in part.titles.items()},
        "figures": figures,
        "load": bounds,
        "disturbed": part.disturbed(),
        **part.more,
    }


def as_markdown(part: Part, context: dict[str, Any]) -> str:
    """Return the table: medians, the least and the greatest round, and the ratio to the base."""
    machine = context["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in context["versions"].items())
    lines = [
        f"# {part.title}, side by side",
        "",
        f"`{context['command']}` wrote this on {context['date']}, on {machine['cores']} cores of "
        f"{machine['processor']}, Linux {machine['kernel']}: {versions}. {part.setting}",
        "",
        "Medians, in parentheses the least and the greatest round; the last number is the ratio to "
        f'"{part.titles[part.base]}", with its own rounds. Without parentheses there was one round.',
        "",
        *_warning(part),
        f"![The figures as bars]({part.key}.svg)",
        "",
        "| figure | " + " | ".join(part.titles[key] for key in part.contenders) + " |",
        "|---|" + "---|" * len(part.contenders),
    ]
    lines += [
        f"| {figure.title} ({figure.unit}) | " + " | ".join(_cell(part, figure, key) for key in part.contenders) + " |"
        for figure in part.figures
    ]
    lines += ["", *part.sections] if part.sections else []
    lines += _load(part) if part.stub else []
    lines += ["", "## The commands", ""]
    lines += [f"- {part.titles.get(key, key)}: `{command}`" for key, command in part.commands.items()]
    return "\n".join(lines) + "\n"


def _load(part: Part) -> list[str]:
    lines = [
        "",
        "## The load",
        "",
        f"The stub is the cheapest server that answers the load. Where it is at least {ENOUGH:g} times as fast as the "
        "fastest contender, the load has held nobody back; elsewhere the share of its core that a server used tells. "
        "With one connection, server and load wait for each other.",
        "",
        "| figure | stub | fastest contender | the stub is times as fast |",
        "|---|---|---|---|",
    ]
    titles = {figure.key: figure.title for figure in part.figures}
    for figure, (fastest, spread) in part.bounds().items():
        verdict = "" if spread.median >= ENOUGH else ", less than it should be"
        cells = (titles[figure], str(part.spread(figure, part.stub)), part.titles[fastest], f"{spread}{verdict}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _warning(part: Part) -> list[str]:
    if not (names := [part.titles[key] for key in part.titles if key in part.disturbed()]):
        return []
    return [
        f"**Something else used the servers' core** (under full load, {', '.join(names)} had less than {ALONE:g} % of "
        "it): rates and round trips say little, figures per CPU second hold better.",
        "",
    ]


def _cell(part: Part, figure: Figure, contender: str) -> str:
    spread = part.spread(figure.key, contender)
    if spread is None:
        return "not measured"
    ratio = part.ratio(figure.key, contender, part.base) if contender != part.base else None
    shown = "" if ratio is None or figure.more_is_better is None else f"; {ratio} times"
    return f"{spread}{shown}"


def draw(part: Part) -> Picture:
    """Draw a small bar chart for each figure that is `drawn`."""
    shown = [figure for figure in part.figures if figure.drawn and figure.key in part.found]
    columns = 3
    rows = -(-len(shown) // columns)
    height = 0.7 + 0.24 * len(part.contenders)
    picture = Picture(figsize=(13, max(1, rows) * height + 0.5), layout="constrained")
    grid = picture.subplots(max(1, rows), columns, squeeze=False)
    for at, axes in enumerate(grid.flat):
        if at < len(shown):
            _bars(axes, part, shown[at], named=at % columns == 0)
        else:
            axes.set_axis_off()
    picture.suptitle(f"{part.title}: medians, and the least and the greatest round", x=0.01, ha="left", fontsize=12)
    return picture


def _bars(axes: Axes, part: Part, figure: Figure, *, named: bool) -> None:
    for row, contender in enumerate(part.contenders):
        if spread := part.spread(figure.key, contender):
            errors = [[spread.median - spread.least], [spread.greatest - spread.median]]
            axes.barh(row, spread.median, color=COLORS[row % len(COLORS)], xerr=errors, ecolor=plot.INK, capsize=2)
    axes.set_yticks(range(len(part.contenders)), [part.titles[key] for key in part.contenders] if named else [])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(left=0)
    better = {True: "; more is better", False: "; less is better", None: ""}[figure.more_is_better]
    title = textwrap.fill(f"{figure.title} ({figure.unit}{better})", TITLE_WIDTH)
    axes.set_title(title, loc="left", fontsize=8)
