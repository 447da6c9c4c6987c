"""Another team's application, deployed with variables only beside the echo service, from wheels and from an index."""

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import socketio
import yaml

PROJECT = Path(__file__).parents[4]


def test_its_pages_are_served_through_the_edge(edge_url: Any) -> None:
    with urlopen(edge_url("guestbook") + "/health", timeout=5) as answer:
        assert answer.read() == b"well\n"
        assert answer.headers["x-served-by"] == "guestbook-1"
    with pytest.raises(HTTPError) as refused:
        urlopen(edge_url("guestbook") + "/index2.html", timeout=5)
    assert refused.value.code == 404, "the echo service answers instead"


async def sign(url: str, name: str) -> tuple[int, str]:
    """Signs as a user; returns the acknowledged count and the name that all clients get."""
    client = socketio.AsyncClient(reconnection=False)
    signed: asyncio.Queue[str] = asyncio.Queue()
    client.on("signed", signed.put)
    await client.connect(f"{url}?client_id={name}", wait_timeout=10)
    count = await client.call("sign", name, timeout=10)
    answer = await asyncio.wait_for(signed.get(), 10)
    await client.disconnect()
    return count, answer


def test_its_own_events_work(edge_url: Any) -> None:
    count, answer = asyncio.run(sign(edge_url("guestbook"), "ada"))
    assert count >= 1
    assert answer == "ada"
    with urlopen(edge_url("guestbook") + "/", timeout=5) as page:
        assert "ada" in page.read().decode().splitlines()


def test_it_lives_beside_the_first_application(machine: Any) -> None:
    units = ("chat@1.service", "chat@2.service", "guestbook@1.service")
    node = machine("node2")
    users = {unit: node.check_output(f"systemctl show {unit} --property=User --value") for unit in units}
    assert all(node.service(unit).is_running for unit in units)
    assert users == {"chat@1.service": "chat", "chat@2.service": "chat", "guestbook@1.service": "guestbook"}
    assert not machine("node1").service("guestbook@1.service").is_running


def test_the_nodes_were_installed_from_the_index(machine: Any, nodes: Any) -> None:
    log = machine("edge1").check_output("journalctl --unit index --output cat --no-pager")
    for node in nodes:
        fetched = [line for line in log.splitlines() if line.startswith(node.variables["stickyring_address"] + " ")]
        assert any("GET /stickyring/stickyring-" in line for line in fetched), (
            f"{node.name} took no wheel from the index"
        )


def test_it_takes_the_place_of_the_echo_service(inventory: Any, ansible: Any, edge_url: Any, tmp_path: Path) -> None:
    """The last test, because it changes the deployment: locked and deployed as the README says."""
    section = (PROJECT / "README.md").read_text().split("## Your application on your machines")[1]
    told = yaml.safe_load(re.search(r"```yaml\n(# group_vars/all.yml.*?)```", section, re.S)[1])
    project = tmp_path / "guestbook"
    shutil.copytree(PROJECT / "molecule" / "shared" / "other_application", project)
    subprocess.run(["make", "lock", f"PROJECT={project}"], cwd=PROJECT, check=True)
    assert told["stickyring_artifacts_projects"][0] == "{{ stickyring_project }}/app"
    settings = {
        "stickyring_artifacts_projects": [told["stickyring_artifacts_projects"][0], str(project)],
        "stickyring_artifacts_lock": str(project / "requirements.lock"),
        "stickyring_node_application": "guestbook:application",
        "stickyring_node_environment": {"GUESTBOOK_TITLE": "Visitors"},
        "stickyring_probe_options": told["stickyring_probe_options"],
    }
    assert settings.keys() == told.keys()
    assert settings["stickyring_probe_options"] == ["--no-echo"]

    # The inventory of this scenario has an index instead of the wheelhouse.
    wheelhouse = "stickyring_node_wheelhouse={{ stickyring_artifacts_directory }}/wheelhouse.tar"
    # And an ASGI application.
    others = {"stickyring_node_proving_time": 0, "stickyring_node_worker_class": "eventlet"}
    options = ["-e", json.dumps(settings), "-e", wheelhouse, "-e", json.dumps(others)]
    ansible("ansible-playbook", "-i", inventory, "site.yml", *options)

    assert asyncio.run(sign(edge_url("sticky"), "grace")) == (1, "grace")
    with urlopen(edge_url("sticky") + "/?client_id=grace", timeout=5) as page:
        assert page.read().decode().splitlines() == ["Visitors", "grace"]
