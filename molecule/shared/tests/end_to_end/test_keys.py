"""The hashed key is the same in Envoy, in the ring computed outside Envoy, on the node and in whereis."""

import json
from typing import Any
from urllib.request import Request, urlopen

import pytest

# The text in the URL, and the key that results.
KEYS = {"plain": "plain", "a%20b": "a b", "a+b": "a+b", "caf%C3%A9": "café", "a%26b%3Dc": "a&b=c"}


def handshake(url: str, query: str, headers: dict[str, str] | None = None) -> str:
    """Opens a polling session; returns the node that answered."""
    request = Request(f"{url}/socket.io/?EIO=4&transport=polling{query}", headers=headers or {})
    with urlopen(request, timeout=5) as answer:
        return answer.headers["x-served-by"]


@pytest.fixture
def sessions(machine: Any, nodes: Any) -> Any:
    """The keys of the sessions on an instance."""

    def ask(endpoint: str) -> list[str | None]:
        host, _, instance = endpoint.rpartition("-")
        service = nodes[0].variables["stickyring_node_service"]
        answer = machine(host).check_output(
            f"/opt/{service}/current/bin/stickyring sessions --control /run/{service}/{instance}/control.sock"
        )
        return [session["key"] for session in json.loads(answer)["sessions"]]

    return ask


@pytest.mark.parametrize("written", KEYS)
def test_the_node_knows_the_key_decoded(written: str, edge_url: Any, sessions: Any) -> None:
    node = handshake(edge_url("sticky"), f"&client_id={written}")
    assert KEYS[written] in sessions(node)


def test_ring_and_whereis_agree_about_a_key(edge_url: Any, ansible: Any, inventory: Any) -> None:
    nodes = {handshake(edge_url("sticky"), f"&client_id={written}") for written in ("m%40x.y", "m@x.y", "%6D%40x.y")}
    assert len(nodes) == 1
    [node] = nodes
    said = ansible("stickyring", "whereis", "m@x.y", "--live", "--inventory", inventory).stdout
    assert said.splitlines()[0] == f"m@x.y is assigned to {node}"
    assert said.count(f"  {node}: polling") == 3


def test_a_key_header_of_a_client_is_ignored(edge_url: Any, sessions: Any) -> None:
    node = handshake(edge_url("sticky"), "&client_id=honest", {"x-stickyring-key": "forged"})
    assert "honest" in sessions(node)
    assert "forged" not in sessions(node)
    node = handshake(edge_url("unkeyed"), "", {"x-stickyring-key": "forged"})
    assert "forged" not in sessions(node)
    assert None in sessions(node)
