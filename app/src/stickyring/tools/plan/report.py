"""The plan as tables on a terminal."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stickyring.ring import Ring
from stickyring.tools.plan.change import Change, MemberChange, Standing, evenness, percent
from stickyring.tools.terminal import console_for_stdout

MOST_COLUMNS = 6
MOST_PAIRS = 20
STYLES = {"comes": "green", "goes": "red"}


def show(change: Change) -> None:
    """Print the plan."""
    paragraphs: list[list[RenderableType]] = [[_members_table(change), *_remarks(change)]]
    if change.moves:
        paragraphs.append([_moves_table(change)])
    paragraphs.append([Text(change.verdict, style="bold")])
    # A blank line between paragraphs, none after the last.
    console_for_stdout().print(Group(*(line for paragraph in paragraphs for line in (Text(), *paragraph))))


def _members_table(change: Change) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column(change.after.cluster, overflow="fold")
    deployed = change.before is not None
    if deployed:
        table.add_column("change")
    for name in ("weight", *(["due\nbefore", "owns\nbefore"] if deployed else []), "due\nafter", "owns\nafter"):
        table.add_column(name, justify="right", no_wrap=True)
    for member in change.members:
        style = STYLES.get(member.change, "yellow" if member.change else "")
        table.add_row(
            Text(member.name),
            *([Text(member.change)] if deployed else []),
            _weight(member),
            *(_shares(member.before) if deployed else []),
            *_shares(member.after),
            style=style if deployed else "",
        )
    return table


def _weight(member: MemberChange) -> str:
    standing = member.after or member.before
    return "" if standing is None else str(standing.member.weight)


def _shares(standing: Standing | None) -> tuple[str, str]:
    if standing is None:
        return "", ""
    return (percent(standing.due), percent(standing.share)) if standing.member.serving else ("-", "-")


def _remarks(change: Change) -> list[Text]:
    before = "" if change.before is None else f"; before, {_busiest(change.before)}"
    units = "weight in points on the ring; due: share of the users by weight; owns: share that the ring gives it"
    lines = [units, f"busiest: {_busiest(change.after)}{before}", *change.notes]
    return [Text(line, style="dim") for line in lines]


def _busiest(ring: Ring) -> str:
    value, name = evenness(ring)
    return f"{name} owns {value:.3f} times its due share"


def _moves_table(change: Change) -> Table:
    """Return a matrix of moved users, or the largest pairs if it would have too many columns."""
    columns = sorted({to for _, to in change.moves})
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    if len(columns) > MOST_COLUMNS:
        table.add_column("from", overflow="fold")
        table.add_column("to", overflow="fold")
        table.add_column("users move", justify="right", no_wrap=True)
        pairs = sorted(change.moves, key=change.moves.__getitem__, reverse=True)
        for pair in pairs[:MOST_PAIRS]:
            table.add_row(Text(pair[0]), Text(pair[1]), _moving(change, pair))
        if len(pairs) > MOST_PAIRS:
            table.add_row(f"... and {len(pairs) - MOST_PAIRS} more pairs")
        return table
    table.add_column("from \\ to", overflow="fold")
    for name in columns:
        table.add_column(Text(name), justify="right", overflow="fold")
    for old in sorted({old for old, _ in change.moves}):
        table.add_row(Text(old), *(_moving(change, (old, new)) for new in columns))
    return table


def _moving(change: Change, pair: tuple[str, str]) -> str:
    if pair not in change.moves:
        return "-"
    ids = "" if change.ids is None else f" ({change.moved_ids_by_pair[pair]} ids)"
    return f"{percent(change.moves[pair])}{ids}"
