"""What all suites share: the inventory's own words as expectations, and a guard against runs that prove nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import testinfra
import testinfra.host

PROJECT = Path(__file__).parents[3]
PROGRAMS = Path(sys.executable).parent


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


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run with a skip, or in which nothing passed, has not proven what its green would say."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped, passed = (len(reporter.stats.get(outcome, [])) for outcome in ("skipped", "passed"))
    if session.exitstatus == pytest.ExitCode.OK and (skipped or not passed):
        reporter.write_line(f"{passed} passed and {skipped} skipped: a suite must pass, and skip nothing", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def inventory(pytestconfig: pytest.Config) -> Path:
    """The inventory that the scenario deploys."""
    return Path(pytestconfig.getoption("ansible_inventory"))


@pytest.fixture(scope="session")
def programs() -> Path:
    """The folder of the environment's commands."""
    return PROGRAMS


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """Starts one of the environment's ansible programs at the project's root, in a process group of its own."""

    def start(program: str, *arguments: str | Path) -> subprocess.Popen[str]:
        # Molecule asks for colours, whose codes stand between the words at each line's end.
        plain = {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}
        environment = os.environ | plain | {"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")}
        command = [PROGRAMS / program, *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=PROJECT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    return start


@pytest.fixture(scope="session")
def ansible(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs such a program to its end: ansible("ansible-playbook", "site.yml")."""

    def run(program: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        with start(program, *arguments) as process:
            try:
                output, errors = process.communicate(timeout=900)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        if check:
            assert process.returncode == 0, output + errors
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    return run


@pytest.fixture(scope="session")
def interrupt(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., None]:
    """Runs a playbook and kills it, with all that it has started here, when it begins the task."""

    def run(task: str, *arguments: str | Path) -> None:
        play = start("ansible-playbook", *arguments)
        told = [""]
        for line in play.stdout or ():
            told.append(line)
            if line.startswith("TASK [") and f"{task}]" in line:
                break
        os.killpg(play.pid, signal.SIGKILL)
        play.communicate()
        assert f"{task}]" in told[-1], f"it has ended before {task}: {''.join(told)}"

    return run


@pytest.fixture(scope="session")
def hosts(inventory: Path, ansible: Callable[..., object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Host]:
    """Each host of the inventory by name, with the roles' defaults below what the inventory sets."""
    directory = tmp_path_factory.mktemp("inventory")
    ansible("ansible-playbook", "-i", inventory, "playbooks/describe.yml", "-e", f"directory={directory}")
    return {file.stem: Host(file.stem, **json.loads(file.read_text())) for file in sorted(directory.glob("*.json"))}


@pytest.fixture(scope="session")
def machine(inventory: Path) -> Callable[..., testinfra.host.Host]:
    """A host by name, as root, for tests that look at several: of the inventory, or of another one."""
    return lambda name, other=inventory: testinfra.get_host(f"ansible://{name}?sudo=true", ansible_inventory=str(other))


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
