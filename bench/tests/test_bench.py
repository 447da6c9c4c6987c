"""The benchmark measures what it says, and a run that measures something else fails."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from bench import __main__, capacity, edges, nodes, report
from bench.capacity import BENCHMARKS
from bench.contenders import PYPY_NURSERY, Contender
from bench.load import Loop
from bench.report import Figure, Part, Spread
from bench.rounds import Rounds

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 20.0
FILES = ["nodes.json", "nodes.md", "nodes.svg"]
TINY = (
    "nodes.Profile(rounds=1, starts=1, idle_rounds=1, seconds=0.05, idle_connections=10, crowds=(1, 10), "
    "idle_seconds=0.2, warm_up_seconds=0.02)"
)
STUB = "lambda port: [sys.executable, '-c', f'from bench import stub; {}; stub.serve({{port}})']"
CONTEXT = {
    "command": "a command",
    "date": "a date",
    "machine": {"cores": 2, "processor": "a processor", "kernel": "a kernel"},
    "versions": {},
}


@pytest.fixture
def part() -> Part:
    """Two rounds of three servers, the stub among them."""
    part = Part(
        "nodes",
        "Nodes",
        [Figure("echoes@1", "echoes", "1/s", True, True), Figure("trip", "round trip", "ms", False)],
        {"ours": "Ours", "stock": "Stock", "stub": "Stub"},
        {"ours": "serve", "stock": "gunicorn", "stub": "stub.py"},
        "stock",
        "stub",
    )
    for ours, stock, stub in ((300.0, 100.0, 900.0), (100.0, 200.0, 900.0), (400.0, 200.0, 400.0)):
        part.add("ours", {"echoes@1": ours, "trip": 2.0})
        part.add("stock", {"echoes@1": stock, "trip": 1.0})
        part.add("stub", {"echoes@1": stub})
    return part


@pytest.fixture
def every_core() -> Iterator[None]:
    """Restore the cores of the test process."""
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


def driver(*contenders: str) -> list[str]:
    """A command that runs the whole benchmark with these contenders and a very short profile."""
    return [
        sys.executable,
        "-c",
        "import sys\n"
        "from bench import __main__, load, nodes\n"
        "from bench.contenders import Contender, _serve\n"
        f"nodes.contenders = lambda folder: [{', '.join(contenders)}]\n"
        "nodes.python_title = lambda folder: 'a Python'\n"
        f"nodes.PROFILES['quick'] = {TINY}\n"
        "load.ANSWER_SECONDS = 1.0\n"
        "__main__.main(prog_name='bench')",
    ]


OURS = "Contender('ours', 'Ours', lambda port: _serve([sys.executable], port))"


def stub_that(deviates: str) -> str:
    """The stub as a contender, with one deviation."""
    return f"Contender('other', 'Other', {STUB.format(deviates)}, {{'PYTHONPATH': {str(ROOT)!r}}})"


def run(folder: Path, *contenders: str) -> subprocess.CompletedProcess[str]:
    command = [*driver(*contenders), "nodes", "--output", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_median_and_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, [3.0, 1.0, 2.0])
    assert str(Spread.of([1.0])) == "1.00"
    assert str(Spread.of([1234.5, 1.0, 99.99])) == "100.0 (1.00 to 1\N{NO-BREAK SPACE}234)"


def test_a_ratio_is_of_the_figures_of_one_round(part: Part) -> None:
    """The ratio of the medians would be 1.5."""
    assert part.ratio("echoes@1", "ours", "stock") == Spread(2.0, 0.5, 3.0, [3.0, 0.5, 2.0])
    assert part.ratio("echoes@1", "stock", "stock") == Spread(1.0, 1.0, 1.0, [1.0, 1.0, 1.0])
    assert part.ratio("nothing", "ours", "stock") is None


@pytest.mark.parametrize(("limit", "made"), [(60, [0, 1, 2]), (0, [0])])
def test_rounds_end_before_the_limit(tmp_path: Path, every_core: None, limit: float, made: list[int]) -> None:
    assert list(Rounds(tmp_path, limit).go(3, "echoes")) == made


def test_rounds_begin_with_each_contender_in_turn() -> None:
    assert [Rounds.rotated("abc", number) for number in range(4)] == [
        list("abc"),
        list("bca"),
        list("cab"),
        list("abc"),
    ]


@pytest.mark.parametrize(
    ("number", "together", "found"),
    [
        (3, 3, ["abc", "dab", "cda", "bcd"]),
        (2, 2, ["ab", "cd", "ab", "cd"]),
        (1, 9, ["abcd"]),
        (1, 3, ["abc", "d"]),
    ],
)
def test_groups_have_each_contender_as_often(number: int, together: int, found: list[str]) -> None:
    assert ["".join(group) for group in Rounds.groups("abcd", number, together)] == found


@pytest.mark.parametrize(("part", "contenders"), [(nodes, 7), (edges, 6)])
def test_all_have_as_much_company_while_they_are_idle(part: ModuleType, contenders: int) -> None:
    profile = part.PROFILES["full"]
    groups = Rounds.groups(range(contenders), profile.idle_rounds, nodes.MOST_DESCRIPTORS // profile.idle_connections)
    assert {len(group) for group in groups} == {3}


def test_the_stub_bounds_the_load(part: Part) -> None:
    fastest, times = part.bounds()["echoes@1"]
    assert (fastest, times.rounds) == ("ours", [3.0, 9.0, 1.0])
    assert report.as_json(part, CONTEXT)["load"]["echoes@1"]["enough"]
    part.found["echoes@1"]["stub"] = [500.0, 150.0, 700.0]
    assert not report.as_json(part, CONTEXT)["load"]["echoes@1"]["enough"]
    assert "less than it should be" in report.as_markdown(part, CONTEXT)


def test_a_server_that_did_not_get_its_core_is_told(part: Part) -> None:
    part.add("ours", {"busy@1": 30.0, "busy@100": 99.0})
    part.add("stock", {"busy@1": 30.0, "busy@100": 99.0})
    assert not part.disturbed()
    part.found["busy@100"]["stock"] = [99.0, 60.0, 60.0]
    assert part.disturbed() == ["stock"]
    assert "**Something else used the servers' core** (under full load, Stock had" in report.as_markdown(part, CONTEXT)


def test_the_table_tells_medians_spreads_and_ratios(part: Part) -> None:
    table = report.as_markdown(part, CONTEXT)
    assert "| echoes (1/s) | 300 (100 to 400); 2.00 (0.50 to 3.00) times | 200 (100 to 200) |" in table


@pytest.mark.parametrize("name", __main__.PARTS)
def test_each_document_is_of_the_run_whose_figures_are_beside_it(name: str) -> None:
    written = json.loads((BENCHMARKS / f"{name}.json").read_text())
    table = (BENCHMARKS / f"{name}.md").read_text()
    assert f"`{written['command']}` wrote this on {written['date']}, on {written['machine']['cores']} cores" in table
    for figure in written["figures"].values():
        assert f"| {figure['title']} (" in table


def test_what_fails_while_writing_leaves_what_was_there(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.write(part, tmp_path, CONTEXT)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == FILES

    def interrupted(part: Part) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "draw", interrupted)
    part.add("ours", {"echoes@1": 1.0})
    with pytest.raises(KeyboardInterrupt):
        report.write(part, tmp_path, CONTEXT)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_measures_our_service_and_writes_everything(tmp_path: Path) -> None:
    done = run(tmp_path, OURS)
    assert done.returncode == 0, done.stderr
    assert "echoes and handshakes: round 1 of 1" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    written = json.loads((tmp_path / "nodes.json").read_text())
    for key, figure in written["figures"].items():
        assert len(figure["found"]["ours"]["rounds"]) == 1, key
        assert figure["found"]["ours"]["min"] > 0 or key == "idle-cpu", key
    assert written["figures"]["echoes@10"]["found"]["stub"]["median"] > 0
    assert written["load"]["echoes@10"]["fastest"] == "ours"


@pytest.mark.parametrize(
    ("contender", "cause"),
    [
        pytest.param(stub_that("stub.Stub._frame = lambda *_: bytes()"), "Other does not echo within 1 s", id="silent"),
        pytest.param(
            stub_that("stub.json.loads = lambda _: [0, 0]"), "Other does not echo: [('42', ", id="something else"
        ),
        pytest.param(stub_that("stub.NAME = str(port)"), "Other does not start, and says: NameError", id="no start"),
    ],
)
def test_a_contender_that_does_not_echo_fails_the_run_with_one_line(tmp_path: Path, contender: str, cause: str) -> None:
    done = run(tmp_path, contender)
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if not line.lstrip()[:1].isdigit()]
    assert len(told) == 1, done.stderr
    assert told[0].startswith(f"Error: {cause}")
    assert not list(tmp_path.iterdir())


def test_what_compiles_has_longer_to_warm_up(tmp_path: Path, every_core: None, monkeypatch: pytest.MonkeyPatch) -> None:
    had: dict[str, float] = {}

    def warm_up(loop: Loop, contender: Contender, seconds: float) -> None:
        had[contender.key] = seconds

    monkeypatch.setattr(nodes, "running", lambda contender, *_: contextlib.nullcontext(contender))
    monkeypatch.setattr(nodes, "_warm_up", warm_up)
    compared = [Contender("pypy", "PyPy", lambda _: [], compiles=True), Contender("ours", "Ours", lambda _: [])]
    profile = nodes.Profile(
        rounds=0, starts=0, idle_rounds=0, seconds=1, idle_connections=1, crowds=(1,), compiling_seconds=7
    )
    nodes.compare(Rounds(tmp_path, 60), profile, compared, "a Python")
    assert had == {"pypy": 7, "ours": 0.4, "stub": 0.4}


def test_pypy_is_measured_with_the_memory_that_the_role_gives_it() -> None:
    unit = (ROOT / "roles/stickyring_node/templates/service.j2").read_text()
    assert f"\nEnvironment=PYPY_GC_NURSERY={PYPY_NURSERY}\n" in unit


def test_an_interrupted_run_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    command = [*driver(OURS), "nodes", "--output", str(tmp_path / "output")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + DEADLINE_SECONDS
            while not (servers := children(process.pid)):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            _, told = process.communicate(timeout=DEADLINE_SECONDS)
        finally:
            process.kill()
    assert process.returncode == 130, told
    assert told.endswith("interrupted: nothing was written of nodes\n")
    assert not (tmp_path / "output").exists()
    for server in servers:
        with pytest.raises(ProcessLookupError):
            os.kill(server, 0)


def test_what_an_interrupted_run_has_written_is_in_step(
    part: Part, tmp_path: Path, every_core: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second part is interrupted when the first one has been written."""

    def interrupted(*_: object) -> Part:
        raise KeyboardInterrupt

    in_step = []
    monkeypatch.setitem(__main__.PARTS, "nodes", (lambda *_: part, nodes.PROFILES))
    monkeypatch.setitem(__main__.PARTS, "edges", (interrupted, edges.PROFILES))
    monkeypatch.setattr(capacity, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(capacity, "write", lambda: in_step.append(sorted(path.name for path in tmp_path.iterdir())))
    done = CliRunner().invoke(__main__.main, ["--output", str(tmp_path)])
    assert done.exit_code == 130
    assert done.stderr.endswith("interrupted: nothing was written of edges\n")
    assert in_step == [FILES]


def children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []
