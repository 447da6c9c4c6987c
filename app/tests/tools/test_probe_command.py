"""The command as a user runs it: exit status, one-line errors, files, signals."""

import asyncio
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from deployment import astray, by_parameter, deployed

from stickyring.cli import main
from stickyring.tools.probe.command import made_ids, read_ids

STICKYRING = str(Path(sys.executable).with_name("stickyring"))
PIPE = asyncio.subprocess.PIPE


async def run(*arguments: str) -> tuple[int | None, str, str]:
    """Exit status, standard output and standard error of `stickyring probe`."""
    process = await asyncio.create_subprocess_exec(STICKYRING, "probe", *arguments, stdout=PIPE, stderr=PIPE)
    output, errors = await asyncio.wait_for(process.communicate(), 20)
    return process.returncode, output.decode(), errors.decode()


@pytest.mark.asyncio
async def test_a_sticky_deployment_ends_with_0_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    async with deployed(by_parameter()) as deployment:
        status, output, errors = await run(deployment.url, "--ids", "10", "--connections", "1", "--json", str(file))
    assert (status, errors) == (0, "")
    assert output.splitlines()[-1] == "sticky: all 40 sessions completed, each of 10 ids on one of 3 nodes"
    content = json.loads(file.read_text())
    assert content["sticky"] is True
    assert set(content["transports"]) == {"polling", "upgrade", "websocket-first", "websocket"}


@pytest.mark.asyncio
async def test_a_deployment_that_is_not_sticky_ends_with_1_and_the_cause(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    async with deployed(astray()) as deployment:
        status, output, _ = await run(
            deployment.url, "--no-key", "--ids", "5", "--transport", "polling", "--json", str(file)
        )
    assert status == 1
    words = " ".join(output.split())
    assert "not sticky: 15 of 15 sessions got HTTP 400 Invalid session" in words
    assert "no id was sent" in words
    assert json.loads(file.read_text())["sticky"] is False


@pytest.mark.asyncio
async def test_an_interrupt_ends_with_the_table_and_130() -> None:
    async with deployed(by_parameter()) as deployment:
        process = await asyncio.create_subprocess_exec(
            STICKYRING, "probe", deployment.url, "--ids", "5", "--connections", "1", "--hold", "60", stdout=PIPE
        )
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 15)
        assert line == b"all 20 sessions are open\n"
        process.send_signal(signal.SIGINT)
        rest, _ = await asyncio.wait_for(process.communicate(), 15)
        assert deployment.events == ["disconnect: client disconnect"] * 20
    assert process.returncode == 130
    assert "interrupted: 20 of 20 sessions had ended" in " ".join(rest.decode().split())


def refused(*arguments: str) -> tuple[int, str]:
    """Exit status and error of a run that must end in one line."""
    result = CliRunner().invoke(main, ["probe", *arguments])
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stderr


LOCAL = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["ftp://127.0.0.1"], "must start with http:// or https://"),
        (["http://nowhere.invalid"], "cannot resolve nowhere.invalid"),
        (["http://192.0.2.1"], "--i-own-this-target"),
        ([LOCAL, "--no-key", "--key-header", "x"], "contradict"),
        ([LOCAL, "--ids", "5", "--ids-file", __file__], "contradict"),
        ([LOCAL, "--ids", "0"], "--ids"),
        ([LOCAL, "--transport", "carrier-pigeon"], "--transport"),
        ([LOCAL, "--key-param", "a=b"], "not a valid name"),
        ([LOCAL, "--key-header", "x:y"], "not a valid name"),
        ([LOCAL, "--path", "socket.io"], "must start with /"),
        ([LOCAL, "--id-prefix", "zoë "], "percent-encoding"),
        ([LOCAL, "--ids", "20000"], "more than 200000"),
        ([LOCAL, "--json", "/nowhere/result.json"], "/nowhere/result.json"),
        ([LOCAL, "--ids-file", "/nowhere/ids"], "/nowhere/ids"),
    ],
)
def test_bad_usage_ends_with_2_and_one_line(arguments: Sequence[str], complaint: str) -> None:
    status, error = refused(*arguments)
    assert status == 2
    assert complaint in error


def test_more_open_files_than_the_system_allows_are_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    status, error = refused(LOCAL, "--ids", "100", "--hold", "1")
    assert status == 2
    assert "this needs about 1400 open files; the limit is 1024" in error
    # The same without --hold needs few, and gets as far as the connection.
    assert refused(LOCAL, "--ids", "100")[0] == 1


def test_nothing_listens_ends_with_1_and_one_line() -> None:
    status, error = refused(LOCAL)
    assert status == 1
    assert error == "Error: nothing listens on 127.0.0.1 port 9 (127.0.0.1: refused)\n"


@pytest.mark.parametrize("missing", ["aiohttp", "rich"])
def test_without_the_extra_it_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("stickyring.tools.probe.")]:
        if module not in (
            "stickyring.tools.probe.command",
            "stickyring.tools.probe.settings",
            "stickyring.tools.probe.targets",
        ):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    assert refused(LOCAL) == (1, f"Error: {missing} is not installed: pip install stickyring[probe]\n")


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [("--help", "aiohttp rich matplotlib gunicorn"), ("rebalance --help", "gunicorn asyncio importlib.metadata numpy")],
)
def test_the_command_line_does_not_load_what_it_does_not_need(arguments: str, unwanted: str) -> None:
    code = (
        f"import sys; from stickyring.cli import main; main({arguments.split()}, standalone_mode=False);"
        f" sys.exit(', '.join(set({unwanted.split()}) & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=20, capture_output=True, text=True)
    assert "Usage: " in done.stdout
    assert (done.returncode, done.stderr) == (0, "")


def test_made_ids_are_the_same_every_time() -> None:
    assert made_ids("user-", 3) == ["user-00001", "user-00002", "user-00003"]


def test_ids_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ids"
    file.write_text("alice\n\n  bob \n")
    assert read_ids(file) == ["alice", "bob"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("a\nb c\n", "line 2: 'b c' needs"), ("a\nb\na\n", "line 3: a is already on line 1"), ("\n", "contains no id")],
)
def test_a_file_of_bad_ids_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    file = tmp_path / "ids"
    file.write_text(content)
    status, error = refused(LOCAL, "--ids-file", str(file))
    assert status == 2
    assert complaint in error
