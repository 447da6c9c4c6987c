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
A file holds what an edge serves, or is to serve, for one cluster:
  {"cluster": "nodes", "policy": "RING_HASH", "minimum_size": 1, "maximum_size": 8388608,
   "members": [{"name": "nobody", "weight": 1},
               {"name": "node1-1", "weight": 4096, "health": "HEALTHY"}, ...]}
or "policy": "MAGLEV" with "table_size": 65537 and without nobody, who is no node but
makes a weight the number of a node's points on a ring. Health is HEALTHY, UNHEALTHY
or DRAINING.
{} says that nothing is deployed.

\b
Exit status: 0 whether users move or not; 2 for files of which no plan can be made.
"""


class RingType(click.ParamType[Ring | None]):
    """A file with a ring document. Becomes its ring, or None when the document is empty."""

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
    """A file with an id a line, without percent-encoding. One that is there twice counts once, an empty line never."""

    name = "file"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """Read the file."""
        try:
            # Bytes that are no UTF-8 are kept: the edge hashes them as well.
            lines = Path(value).read_bytes().decode("utf-8", "surrogateescape").split("\n")
        except OSError as error:
            self.fail(f"{value}: {error.strerror}", param, ctx)
        ids = list(dict.fromkeys(line for each in lines if (line := each.removesuffix("\r"))))
        return ids or self.fail(f"{value} holds no id", param, ctx)


@click.command(epilog=EPILOG)
@click.option("--before", type=RingType(), help="What the edge serves now. [default: nothing]")
@click.option("--after", type=RingType(), required=True, help="What it is to serve.")
@click.option("--ids", type=IdsType(), help="Tell which of these users move: one id a line, as it stands in the URL.")
@click.option(
    "json_file", "--json", type=click.File("w", lazy=False), metavar="FILE", help="Write the plan to FILE as well."
)
@click.option(
    "plots",
    "--plot",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIRECTORY",
    help="Draw plan.png and plan.svg there.",
)
def plan(
    *, before: Ring | None, after: Ring | None, ids: list[str] | None, json_file: TextIO | None, plots: Path | None
) -> None:
    """Tell what a change of membership does to the users, before it is made.

    Which members come, go or weigh something else; how many users move, from where to where, beside the fewest that
    such a change can move; and how evenly the users are spread before and after. Users are placed exactly as the edge
    places them.
    """
    if after is None:
        raise click.UsageError("--after: an empty document is no ring; a fleet that is to go has no users to plan for")
    if before is not None and before.cluster != after.cluster:
        raise click.UsageError(f"--before is of the cluster {before.cluster}, --after of {after.cluster}")
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
            raise click.ClickException(f"cannot draw in {plots}: {error.strerror}") from error
