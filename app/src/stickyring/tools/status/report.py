"""The state of a fleet as a table on a terminal."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stickyring.tools.status.fleet import Bus, Edge, Fleet, Instance


def table_of(fleet: Fleet) -> RenderableType:
    """Return the tables and the problems."""
    parts: list[RenderableType] = [_edges(fleet.edges), Text(), _instances(fleet)]
    if fleet.bus:
        parts += [Text(), _bus(fleet.bus)]
    parts.append(Text())
    if fleet.problems:
        parts += [Text(problem, style="red") for problem in fleet.problems]
    else:
        parts.append(Text(f"All well: {len(fleet.instances)} instances, {fleet.users} users.", style="green"))
    return Group(*parts)


def _table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=column in numbers)
    return table


def _edges(edges: tuple[Edge, ...]) -> Table:
    table = _table("edge", "ring", "healthy", numbers=("healthy",))
    for edge in edges:
        healthy = [*edge.health.values()].count("HEALTHY")
        told = (edge.ring, f"{healthy} of {len(edge.health)}") if edge.ring else ("-", "-")
        table.add_row(Text(edge.name), *told, style="red" if edge.error else "")
    return table


def _instances(fleet: Fleet) -> Table:
    numbers = ("sessions", "users", "share", "due", "off ring", "healthy for")
    table = _table("instance", "release", *numbers[:5], "state", numbers[5], numbers=numbers)
    for one in fleet.instances:
        table.add_row(*_cells(one, len(fleet.edges)), style="red" if one.error else "")
    return table


def _cells(one: Instance, edges: int) -> tuple[Text | str, ...]:
    counts = [str(count) if count is not None else "-" for count in (one.sessions, one.users, one.off_ring)]
    shares = [f"{share:.1%}" if share is not None else "-" for share in (one.share, one.due)]
    state = "no answer" if one.error else one.state
    return (
        Text(one.name),
        Text(one.release or "-"),
        *counts[:2],
        *shares,
        counts[2],
        state,
        f"{len(one.healthy_in)} of {edges}",
    )


def _bus(bus: tuple[Bus, ...]) -> Table:
    table = _table("bus", "state")
    for one in bus:
        table.add_row(Text(one.name), Text(one.error or "runs"), style="red" if one.error else "")
    return table
