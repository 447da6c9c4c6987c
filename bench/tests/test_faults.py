"""The part "faults" takes its figures from the suites, on hosts that the run has created."""

import json
from pathlib import Path

from bench.faults import SUITES
from bench.tests.fake_lab import run, told


def test_the_figures_are_those_of_the_suites(programs: Path) -> None:
    done = run(programs, "faults")
    assert done.returncode == 0, done.stderr
    suites = f"pytest {SUITES} -p no:cacheprovider --ansible-inventory"
    assert (programs / "played").read_text().splitlines() == ["create 3", "site 3", suites, "destroy 3"]
    written = json.loads((programs / "output/faults.json").read_text())
    assert list(written["figures"]) == ["killed process", "killed process, again"]
    found = {column: spread["rounds"] for column, spread in written["figures"]["killed process"]["found"].items()}
    assert found == {"median": [1.5], "p99": [2.5], "last": [2.75], "bound": [3]}
    assert [figure["unit"] for figure in written["figures"].values()] == ["s", "tries"]
    assert written["users"] == {"killed process": [90], "killed process, again": [90]}
    assert "| killed process, again (tries) | 1.50 " in (programs / "output/faults.md").read_text()


def test_suites_without_figures_end_the_run_without_a_lab(programs: Path) -> None:
    """Figures of an earlier run are not used."""
    (programs / "fails").touch()
    (programs / "found").write_text('{"killed process": {"median": 1}}')
    done = run(programs, "faults")
    assert done.returncode == 1
    assert told(done.stderr) == [f"Error: {SUITES} have left no figures"]
    assert (programs / "played").read_text().splitlines()[-1] == "destroy 3"
    assert not (programs / "output").exists()
