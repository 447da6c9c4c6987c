"""The difference between two rings: members, moved users, evenness; and its JSON file.

The JSON file, schema 1 (shares of all users from 0 to 1; null: not known):

    {"schema": 1, "cluster": "nodes", "verdict": "one line", "notes": ["one line", ...],
     "changes": true (anything differs), "moves_users": true,
     "before": RING | null (nothing is deployed), "after": RING,
     "members": [{"name": "node1-1", "change": "comes", "before": STANDING | null, "after": STANDING | null}, ...],
     "moved_share": 0.251 | null, "least_share": 0.25 | null,
     "moves": [{"from": "node1-1", "to": "node4-1", "share": 0.084}, ...],
     "ids": {"total": 1000, "moved": 252, "moves": [{"id": "alice", "from": "node1-1", "to": "node4-1"}, ...]} | null}

    RING = {"policy": "RING_HASH", "minimum_size": 1, "maximum_size": 8388608 (or "table_size"),
     "serving": 3, "evenness": 1.02, "busiest": "node2-1"}
    STANDING = {"weight": 4096, "health": "HEALTHY", "due": 0.333, "share": 0.341}

The member `nobody` of a ring (see stickyring.ring) is not a node, and is left out.
`due` is a member's share of the weights, `share` what it owns, `evenness` the largest share / due, that of `busiest`.
`least_share` is what any placement would have to move if all members owned exactly their due share: half the L1
distance between the due shares before and after.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from math import isclose
from typing import Any

from stickyring.ring import Member, Ring, moved

# If staying members keep their points, a ring moves the least share, up to this much by the chance of where points are.
ODDS_WORTH_A_NOTE = 0.015
# Rounding alone changes points by less.
CHANGE_OF_POINTS = 0.01


class Change:
    """The change from the ring `before` (None: nothing is deployed) to `after`, also for the users `ids`."""

    def __init__(self, before: Ring | None, after: Ring, ids: Sequence[str] | None) -> None:
        self.before = before
        self.after = after
        self.ids = ids

    @cached_property
    def members(self) -> list["MemberChange"]:
        """The change of every member, in the order of `after`; leaving members are last."""
        old = _standings(self.before) if self.before else {}
        new = _standings(self.after)
        return [MemberChange(name, old.get(name), new.get(name)) for name in new | old]

    @cached_property
    def moves(self) -> dict[tuple[str, str], float]:
        """The share of all users that moves, by (from, to); empty if nothing is deployed."""
        return moved(self.before, self.after) if self.before else {}

    @property
    def moved_share(self) -> float:
        """The share of all users that moves."""
        return sum(self.moves.values())

    @cached_property
    def least_share(self) -> float:
        """The share of all users that would have to move if all members owned exactly their due share."""
        old = self.before.due() if self.before else {}
        new = self.after.due()
        return sum(max(0.0, due - new.get(name, 0.0)) for name, due in old.items())

    @cached_property
    def moved_ids(self) -> list[tuple[str, str, str]]:
        """(id, from, to) of each of `ids` that moves."""
        if not self.before or not self.ids:
            return []
        owners = zip(self.ids, self.before.owners(self.ids), self.after.owners(self.ids), strict=True)
        return [(user, old, new) for user, old, new in owners if old != new]

    @cached_property
    def moved_ids_by_pair(self) -> Counter[tuple[str, str]]:
        """Number of `ids` that move, by (from, to)."""
        return Counter((old, new) for _, old, new in self.moved_ids)

    @property
    def anything(self) -> bool:
        """Whether the two rings differ at all, even if nobody moves."""
        return self.before is None or any(
            (
                self.before.policy != self.after.policy,
                self.before.sizes != self.after.sizes,
                self.before.members != self.after.members,
            )
        )

    @property
    def verdict(self) -> str:
        """One line: how many users move."""
        serving = len(self.after.names)
        if self.before is None:
            return f"nothing is deployed yet: nobody moves, {serving} {_members(serving)} will serve"
        if not self.anything:
            return f"nothing changes: {serving} {_members(serving)} serve as before"
        if not self.moves:
            return "nobody moves: the edge changes, every user stays on their node"
        ids = f", {len(self.moved_ids)} of the {len(self.ids)} ids" if self.ids is not None else ""
        least = f"{percent(self.least_share)} if each had exactly its share"
        return f"{percent(self.moved_share)} of all users move{ids} ({least})"

    @property
    def notes(self) -> list[str]:
        """Further remarks, one line each."""
        if self.before is None:
            return []
        notes = []
        if self.before.policy != self.after.policy:
            notes.append(f"the policy changes from {self.before.policy} to {self.after.policy}")
        for name, size in self.after.sizes.items():
            old = self.before.sizes.get(name, size)
            if old != size:
                notes.append(f"{name} changes from {old} to {size}")
        if self.moved_share > self.least_share + ODDS_WORTH_A_NOTE:
            notes.append(f"more users move than necessary: {self._cause()}")
        return notes

    def _cause(self) -> str:
        assert self.before is not None
        if self.before.policy != self.after.policy:
            return "the two policies place users independently of each other"
        if self.after.policy == "MAGLEV":
            if self.before.sizes != self.after.sizes:
                return "tables of different sizes place users independently of each other"
            return "Maglev also moves some users between members that stay"
        stay = [member for member in self.members if member.points_before and member.points_after]
        if _all_change_alike(stay):
            old, new = stay[0].points_before, stay[0].points_after
            return f"the points of every member that stays change, {stay[0].name}'s from {old:.0f} to {new:.0f}"
        if self._comes_and_goes():
            return "on a ring, a member that gains weight takes users from all, and one that loses weight gives to all"
        counts = [
            (count, member.name)
            for member in self.members
            for count in (member.points_before, member.points_after)
            if count
        ]
        count, name = min(counts)
        return f"the ring is coarse: {name} has only {count:.0f} {'point' if round(count) == 1 else 'points'}"

    def _comes_and_goes(self) -> bool:
        """Whether some members gain points on the ring while others lose them."""
        gains = [round(member.points_after - member.points_before) for member in self.members]
        return min(gains) < 0 < max(gains)

    def as_json(self) -> dict[str, Any]:
        """Return the object of the module's docstring."""
        deployed = self.before is not None
        return {
            "schema": 1,
            "cluster": self.after.cluster,
            "verdict": self.verdict,
            "notes": self.notes,
            "changes": self.anything,
            "moves_users": bool(self.moves),
            "before": _ring_as_json(self.before) if self.before else None,
            "after": _ring_as_json(self.after),
            "members": [member.as_json() for member in self.members],
            "moved_share": self.moved_share if deployed else None,
            "least_share": self.least_share if deployed else None,
            "moves": [{"from": old, "to": new, "share": share} for (old, new), share in self.moves.items()],
            "ids": None
            if self.ids is None
            else {
                "total": len(self.ids),
                "moved": len(self.moved_ids),
                "moves": [{"id": user, "from": old, "to": new} for user, old, new in self.moved_ids],
            },
        }


class Standing:
    """A member on a ring: its points, and its due and owned shares of all users; 0 if it is not healthy."""

    def __init__(self, member: Member, points: float, due: float, share: float) -> None:
        self.member = member
        self.points = points
        self.due = due
        self.share = share

    def as_json(self) -> dict[str, Any]:
        """Return STANDING of the schema."""
        return {
            "weight": self.member.weight,
            "health": self.member.health,
            "due": self.due,
            "share": self.share,
        }


class MemberChange:
    """The change of one member; `before` or `after` is None if it is not on that ring."""

    def __init__(self, name: str, before: Standing | None, after: Standing | None) -> None:
        self.name = name
        self.before = before
        self.after = after

    @property
    def points_before(self) -> float:
        """Its number of points on the ring before, 0 if it does not serve."""
        return self.before.points if self.before else 0

    @property
    def points_after(self) -> float:
        """Its number of points on the ring after, 0 if it does not serve."""
        return self.after.points if self.after else 0

    @property
    def change(self) -> str:
        """The change in a word or two, empty if it stays as it is."""
        if self.before is None:
            return "comes"
        if self.after is None:
            return "goes"
        old, new = self.before.member, self.after.member
        changes = []
        if old.weight != new.weight:
            changes.append(f"weight {old.weight} → {new.weight}")
        if old.health != new.health:
            changes.append(f"{old.health} → {new.health}")
        return ", ".join(changes)

    def as_json(self) -> dict[str, Any]:
        """Return the member of the schema."""
        return {
            "name": self.name,
            "change": self.change,
            "before": self.before and self.before.as_json(),
            "after": self.after and self.after.as_json(),
        }


def evenness(ring: Ring) -> tuple[float, str]:
    """Return the largest share / due, and its member."""
    due = ring.due()
    return max((share / due[name], name) for name, share in ring.shares().items())


def percent(share: float) -> str:
    """Return the share in percent with one decimal."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{share:.1%}".replace("%", " %")


def _standings(ring: Ring) -> dict[str, Standing]:
    due, shares = ring.due(), ring.shares()
    return {
        member.name: Standing(
            member,
            ring.points_per_weight * member.weight if member.serving else 0.0,
            due.get(member.name, 0.0),
            shares.get(member.name, 0.0),
        )
        for member in ring.members
    }


def _all_change_alike(members: Sequence[MemberChange]) -> bool:
    """Return whether all members' points change by one factor other than 1: then users move among these members.

    False for a single member, which has no other to move users to.
    """
    factors = [member.points_after / member.points_before for member in members]
    return (
        len(factors) > 1
        and isclose(min(factors), max(factors), rel_tol=CHANGE_OF_POINTS)
        and not isclose(min(factors), 1, rel_tol=CHANGE_OF_POINTS)
    )


def _ring_as_json(ring: Ring) -> dict[str, Any]:
    value, busiest = evenness(ring)
    return {
        "policy": ring.policy,
        **ring.sizes,
        "serving": len(ring.names),
        "evenness": value,
        "busiest": busiest,
    }


def _members(count: int) -> str:
    return "member" if count == 1 else "members"
