"""The `stickyring` command."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import click

COMMANDS = {
    "serve": "stickyring.node.serve",
    "probe": "stickyring.tools.probe.command",
    "plan": "stickyring.tools.plan.command",
    "whereis": "stickyring.tools.whereis",
    "sessions": "stickyring.node.operate",
    "rebalance": "stickyring.node.operate",
    "drain": "stickyring.node.operate",
    "undrain": "stickyring.node.operate",
}
"""Each command's module, imported when it is wanted: a playbook runs small ones on every host, and half of their time
would be the imports of the others."""


@contextmanager
def needing(extra: str, *modules: str) -> Iterator[None]:
    """Import in the block what an extra brings; where one of its modules is missing, end with what to install.

    Commands import these only when they run: whoever has not installed the extra still has the other commands.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in modules:
            raise
        raise click.ClickException(f"{missing} is not installed: pip install stickyring[{extra}]") from error


class _Group(click.Group):
    """A group whose commands end a usage error in one line, without the usage that --help prints."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(COMMANDS[cmd_name]), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            error.ctx = None
            raise


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stickyring")
def main() -> None:
    """Serve Socket.IO applications behind a sticky edge, and prove that the edge is sticky."""
