"""The `stickyring` command."""

import click

from stickyring.operate import drain, rebalance, sessions, undrain
from stickyring.plan.command import plan
from stickyring.probe.command import probe
from stickyring.serve import serve
from stickyring.whereis import whereis


class _Group(click.Group):
    """A group whose commands end a usage error in one line, without the usage that --help prints."""

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


main.add_command(serve)
main.add_command(probe)
main.add_command(plan)
main.add_command(whereis)
main.add_command(sessions)
main.add_command(rebalance)
main.add_command(drain)
main.add_command(undrain)
