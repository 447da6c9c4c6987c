"""The console for tables; it needs rich, so only commands of the controller import it."""

from rich.console import Console


def console_for_stdout() -> Console:
    """Return a console for standard output: a terminal at its own width, anything else at 100 columns."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=100)
