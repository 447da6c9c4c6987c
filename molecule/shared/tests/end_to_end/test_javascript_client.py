"""The JavaScript client with its default options, polling then upgrade, over a hundred connections."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
IDS = [f"javascript-{number}" for number in range(20)]


def run_sessions(package: Path, url: str) -> dict[str, Any]:
    run = subprocess.run(
        ["node", HERE / "socketio_client.mjs", "--package", package, "--connections", "5", url, *IDS],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    return json.loads(run.stdout)


def test_javascript_client_is_sticky(edge_url: Callable[[str], str], javascript: Path) -> None:
    found = run_sessions(javascript, edge_url("sticky"))
    assert found["errors"] == []
    assert found["tried"] == found["completed"] == 100
    assert found["transports"] == {"websocket": 100}
    assert set(found["nodes_by_id"]) == set(IDS)
    assert {user: nodes for user, nodes in found["nodes_by_id"].items() if len(nodes) != 1} == {}
    assert len({node for nodes in found["nodes_by_id"].values() for node in nodes}) > 1, "one node holds all users"


def test_javascript_client_fails_without_a_key(edge_url: Callable[[str], str], javascript: Path) -> None:
    found = run_sessions(javascript, edge_url("unkeyed"))
    # A session completes only if three requests in a row happen to reach one node.
    assert found["completed"] < found["tried"] / 2
    assert [error for error in found["errors"] if "400" in error and "Invalid session" in error]
