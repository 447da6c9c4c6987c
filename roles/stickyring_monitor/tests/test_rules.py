"""Each alert fires for what it is for, and not for what is near that; without its rule, its test fails."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).parents[3]
PROMTOOL = Path(sys.executable).with_name("promtool")
TESTS = Path(__file__).with_name("stickyring.test.yml")
RULES = Path(__file__).parents[1] / "files" / "stickyring.rules.yml"
GROUPS: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
EXPRESSIONS = {rule.get("alert") or rule["record"]: rule["expr"] for group in GROUPS for rule in group["rules"]}
ALERTS = [name for name in EXPRESSIONS if name.startswith("Stickyring")]


def without(name: str) -> list[dict[str, Any]]:
    """The groups without this rule."""
    return [
        {**group, "rules": [rule for rule in group["rules"] if name not in (rule.get("alert"), rule.get("record"))]}
        for group in GROUPS
    ]


def cases_of(name: str) -> dict[str, Any]:
    """The tests of this alert, or of those that use this recording."""
    alerts = {alert for alert in ALERTS if alert == name or name in EXPRESSIONS[alert]}
    tests = yaml.safe_load(TESTS.read_text())
    used = [one for one in tests["tests"] if {case["alertname"] for case in one["alert_rule_test"]} & alerts]
    return {**tests, "tests": used}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By file of tests, or by the name of the rule that is missing, what promtool says; it takes long to start."""
    folder = tmp_path_factory.mktemp("rules")
    files = {str(TESTS): "with all rules"}
    for number, name in enumerate(EXPRESSIONS):
        (folder / f"{number}.rules.yml").write_text(yaml.safe_dump({"groups": without(name)}))
        test = folder / f"{number}.test.yml"
        test.write_text(yaml.safe_dump(cases_of(name) | {"rule_files": [f"{number}.rules.yml"]}))
        files[str(test)] = name
    command: list[str | Path] = [PROMTOOL, "test", "rules", *files]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False)
    said = re.split(r"^Unit Testing: +(.+)$", done.stdout, flags=re.MULTILINE)[1:]
    found = dict(zip(map(files.__getitem__, said[::2]), said[1::2], strict=True))
    assert set(found) == set(files.values()), done.stdout
    return found


def test_every_alert_fires_for_its_fault_only(results: dict[str, str]) -> None:
    assert results["with all rules"].strip() == "SUCCESS"


def test_without_a_rule_its_test_fails(results: dict[str, str]) -> None:
    """All in one test: with one for each rule, every process of pytest would run promtool."""
    missed = re.compile(r"FAILED:.*alertname: ?Stickyring.*got: ?\[\]", re.DOTALL)
    assert {name: results[name] for name in EXPRESSIONS if not missed.search(results[name])} == {}


def test_every_alert_has_a_case_in_which_it_is_quiet() -> None:
    cases = [case for test in yaml.safe_load(TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == set(ALERTS)
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == set(ALERTS)


def test_every_recording_is_used() -> None:
    """Otherwise no test would notice that it is wrong."""
    assert [name for name in EXPRESSIONS if not cases_of(name)["tests"]] == []


def test_every_alert_has_a_section_of_the_runbook() -> None:
    sections = re.findall("^## (.+)$", (PROJECT / "docs" / "runbooks.md").read_text(), re.MULTILINE)
    assert sections == ALERTS
    for rule in (rule for group in GROUPS for rule in group["rules"] if "alert" in rule):
        assert rule["annotations"]["runbook"] == f"docs/runbooks.md#{rule['alert'].lower()}"


def test_rules_use_only_metrics_of_nodes_that_are_documented() -> None:
    documented = (PROJECT / "docs" / "operations.md").read_text()
    words = {word for text in EXPRESSIONS.values() for word in re.findall(r"(?<![:\w\"])stickyring_\w+", text)}
    assert len(words) >= 10
    assert [word for word in sorted(words) if f"`{word.removesuffix('_bucket')}`" not in documented] == []
