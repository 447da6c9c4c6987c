"""`stickyring serve` as a command: settings, start, refusals, log and end."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import DEADLINE_SECONDS, STICKYRING, ServeProcess, wait_until

from stickyring.cli import main
from stickyring.node.serve import serve as serve_command

PLAIN = """
def application(environ, start_response):
    if environ["PATH_INFO"] == "/fail":
        raise LookupError("no such thing")
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"plain"]
"""


def refusal(directory: Path, *arguments: str) -> str:
    """Run a `serve` that cannot start; return the only line of its error."""
    run = subprocess.run(
        [STICKYRING, "serve", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert run.returncode != 0
    assert not run.stdout
    assert len(run.stderr.splitlines()) == 1, run.stderr
    return run.stderr


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--nope"], "No such option '--nope'"),
        (["--listen", "8001"], "'8001' is not address:port"),
        (["--listen", "127.0.0.1:65536"], "is not address:port"),
        (["--listen", "::1:8001"], "is not address:port"),
        (["--node-name", "a b"], "letters, digits"),
        (["--max-connections", "0"], "not in the range"),
        (["--log-level", "loud"], "'loud' is not one of"),
        (["a:b", "c"], "unexpected extra argument"),
    ],
)
def test_a_bad_flag_is_one_line(arguments: list[str], cause: str) -> None:
    result = CliRunner().invoke(main, ["serve", *arguments])
    assert result.exit_code == 2
    assert cause in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_help_shows_examples_and_environment() -> None:
    result = CliRunner().invoke(main, ["serve", "--help"])
    assert result.exit_code == 0
    assert "stickyring serve --listen 0.0.0.0:8001 --node-name node1-1" in result.stdout
    for name in ("LISTEN", "NODE_NAME", "WORKER_CLASS", "MAX_CONNECTIONS", "ENFORCE_LIMITS", "CONTROL", "LOG_LEVEL"):
        assert f"STICKYRING_{name}" in result.stdout


def test_settings_come_from_the_environment_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node7.example.org")
    defaults = serve_command.make_context("serve", []).params
    assert defaults == {
        "application": "stickyring.echo:create_application()",
        "address": ("127.0.0.1", 8001),
        "node_name": "node7-1",
        "worker_class": "eventlet",
        "max_connections": 10000,
        "messages_per_second": 0,
        "bytes_per_second": 0,
        "sessions_per_address": 0,
        "enforce_limits": True,
        "drain_timeout": 30,
        "control_path": None,
        "edges_path": None,
        "replace": False,
        "check": False,
        "watchdog": None,
        "log_level": "info",
    }
    monkeypatch.setenv("STICKYRING_LISTEN", "[::1]:9")
    monkeypatch.setenv("STICKYRING_INSTANCE", "2")
    monkeypatch.setenv("STICKYRING_MAX_CONNECTIONS", "7")
    found = serve_command.make_context("serve", ["--max-connections", "8"]).params
    assert found == defaults | {"address": ("::1", 9), "node_name": "node7-2", "max_connections": 8}


@pytest.mark.parametrize(
    ("application", "cause"),
    [
        ("missing:application", "No module named 'missing'"),
        ("plain:nothing", "Failed to find attribute 'nothing' in 'plain'"),
        ("broken:application", "ValueError: no database at all"),
        ("stickyring.echo:create_application('.')", "socket.io.min.js is missing: run `pip install .`"),
    ],
)
def test_an_application_that_cannot_be_loaded_ends_the_process(tmp_path: Path, application: str, cause: str) -> None:
    Path(tmp_path, "plain.py").write_text(PLAIN)
    Path(tmp_path, "broken.py").write_text('raise ValueError("no database\\nat all")\n')
    line = refusal(tmp_path, "--listen", "127.0.0.1:0", application)
    assert line.startswith(f"Error: cannot load {application}: ")
    assert cause in line


def test_an_unknown_worker_class_is_one_line(tmp_path: Path) -> None:
    line = refusal(tmp_path, "--worker-class", "stickyring.node.worker.Nothing")
    assert line.startswith("Error: no worker class stickyring.node.worker.Nothing: ")


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert refusal(tmp_path, "--listen", address) == f"Error: cannot listen on {address}: Address already in use\n"


def test_an_address_of_another_host_is_one_line(tmp_path: Path) -> None:
    assert "Cannot assign requested address" in refusal(tmp_path, "--listen", "192.0.2.1:8001")
    assert refusal(tmp_path, "--listen", "a..b:8001").startswith("Error: cannot listen on a..b:8001: ")


def test_any_wsgi_application_in_the_working_directory(serve: Callable[..., ServeProcess], tmp_path: Path) -> None:
    Path(tmp_path, "plain.py").write_text(PLAIN)
    node = serve("plain:application")
    assert node.get("/whatever").read() == b"plain"
    assert node.get("/healthz").status == 200
    assert node.get("/readyz").status == 200
    metrics = node.get("/metrics").read().decode()
    assert 'stickyring_node_info{node="node1-1"' in metrics
    assert "process_open_fds" in metrics
    assert "stickyring_connections{" not in metrics


def test_the_log_is_json_and_names_no_user(serve: Callable[..., ServeProcess], tmp_path: Path) -> None:
    Path(tmp_path, "plain.py").write_text(PLAIN)
    node = serve("plain:application")
    assert node.get("/fail?client_id=alice").status == 500
    assert [(line["level"], line["node"]) for line in node.logged("serving ")] == [("INFO", "node1-1")]
    (failure,) = node.logged("Error handling request GET /fail")
    assert failure["exc_info"].endswith("LookupError: no such thing")
    assert "alice" not in str(node.log())
    assert node.stop() == 0
    assert [line["message"] for line in node.log()][-1] == "stopped"


def test_what_the_application_prints_does_not_cut_the_lines_of_the_log(tmp_path: Path) -> None:
    """As under systemd, where both are one stream: a buffer of 8 KiB would be written in the middle of a line."""
    (tmp_path / "printing.py").write_text(
        "import logging\n"
        "for number in range(2000):\n    print('client', number, 'has left')\n    logging.warning('logged')\n"
        "def application(environ, start_response):\n    start_response('200 OK', [])\n    return [b'']\n"
    )
    run = subprocess.run(
        [STICKYRING, "serve", "--check", "printing:application"],
        cwd=tmp_path,
        # Without PYTHONUNBUFFERED, as in the unit.
        env={"PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=True,
        timeout=DEADLINE_SECONDS,
    )
    lines = run.stdout.decode().splitlines()
    assert [line for line in lines if "client" in line] == [f"client {number} has left" for number in range(2000)]
    assert [json.loads(line)["message"] for line in lines if "logged" in line] == ["logged"] * 2000


def test_another_worker_class(serve: Callable[..., ServeProcess], tmp_path: Path) -> None:
    Path(tmp_path, "plain.py").write_text(PLAIN)
    node = serve("plain:application", "--worker-class", "gthread")
    assert node.logged("serving ")[0]["worker_class"] == "gthread"
    assert node.get("/").read() == b"plain"


def test_it_keeps_serving_with_a_new_worker_after_sighup(serve: Callable[..., ServeProcess]) -> None:
    node = serve()
    node.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(node.logged("serving stickyring.echo")) == 2, "there is a new worker")
    assert node.get("/healthz").status == 200
    assert node.stop() == 0
