"""The control socket of a real node, and the commands that use it."""

import json
import mmap
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import DEADLINE_SECONDS, STICKYRING, ServeProcess, serving, wait_until
from prometheus_client import CollectorRegistry

from stickyring.cli import main
from stickyring.node import operate
from stickyring.node.control import Control, Refusal
from stickyring.node.drain import Drain
from stickyring.node.metrics import MoveMetrics
from stickyring.node.takeover import Incumbent
from stickyring.ring import Ring

RING = {
    "cluster": "nodes",
    "policy": "RING_HASH",
    "minimum_size": 100,
    "maximum_size": 8388608,
    "members": [{"name": "node1-1", "weight": 1}],
}
ELSEWHERE = {**RING, "members": [{"name": "node2-1", "weight": 1}]}
PLAIN = """
def application(environ, start_response):
    start_response("200 OK", [])
    return [b"plain"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    Path(folder, "socket.io.min.js").touch()
    return folder


@pytest.fixture(scope="module")
def node(folder: Path) -> Iterator[ServeProcess]:
    with serving(folder, "stickyring.echo:create_application('.')", "--control", "control") as node:
        yield node


def ask(path: Path, method: str, target: str, body: str = "", length: int | None = None) -> tuple[int, dict[str, Any]]:
    """Send one request as plain bytes; return the status and the answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(path))
        size = len(body) if length is None else length
        connection.sendall(f"{method} {target} HTTP/1.1\r\nContent-Length: {size}\r\n\r\n{body}".encode())
        with connection.makefile("rb") as answer:
            status = int(answer.readline().split()[1])
            return status, json.loads(answer.read().partition(b"\r\n\r\n")[2])


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def connect(node: ServeProcess, key: str | None, cluster: str | None = None, request_id: str | None = None) -> str:
    headers = {"x-stickyring-key": key, "x-stickyring-cluster": cluster, "x-request-id": request_id}
    # On the wire, the edge's key is UTF-8, which http.client does not encode.
    said = {name: value.encode().decode("latin-1") for name, value in headers.items() if value is not None}
    answer = node.get("/socket.io/?EIO=4&transport=polling", said)
    return str(json.loads(answer.read()[1:])["sid"])


def close(node: ServeProcess, sid: str) -> None:
    assert node.get(f"/socket.io/?EIO=4&transport=polling&sid={sid}", method="POST", body="1").read() == b"ok"


def test_sessions_lists_the_open_sessions(node: ServeProcess, folder: Path) -> None:
    sids = [connect(node, "alice", "nodes"), *(connect(node, key) for key in ("alice", "a%20b&c", None, "café"))]
    listed = invoke("sessions", "--control", folder / "control")
    assert listed.exit_code == 0
    found = json.loads(listed.stdout)
    assert found["node"] == "node1-1"
    assert [session["key"] for session in found["sessions"]] == ["alice", "alice", "a%20b&c", None, "café"]
    assert [session["cluster"] for session in found["sessions"]] == ["nodes", None, None, None, None]
    assert {session["transport"] for session in found["sessions"]} == {"polling"}
    assert {session["kept"] for session in found["sessions"]} == {False}
    assert all(0 <= session["seconds"] < DEADLINE_SECONDS for session in found["sessions"])
    for key, count in (("alice", 2), ("a%20b&c", 1), ("café", 1), ("a b&c", 0)):
        one = json.loads(invoke("sessions", "--control", folder / "control", "--key", key).stdout)
        assert [session["key"] for session in one["sessions"]] == [key] * count
    for sid in sids:
        close(node, sid)
    assert json.loads(invoke("sessions", "--control", folder / "control").stdout)["sessions"] == []


@pytest.mark.parametrize(
    ("method", "target", "body", "status", "error"),
    [
        ("GET", "/", "", 404, "there is no GET /"),
        ("POST", "/sessions", "", 404, "there is no POST /sessions"),
        ("POST", "/rebalance", "{", 400, "not JSON"),
        ("POST", "/rebalance", "[]", 400, "an object with ring"),
        ("POST", "/rebalance", json.dumps({"ring": RING, "speed": 1}), 400, "an object with ring"),
        ("POST", "/rebalance", json.dumps({"ring": {**RING, "members": []}}), 400, "invalid ring: members"),
        ("POST", "/rebalance", json.dumps({"ring": RING, "rate": 0}), 400, "rate: 0 is not"),
        ("POST", "/rebalance", json.dumps({"ring": RING, "rate": "fast"}), 400, "rate: 'fast' is not"),
        ("POST", "/rebalance", json.dumps({"ring": RING, "rate": True}), 400, "rate: True is not"),
    ],
)
def test_an_invalid_request_is_refused(
    node: ServeProcess, folder: Path, method: str, target: str, body: str, status: int, error: str
) -> None:
    answered, answer = ask(folder / "control", method, target, body)
    assert answered == status
    assert error in answer["error"]


def test_a_session_and_its_lines_in_the_log_have_the_edges_request_id(
    serve: Callable[..., ServeProcess], tmp_path: Path
) -> None:
    (tmp_path / "socket.io.min.js").touch()
    node = serve("stickyring.echo:create_application('.')", "--control", "control", "--log-level", "debug")
    sids = [connect(node, "alice", request_id=given) for given in ("of alice's handshake", "x" * 1000, None)]
    _, found = ask(tmp_path / "control", "GET", "/sessions")
    names = ["of alice's handshake", "x" * 128, ""]
    assert [session["request_id"] for session in found["sessions"]] == names
    for sid in sids:
        close(node, sid)
    wait_until(lambda: len(node.logged("disconnected")) == 3, "their ends are logged")
    for message in ("connected", "disconnected"):
        lines = [line for line in node.log() if line["message"] == message]
        assert {line["sid"]: line["request_id"] for line in lines} == dict(zip(sids, names, strict=True))


def test_before_the_first_rebalance_none_runs(serve: Callable[..., ServeProcess], tmp_path: Path) -> None:
    (tmp_path / "socket.io.min.js").touch()
    serve("stickyring.echo:create_application('.')", "--control", "control")
    assert ask(tmp_path / "control", "GET", "/rebalance") == (200, {"running": False})


def test_a_bad_request_does_not_affect_others(node: ServeProcess, folder: Path) -> None:
    control = folder / "control"
    assert ask(control, "POST", "/rebalance", length=10**9)[0] == 413
    assert ask(control, "POST", "/rebalance", "[" * 100_000)[0] in {400, 500}  # deeper than Python goes
    with socket.socket(socket.AF_UNIX) as mute, socket.socket(socket.AF_UNIX) as rude:
        mute.connect(str(control))
        rude.connect(str(control))
        rude.sendall(b"\x16\x03\x01 what\r\n\r\n")
        assert ask(control, "GET", "/sessions")[0] == 200
        assert node.get("/healthz").status == 200


def test_a_rebalance_without_moved_users(node: ServeProcess, folder: Path) -> None:
    sid = connect(node, "alice")
    Path(folder, "ring.json").write_text(json.dumps(RING))
    done = invoke("rebalance", "--control", folder / "control", "--ring", folder / "ring.json", "--rate", "20")
    assert done.exit_code == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert numbers.pop("seconds") < 1
    expected = {"to_move": 0, "staying": 1, "without_key": 0, "asked": 0, "left": 0, "returned": 0}
    expected |= {"users_asked": 0, "users_returned": 0}
    assert numbers == {"rate": 20, **expected}
    status, answer = ask(folder / "control", "POST", "/rebalance", json.dumps({"ring": RING}))
    assert (status, answer["running"]) == (202, False), "the command need not poll"
    close(node, sid)


def test_a_rebalance_affects_only_sessions_of_its_cluster(node: ServeProcess, folder: Path) -> None:
    connect(node, "alice", "nodes")
    connect(node, "bob")
    others = [connect(node, "alice", "first_node"), connect(node, None, "first_node")]
    Path(folder, "ring.json").write_text(json.dumps(ELSEWHERE))
    done = invoke("rebalance", "--control", folder / "control", "--ring", folder / "ring.json")
    assert done.exit_code == 0, done.stderr
    expected = {"to_move": 2, "staying": 2, "without_key": 0, "asked": 2, "left": 2, "returned": 0}
    expected |= {"users_asked": 2, "users_returned": 0}
    assert expected.items() <= json.loads(done.stdout).items()
    left = json.loads(invoke("sessions", "--control", folder / "control").stdout)["sessions"]
    assert [(session["key"], session["cluster"]) for session in left] == [("alice", "first_node"), (None, "first_node")]
    for sid in others:
        close(node, sid)


def test_one_rebalance_at_a_time(node: ServeProcess, folder: Path) -> None:
    connect(node, "alice")
    assert ask(folder / "control", "POST", "/rebalance", json.dumps({"ring": ELSEWHERE}))[0] == 202
    Path(folder, "ring.json").write_text(json.dumps(RING))
    refused = ask(folder / "control", "POST", "/rebalance", json.dumps({"ring": RING}))
    assert refused == (409, {"error": "a rebalance is running"})
    before = node.metric("stickyring_rebalances_total")
    # The command waits for the running one, then starts its own.
    done = invoke("rebalance", "--control", folder / "control", "--ring", folder / "ring.json", "--rate", "30")
    assert done.exit_code == 0, done.stderr
    assert {"rate": 30, "to_move": 0, "returned": 0}.items() <= json.loads(done.stdout).items()
    assert done.stderr == "", "progress is for terminals"
    assert node.metric("stickyring_rebalances_total") == before + 1
    assert node.logged("rebalanced: 1 sessions left"), "the first one finished"


@pytest.mark.parametrize("waiting", [False, True], ids=["for its own", "for another"])
def test_a_restart_during_a_rebalance_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: bool
) -> None:
    ring = tmp_path / "ring.json"
    ring.write_text(json.dumps(RING))

    def answer(path: Path, method: str, target: str, body: object = None) -> dict[str, Any]:
        if method == "GET":
            return {"running": False}
        if waiting:
            raise operate.Refused(409, "a rebalance is running")
        return {"running": True, "to_move": 5, "asked": 0}

    monkeypatch.setattr(operate, "ask", answer)
    result = invoke("rebalance", "--control", tmp_path / "control", "--ring", ring)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("Error: the node was restarted")
    assert "Traceback" not in result.stderr


def test_an_equal_ring_is_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    load = Ring.load

    def counting_load(document: dict[str, Any]) -> Ring:
        made.append(document)
        return load(document)

    monkeypatch.setattr(Ring, "load", counting_load)
    metrics = MoveMetrics(CollectorRegistry())
    drain = Drain({}, set(), metrics)
    control = Control("node1-1", {}, metrics, drain, Incumbent(None, drain, mmap.mmap(-1, 1)))

    def start(ring: object) -> None:
        control.answer("POST", "/rebalance", json.dumps({"ring": ring}).encode())
        wait_until(lambda: not control.answer("GET", "/rebalance", b"")[1]["running"], "the rebalance has ended")

    start(RING)
    start(dict(reversed(RING.items())))
    assert made == [RING]
    start(ELSEWHERE)
    assert made == [RING, ELSEWHERE]
    # In Python true equals 1, but not in a ring. And an invalid ring does not replace the cached one.
    with pytest.raises(Refusal, match="weight: True"):
        start({**ELSEWHERE, "members": [{"name": "node2-1", "weight": True}]})
    start(ELSEWHERE)
    assert len(made) == 3


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["sessions"], "Missing option '--control' (env var: 'STICKYRING_CONTROL')"),
        (["sessions", "--control", "absent"], "no control socket absent: does the node run"),
        (["sessions", "--control", "file"], "no process serves the control socket file"),
        (["sessions", "--control", "dead"], "no process serves the control socket dead: the node does not run"),
        (["rebalance", "--control", "absent"], "Missing option '--ring'"),
        (["rebalance", "--control", "absent", "--ring", "absent"], "'absent': No such file or directory"),
        (["rebalance", "--control", "absent", "--ring", "file"], "file is not JSON"),
        (["rebalance", "--control", "absent", "--ring", "ring", "--rate", "0"], "0.0 is not in the range x>0"),
    ],
)
def test_an_error_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], cause: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("text")
    Path("ring").write_text(json.dumps(RING))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind("dead")
    result = invoke(*arguments)
    assert result.exit_code in {1, 2}
    assert cause in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not result.stdout


def test_a_refusal_by_the_node_is_one_line(node: ServeProcess, folder: Path) -> None:
    Path(folder, "other.json").write_text('{"policy": "ROUND_ROBIN"}')
    result = invoke("rebalance", "--control", folder / "control", "--ring", folder / "other.json")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: the node refuses: invalid ring: policy: 'ROUND_ROBIN'")
    assert len(result.stderr.splitlines()) == 1


def test_help_shows_examples() -> None:
    for command in ("sessions", "rebalance"):
        assert f"stickyring {command} --control /run/" in invoke(command, "--help").stdout


@pytest.mark.eventlet
def test_the_socket_is_private_and_removed_with_the_node(serve: Callable[..., ServeProcess], tmp_path: Path) -> None:
    Path(tmp_path, "plain.py").write_text(PLAIN)
    control = tmp_path / "control"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(control))
    # The socket of a killed process is replaced. Any application and worker class works.
    node = serve("plain:application", "--worker-class", "gthread", "--control", str(control))
    assert control.stat().st_mode & 0o777 == 0o600
    assert json.loads(invoke("sessions", "--control", control).stdout) == {
        "node": "node1-1",
        "release": "",
        "sessions": [],
    }
    assert refusal(tmp_path, "control").endswith("control: another process serves it\n")
    assert control.is_socket(), "the refused process must not remove it"
    assert node.stop() == 0
    assert not control.exists()


def test_a_control_socket_that_cannot_be_created_is_one_line(tmp_path: Path) -> None:
    Path(tmp_path, "file").touch()
    assert refusal(tmp_path, "file").endswith("file: the file exists and is not a socket\n")
    assert Path(tmp_path, "file").exists()
    assert refusal(tmp_path, "absent/control").endswith("absent/control: No such file or directory\n")
    assert refusal(tmp_path, "a" * 200).endswith("AF_UNIX path too long\n")


def refusal(directory: Path, control: str) -> str:
    """Run a `serve` that cannot create its control socket; return the only line of its error."""
    command = [str(STICKYRING), "serve", "--listen", "127.0.0.1:0", "--control", control]
    run = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    assert run.returncode == 1
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert run.stderr.startswith(f"Error: cannot make the control socket {control}: ")
    return run.stderr


def test_summary_counts_users_beside_a_ring(node: ServeProcess, folder: Path) -> None:
    """A user without a key is on no ring, a user of another cluster does not count, and an empty ring has no owner."""
    users = [("alice", "nodes"), ("alice", "nodes"), ("bob", None), (None, None), ("carol", "first_node")]
    sids = [connect(node, key, cluster) for key, cluster in users]
    counted = {}
    for name, document in (("here", RING), ("elsewhere", ELSEWHERE), ("none", {})):
        (folder / f"{name}.json").write_text(json.dumps(document))
        said = invoke("summary", "--ring", folder / f"{name}.json", "--control", folder / "control")
        assert said.exit_code == 0, said.output
        counted[name] = json.loads(said.output)
    assert {one["node"] for one in counted.values()} == {"node1-1"}
    assert {one["sessions"] for one in counted.values()} == {5}
    assert {name: (one["users"], one["off_ring"]) for name, one in counted.items()} == {
        "here": (3, 0),
        "elsewhere": (3, 2),
        "none": (4, 0),
    }
    assert counted["here"]["drain"]["draining"] is False
    for sid in sids:
        close(node, sid)


def test_summary_says_which_instance_does_not_answer(node: ServeProcess, folder: Path) -> None:
    (folder / "ring.json").write_text(json.dumps(RING))
    controls = ("--control", folder / "nobody", "--control", folder / "control")
    said = invoke("summary", "--ring", folder / "ring.json", *controls)
    silent, answer = map(json.loads, said.output.splitlines())
    assert (silent["control"], answer["node"]) == (str(folder / "nobody"), "node1-1")
    assert "does the node run" in silent["error"]
    (folder / "ring.json").write_text('{"cluster": "nodes"}')
    refused = invoke("summary", "--ring", folder / "ring.json", *controls)
    assert refused.exit_code == 1
    assert "ring.json is not a ring: policy: None" in refused.output
