"""The journey of the virtual machines: what its report says, what fails a step, whom it ends. QEMU is not run here."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "vm.py"


@pytest.fixture
def vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, whose report is elsewhere."""
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    spec = importlib.util.spec_from_file_location("vm", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # For its annotations, which name what it has itself.
    monkeypatch.setitem(sys.modules, "vm", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "REPORT", tmp_path / "vms.md")
    return module


class Connection:
    """What clients record, as residents.Connection has it."""

    def __init__(self, user: str, silence: float, disconnected: int) -> None:
        self.user, self._silence, self._disconnected = user, silence, disconnected

    def silence(self, since: float) -> float:
        return self._silence

    def count(self, event: str, since: float) -> int:
        return self._disconnected


ALICE, BOB = [Connection("alice", seconds, 1) for seconds in (2.0, 3.0, 11.0)], [Connection("bob", 0.6, 0)]


def test_those_who_may_notice_something_are_told_apart_from_the_others(vm: ModuleType) -> None:
    assert vm.notice([*ALICE, *BOB], 0, {"alice"}) == (
        "3 connections of 1 users: silent for 11.0 s at most, 3.0 s in the median, disconnected 1 times at most; "
        "1 others: silent for 0.6 s at most, none disconnected"
    )
    assert vm.notice(BOB, 0, set()) == "1 connections: silent for 0.6 s at most, none disconnected"
    with pytest.raises(vm.Failed, match="disconnected were alice, who were not to notice it"):
        vm.notice([*ALICE, *BOB], 0, {"bob"})


def test_changes_are_counted_in_the_recap_of_all_hosts(vm: ModuleType) -> None:
    recap = ["edge1  : ok=40   changed=2    unreachable=0", "node1 : ok=3 changed=10 unreachable=0", "changed=7"]
    assert vm.changed(recap) == 12
    assert vm.changed([]) == 0


def test_a_step_that_fails_ends_the_way_and_stands_in_the_report(
    vm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(journey: Any) -> None:
        raise vm.machines.MachineError("node1 is off:\nQEMU | has ended")

    def forbidden(journey: Any) -> None:
        raise AssertionError("a step after the one that failed")

    steps = (vm.Step("a good one", 1, lambda journey: None), vm.Step("boot", 1, fail), vm.Step("deploy", 1, forbidden))
    monkeypatch.setattr(vm, "FRESH", steps)
    rows: list[Any] = []
    assert vm.travel(rows).startswith("boot: node1 is off")
    vm.write(rows, "abc1234", 60)
    report = (tmp_path / "vms.md").read_text()
    assert "`make vm` wrote this on " in report
    assert ", commit abc1234, " in report
    assert "| a good one | ok | 0 |  |\n| boot | failed: node1 is off: QEMU / has ended | 0 |  |\n" in report


@pytest.fixture
def emulators(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two that look like QEMU: the first with a disk in tmp_path."""
    script = 'exec -a qemu-system-x86_64 "$1" -c "import time; time.sleep(60)" "$2"'
    started = [
        subprocess.Popen(["bash", "-c", script, "-", sys.executable, f"file={folder}/node1.qcow2,if=virtio"])
        for folder in (tmp_path, "/elsewhere")
    ]
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_only_machines_of_this_folder_are_known(
    vm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulators: list[subprocess.Popen[bytes]]
) -> None:
    monkeypatch.setattr(vm.machines, "FOLDER", tmp_path)
    deadline = time.monotonic() + 10
    while not (found := vm.machines.processes()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found == [emulators[0].pid]


def test_it_can_be_run_as_a_program() -> None:
    said = subprocess.run([sys.executable, PROGRAM, "--help"], capture_output=True, text=True, check=True).stdout
    assert "make vm KEEP=1" in said
    assert PROGRAM.stat().st_mode & 0o111
