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
    "status": "stickyring.tools.status.command",
    "admin-ui": "stickyring.tools.admin_ui",
    "sessions": "stickyring.node.operate",
    "summary": "stickyring.node.operate",
    "rebalance": "stickyring.node.operate",
    "drain": "stickyring.node.operate",
    "undrain": "stickyring.node.operate",
}
"""Each command's module. It is imported only when the command runs: playbooks run small commands on every host, and
importing the others would double their time."""


@contextmanager
def needing(extra: str, *modules: str) -> Iterator[None]:
    """Import the modules of an extra in this block; if one of `modules` is missing, say what to install.

    Commands import these only when they run, so the other commands work without the extra.

    Raises:
        click.ClickException: one of `modules` is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in modules:
            raise
        raise click.ClickException(f"{missing} is not installed: pip install stickyring[{extra}]") from error


class _Group(click.Group):
    """A group whose commands report a usage error in one line, without the usage text."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(COMMANDS[cmd_name]), cmd_name.replace("-", "_"))
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
    """Serve Socket.IO applications behind a sticky edge, and prove that the edge is sticky.

    \b
    On a node: serve, sessions, summary, rebalance, drain, undrain.
    On the controller: probe, plan, whereis, status, admin-ui.

    \b
    Examples:
      stickyring serve --listen 127.0.0.1:8001
      stickyring probe http://127.0.0.1:8001
      stickyring drain --help
    """
