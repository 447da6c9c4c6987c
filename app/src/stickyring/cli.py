"""The `stickyring` command."""

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stickyring")
def main() -> None:
    """Serve Socket.IO applications behind a sticky edge, and prove that the edge is sticky."""
