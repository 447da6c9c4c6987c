"""A number or boolean given as text, as the command line and INI files give it, has the same effect."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

PROJECT = Path(__file__).parents[2]
ROLES = sorted(folder.name for folder in (PROJECT / "roles").glob("stickyring_*"))
ENDPOINTS = [{"name": "node1-1", "address": "192.0.2.1", "port": 8001, "weight": 2}]
GIVEN: dict[str, Any] = {
    "inventory_hostname": "host1",
    "ansible_managed": "Ansible managed",
    "stickyring_node_application": "chat:app",
    "stickyring_node_address": "192.0.2.1",
    "stickyring_node_edges": ["192.0.2.10"],
    "stickyring_node_wheelhouse": "",
    "stickyring_node_requirements": str(PROJECT / "app" / "requirements.lock"),
    "stickyring_edge_envoy_binary": "/srv/envoy",
    "stickyring_edge_envoy_sha256": "0" * 64,
    "stickyring_edge_clusters": [{"name": "nodes", "endpoints": ENDPOINTS}],
    "stickyring_edge_listeners": [{"name": "sticky", "port": 9002, "cluster": "nodes"}],
    "stickyring_edge_ring_cluster": "nodes",
}
# Everything that a role composes from its variables. Modules convert types themselves.
MADE = {
    "stickyring_node": "[__stickyring_node_files, __stickyring_node_wanted, __stickyring_node_release_path]",
    "stickyring_edge": """[__stickyring_edge_problems, __stickyring_edge_xds_files, __stickyring_edge_start_files,
        stickyring_edge_clusters | stickyring.fleet.edge_wanted_ring('nodes', __stickyring_edge_common)]""",
}


@cache
def options(role: str) -> dict[str, Any]:
    specs = yaml.safe_load((PROJECT / "roles" / role / "meta" / "argument_specs.yml").read_text())["argument_specs"]
    found: dict[str, Any] = specs["main"]["options"]
    return found


@cache
def variables_of(role: str) -> dict[str, Any]:
    folder = PROJECT / "roles" / role
    variables: dict[str, Any] = {"ansible_search_path": [str(folder)], "role_path": str(folder)}
    for part in ("defaults", "vars"):
        variables |= DataLoader().load_from_file(str(folder / part / "main.yml"), trusted_as_template=True)
    return variables


def made(role: str, **given: object) -> Any:
    """What the role composes from these variables and the defaults of all others."""
    templar = Templar(DataLoader(), variables_of(role) | GIVEN | given)
    return templar.template(trust_as_template(f"{{{{ {MADE[role]} }}}}"))


@pytest.mark.parametrize("role", MADE)
def test_numbers_can_be_given_as_text(role: str) -> None:
    numbers = {
        name: option.get("default", 1) for name, option in options(role).items() if option["type"] in {"int", "float"}
    }
    assert len(numbers) >= 8
    assert made(role, **{name: str(number) for name, number in numbers.items()}) == made(role, **numbers)


@pytest.mark.parametrize("role", MADE)
@pytest.mark.parametrize(("value", "texts"), [(True, ("true", "yes")), (False, ("false", "0"))])
def test_booleans_can_be_given_as_text(role: str, value: bool, texts: tuple[str, ...]) -> None:
    names = [name for name, option in options(role).items() if option["type"] == "bool"]
    wanted = made(role, **dict.fromkeys(names, value))
    for text in texts:
        assert made(role, **dict.fromkeys(names, text)) == wanted


def test_the_composed_values_depend_on_the_variables() -> None:
    """The negative control for the tests above."""
    assert made("stickyring_edge", stickyring_edge_access_log="false") != made("stickyring_edge")
    assert made("stickyring_node", stickyring_node_instances="2") != made("stickyring_node")


def test_the_numbers_of_listeners_and_endpoints_can_be_given_as_text() -> None:
    listener = GIVEN["stickyring_edge_listeners"][0]
    texts = [{name: str(value) for name, value in one.items()} for one in (listener, ENDPOINTS[0])]
    given = {
        "stickyring_edge_listeners": [texts[0]],
        "stickyring_edge_clusters": [{"name": "nodes", "endpoints": [texts[1]]}],
    }
    # The names of endpoint files depend on these.
    assert made("stickyring_edge", **given) == made("stickyring_edge")


def test_every_boolean_passes_through_the_filter_bool() -> None:
    """A text is an error in a condition, and true in an expression.

    A value that is only the variable may go without: it is passed to a module or to another variable.
    """
    files = [*PROJECT.glob("roles/*/tasks/*"), *PROJECT.glob("roles/*/vars/*"), *PROJECT.glob("roles/*/templates/*")]
    names = "|".join(
        [name for role in ROLES for name, option in options(role).items() if option["type"] == "bool"]
        + ["stickyring_live"]
    )
    taken = re.compile(rf"(?<![\w.'-])({names})\b(?!(\s*\|\s*default\(\w+\))?\s*\|\s*bool\b)(?!=|:)")
    for file in [*files, *PROJECT.glob("playbooks/*.yml"), *PROJECT.glob("playbooks/parts/**/*.yml")]:
        for line in file.read_text().splitlines():
            whole = re.fullmatch(rf'\s+\w+: "\{{\{{ ({names}) \}}\}}"', line)
            assert whole or line.lstrip().startswith("#") or not taken.search(line), f"{file.name}: {line.strip()}"


def test_a_release_that_yaml_takes_for_a_number_is_compared_as_text() -> None:
    """Otherwise every run would install 1.4 again."""
    for file in PROJECT.glob("roles/stickyring_node/tasks/*.yml"):
        compared = re.findall(r"[!=]= stickyring_node_release\b.*|\bstickyring_node_release [!=]=.*", file.read_text())
        assert all("!= stickyring_node_release | string" in one for one in compared), file.name
