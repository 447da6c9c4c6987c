"""The part "bus": broadcasts over several nodes, and what users miss when the bus or a node is away."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import redis

from bench.application import BUS_URL
from bench.contenders import (
    HERE,
    NODEJS,
    ROOT,
    Contender,
    PrepareError,
    Server,
    install,
    node_modules,
    ours,
    python_title,
    running,
    signal_all,
)
from bench.load import WINDOW, LoadError, Loop, Wire, broadcast, close_sessions, listening, masked, open_sessions
from bench.nodes import trips
from bench.report import ALONE, Figure, Part, Spread
from bench.rounds import Rounds

# The history of each user is checked as in the tests of the bus, and a bus of three hosts is theirs.
sys.path.append(str(ROOT / "app/tests"))
from bus_crowd import Crowd, History
from bus_trio import DOWN_AFTER_SECONDS, Trio, free_port, server_program

NODES = 3
PACED_RATE = 20.0
"""Broadcasts per second, where the rate is given."""
STOP, FREEZE, FREEZE_NODE, KILL_NODE = "bus stopped", "bus frozen", "one node frozen", "one node killed"
TAKEOVER = "primary killed, another host takes over"
BEFORE_SECONDS = 2.0
AFTER_SECONDS = 10.0
"""Events go on for so long after a fault, and at least for as long as it took."""
DRAIN_SECONDS = 3.0
START_SECONDS = 10.0
REDIS_ASGI, REDIS_EVENTLET = "redis-asgi", "redis-eventlet"
RECOVERY_ASGI, RECOVERY_EVENTLET, NODEJS_RECOVERY = "asgi-recovery", "eventlet-recovery", "nodejs-streams-recovery"
IN_FAULTS = (RECOVERY_ASGI, RECOVERY_EVENTLET, REDIS_ASGI, REDIS_EVENTLET, NODEJS_RECOVERY)
WITH_SENTINELS = (RECOVERY_ASGI, RECOVERY_EVENTLET, REDIS_ASGI, REDIS_EVENTLET)
"""Those that find the primary of their bus with a URL alone."""
MISSED = {
    "lost": "events missed, and the user does not know",
    "told": "events missed, and the user knows: a new session",
    "repeated": "events repeated",
    "disordered": "events out of order",
    "late": "longest wait for an event (s)",
    "recovered": "connections that went on with their session",
    "not_recovered": "connections that got a new session",
}


class Fault(NamedTuple):
    """What fails, for how many seconds (0 for what does not come back), and how many users reconnect meanwhile."""

    what: str
    seconds: float = 0.0
    losing: int = 0

    @property
    def title(self) -> str:
        """Its name in tables."""
        seconds = f" for {self.seconds:g} s" if self.seconds else ""
        return self.what + seconds + (f", {self.losing} users reconnect meanwhile" if self.losing else "")


CONTROL = Fault(STOP, 5.0)
"""At this fault the checker has to find that RedisManager's users miss events."""


@dataclass(frozen=True)
class Profile:
    """How many users get broadcasts, how often and for how long, and which faults there are.

    A fault happens to `together` contenders at the same time, because it is mostly waiting.
    """

    rounds: int
    members: int
    seconds: float
    fault_rounds: int
    faults: tuple[Fault, ...]
    users: int = 30
    together: int = 3
    warm_up_seconds: float = 0.4
    compiling_seconds: float = 1.0


PROFILES = {
    "quick": Profile(
        rounds=3,
        members=150,
        seconds=1.0,
        fault_rounds=1,
        faults=(CONTROL, Fault(FREEZE, 7.0), Fault(KILL_NODE)),
    ),
    "full": Profile(
        rounds=5,
        members=1000,
        seconds=4.0,
        fault_rounds=2,
        faults=(
            Fault(STOP, 1.0),
            CONTROL,
            Fault(STOP, 5.0, losing=15),
            Fault(STOP, 30.0),
            Fault(FREEZE, 7.0),
            Fault(FREEZE, 12.0),
            Fault(FREEZE_NODE, 20.0),
            Fault(KILL_NODE),
            Fault(TAKEOVER),
        ),
        compiling_seconds=5.0,
    ),
}


class Bus:
    """A Redis of one contender, on loopback and on one core, which keeps its data over a restart as the role's does."""

    def __init__(self, folder: Path, core: int) -> None:
        self._folder, self._core = folder, core
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://127.0.0.1:{self._port}/0"

    def __enter__(self) -> "Bus":
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def start(self) -> None:
        """Start it; return when it answers.

        Raises:
            PrepareError: there is no Redis.
            LoadError: it does not start.
        """
        try:
            program = server_program()
        except FileNotFoundError as error:
            raise PrepareError(str(error)) from None
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(self._port), "--dir", str(self._folder)]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--save", "", "--appendonly", "yes"], executable=program, stdout=log, stderr=log
            )
        os.sched_setaffinity(self._process.pid, {self._core})
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise LoadError(f"Redis does not start: see {self._folder}/log")
            time.sleep(0.01)

    def _answers(self) -> bool:
        with contextlib.suppress(redis.ConnectionError), redis.Redis(port=self._port) as client:
            return bool(client.ping())
        return False

    @contextlib.contextmanager
    def disturbed(self, what: str) -> Iterator[None]:
        """Have it stopped in an orderly manner, or frozen, within the block."""
        assert self._process is not None
        if what == STOP:
            self._process.terminate()
            self._process.wait()
            yield
            self.start()
        else:
            self._process.send_signal(signal.SIGSTOP)
            yield
            self._process.send_signal(signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """CPU seconds so far, as `Server.cpu_seconds`."""
        assert self._process is not None
        return time.clock_gettime(~self._process.pid << 3 | 2)


class ReplicatedBus:
    """A primary, two replicas and three Sentinels of one contender, on one core.

    They are without TLS: the URL of Sentinels that python-socketio reads cannot ask for it.
    """

    down_after_seconds = DOWN_AFTER_SECONDS

    def __init__(self, folder: Path, core: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._trio, self._core = Trio(folder, tls=False), core
        self._killed = 0
        self.url = self._trio.url

    def __enter__(self) -> "ReplicatedBus":
        mine = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {self._core})
            self._trio.start()
        except FileNotFoundError as error:
            raise PrepareError(str(error)) from None
        except TimeoutError as error:
            self._trio.stop()
            raise LoadError(f"the bus of three hosts does not start: {error}") from None
        finally:
            os.sched_setaffinity(0, mine)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._trio.stop()

    @contextlib.contextmanager
    def disturbed(self, what: str) -> Iterator[None]:
        """Kill the primary, which does not come back."""
        assert what == TAKEOVER
        self._killed = self._trio.primary()
        self._trio.kill(self._killed)
        yield

    def cpu_seconds(self) -> float:
        """CPU seconds so far of those that run, as `Server.cpu_seconds`."""
        alive = [process.pid for process in self._trio.processes.values() if process.poll() is None]
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in alive)

    def check(self) -> None:
        """Check that another host has taken over, once there was time for it.

        Raises:
            LoadError: none has.
        """
        if self._trio.primary() == self._killed:
            raise LoadError(f"{TAKEOVER}: none has taken over")


@dataclass(frozen=True)
class Fleet:
    """Running nodes of one contender, and their bus."""

    contender: Contender
    bus: Bus | ReplicatedBus
    servers: Sequence[Server]
    bus_cpu: list[float] = field(default_factory=list)

    def cpu_seconds(self) -> float:
        """CPU seconds of the nodes so far; the bus' are added to `bus_cpu`."""
        self.bus_cpu.append(self.bus.cpu_seconds())
        return sum(server.cpu_seconds() for server in self.servers)

    def open(self, loop: Loop, number: int) -> list[Wire]:
        """Open so many sessions, at all nodes as many; the first one is at the first node."""
        wires: list[Wire] = []
        for at, server in enumerate(self.servers, 1):
            open_sessions(loop, server.target, wires, number * at // len(self.servers), listening)
        return wires

    @contextlib.contextmanager
    def disturbed(self, fault: Fault) -> Iterator[None]:
        """Have a fault within the block."""
        if fault.what == KILL_NODE:
            signal_all(self.servers[1], signal.SIGKILL)
            yield
        elif fault.what == FREEZE_NODE:
            signal_all(self.servers[1], signal.SIGSTOP)
            yield
            signal_all(self.servers[1], signal.SIGCONT)
        else:
            with self.bus.disturbed(fault.what):
                yield


@contextlib.contextmanager
def fleet(rounds: Rounds, contender: Contender, *, replicated: bool = False) -> Iterator[Fleet]:
    """Run the nodes of a contender and a bus of their own, all on the servers' core."""
    place = rounds.folder / "bus" / contender.key
    kind = ReplicatedBus if replicated else Bus
    bus: Bus | ReplicatedBus = kind(place, rounds.server_core)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bus)
        contender = replace(contender, environment={**contender.environment, BUS_URL: bus.url})
        logs = [rounds.log(f"{contender.key}-{number}") for number in range(1, NODES + 1)]
        servers = [stack.enter_context(running(contender, rounds.server_core, log)) for log in logs]
        yield Fleet(contender, bus, servers)


def contenders(folder: Path) -> list[Contender]:
    """Return all contenders; missing packages are installed in `folder`."""
    node = ours(folder)
    modules = install(folder, NODEJS, node_modules, HERE / "socketio-node/package-lock.json")
    nodejs = {"NODE_ENV": "production", "NODE_PATH": str(modules / "node_modules")}

    def python(key: str, title: str, worker: str, manager: str) -> Contender:
        application = f"application:{'asgi_' * (worker == 'asgi')}broadcasting('{manager}')"
        return Contender(
            key, title, lambda port: [*node.command(port), f"--worker-class={worker}", application], node.environment
        )

    def javascript(key: str, title: str, adapter: str) -> Contender:
        program = str(HERE / "socketio-node/bus.js")
        return Contender(key, title, lambda port: ["node", program, str(port), adapter], nodejs, compiles=True)

    return [
        python("asgi", "stickyring.bus, asgi", "asgi", "ours"),
        python(RECOVERY_ASGI, "stickyring.bus with recovery, asgi", "asgi", "ours-recovery"),
        python(REDIS_ASGI, "AsyncRedisManager, asgi", "asgi", "redis"),
        python("eventlet", "stickyring.bus, eventlet", "eventlet", "ours"),
        python(RECOVERY_EVENTLET, "stickyring.bus with recovery, eventlet", "eventlet", "ours-recovery"),
        python(REDIS_EVENTLET, "RedisManager, eventlet", "eventlet", "redis"),
        javascript("nodejs-redis", "Node.js, redis-adapter", "redis"),
        javascript("nodejs-streams", "Node.js, redis-streams-adapter", "streams"),
        javascript(NODEJS_RECOVERY, "Node.js, redis-streams-adapter with recovery", "streams-recovery"),
    ]


def figures(profile: Profile) -> list[Figure]:
    """All figures of broadcasts, in the order of the table."""
    to, paced = f"to {profile.members}", f"to {profile.members}, {PACED_RATE:g} per second"
    return [
        Figure("broadcasts", f"broadcasts {to} per second", "1/s", True, True),
        Figure("delivery-cpu", f"CPU of the nodes for an event of one user, broadcasts {to}", "µs", False, True),
        Figure("bus-cpu", f"CPU of the bus for a broadcast {to}", "µs", False, True),
        Figure("used", f"share of their core that nodes and bus used, broadcasts {to}", "%", None),
        Figure("paced-p50", f"from emit to receipt, broadcasts {paced}, median", "ms", False, True),
        Figure("paced-p99", f"from emit to receipt, broadcasts {paced}, 99th percentile", "ms", False, True),
        Figure("paced-cpu", f"CPU of the nodes for an event of one user, broadcasts {paced}", "µs", False),
    ]


def measure(rounds: Rounds, profile: Profile) -> Part:
    """Measure every contender in every round; each round starts with another one."""
    rounds.say("installing what is missing")
    client = install(rounds.folder, "socket.io-client", node_modules, ROOT / "app/package-lock.json")
    return compare(rounds, profile, contenders(rounds.folder), python_title(rounds.folder), client)


def compare(rounds: Rounds, profile: Profile, compared: Sequence[Contender], python: str, client: Path) -> Part:
    """Measure these contenders; `python` names the Python of those in Python, `client` has the JavaScript client."""
    part = Part(
        "bus",
        "Broadcasts over a bus",
        figures(profile),
        {contender.key: contender.title for contender in compared},
        {contender.key: contender.shown() for contender in compared},
        REDIS_ASGI if any(contender.key == REDIS_ASGI for contender in compared) else compared[0].key,
        setting=f"Each had {NODES} nodes of one process and a Redis of its own, which appends to a file as the role's "
        f"does; all of them shared one core, the load had another. Those in Python ran on {python}, each on a node of "
        "stickyring: only the client manager differs. Users had WebSockets, as many at each node, and one of them "
        f"asked a node for each broadcast, with at most {WINDOW} on their way, or at the given rate. Each user's "
        "events were checked for number and order.",
    )
    _take_turns(rounds, part, compared, profile)
    part.sections = _limited(part)
    affected = [contender for contender in compared if contender.key in IN_FAULTS]
    if profile.faults and affected:
        part.sections += _faults(rounds, part, affected, profile, client)
    return part


def _take_turns(rounds: Rounds, part: Part, compared: Sequence[Contender], profile: Profile) -> None:
    """Measure broadcasts while all contenders run, so that their measurements are close in time."""
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(contextlib.closing(Loop()))
        fleets = []
        for contender in compared:
            fleets.append(running_fleet := stack.enter_context(fleet(rounds, contender)))
            wires = running_fleet.open(loop, profile.members)
            seconds = profile.compiling_seconds if contender.compiles else profile.warm_up_seconds
            broadcast(loop, wires, running_fleet.cpu_seconds, seconds=seconds)
            close_sessions(loop, wires)
            rounds.say(f"{contender.title} is warm")
        for number in rounds.go(profile.rounds, "broadcasts"):
            for each in rounds.rotated(fleets, number):
                found = _broadcasts(loop, each, profile)
                part.add(each.contender.key, found)
                rounds.say(f"{each.contender.title}: {found['broadcasts']:.0f} broadcasts/s to {profile.members}")


def _broadcasts(loop: Loop, each: Fleet, profile: Profile) -> dict[str, float]:
    """One contender's broadcasts, as many as it can and paced."""
    wires = each.open(loop, profile.members)
    most = broadcast(loop, wires, each.cpu_seconds, seconds=profile.seconds)
    bus_cpu = each.bus_cpu[-1] - each.bus_cpu[-2]
    paced = broadcast(loop, wires, each.cpu_seconds, seconds=profile.seconds, rate=PACED_RATE)
    close_sessions(loop, wires)
    return {
        "broadcasts": most.count / profile.members / most.seconds,
        "delivery-cpu": 1e6 * most.cpu / most.count,
        "bus-cpu": 1e6 * bus_cpu / (most.count / profile.members),
        "used": 100 * (most.cpu + bus_cpu) / most.seconds,
        "paced-cpu": 1e6 * paced.cpu / paced.count,
    } | trips(paced, "paced")


def _limited(part: Part) -> list[str]:
    """Name those whose nodes were not the limit, or not alone."""
    used = {key: part.spread("used", key) for key in part.contenders}
    names = [part.titles[key] for key, spread in used.items() if spread is not None and spread.median < ALONE]
    if not names:
        return []
    return [
        f"Where nodes and bus used less than {ALONE:g} % of their core ({'; '.join(names)}), they were not alone the "
        "limit of the broadcasts per second: the load, or something else on the machine, was.",
        "",
    ]


def _faults(rounds: Rounds, part: Part, compared: Sequence[Contender], profile: Profile, client: Path) -> list[str]:
    """Add what users missed at each fault to the part's JSON; return the table."""
    found: dict[Fault, dict[str, list[History]]] = {fault: {} for fault in profile.faults}
    for number in rounds.go(profile.fault_rounds, "faults"):
        turns = rounds.rotated(compared, number)
        for fault in profile.faults:
            for group in _groups(turns, fault, profile.together):
                for key, history in _disturb(rounds, group, fault, profile, client).items():
                    rounds.say(f"{fault.title}: {part.titles[key]}: {_counts(history, profile.users)}")
                    if key in {REDIS_ASGI, REDIS_EVENTLET} and fault == CONTROL and not history.lost:
                        raise LoadError(
                            f"{fault.title}: no user of {part.titles[key]} misses an event: the check is wrong"
                        )
                    found[fault].setdefault(key, []).append(history)
    part.more["faults"] = {
        fault.title: {key: [_counts(one, profile.users) for one in histories] for key, histories in by_key.items()}
        for fault, by_key in found.items()
    }
    return _table(part, found, profile.users)


def _groups(turns: Sequence[Contender], fault: Fault, together: int) -> list[Sequence[Contender]]:
    """Return the contenders that have a fault, in groups that have it at the same time."""
    having = [contender for contender in turns if fault.what != TAKEOVER or contender.key in WITH_SENTINELS]
    return [having[at : at + together] for at in range(0, len(having), together)]


def _disturb(
    rounds: Rounds, group: Sequence[Contender], fault: Fault, profile: Profile, client: Path
) -> dict[str, History]:
    """Have a fault at new fleets of some contenders, at the same time; return what their users heard."""
    after = max(AFTER_SECONDS, fault.seconds)
    last = int(PACED_RATE * (BEFORE_SECONDS + fault.seconds + after))
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(contextlib.closing(Loop()))
        replicated = fault.what == TAKEOVER
        fleets = [stack.enter_context(fleet(rounds, contender, replicated=replicated)) for contender in group]
        crowds = []
        for each in fleets:
            # First, all nodes get what one of them emits.
            wires = each.open(loop, NODES)
            broadcast(loop, wires, each.cpu_seconds, seconds=profile.warm_up_seconds)
            close_sessions(loop, wires)
            urls = [f"http://127.0.0.1:{server.target.port}" for server in each.servers]
            crowds.append(Crowd(client, profile.users, urls))
        for each in fleets:
            asking: list[Wire] = []
            open_sessions(loop, each.servers[0].target, asking, 1, listening)
            asking[0].send(masked(f'42["count",{last},{PACED_RATE:g}]'.encode()))
        loop.run(BEFORE_SECONDS)
        with contextlib.ExitStack() as faults:
            for each in fleets:
                faults.enter_context(each.disturbed(fault))
            loop.run(fault.seconds / 2)
            for crowd in crowds:
                crowd.lose(fault.losing)
            loop.run(fault.seconds / 2)
        loop.run(after + DRAIN_SECONDS)
        for each in fleets:
            if isinstance(each.bus, ReplicatedBus):
                each.bus.check()
        return {contender.key: crowd.end(until=last) for contender, crowd in zip(group, crowds, strict=True)}


def _counts(history: History, users: int) -> dict[str, float]:
    """Return what the table has of a history: for one user, but for the latest event."""
    counts = {name: getattr(history, name) for name in MISSED}
    return {name: value if name == "late" else value / users for name, value in counts.items()}


def _table(part: Part, found: Mapping[Fault, Mapping[str, Sequence[History]]], users: int) -> list[str]:
    keys = [key for key in part.contenders if any(key in by_key for by_key in found.values())]
    lines = [
        "## What users miss",
        "",
        f"{users} users with the JavaScript client, as many at each node, a third over polling. The first node emits "
        f"{PACED_RATE:g} numbered events a second to everybody: for {BEFORE_SECONDS:g} s before the fault, during it, "
        f"and for {AFTER_SECONDS:g} s after it, or as long as it took. What happens to a node happens to another one. "
        "Users who lose their connection go to the next node. Pings are Socket.IO's defaults: a client gives up a node "
        "that is silent for 45 s, a node gives up a client that does not answer a ping within 20 s. Counts are those "
        "of an average user of all nodes; what nobody had has no row. The control of the check: with the "
        f"{CONTROL.title}, users of RedisManager have to miss events.",
        *(_of_takeover() if any(fault.what == TAKEOVER for fault in found) else []),
        "",
        "| fault | for a user | " + " | ".join(part.titles[key] for key in keys) + " |",
        "|---|---|" + "---|" * len(keys),
    ]
    for fault, by_key in found.items():
        for name, title in MISSED.items():
            counts = [[_counts(history, users)[name] for history in by_key.get(key, ())] for key in keys]
            if any(map(any, counts)):
                cells = [str(Spread.of(each)) if any(each) else "0" if each else "-" for each in counts]
                lines.append(f"| {fault.title} | {title} | {' | '.join(cells)} |")
    return lines


def _of_takeover() -> list[str]:
    return [
        "",
        "Where another host takes over, each bus had a primary, two replicas and three Sentinels, which give up a host "
        f"after {ReplicatedBus.down_after_seconds:g} s of silence. There was no TLS: the URL of Sentinels that "
        "python-socketio reads cannot ask for it. Node.js was not measured there: a dash.",
    ]
