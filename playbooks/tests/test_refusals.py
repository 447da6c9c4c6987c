"""Every playbook refuses mistakes with a clear message before it contacts a host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
ANSIBLE = Path(sys.executable).parent / "ansible-playbook"
# No host answers at these addresses, and no task may contact them.
INVENTORY = """\
edge: {{hosts: {{{edges}}}}}
nodes: {{hosts: {{{nodes}}}}}
all: {{vars: {{stickyring_address: "{{{{ ansible_host }}}}", stickyring_node_application: "chat:app"}}}}
"""
EDGE = "edge1: {ansible_host: 192.0.2.1}"
TWO_EDGES = f"{EDGE}, edge2: {{ansible_host: 192.0.2.2}}"
GOOD = "Node1.Example.COM: {ansible_host: 192.0.2.11}, node2: {ansible_host: 192.0.2.12}"


def run(
    folder: Path,
    playbook: Path | str,
    *arguments: str,
    nodes: str = GOOD,
    edges: str = EDGE,
    settings: Path = PROJECT / "ansible.cfg",
) -> tuple[int, str]:
    """Run from a folder outside the project; return the status and the output as one line."""
    inventory = folder / "hosts.yml"
    inventory.write_text(INVENTORY.format(nodes=nodes, edges=edges))
    done = subprocess.run(
        [ANSIBLE, "-i", inventory, PROJECT / playbook, *arguments],
        cwd=folder,
        env=os.environ | {"ANSIBLE_CONFIG": str(settings), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def imports(playbook: Path) -> list[str]:
    """The names of the playbooks that it imports, in their order."""
    found = [play.get("ansible.builtin.import_playbook") for play in yaml.safe_load(playbook.read_text())]
    return [Path(one).name for one in found if one]


@pytest.mark.parametrize(
    "playbook",
    [
        "site",
        "edge",
        "firewall",
        "monitor",
        "monitor_files",
        "nodes",
        "plan",
        "rebalance",
        "remove_bus",
        "remove_node",
        "rollback",
        "rolling_update",
        "verify",
        "whereis",
    ],
)
def test_every_entry_point_checks_the_inventory_first(playbook: str) -> None:
    assert imports(PROJECT / "playbooks" / f"{playbook}.yml")[0] == "preflight.yml"


def test_every_entry_point_builds_what_it_installs() -> None:
    """Also in a clone that has deployed nothing yet."""
    installing = {"deploy_nodes.yml", "deploy_edges.yml", "bring_users_home.yml"}
    found = {path.stem: imports(path) for path in (PROJECT / "playbooks").glob("*.yml")}
    found = {name: parts for name, parts in found.items() if installing & {*parts}}
    assert {*found} == {"site", "nodes", "edge", "rebalance", "rollback", "rolling_update", "remove_node"}
    for name, parts in found.items():
        # An application that cannot be built must not stop a change of the edges alone.
        builds = "fetch_envoy.yml" if installing & {*parts} == {"deploy_edges.yml"} else "artifacts.yml"
        assert builds in parts[: min(parts.index(one) for one in installing & {*parts})], name


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        (
            "edge1: {stickyring_node_port: 9002}",
            ["edge1: port 9002 is used by instance edge1-1 and by listener sticky."],
        ),
        (
            "node1: , node2: ",
            ["node1: stickyring_address is not set, or refers to a variable that is not", "node2: stickyring_address"],
        ),
        (
            '"chat 1": {ansible_host: 192.0.2.9}, "a@b": {ansible_host: "::2"}, "2001:db8::1": {ansible_host: "::3"}',
            [
                "stickyring_node_name 'chat 1' may contain only letters, digits and . _ -: rename the host",
                "stickyring_node_name 'a@b' may contain only letters",
                "stickyring_node_name '2001:db8::1' may contain only letters",
            ],
        ),
    ],
    ids=["beside an edge", "bare", "names"],
)
def test_a_node_that_cannot_serve_is_refused(tmp_path: Path, nodes: str, words: list[str]) -> None:
    status, said = run(tmp_path, "playbooks/preflight.yml", nodes=nodes)
    assert status != 0
    assert all(one in said for one in words), said


PASSWORD = "at-least-sixteen-characters"


@pytest.mark.parametrize(
    ("hosts", "settings", "words"),
    [
        (["bus1"], {"password": None}, "bus1: stickyring_bus_password: give one of at least 16 characters"),
        (["bus1", "bus2"], {}, "stickyring_bus_peers: 192.0.2.20, 192.0.2.21 are 2. Give the addresses of one host"),
        (["bus1"], {"memory": 64}, "stickyring_bus_memory"),
    ],
)
def test_a_bus_that_cannot_serve_is_refused(
    tmp_path: Path, hosts: list[str], settings: dict[str, object], words: str
) -> None:
    (tmp_path / "bus").mkdir()
    addresses = {name: {"ansible_host": f"192.0.2.{20 + number}"} for number, name in enumerate(hosts)}
    given = {f"stickyring_bus_{name}": value for name, value in ({"password": PASSWORD} | settings).items() if value}
    (tmp_path / "bus" / "hosts.json").write_text(json.dumps({"bus": {"hosts": addresses}, "all": {"vars": given}}))
    status, said = run(tmp_path, "playbooks/preflight.yml", "-i", str(tmp_path / "bus" / "hosts.json"))
    assert status != 0
    assert words in said


def test_a_firewall_with_a_mistake_is_refused(tmp_path: Path) -> None:
    """Only where it is on."""
    wrong = ("-e", "{stickyring_firewall_admitted: [monitor1]}")
    assert run(tmp_path, "playbooks/preflight.yml", *wrong)[0] == 0
    status, said = run(tmp_path, "playbooks/preflight.yml", *wrong, "-e", "stickyring_firewall=true")
    assert status != 0
    assert "stickyring_firewall_admitted: monitor1 is no address and no network" in said
    assert "Nothing was changed." in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "Name the host to remove with -e stickyring_bus=NAME, one of bus1."),
        (["-e", "stickyring_bus=bus9"], "bus9 is not in the group `bus`, which has bus1."),
        (["-e", "stickyring_bus=bus1"], "use this bus, which has no other host."),
    ],
)
def test_a_host_of_the_bus_that_is_needed_is_not_removed(tmp_path: Path, given: list[str], words: str) -> None:
    bus = {"hosts": {"bus1": {"ansible_host": "192.0.2.20"}}, "vars": {"stickyring_bus_password": PASSWORD}}
    (tmp_path / "hosts.json").write_text(json.dumps({"bus": bus}))
    status, said = run(tmp_path, "playbooks/remove_bus.yml", "-i", str(tmp_path / "hosts.json"), *given)
    assert status != 0
    assert words in said


def test_a_description_has_no_secrets_and_no_logins(tmp_path: Path) -> None:
    secrets = {
        "stickyring_bus_password": "hush-4",
        "stickyring_bus_replication_password": "hush-6",
        "stickyring_monitor_alertmanager": {"url": "hush-7"},
        "stickyring_node_bus_url": "hush-5",
        "stickyring_node_secrets": {"KEY": "hush-1"},
        "stickyring_probe_auth": {"token": "hush-2"},
        "stickyring_probe_headers": ["authorization: hush-3"],
    }
    # The checksum is given because no binary is fetched here.
    given = secrets | {"stickyring_directory": str(tmp_path), "stickyring_edge_envoy_sha256": "0" * 64}
    status, said = run(tmp_path, "playbooks/describe.yml", "--diff", "-e", json.dumps(given))
    assert status == 0, said
    described = (tmp_path / "node2.json").read_text()
    assert "stickyring_node_application" in described
    assert "hush" not in described + said


def test_where_no_ring_moves_the_users_of_a_node_its_removal_is_told(tmp_path: Path) -> None:
    clusters = [{"name": "nodes", "lb_policy": "ROUND_ROBIN", "endpoints": []}]
    given = {"stickyring_node": "node2", "stickyring_node_instances": 2, "stickyring_edge_clusters": clusters}
    status, said = run(tmp_path, "playbooks/remove_node.yml", "-e", json.dumps(given))
    assert status == 2, said
    assert "systemctl disable --now stickyring-node@1 stickyring-node@2" in said


@pytest.mark.parametrize("settings", ["", "[defaults]\ninterpreter_python = /usr/bin/python3\n"], ids=["ours", "own"])
def test_an_inventory_overrides_what_is_composed_whatever_the_settings(tmp_path: Path, settings: str) -> None:
    """Even in `all: vars:`, which has the lowest precedence in an inventory. Host names keep their case."""
    other = tmp_path / "other.cfg"
    other.write_text(settings or (PROJECT / "ansible.cfg").read_text())
    # The checksum is given because no binary is fetched here.
    given = {"stickyring_directory": str(tmp_path), "stickyring_edge_envoy_sha256": "0" * 64}
    status, said = run(tmp_path, "playbooks/describe.yml", "-e", json.dumps(given), settings=other)
    assert status == 0, said
    found = json.loads((tmp_path / "Node1.Example.COM.json").read_text())["variables"]
    assert found["stickyring_node_application"] == "chat:app"
    # The control: what the inventory does not set is composed.
    assert found["stickyring_node_edges"] == ["192.0.2.1"]
    assert [one["name"] for one in found["stickyring_endpoints"]] == ["Node1.Example.COM-1", "node2-1"]


def test_ssh_takes_passwords_ports_and_bastions(tmp_path: Path) -> None:
    """`ssh -G` prints the effective settings of what Ansible passes to it."""
    client = tmp_path / "ssh"
    client.write_text('#!/bin/sh\nexec /usr/bin/ssh -G -F none "$@"\n')
    client.chmod(0o755)
    nodes = """
        keys: {}, password: {ansible_password: secret},
        bastion: {ansible_port: 2222, ansible_ssh_common_args: -o ProxyJump=admin@bastion.example.com}
    """
    file = {"content": "{{ said.stdout }}", "dest": f"{tmp_path}/{{{{ inventory_hostname }}}}"}
    tasks = [
        {"ansible.builtin.raw": "true", "register": "said"},
        {"ansible.builtin.copy": file, "delegate_to": "localhost", "vars": {"ansible_connection": "local"}},
    ]
    (tmp_path / "ask.yml").write_text(yaml.safe_dump([{"hosts": "nodes", "gather_facts": False, "tasks": tasks}]))
    status, said = run(tmp_path, tmp_path / "ask.yml", "-e", f"ansible_ssh_executable={client}", nodes=nodes)
    assert status == 0, said
    effective = {name: (tmp_path / name).read_text().splitlines() for name in ("keys", "password", "bastion")}
    for lines in effective.values():
        assert "preferredauthentications publickey,gssapi-with-mic,keyboard-interactive,password" in lines
    # ssh must not prompt for a password that the run does not show.
    assert "passwordauthentication no" in effective["keys"]
    assert {"passwordauthentication yes", "kbdinteractiveauthentication yes"} <= set(effective["password"])
    assert {"port 2222", "proxyjump admin@bastion.example.com", "serveraliveinterval 5"} <= set(effective["bastion"])


def test_all_faults_of_the_variables_are_reported_at_once(tmp_path: Path) -> None:
    given = ("stickyring_node_watchdog=1", "stickyring_node_drain_timeout=-1", "stickyring_node_service=")
    status, said = run(tmp_path, "playbooks/verify.yml", *(word for one in given for word in ("-e", one)))
    assert status != 0
    assert all(one.split("=")[0] in said for one in given)
    assert "Read the ring" not in said


def test_a_plan_to_remove_an_unknown_node_is_refused(tmp_path: Path) -> None:
    """Names are compared with their case."""
    status, said = run(tmp_path, "playbooks/plan.yml", "-e", "stickyring_node=node1.example.com")
    assert status != 0
    assert "node1.example.com is not in the group `nodes`, which has Node1.Example.COM, node2." in said
    assert "Fetch Envoy" not in said


def test_a_node_is_not_removed_from_a_cluster_without_a_ring(tmp_path: Path) -> None:
    clusters = [{"name": "nodes", "lb_policy": "ROUND_ROBIN", "endpoints": []}]
    given = ["-e", "stickyring_node=node2", "-e", json.dumps({"stickyring_edge_clusters": clusters})]
    status, said = run(tmp_path, "playbooks/remove_node.yml", *given)
    assert status != 0
    assert "The cluster nodes has lb_policy ROUND_ROBIN" in said
    assert "Delete the line of node2 from the group `nodes`, run site.yml" in said
    assert "Check the inventory" not in said


@pytest.mark.parametrize(
    ("given", "edges", "reason"),
    [
        ([], TWO_EDGES, "Name the edge to drain with -e stickyring_edge=NAME, one of edge1, edge2."),
        (["-e", "stickyring_edge=node2"], TWO_EDGES, "stickyring_edge=NAME, one of edge1, edge2."),
        (["-e", "stickyring_edge=edge1"], EDGE, "edge1 is the only edge: its users could connect to no other."),
        (["-e", "stickyring_edge=edge1", "--limit", "edge1,nodes"], TWO_EDGES, "run it without --limit"),
    ],
    ids=["none", "no edge", "the only one", "limited"],
)
def test_an_edge_is_not_drained_without_another_one(tmp_path: Path, given: list[str], edges: str, reason: str) -> None:
    status, said = run(tmp_path, "playbooks/drain_edge.yml", *given, edges=edges)
    assert status != 0
    assert reason in said
    assert "Check the inventory" not in said


def test_a_removal_by_the_role_refuses_names_of_other_services(tmp_path: Path) -> None:
    """It runs in check mode, so nothing is removed if a refusal is missing; /etc/apt belongs to Debian."""
    services = {"empty": "", "path": "../tmp", "apt": "apt"}
    nodes = ", ".join(
        f'{name}: {{ansible_connection: local, stickyring_node_service: "{one}"}}' for name, one in services.items()
    )
    tasks = [{"ansible.builtin.import_role": {"name": "stickyring.fleet.stickyring_node", "tasks_from": "remove"}}]
    (tmp_path / "remove.yml").write_text(yaml.safe_dump([{"hosts": "nodes", "gather_facts": False, "tasks": tasks}]))
    status, said = run(tmp_path, tmp_path / "remove.yml", "--check", nodes=nodes)
    assert status != 0
    assert "empty: stickyring_node_service '' also names a user" in said
    assert "path: stickyring_node_service '../tmp' also names a user" in said
    assert "/etc/apt was not made by this role: correct stickyring_node_service" in said
    assert "Stop them" not in said
