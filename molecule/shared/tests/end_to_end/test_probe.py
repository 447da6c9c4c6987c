"""The deployment under `stickyring probe`: sticky with an id, visibly broken without one."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

POLLING = ("polling", "upgrade")
EVENNESS_LIMIT = 1.15


@pytest.fixture
def probe(programs: Path, tmp_path: Path, edge: Any) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs the probe, which trusts the edge's own certificates; returns its exit status and its figures."""
    certificates = [one["tls"]["certificate"] for one in edge.variables["stickyring_edge_listeners"] if "tls" in one]
    environment = os.environ | ({"SSL_CERT_FILE": certificates[0]} if certificates else {})

    def run(url: str, *options: str) -> tuple[int, dict[str, Any]]:
        file = tmp_path / "figures.json"
        done = subprocess.run(
            [programs / "stickyring", "probe", url, "--json", file, *options],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return done.returncode, json.loads(file.read_text())

    return run


def key_options(policies: list[dict[str, Any]]) -> list[str]:
    """How the probe sends an id to a listener whose first hash policy is `policies[0]`."""
    if "query_parameter" in policies[0]:
        return ["--key-param", policies[0]["query_parameter"]["name"]]
    return ["--key-header", policies[0]["header"]["header_name"]]


@pytest.mark.once
def test_every_session_of_five_hundred_users_is_sticky(probe: Any, edge: Any, edge_url: Any) -> None:
    status, figures = probe(edge_url("sticky"), "--ids", "500", "--connections", "3")
    assert status == 0, figures["verdict"]
    total = figures["total"]
    assert total["sessions"] == total["completed"] == 500 * 4 * 3
    assert total["invalid_session"] == total["ids_on_more_than_one_node"] == 0
    endpoints = next(one["endpoints"] for one in edge.variables["stickyring_edge_clusters"] if one["name"] == "nodes")
    assert set(total["ids_per_node"]) == {one["name"] for one in endpoints}
    assert total["busiest_over_mean_ids"] <= EVENNESS_LIMIT


def test_without_an_id_the_same_edge_splits_sessions(probe: Any, edge_url: Any) -> None:
    status, figures = probe(edge_url("sticky"), "--ids", "30", "--connections", "1", "--no-key")
    assert status == 1
    assert all(figures["transports"][transport]["invalid_session"] > 0 for transport in POLLING)


def test_an_id_does_not_help_on_a_listener_that_hashes_nothing(probe: Any, edge_url: Any) -> None:
    status, figures = probe(edge_url("unkeyed"), "--ids", "30", "--connections", "1")
    assert status == 1
    assert figures["total"]["ids_on_more_than_one_node"] > 0


def test_every_keyed_listener_is_sticky_by_its_own_key(probe: Any, edge: Any, edge_url: Any) -> None:
    common = edge.variables["stickyring_edge_hash_policies"]
    keyed = [one for one in edge.variables["stickyring_edge_listeners"] if one["cluster"] in ("nodes", "first_node")]
    keyed = [one for one in keyed if one.get("hash_policies", common)]
    assert keyed
    for listener in keyed:
        options = key_options(listener.get("hash_policies", common))
        status, figures = probe(edge_url(listener["name"]), "--ids", "30", "--connections", "2", *options)
        assert status == 0, (listener["name"], figures["verdict"])


def test_a_client_that_keeps_cookies_is_sticky_without_an_id(probe: Any, edge_url: Any) -> None:
    status, figures = probe(edge_url("sticky"), "--ids", "30", "--connections", "2", "--no-key", "--keep-cookies")
    assert status == 0, figures["verdict"]


def test_the_single_node_listener_leads_to_the_first_node_only(probe: Any, nodes: Any, edge_url: Any) -> None:
    status, figures = probe(edge_url("single"), "--ids", "30", "--connections", "1")
    assert status == 0, figures["verdict"]
    assert list(figures["total"]["ids_per_node"]) == [f"{nodes[0].name}-1"]
