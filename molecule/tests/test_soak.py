"""The soak: its report after a failed and after a successful run, and when the report is too old."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).parents[1] / "soak.py"


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=me", "-c", "user.email=me@localhost")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder: Path, file: str, text: str) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(text)
    git(folder, "add", ".")
    git(folder, "commit", "--message", text)


@pytest.fixture
def soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program in a project of its own, with one step."""
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    spec = importlib.util.spec_from_file_location("soak", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    git(tmp_path, "init")
    for file in ("plugins/a", "roles/a", "playbooks/a", "app/src/a", "docs/a"):
        commit(tmp_path, file, "first")
    for name, path in (
        ("PROJECT", "."),
        ("REPORT", "docs/soak.md"),
        ("PYPY", ".artifacts/pypy"),
        ("DONE", ".artifacts/soak.json"),
    ):
        monkeypatch.setattr(module, name, tmp_path / path)
    monkeypatch.setattr(module.longrun, "PROJECT", tmp_path)
    monkeypatch.setattr(module, "MOST_COMMITS", 2)
    monkeypatch.setattr("sys.argv", ["soak.py"])
    return module


def play(soak: ModuleType, monkeypatch: pytest.MonkeyPatch, *commands: str, prepares: str = "") -> None:
    made = [soak.Step("an errand", command, prepares=command == prepares) for command in commands]
    monkeypatch.setattr(soak, "steps", lambda operations, hours: made)
    soak.main()


def test_a_good_run_is_reported_and_a_failed_one_leaves_the_report_as_it_was(
    soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(soak, monkeypatch, "sh -c 'echo $STICKYRING_SOAK $ANSIBLE_INVENTORY'")
    report = (tmp_path / "docs" / "soak.md").read_text()
    assert "| an errand | `sh -c 'echo $STICKYRING_SOAK $ANSIBLE_INVENTORY'` | 0 | " in report
    with pytest.raises(SystemExit, match="Failed: false"):
        play(soak, monkeypatch, "false")
    assert (tmp_path / "docs" / "soak.md").read_text() == report


def test_an_interrupted_run_is_continued_unless_what_it_judges_has_changed(
    soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, once = "sh -c 'echo >> prepared'", "sh -c 'echo >> once'"

    def lines(name: str) -> int:
        return len((tmp_path / name).read_text())

    for failed in (1, 2):
        with pytest.raises(SystemExit, match="Run it again to go on with this step"):
            play(soak, monkeypatch, once, prepare, "test -e mended", prepares=prepare)
        assert (lines("prepared"), lines("once")) == (failed, 1)
    commit(tmp_path, "roles/a", "changed")
    with pytest.raises(SystemExit):
        play(soak, monkeypatch, once, prepare, "test -e mended", prepares=prepare)
    assert lines("once") == 2
    (tmp_path / "mended").touch()
    play(soak, monkeypatch, once, prepare, "test -e mended", prepares=prepare)
    assert lines("once") == 2
    assert (tmp_path / "docs" / "soak.md").read_text().count("| an errand |") == 3
    play(soak, monkeypatch, once, prepare, "true", prepares=prepare)
    assert lines("once") == 3, "a completed run is not continued"


def test_a_report_is_too_old_after_so_many_commits_to_what_it_is_about(
    soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is missing" in (soak.too_old() or "")
    play(soak, monkeypatch, "true")
    for number, file in enumerate(("docs/a", "roles/a", "docs/a", "app/src/a")):
        commit(tmp_path, file, f"change {number}")
    assert soak.too_old() is None
    commit(tmp_path, "playbooks/a", "one more")
    age = f"docs/soak.md is 3 commits to {', '.join(soak.JUDGED)} old"
    assert soak.too_old() == f"{age}, more than 2: run `make soak`"


def test_what_is_not_committed_is_not_soaked(soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "roles" / "a").write_text("changed")
    with pytest.raises(SystemExit, match="Commit your changes first"):
        play(soak, monkeypatch, "true")


def test_chaos_on_pypy_has_an_inventory_that_says_so(soak: ModuleType) -> None:
    (chaos,) = (step for step in soak.steps(15, 1) if step.purpose == "chaos on PyPy")
    assert chaos.inventory == f"inventory/lab,{soak.PYPY / 'hosts.json'}"
    assert chaos.command.endswith("--operations 15 --seed 5")
