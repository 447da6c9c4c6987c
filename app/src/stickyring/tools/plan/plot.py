"""The plan as a picture: each member's share before and after, and how many users move from where to where."""

from math import nan
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from stickyring.tools.plan.change import Change, evenness, percent

INK, FAINT, BEFORE, AFTER, GONE, OTHER = "#22272e", "#8b949e", "#c3ccd6", "#2f6f9f", "#b5483a", "#946c00"
NOTHING = "#f5f7f9"
WAY = LinearSegmentedColormap.from_list("way", ["#e3ebf2", AFTER])
# Inches. Cells with figures are wide; above MOST_WIDE_CELLS columns there are only colours.
SHARES_WIDTH, WIDE_CELL, NARROW_CELL = 8.0, 0.9, 0.36
MOST_WIDE_CELLS = 8
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,  # a name may contain a dollar sign
    "svg.fonttype": "none",  # text stays text: it can be searched, and the file is small
    "svg.hashsalt": "stickyring",  # the same plan is the same file
}


def draw(change: Change, directory: Path) -> None:
    """Write plan.png and plan.svg to `directory`, and create it if it is missing. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = _figure(change)
        figure.savefig(directory / "plan.png", dpi=150)
        figure.savefig(directory / "plan.svg", metadata={"Date": None})


def _figure(change: Change) -> Figure:
    height = max(3.6, 2.1 + 0.36 * len(change.members))
    columns = len({to for _, to in change.moves})
    matrix_width = 1.6 + columns * _cell_width(columns)
    if columns:
        figure = Figure(figsize=(SHARES_WIDTH + matrix_width, height), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(SHARES_WIDTH, matrix_width))
        _draw_moves(right, change)
    else:
        figure = Figure(figsize=(SHARES_WIDTH, height), layout="constrained")
        left = figure.subplots()
    _draw_shares(left, change)
    figure.suptitle(change.verdict, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def _cell_width(columns: int) -> float:
    return WIDE_CELL if columns <= MOST_WIDE_CELLS else NARROW_CELL


def _draw_shares(axes: Axes, change: Change) -> None:
    members = change.members
    deployed = change.before is not None
    height = 0.38 if deployed else 0.6
    for row, member in enumerate(members):
        for standing, offset, color in ((member.before, -height / 2, BEFORE), (member.after, height / 2, AFTER)):
            if standing is None:
                continue
            where = row + (offset if deployed else 0)
            axes.barh(where, standing.share, height, color=color)
            if standing.due:
                axes.vlines(standing.due, where - height / 2, where + height / 2, color=INK, linewidth=1.4)
    labels = [f"{member.name}\n{member.change}" if deployed and member.change else member.name for member in members]
    axes.set_yticks(range(len(members)), labels)
    for label, member in zip(axes.get_yticklabels(), members, strict=True):
        if deployed and member.change:
            label.set_color({"comes": AFTER, "goes": GONE}.get(member.change, OTHER))
    axes.set_ylim(len(members) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("share of all users; the vertical line is the share due by weight")
    rings = [("before", change.before, BEFORE), ("after", change.after, AFTER)]
    for when, ring, color in rings:
        if ring:
            axes.barh(0, 0, color=color, label=f"{when}: busiest at {evenness(ring)[0]:.3f} times its due share")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, borderaxespad=0.2)


def _draw_moves(axes: Axes, change: Change) -> None:
    order = [member.name for member in change.members]
    rows = [name for name in order if any(old == name for old, _ in change.moves)]
    columns = [name for name in order if any(new == name for _, new in change.moves)]
    largest = max(change.moves.values())
    shares = [[change.moves.get((old, new), nan) for new in columns] for old in rows]
    axes.set_facecolor(NOTHING)
    axes.pcolormesh(shares, cmap=WAY, vmin=0, vmax=largest, edgecolors="white", linewidth=1.5)
    if wide := len(columns) <= MOST_WIDE_CELLS:
        for (old, new), share in change.moves.items():
            color = "white" if share > 0.6 * largest else INK
            where = columns.index(new) + 0.5, rows.index(old) + 0.5
            axes.text(*where, percent(share), ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks([column + 0.5 for column in range(len(columns))], columns, rotation=0 if wide else 90)
    axes.set_yticks([row + 0.5 for row in range(len(rows))], rows)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("to")
    axes.set_ylabel("from")
    axes.set_title("moved users, as a share of all", loc="left", fontsize=10)
