"""The defaults, argument_specs and README of each role agree."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.stickyring.fleet.plugins.filter import inventory

PROJECT = Path(__file__).parents[2]
# Without the role that composes variables, which has no entry point `main`.
ROLES = sorted((PROJECT / "roles").glob("stickyring_*"))
COMPOSING = PROJECT / "roles" / "stickyring"
# The roles with a variable for every setting of a site, which the example inventory shows.
DEPLOYED = ("stickyring_node", "stickyring_edge")
# Set by the playbooks or the role `stickyring`.
OPTIONAL = {"stickyring_edge_metrics_readers", "stickyring_edge_stopping_timeout"}
"""Composed, and without a default, which would win over what is composed."""
COMPOSED = OPTIONAL | {
    "stickyring_node_prove",
    "stickyring_node_address",
    "stickyring_node_bus_url",
    "stickyring_node_edges",
    "stickyring_node_name",
    "stickyring_node_keep_surplus",
    "stickyring_edge_node_id",
    "stickyring_edge_metrics_address",
}
# Shown with a value that is not the default.
EXAMPLES = {"stickyring_node_wheelhouse"}


def options(role: Path) -> dict[str, Any]:
    specs = yaml.safe_load((role / "meta" / "argument_specs.yml").read_text())["argument_specs"]
    found: dict[str, Any] = specs["preflight" if role == COMPOSING else "main"]["options"]
    return found


def defaults(role: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((role / "defaults" / "main.yml").read_text())
    return found


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_every_option_has_a_default_or_is_required(role: Path) -> None:
    required = {name for name, option in options(role).items() if option.get("required")}
    assert set(defaults(role)) == set(options(role)) - required - OPTIONAL


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_every_literal_default_is_the_documented_one(role: Path) -> None:
    specified = {name: option["default"] for name, option in options(role).items() if "default" in option}
    literal = {name: value for name, value in defaults(role).items() if "{{" not in str(value)}
    assert {name: specified.get(name) for name in literal} == literal


def test_plays_on_nodes_ask_envoy_where_the_edge_role_has_it_listen() -> None:
    """Each role must work without the other, so both name the socket."""
    edge = yaml.safe_load((PROJECT / "roles" / "stickyring_edge" / "vars" / "main.yml").read_text())
    listening = edge["__stickyring_edge_admin_socket"].replace(
        "{{ __stickyring_edge_service }}", edge["__stickyring_edge_service"]
    )
    assert defaults(COMPOSING)["__stickyring_edge_admin_socket"] == listening


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_every_variable_begins_with_the_name_of_its_role(role: Path) -> None:
    assert all(name.startswith(f"{role.name}_") for name in options(role))


@pytest.mark.parametrize("role", [COMPOSING, *ROLES], ids=lambda role: role.name)
def test_the_readme_has_every_variable(role: Path) -> None:
    table = (role / "README.md").read_text().split("<!-- Written by docs/reference.py")[1].split("<!-- End of")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(options(role))


@pytest.mark.parametrize("name", DEPLOYED)
def test_the_example_inventory_shows_every_variable_with_its_default(name: str) -> None:
    files = sorted((PROJECT / "inventory" / "example" / "group_vars").glob("*.yml"))
    shown: dict[str, Any] = {}
    for file in files:
        shown |= yaml.safe_load(re.sub(r"^# (?=stickyring_\w+:| )", "", file.read_text(), flags=re.MULTILINE))
    role = PROJECT / "roles" / name
    assert {variable for variable in shown if variable.startswith(name)} == set(options(role)) - COMPOSED
    literal = {
        key: value for key, value in defaults(role).items() if "{{" not in str(value) and key not in COMPOSED | EXAMPLES
    }
    assert {key: shown[key] for key in literal} == literal


@pytest.mark.parametrize("name", ["stickyring_artifacts", "stickyring_probe"])
def test_the_example_inventory_names_the_variables_of_the_controller(name: str) -> None:
    text = (PROJECT / "inventory" / "example" / "group_vars" / "all.yml").read_text()
    assert [variable for variable in options(PROJECT / "roles" / name) if variable not in text] == []


def test_the_reference_is_written_from_the_roles(tmp_path: Path) -> None:
    """`--check` notices a changed default; a run writes it into the README and the example inventory."""
    for folder in ("roles", "inventory", "docs"):
        shutil.copytree(PROJECT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))

    def reference(*options: str) -> str:
        command = [sys.executable, str(tmp_path / "docs" / "reference.py"), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    assert reference("--check") == ""
    specs = tmp_path / "roles" / "stickyring_node" / "meta" / "argument_specs.yml"
    specs.write_text(specs.read_text().replace("default: 8001", "default: 7001"))
    made = tmp_path / "roles" / "stickyring_node" / "defaults" / "main.yml"
    made.write_text(made.read_text().replace("_port: 8001", "_port: 7001"))
    table, example = "roles/stickyring_node/README.md", "inventory/example/group_vars/nodes.yml"
    assert reference("--check") == f"Run docs/reference.py: {table}, {example}\n"
    assert reference() == ""
    assert reference("--check") == ""
    assert "| `stickyring_node_port` | `7001` |" in (tmp_path / table).read_text()
    assert "# stickyring_node_port: 7001\n" in (tmp_path / example).read_text()


def facts(tasks: list[dict[str, Any]]) -> set[str]:
    """The names of facts and registered results that tasks set, blocks included."""
    found = {name for task in tasks for name in [*task.get("ansible.builtin.set_fact", {}), task.get("register", "")]}
    inner = [task for block in tasks for part in ("block", "rescue", "always") for task in block.get(part, [])]
    return found | facts(inner) if inner else found


def test_results_of_roles_cannot_be_taken_for_settings() -> None:
    """Otherwise preflight would refuse them as unknown variables when a second playbook runs in the same run."""
    files = PROJECT.glob("roles/*/tasks/*.yml")
    found = {
        name for file in files for name in facts(yaml.safe_load(file.read_text())) if name.startswith("stickyring_")
    }
    assert len(found) >= 5
    assert [name for name in found if not inventory.RESULT.match(name)] == []


def test_composed_variables_are_documented_and_have_no_default_in_another_role() -> None:
    """A role's own default would take precedence over the composed one."""
    composed = {name for name in defaults(COMPOSING) if not name.startswith("__")}
    documented = set(options(COMPOSING)).union(*(options(role) for role in ROLES))
    assert composed <= documented
    assert [name for role in ROLES for name in defaults(role) if name in composed] == []
