"""The figures of docs/capacity.md: how many users a host holds, computed from the results of the benchmark.

`python -m bench.capacity` writes them, and so does every run of the benchmark that writes to docs/benchmarks.
A unit test fails if the document does not match docs/benchmarks.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bench import proxies
from bench.contenders import ASGI, GEVENT, OURS, OURS_ASGI, PYPY
from bench.nodes import PART_LOAD
from bench.report import Spread, number

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/capacity.md"
BENCHMARKS = ROOT / "docs/benchmarks"
PARTS = ("nodes", "edges", "faults")
BEGIN, END = "<!-- figures: python -m bench.capacity -->", "<!-- end of the figures -->"

MEMORY_SHARE, CPU_SHARE = 0.75, PART_LOAD
HEAP_SHARE = 0.98
"""Share of the edge's heap limit at which it begins to refuse requests."""
PORTS = 60999 - 32768 + 1
"""Linux's net.ipv4.ip_local_port_range: connections that one edge can have to one instance."""
GIVE_UP_SECONDS = 20.0
"""Seconds that a Socket.IO client waits for a connection before it tries again."""
CAP = "cap"
"""The limit that is a variable of the role."""
HOSTS = ((1, 1), (2, 2), (4, 4), (8, 8))
"""Cores and GiB of the hosts in the tables."""
RATES = {"silent": 0.0, "a message a minute": 1 / 60, "a message every 10 s": 0.1, "a message a second": 1.0}
"""Messages per second and user, each of which is answered."""


@dataclass(frozen=True)
class Costs:
    """What an instance costs, in KiB and CPU seconds; `idle` is per connection and second."""

    instance_memory: float
    memory: float
    idle: float
    message: float
    websocket_first: float
    polling_first: float

    @classmethod
    def of(cls, nodes: Mapping[str, Any], contender: str = OURS) -> "Costs":
        """Return the medians of one of our contenders from the results of the part "nodes"."""
        found = {key: figure["found"][contender]["median"] for key, figure in nodes["figures"].items()}
        return cls(
            instance_memory=found["memory"] * 1024,
            memory=found["idle-memory"],
            idle=found["idle-cpu"] / 100 / _idle_connections(nodes),
            message=found["part-load-cpu"] / 1e6,
            websocket_first=1 / found["handshakes-per-cpu@websocket"],
            polling_first=1 / found["handshakes-per-cpu@upgrade"],
        )


@dataclass(frozen=True)
class EdgeCosts:
    """What our edge costs, in units of `Costs`: without connections, per WebSocket, and per message."""

    process_memory: float
    memory: float
    idle: float
    message: float

    @classmethod
    def of(cls, edges: Mapping[str, Any]) -> "EdgeCosts":
        """Return the medians of our edge from the results of the part "edges"."""
        found = {key: figure["found"][proxies.OURS]["median"] for key, figure in edges["figures"].items()}
        return cls(
            process_memory=found["memory"] * 1024,
            memory=found["idle-memory"],
            idle=found["idle-cpu"] / 100 / _idle_connections(edges),
            message=found["part-load-cpu"] / 1e6,
        )


@dataclass(frozen=True)
class Caps:
    """The limits in the roles' defaults."""

    node_connections: int
    node_descriptors: int
    edge_connections: int
    edge_descriptors: int
    edge_heap_mib: int

    @classmethod
    def of(cls, defaults: Mapping[str, Any]) -> "Caps":
        """Return the limits from the roles' defaults."""
        return cls(
            defaults["stickyring_node_max_connections"],
            defaults["stickyring_node_limit_nofile"],
            defaults["stickyring_edge_max_connections"],
            defaults["stickyring_edge_limit_nofile"],
            defaults["stickyring_edge_max_heap_mib"],
        )


def limits(costs: Costs, caps: Caps, cores: int, gib: float, rate: float) -> dict[str, int]:
    """Return how many users each limit allows on a host with one instance per core.

    `rate` is messages per second and user.
    """
    memory = MEMORY_SHARE * gib * 2**20 - cores * costs.instance_memory
    return {
        "memory": max(0, int(memory / costs.memory)),
        "CPU": int(CPU_SHARE * cores / (costs.idle + rate * costs.message)),
        CAP: cores * caps.node_connections,
        "descriptors": cores * caps.node_descriptors,
        "ports": cores * PORTS,
    }


def edge_limits(costs: EdgeCosts, caps: Caps, cores: int, gib: float, rate: float) -> dict[str, int]:
    """Return how many users each limit allows on an edge; `rate` as for `limits`."""
    return {
        "memory": max(0, int((MEMORY_SHARE * gib * 2**20 - costs.process_memory) / costs.memory)),
        "heap": max(0, int((HEAP_SHARE * caps.edge_heap_mib * 1024 - costs.process_memory) / costs.memory)),
        "CPU": int(CPU_SHARE * cores / (costs.idle + rate * costs.message)),
        CAP: caps.edge_connections,
        "descriptors": caps.edge_descriptors // 2,
    }


def first(allowed: Mapping[str, int]) -> tuple[int, str]:
    """Return the number of users that the strictest limit allows, and its name."""
    name = min(allowed, key=lambda each: allowed[each])
    return allowed[name], name


def seconds_back(users: int, cores: int, handshake: float) -> float:
    """Return the minimum seconds for the handshakes of all users of a host, if its cores do nothing else."""
    return users * handshake / cores


def updated(document: str, parts: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Return the document with the figures of PARTS between BEGIN and END; `defaults` are the roles'."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    nodes, edges, caps = parts["nodes"], parts["edges"], Caps.of(defaults)
    costs, users = Costs.of(nodes), caps.node_connections
    websocket, polling = (seconds_back(users, 1, each) for each in (costs.websocket_first, costs.polling_first))
    lines = [
        *_hosts("a node", partial(limits, costs, caps)),
        "",
        *_hosts("a node with PyPy", partial(limits, Costs.of(nodes, PYPY), caps)),
        "",
        f"After an outage, all {number(users)} users of an instance at its cap are back in {number(websocket)} s if "
        f"they begin with WebSocket, and in {number(polling)} s if they begin with polling, with the whole core. "
        f"{_two_digits(int(GIVE_UP_SECONDS / costs.polling_first))} users who begin with polling are back in "
        f"{GIVE_UP_SECONDS:g} s.",
        "",
        *_hosts("an edge", partial(edge_limits, EdgeCosts.of(edges), caps)),
        "",
        *_constants(nodes, edges, caps),
        "",
        "## Reasons for the defaults",
        "",
        *_reasons(parts, defaults),
    ]
    return "\n".join([before + BEGIN, "", *lines, "", END + after])


def write() -> None:
    """Update the document from docs/benchmarks and the roles."""
    DOCUMENT.write_text(updated(DOCUMENT.read_text(), written(), role_defaults()))


def written() -> dict[str, Any]:
    """Return the results of each of PARTS in docs/benchmarks."""
    return {part: json.loads((BENCHMARKS / f"{part}.json").read_text()) for part in PARTS}


def role_defaults() -> dict[str, Any]:
    """Return the defaults of the roles that run on hosts."""
    files = [ROOT / f"roles/stickyring_{role}/defaults/main.yml" for role in ("node", "edge")]
    return {name: value for file in files for name, value in yaml.safe_load(file.read_text()).items()}


def _hosts(what: str, allowed: Callable[[int, float, float], dict[str, int]]) -> list[str]:
    lines = [f"| users on {what} | {' | '.join(RATES)} |", "|---|" + "---|" * len(RATES)]
    for cores, gib in HOSTS:
        cells = [_cell(allowed(cores, gib, rate)) for rate in RATES.values()]
        lines.append(f"| {cores} core{'s' * (cores > 1)}, {gib} GiB | {' | '.join(cells)} |")
    return lines


def _cell(allowed: Mapping[str, int]) -> str:
    users, name = first(allowed)
    if name != CAP:
        return f"{_two_digits(users)}, {name}"
    then, next_name = first({name: users for name, users in allowed.items() if name != CAP})
    return f"{_two_digits(users)}, {CAP}; then {_two_digits(then)}, {next_name}"


def _two_digits(users: int) -> str:
    """Round down to two digits, which is as precise as the model."""
    unit = 10 ** max(0, len(str(users)) - 2)
    return number(users // unit * unit) if users >= 1000 else str(users // unit * unit)


def _constants(nodes: Mapping[str, Any], edges: Mapping[str, Any], caps: Caps) -> list[str]:
    costs, pypy, edge_costs = Costs.of(nodes), Costs.of(nodes, PYPY), EdgeCosts.of(edges)
    of_edges = f"[edges.json](benchmarks/edges.json), `{edges['command']}`"
    through = _idle_connections(edges)
    measured = f"[nodes.json](benchmarks/nodes.json), `{nodes['command']}`"
    crowd = _idle_connections(nodes)
    load = f"at {100 * CPU_SHARE:g} % of full load, on 1000 connections"
    node, edge = (f"[role](../roles/stickyring_{role}/defaults/main.yml)" for role in ("node", "edge"))

    def both(value: Callable[[Costs], str]) -> str:
        return f"{value(costs)}, on PyPy {value(pypy)}"

    rows = [
        (
            "`m`",
            f"memory of an idle connection on a node, at {crowd}",
            both(lambda of: f"{number(of.memory)} KiB"),
            measured,
        ),
        (
            "`M`",
            "memory of an instance without connections",
            both(lambda of: f"{number(of.instance_memory / 1024)} MiB"),
            measured,
        ),
        ("`i`", f"CPU of an idle connection in a second, at {crowd}", both(lambda of: _micro(of.idle)), measured),
        ("`e`", f"CPU of a message and its answer, {load}", both(lambda of: _micro(of.message)), measured),
        ("`w`", "CPU of a session, WebSocket first", both(lambda of: _micro(of.websocket_first)), measured),
        ("`p`", "CPU of a session, polling first, then WebSocket", both(lambda of: _micro(of.polling_first)), measured),
        ("`n`", f"memory of an idle WebSocket on an edge, at {through}", f"{number(edge_costs.memory)} KiB", of_edges),
        ("`N`", "memory of an edge without connections", f"{number(edge_costs.process_memory / 1024)} MiB", of_edges),
        ("`j`", f"CPU of an idle WebSocket in a second, at {through}", _micro(edge_costs.idle), of_edges),
        ("`f`", f"CPU of a message and its answer through an edge, {load}", _micro(edge_costs.message), of_edges),
        ("", "share of the memory that may be used", f"{100 * MEMORY_SHARE:g} %", "chosen"),
        ("", "share of each core that may be used", f"{100 * CPU_SHARE:g} %", "chosen"),
        ("", "`stickyring_node_max_connections`, of an instance", number(caps.node_connections), node),
        ("", "`stickyring_node_limit_nofile`, of an instance, 1 a WebSocket", number(caps.node_descriptors), node),
        ("", "ports of an edge towards an instance", number(PORTS), "`net.ipv4.ip_local_port_range` of Linux"),
        ("", "`stickyring_edge_max_connections`", number(caps.edge_connections), edge),
        ("", "`stickyring_edge_limit_nofile`, 2 a WebSocket", number(caps.edge_descriptors), edge),
        ("", "`stickyring_edge_max_heap_mib`", f"{number(caps.edge_heap_mib)} MiB", edge),
    ]
    return ["| | constant | value | from |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]


def _reasons(parts: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """The defaults that follow from a measurement, each with its figures."""

    def median(part: str, figure: str, contender: str) -> float:
        found: float = parts[part]["figures"][figure]["found"][contender]["median"]
        return found

    def silence(fault: str) -> str:
        users = f"{number(median('faults', fault, 'p99'))} s for 99 of 100 users"
        return f"{fault}: {users}; the limit is {median('faults', fault, 'bound'):g} s"

    costs, edge_costs, caps = Costs.of(parts["nodes"]), EdgeCosts.of(parts["edges"]), Caps.of(defaults)
    workers = {"this one": OURS, "asgi": OURS_ASGI, "gevent": GEVENT, "uvicorn alone": ASGI}
    echoes = [f"{name} {number(median('nodes', 'echoes-per-cpu@100', key))}" for name, key in workers.items()]
    websocket, polling = (
        number(seconds_back(caps.node_connections, 1, each)) for each in (costs.websocket_first, costs.polling_first)
    )
    pythons = [
        f"{name} {number(median('nodes', 'echoes-per-cpu@100', key))}, {number(median('nodes', 'memory', key))} MiB "
        f"before the first connection, ready after {number(median('nodes', 'ready', key))} ms"
        for name, key in {"this one": OURS, "pypy3": PYPY}.items()
    ]
    sessions = parts["edges"]["figures"]["session-cpu@websocket"]["found"]
    logged, silent = (Spread.of(sessions[key]["rounds"]) for key in (proxies.OURS, proxies.SILENT))
    rows = [
        (
            "node_worker_class",
            f"it serves WSGI, as most applications are; echoes per CPU second on 100 connections: {', '.join(echoes)}",
            "nodes",
        ),
        ("node_python", f"echoes per CPU second on 100 connections: {'; '.join(pythons)}", "nodes"),
        (
            "node_instances",
            f"one uses {number(median('nodes', 'busy@100', OURS))} % of a core under full load",
            "nodes",
        ),
        (
            "node_max_connections",
            f"{number(caps.node_connections * costs.memory / 1024)} MiB for idle users; if all reconnect at the same "
            f"time, {websocket} s of handshakes if they begin with WebSocket, {polling} s with polling; clients "
            f"give up after {GIVE_UP_SECONDS:g} s",
            "nodes",
        ),
        ("node_watchdog", silence("hung process"), "faults"),
        ("edge_upstream_user_timeout", silence("vanished host"), "faults"),
        ("edge_upstream_keepalive_time", silence("vanished host, of users who only listen"), "faults"),
        (
            "edge_max_connections",
            f"{number(caps.edge_connections * edge_costs.memory / 1024)} MiB for idle WebSockets, of the "
            f"{number(caps.edge_heap_mib)} MiB of `stickyring_edge_max_heap_mib`",
            "edges",
        ),
        (
            "edge_ring_points_per_weight",
            f"the busiest of 3 nodes has {number(median('edges', 'busiest@3', proxies.OURS))} times the mean, and "
            f"{number(median('edges', 'moved@3', proxies.OURS))} % of the users move to a fourth",
            "edges",
        ),
        (
            "edge_access_log",
            f"CPU of a session, WebSocket first, in µs: {logged} with, {silent} without",
            "edges",
        ),
    ]
    lines = ["| variable | default | figures | from |", "|---|---|---|---|"]
    for name, figures, part in rows:
        default = json.dumps(defaults[f"stickyring_{name}"]).strip('"')
        source = f"[{part}.json](benchmarks/{part}.json), `{parts[part]['command']}`"
        lines.append(f"| `stickyring_{name}` | `{default}` | {figures} | {source} |")
    return lines


def _micro(seconds: float) -> str:
    return f"{number(seconds * 1e6)} µs"


def _idle_connections(part: Mapping[str, Any]) -> int:
    """The number of connections in the title of the figure."""
    found = re.search(r"\d+", part["figures"]["idle-cpu"]["title"])
    assert found, "the title of idle-cpu names the number of connections"
    return int(found[0])


if __name__ == "__main__":
    write()
