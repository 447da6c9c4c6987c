"""Instances join and leave like nodes: they are on the ring only while they serve, and no user notices."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

USERS = [f"user-{number}" for number in range(24)]
ASKING_SECONDS = 0.02


@contextmanager
def asking(url: str) -> Iterator[list[int]]:
    """Sends requests for every user in turn; the list has each status that is not 200."""
    refused: list[int] = []
    asked, done = threading.Event(), threading.Event()

    def ask() -> None:
        while not done.is_set():
            for user in USERS:
                try:
                    urlopen(f"{url}/healthz?client_id={user}", timeout=5).close()
                except HTTPError as error:
                    refused.append(error.code)
                # Without a pause, it would take a whole core.
                done.wait(ASKING_SECONDS)
            asked.set()

    asker = threading.Thread(target=ask)
    asker.start()
    assert asked.wait(timeout=60)
    yield refused
    done.set()
    asker.join()


def owners(url: str) -> set[str]:
    return {urlopen(f"{url}/healthz?client_id={user}", timeout=5).headers["x-served-by"] for user in USERS}


@pytest.fixture
def passed_on(ask_envoy: Any, edge: Any) -> Callable[[], int]:
    """How many requests the edge has retried on another node because the assigned one accepted no connection."""
    counter = "stats?format=json&filter=^cluster.nodes.upstream_rq_retry$"
    return lambda: int(ask_envoy(edge, counter)["stats"][0]["value"])


def test_instances_are_taken_away_and_come_back(
    nodes: Any, machine: Any, ansible: Any, inventory: Any, edge_url: Any, passed_on: Any
) -> None:
    url = edge_url("sticky")
    before = passed_on()
    both = {f"{node.name}-{instance}" for node in nodes for instance in (1, 2)}
    assert owners(url) == both
    with asking(url) as refused:
        fewer = json.dumps({"stickyring_node_instances": 1})
        ansible("ansible-playbook", "-i", inventory, "site.yml", "-e", fewer)
    assert (refused, passed_on()) == ([], before), "an instance was stopped while the edge still sent users there"
    assert owners(url) == {f"{node.name}-1" for node in nodes}
    for node in nodes:
        service = node.variables["stickyring_node_service"]
        assert machine(node.name).service(f"{service}@1").is_running
        assert not machine(node.name).service(f"{service}@2").is_running
        assert not machine(node.name).service(f"{service}@2").is_enabled
        assert not machine(node.name).file(f"/etc/{service}/2.env").exists

    with asking(url) as refused:
        ansible("ansible-playbook", "-i", inventory, "site.yml")
    assert (refused, passed_on()) == ([], before), "an instance was on the ring before it served"
    assert owners(url) == both
