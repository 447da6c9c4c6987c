"""Changes on running nodes: those that differ are updated one after another, and the others are not changed."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest

UNIT = "stickyring-node@1.service"


@pytest.fixture
def deploy(inventory: Any, ansible: Any) -> Any:
    """Runs playbooks/nodes.yml with other settings."""

    def run(*settings: str, check: bool = True) -> Any:
        settings = (*settings, "stickyring_node_proving_time=0")
        options = [word for setting in settings for word in ("-e", setting)]
        return ansible("ansible-playbook", "-i", inventory, "playbooks/nodes.yml", *options, check=check)

    return run


@pytest.fixture
def processes(machine: Any, nodes: Any) -> Any:
    """The main process of each node, by the node's name."""
    return lambda: {
        node.name: machine(node.name).check_output(f"systemctl show {UNIT} --property=MainPID --value")
        for node in nodes
    }


@contextmanager
def watched(nodes: Any) -> Iterator[set[frozenset[str]]]:
    """The sets of nodes that were down at the same time."""
    down: set[frozenset[str]] = set()
    done = threading.Event()

    def answers(node: Any) -> bool:
        try:
            with urlopen(f"http://{node.variables['stickyring_address']}:8001/healthz", timeout=1) as answer:
                return answer.status == 200
        except (URLError, ConnectionError, TimeoutError):
            return False

    def watch() -> None:
        while not done.wait(0.05):
            down.add(frozenset(node.name for node in nodes if not answers(node)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield down
    done.set()
    watcher.join()


def test_a_changed_setting_reaches_every_node_one_after_another(nodes: Any, deploy: Any, processes: Any) -> None:
    before = processes()
    with watched(nodes) as down:
        deploy("stickyring_node_log_level=warning")
    changed = processes()
    assert all(changed[name] != before[name] for name in before)
    assert {name for together in down for name in together} == set(before), "a restart was not observed"
    assert max(map(len, down)) == 1

    deploy("stickyring_share=3")
    back = processes()
    assert all(back[name] != changed[name] for name in changed)
    deploy()
    assert processes() == back


def test_manual_edits_are_reverted(machine: Any, deploy: Any, processes: Any) -> None:
    node = machine("node2")
    environment, unit = "/etc/stickyring-node/1.env", "/etc/systemd/system/stickyring-node@.service"
    edits = {
        f"cat {environment}": f"echo STICKYRING_LOG_LEVEL=debug >> {environment}",
        f"stat --format=%a {environment}": f"chmod 0644 {environment}",
        f"cat {unit}": f"sed -i /^NoNewPrivileges=/d {unit}",
        "readlink /opt/stickyring-node/current": "ln -sfn /srv /opt/stickyring-node/current",
    }
    before, running = {look: node.check_output(look) for look in edits}, processes()
    for look, edit in edits.items():
        node.check_output(edit)
        assert node.check_output(look) != before[look]
    deploy()
    assert {look: node.check_output(look) for look in edits} == before
    after = processes()
    assert [name for name in after if after[name] != running[name]] == ["node2"]


def test_a_run_that_was_killed_before_a_restart_is_completed(machine: Any, deploy: Any, processes: Any) -> None:
    file = "/etc/stickyring-node/1.env"
    # Such a run leaves a process that was started from another environment.
    machine("node2").check_output(
        f"cp -p {file} /root && sed -i '/^STICKYRING_ENVIRONMENT=/s/=.*/=0/' {file} && systemctl restart {UNIT}"
        f" && mv /root/1.env {file}"
    )
    # A file time in the future is no reason to restart.
    machine("node3").check_output(f"touch --date=tomorrow {file} /etc/systemd/system/stickyring-node@.service")
    machine("node3").check_output("systemctl daemon-reload")
    before = processes()
    deploy()
    after = processes()
    assert [name for name in after if after[name] != before[name]] == ["node2"]


def test_a_failed_restart_is_not_repeated_on_the_next_node(nodes: Any, deploy: Any, processes: Any) -> None:
    """The first run restarts one node, which never gets healthy; another run must stop there too."""
    never = ["stickyring_node_log_level=debug", "stickyring_node_health_path=/never", "stickyring_node_start_timeout=2"]
    before = processes()
    for _ in range(2):
        assert "did not become healthy at /never" in " ".join(deploy(*never, check=False).stdout.split())
        after = processes()
        assert [name for name in after if after[name] != before[name]] == [nodes[0].name]
    deploy()


@pytest.fixture
def everywhere(machine: Any, nodes: Any) -> Iterator[Any]:
    """Runs a systemctl verb on the instances of all nodes; starts them at the end."""

    def do(verb: str) -> None:
        for node in nodes:
            machine(node.name).check_output(f"systemctl {verb} {UNIT}")

    yield do
    do("start")


def answer(url: str) -> tuple[int, str]:
    """The status, and the server that answered."""
    try:
        with urlopen(f"{url}/healthz?client_id=somebody", timeout=5) as response:
            return response.status, response.headers["x-served-by"]
    except HTTPError as error:
        return error.code, error.headers["x-served-by"]


def wait_for(status: int, server: str, url: str) -> None:
    """Waits for an answer with this status from a server whose name matches."""
    deadline = time.monotonic() + 30
    while True:
        found = answer(url)
        if found[0] == status and re.fullmatch(server, found[1] or ""):
            return
        assert time.monotonic() < deadline, found


def test_without_any_node_the_edge_answers_503_until_one_is_back(edge_url: Any, everywhere: Any) -> None:
    url = edge_url("sticky")
    wait_for(200, "node.-1", url)
    everywhere("stop")
    wait_for(503, "nobody", url)
    everywhere("start")
    wait_for(200, "node.-1", url)
