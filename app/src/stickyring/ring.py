"""Which node owns a user: the edge's consistent hash, computed outside the edge.

It follows Envoy 1.40.0, source/extensions/load_balancing_policies: ring_hash/ring_hash_lb.cc, maglev/maglev_lb.cc and
common/thread_aware_lb_impl.cc, with the endpoint's `hash_key` as its identity, xxHash64 as the hash, and one hash
policy that yields the key. Weights are scaled in double precision in the same steps as in Envoy, because one point more
or less on the ring changes the owner of some users. app/tests/test_ring_against_envoy.py compares owners with a running
Envoy.

A ring document is the JSON form of an edge's endpoints for one cluster:

    {"cluster": "nodes",
     "policy": "RING_HASH" | "MAGLEV",
     "minimum_size": 1, "maximum_size": 8388608,   RING_HASH only: points on the whole ring, at least and at most
     "table_size": 65537,                          MAGLEV only: slots of the table, a prime
     "members": [{"name": "nobody", "weight": 1},  RING_HASH only, see below
                 {"name": "node1-1", "weight": 4096, "health": "HEALTHY" | "UNHEALTHY" | "DRAINING"}, ...]}

`name` is the endpoint's hash_key; members are in the edge's order; health may be absent, which means HEALTHY.
Unhealthy and draining members own nothing: the edge runs with healthy_panic_threshold 0.

On a ring, the member `nobody` fixes how many points a weight gets. It is not a node and owns nothing: the edge sends a
request that hits its point to the next one. Envoy gives the lightest member a whole number of points (one, with
minimum_size 1), and scales all others to it. `nobody` has weight 1, so a member has as many points as its weight says,
whichever members join, leave or fail. Without it, all points would change with the membership. In some fleets of
unequal weights, Envoy's rounding adds or removes a single point. In a Maglev table, `nobody` is a name like any other.
"""

import math
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, cast

from xxhash import xxh64_intdigest

HASH_SPACE = 2**64
LAST_HASH = HASH_SPACE - 1
NOBODY = "nobody"
# Envoy's bounds: RingHashLbConfig and MaglevLbConfig in cluster.proto, weights in endpoint_components.proto.
LARGEST_RING = 8_388_608
LARGEST_TABLE = 5_000_011
LARGEST_WEIGHT = 2**32 - 1

KEYS_OF_POLICY = {
    "RING_HASH": {"cluster", "policy", "minimum_size", "maximum_size", "members"},
    "MAGLEV": {"cluster", "policy", "table_size", "members"},
}
HEALTH_STATES = ("HEALTHY", "UNHEALTHY", "DRAINING")


class RingError(ValueError):
    """A document is not a valid ring; the text says why, in one line."""


@dataclass(frozen=True)
class Member:
    """One endpoint: `name` is its identity on the ring, `weight` its size relative to the others."""

    name: str
    weight: int
    health: str

    @property
    def serving(self) -> bool:
        """Whether it owns users."""
        return self.health == "HEALTHY"


class Ring(ABC):
    """The owners of all keys under one membership; immutable.

    Attributes: `cluster`; `policy`, RING_HASH or MAGLEV; `sizes`, the policy's numbers under the document's names;
    `members`, in the edge's order, for RING_HASH without `nobody`; `names` of the serving members;
    `points_per_weight`, points on the ring or slots in the table for one unit of weight.
    """

    points_per_weight: float

    def __init__(self, cluster: str, policy: str, sizes: Mapping[str, int], members: tuple[Member, ...]) -> None:
        self.cluster = cluster
        self.policy = policy
        self.sizes = sizes
        self.members = members
        self.names = tuple(member.name for member in members if member.serving)

    @staticmethod
    def load(document: Mapping[str, Any]) -> "Ring":
        """Return the ring of a ring document (see the module).

        Raises:
            RingError: the document is not valid, or no member is healthy.
        """
        if not isinstance(document, Mapping):
            raise RingError(f"a ring document is an object with cluster, policy and members, not {_shown(document)}")
        policy = document.get("policy")
        if not isinstance(policy, str) or policy not in KEYS_OF_POLICY:
            raise RingError(f"policy: {_shown(policy)} is not one of {', '.join(KEYS_OF_POLICY)}")
        _check_keys(document, KEYS_OF_POLICY[policy], f"a {policy} document")
        cluster = document["cluster"]
        if not isinstance(cluster, str) or not cluster:
            raise RingError(f"cluster: {_shown(cluster)} is not a name")
        members = _members(document["members"], policy)
        if policy == "MAGLEV":
            return _MaglevTable(cluster, members, _prime(document["table_size"]))
        least = _integer(document["minimum_size"], "minimum_size", LARGEST_RING)
        most = _integer(document["maximum_size"], "maximum_size", LARGEST_RING)
        if least > most:
            raise RingError(f"minimum_size: {least} is more than maximum_size, {most}")
        return _HashRing(cluster, members, least, most)

    def owner(self, key: str) -> str:
        """Return the name of the member that owns `key`, given without percent-encoding."""
        return self.owners((key,))[0]

    @abstractmethod
    def owners(self, keys: Iterable[str]) -> list[str]:
        """Return the owners of many keys, in their order."""

    @abstractmethod
    def shares(self) -> dict[str, float]:
        """Return the share of all possible hashes that each serving member owns; they sum to 1."""

    def due(self) -> dict[str, float]:
        """Return each serving member's share of the weights, as Envoy normalizes it; they sum to 1."""
        return _normalized(self.members)


class _HashRing(Ring):
    """Envoy's ring_hash: members have points on a circle of hashes; the first point at or above a key's hash owns it.

    The circle is stored as arcs: arc i ends at `ends[i]`, and `arc_owners[i]` owns it. The last arc, from the last
    point to the end of the hash space, belongs to the owner of the first point.
    """

    def __init__(self, cluster: str, members: tuple[Member, ...], least: int, most: int) -> None:
        sizes = {"minimum_size": least, "maximum_size": most}
        super().__init__(cluster, "RING_HASH", sizes, _without_nobody(members))
        weights = _normalized(members)
        smallest = min(weights.values())
        # The member with the smallest weight gets a whole number of points.
        scale = min(math.ceil(smallest * least) / smallest, float(most))
        self.points_per_weight = scale / sum(member.weight for member in members if member.serving)
        owner_of: dict[int, str] = {}
        made, target = 0, 0.0
        for name, weight in weights.items():
            # As in Envoy, rounding and fractions of points carry over to the next member.
            target += scale * weight
            prefix, count = name.encode() + b"_", math.ceil(target) - made
            made += count
            if name != NOBODY:
                points = (xxh64_intdigest(b"%s%d" % (prefix, number)) for number in range(count))
                owner_of |= dict.fromkeys(points, name)
        ends = sorted(owner_of)
        self.ends = array("Q", [*ends, LAST_HASH])
        self.arc_owners = [owner_of[end] for end in (*ends, ends[0])]

    def owners(self, keys: Iterable[str]) -> list[str]:
        ends, arc_owners = self.ends, self.arc_owners
        return [arc_owners[bisect_left(ends, _hash(key))] for key in keys]

    def shares(self) -> dict[str, float]:
        owned = Counter[str]()
        for (before, end), name in zip(pairwise(chain((-1,), self.ends)), self.arc_owners, strict=True):
            owned[name] += end - before
        return {name: owned[name] / HASH_SPACE for name in self.names}


class _MaglevTable(Ring):
    """Envoy's Maglev: the members take turns at claiming slots of a table; the owner of slot hash % size owns a key."""

    def __init__(self, cluster: str, members: tuple[Member, ...], size: int) -> None:
        super().__init__(cluster, "MAGLEV", {"table_size": size}, members)
        # Sorted by name as Envoy does, so the edge's order does not matter.
        weights = sorted(self.due().items(), key=lambda item: item[0].encode())
        largest = max(weight for _, weight in weights)
        next_slots = [xxh64_intdigest(name.encode()) % size for name, _ in weights]
        skips = [xxh64_intdigest(name.encode(), 1) % (size - 1) + 1 for name, _ in weights]
        targets = [0.0] * len(weights)
        table: list[str | None] = [None] * size
        free, turn = size, 0
        while free:
            turn += 1
            for index, (name, weight) in enumerate(weights):
                # The heaviest member claims a slot every turn, a member of a third of its weight every third turn.
                if turn * weight < targets[index]:
                    continue
                targets[index] += largest
                slot = next_slots[index]
                while table[slot] is not None:
                    slot = (slot + skips[index]) % size
                table[slot] = name
                next_slots[index] = (slot + skips[index]) % size
                free -= 1
                if not free:
                    break
        self.slots = cast(list[str], table)
        self.points_per_weight = size / sum(member.weight for member in members if member.serving)

    def owners(self, keys: Iterable[str]) -> list[str]:
        slots, size = self.slots, len(self.slots)
        return [slots[_hash(key) % size] for key in keys]

    def shares(self) -> dict[str, float]:
        owned = Counter(self.slots)
        return {name: owned[name] / len(self.slots) for name in self.names}


def moved(before: Ring, after: Ring) -> dict[tuple[str, str], float]:
    """Return the share of all possible hashes that changes its owner, by (from, to).

    Pairs between which nothing moves are absent. Between different policies or table sizes, the two owners of a hash
    are treated as independent, which is exact to a millionth.
    """
    match before, after:
        case _HashRing(), _HashRing():
            shares = _moved_arcs(before, after)
        case _MaglevTable(), _MaglevTable() if len(before.slots) == len(after.slots):
            slots = Counter(zip(before.slots, after.slots, strict=True))
            shares = {pair: count / len(after.slots) for pair, count in slots.items()}
        case _:
            shares = {
                (old, new): old_share * new_share
                for old, old_share in before.shares().items()
                for new, new_share in after.shares().items()
            }
    return {(old, new): share for (old, new), share in sorted(shares.items()) if old != new and share}


def _moved_arcs(before: _HashRing, after: _HashRing) -> dict[tuple[str, str], float]:
    """Walk both circles at once: between two neighbouring points, all hashes have the same two owners."""
    owned = Counter[tuple[str, str]]()
    old = new = 0
    start = -1
    while start < LAST_HASH:
        end = min(before.ends[old], after.ends[new])
        owned[before.arc_owners[old], after.arc_owners[new]] += end - start
        start = end
        old += before.ends[old] == end
        new += after.ends[new] == end
    return {pair: hashes / HASH_SPACE for pair, hashes in owned.items()}


def _normalized(members: Iterable[Member]) -> dict[str, float]:
    """Return each serving member's share of the weight; they sum to 1."""
    weights = {member.name: member.weight for member in members if member.serving}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _hash(key: str) -> int:
    # Surrogates stand for bytes that are not UTF-8; they are hashed unchanged.
    return xxh64_intdigest(key.encode("utf-8", "surrogateescape"))


def _members(described: object, policy: str) -> tuple[Member, ...]:
    if not isinstance(described, Sequence) or isinstance(described, str):
        raise RingError(f"members: {_shown(described)} is not a list")
    members = tuple(_member(each, f"members[{number}]") for number, each in enumerate(described))
    twice = [name for name, count in Counter(member.name for member in members).items() if count > 1]
    if twice:
        raise RingError(f"members: {_shown(twice[0])} is listed twice")
    owners = members if policy == "MAGLEV" else _without_nobody(members)
    if not any(member.serving for member in owners):
        raise RingError(f"members: none of {len(owners)} is healthy, so no user has a node")
    if sum(member.weight for member in members if member.serving) > LARGEST_WEIGHT:
        raise RingError(f"members: their weights sum to more than {LARGEST_WEIGHT}, Envoy's maximum")
    return members


def _without_nobody(members: Iterable[Member]) -> tuple[Member, ...]:
    """Return the members that are nodes."""
    return tuple(member for member in members if member.name != NOBODY)


def _member(described: object, where: str) -> Member:
    if not isinstance(described, Mapping):
        raise RingError(f"{where}: {_shown(described)} is not an object with name, weight and health")
    described = {"health": "HEALTHY", **described}
    _check_keys(described, {"name", "weight", "health"}, where)
    name, health = described["name"], described["health"]
    if not isinstance(name, str) or not name or not name.isprintable():
        raise RingError(f"{where}: name: {_shown(name)} is not a name")
    if health not in HEALTH_STATES:
        raise RingError(f"{where}: health: {_shown(health)} is not one of {', '.join(HEALTH_STATES)}")
    return Member(name, _integer(described["weight"], f"{where}: weight", LARGEST_WEIGHT), health)


def _check_keys(described: Mapping[str, Any], wanted: set[str], what: str) -> None:
    if missing := sorted(wanted - described.keys()):
        raise RingError(f"{what} has no {missing[0]}")
    if unknown := sorted(map(str, described.keys() - wanted)):
        raise RingError(f"{what} has an unknown field {_shown(unknown[0])}")


def _integer(value: object, where: str, most: int) -> int:
    # In Python, unlike in JSON, a truth value is an integer.
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise RingError(f"{where}: {_shown(value)} is not a whole number from 1 to {most}")
    return value


def _prime(value: object) -> int:
    size = _integer(value, "table_size", LARGEST_TABLE)
    if size < 2 or any(size % divisor == 0 for divisor in range(2, math.isqrt(size) + 1)):
        raise RingError(f"table_size: {size} is not a prime number")
    return size


def _shown(value: object) -> str:
    """Return the value in one line of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
