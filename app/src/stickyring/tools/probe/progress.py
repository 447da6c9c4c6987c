"""Progress on stderr while the sessions run: a bar on a terminal, a line every few seconds elsewhere."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stickyring.tools.probe.load import Load

BAR_EVERY = 0.2
LINE_EVERY = 5.0


@contextlib.asynccontextmanager
async def shown(load: Load) -> AsyncIterator[None]:
    """Show the progress of `load` while the block runs."""
    console = Console(stderr=True, highlight=False)
    task = asyncio.create_task(bar(load, console) if console.is_terminal else lines(load, console))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def state(load: Load) -> str:
    """Return the counts to show beside the number of ended sessions."""
    return f"{load.held} held open, {load.failed} failed" if load.shape.hold is not None else f"{load.failed} failed"


async def bar(load: Load, console: Console) -> None:
    """Draw a bar until cancelled."""
    columns = (TextColumn(load.shape.noun), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(state(load), total=load.shape.total)
        while True:
            progress.update(task, completed=len(load.records), description=state(load))
            await asyncio.sleep(BAR_EVERY)


async def lines(load: Load, console: Console) -> None:
    """Print a line every few seconds until cancelled."""
    while True:
        await asyncio.sleep(LINE_EVERY)
        console.print(f"{len(load.records)} of {load.shape.total} {load.shape.noun} ended, {state(load)}")
