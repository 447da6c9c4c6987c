"""The ring alone: facts that can be checked by hand, users moved by membership changes, and invalid documents.

That the owners are Envoy's is the matter of test_ring_against_envoy.py.
"""

import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from xxhash import xxh64_intdigest

from stickyring.ring import HASH_SPACE, Ring, RingError, moved

USERS = [f"user-{number:05}" for number in range(20_000)]


def member(name: str, weight: int = 1, health: str = "HEALTHY") -> dict[str, Any]:
    return {"name": name, "weight": weight, "health": health}


def nodes(count: int) -> list[dict[str, Any]]:
    return [member(f"node{number}-1") for number in range(1, count + 1)]


def circle(members: list[dict[str, Any]], points: int = 512, **change: Any) -> dict[str, Any]:
    """A RING_HASH document with so many points for a unit of weight."""
    serving = sum(each["weight"] for each in members if each["health"] == "HEALTHY")
    return {
        "cluster": "nodes",
        "policy": "RING_HASH",
        "minimum_size": max(1, points * serving),
        "maximum_size": 8_388_608,
        "members": members,
    } | change


def table(members: list[dict[str, Any]], **change: Any) -> dict[str, Any]:
    return {"cluster": "nodes", "policy": "MAGLEV", "table_size": 65537, "members": members} | change


NOBODY = member("nobody")


def fleet(weights: Sequence[int], failed: int | None = None) -> dict[str, Any]:
    """A RING_HASH document as an edge serves it: with `nobody`, a weight is a number of points."""
    members = [
        member(f"node{number}-1", weight, "UNHEALTHY" if number == failed else "HEALTHY")
        for number, weight in enumerate(weights, 1)
    ]
    return circle([NOBODY, *members], minimum_size=1)


def points(ring: Any) -> dict[str, int]:
    """How many points each member has; after the last point there is one more arc."""
    return Counter(ring.arc_owners[:-1])


POLICIES = pytest.mark.parametrize("made", [circle, table])


def test_a_key_belongs_to_the_first_point_at_or_above_its_hash() -> None:
    ring = Ring.load(circle(nodes(3), points=2))
    points = {
        xxh64_intdigest(f"node{node}-1_{number}".encode()): f"node{node}-1" for node in (1, 2, 3) for number in (0, 1)
    }
    first, last = min(points), max(points)
    wrapped = 0
    for user in USERS[:1000]:
        own = xxh64_intdigest(user.encode())
        assert ring.owner(user) == points[min((point for point in points if point >= own), default=first)]
        wrapped += own > last
    assert wrapped, "some keys must be above the last point to test the wrap-around"
    # A key that is a point's name has that point's hash.
    assert [ring.owner(f"{name}_1") for name in ring.names] == list(ring.names)


@pytest.mark.parametrize(("points", "even"), [(4096, True), (512, False)])
def test_twenty_nodes_are_within_3_percent_of_even_with_the_points_of_the_role(points: int, even: bool) -> None:
    shares = Ring.load(circle(nodes(20), points)).shares().values()
    assert (max(shares) * 20 < 1.03 and min(shares) * 20 > 0.97) == even


def test_owners_agree_with_recorded_choices_of_envoy() -> None:
    members = [
        *(member(f"node{number}-1", number) for number in range(1, 5)),
        member("node5-1", 5, "DRAINING"),
    ]
    users = ["", "alice", "bob", "carol", "dave", "a%20b", "a+b", "björn"]

    def owners(document: dict[str, Any]) -> str:
        return " ".join(owner.removeprefix("node").removesuffix("-1") for owner in Ring.load(document).owners(users))

    assert owners(circle(members, minimum_size=1024)) == "3 3 4 1 2 3 3 4"
    assert owners(table(members)) == "4 3 3 1 4 4 3 3"
    assert owners(circle(nodes(4), minimum_size=1024)) != "3 3 4 1 2 3 3 4"


def test_bytes_that_are_not_utf_8_are_hashed_unchanged() -> None:
    key = b"\xff\xfealice"
    slots = Ring.load(table(nodes(20), table_size=1009))
    # A key of the same slot, found by its hash.
    same = next(user for user in USERS if xxh64_intdigest(user.encode()) % 1009 == xxh64_intdigest(key) % 1009)
    assert slots.owner(key.decode("utf-8", "surrogateescape")) == slots.owner(same)
    assert slots.owner(key.decode("latin-1")) != slots.owner(same), "the control: other bytes, another slot"


@POLICIES
def test_the_order_of_members_does_not_matter_but_a_name_does(made: Any) -> None:
    members = nodes(7)
    owners = Ring.load(made(members)).owners(USERS)
    assert Ring.load(made(members[::-1])).owners(USERS) == owners
    renamed = [*members[:-1], member("node8-1")]
    assert Ring.load(made(renamed)).owners(USERS) != owners


@POLICIES
@pytest.mark.parametrize("health", ["UNHEALTHY", "DRAINING"])
def test_a_member_out_of_service_owns_nothing(made: Any, health: str) -> None:
    out = [*nodes(3), member("node4-1", health=health)]
    ring = Ring.load(made(out))
    assert ring.names == ("node1-1", "node2-1", "node3-1")
    assert ring.owners(USERS) == Ring.load(made(nodes(3))).owners(USERS)
    assert "node4-1" not in ring.shares()
    assert "node4-1" in Ring.load(made(nodes(4))).owners(USERS), "the control: it would own users if it served"


def test_health_may_be_absent() -> None:
    plain = [{"name": each["name"], "weight": 1} for each in nodes(3)]
    assert Ring.load(circle(nodes(3)) | {"members": plain}).owners(USERS) == Ring.load(circle(nodes(3))).owners(USERS)


@POLICIES
def test_weights_shift_shares(made: Any) -> None:
    shares = Ring.load(made([member("a"), member("b", 2), member("c", 5)])).shares()
    assert shares == pytest.approx({"a": 1 / 8, "b": 2 / 8, "c": 5 / 8}, abs=0.03)
    equal = Ring.load(made([member("a"), member("b"), member("c")])).shares()
    assert equal == pytest.approx(dict.fromkeys("abc", 1 / 3), abs=0.03)


def test_only_proportions_of_weights_count_when_the_points_are_given() -> None:
    light = circle([member("a"), member("b", 3)], minimum_size=4000)
    heavy = circle([member("a", 100), member("b", 300)], minimum_size=4000)
    assert Ring.load(light).owners(USERS) == Ring.load(heavy).owners(USERS)


@POLICIES
def test_shares_sum_to_one_and_agree_with_counted_owners(made: Any) -> None:
    ring = Ring.load(made([*nodes(5), member("big-1", 3)]))
    shares = ring.shares()
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    counted = Counter(ring.owners(USERS))
    for name, share in shares.items():
        # Four standard deviations of a count.
        assert counted[name] == pytest.approx(share * len(USERS), abs=4 * (len(USERS) * share * (1 - share)) ** 0.5)


def test_shares_agree_with_the_arcs() -> None:
    ring = Ring.load(circle([member("a"), member("b")], points=1))
    at = {name: xxh64_intdigest(f"{name}_0".encode()) for name in "ab"}
    low, high = sorted("ab", key=at.__getitem__)
    assert ring.shares()[high] == (at[high] - at[low]) / HASH_SPACE


@POLICIES
@pytest.mark.parametrize(("before", "after"), [(3, 4), (10, 11), (6, 3)])
def test_moved_agrees_with_counting(made: Any, before: int, after: int) -> None:
    old, new = Ring.load(made(nodes(before))), Ring.load(made(nodes(after)))
    shares = moved(old, new)
    pairs = zip(old.owners(USERS), new.owners(USERS), strict=True)
    counted = Counter(pair for pair in pairs if pair[0] != pair[1])
    assert set(counted) <= set(shares)
    for pair, share in shares.items():
        assert counted[pair] == pytest.approx(share * len(USERS), abs=5 * (len(USERS) * share) ** 0.5 + 1)
    assert moved(old, old) == {}
    assert moved(new, old) == {(to, origin): share for (origin, to), share in shares.items()}


@pytest.mark.parametrize(
    ("before", "after"),
    [(circle(nodes(3)), table(nodes(3))), (table(nodes(4)), table(nodes(4), table_size=1009))],
)
def test_another_policy_or_table_moves_as_counted(before: dict[str, Any], after: dict[str, Any]) -> None:
    old, new = Ring.load(before), Ring.load(after)
    total = sum(moved(old, new).values())
    counted = sum(map(str.__ne__, old.owners(USERS), new.owners(USERS)))
    assert counted == pytest.approx(total * len(USERS), abs=4 * (len(USERS) * total * (1 - total)) ** 0.5)


@pytest.mark.parametrize(("before", "after"), [(3, 4), (5, 6), (10, 11), (20, 21)])
def test_a_fixed_number_of_points_moves_the_least_and_a_fixed_total_far_more(before: int, after: int) -> None:
    fixed = moved(Ring.load(circle(nodes(before), points=4096)), Ring.load(circle(nodes(after), points=4096)))
    assert sum(fixed.values()) == pytest.approx(1 / after, abs=0.015)
    assert {to for _, to in fixed} == {f"node{after}-1"}, "nobody moves between nodes that stay"
    total = [Ring.load(circle(nodes(count), minimum_size=1024)) for count in (before, after)]
    stock = moved(*total)
    assert sum(stock.values()) > 1.25 / after
    assert len({to for _, to in stock}) > 1


@pytest.mark.parametrize(
    "weights",
    [[4096], *([4096] * size for size in (2, 3, 4, 10, 21)), [100, 200, 500], [4096, 8192, 4096], [1, 1, 7]],
    ids=lambda weights: f"{len(weights)} from {min(weights)} to {max(weights)}",
)
def test_with_nobody_a_weight_is_a_number_of_points(weights: list[int]) -> None:
    named = {f"node{number}-1": weight for number, weight in enumerate(weights, 1)}
    ring = Ring.load(fleet(weights))
    assert points(ring) == named
    assert ring.points_per_weight == pytest.approx(1)
    for failed, name in enumerate(named, 1):
        if len(weights) > 1:
            after = Ring.load(fleet(weights, failed))
            assert points(after) == {other: weight for other, weight in named.items() if other != name}
            assert {old for old, _ in moved(ring, after)} == {name}


def test_without_nobody_a_member_that_fails_moves_users_of_others() -> None:
    members = nodes(4)
    failing = [*members[:-1], member("node4-1", health="UNHEALTHY")]
    before, after = (Ring.load(circle(each, minimum_size=4 * 4096)) for each in (members, failing))
    assert (points(before)["node1-1"], points(after)["node1-1"]) == (4096, 5462)
    assert {old for old, _ in moved(before, after)} == {"node1-1", "node2-1", "node3-1", "node4-1"}


def test_rounding_adds_or_takes_a_single_point() -> None:
    """Only with unequal weights; with the default of the edge's role, equal weights are exact."""
    draw = random.Random(1)
    off = Counter[int]()
    for _ in range(200):
        weights = [1000 * draw.choice((1, 1, 2, 3, 5)) for _ in range(draw.randint(1, 20))]
        made = points(Ring.load(fleet(weights)))
        off.update(made[f"node{number}-1"] - weight for number, weight in enumerate(weights, 1))
    assert set(off) == {-1, 0, 1}
    assert off[0] > 0.95 * off.total()


def test_nobody_is_not_a_member_of_a_ring() -> None:
    ring = Ring.load(fleet([4096, 4096, 8192]))
    assert ring.names == tuple(each.name for each in ring.members) == ("node1-1", "node2-1", "node3-1")
    assert ring.due() == {"node1-1": 0.25, "node2-1": 0.25, "node3-1": 0.5}
    assert ring.shares().keys() == ring.due().keys()
    assert sum(ring.shares().values()) == pytest.approx(1, abs=1e-12)
    assert ring.owner("nobody_0") in ring.names, "nobody's point is on no ring"


def test_nobody_is_an_ordinary_member_of_a_maglev_table() -> None:
    slots = Ring.load(table([NOBODY, member("node1-1")]))
    assert slots.names == ("nobody", "node1-1")
    assert slots.due() == {"nobody": 0.5, "node1-1": 0.5}
    assert set(slots.owners(USERS)) == {"nobody", "node1-1"}
    assert set(Ring.load(table([NOBODY])).owners(USERS[:10])) == {"nobody"}


def test_a_hundred_thousand_ids_on_fifty_endpoints_take_less_than_two_seconds() -> None:
    users = [f"user-{number}" for number in range(100_000)]
    started = time.process_time()
    owners = Ring.load(circle(nodes(50), points=4096)).owners(users)
    assert time.process_time() - started < 2
    assert len(set(owners)) == 50


def _without(document: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != key}


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ([], "a ring document is an object with cluster, policy and members, not []"),
        ({}, "policy: None is not one of RING_HASH, MAGLEV"),
        (circle(nodes(1), policy="ROUND_ROBIN"), "policy: 'ROUND_ROBIN' is not one of RING_HASH, MAGLEV"),
        (circle(nodes(1), policy=[]), "policy: [] is not one of RING_HASH, MAGLEV"),
        (_without(circle(nodes(1)), "minimum_size"), "a RING_HASH document has no minimum_size"),
        (_without(circle(nodes(1)), "members"), "a RING_HASH document has no members"),
        (circle(nodes(1), table_size=65537), "a RING_HASH document has an unknown field 'table_size'"),
        (circle(nodes(1), cluster=""), "cluster: '' is not a name"),
        (circle(nodes(1), minimum_size=0), "minimum_size: 0 is not a whole number from 1 to 8388608"),
        (circle(nodes(1), minimum_size=1024.0), "minimum_size: 1024.0 is not a whole number from 1 to 8388608"),
        (circle(nodes(1), minimum_size=True), "minimum_size: True is not a whole number from 1 to 8388608"),
        (circle(nodes(1), maximum_size=9), "minimum_size: 512 is more than maximum_size, 9"),
        (circle(nodes(1), maximum_size=8_388_609), "maximum_size: 8388609 is not a whole number from 1 to 8388608"),
        (table(nodes(1), table_size=65536), "table_size: 65536 is not a prime number"),
        (table(nodes(1), table_size=1), "table_size: 1 is not a prime number"),
        (circle(nodes(1)) | {"members": "node1-1"}, "members: 'node1-1' is not a list"),
        (
            circle(nodes(1)) | {"members": ["node1-1"]},
            "members[0]: 'node1-1' is not an object with name, weight and health",
        ),
        (circle([]), "members: none of 0 is healthy, so no user has a node"),
        (circle([member("a", health="DRAINING")]), "members: none of 1 is healthy, so no user has a node"),
        (circle([NOBODY]), "members: none of 0 is healthy, so no user has a node"),
        (fleet([4096], failed=1), "members: none of 1 is healthy, so no user has a node"),
        (
            table([NOBODY | {"health": "UNHEALTHY"}, member("a", health="DRAINING")]),
            "members: none of 2 is healthy, so no user has a node",
        ),
        (circle([member("a"), member("a", 2)]), "members: 'a' is listed twice"),
        (circle([member("a"), member("")]), "members[1]: name: '' is not a name"),
        (circle([member("a\n")]), r"members[0]: name: 'a\n' is not a name"),
        (circle([member("a\ud800")]), r"members[0]: name: 'a\ud800' is not a name"),
        (circle([member("a", health="DEGRADED")]), "members[0]: health: 'DEGRADED' is not one of HEALTHY, "),
        (circle([member("a", weight=0)]), "members[0]: weight: 0 is not a whole number from 1 to 4294967295"),
        (circle(nodes(1)) | {"members": [{"name": "a"}]}, "members[0] has no weight"),
        (circle([member("a") | {"port": 1}]), "members[0] has an unknown field 'port'"),
        (
            circle([member("a", 2**32 - 1), member("b")], minimum_size=1),
            "members: their weights sum to more than 4294967295, Envoy's maximum",
        ),
        (circle([member("x" * 500, weight=0)], policy="y" * 500), f"policy: '{'y' * 56}... is not one of"),
    ],
)
def test_a_bad_document_gives_one_clear_line(document: Any, text: str) -> None:
    with pytest.raises(RingError) as raised:
        Ring.load(document)
    assert str(raised.value).startswith(text)
    assert len(str(raised.value).splitlines()) == 1
