"""The scenarios and their tools. Molecule skips a suite without tests and still exits 0."""

import re
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

SCENARIOS = Path(__file__).parents[1]


@pytest.mark.parametrize("file", sorted(SCENARIOS.glob("*/molecule.yml")), ids=lambda file: file.parent.name)
def test_every_suite_that_a_scenario_verifies_has_tests(file: Path) -> None:
    sequence = yaml.safe_load(file.read_text())["scenario"]["test_sequence"]
    suites = [step.removeprefix("verify ") for step in sequence if step.startswith("verify ")]
    assert suites
    assert "verify" not in sequence, "without a folder, a browser suite would run where it cannot"
    for suite in suites:
        assert list((file.parent / suite).glob("test_*.py")), f"{suite} has no test"


def test_every_suite_is_run_by_a_scenario() -> None:
    sequences = [
        yaml.safe_load(file.read_text())["scenario"]["test_sequence"] for file in SCENARIOS.glob("*/molecule.yml")
    ]
    verified = {Path(step).name for sequence in sequences for step in sequence if step.startswith("verify ")}
    assert {
        folder.name for folder in (SCENARIOS / "shared" / "tests").iterdir() if any(folder.glob("test_*.py"))
    } == verified


def versions(lock: str) -> dict[str, set[str]]:
    """Every package of a lock file, with its versions for the different Pythons."""
    found = defaultdict(set)
    for name, version in re.findall(r"^([\w.-]+)==([^ ;]+)", (SCENARIOS.parent / lock).read_text(), re.MULTILINE):
        found[name].add(version)
    return found


def test_the_controller_is_tested_with_the_versions_that_it_has() -> None:
    controller, tools = versions("requirements.lock"), versions("requirements-test.lock")
    both = controller.keys() & tools.keys()
    assert "ansible-core" in both
    assert {name: controller[name] for name in both} == {name: tools[name] for name in both}
