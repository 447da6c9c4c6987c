"""The gallery as a team's project: how its applications are deployed, and a node's commands."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[4]


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gallery as a team's project, locked as the README says."""
    folder = tmp_path_factory.mktemp("applications") / "gallery"
    shutil.copytree(PROJECT / "app" / "gallery", folder)
    subprocess.run(["make", "lock", f"PROJECT={folder}"], cwd=PROJECT, check=True)
    return folder


@pytest.fixture(scope="session")
def play(project: Path, ansible: Any, inventory: Path) -> Callable[..., str]:
    """Runs a playbook for an application of the gallery, with these variables; returns the output.

    site.yml itself proves that the application is sticky. All nodes restart at once, if the variables do not say else.
    """

    def play(playbook: str, application: str, **variables: object) -> str:
        settings = {
            "stickyring_artifacts_projects": [str(PROJECT / "app"), str(project)],
            "stickyring_artifacts_lock": str(project / "requirements.lock"),
            "stickyring_node_wheelhouse": "{{ stickyring_artifacts_directory }}/wheelhouse.tar",
            "stickyring_node_application": application,
            "stickyring_node_proving_time": 0,
            "stickyring_probe_options": ["--no-echo"],
            "stickyring_share": "100%",
        }
        options = ["-e", json.dumps(settings | variables)]
        return " ".join(ansible("ansible-playbook", "-i", inventory, playbook, *options).stdout.split())

    return play


@pytest.fixture(scope="session")
def operate(machine: Any) -> Callable[[Any, str], list[str]]:
    """Runs a command of `stickyring` on each instance of a node, one after the other; returns what each printed."""

    def operate(node: Any, command: str) -> list[str]:
        service, count = (node.variables[f"stickyring_node_{name}"] for name in ("service", "instances"))
        program = f"/opt/{service}/current/bin/stickyring {command} --control /run/{service}"
        return [
            machine(node.name).check_output(f"{program}/{instance}/control.sock")
            for instance in range(1, int(count) + 1)
        ]

    return operate
