"""The state of a fleet, from what playbooks/status.yml has written."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from stickyring.ring import NOBODY, Ring, RingError

GROUPS = ("edge", "nodes", "bus")
SILENT = "no answer"


@dataclass(frozen=True)
class Edge:
    """An edge: the digest of its ring without health, and the health of each member in its view.

    `ring` is empty and `error` says why if it does not answer or serves no ring.
    """

    name: str
    ring: str = ""
    health: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Instance:
    """An instance: numbers of its sessions and users, and the part of all users that it has and should have.

    `off_ring` users are assigned to another instance. `state` is serves, drains or drained. `error` says why it does
    not answer; then what is not known is None.
    """

    host: str
    name: str
    release: str = ""
    sessions: int | None = None
    users: int | None = None
    off_ring: int | None = None
    state: str = ""
    share: float | None = None
    due: float | None = None
    healthy_in: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Bus:
    """A host of the bus; `error` says what does not run there."""

    name: str
    error: str = ""


@dataclass(frozen=True)
class Fleet:
    """All of it; `problems` are whole sentences, none if all is well."""

    edges: tuple[Edge, ...]
    instances: tuple[Instance, ...]
    bus: tuple[Bus, ...]
    problems: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """Whether anything is known: an edge or an instance has answered."""
        return any(not edge.error for edge in self.edges) or any(not one.error for one in self.instances)

    @property
    def users(self) -> int:
        """Number of users on all instances."""
        return sum(one.users or 0 for one in self.instances)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {"ok": not self.problems, **asdict(self)}


def fleet_of(answers: Mapping[str, Mapping[str, Any]]) -> Fleet:
    """Return the state that the answers describe, by host.

    {"groups": those of edge, nodes and bus in which the host is, "ring": ring document, {} if none, "edge": message of
    the request for it, "node": result with stdout, lines of `stickyring summary`, "bus": result with stdout, units that
    do not run, "instances": their names in the inventory}
    """
    of = {group: {host: one for host, one in answers.items() if group in one["groups"]} for group in GROUPS}
    edges = tuple(_edge(host, one["ring"], one["edge"]) for host, one in of["edge"].items())
    rings = [ring for one in of["edge"].values() if (ring := _ring(one["ring"])) is not None]
    due = rings[0].due() if rings else {}
    instances = [
        replace(
            one,
            due=due.get(one.name),
            healthy_in=tuple(edge.name for edge in edges if edge.health.get(one.name) == "HEALTHY"),
        )
        for host, answer in of["nodes"].items()
        for one in _instances(host, answer["node"], answer["instances"])
    ]
    users = sum(one.users or 0 for one in instances)
    instances = [one if one.users is None or not users else replace(one, share=one.users / users) for one in instances]
    bus = tuple(Bus(host, _error_of(one["bus"]) or _one_line(one["bus"]["stdout"])) for host, one in of["bus"].items())
    fleet = Fleet(edges, tuple(instances), bus)
    return replace(fleet, problems=tuple(_problems(fleet)))


def digest(document: Mapping[str, Any]) -> str:
    """Return eight letters that two edges have in common if they have the same ring; health is not part of it."""
    members = [{key: value for key, value in one.items() if key != "health"} for one in document["members"]]
    text = json.dumps({**document, "members": members}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _edge(name: str, document: Mapping[str, Any], said: str) -> Edge:
    if not document:
        # Envoy has answered, but not with a ring.
        return Edge(name, error="serves no ring" if said.startswith("OK") else _one_line(said) or SILENT)
    health = {one["name"]: one.get("health", "HEALTHY") for one in document["members"] if one["name"] != NOBODY}
    return Edge(name, digest(document), health)


def _ring(document: Mapping[str, Any]) -> Ring | None:
    """Return the ring; None without one, or if none of its members is healthy."""
    try:
        return Ring.load(document)
    except RingError:
        return None


def _instances(host: str, said: Mapping[str, Any], expected: list[str]) -> Iterator[Instance]:
    """Yield the instances that have answered, and those of the inventory that have not."""
    lines = [json.loads(line) for line in said.get("stdout", "").splitlines() if line.startswith("{")]
    found = {line["node"]: line for line in lines if "node" in line}
    errors = [line["error"] for line in lines if "error" in line]
    error = _error_of(said) or next(iter(errors), "does not run")
    for name in [*expected, *(name for name in found if name not in expected)]:
        if (line := found.get(name)) is None:
            yield Instance(host, name, error=error)
            continue
        drain = line["drain"]
        state = "serves" if not drain["draining"] else "drained" if drain["drained"] else "drains"
        counts = {key: line[key] for key in ("release", "sessions", "users", "off_ring")}
        yield Instance(host, name, state=state, **counts)


def _error_of(said: Mapping[str, Any]) -> str:
    """Return why a host has not answered; empty if it has."""
    if not said:
        return "not asked"
    if said.get("unreachable"):
        return _one_line(said.get("msg", "")) or SILENT
    if "No such command 'summary'" in said.get("stderr", ""):
        return "its release is older than `stickyring status`; run site.yml"
    if said.get("rc"):
        return _one_line(said.get("stderr") or said.get("stdout") or said.get("msg", "")) or SILENT
    return ""


def _one_line(text: str) -> str:
    return " ".join(text.split()).removeprefix("Task failed: ").rstrip(".")


def _problems(fleet: Fleet) -> Iterator[str]:
    """Yield what is wrong, and what to do where that is one command."""
    for name, error in [(edge.name, edge.error) for edge in fleet.edges] + [(bus.name, bus.error) for bus in fleet.bus]:
        if error:
            yield f"{name}: {error}."
    hosts = Counter(one.host for one in fleet.instances)
    silent = Counter((one.host, one.error) for one in fleet.instances if one.error)
    for (host, error), count in silent.items():
        names = ", ".join(one.name for one in fleet.instances if (one.host, one.error) == (host, error))
        yield f"{host if count == hosts[host] else names}: {error}."
    if len({edge.ring for edge in fleet.edges if edge.ring}) > 1:
        told = ", ".join(f"{edge.ring} on {edge.name}" for edge in fleet.edges if edge.ring)
        yield f"The edges do not serve the same ring: {told}. Run site.yml."
    expected = {one.name for one in fleet.instances}
    for edge in (edge for edge in fleet.edges if edge.ring):
        yield from _problems_of_members(edge, fleet.instances, expected)
    for one in fleet.instances:
        if one.state in {"drains", "drained"}:
            yield f"{one.name} {'is drained' if one.state == 'drained' else one.state}: it takes no new users."
    astray = {one.name: one.off_ring for one in fleet.instances if one.off_ring}
    if astray:
        told = ", ".join(f"{count} on {name}" for name, count in astray.items())
        yield f"Users are not on their assigned node: {told}. Run playbooks/rebalance.yml."
    releases = Counter(one.release for one in fleet.instances if not one.error)
    if len(releases) > 1:
        told = ", ".join(f"{release or 'none'} on {count}" for release, count in releases.items())
        yield f"The instances do not run the same release: {told}."


def _problems_of_members(edge: Edge, instances: tuple[Instance, ...], expected: set[str]) -> Iterator[str]:
    missing = [one.name for one in instances if one.name not in edge.health]
    if missing:
        yield f"{', '.join(missing)}: not on the ring of {edge.name}. Run site.yml."
    if strange := [name for name in edge.health if name not in expected]:
        yield f"{', '.join(strange)}: on the ring of {edge.name}, but not in the inventory. Run site.yml."
    if unwell := [name for name, health in edge.health.items() if name in expected and health != "HEALTHY"]:
        yield f"{', '.join(unwell)}: not healthy for {edge.name}."
