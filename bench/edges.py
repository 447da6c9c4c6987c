"""The part "edges": our Envoy compared with alternatives, in front of the same nodes.

An edge shares a core with the nodes; its costs are from its own CPU clock, so the sharing does not matter.
"""

import contextlib
import http.client
import itertools
import json
import re
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.contenders import Contender, Server, ours, running, stub
from bench.load import LoadError, Loop, Target, Wire, check, echo, handshakes, open_sessions, pace
from bench.nodes import (
    MANNERS,
    MOST_DESCRIPTORS,
    PACED_CROWD,
    PACED_RATE,
    at_part_load,
    cpu_of_one,
    part_load,
    trips,
)
from bench.proxies import NGINX, PLACES, UNHASHED, Edge, edges, strace
from bench.report import Figure, Part
from bench.rounds import Rounds

DIRECT = "direct"
NODES = 3
SESSIONS_OF_A_USER = 2
TOGETHER = 100
"""Concurrent sessions, fewer than any backlog; an edge may keep each for a second after its end."""
BROWSERS_MANNER = "upgrade"
"""How sessions begin in the measurements with every fleet."""
TRACED_RATE = 200.0
PLACE = re.compile(r'"sid":"([a-z0-9]+)_')


def _nodes_in_words(number: int, of: str = "") -> str:
    return f"{number} {of}node" + "s" * (number > 1)


@dataclass(frozen=True)
class Fleet:
    """Nodes behind an edge: their number, stubs or our own; keys of figures end with `suffix`."""

    number: int
    real: bool = False
    suffix: str = ""

    @property
    def title(self) -> str:
        """The fleet in words, for the title of a figure."""
        return _nodes_in_words(self.number, "stickyring " if self.real else "stub ")


@dataclass(frozen=True)
class Profile:
    """Rounds, and duration and size of each measurement.

    `fleets` are measured beside NODES stubs, with fewer figures. `moves` are fleets to which a node is added.
    """

    rounds: int
    idle_rounds: int
    seconds: float
    idle_connections: int
    fleets: tuple[Fleet, ...]
    moves: tuple[int, ...]
    users: int
    sticky_users: int
    idle_seconds: float
    crowds: tuple[int, ...] = (100, 1000)


PROFILES = {
    "quick": Profile(
        rounds=2,
        idle_rounds=1,
        seconds=0.3,
        idle_connections=1000,
        fleets=(),
        moves=(3,),
        users=1000,
        sticky_users=50,
        idle_seconds=2.0,
    ),
    "full": Profile(
        rounds=3,
        idle_rounds=3,
        seconds=2.5,
        idle_connections=5000,
        fleets=(Fleet(1, suffix="-of-1"), Fleet(10, suffix="-of-10"), Fleet(NODES, real=True, suffix="-of-ours")),
        moves=(1, 3, 10),
        users=5000,
        sticky_users=200,
        idle_seconds=26.0,
    ),
}


def figures(profile: Profile) -> list[Figure]:
    """All figures, in the order of the table."""
    return [
        *(
            Figure(
                f"echoes@{crowd}",
                f"echoes per second of edge and nodes on one core, {crowd} connections",
                "1/s",
                True,
            )
            for crowd in profile.crowds
        ),
        *(
            Figure(f"echo-cpu@{crowd}", f"CPU of an echo under full load, {crowd} connections", "µs", False, True)
            for crowd in profile.crowds
        ),
        *(
            Figure(f"user-cpu@{crowd}", f"of it, outside the kernel, {crowd} connections", "µs", False)
            for crowd in profile.crowds
        ),
        part_load(profile.crowds),
        *(figure for fleet in (Fleet(NODES), *profile.fleets) for figure in _figures_of(fleet, profile)),
        Figure("system-calls", "system calls of an echo, 1 connection", "calls", False, True),
        *(
            Figure(f"session-cpu@{key}", f"CPU of a session, {manner}", "µs", False, True)
            for key, (manner, _, _) in MANNERS.items()
            if key != BROWSERS_MANNER
        ),
        Figure("idle-memory", f"memory per connection, {profile.idle_connections} idle", "KiB", False, True),
        Figure("idle-cpu", f"CPU of {profile.idle_connections} idle connections", "% of a core", False),
        Figure("memory", "memory without a connection", "MiB", False),
        Figure("sticky", f"users with {SESSIONS_OF_A_USER} whole polling sessions on one node", "%", True, True),
        *(
            Figure(f"moved@{number}", f"users moved when a node is added to {_nodes_in_words(number)}", "%", None, True)
            for number in profile.moves
        ),
        *(
            Figure(
                f"busiest@{number}", f"users on the busiest of {_nodes_in_words(number)}, to the mean", "times", False
            )
            for number in profile.moves
        ),
    ]


def _figures_of(fleet: Fleet, profile: Profile) -> list[Figure]:
    """The figures that are measured with every fleet."""
    paced = f"at {PACED_RATE:g} echoes per second on {PACED_CROWD} of {max(profile.crowds)} connections, {fleet.title}"
    drawn = not fleet.suffix
    found = [
        Figure("paced-cpu", f"CPU of an echo {paced}", "µs", False, drawn),
        Figure("trip-p50", f"round trip {paced}, median", "ms", False, drawn),
        Figure("trip-p99", f"round trip {paced}, 99th percentile", "ms", False, drawn),
        Figure("added-p50", f"what the edge adds to that, {fleet.title}, median", "ms", None),
        Figure("added-p99", f"what the edge adds to that, {fleet.title}, 99th percentile", "ms", None),
        Figure(
            f"session-cpu@{BROWSERS_MANNER}",
            f"CPU of a session, {MANNERS[BROWSERS_MANNER][0]}, {fleet.title}",
            "µs",
            False,
            drawn,
        ),
        Figure(
            "opened-memory", f"memory per connection, {max(profile.crowds)} just opened, {fleet.title}", "KiB", False
        ),
    ]
    return [replace(figure, key=figure.key + fleet.suffix) for figure in found]


def measure(rounds: Rounds, profile: Profile) -> Part:
    """Measure every edge in every round; each round starts with another one."""
    rounds.say("installing what is missing")
    return compare(rounds, profile, edges(rounds.folder), strace(rounds.folder))


def compare(rounds: Rounds, profile: Profile, compared: Sequence[Edge], tracer: Path) -> Part:
    """Measure these edges; the one without a hash is the control of the stickiness."""
    part = Part(
        "edges",
        "Edges",
        figures(profile),
        {**{edge.key: edge.title for edge in compared}, DIRECT: "no edge"},
        {
            **{edge.key: edge.before([8002, 8003, 8004], rounds.folder).shown() for edge in compared},
            DIRECT: stub(PLACES[0]).shown(),
        },
        NGINX,
        DIRECT,
        setting=f"An edge and {NODES} nodes behind it, the stub unless it says otherwise, shared one core; the load "
        "had another. A new node's share of the users should be one of all nodes; who has the node in a cookie "
        "stays, and the new one gets none of them.",
    )
    for edge in compared:
        _users(rounds, part, edge, profile)
    measured = [edge for edge in compared if edge.key != UNHASHED]
    with _nodes(rounds, Fleet(NODES)) as nodes:
        for edge in measured:
            with _running(rounds, edge, nodes) as server:
                part.add(edge.key, {"system-calls": _system_calls(server, tracer)})
    groups = rounds.groups(measured, profile.idle_rounds, MOST_DESCRIPTORS // profile.idle_connections)
    for number in rounds.go(len(groups), "idle connections"):
        with _nodes(rounds, Fleet(NODES)) as nodes:
            _hold(rounds, part, groups[number], nodes, profile)
    for number in rounds.go(profile.rounds, "echoes and sessions"):
        for fleet in (Fleet(NODES), *profile.fleets):
            with _nodes(rounds, fleet) as nodes:
                direct = _direct(nodes[0], fleet, profile)
                part.add(DIRECT, direct)
                for edge in rounds.rotated(measured, number):
                    with _running(rounds, edge, nodes) as server:
                        found = _traffic(server, fleet, profile, direct)
                    rounds.say(
                        f"{edge.title}: {found['paced-cpu' + fleet.suffix]:.0f} µs of CPU an echo, {fleet.title}"
                    )
                    part.add(edge.key, found)
    return part


@contextlib.contextmanager
def _nodes(rounds: Rounds, fleet: Fleet) -> Iterator[list[Server]]:
    """Run the nodes of a fleet."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                running(
                    ours(rounds.folder) if fleet.real else stub(place), rounds.server_core, rounds.log(f"edges-{place}")
                )
            )
            for place in PLACES[: fleet.number]
        ]


@contextlib.contextmanager
def _running(rounds: Rounds, edge: Edge, nodes: Sequence[Server]) -> Iterator[Server]:
    """Run an edge in front of these nodes; every session through it is of another user."""
    contender: Contender = edge.before([node.target.port for node in nodes], rounds.folder)
    with running(contender, rounds.server_core, rounds.log(f"edges-{edge.key}")) as server:
        users = (f"user-{number}" for number in itertools.count())
        yield replace(server, target=replace(server.target, users=users))


def _hold(rounds: Rounds, part: Part, held: Sequence[Edge], nodes: Sequence[Server], profile: Profile) -> None:
    """Hold idle connections through several edges at the same time, in groups of equal size for all."""
    number, seconds = profile.idle_connections, profile.idle_seconds
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(contextlib.closing(Loop()))
        servers = [stack.enter_context(_running(rounds, edge, nodes)) for edge in held]
        heaps = [server.heap() for server in servers]
        for server in servers:
            open_sessions(loop, server.target, [], number)
        rounds.say(f"{number} idle connections each: {', '.join(edge.title for edge in held)}")
        cpu = [server.cpu_seconds() for server in servers]
        loop.run(seconds)
        for edge, server, heap, used in zip(held, servers, heaps, cpu, strict=True):
            found = {
                "idle-memory": (server.heap() - heap) / number / 1024,
                "idle-cpu": 100 * (server.cpu_seconds() - used) / seconds,
            }
            part.add(edge.key, found)


def _traffic(server: Server, fleet: Fleet, profile: Profile, direct: dict[str, float]) -> dict[str, float]:
    """The costs of one edge in front of a fleet; `direct` is the result of `_direct` for its nodes."""
    with contextlib.closing(Loop()) as loop:
        wires: list[Wire] = []
        check(loop, server.target)
        unused, heap = server.memory(), server.heap()
        open_sessions(loop, server.target, wires, max(profile.crowds))
        opened = (server.heap() - heap) / len(wires) / 1024
        found = _paced(loop, server, wires, profile)
        found |= {
            key.replace("trip", "added"): found[key] - direct[key + fleet.suffix] for key in ("trip-p50", "trip-p99")
        }
        found |= {
            "opened-memory": opened,
            f"session-cpu@{BROWSERS_MANNER}": _session(loop, server, BROWSERS_MANNER, profile),
        }
        found = {key + fleet.suffix: value for key, value in found.items()}
        if fleet.suffix:
            return found
        found |= {"memory": unused / 2**20} | _echoes(loop, server, wires, profile)
        found |= at_part_load(loop, server, wires, profile.seconds, found[f"echoes@{max(profile.crowds)}"])
        others = [key for key in MANNERS if key != BROWSERS_MANNER]
        return found | {f"session-cpu@{key}": _session(loop, server, key, profile) for key in others}


def _direct(node: Server, fleet: Fleet, profile: Profile) -> dict[str, float]:
    """The round trips and the highest rate of echoes without an edge, which shows that the load is not the limit."""
    with contextlib.closing(Loop()) as loop:
        wires: list[Wire] = []
        open_sessions(loop, node.target, wires, max(profile.crowds))
        found = {
            key + fleet.suffix: value for key, value in _paced(loop, node, wires, profile).items() if "trip" in key
        }
        if not fleet.suffix:
            rates = _echoes(loop, node, wires, profile)
            found |= {key: value for key, value in rates.items() if key.startswith("echoes@")}
    return found


def _paced(loop: Loop, server: Server, wires: Sequence[Wire], profile: Profile) -> dict[str, float]:
    """Echoes at a steady rate."""
    crowd = wires[:PACED_CROWD]
    sample = pace(loop, server.target, crowd, server.cpu_seconds, seconds=profile.seconds, rate=PACED_RATE)
    return {"paced-cpu": cpu_of_one(sample)} | trips(sample, "trip")


def _session(loop: Loop, server: Server, manner: str, profile: Profile) -> float:
    """Microseconds of CPU per session. Not a rate, because an edge may keep a connection for a second after its end,
    and the load waits for that.
    """
    _, life, _ = MANNERS[manner]
    sample = handshakes(loop, server.target, life, server.cpu_seconds, together=TOGETHER, seconds=profile.seconds)
    return cpu_of_one(sample)


def _echoes(loop: Loop, server: Server, wires: Sequence[Wire], profile: Profile) -> dict[str, float]:
    """Echoes under full load, and their costs."""
    found: dict[str, float] = {}
    for crowd in profile.crowds:
        cpu, user = server.cpu_seconds(), server.user_seconds()
        sample = echo(loop, server.target, wires[:crowd], profile.seconds, server.cpu_seconds)
        share = (server.user_seconds() - user) / (server.cpu_seconds() - cpu)
        found |= {f"echoes@{crowd}": sample.count / sample.seconds, f"echo-cpu@{crowd}": cpu_of_one(sample)}
        found[f"user-cpu@{crowd}"] = share * cpu_of_one(sample)
    return found


def _system_calls(server: Server, tracer: Path) -> float:
    """System calls per echo, on one connection, so that no call serves several echoes."""
    with contextlib.closing(Loop()) as loop, tempfile.NamedTemporaryFile("r") as table:
        wires: list[Wire] = []
        open_sessions(loop, server.target, wires, 1)
        command = [str(tracer), "-f", "-c", "-o", table.name, *(f"--attach={process}" for process in server.processes)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracing:
            try:
                said = [tracing.stderr.readline().strip() for _ in server.processes if tracing.stderr]
                if not all("attached" in line for line in said):
                    raise LoadError(f"strace cannot look at {server.target.title}, and says: {said[-1]}")
                sample = pace(loop, server.target, wires, server.cpu_seconds, seconds=1, rate=TRACED_RATE)
            finally:
                tracing.send_signal(signal.SIGINT)
        # % time, seconds, usecs/call, calls, errors if any, "total"
        total = table.read().splitlines()[-1].split()
        return int(total[3]) / sample.count


def _users(rounds: Rounds, part: Part, edge: Edge, profile: Profile) -> None:
    """Measure how many users stay on one node, and how many users an added node moves."""
    for fleet in profile.moves:
        with _nodes(rounds, Fleet(fleet + 1)) as nodes:
            clients = [Client(f"user-{number}") for number in range(profile.users)]
            with _running(rounds, edge, nodes[:fleet]) as server:
                if fleet == NODES:
                    some = clients[: profile.sticky_users]
                    sticky = sum(client.stays(server.target) for client in some)
                    part.add(edge.key, {"sticky": 100 * sticky / len(some)})
                if edge.key == UNHASHED:
                    continue
                before = [client.place(server.target) for client in clients]
            with _running(rounds, edge, nodes) as server:
                after = [client.place(server.target) for client in clients]
            moved = sum(one != other for one, other in zip(before, after, strict=True))
            busiest = max(Counter(before).values()) * fleet / len(before)
            part.add(edge.key, {f"moved@{fleet}": 100 * moved / len(before), f"busiest@{fleet}": busiest})
    rounds.say(f"{edge.title}: measured which nodes users are on")


class Client:
    """A user who keeps a cookie, as a browser does."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._cookie: dict[str, str] = {}

    def place(self, target: Target) -> str:
        """Begin a session, and return the place of its node."""
        status, body = self._ask(target, "GET")
        found = PLACE.search(body)
        if status != 200 or not found:
            raise LoadError(f"{target.title} answers a handshake with {status}: {body[:80]}")
        return found[1]

    def stays(self, target: Target) -> bool:
        """Whether whole sessions stay on one node, with a connection of its own for each request."""
        places = set()
        for _ in range(SESSIONS_OF_A_USER):
            status, body = self._ask(target, "GET")
            sid = json.loads(body[1:])["sid"] if status == 200 else ""
            places.add(sid.partition("_")[0])
            answers = [self._ask(target, "POST", sid, "40"), self._ask(target, "GET", sid)]
            if [status for status, _ in answers] != [200, 200] or '40{"sid"' not in answers[-1][1]:
                return False
        return len(places) == 1

    def _ask(self, target: Target, method: str, sid: str = "", body: str | None = None) -> tuple[int, str]:
        path = f"/socket.io/?EIO=4&transport=polling&client_id={self._name}" + (f"&sid={sid}" if sid else "")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", target.port, timeout=10)) as connection:
            connection.request(method, path, body, self._cookie)
            answer = connection.getresponse()
            if cookie := answer.headers["Set-Cookie"]:
                self._cookie = {"Cookie": cookie.partition(";")[0]}
            return answer.status, answer.read().decode()
