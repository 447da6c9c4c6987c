"""The command against applications with a login, a namespace, msgpack, and without Socket.IO, on real nodes."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import serving
from deployment import Answer, Policy, Request, astray, by_issued_cookie, by_parameter, deployed, refuse
from test_probe_command import run

APPLICATION = """
import os
import socketio

KIND = os.environ["KIND"]
TOKEN = "sesame-9031"
namespace = "/chat" if KIND == "namespace" else "/"
server = socketio.Server(
    async_mode="eventlet",
    serializer="msgpack" if KIND == "msgpack" else "default",
    allow_upgrades=KIND != "no upgrades",
    always_connect=KIND == "late",
)

def connect(sid, environ, auth=None):
    token = (auth or {}).get("token")
    if KIND in ("login", "late", "namespace", "msgpack") and token != TOKEN:
        raise socketio.exceptions.ConnectionRefusedError(f"the token {token} is not valid")

server.on("connect", connect, namespace=namespace)
server.on("message", lambda sid, text: text, namespace=namespace)
inside = socketio.WSGIApp(server)

def application(environ, start_response):
    if KIND == "header" and environ.get("HTTP_AUTHORIZATION") != f"Bearer {TOKEN}":
        start_response("401 Unauthorized", [("Content-Type", "application/json")])
        return [b'{"error": "the session has expired"}']
    return inside(environ, start_response)
"""
PLAIN = """
import os

def application(environ, start_response):
    path = environ["PATH_INFO"]
    status = {"/": "200 OK", "/moved": "302 Found", "/login": "401 Unauthorized"}.get(path, "404 Not Found")
    start_response(status, [("Content-Type", "text/plain"), ("Location", "/elsewhere")])
    return [b"hello" if path == "/" else b"who are you?"]
"""
TOKEN = "sesame-9031"
GOOD = f'{{"token": "{TOKEN}"}}'
BRIEF = ("--ids", "8", "--connections", "1", "--timeout", "5")
FEW = ("--ids", "20", "--connections", "3")

# The application on asyncio would be another one.
pytestmark = [pytest.mark.asyncio, pytest.mark.eventlet]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], list[int]]]:
    """A function that returns the ports of two nodes with this kind of application."""
    running: dict[str, list[int]] = {}
    with ExitStack() as stack:

        def ports(kind: str) -> list[int]:
            if kind not in running:
                running[kind] = []
                for number in (1, 2):
                    folder = tmp_path_factory.mktemp(f"node{number}")
                    Path(folder, "chat.py").write_text(PLAIN if kind == "plain" else APPLICATION)
                    node = serving(folder, "chat:application", "--node-name", f"node{number}-1", KIND=kind)
                    running[kind].append(int(stack.enter_context(node).address.rpartition(":")[2]))
            return running[kind]

        yield ports


async def probe(
    ports: Sequence[int], *options: str, policy: Policy | None = None
) -> tuple[int | None, str, str, list[Request]]:
    """Exit status, standard output as one line, standard error, and the requests that reached the edge."""
    async with deployed(policy or by_parameter(), ports=ports) as deployment:
        status, output, errors = await run(deployment.url, *options)
    return status, " ".join(output.split()), errors, deployment.requests


STICKY = "sticky: all 32 sessions completed, each of 8 ids on one of 2 nodes"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("login", ("--auth", GOOD)),
        ("late", ("--auth", GOOD)),
        ("namespace", ("--auth", GOOD, "--namespace", "/chat")),
        ("msgpack", ("--auth", GOOD, "--parser", "msgpack")),
        ("header", ("--header", f"Authorization: Bearer {TOKEN}")),
    ],
)
@pytest.mark.parametrize("echo", [(), ("--no-echo",)], ids=["echo", "no echo"])
async def test_with_its_login_an_application_is_proven_sticky(
    nodes: Callable[[str], list[int]], kind: str, options: tuple[str, ...], echo: tuple[str, ...]
) -> None:
    status, output, errors, _ = await probe(nodes(kind), *BRIEF, *options, *echo)
    assert (status, errors) == (0, ""), output
    assert output.endswith(STICKY)


@pytest.mark.parametrize("kind", ["login", "late", "namespace", "msgpack"])
@pytest.mark.parametrize("echo", [(), ("--no-echo",)], ids=["echo", "no echo"])
async def test_a_refused_login_is_one_line_and_one_attempt(
    nodes: Callable[[str], list[int]], kind: str, echo: tuple[str, ...]
) -> None:
    options = (*BRIEF, *echo, *(("--namespace", "/chat") if kind == "namespace" else ()))
    options = (*options, *(("--parser", "msgpack") if kind == "msgpack" else ()))
    status, output, errors, requests = await probe(nodes(kind), *options, "--auth", '{"token": "wrong"}')
    assert (status, output, errors) == (1, "", "Error: login refused: the token wrong is not valid\n")
    # A failed attempt more would count towards a locked account.
    assert sum(request.parameter("sid") is None for request in requests) == (2 if kind == "late" and echo else 1)
    status, output, errors, _ = await probe(nodes(kind), *options)
    advice = "log in with --auth or --header"
    assert (status, output, errors) == (1, "", f"Error: login refused: the token None is not valid; {advice}\n")


async def test_a_refused_header_is_one_line(nodes: Callable[[str], list[int]]) -> None:
    said = "Error: login refused: HTTP 401: the session has expired"
    options = ("-H", "Authorization: Bearer wrong")
    assert (await probe(nodes("header"), *BRIEF, *options))[:3] == (1, "", f"{said}\n")
    assert (await probe(nodes("header"), *BRIEF))[:3] == (1, "", f"{said}; log in with --auth or --header\n")
    websocket = ("--transport", "websocket")
    assert (await probe(nodes("header"), *BRIEF, *options, *websocket))[:3] == (1, "", f"{said}\n")


async def test_a_login_refused_to_some_users_is_counted_and_not_called_unsticky(
    nodes: Callable[[str], list[int]],
) -> None:
    def one_is_locked(request: Request) -> Answer:
        # Not the first session, which opens alone.
        locked = request.parameter("client_id") == "user-00006"
        return refuse("401 Unauthorized") if locked else by_parameter()(request)

    status, output, _, _ = await probe(nodes("login"), *BRIEF, "--auth", GOOD, policy=one_is_locked)
    assert status == 1
    assert output.endswith("not proven sticky: 4 of 32 sessions failed: 4 x login refused: HTTP 401")


async def test_a_login_does_not_hide_an_edge_that_is_not_sticky(nodes: Callable[[str], list[int]]) -> None:
    """One node holds the first session, the other gets its second request."""
    status, output, _, _ = await probe(nodes("login"), *BRIEF, "--auth", GOOD, "--no-key", policy=one_after_the_other())
    assert status == 1
    assert "got HTTP 400 Invalid session" in output


def one_after_the_other() -> Policy:
    turns = iter(range(10**6))
    return lambda request: Answer(node=next(turns))


@pytest.mark.parametrize("echo", [(), ("--no-echo",)], ids=["echo", "no echo"])
async def test_a_namespace_that_the_application_lacks_is_one_line(
    nodes: Callable[[str], list[int]], echo: tuple[str, ...]
) -> None:
    result = await probe(nodes("login"), *BRIEF, *echo, "--namespace", "/caht", "--auth", GOOD)
    assert result[:3] == (1, "", "Error: the application has no namespace /caht: Invalid namespace\n")


async def test_another_parser_is_suggested_when_nothing_answers_the_connect(nodes: Callable[[str], list[int]]) -> None:
    options = ("--ids", "3", "--connections", "1", "--timeout", "0.7", "--auth", GOOD)
    status, output, _, _ = await probe(nodes("msgpack"), *options)
    assert status == 1
    assert "no connect of Socket.IO was answered: the application may need another --parser" in output


async def test_without_upgrades(nodes: Callable[[str], list[int]]) -> None:
    status, output, _, _ = await probe(nodes("no upgrades"), *BRIEF)
    assert status == 1
    assert "8 x the server offers no upgrade to websocket (--no-upgrade leaves it out)" in output
    status, output, _, _ = await probe(nodes("no upgrades"), *BRIEF, "--no-upgrade")
    assert (status, output.endswith("all 24 sessions completed, each of 8 ids on one of 2 nodes")) == (0, True), output


async def test_secrets_from_files_are_sent_and_not_shown(nodes: Callable[[str], list[int]], tmp_path: Path) -> None:
    file = tmp_path / "login.json"
    file.write_text(f"{GOOD}\n")
    status, output, _, _ = await probe(nodes("login"), *BRIEF, "--auth", f"@{file}")
    assert (status, output.endswith(STICKY)) == (0, True)
    file.write_text('{"token": "sesame-0000"}')
    assert (await probe(nodes("login"), *BRIEF, "--auth", f"@{file}"))[:3] == (
        1,
        "",
        "Error: login refused: the token *** is not valid\n",
    )
    file.write_text(f"Authorization: Bearer {TOKEN}\n")
    assert (await probe(nodes("header"), *BRIEF, "-H", f"@{file}"))[0] == 0


async def test_every_request_has_the_headers(nodes: Callable[[str], list[int]]) -> None:
    headers = ("-H", "X-Tenant: blue", "-H", "Cookie: a=b", "-H", "User-Agent: mine")
    for options in ((*BRIEF, "--auth", GOOD), (*FEW, "--http", "/socket.io.js")):
        _, _, _, requests = await probe(nodes("login"), *options, *headers)
        sent = {tuple(request.headers[name] for name in ("x-tenant", "cookie", "user-agent")) for request in requests}
        assert sent == {("blue", "a=b", "mine")}


async def test_an_application_without_socketio_is_sticky_by_id(
    nodes: Callable[[str], list[int]], tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    status, output, errors, requests = await probe(nodes("plain"), *FEW, "--http", "/", "--json", str(file))
    assert (status, errors) == (0, ""), output
    assert output.endswith("sticky: all 60 requests completed, each of 20 ids on one of 2 nodes")
    assert "GET /: 20 ids x 3 requests" in output
    assert {request.target.partition("=")[0] for request in requests} == {"/?client_id"}
    content = json.loads(file.read_text())
    total = content["total"]
    assert (content["sticky"], content["http"], content["nodes_known_by"]) == (True, "/", "header x-served-by")
    assert (total["requests"], total["completed"], total["failures"], total["nodes"]) == (60, 60, {}, 2)
    assert set(total["requests_per_node"]) == {"node1-1", "node2-1"}
    assert sum(total["requests_per_node"].values()) == 60
    assert sum(total["ids_per_node"].values()) == 20


async def test_without_an_id_the_same_requests_reach_several_nodes(
    nodes: Callable[[str], list[int]], tmp_path: Path
) -> None:
    """The negative control."""
    file = tmp_path / "result.json"
    status, output, _, requests = await probe(
        nodes("plain"), *FEW, "--http", "/", "--no-key", "--json", str(file), policy=one_after_the_other()
    )
    assert status == 1
    assert "not sticky: " in output
    assert output.endswith("of 20 ids were on more than one node, and no id was sent")
    assert {request.target for request in requests} == {"/"}
    content = json.loads(file.read_text())
    assert content["sticky"] is False
    assert content["total"]["ids_on_more_than_one_node"] > 0
    assert content["total"]["failures"] == {}
    # With an id, an edge that ignores it is not sticky either.
    status, output, _, _ = await probe(nodes("plain"), *FEW, "--http", "/", policy=astray())
    assert status == 1
    assert output.endswith("not sticky: 20 of 20 ids were on more than one node")


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (("--http", "/moved"), 0, "sticky: all 60 requests completed"),
        (("--http", "/nothing"), 1, "not proven sticky: 60 of 60 requests failed: 60 x HTTP 404"),
        (("--http", "/", "--node-header", "x-node"), 1, "60 requests failed: 60 x no x-node header in the answer"),
        (("--http", "/", "--key-header", "x-user"), 1, "of 20 ids were on more than one node"),
        (("--http", "/", "--key-param", "user"), 1, "of 20 ids were on more than one node"),
    ],
)
async def test_what_counts_as_an_answer(
    nodes: Callable[[str], list[int]], options: tuple[str, ...], status: int, said: str
) -> None:
    found, output, _, _ = await probe(nodes("plain"), *FEW, *options)
    assert found == status
    assert said in output
    assert "nodes" in output


async def test_a_cookie_of_the_edge_keeps_plain_requests_on_one_node(nodes: Callable[[str], list[int]]) -> None:
    options = (*FEW, "--http", "/", "--no-key")
    status, output, _, _ = await probe(nodes("plain"), *options, "--keep-cookies", policy=by_issued_cookie())
    assert status == 0, output
    assert (await probe(nodes("plain"), *options, policy=by_issued_cookie()))[0] == 1


async def test_a_page_behind_a_login_is_one_line(nodes: Callable[[str], list[int]]) -> None:
    status, output, errors, requests = await probe(nodes("plain"), *FEW, "--http", "/login")
    said = "Error: login refused: HTTP 401: who are you?; log in with --auth or --header\n"
    assert (status, output, errors, len(requests)) == (1, "", said, 1)


async def test_a_socketio_probe_of_a_plain_application_suggests_http(nodes: Callable[[str], list[int]]) -> None:
    status, output, _, _ = await probe(nodes("plain"), *BRIEF)
    assert status == 1
    assert "32 x HTTP 404; is this the --path of Socket.IO? An application without Socket.IO needs --http" in output


async def test_a_secret_from_standard_input_is_on_no_command_line(nodes: Callable[[str], list[int]]) -> None:
    """While sessions are held open, no process has the token among its arguments or in its environment."""
    async with deployed(by_parameter(), ports=nodes("login")) as deployment:
        command = [str(Path(sys.executable).with_name("stickyring")), "probe", deployment.url, "--auth", "@-"]
        process = subprocess.Popen(
            [*command, "--ids", "2", "--connections", "1", "--hold", "30"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(GOOD.encode())
        process.stdin.close()
        assert await asyncio.to_thread(process.stdout.readline) == b"all 8 sessions are open\n"
        for name in ("cmdline", "environ"):
            assert TOKEN.encode() not in Path(f"/proc/{process.pid}/{name}").read_bytes()
        process.terminate()
        process.stdout.close()
        await asyncio.to_thread(process.wait)
