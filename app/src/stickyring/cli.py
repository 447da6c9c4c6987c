"""The `stickyring` command."""

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


OF_THE_NODE = ("gunicorn", "eventlet", "prometheus_client", "pythonjsonlogger")
"""What the extra `node` brings; the other commands import theirs when they run."""


class _Missing(click.Command):
    """Stands in for a command whose extra is not installed, so that the others are listed and can be run."""

    def __init__(self, name: str, missing: str) -> None:
        self._refusal = f"{missing} is not installed: pip install stickyring[node]"
        super().__init__(name, help=f"Not available: {self._refusal}.")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        raise click.ClickException(self._refusal)


class _Group(click.Group):
    """A group whose commands end a usage error in one line, without the usage that --help prints."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        try:
            module = import_module(COMMANDS[cmd_name])
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in OF_THE_NODE:
                raise
            return _Missing(cmd_name, missing)
        command: click.Command = getattr(module, cmd_name)
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
