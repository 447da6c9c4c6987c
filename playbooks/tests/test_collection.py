"""The collection installed from its tarball into an empty folder, with the playbooks of the README."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
INVENTORY = """\
edge: {hosts: {edge1: {ansible_host: 192.0.2.1}}}
nodes: {hosts: {node1: {ansible_host: 192.0.2.11, stickyring_weight: 2}}}
all: {vars: {stickyring_address: "{{ ansible_host }}", stickyring_node_application: "chat:app"}}
"""


@pytest.fixture(scope="module")
def tarball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    run(PROJECT, "ansible-galaxy", "collection", "build", "--output-path", str(folder))
    (found,) = folder.glob("stickyring-fleet-*.tar.gz")
    return found


@pytest.fixture(scope="module")
def team(tarball: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home and working folder of a user who has followed the README."""
    folder = tmp_path_factory.mktemp("team")
    shutil.copy(tarball, folder)
    section = (PROJECT / "README.md").read_text().split("### In your own playbooks\n")[1].split("\n### ")[0]
    unpack, locked, galaxy, package = re.findall(r"^\$ (.+)$", section.split("`ansible-playbook")[0], re.MULTILINE)
    subprocess.run(shlex.split(unpack), cwd=folder, check=True)
    # A clone's controller is installed from the same file.
    assert (folder / shlex.split(locked)[-1]).read_bytes() == (PROJECT / "requirements.lock").read_bytes()
    run(folder, *shlex.split(galaxy), "--offline")
    (folder / "pip").mkdir()
    run(folder, *shlex.split(package.replace("~", str(folder))), "--quiet", "--target", "pip")
    for name, text in re.findall(r"```(?:yaml|ini)\n# (\w+\.(?:yml|cfg))\n(.*?)```", section, re.DOTALL):
        (folder / name).write_text(text)
    (folder / "hosts.yml").write_text(INVENTORY)
    return folder


def run(folder: Path, program: str, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [PROGRAMS / program, *arguments],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "ANSIBLE_CONFIG"} | {"HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_the_tarball_has_only_what_a_deployment_needs(tarball: Path) -> None:
    with tarfile.open(tarball) as archive:
        names = set(archive.getnames())
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=PROJECT, check=True, capture_output=True, text=True
    ).stdout.split()
    kept = {name for name in tracked if re.match(r"(plugins|meta|app/src|app/requirements\.lock)", name)}
    kept |= {name for name in tracked if re.match(r"(playbooks|roles)/", name) and "/tests/" not in name}
    kept -= {name for name in kept if name.startswith("playbooks/collections")}
    assert kept <= names
    files = {name for name in names if "." in Path(name).name} - {"MANIFEST.json", "FILES.json"}
    assert files <= set(tracked), "it has files that are not part of the project"
    assert [name for name in files if "/tests/" in name or name.startswith((".", "molecule", "findings"))] == []


def test_the_command_line_is_installed_from_the_collection(team: Path) -> None:
    assert (team / "pip" / "bin" / "stickyring").is_file()
    assert (team / "pip" / "stickyring" / "pages" / "socket.io.min.js").is_file()


def test_the_playbooks_of_the_readme_find_the_roles(team: Path) -> None:
    assert "stickyring.fleet.stickyring_node : " in run(
        team, "ansible-playbook", "-i", "hosts.yml", "nodes.yml", "--list-tasks"
    )
    listed = run(team, "ansible-playbook", "-i", "hosts.yml", "site.yml", "--list-tasks")
    assert {f"stickyring.fleet.stickyring_{name}" for name in ("node", "edge", "probe", "artifacts")} <= set(
        re.findall(r"stickyring\.fleet\.\w+", listed)
    )


def test_an_inventory_is_checked_from_the_installed_collection(team: Path) -> None:
    """The filters, the composition and the roles' specifications come from the tarball; no host is contacted."""
    ansible = ("ansible-playbook", "-i", "hosts.yml", "-e", "ansible_python_interpreter=/usr/bin/python3")
    run(team, *ansible, "stickyring.fleet.preflight")
    # No binary is fetched here, whose checksum would be read.
    given = {"stickyring_directory": str(team), "stickyring_edge_envoy_sha256": "0" * 64}
    run(team, *ansible, "stickyring.fleet.describe", "-e", json.dumps(given))
    found = json.loads((team / "edge1.json").read_text())["variables"]
    assert [(one["name"], one["weight"]) for one in found["stickyring_endpoints"]] == [("node1-1", 2)]
    fleet = team / ".ansible/collections/ansible_collections/stickyring/fleet"
    assert found["stickyring_node_wheelhouse"] == f"{fleet}/.artifacts/wheelhouse.tar"


def test_a_failed_run_ends_with_its_reason(team: Path) -> None:
    """With the settings of the README."""
    mistake = ("-e", "stickyring_share=0")
    said = run(team, "ansible-playbook", "-i", "hosts.yml", "stickyring.fleet.preflight", *mistake, status=2)
    assert "stickyring_share is '0'" in said.split("REASON")[1]
