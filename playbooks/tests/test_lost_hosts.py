"""A host that becomes unreachable ends the run: no later batch or play touches another host."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PLAYBOOKS = Path(__file__).parents[1]
ANSIBLE = Path(sys.executable).parent / "ansible-playbook"
# b cannot be reached, the others are this machine.
HOSTS = """\
nodes: {{hosts: {{a: , b: {{ansible_connection: ssh, ansible_host: 127.0.0.1, ansible_port: {port}}}, c: , d: }}}}
edge: {{hosts: {{e: }}}}
all: {{vars: {{ansible_connection: local, ansible_python_interpreter: "{python}"}}}}
"""
RUN = """\
- hosts: nodes
  gather_facts: false
  any_errors_fatal: true
  serial: {share}
  tasks:
    - ansible.builtin.import_tasks: {playbooks}/parts/tasks/require_every_host.yml
    - ansible.builtin.command: touch {folder}/{{{{ inventory_hostname }}}}
    - ansible.builtin.command: touch {folder}/{{{{ inventory_hostname }}}}-last
  vars: &state
    __stickyring_lost_state: It was being restarted.
- ansible.builtin.import_playbook: {playbooks}/parts/require_every_host.yml
  vars: *state
- hosts: edge
  gather_facts: false
  tasks:
    - ansible.builtin.command: touch {folder}/{{{{ inventory_hostname }}}}
"""


@pytest.fixture(scope="module")
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("share", "limit", "touched"),
    [
        ("1", "all", {"a", "a-last"}),
        # The host is lost in the last batch, so only later plays could go on.
        ("1", "a,b,edge", {"a", "a-last"}),
        ("2", "all", {"a"}),
    ],
    ids=["serial", "last", "share"],
)
def test_nothing_is_touched_after_a_host_was_lost(
    tmp_path: Path, closed_port: int, share: str, limit: str, touched: set[str]
) -> None:
    folder = tmp_path / "touched"
    folder.mkdir()
    inventory, playbook = tmp_path / "hosts.yml", tmp_path / "run.yml"
    inventory.write_text(HOSTS.format(port=closed_port, python=sys.executable))
    playbook.write_text(RUN.format(share=share, playbooks=PLAYBOOKS, folder=folder))
    done = subprocess.run(
        [ANSIBLE, "-i", inventory, "--limit", f"localhost,{limit}", playbook],
        env=os.environ | {"ANSIBLE_CONFIG": str(PLAYBOOKS.parent / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0, done.stdout
    assert {path.name for path in folder.iterdir()} == touched, done.stdout
    lost, ended = done.stdout.strip().splitlines()[-2:]
    assert lost.startswith("b could not be reached at `ansible.builtin.command`: ")
    assert "failed at `Require every host of this run`: A host could not be reached (named" in ended
    assert "State of that host: It was being restarted." in ended


def test_every_serial_play_stops_if_a_host_was_lost() -> None:
    serial = [
        (path, play)
        for path in [*PLAYBOOKS.glob("*.yml"), *PLAYBOOKS.glob("parts/*.yml")]
        for play in yaml.safe_load(path.read_text())
        if "serial" in play and path.name != "require_every_host.yml"
    ]
    deploying = {"deploy_bus.yml", "deploy_edges.yml", "deploy_nodes.yml"}
    assert {path.name for path, _ in serial} == deploying | {"rollback.yml"}
    for path, play in serial:
        first = [*play.get("pre_tasks", []), *play.get("tasks", [])][0]
        assert first["ansible.builtin.import_tasks"].endswith("tasks/require_every_host.yml"), path
        plays = [one.get("ansible.builtin.import_playbook") for one in yaml.safe_load(path.read_text())]
        after = [Path(imported).name for imported in plays[plays.index(None) :] if imported]
        assert "require_every_host.yml" in after, path


def test_a_dead_host_that_watches_does_not_stop_a_deployment() -> None:
    """Nobody contacts it before everything else is deployed and proven."""
    plays = yaml.safe_load((PLAYBOOKS / "site.yml").read_text())
    parts = [Path(play["ansible.builtin.import_playbook"]).name for play in plays]
    assert parts[-2:] == ["deploy_monitor.yml", "unlock.yml"]
    for part in parts[: parts.index("deploy_monitor.yml")]:
        (found,) = [*PLAYBOOKS.glob(part), *PLAYBOOKS.glob(f"parts/{part}")]
        for play in yaml.safe_load(found.read_text()):
            # preflight.yml contacts no host.
            assert "monitor" not in play.get("hosts", "").split(":") or part == "preflight.yml", part
