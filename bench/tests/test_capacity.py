"""The figures of docs/capacity.md follow from the measurements."""

import pytest
import yaml

from bench import capacity
from bench.capacity import (
    BEGIN,
    DOCUMENT,
    END,
    HEAP_SHARE,
    ROOT,
    Caps,
    Costs,
    EdgeCosts,
    edge_limits,
    first,
    limits,
    role_defaults,
    seconds_back,
    updated,
    written,
)
from bench.report import number

COSTS = Costs(instance_memory=10_240.0, memory=50.0, idle=1e-5, message=1e-4, websocket_first=1e-3, polling_first=2e-3)
EDGE = EdgeCosts(process_memory=20_480.0, memory=50.0, idle=1e-6, message=2e-5)
CAPS = Caps(10_000, 20_000, 20_000, 65_536, 2048)


def test_the_document_is_in_step_with_the_benchmarks_and_the_roles() -> None:
    text = DOCUMENT.read_text()
    assert updated(text, written(), role_defaults()) == text, "run `python -m bench.capacity`"


def test_every_limit_follows_its_formula() -> None:
    assert limits(COSTS, CAPS, cores=2, gib=1, rate=0.5) == {
        "memory": int((0.75 * 2**20 - 2 * 10_240) / 50),
        "CPU": int(0.7 * 2 / 6e-5),
        "cap": 20_000,
        "descriptors": 40_000,
        "ports": 56_464,
    }
    assert limits(COSTS, CAPS, cores=100, gib=1, rate=0.0)["memory"] == 0


def test_every_limit_of_an_edge_follows_its_formula() -> None:
    assert edge_limits(EDGE, CAPS, cores=2, gib=1, rate=0.5) == {
        "memory": int((0.75 * 2**20 - 20_480) / 50),
        "heap": int((0.98 * 2**21 - 20_480) / 50),
        "CPU": int(0.7 * 2 / 1.1e-5),
        "cap": 20_000,
        "descriptors": 32_768,
    }
    assert edge_limits(EDGE, CAPS, cores=1, gib=0.01, rate=0.0)["memory"] == 0


def test_the_share_of_the_heap_is_that_of_the_role() -> None:
    variables = yaml.safe_load((ROOT / "roles/stickyring_edge/vars/main.yml").read_text())
    actions = variables["__stickyring_edge_bootstrap"]["overload_manager"]["actions"]
    (refuses,) = [action for action in actions if action["name"].endswith(".stop_accepting_requests")]
    assert [trigger["threshold"]["value"] for trigger in refuses["triggers"]] == [HEAP_SHARE]


@pytest.mark.parametrize(
    ("gib", "rate", "breaks"), [(1, 0.0, (10_000, "cap")), (0.5, 0.0, (7659, "memory")), (1, 1.0, (6363, "CPU"))]
)
def test_the_least_limit_breaks_first(gib: float, rate: float, breaks: tuple[int, str]) -> None:
    assert first(limits(COSTS, CAPS, 1, gib, rate)) == breaks


def test_all_are_back_when_every_core_has_done_its_handshakes() -> None:
    assert seconds_back(10_000, 2, COSTS.polling_first) == pytest.approx(10.0)


def test_costs_are_the_medians_of_our_node() -> None:
    nodes = written()["nodes"]
    found = nodes["figures"]
    costs = Costs.of(nodes)
    assert costs.memory == found["idle-memory"]["found"]["ours"]["median"]
    assert costs.instance_memory == 1024 * found["memory"]["found"]["ours"]["median"]
    assert costs.message == found["part-load-cpu"]["found"]["ours"]["median"] / 1e6
    found["idle-cpu"] |= {"title": "CPU of 5000 idle connections", "found": {"ours": {"median": 7.0}}}
    assert Costs.of(nodes).idle == pytest.approx(0.07 / 5000)


def test_other_figures_change_nothing_beside_them() -> None:
    parts = written()
    nodes = parts["nodes"]
    nodes["figures"]["idle-memory"]["found"]["ours"]["median"] = 200.0
    nodes["figures"]["memory"]["found"]["ours"]["median"] = 80.0
    text = updated(f"# Before\n\n{BEGIN}\nold\n{END}\n\n# After\n", parts, role_defaults())
    assert text.startswith(f"# Before\n\n{BEGIN}\n\n| users on")
    assert text.endswith(f"\n{END}\n\n# After\n")
    assert "old" not in text
    assert f"| 1 core, 1 GiB | {number(3500)}, memory |" in text
    assert "| 200 KiB, on PyPy " in text
    assert f"`{nodes['command']}`" in text


def test_every_variable_of_the_document_is_one_of_the_roles() -> None:
    defaults = "".join(
        (capacity.ROOT / f"roles/stickyring_{role}/defaults/main.yml").read_text() for role in ("node", "edge")
    )
    for word in DOCUMENT.read_text().replace("`", " ").split():
        if word.startswith(("stickyring_node_", "stickyring_edge_")):
            assert f"\n{word.strip(',.)')}: " in defaults, word
