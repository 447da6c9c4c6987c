"""`stickyring status`, with a fake playbook."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from stickyring.cli import main
from stickyring.tools.status import command

NODES = ("node1", "node2", "node3")


def ring(*unhealthy: str, members: tuple[str, ...] = NODES) -> dict[str, Any]:
    described = [
        {"name": f"{name}-1", "weight": 100, "health": "UNHEALTHY" if name in unhealthy else "HEALTHY"}
        for name in members
    ]
    nobody = {"name": "nobody", "weight": 1, "health": "HEALTHY"}
    sizes = {"minimum_size": 1, "maximum_size": 8388608}
    return {"cluster": "nodes", "policy": "RING_HASH", "members": [nobody, *described], **sizes}


def summary(node: str, users: int = 10, off_ring: int = 0, release: str = "r1", **drain: bool) -> dict[str, Any]:
    state = {"draining": False, "drained": False, **drain}
    line = {"node": f"{node}-1", "release": release, "sessions": 2 * users, "users": users, "off_ring": off_ring}
    return {"rc": 0, "stdout": json.dumps({**line, "drain": state}) + "\r\n"}


def well() -> dict[str, Any]:
    """What the playbook writes of a fleet in which all is well, by host."""
    nothing = {"ring": {}, "edge": "not asked", "node": {}, "bus": {}, "instances": []}
    edge = {**nothing, "groups": ["edge"], "ring": ring(), "edge": "OK (unknown bytes)"}
    nodes = {
        name: {
            **nothing,
            "groups": ["nodes"],
            "node": summary(name, users=20 if name == "node1" else 10),
            "instances": [f"{name}-1"],
        }
        for name in NODES
    }
    bus = {**nothing, "groups": ["bus"], "bus": {"rc": 0, "stdout": ""}}
    return {"edge1": edge, "edge2": edge, **nodes, "bus1": bus}


UNREACHABLE = {"unreachable": True, "msg": "Task failed: Failed to connect to the host\nvia ssh"}


@pytest.fixture
def commands() -> list[list[str]]:
    """The commands that were run."""
    return []


@pytest.fixture
def told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, commands: list[list[str]]
) -> Callable[..., Callable[..., Result]]:
    """A function that sets the playbook's answers, one after another, and returns a function that runs the command."""
    (tmp_path / "playbooks").mkdir()
    (tmp_path / "playbooks" / "status.yml").touch()
    monkeypatch.chdir(tmp_path)

    def prepare(*answers: dict[str, Any] | None) -> Callable[..., Result]:
        waiting = [*answers]

        def play(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            if not waiting:
                raise KeyboardInterrupt
            answer = waiting.pop(0)
            if answer is None:
                return subprocess.CompletedProcess(command, 4, "PLAY ***\nREASON ******\nit broke", "")
            asked = json.loads(command[command.index("--extra-vars") + 1])
            for host, said in answer.items():
                Path(asked["stickyring_directory"], host).write_text(json.dumps(said))
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", play)
        monkeypatch.setattr(command, "WATCH_SECONDS", 0)
        return lambda *options: CliRunner().invoke(main, ["status", *options])

    return prepare


def changed(host: str, **answers: object) -> dict[str, Any]:
    """The answers of a fleet in which all is well but for those of one host."""
    return well() | {host: well()[host] | answers}


def test_all_is_well(told: Any) -> None:
    result = told(well())()
    assert result.exit_code == 0
    assert "All well: 3 instances, 40 users." in result.output
    (row,) = (line.split() for line in result.output.splitlines() if "node1-1" in line)
    assert row == ["node1-1", "r1", "40", "20", "50.0%", "33.3%", "0", "serves", "2", "of", "2"]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (changed("node2", node=UNREACHABLE), "node2: Failed to connect to the host via ssh."),
        (changed("node2", node={"rc": 0, "stdout": ""}), "node2: does not run."),
        (changed("node2", node={"rc": 1, "stderr": "no stickyring."}), "node2: no stickyring."),
        (
            changed("node2", node={"rc": 2, "stderr": "Error: No such command 'summary'."}),
            "node2: its release is older than `stickyring status`; run site.yml.",
        ),
        (changed("edge2", ring={}, edge="timed out"), "edge2: timed out."),
        (changed("edge2", ring={}), "edge2: serves no ring."),
        (changed("edge2", ring=ring(members=NODES[:2])), "The edges do not serve the same ring: "),
        (changed("edge2", ring=ring(members=NODES[:2])), "node3-1: not on the ring of edge2. Run site.yml."),
        (
            changed("edge2", ring=ring(members=(*NODES, "node4"))),
            "node4-1: on the ring of edge2, but not in the inventory.",
        ),
        (changed("edge2", ring=ring("node3")), "node3-1: not healthy for edge2."),
        (changed("node1", node=summary("node1", draining=True)), "node1-1 drains: it takes no new users."),
        (changed("node1", node=summary("node1", draining=True, drained=True)), "node1-1 is drained: it takes"),
        (
            changed("node1", node=summary("node1", off_ring=3)),
            "Users are not on their assigned node: 3 on node1-1. Run playbooks/rebalance.yml.",
        ),
        (changed("node1", node=summary("node1", release="r2")), "the same release: r2 on 1, r1 on 2."),
        (
            changed("bus1", bus={"rc": 0, "stdout": "stickyring-bus is failed\n"}),
            "bus1: stickyring-bus is failed.",
        ),
    ],
)
def test_what_is_wrong_is_named_and_the_status_is_1(told: Any, answers: dict[str, Any], words: str) -> None:
    result = told(answers)("--json")
    assert result.exit_code == 1
    assert words in " ".join(json.loads(result.output)["problems"])
    table = told(answers)()
    assert table.exit_code == 1
    assert words in " ".join(table.output.split())
    assert "All well" not in table.output


def test_an_unhealthy_member_does_not_change_the_digest(told: Any) -> None:
    """Another weight does."""
    healthy = json.loads(told(well())("--json").output)
    assert len({edge["ring"] for edge in healthy["edges"]}) == 1
    unhealthy = json.loads(told(changed("edge2", ring=ring("node3")))("--json").output)
    assert {edge["ring"] for edge in unhealthy["edges"]} == {edge["ring"] for edge in healthy["edges"]}
    heavier = ring()
    heavier["members"][1]["weight"] = 200
    other = json.loads(told(changed("edge2", ring=heavier))("--json").output)
    assert len({edge["ring"] for edge in other["edges"]}) == 2


def test_nothing_known_is_2(told: Any) -> None:
    nothing = {
        host: {**answer, "ring": {}, "edge": "timed out", "node": UNREACHABLE} for host, answer in well().items()
    }
    assert told(nothing)().exit_code == 2
    broken = told(None)()
    assert (broken.exit_code, broken.output) == (2, "Error: playbooks/status.yml failed:\nit broke\n")


def test_options_after_two_hyphens_are_passed_to_ansible(told: Any, commands: list[list[str]]) -> None:
    assert told(well())("--", "-K").exit_code == 0
    assert commands[0][-1] == "-K"


def test_watch_keeps_the_last_answer_of_a_host_that_does_not_answer(told: Any) -> None:
    """It names it, and all is not well. Without a last answer, there is none to show."""
    silent = changed("node2", node=UNREACHABLE)
    result = told(well(), silent, None)("--watch")
    assert result.exit_code == 0
    assert "No answer now, so this is the last one: node2." in result.output
    assert "node2: Failed to connect to the host via ssh." in result.output
    assert "No answer now, so this is the last one. playbooks/status.yml failed" in result.output
    lines = [json.loads(line) for line in told(well(), silent, well())("--watch", "--json").output.splitlines()]
    assert [line["ok"] for line in lines] == [True, False, True]
    assert [line["last_answers_of"] for line in lines] == [[], ["node2"], []]
    assert [line["instances"][1]["users"] for line in lines] == [10, 10, 10]
    (first,) = (json.loads(line) for line in told(silent)("--watch", "--json").output.splitlines())
    assert first["instances"][1]["users"] is None
    assert first["last_answers_of"] == []
