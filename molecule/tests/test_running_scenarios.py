"""The program that runs the scenarios: its table, its end, and its report of a failure. Molecule is a stub here."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

MOLECULE = Path(__file__).parents[1]
STUB = """#!/bin/sh
echo "$@" >> commands
case "$1 $*" in
  destroy* | *failover*) exit 0 ;;
  *operations*)
    [ -n "$OTHER" ] || exit 0
    trap 'echo interrupted >> commands; exit 1' INT
    touch begun
    while sleep 0.1; do :; done ;;
esac
printf 'INFO     \\033[32mdefault\\033[0m ➜ create: Executing\\n'
printf 'INFO     default ➜ create: Executed: Successful\\n'
steps='["test_a.py::test_x", 2.0], ["test_a.py::test_y", 0.5]'
echo '{"scenario": "default", "suite": "nodes", "seconds": 2.5, "steps": ['"$steps"']}' >> .artifacts/suites.jsonl
[ -z "$FAILS" ] || { while [ ! -e begun ]; do sleep 0.1; done; cat failure; exit 2; }
"""


FAILURE = """\
  | E       AssertionError: because
  | E       assert 1 == 2
  | test_a.py:12: AssertionError
  | FAILED ../shared/tests/nodes/test_a.py::test_x - assert
  | TASK [Remove the hosts] ****
  | fatal: [localhost]: FAILED! =>
  |     changed: true
  |     cmd:
  |     - podman
  |     stderr: no such network
  | TASK [Go on]
  | ok: [localhost] => {msg: well}
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program in a project of its own."""
    monkeypatch.syspath_prepend(str(MOLECULE))
    spec = importlib.util.spec_from_file_location("scenarios", MOLECULE / "scenarios.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, path in (("MOLECULE", "molecule"), ("README", "molecule/README.md"), ("ARTIFACTS", ".artifacts")):
        monkeypatch.setattr(module, name, tmp_path / path)
    monkeypatch.setattr(module.longrun, "PROJECT", tmp_path)
    monkeypatch.setattr(module.longrun, "ending", threading.Event())
    monkeypatch.setattr(module, "SUITES", tmp_path / ".artifacts" / "suites.jsonl")
    (tmp_path / "molecule" / "shared" / "tests" / "nodes").mkdir(parents=True)
    (tmp_path / "molecule" / "shared" / "tests" / "nodes" / "test_a.py").write_text('"""Nodes serve.\n\nMore."""\n')
    (tmp_path / "molecule" / "shared" / "tests" / "nodes" / "test_b.py").write_text('"""What only a soak runs."""\n')
    (tmp_path / "molecule" / "README.md").write_text("before\n\n" + "\nold\n".join(module.MARKS) + "\nafter\n")
    stub = tmp_path / "bin" / "molecule"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    for name in ("FAILS", "OTHER"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("sys.argv", ["scenarios.py"])
    return module


def test_it_writes_what_each_suite_proves(
    program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        program.main()
    text = (tmp_path / "molecule" / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("| default")]
    assert "| default | nodes | Nodes serve. | 2 | 2 |" in rows
    assert any(row.startswith("| default | create | Makes the hosts.") for row in rows)
    told = capsys.readouterr().out
    assert told.index("2.0 s  test_a.py::test_x") < told.index("0.5 s  test_a.py::test_y")


def test_one_scenario_leaves_the_rows_of_the_others(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = tmp_path / "molecule" / "README.md"
    others = "| scale | scaling | Grows. | 8 | 464 |\n| default | nodes | Gone. | 21 | 16 |\n| all | | | 29 | 480 |"
    readme.write_text(f"\n{others}\n".join(program.MARKS))
    monkeypatch.setattr("sys.argv", ["scenarios.py", "default"])
    program.main()
    assert (tmp_path / "commands").read_text().splitlines() == [
        "destroy --scenario-name default",
        "test --scenario-name default",
    ]
    rows = readme.read_text().splitlines()
    assert "| default | nodes | Nodes serve. | 2 | 2 |" in rows
    assert "Gone." not in readme.read_text()
    assert rows[-4:-2] == ["| scale | scaling | Grows. | 8 | 464 |", "| all | | | 10 | 467 |"]


def test_an_unknown_scenario_is_refused(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["scenarios.py", "nodes"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.endswith("no scenario: nodes; there are failover, default, gallery, scale, debian12, operations")
    assert not (tmp_path / "commands").exists()


def test_a_failure_ends_it_and_is_shown_last(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAILS", "1")
    monkeypatch.setenv("OTHER", "runs until it is interrupted")
    (tmp_path / "failure").write_text(FAILURE)
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    told = capsys.readouterr().out.partition("What failed:\n")[2]
    assert told.splitlines() == [
        "E       AssertionError: because",
        "E       assert 1 == 2",
        "FAILED ../shared/tests/nodes/test_a.py::test_x - assert",
        "fatal: [localhost]: FAILED! =>",
        "stderr: no such network",
    ]
    assert "old" in (tmp_path / "molecule" / "README.md").read_text()
    assert (tmp_path / "commands").read_text().splitlines()[-1] == "interrupted"


@pytest.mark.parametrize("interrupts", [signal.default_int_handler, signal.SIG_IGN], ids=["heeded", "ignored"])
def test_what_it_has_started_ends_with_it(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupts: Any
) -> None:
    """Also in the background, where a shell ignores interrupts."""
    lines = (
        "#!/bin/sh",
        "[ $1 = test ] || exit 0",
        "trap 'sleep 0.5; seq 50000; touch ended; exit 130' INT",
        "echo begun",
    )
    (tmp_path / "bin" / "molecule").write_text("\n".join([*lines, "while sleep 0.1; do :; done", ""]))

    def ask_to_end(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, interrupts)
    monkeypatch.setattr("builtins.print", ask_to_end)
    monkeypatch.setattr("sys.argv", ["scenarios.py", "default"])
    try:
        with pytest.raises(KeyboardInterrupt):
            program.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (tmp_path / "ended").exists()
    assert "50000" in (program.ARTIFACTS / "molecule-only.log").read_text(), "more than a pipe holds"


def test_every_scenario_is_run_once(program: ModuleType) -> None:
    assert sorted(program.EVERY) == sorted(file.parent.name for file in MOLECULE.glob("*/molecule.yml"))


def test_those_that_share_hosts_deploy_the_same_inventory(program: ModuleType) -> None:
    for name in program.SAME_HOSTS:
        config = yaml.safe_load((MOLECULE / name / "molecule.yml").read_text())
        assert config["ansible"]["executor"]["args"]["ansible_playbook"] == [
            "--inventory=${MOLECULE_PROJECT_DIRECTORY}/inventory/lab"
        ]


def test_it_can_be_run_as_a_program() -> None:
    assert os.access(MOLECULE / "scenarios.py", os.X_OK)
