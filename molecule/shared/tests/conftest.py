"""Shared by all suites: expectations from the inventory, and a guard against runs that prove nothing."""

from __future__ import annotations

import json
import os
import subprocess
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment
import pytest
import testinfra
import testinfra.host

SUITES = environment.PROJECT / ".artifacts" / "suites.jsonl"


@dataclass(frozen=True)
class Host:
    """One host as the inventory describes it; variables: every `stickyring_` name to its value."""

    name: str
    groups: list[str]
    variables: dict[str, Any]

    def url(self, listener_name: str) -> str:
        """The address of a listener of this edge."""
        listener = next(one for one in self.variables["stickyring_edge_listeners"] if one["name"] == listener_name)
        scheme = "https" if "tls" in listener else "http"
        return f"{scheme}://{self.variables['stickyring_address']}:{listener['port']}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects tests that only `make soak` or another scenario runs."""
    scenario = os.environ.get("MOLECULE_SCENARIO_NAME", "default")

    def left_out(item: pytest.Item) -> bool:
        """Tests that are marked `once` are for the scenario that the mark names, or for `default`."""
        once = item.get_closest_marker("once")
        elsewhere = once is not None and scenario not in (once.args or ("default",))
        return elsewhere or item.get_closest_marker("soak") is not None

    out = [] if environment.SOAK else [*filter(left_out, items)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run with a skipped test, or without a passed one: it proves nothing."""
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    keep_seconds(reporter)
    skipped, passed = (len(reporter.stats.get(outcome, [])) for outcome in ("skipped", "passed"))
    if session.exitstatus == pytest.ExitCode.OK and (skipped or not passed):
        reporter.write_line(f"{passed} passed and {skipped} skipped: a suite must pass, and skip nothing", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def keep_seconds(reporter: Any) -> None:
    """Writes how long each test of the suite took, with its fixtures, for molecule/scenarios.py."""
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for report in (one for reports in reporter.stats.values() for one in reports if hasattr(one, "duration")):
        file, _, test = report.nodeid.partition("::")
        seconds[Path(file).parent.name][f"{Path(file).name}::{test}"] += report.duration
    with SUITES.open("a") as file:
        for suite, steps in seconds.items():
            scenario = os.environ.get("MOLECULE_SCENARIO_NAME", "")
            kept = {"scenario": scenario, "suite": suite, "seconds": sum(steps.values()), "steps": [*steps.items()]}
            file.write(json.dumps(kept) + "\n")


@pytest.fixture(scope="session")
def inventory(pytestconfig: pytest.Config) -> Path:
    """The inventory that the scenario deploys."""
    return Path(pytestconfig.getoption("ansible_inventory"))


@pytest.fixture(scope="session")
def programs() -> Path:
    """The folder of the virtual environment's commands."""
    return environment.PROGRAMS


@pytest.fixture(scope="session")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pinned JavaScript client in node_modules."""
    return environment.javascript_client(tmp_path_factory.mktemp("javascript"))


@pytest.fixture(scope="session")
def started() -> Callable[..., AbstractContextManager[subprocess.Popen[str]]]:
    """Starts an ansible program for the time of a block."""
    return environment.started


@pytest.fixture(scope="session")
def ansible() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs an ansible program to its end."""
    return environment.run


@pytest.fixture(scope="session")
def interrupt() -> Callable[..., None]:
    """Kills a playbook when it begins a task, once for each task given."""
    return environment.interrupt


@pytest.fixture(scope="session")
def hosts(inventory: Path, ansible: Callable[..., object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Host]:
    """Each host of the inventory by name; its variables include the roles' defaults."""
    directory = tmp_path_factory.mktemp("inventory")
    ansible("ansible-playbook", "-i", inventory, "playbooks/describe.yml", "-e", f"stickyring_directory={directory}")
    return {file.stem: Host(file.stem, **json.loads(file.read_text())) for file in sorted(directory.glob("*.json"))}


@pytest.fixture(scope="session")
def machine(inventory: Path) -> Callable[..., testinfra.host.Host]:
    """A host by name, as root, for tests about several hosts: of this inventory, or of another one."""
    return lambda name, other=inventory: testinfra.get_host(f"ansible://{name}?sudo=true", ansible_inventory=str(other))


@pytest.fixture(scope="session")
def ask_envoy(machine: Callable[..., testinfra.host.Host]) -> Callable[[Host, str], Any]:
    """The decoded JSON answer of an edge's admin interface to a path; only root on the edge can reach it."""
    program = (
        "import http.client, socket, sys; connection = http.client.HTTPConnection('localhost');"
        " connection.sock = socket.socket(socket.AF_UNIX); connection.sock.connect(sys.argv[1]);"
        " connection.request('GET', sys.argv[2]); sys.stdout.write(connection.getresponse().read().decode())"
    )

    def ask(edge: Host, path: str) -> Any:
        return json.loads(
            machine(edge.name).check_output("python3 -c %s %s %s", program, environment.ADMIN_SOCKET, f"/{path}")
        )

    return ask


@pytest.fixture(scope="session")
def nodes(hosts: dict[str, Host]) -> list[Host]:
    """The hosts that run the application."""
    return [host for host in hosts.values() if "nodes" in host.groups]


@pytest.fixture(scope="session")
def edges(hosts: dict[str, Host]) -> list[Host]:
    """Every edge."""
    return [host for host in hosts.values() if "edge" in host.groups]


@pytest.fixture(scope="session")
def edge(edges: list[Host]) -> Host:
    """The first edge."""
    return edges[0]


@pytest.fixture(scope="session")
def edge_url(edge: Host) -> Callable[[str], str]:
    """The address of a listener of the first edge, by the listener's name."""
    return edge.url
