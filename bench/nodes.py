"""The part "nodes": our service compared with alternatives, all with the same echo."""

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from bench.contenders import (
    NODEJS,
    OURS,
    PLAIN,
    STOCK,
    STUB,
    Contender,
    Server,
    contenders,
    python_title,
    running,
    stub,
)
from bench.load import (
    Loop,
    Sample,
    Session,
    Wire,
    check,
    close_sessions,
    echo,
    handshakes,
    open_sessions,
    pace,
    polling_first,
    polling_only,
    websocket_first,
)
from bench.report import Figure, Part
from bench.rounds import Rounds

PACED_CROWD, PACED_RATE = 100, 1000.0
PART_LOAD = 0.7
"""The share of the rate under full load at which an echo's cost is measured again, because hosts should not be full."""
MOST_DESCRIPTORS = 18_000
"""Connections that the load holds at the same time; the smallest hosts allow a process 20 000."""

MANNERS: dict[str, tuple[str, Callable[[Wire], Session], int]] = {
    "websocket": ("WebSocket first", websocket_first, 50),
    "polling": ("long polling, no upgrade", polling_only, 50),
    # More at a time, because socket.io delays each upgrade by up to 100 ms.
    "upgrade": ("long polling first, then WebSocket", polling_first, 100),
}


@dataclass(frozen=True)
class Profile:
    """The number and duration of the measurements.

    Each contender is started `starts` times alone. It holds idle connections `idle_rounds` times, for a little more
    than one ping interval of Engine.IO (25 s), so that each connection is pinged once. Before the rounds, a contender
    has each kind of load for `warm_up_seconds`, one that compiles at run time for `compiling_seconds`. The contender
    with the key `left_out` is not measured.
    """

    rounds: int
    starts: int
    idle_rounds: int
    seconds: float
    idle_connections: int
    crowds: tuple[int, ...] = (1, 100, 1000)
    idle_seconds: float = 26.0
    warm_up_seconds: float = 0.4
    compiling_seconds: float = 1.0
    left_out: str = ""


PROFILES = {
    "quick": Profile(rounds=2, starts=1, idle_rounds=1, seconds=0.3, idle_connections=1000, left_out=PLAIN),
    "full": Profile(rounds=7, starts=3, idle_rounds=3, seconds=1.0, idle_connections=5000, compiling_seconds=10.0),
}


def figures(profile: Profile) -> list[Figure]:
    """All figures, in the order of the table."""
    found = [Figure("ready", "time to ready", "ms", False, True)]
    for crowd in profile.crowds:
        of = f"{crowd} connection" + "s" * (crowd > 1)
        found += [
            Figure(f"echoes@{crowd}", f"echoes per second, {of}", "1/s", True),
            Figure(f"echoes-per-cpu@{crowd}", f"echoes per CPU second, {of}", "1/s", True, True),
            Figure(f"busy@{crowd}", f"share of its core that the server used, {of}", "%", None),
            Figure(f"trip-p50@{crowd}", f"round trip under full load, median, {of}", "ms", False),
            Figure(f"trip-p99@{crowd}", f"round trip under full load, 99th percentile, {of}", "ms", False),
        ]
    paced = f"at {PACED_RATE:g} echoes per second on {PACED_CROWD} connections"
    found += [
        Figure("paced-p50", f"round trip {paced}, median", "ms", False, True),
        Figure("paced-p99", f"round trip {paced}, 99th percentile", "ms", False, True),
    ]
    for key, (manner, _, _) in MANNERS.items():
        found += [
            Figure(f"handshakes@{key}", f"sessions per second, {manner}", "1/s", True),
            Figure(f"handshakes-per-cpu@{key}", f"sessions per CPU second, {manner}", "1/s", True, True),
        ]
    return [
        *found,
        part_load(profile.crowds),
        Figure("idle-memory", f"memory per connection, {profile.idle_connections} idle", "KiB", False, True),
        Figure("idle-cpu", f"CPU of {profile.idle_connections} idle connections", "% of a core", False, True),
        Figure("memory", "memory without a connection", "MiB", False),
        Figure(
            "opening",
            f"time to open {profile.idle_connections} connections, just started, WebSocket first",
            "ms",
            False,
            True,
        ),
    ]


def part_load(crowds: Sequence[int]) -> Figure:
    """Return the figure of an echo's cost under part load, with the most connections."""
    title = f"CPU of an echo at {PART_LOAD:.0%} of the most echoes, {max(crowds)} connections"
    return Figure("part-load-cpu", title.replace("%", " %"), "µs", False)


def measure(rounds: Rounds, profile: Profile) -> Part:
    """Measure every contender in every round; each round starts with another one."""
    rounds.say("installing what is missing")
    compared = [each for each in contenders(rounds.folder) if each.key != profile.left_out]
    return compare(rounds, profile, compared, python_title(rounds.folder))


def compare(rounds: Rounds, profile: Profile, compared: Sequence[Contender], python: str) -> Part:
    """Measure these contenders and the stub; `python` names the Python of those in Python."""
    everyone = [*compared, stub()]
    part = Part(
        "nodes",
        "Nodes",
        figures(profile),
        {contender.key: contender.title for contender in everyone},
        {contender.key: contender.shown() for contender in everyone},
        STOCK if any(contender.key == STOCK for contender in compared) else OURS,
        STUB,
        setting=f"The servers had one core, the load another. Those in Python ran on {python}, but for PyPy, which is "
        "Debian 13's too. Clients offer compression, as browsers do: the stock way "
        "takes it up, the others do not. Everybody but the stock way and Node.js has the options of stickyring.echo. "
        f"PyPy and Node.js, which compile what runs, had {profile.compiling_seconds:g} s of each kind of load before "
        f"they were measured, the others {profile.warm_up_seconds:g} s.",
    )
    groups = rounds.groups(compared, profile.idle_rounds, MOST_DESCRIPTORS // profile.idle_connections)
    for number in rounds.go(len(groups), "idle connections"):
        _hold(rounds, part, groups[number], profile)
    for number in rounds.go(profile.starts, "starts"):
        for contender in rounds.rotated(everyone, number):
            with running(contender, rounds.server_core, rounds.log(contender.key)) as server:
                part.add(contender.key, _started(server))
    _take_turns(rounds, part, everyone, profile)
    part.sections = _to_nodejs(part)
    return part


def _to_nodejs(part: Part) -> list[str]:
    """Each contender's work per CPU second, relative to Node.js."""
    keys = [figure for figure in part.figures if "-per-cpu@" in figure.key and part.spread(figure.key, NODEJS)]
    if not keys:
        return []
    others = [key for key in part.contenders if key != NODEJS]
    return [
        "## Beside Node.js",
        "",
        "Times what Node.js does in a CPU second: the median, in parentheses the least and the greatest round.",
        "",
        "| figure | " + " | ".join(part.titles[key] for key in others) + " |",
        "|---|" + "---|" * len(others),
        *(
            f"| {figure.title} | " + " | ".join(str(part.ratio(figure.key, key, NODEJS)) for key in others) + " |"
            for figure in keys
        ),
    ]


def _started(server: Server) -> dict[str, float]:
    """The time to ready and the memory of a server that runs alone and has echoed once."""
    with contextlib.closing(Loop()) as loop:
        check(loop, server.target)
    return {"ready": server.ready_seconds * 1000, "memory": server.memory() / 2**20}


def _take_turns(rounds: Rounds, part: Part, everyone: Sequence[Contender], profile: Profile) -> None:
    """Measure echoes and handshakes while all contenders run, so that their measurements are close in time.

    The others have no connections meanwhile, and do not use the core.
    """
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(contextlib.closing(Loop()))
        servers = {}
        for contender in everyone:
            server = stack.enter_context(running(contender, rounds.server_core, rounds.log(contender.key)))
            _warm_up(loop, server, profile.compiling_seconds if contender.compiles else profile.warm_up_seconds)
            rounds.say(f"{contender.title} is warm")
            servers[contender.key] = server
        for number in rounds.go(profile.rounds, "echoes and handshakes"):
            turns = rounds.rotated(list(servers), number)
            for key in turns:
                part.add(key, found := _echoes(loop, servers[key], profile))
                counts = [f"{found[f'echoes@{crowd}']:.0f} echoes/s on {crowd}" for crowd in profile.crowds]
                rounds.say(f"{part.titles[key]}: {', '.join(counts)}")
            for manner in MANNERS:
                for key in turns:
                    part.add(key, _handshakes(loop, servers[key], manner, profile.seconds))


def _warm_up(loop: Loop, server: Server, seconds: float) -> None:
    """Give a server each kind of load for so many seconds."""
    wires: list[Wire] = []
    check(loop, server.target)
    open_sessions(loop, server.target, wires, PACED_CROWD)
    echo(loop, server.target, wires, seconds, server.cpu_seconds)
    close_sessions(loop, wires)
    for manner in MANNERS:
        _handshakes(loop, server, manner, seconds)


def _echoes(loop: Loop, server: Server, profile: Profile) -> dict[str, float]:
    """One server's echoes and round trips."""
    wires: list[Wire] = []
    found: dict[str, float] = {}
    target, seconds = server.target, profile.seconds
    for crowd in profile.crowds:
        open_sessions(loop, target, wires, crowd)
        sample = echo(loop, target, wires, seconds, server.cpu_seconds)
        found |= {
            f"echoes@{crowd}": sample.count / sample.seconds,
            f"echoes-per-cpu@{crowd}": sample.count / sample.cpu,
            f"busy@{crowd}": 100 * sample.cpu / sample.seconds,
        } | trips(sample, "trip", f"@{crowd}")
    paced = pace(loop, target, wires[:PACED_CROWD], server.cpu_seconds, seconds=seconds, rate=PACED_RATE)
    found |= trips(paced, "paced")
    found |= at_part_load(loop, server, wires, seconds, found[f"echoes@{max(profile.crowds)}"])
    close_sessions(loop, wires)
    return found


def _handshakes(loop: Loop, server: Server, key: str, seconds: float) -> dict[str, float]:
    """One server's sessions, begun in the manner with this key."""
    _, manner, together = MANNERS[key]
    sample = handshakes(loop, server.target, manner, server.cpu_seconds, together=together, seconds=seconds)
    return {
        f"handshakes@{key}": sample.count / sample.seconds,
        f"handshakes-per-cpu@{key}": sample.count / sample.cpu,
    }


def at_part_load(loop: Loop, server: Server, wires: Sequence[Wire], seconds: float, most: float) -> dict[str, float]:
    """The cost of an echo at PART_LOAD of the highest rate."""
    rate = PART_LOAD * most
    return {
        "part-load-cpu": cpu_of_one(pace(loop, server.target, wires, server.cpu_seconds, seconds=seconds, rate=rate))
    }


def cpu_of_one(sample: Sample) -> float:
    """Microseconds of CPU per operation."""
    return 1e6 * sample.cpu / sample.count


def trips(sample: Sample, name: str, suffix: str = "") -> dict[str, float]:
    """Median and 99th percentile of the round trips, in milliseconds."""
    percentiles = statistics.quantiles(sample.trips, n=100, method="inclusive")
    return {f"{name}-p50{suffix}": percentiles[49] * 1000, f"{name}-p99{suffix}": percentiles[98] * 1000}


def _hold(rounds: Rounds, part: Part, held: Sequence[Contender], profile: Profile) -> None:
    """Hold idle connections of several servers at the same time, in groups of equal size for all."""
    number, seconds = profile.idle_connections, profile.idle_seconds
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(contextlib.closing(Loop()))
        servers = [stack.enter_context(running(each, rounds.server_core, rounds.log(each.key))) for each in held]
        for server in servers:
            check(loop, server.target)
        heaps = [server.heap() for server in servers]
        opening = []
        for server in servers:
            begun = perf_counter()
            open_sessions(loop, server.target, [], number)
            opening.append(1000 * (perf_counter() - begun))
        rounds.say(f"{number} idle connections each: {', '.join(contender.title for contender in held)}")
        cpu = [server.cpu_seconds() for server in servers]
        loop.run(seconds)
        for contender, server, used, heap, opened in zip(held, servers, cpu, heaps, opening, strict=True):
            part.add(
                contender.key,
                {
                    "idle-memory": (server.heap() - heap) / number / 1024,
                    "idle-cpu": 100 * (server.cpu_seconds() - used) / seconds,
                    "opening": opened,
                },
            )
