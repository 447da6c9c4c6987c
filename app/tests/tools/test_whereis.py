"""`stickyring whereis`, with a fake playbook."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from stickyring.cli import main
from stickyring.ring import Ring


def document(*names: str) -> dict[str, Any]:
    members = [{"name": name, "weight": 1} for name in names]
    sizes = {"minimum_size": 100 * len(names), "maximum_size": 8388608}
    return {"cluster": "nodes", "policy": "RING_HASH", "members": members, **sizes}


THREE = document("node1-1", "node2-1", "node3-1")
HOME = Ring.load(THREE).owner("alice")
OTHER = next(name for name in ("node1-1", "node2-1") if name != HOME)
WITHOUT_HOME = document(*(name for name in ("node1-1", "node2-1", "node3-1") if name != HOME))


def holding(node: str, *sessions: tuple[str, float]) -> dict[str, Any]:
    return {"node": node, "sessions": [{"key": "alice", "transport": how, "seconds": age} for how, age in sessions]}


@pytest.fixture
def commands() -> list[list[str]]:
    """The commands that were run."""
    return []


@pytest.fixture
def found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, commands: list[list[str]]
) -> Callable[..., Callable[..., Result]]:
    """A function that sets the playbook's result and returns a function that runs the command."""
    (tmp_path / "playbooks").mkdir()
    (tmp_path / "playbooks" / "whereis.yml").touch()
    monkeypatch.chdir(tmp_path)

    def prepare(rings: dict[str, Any], nodes: dict[str, Any] | None = None) -> Callable[..., Result]:
        def play(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            asked = json.loads(command[command.index("--extra-vars") + 1])
            assert asked["stickyring_id"] == "alice"
            folder = Path(asked["stickyring_directory"])
            for edge, ring in rings.items():
                (folder / "rings" / f"{edge}.json").write_text(json.dumps(ring))
            for host, answers in (nodes if asked["stickyring_live"] and nodes else {}).items():
                text = answers if isinstance(answers, str) else "".join(json.dumps(one) + "\n" for one in answers)
                (folder / "sessions" / host).write_text(text)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", play)
        return lambda *options: CliRunner().invoke(main, ["whereis", "alice", *options])

    return prepare


def test_the_assigned_node_comes_from_the_ring(found: Any) -> None:
    result = found({"edge1": THREE, "edge2": THREE})()
    assert (result.exit_code, result.output) == (0, f"alice is assigned to {HOME}\n")


def test_options_after_two_hyphens_are_passed_to_ansible(found: Any, commands: list[list[str]]) -> None:
    assert found({"edge1": THREE})("--live", "--", "-K", "--ssh-common-args=-o ProxyJump=bastion").exit_code == 0
    assert commands[0][-2:] == ["-K", "--ssh-common-args=-o ProxyJump=bastion"]
    # Other options are not passed: a misspelt option of ours is an error.
    assert found({"edge1": THREE})("--lvie").exit_code == 2


def test_edges_that_disagree_are_named(found: Any) -> None:
    result = found({"edge1": THREE, "edge2": WITHOUT_HOME})()
    assert result.exit_code == 1
    assert f"edge1 assigns {HOME}" in result.output
    assert "edge2 assigns" in result.output


def test_sessions_on_the_assigned_node_are_listed(found: Any) -> None:
    nodes = {"host1": [holding(HOME, ("websocket", 12.3), ("polling", 3)), holding(OTHER)]}
    nodes["host1"][0]["sessions"][1]["kept"] = True
    result = found({"edge1": THREE}, nodes)("--live")
    assert result.exit_code == 0
    assert result.output.splitlines()[1:] == [
        f"  {HOME}: websocket, open for 12 s",
        f"  {HOME}: polling, open for 3 s, kept by the bus",
    ]


def test_a_session_on_another_node_is_reported(found: Any) -> None:
    nodes = {"host1": [holding(HOME, ("polling", 3))], "host2": [holding(OTHER, ("websocket", 60))]}
    result = found({"edge1": THREE}, nodes)("--live")
    assert result.exit_code == 1
    assert f"{OTHER}: websocket, open for 60 s, not the assigned node" in result.output
    assert "1 of these sessions are not on the assigned node" in result.output


def test_a_host_that_does_not_answer_is_reported(found: Any) -> None:
    for text in ("", "\n"):
        run = found({"edge1": THREE}, {"host1": [holding(HOME, ("polling", 3))], "host2": text})
        result = run("--live")
        assert result.exit_code == 1
        assert result.output.splitlines()[1:] == [
            f"  {HOME}: polling, open for 3 s",
            "  host2: no answer",
            "sessions on host2 are not known: do the nodes run there?",
        ]
        assert run().exit_code == 0, "nobody was asked"
    silent = found({"edge1": THREE}, {"host1": [holding(HOME)], "host2": ""})("--live")
    assert silent.exit_code == 1
    assert "no session is open" not in silent.output


def test_a_session_of_another_cluster_does_not_count(found: Any) -> None:
    def live(cluster: str | None) -> Result:
        answer = holding(OTHER, ("websocket", 60))
        answer["sessions"][0]["cluster"] = cluster
        result: Result = found({"edge1": THREE}, {"host1": [answer]})("--live")
        return result

    other = live("first_node")
    assert other.exit_code == 0
    assert other.output.splitlines()[1:] == [f"  {OTHER}: websocket, open for 60 s (cluster first_node)"]
    for cluster in ("nodes", None):
        assert live(cluster).exit_code == 1
        assert f"{OTHER}: websocket, open for 60 s, not the assigned node" in live(cluster).output


def test_it_says_when_no_session_is_open(found: Any) -> None:
    result = found({"edge1": THREE}, {"host1": [holding(HOME)]})("--live")
    assert (result.exit_code, result.output.splitlines()[1]) == (0, "  no session is open")


def test_an_unknown_answer_is_an_error(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = found({"edge1": {}})
    result = run()
    assert (result.exit_code, result.output) == (2, "Error: edge1 serves no ring yet\n")
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 4, "fatal: unreachable", "")
    )
    result = run()
    assert result.exit_code == 2
    assert "playbooks/whereis.yml failed:\nfatal: unreachable" in result.output
    said = "PLAY ***\nok: many\nREASON ******\nedge1 could not be reached\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 4, said, ""))
    assert run().output == "Error: playbooks/whereis.yml failed:\nedge1 could not be reached\n"


def test_the_playbook_of_the_collection_is_used_outside_a_clone(
    found: Any, commands: list[list[str]], tmp_path: Path
) -> None:
    run = found({"edge1": THREE})
    assert run().exit_code == 0
    (tmp_path / "playbooks" / "whereis.yml").unlink()
    assert run().exit_code == 0
    assert [command[1] for command in commands] == ["playbooks/whereis.yml", "stickyring.fleet.whereis"]


def test_without_a_clone_and_the_collection_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ansible itself says that it does not find the playbook."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANSIBLE_COLLECTIONS_PATH", str(tmp_path))
    monkeypatch.delenv("ANSIBLE_CONFIG", raising=False)
    result = CliRunner().invoke(main, ["whereis", "alice"])
    assert result.exit_code == 2
    assert "the collection stickyring.fleet is not installed: run this in the clone's folder" in result.output
