"""The part "operations" measures playbooks on hosts that it creates and removes."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from bench import lab, operations
from bench.lab import AROUND, Control, LabError, Run
from bench.operations import Profile, slope, slopes
from bench.report import Part
from bench.rounds import Rounds
from bench.tests.fake_lab import ROOT, command, run, told

DEADLINE_SECONDS = 20.0
LINES = [
    (0.5, "PLAY [Check the inventory] ****"),
    (0.6, "TASK [stickyring.fleet.stickyring : Check the inventory] ****"),
    (0.7, "ok: [localhost]"),
    (1.6, "TASK [stickyring_node : Look at the host] ****"),
    (2.0, "TASK [stickyring_node : Write the unit] ****"),
    (2.1, "changed: [node1]"),
    (2.5, "RUNNING HANDLER [Restart] ****"),
    (2.6, "PLAY [Prove the result] ****"),
    (2.7, "TASK [stickyring_node : Look at the host] ****"),
    (3.0, "PLAY RECAP ****"),
    (3.0, "edge1                      : ok=20   changed=0    unreachable=0    failed=0"),
    (3.0, "localhost                  : ok=6    changed=0    unreachable=0    failed=0"),
    (3.0, "node1                      : ok=24   changed=10   unreachable=0    failed=0"),
]


def test_a_task_lasts_until_the_next_one() -> None:
    tasks = Run(3.5, LINES, 1.0).tasks()
    assert tasks == pytest.approx(
        {
            AROUND: 0.6 + 0.1 + 0.5,
            "stickyring.fleet.stickyring : Check the inventory": 1.0,
            "stickyring_node : Look at the host": 0.4 + 0.3,
            "stickyring_node : Write the unit": 0.5,
            "Restart": 0.1,
        }
    )
    assert sum(tasks.values()) == pytest.approx(3.5)


def test_a_run_tells_whom_it_has_changed() -> None:
    assert Run(3.5, LINES, 1.0).changed() == {"node1"}


def test_the_slope_is_that_of_least_squares() -> None:
    assert slope({3: 10.0, 6: 11.5, 12: 14.5}) == pytest.approx(0.5)
    assert slope({1: 1.0, 2: 3.0, 3: 2.0}) == pytest.approx(0.5)


def test_slopes_are_of_the_sizes_that_were_measured_round_by_round() -> None:
    part = Part("operations", "Operations", operations.FIGURES, {"3": "3", "6": "6", "12": "12"}, {}, "3")
    for no_op in (9.0, 10.0):
        part.add("3", {"no-op": no_op, "no-op-to-ping": 9.0})
    for no_op in (12.0, 16.0, 99.0):
        part.add("6", {"no-op": no_op, "no-op-to-ping": 9.0})
    part.add("3", {"update": 40.0})
    found = slopes(part)
    assert list(found) == ["no-op"]
    assert found["no-op"].rounds == pytest.approx([1.0, 2.0])


def test_an_inventory_is_the_labs_with_more_nodes(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    try:
        folder = Control(tmp_path, Rounds(tmp_path, 1), "operations").inventory(20)
    finally:
        os.sched_setaffinity(0, before)
    lab = yaml.safe_load((ROOT / "inventory/lab/hosts.yml").read_text())
    groups = yaml.safe_load((folder / "hosts.yml").read_text())
    assert groups["edge"] == lab["edge"]
    assert lab["nodes"]["hosts"].items() <= groups["nodes"]["hosts"].items()
    assert groups["nodes"]["hosts"]["node20"] == {"ansible_host": "198.51.100.30"}
    for file in (ROOT / "inventory/lab/group_vars").iterdir():
        assert (folder / "group_vars" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("owner", "where"), [(str(ROOT), ""), ("/", " in /"), ("/nowhere", "")])
def test_a_lab_that_is_up_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str, where: str) -> None:
    monkeypatch.setattr(lab, "LAB_OWNER", tmp_path / "owner")
    lab.refuse_a_running_lab()
    (tmp_path / "owner").write_text(f"{owner}\n")
    with pytest.raises(LabError, match=f"run `make down`{where} first"):
        lab.refuse_a_running_lab()


def test_a_refused_run_says_so_in_one_line_and_touches_nothing(programs: Path) -> None:
    (programs / "owner").write_text(str(ROOT))
    done = run(programs, "operations")
    assert done.returncode == 1
    assert told(done.stderr) == ["Error: there is a lab on this machine already: run `make down` first"]
    assert (programs / "owner").exists()
    assert not (programs / "played").exists()
    assert not (programs / "output").exists()


def test_a_run_measures_every_size_on_fresh_hosts_and_removes_them(programs: Path) -> None:
    done = run(programs, "operations")
    assert done.returncode == 0, done.stderr
    no_ops = ["site {0}", "all {0} -m ping", "status {0}"] * 2
    release = "-e stickyring_node_release=bench"
    changes = [f"rolling_update {{0}} {release}", f"site {{1}} {release}"]
    assert (programs / "played").read_text().splitlines() == [
        "artifacts 3",
        *[line.format(3, 4) for line in ["create {1}", "site {0}", *no_ops, *changes, "destroy {1}"]],
        *[line.format(6) for line in ["create {0}", "site {0}", *no_ops, "destroy {0}"]],
    ]
    assert not (programs / "owner").exists()
    files = sorted((programs / "output").iterdir())
    assert [file.name for file in files] == [f"operations.{kind}" for kind in ("json", "md", "svg")]

    written = json.loads(files[0].read_text())
    rounds = {
        key: {size: len(found["rounds"]) for size, found in figure["found"].items()}
        for key, figure in written["figures"].items()
    }
    both = {"3": 2, "6": 2}
    assert rounds == {
        "fresh": {"3": 1, "6": 1},
        "no-op": both,
        "no-op-cpu": both,
        "ping": both,
        "no-op-to-ping": both,
        "status": both,
        "update": {"3": 1},
        "add": {"3": 1},
    }
    assert set(written["seconds_a_node"]) == {"fresh", "no-op", "no-op-cpu", "ping", "status"}
    (took, used) = (written["figures"][key]["found"]["3"]["median"] for key in ("no-op", "no-op-cpu"))
    assert 0 < used < took, "one command on one core, which waits"
    assert 0.02 < written["seconds_of_tasks"]["no-op"]["3"]["site : Work | rest"] < 1
    table = files[1].read_text()
    assert "| site.yml on fresh hosts, 6 nodes: " in table
    assert "| site : Work / rest | 0." in table
    assert "## The load" not in table


@pytest.mark.parametrize(
    ("trouble", "cause"),
    [
        ("restless", "Error: a run that should change nothing has changed node1"),
        ("is faulty", "Error: ansible-playbook -i "),
        ("unwell", "Error: stickyring status --inventory "),
    ],
)
def test_what_is_no_measure_ends_the_run_with_one_line_and_without_a_lab(
    programs: Path, trouble: str, cause: str
) -> None:
    (programs / trouble).touch()
    done = run(programs, "operations")
    assert done.returncode == 1
    assert len(told(done.stderr)) == 1
    assert told(done.stderr)[0].startswith(cause)
    assert not (programs / "owner").exists()
    assert not (programs / "output").exists()


def test_an_interrupted_run_removes_its_lab(programs: Path) -> None:
    (programs / "hangs").touch()
    with subprocess.Popen(command(programs, "operations"), cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + DEADLINE_SECONDS
            while "site 3\n" not in ((programs / "played").read_text() if (programs / "played").exists() else ""):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            _, stderr = process.communicate(timeout=DEADLINE_SECONDS)
        finally:
            process.kill()
    assert process.returncode == 130, stderr
    assert stderr.endswith("interrupted: nothing was written of operations\n")
    assert (programs / "played").read_text().splitlines()[-1] == "destroy 4"
    assert not (programs / "owner").exists()
    assert not (programs / "output").exists()


def test_sizes_beyond_the_time_are_left_out(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "PROGRAMS", programs)
    monkeypatch.setattr(lab, "LAB_OWNER", programs / "owner")
    before = os.sched_getaffinity(0)
    try:
        part = operations.measure(Rounds(programs, 0), Profile(2, (3, 6), 1, ()))
    finally:
        os.sched_setaffinity(0, before)
    assert list(part.found["fresh"]) == ["3"]
    assert "One size says nothing about growth." in part.sections
