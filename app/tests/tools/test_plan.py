"""The command `stickyring plan` as a user runs it: tables, JSON, plots and one-line errors."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.image
import pytest
from click.testing import CliRunner, Result

from stickyring.cli import main
from stickyring.ring import Ring

IDS = [f"user-{number}" for number in range(2000)]


def member(name: str, weight: int = 1, **more: str) -> dict[str, Any]:
    return {"name": f"{name}-1", "weight": weight, **more}


def document(*members: dict[str, Any], points: int = 1024, **change: Any) -> dict[str, Any]:
    """A ring with `points` for a unit of weight."""
    weight = sum(each["weight"] for each in members if each.get("health", "HEALTHY") == "HEALTHY")
    return {
        "cluster": "nodes",
        "policy": "RING_HASH",
        "minimum_size": points * weight,
        "maximum_size": 8_388_608,
        "members": list(members),
    } | change


def fleet(*weights: int) -> dict[str, Any]:
    """A ring as an edge serves it: with `nobody`, a weight is a number of points."""
    nodes = [member(f"node{number}", weight) for number, weight in enumerate(weights, 1)]
    return document({"name": "nobody", "weight": 1}, *nodes, minimum_size=1)


THREE = document(member("node1"), member("node2"), member("node3"))
FOUR = document(member("node1"), member("node2"), member("node3"), member("node4"))
MAGLEV = {"cluster": "nodes", "policy": "MAGLEV", "table_size": 65537, "members": THREE["members"]}


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., tuple[str, dict[str, Any]]]:
    """A function that plans from `before` (None: no option) to `after`, and returns the text and the JSON."""

    def run(before: Any, after: Any, *arguments: str) -> tuple[str, dict[str, Any]]:
        result = invoke(tmp_path, before, after, "--json", str(tmp_path / "plan.json"), *arguments)
        assert (result.exit_code, result.stderr) == (0, ""), result.stderr
        return " ".join(result.stdout.split()), json.loads((tmp_path / "plan.json").read_text())

    return run


def invoke(folder: Path, before: Any, after: Any, *arguments: str) -> Result:
    given = []
    for option, value in (("--before", before), ("--after", after)):
        if value is not None:
            file = folder / f"{option[2:]}.json"
            file.write_text(value if isinstance(value, str) else json.dumps(value))
            given += [option, str(file)]
    return CliRunner().invoke(main, ["plan", *given, *arguments])


def test_a_new_member_takes_users_from_all_and_nobody_else_moves(planned: Any) -> None:
    text, plan = planned(THREE, FOUR)
    assert plan["least_share"] == pytest.approx(0.25)
    assert plan["moved_share"] == pytest.approx(0.25, abs=0.015)
    assert plan["moved_share"] == pytest.approx(sum(move["share"] for move in plan["moves"]))
    pairs = [(move["from"], move["to"]) for move in plan["moves"]]
    assert pairs == [("node1-1", "node4-1"), ("node2-1", "node4-1"), ("node3-1", "node4-1")]
    changes = {each["name"]: each["change"] for each in plan["members"]}
    assert changes == {"node1-1": "", "node2-1": "", "node3-1": "", "node4-1": "comes"}
    assert plan["members"][3]["before"] is None
    assert plan["members"][0]["before"]["due"] == pytest.approx(1 / 3)
    assert plan["members"][0]["after"] | {"share": 0} == {"weight": 1, "health": "HEALTHY", "due": 0.25, "share": 0}
    assert plan["notes"] == ["minimum_size changes from 3072 to 4096"]
    assert plan["verdict"] in text
    assert "node4-1 comes" in text
    assert plan["changes"] is plan["moves_users"] is True


def test_removing_the_member_moves_its_users_back(planned: Any) -> None:
    _, plan = planned(FOUR, THREE)
    assert [each["change"] for each in plan["members"]] == ["", "", "", "goes"]
    assert {move["from"] for move in plan["moves"]} == {"node4-1"}
    assert plan["least_share"] == pytest.approx(0.25)


def test_the_least_share_is_half_of_what_the_due_shares_differ_by(planned: Any) -> None:
    after = document(member("node1", 3), member("node2"), member("node3", health="DRAINING"), member("node5", 2))
    text, plan = planned(THREE, after)
    # Due before 1/3 each; after 3/6, 1/6, nothing, and 2/6 for the newcomer.
    assert plan["least_share"] == pytest.approx((1 / 6 + 1 / 6 + 1 / 3 + 1 / 3) / 2)
    assert plan["moved_share"] > plan["least_share"] - 0.015
    assert {each["name"]: each["change"] for each in plan["members"]} == {
        "node1-1": "weight 1 → 3",
        "node2-1": "",
        "node3-1": "HEALTHY → DRAINING",
        "node5-1": "comes",
    }
    assert plan["members"][2]["after"] == {"weight": 1, "health": "DRAINING", "due": 0, "share": 0}
    assert not [move for move in plan["moves"] if move["to"] == "node3-1"]
    assert "more users move than necessary: on a ring, a member that gains weight takes users from all" in text


def test_evenness_is_the_busiest_over_its_due(planned: Any) -> None:
    _, plan = planned(THREE, document(member("node1"), member("node2", 3)))
    for when in ("before", "after"):
        values = {each["name"]: each[when] for each in plan["members"] if each[when]}
        over = {name: value["share"] / value["due"] for name, value in values.items()}
        assert plan[when]["evenness"] == pytest.approx(max(over.values()))
        assert over[plan[when]["busiest"]] == max(over.values())
    assert plan["before"]["serving"] == 3
    assert plan["after"]["serving"] == 2


def test_moved_users_are_listed_by_id(planned: Any, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("\n".join([*IDS, "", IDS[0]]) + "\r\n")
    text, plan = planned(THREE, FOUR, "--ids", str(tmp_path / "ids"))
    old, new = (Ring.load(each).owners(IDS) for each in (THREE, FOUR))
    expected = [
        {"id": user, "from": origin, "to": to} for user, origin, to in zip(IDS, old, new, strict=True) if origin != to
    ]
    assert plan["ids"] == {"total": len(IDS), "moved": len(expected), "moves": expected}
    assert 400 < len(expected) < 600
    assert f"move, {len(expected)} of the {len(IDS)} ids" in text
    for origin, count in Counter(each["from"] for each in expected).items():
        share = next(move["share"] for move in plan["moves"] if move["from"] == origin)
        assert f"{origin} {share:.1%}".replace("%", " %") + f" ({count} ids)" in text


def test_without_ids_none_are_listed(planned: Any) -> None:
    text, plan = planned(THREE, FOUR)
    assert plan["ids"] is None
    assert " ids" not in text


def test_ids_keep_bytes_that_are_not_utf_8(planned: Any, tmp_path: Path) -> None:
    raw = [b"\xff%d" % number for number in range(50)]
    (tmp_path / "ids").write_bytes(b"\n".join(raw))
    _, plan = planned(THREE, FOUR, "--ids", str(tmp_path / "ids"))
    assert plan["ids"]["total"] == 50
    assert {move["id"].encode("utf-8", "surrogateescape") for move in plan["ids"]["moves"]} < set(raw)


@pytest.mark.parametrize("same", [THREE, MAGLEV])
def test_it_says_when_nothing_changes(planned: Any, same: dict[str, Any]) -> None:
    text, plan = planned(same, same)
    assert "nothing changes: 3 members serve as before" in text
    assert plan["changes"] is plan["moves_users"] is False
    assert (plan["moved_share"], plan["least_share"], plan["moves"]) == (0, 0, [])


def test_it_says_when_something_changes_but_nobody_moves(planned: Any) -> None:
    text, plan = planned(THREE, THREE | {"members": [*THREE["members"], member("node4", health="UNHEALTHY")]})
    assert "nobody moves" in text
    assert (plan["changes"], plan["moves_users"]) == (True, False)


@pytest.mark.parametrize("before", [None, {}])
def test_it_says_when_nothing_is_deployed_yet(planned: Any, before: Any) -> None:
    text, plan = planned(before, THREE)
    assert "nothing is deployed yet: nobody moves, 3 members will serve" in text
    assert (plan["before"], plan["moved_share"], plan["moves"], plan["moves_users"]) == (None, None, [], False)
    assert "before" not in text
    assert plan["after"]["serving"] == 3


@pytest.mark.parametrize(
    ("before", "after", "note"),
    [
        (
            THREE | {"minimum_size": 1024},
            FOUR | {"minimum_size": 1024},
            "more users move than necessary: the points of every member that stays change, node1-1's from 342 to 256",
        ),
        (THREE, MAGLEV, "more users move than necessary: the two policies place users independently of each other"),
        (
            MAGLEV,
            MAGLEV | {"table_size": 1009},
            "more users move than necessary: tables of different sizes place users ",
        ),
        (
            THREE,
            THREE | {"minimum_size": 30},
            "more users move than necessary: the points of every member that stays change, node1-1's from 1024 to 10",
        ),
        (
            fleet(4096, 4096, 4096),
            fleet(8192, 8192, 8192),
            "more users move than necessary: the points of every member that stays change, node1-1's from 4096 to 8192",
        ),
        (
            fleet(4096, 4096, 4096),
            fleet(8192, 4096, 2048),
            "more users move than necessary: on a ring, a member that gains weight takes users from all, ",
        ),
        # With a fixed total, what one member gains all others lose.
        (
            THREE,
            document(member("node1", 3), member("node2"), member("node3"), minimum_size=3072),
            "more users move than necessary: on a ring, a member that gains weight takes users from all, ",
        ),
        # A single staying member gives users to the new ones, whatever its points.
        (
            fleet(4096, 4096),
            document({"name": "nobody", "weight": 1}, member("node1", 8192), member("node3", 4096), minimum_size=1),
            "more users move than necessary: on a ring, a member that gains weight takes users from all, ",
        ),
        (fleet(8, 4), fleet(8, 4, 8), "more users move than necessary: the ring is coarse: node2-1 has only 4 points"),
        (fleet(1, 2), fleet(1, 2, 2), "more users move than necessary: the ring is coarse: node1-1 has only 1 point"),
    ],
)
def test_it_says_why_more_users_move_than_necessary(planned: Any, before: Any, after: Any, note: str) -> None:
    _, plan = planned(before, after)
    assert plan["moved_share"] > plan["least_share"] + 0.015
    assert [each for each in plan["notes"] if each.startswith(note)]


def test_a_ring_with_nobody_reports_only_nodes(planned: Any) -> None:
    text, plan = planned(fleet(4096, 4096, 4096), fleet(4096, 4096, 4096, 4096))
    assert "nobody" not in text
    assert [each["name"] for each in plan["members"]] == ["node1-1", "node2-1", "node3-1", "node4-1"]
    assert (plan["least_share"], plan["after"]["serving"]) == (pytest.approx(0.25), 4)
    assert {move["to"] for move in plan["moves"]} == {"node4-1"}
    assert plan["notes"] == []


def test_many_pairs_are_listed_and_few_make_a_matrix(planned: Any) -> None:
    twelve = [member(f"node{number}") for number in range(1, 13)]
    text, plan = planned(document(*twelve, minimum_size=1024), document(*twelve[:-1], minimum_size=1024))
    assert f"... and {len(plan['moves']) - 20} more pairs" in text
    assert "from \\ to" not in text
    text, _ = planned(THREE, FOUR)
    assert "from \\ to" in text


@pytest.mark.parametrize("before", [None, THREE, FOUR], ids=["first", "moving", "still"])
def test_plots_are_pictures(planned: Any, tmp_path: Path, before: Any) -> None:
    after = document(*FOUR["members"][:3], member("odd$name$"), cluster="nodes") if before is THREE else FOUR
    _, plan = planned(before, after, "--plot", str(tmp_path / "new" / "plots"))
    picture = matplotlib.image.imread(tmp_path / "new" / "plots" / "plan.png")
    assert picture.shape[0] > 400
    assert picture.shape[1] > 1000
    svg = ElementTree.parse(tmp_path / "new" / "plots" / "plan.svg").getroot()
    texts = " ".join("".join(each.itertext()) for each in svg.iter() if each.tag.endswith("}text"))
    assert plan["verdict"] in texts
    for each in plan["members"]:
        assert each["name"] in texts
    assert ("moved users, as a share of all" in texts) is plan["moves_users"]


def test_the_same_plan_is_the_same_plot(planned: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        planned(THREE, FOUR, "--plot", str(tmp_path / name))
    for file in ("plan.png", "plan.svg"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(
    ("before", "after", "arguments", "text"),
    [
        (THREE, None, [], "Missing option '--after'"),
        (THREE, {}, [], "--after: an empty document has no members"),
        (THREE, "{", [], "after.json is not JSON: "),
        (THREE, "[" * 100_000, [], "after.json is not JSON: "),
        (THREE, "[]", [], "after.json: a ring document is an object with cluster, policy and members, not []"),
        ({"policy": "RING_HASH"}, THREE, [], "before.json: a RING_HASH document has no cluster"),
        (THREE, document(member("node1", 0)), [], "after.json: members[0]: weight: 0 is not a whole number"),
        (THREE | {"cluster": "others"}, THREE, [], "--before is for the cluster others, --after for nodes"),
        (None, THREE, ["--before", "missing.json"], "missing.json: No such file or directory"),
        (None, THREE, ["--before", "/"], "/: Is a directory"),
        (None, THREE, ["--ids", "missing.txt"], "missing.txt: No such file or directory"),
        (None, THREE, ["--ids", "/dev/null"], "/dev/null contains no id"),
        (None, THREE, ["--plot", "/dev/null/plots"], "cannot write plots to /dev/null/plots: Not a directory"),
        (None, THREE, ["--json", "/nonexistent/plan.json"], "'/nonexistent/plan.json': No such file or directory"),
    ],
)
def test_an_error_ends_in_one_line(tmp_path: Path, before: Any, after: Any, arguments: list[str], text: str) -> None:
    result = invoke(tmp_path, before, after, *arguments)
    assert result.exit_code != 0
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert text in result.stderr


@pytest.mark.parametrize(("missing", "arguments"), [("rich", []), ("matplotlib", ["--plot", "plots"])])
def test_a_node_without_the_extra_starts_and_says_what_is_missing(
    tmp_path: Path, missing: str, arguments: list[str]
) -> None:
    (tmp_path / "after.json").write_text(json.dumps(THREE))

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        program = f"import sys; sys.modules[{missing!r}] = None; from stickyring.cli import main; main()"
        command = (sys.executable, "-c", program, *command)
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run("serve", "--help").returncode == 0
    done = run("plan", "--after", "after.json", *arguments)
    assert done.returncode == 1
    assert done.stderr == f"Error: {missing} is not installed: pip install stickyring[plan]\n"


def test_help_has_examples() -> None:
    result = CliRunner().invoke(main, ["plan", "--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert "stickyring plan --before served.json --after wanted.json --ids users.txt" in result.stdout
