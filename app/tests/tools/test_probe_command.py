"""The command as a user runs it: exit status, one-line errors, files, signals."""

import asyncio
import io
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
from stickyring.tools.probe.arguments import made_ids, read_ids, read_login
from stickyring.tools.probe.settings import Dialect

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


@pytest.mark.asyncio
async def test_an_interrupt_while_the_first_session_waits_for_an_answer_ends_the_probe() -> None:
    asked = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The first connection only looks whether anything listens.
        if await reader.read(1):
            asked.set()
            await reader.read()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        process = await asyncio.create_subprocess_exec(STICKYRING, "probe", url, stdout=PIPE)
        await asyncio.wait_for(asked.wait(), 15)
        process.send_signal(signal.SIGINT)
        output, _ = await asyncio.wait_for(process.communicate(), 5)
    assert process.returncode == 130
    assert "interrupted: 0 of 720 sessions had ended" in " ".join(output.decode().split())


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
        ([LOCAL, "--auth", "{token"], "--auth: not JSON (Expecting property name"),
        ([LOCAL, "--auth", '"token"'], '--auth: not a JSON object: give \'{"token": "..."}\' for example'),
        ([LOCAL, "--auth", "@/nowhere/login"], "--auth: cannot read /nowhere/login: No such file"),
        ([LOCAL, "--auth", "@"], "--auth: cannot read "),
        ([LOCAL, "--header", "Authorization"], "--header: give 'Name: value'"),
        ([LOCAL, "--header", "A: b\r\nC: d"], "--header: give 'Name: value'"),
        ([LOCAL, "--header", "A:"], "--header: give 'Name: value'"),
        ([LOCAL, "--header", "Upgrade: h2c"], "--header: the probe sets Upgrade itself"),
        ([LOCAL, "-H", "sec-websocket-key: x"], "the probe sets sec-websocket-key itself"),
        ([LOCAL, "-H", "@-", "-H", "@-"], "@- can be given once"),
        ([LOCAL, "-H", "X-User: a", "--key-header", "x-user"], "--key-header and --header both set x-user"),
        ([LOCAL, "--namespace", "chat"], "--namespace: 'chat' must start with /"),
        ([LOCAL, "--namespace", "/a,b"], "--namespace: '/a,b' must start with / and contain no space, comma"),
        ([LOCAL, "--parser", "json"], "'json' is not one of 'default', 'msgpack'"),
        ([LOCAL, "--no-upgrade", "--transport", "upgrade"], "--no-upgrade and --transport upgrade contradict"),
        ([LOCAL, "--transport", "http"], "'http' is not one of"),
        ([LOCAL, "--http", "health"], "--http: 'health' must start with /"),
        ([LOCAL, "--http", "/a?b"], "--http: '/a?b' must start with / and contain no space, ?"),
        ([LOCAL, "--http", "/", "--namespace", "/"], "--http and --namespace contradict each other"),
        ([LOCAL, "--http", "/", "--transport", "polling"], "--http and --transport contradict each other"),
        ([LOCAL, "--http", "/", "--connections", "1"], "--http needs --connections 2 or more"),
        ([LOCAL, "--json", "/nowhere/result.json"], "/nowhere/result.json"),
        ([LOCAL, "--ids-file", "/nowhere/ids"], "/nowhere/ids"),
    ],
)
def test_bad_usage_ends_with_2_and_one_line(arguments: Sequence[str], complaint: str) -> None:
    status, error = refused(*arguments)
    assert status == 2
    assert complaint in error


def test_bad_content_of_a_file_is_refused_without_showing_it(tmp_path: Path) -> None:
    file = tmp_path / "login"
    for content, option, complaint in (
        ("{'token': 'sesame'}", "--auth", "not JSON"),
        ('["sesame"]', "--auth", "not a JSON object"),
        ("X-Good: 1\n\nsesame\n", "--header", f"{file}, line 3: give 'Name: value'"),
        ("Upgrade: sesame\n", "--header", f"{file}, line 1: the probe sets Upgrade itself"),
    ):
        file.write_text(content)
        status, error = refused(LOCAL, option, f"@{file}")
        assert status == 2
        assert complaint in error
        assert "sesame" not in error
    file.write_bytes(b"\xff")
    assert "is not a text in UTF-8" in refused(LOCAL, "--auth", f"@{file}")[1]


def test_a_foreign_target_is_refused_with_a_login_and_with_http_too() -> None:
    for options in (["--auth", "{}"], ["--http", "/"]):
        status, error = refused("http://192.0.2.1", *options)
        assert status == 2
        assert "use --i-own-this-target to put load on it" in error


def test_both_secrets_can_come_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = '{"token": "sesame", "n": [1, {"deep": "inside"}]}\nAuthorization: Bearer abcdefgh1234\n\nCookie: a=b\n'
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    login = read_login("@-", ["X-Plain: yes", "@-"])
    assert login.auth == {"token": "sesame", "n": [1, {"deep": "inside"}]}
    assert login.headers == [("X-Plain", "yes"), ("Authorization", "Bearer abcdefgh1234"), ("Cookie", "a=b")]
    # What was typed on the command line is not hidden.
    assert login.secrets == {"sesame", "inside", "Bearer abcdefgh1234", "abcdefgh1234", "a=b"}
    assert Dialect(secrets=login.secrets).without_secrets("Bearer abcdefgh1234: no abcdefgh1234") == "***: no ***"


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
            "stickyring.tools.probe.arguments",
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
