"""The command `python -m bench`: compare this stack with alternatives."""

import resource
import shlex
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from bench import bus, capacity, edges, faults, nodes, operations, report
from bench.contenders import PrepareError, end_all
from bench.lab import LabError
from bench.load import LoadError
from bench.report import Part
from bench.rounds import CoresError, Rounds

ROOT = Path(__file__).parents[1]
PARTS: dict[str, tuple[Callable[[Rounds, Any], Part], Mapping[str, Any]]] = {
    "nodes": (nodes.measure, nodes.PROFILES),
    "edges": (edges.measure, edges.PROFILES),
    "bus": (bus.measure, bus.PROFILES),
    "operations": (operations.measure, operations.PROFILES),
    "faults": (faults.measure, faults.PROFILES),
}
ON_LOOPBACK = ["nodes", "edges"]
"""The default parts: each of the others takes the time of a whole run, and some create hosts on this machine."""
LIMITS = {"quick": 300.0, "full": 2400.0}
"""Maximum duration of a run in seconds, by profile."""

EPILOG = """\b
Examples:
  make bench                                    nodes and edges, at most 5 minutes
  make bench PROFILE=full                       at most 40 minutes
  make bench PARTS=bus                          broadcasts over Redis, and what users miss when it is away
  make bench PARTS=operations PROFILE=full      Ansible on the lab's hosts, as root; at most 40 minutes
  make bench PARTS=faults                       what failures cost users, on the lab's hosts, as root
  python -m bench nodes --output /tmp/mine      one part, written to another folder

\b
Exit status: 0 measured; 1 not measured, with the cause in one line; 2 bad usage; 130 interrupted.
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("parts", type=click.Choice(list(PARTS)), nargs=-1, metavar="[PARTS]...")
@click.option(
    "--profile",
    type=click.Choice(list(LIMITS)),
    default="quick",
    show_default=True,
    help="quick takes at most 5 minutes, full at most 40.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=capacity.BENCHMARKS,
    show_default="docs/benchmarks",
    help="The folder for the results.",
)
def main(parts: tuple[str, ...], profile: str, output: Path) -> None:
    """Measure PARTS and write PART.json, PART.md and PART.svg.

    The default is nodes and edges, on loopback. bus measures broadcasts over several nodes, also on loopback, and what
    users miss when the bus or a node is away. operations measures Ansible with 3 to 20 nodes (quick: 3 and 6), faults
    what failures cost users; these two create the lab's hosts and remove them, and refuse to run while there is a lab.

    Contenders take turns in every round. Each figure is a median, with the least and the greatest round. If a contender
    does not answer, or gives a wrong answer, the run fails and writes nothing of that part.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    name = ""
    try:
        rounds = Rounds(ROOT / ".artifacts/bench", LIMITS[profile])
        try:
            for name in parts or ON_LOOPBACK:
                measure, profiles = PARTS[name]
                part = measure(rounds, profiles[profile])
                context = report.context(command, profile, (rounds.load_core, rounds.server_core))
                for path in report.write(part, output, context):
                    rounds.say(f"written: {path}")
        finally:
            if output.resolve() == capacity.BENCHMARKS:
                capacity.write()
                rounds.say(f"updated from the results: {capacity.DOCUMENT}")
    except (LoadError, PrepareError, CoresError, LabError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        print(f"interrupted: nothing was written of {name or 'any part'}", file=sys.stderr)
        sys.exit(130)
    finally:
        end_all()


if __name__ == "__main__":
    main(prog_name="python -m bench")
