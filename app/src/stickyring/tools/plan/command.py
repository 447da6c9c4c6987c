"""The command `stickyring plan`."""

import json
from pathlib import Path
from typing import TextIO

import click

from stickyring.cli import needing
from stickyring.ring import Ring, RingError
from stickyring.tools.plan.change import Change

EPILOG = """\b
Examples:
  stickyring plan --before served.json --after wanted.json
  stickyring plan --before served.json --after wanted.json --ids users.txt --json plan.json
                                                       which users move, one by one
  stickyring plan --before served.json --after wanted.json --plot plots/
                                                       plots/plan.png and plots/plan.svg
  stickyring plan --after wanted.json                  nothing is deployed yet

\b
A file is the ring document of one cluster, as an edge serves it now or will serve it:
  {"cluster": "nodes", "policy": "RING_HASH", "minimum_size": 1, "maximum_size": 8388608,
   "members": [{"name": "nobody", "weight": 1},
               {"name": "node1-1", "weight": 4096, "health": "HEALTHY"}, ...]}
or "policy": "MAGLEV" with "table_size": 65537 and without nobody. On a ring, nobody
is not a node: it fixes the number of points per weight, so that a member's weight is its
number of points. Health is HEALTHY, UNHEALTHY or DRAINING. {} means that nothing is deployed.

\b
Exit status: 0 whether users move or not; 2 if a file is not valid.
"""


class RingType(click.ParamType[Ring | None]):
    """A file with a ring document; converted to its ring, or None if the document is empty."""

    name = "file"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Ring | None:
        """Read and check the file."""
        try:
            document = json.loads(Path(value).read_bytes())
            return None if document == {} else Ring.load(document)
        except OSError as error:
            self.fail(f"{value}: {error.strerror}", param, ctx)
        except RingError as error:
            self.fail(f"{value}: {error}", param, ctx)
        except (ValueError, RecursionError) as error:
            self.fail(f"{value} is not JSON: {error}", param, ctx)


class IdsType(click.ParamType[list[str]]):
    """A file with one id per line, without percent-encoding; duplicates and empty lines are skipped."""

    name = "file"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """Read the file."""
        try:
            # Bytes that are not UTF-8 are kept: the edge hashes them too.
            lines = Path(value).read_bytes().decode("utf-8", "surrogateescape").split("\n")
        except OSError as error:
            self.fail(f"{value}: {error.strerror}", param, ctx)
        ids = list(dict.fromkeys(line for each in lines if (line := each.removesuffix("\r"))))
        return ids or self.fail(f"{value} contains no id", param, ctx)


@click.command(epilog=EPILOG)
@click.option("--before", type=RingType(), help="The ring document that the edge serves now. [default: nothing]")
@click.option("--after", type=RingType(), required=True, help="The ring document that it will serve.")
@click.option("--ids", type=IdsType(), help="Report which of these users move: one id per line.")
@click.option(
    "json_file", "--json", type=click.File("w", lazy=False), metavar="FILE", help="Write the plan to FILE as well."
)
@click.option(
    "plots",
    "--plot",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIRECTORY",
    help="Write plan.png and plan.svg to DIRECTORY.",
)
def plan(
    *, before: Ring | None, after: Ring | None, ids: list[str] | None, json_file: TextIO | None, plots: Path | None
) -> None:
    """Show how many users a membership change will move, and where.

    The plan shows which members join, leave or change weight; how many users move from where to where, and the least
    that such a change can move; and how evenly users are spread before and after. It places users exactly as the edge
    does.
    """
    if after is None:
        raise click.UsageError("--after: an empty document has no members to place users on")
    if before is not None and before.cluster != after.cluster:
        raise click.UsageError(f"--before is for the cluster {before.cluster}, --after for {after.cluster}")
    change = Change(before, after, ids)
    with needing("plan", "rich", "matplotlib"):
        from stickyring.tools.plan.report import show  # noqa: PLC0415

        if plots is not None:
            from stickyring.tools.plan.plot import draw  # noqa: PLC0415
    show(change)
    if json_file is not None:
        json.dump(change.as_json(), json_file, indent=2)
        json_file.write("\n")
    if plots is not None:
        try:
            draw(change, plots)
        except OSError as error:
            raise click.ClickException(f"cannot write plots to {plots}: {error.strerror}") from error
