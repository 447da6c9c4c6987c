"""The part "edges": our Envoy beside what one would take instead, in front of the same nodes.

An edge has a core with the nodes; what it costs is told by its own CPU clock, so that it does not matter who shares it.
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
from bench.load import LoadError, Loop, Sample, Target, Wire, check, echo, handshakes, open_sessions, pace
from bench.nodes import MANNERS, PACED_CROWD, PACED_RATE, trips
from bench.proxies import NGINX, PLACES, UNHASHED, Edge, edges, strace
from bench.report import Figure, Part
from bench.rounds import Rounds

DIRECT = "direct"
NODES = 3
SESSIONS_OF_A_USER = 2
TOGETHER = 100
"""Sessions at the same time, less than any backlog; an edge may keep each for a second after its end."""
TRACED_RATE = 200.0
PLACE = re.compile(r'"sid":"([a-z0-9]+)_')


@dataclass(frozen=True)
class Profile:
    """Rounds, seconds of each measurement, and of what size: `moves` are fleets to which a node is added."""

    rounds: int
    seconds: float
    idle_connections: int
    crowds: tuple[int, ...]
    fleets: tuple[int, ...]
    moves: tuple[int, ...]
    users: int
    sticky_users: int
    idle_seconds: float
    real_nodes: bool


PROFILES = {
    "quick": Profile(2, 0.6, 1000, (100, 1000), (), (3,), 1000, 50, 2.0, real_nodes=False),
    "full": Profile(3, 3.0, 5000, (100, 1000), (1, 10), (1, 3, 10), 5000, 200, 26.0, real_nodes=True),
}


def figures(profile: Profile) -> list[Figure]:
    """Everything that is measured, in the order of the table."""
    paced = f"at {PACED_RATE:g} echoes per second on {PACED_CROWD} connections"
    of_nodes = {number: f"{number} node" + "s" * (number > 1) for number in (*profile.fleets, *profile.moves)}
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
        Figure("paced-cpu", f"CPU of an echo {paced}", "µs", False, True),
        *(
            Figure(f"echo-cpu-of-{number}", f"CPU of an echo {paced}, {of_nodes[number]}", "µs", False)
            for number in profile.fleets
        ),
        *[Figure("real-cpu", f"CPU of an echo {paced}, stickyring's nodes", "µs", False)] * profile.real_nodes,
        Figure("trip-p50", f"round trip {paced}, median", "ms", False, True),
        Figure("trip-p99", f"round trip {paced}, 99th percentile", "ms", False, True),
        Figure("added-p50", "what the edge adds to that, median", "ms", None),
        Figure("added-p99", "what the edge adds to that, 99th percentile", "ms", None),
        Figure("system-calls", "system calls of an echo, 1 connection", "calls", False, True),
        *(
            Figure(f"session-cpu@{key}", f"CPU of a session, {manner}", "µs", False, True)
            for key, (manner, _, _) in MANNERS.items()
        ),
        Figure("idle-memory", f"memory per connection, {profile.idle_connections} idle", "KiB", False, True),
        Figure("idle-cpu", f"CPU of {profile.idle_connections} idle connections", "% of a core", False),
        Figure("memory", "memory without a connection", "MiB", False),
        Figure("sticky", f"users with {SESSIONS_OF_A_USER} whole polling sessions on one node", "%", True, True),
        *(
            Figure(f"moved@{number}", f"users moved when {of_nodes[number]} get one more", "%", None, True)
            for number in profile.moves
        ),
        *(
            Figure(f"busiest@{number}", f"users on the busiest of {of_nodes[number]}, to the mean", "times", False)
            for number in profile.moves
        ),
    ]


def measure(rounds: Rounds, profile: Profile) -> Part:
    """Measure every edge in every round; what a round starts with rotates."""
    rounds.say("installing what is missing")
    return compare(rounds, profile, edges(rounds.folder), strace(rounds.folder))


def compare(rounds: Rounds, profile: Profile, compared: Sequence[Edge], tracer: Path) -> Part:
    """Measure these edges; the one without a hash only in what it cannot do."""
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
    with _nodes(rounds, NODES) as nodes:
        for edge in measured:
            with _running(rounds, edge, nodes) as server:
                part.add(edge.key, {"system-calls": _system_calls(server, tracer)})
    for number in rounds.go(profile.rounds, "echoes and sessions"):
        with _nodes(rounds, NODES) as nodes:
            direct = trips(_paced(nodes[0], profile), "trip")
            part.add(DIRECT, direct | _rates(nodes[0], profile))
            for edge in rounds.rotated(measured, number):
                with _running(rounds, edge, nodes) as server:
                    found = _traffic(server, profile, direct)
                rounds.say(f"{edge.title}: {found['paced-cpu']:.0f} µs of CPU an echo")
                part.add(edge.key, found)
        others = [(f"echo-cpu-of-{fleet}", fleet, False) for fleet in profile.fleets]
        for figure, fleet, real in [*others, *[("real-cpu", NODES, True)] * profile.real_nodes]:
            with _nodes(rounds, fleet, real=real) as nodes:
                for edge in measured:
                    with _running(rounds, edge, nodes) as server:
                        part.add(edge.key, {figure: _cpu(_paced(server, profile))})
    return part


@contextlib.contextmanager
def _nodes(rounds: Rounds, number: int, *, real: bool = False) -> Iterator[list[Server]]:
    """Run so many nodes, the stub or our own."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                running(ours() if real else stub(place), rounds.server_core, rounds.log(f"edges-{place}"))
            )
            for place in PLACES[:number]
        ]


@contextlib.contextmanager
def _running(rounds: Rounds, edge: Edge, nodes: Sequence[Server]) -> Iterator[Server]:
    """Run an edge before these nodes; every session through it is another user's."""
    contender: Contender = edge.before([node.target.port for node in nodes], rounds.folder)
    with running(contender, rounds.server_core, rounds.log(f"edges-{edge.key}")) as server:
        users = (f"user-{number}" for number in itertools.count())
        yield replace(server, target=replace(server.target, users=users))


def _traffic(server: Server, profile: Profile, direct: dict[str, float]) -> dict[str, float]:
    """What one edge costs in front of the nodes, of which `direct` are the round trips without it."""
    loop, target, wires = Loop(), server.target, list[Wire]()
    check(loop, target)
    unused, heap = server.memory(), server.heap()
    open_sessions(loop, target, wires, profile.idle_connections)
    found = {
        "memory": unused / 2**20,
        "idle-memory": (server.heap() - heap) / profile.idle_connections / 1024,
    }
    idle = server.cpu_seconds()
    loop.run(profile.idle_seconds)
    found["idle-cpu"] = 100 * (server.cpu_seconds() - idle) / profile.idle_seconds
    paced = pace(loop, target, wires[:PACED_CROWD], server.cpu_seconds, seconds=profile.seconds, rate=PACED_RATE)
    found["paced-cpu"] = _cpu(paced)
    found |= (through := trips(paced, "trip"))
    found |= {key.replace("trip", "added"): value - direct[key] for key, value in through.items()}
    found |= _echoes(loop, server, wires, profile)
    # Of no rate: an edge may keep a connection for a second after its end, and the load waits for that.
    for key, (_, manner, _) in MANNERS.items():
        sample = handshakes(loop, target, manner, server.cpu_seconds, together=TOGETHER, seconds=profile.seconds)
        found[f"session-cpu@{key}"] = _cpu(sample)
    loop.close()
    return found


def _echoes(loop: Loop, server: Server, wires: Sequence[Wire], profile: Profile) -> dict[str, float]:
    """The most echoes that there can be, and their costs."""
    found: dict[str, float] = {}
    for crowd in profile.crowds:
        cpu, user = server.cpu_seconds(), server.user_seconds()
        sample = echo(loop, server.target, wires[:crowd], profile.seconds, server.cpu_seconds)
        share = (server.user_seconds() - user) / (server.cpu_seconds() - cpu)
        found |= {f"echoes@{crowd}": sample.count / sample.seconds, f"echo-cpu@{crowd}": _cpu(sample)}
        found[f"user-cpu@{crowd}"] = share * _cpu(sample)
    return found


def _rates(node: Server, profile: Profile) -> dict[str, float]:
    """The most echoes of the load and a node without an edge; with one, the load is not to be what allows no more."""
    with contextlib.closing(Loop()) as loop:
        wires: list[Wire] = []
        open_sessions(loop, node.target, wires, max(profile.crowds))
        found = _echoes(loop, node, wires, profile)
    return {key: value for key, value in found.items() if key.startswith("echoes@")}


def _paced(server: Server, profile: Profile) -> Sample:
    """Echoes at a steady rate."""
    with contextlib.closing(Loop()) as loop:
        wires: list[Wire] = []
        open_sessions(loop, server.target, wires, PACED_CROWD)
        return pace(loop, server.target, wires, server.cpu_seconds, seconds=profile.seconds, rate=PACED_RATE)


def _cpu(sample: Sample) -> float:
    """Microseconds of CPU for each thing that was done."""
    return 1e6 * sample.cpu / sample.count


def _system_calls(server: Server, tracer: Path) -> float:
    """How many of them an echo takes; with one connection, so that none serves several."""
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
        # % time, seconds, usecs/call, calls, errors if there were any, "total"
        total = table.read().splitlines()[-1].split()
        return int(total[3]) / sample.count


def _users(rounds: Rounds, part: Part, edge: Edge, profile: Profile) -> None:
    """Measure which nodes users are on: whether their requests are on one, and how many of them another node moves."""
    for fleet in profile.moves:
        with _nodes(rounds, fleet + 1) as nodes:
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
    rounds.say(f"{edge.title}: asked where users are")


class Client:
    """A user who keeps a cookie, as a browser does."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._cookie: dict[str, str] = {}

    def place(self, target: Target) -> str:
        """Begin a session, and return the place of the node that took it."""
        status, body = self._ask(target, "GET")
        found = PLACE.search(body)
        if status != 200 or not found:
            raise LoadError(f"{target.title} answers a handshake with {status}: {body[:80]}")
        return found[1]

    def stays(self, target: Target) -> bool:
        """Whether sessions come about whose every request has a connection of its own, all on one node."""
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
