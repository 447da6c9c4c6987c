"""The measurement of edges, with a proxy that keeps users on one node and one that does not."""

import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from bench import edges, proxies
from bench.contenders import ROOT
from bench.edges import DIRECT, Client, Fleet, Profile
from bench.load import LoadError, Target
from bench.proxies import Edge
from bench.report import as_markdown
from bench.rounds import Rounds

TINY = Profile(
    rounds=1,
    idle_rounds=1,
    seconds=0.1,
    idle_connections=20,
    fleets=(Fleet(1, suffix="-of-1"),),
    moves=(3,),
    users=300,
    sticky_users=20,
    idle_seconds=0.1,
    crowds=(10,),
)
PROXY = """
import asyncio, itertools, re, sys, zlib
port, hashes, *nodes = map(int, sys.argv[1:])
turns = itertools.count()

async def copy(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()

async def serve(reader, writer):
    head = await reader.read(65536)
    found = re.search(rb"client_id=([^& ]+)", head)
    at = zlib.crc32(found[1]) if hashes and found else next(turns)
    upstream = await asyncio.open_connection("127.0.0.1", nodes[at % len(nodes)])
    upstream[1].write(head)
    await asyncio.gather(copy(reader, upstream[1]), copy(upstream[0], writer), return_exceptions=True)

async def main():
    await (await asyncio.start_server(serve, "127.0.0.1", port, backlog=1024)).serve_forever()

asyncio.run(main())
"""
TRACER = f"""#!{sys.executable}
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
print("strace: Process 1 attached", file=sys.stderr, flush=True)
signal.sigwait([signal.SIGINT])
with open(sys.argv[4], "w") as table:
    table.write("100.00    0.012345          12      1100        50 total\\n")
"""
CONTEXT = {
    "command": "a command",
    "date": "a date",
    "machine": {"cores": 2, "processor": "a processor", "kernel": "a kernel"},
    "versions": {},
}


def proxy(key: str, hashes: bool) -> Edge:
    def command(place: Path, port: int, nodes: Sequence[int]) -> list[str]:
        return [sys.executable, "-c", PROXY, str(port), str(int(hashes)), *map(str, nodes)]

    return Edge(key, key, command)


@pytest.fixture
def rounds(tmp_path: Path) -> Iterator[Rounds]:
    before = os.sched_getaffinity(0)
    yield Rounds(tmp_path, 60)
    os.sched_setaffinity(0, before)


def test_what_keeps_users_together_is_told_from_what_does_not(rounds: Rounds, tmp_path: Path) -> None:
    tracer = tmp_path / "strace"
    tracer.write_text(TRACER)
    tracer.chmod(0o755)
    part = edges.compare(rounds, TINY, [proxy(proxies.NGINX, True), proxy(proxies.UNHASHED, False)], tracer)
    ((calls,),) = part.found["system-calls"].values()
    assert 5 < calls < 6, "1100 calls for a second's 200 echoes"
    assert part.found["sticky"] == {proxies.NGINX: [100.0], proxies.UNHASHED: [0.0]}
    # With a hash modulo the number of nodes, three of four users move when a fourth node is added.
    ((moved,),) = part.found["moved@3"].values()
    assert moved == pytest.approx(75, abs=10)
    ((busiest,),) = part.found["busiest@3"].values()
    assert 1 <= busiest < 1.3
    for suffix in ("", "-of-1"):
        (through, direct) = (part.found[f"trip-p50{suffix}"][key][0] for key in (proxies.NGINX, DIRECT))
        assert part.found[f"added-p50{suffix}"][proxies.NGINX] == [pytest.approx(through - direct)]
        for figure in ("paced-cpu", "session-cpu@upgrade"):
            ((found,),) = part.found[figure + suffix].values()
            assert found > 0
    for figure in ("echo-cpu@10", "part-load-cpu", "session-cpu@polling", "idle-memory", "memory"):
        ((found,),) = part.found[figure].values()
        assert found > 0
    assert set(part.found) == {figure.key for figure in part.figures}
    bounds = part.bounds()
    assert set(bounds) == {f"echoes@{crowd}" for crowd in TINY.crowds}
    assert {fastest for fastest, _ in bounds.values()} == {proxies.NGINX}
    assert all(spread.median > 1 for _, spread in bounds.values()), "nothing is faster through an edge"
    assert "## The load" in as_markdown(part, CONTEXT)


def test_an_edge_without_nodes_is_no_measure() -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(502)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with pytest.raises(LoadError, match="edge answers a handshake with 502"):
            Client("user-1").place(Target("edge", server.server_port, "bench"))
        server.shutdown()


def test_every_session_is_the_next_users_and_keeps_its_cookie() -> None:
    target = Target("edge", 8001, "bench", users=iter(["one", "two"]))
    first, second = target.of_next_user(), target.of_next_user()
    assert b"polling&client_id=one&sid=x HTTP/1.1" in first.get("x")
    assert b"websocket&client_id=two HTTP/1.1" in second.upgrade()
    assert first.of_next_user() is first
    assert Target("node", 8001, "bench").get() == (
        b"GET /socket.io/?EIO=4&transport=polling HTTP/1.1\r\nHost: 127.0.0.1:8001\r\n\r\n"
    )


def test_ours_is_what_the_role_composes(tmp_path: Path) -> None:
    place = tmp_path
    composed = proxies._composed(place, 3, access_log=True)
    command = proxies._ours(Path("envoy"), composed, place, 9000, [9001, 9002, 9003])
    written = {path.relative_to(place / "xds").as_posix(): path.read_text() for path in place.glob("xds/**/*.json")}
    assert {name.split("-")[0] for name in written} == {
        "clusters.json",
        "listeners.json",
        "routes/sticky.json",
        "endpoints/nodes",
    }
    endpoints = next(text for name, text in written.items() if name.startswith("endpoints/"))
    assert "envoy.access_loggers.stdout" in written["listeners.json"]
    silent = json.dumps(proxies._composed(place, 3, access_log=False))
    assert "envoy.access_loggers" not in silent
    for port in (9001, 9002, 9003):
        assert f'"port_value": {port}' in endpoints
    assert '"port_value": 9000' in written["listeners.json"]
    assert str(place / "xds/listeners.json") in Path(command[2]).read_text()
    variables = yaml.safe_load((ROOT / "roles/stickyring_edge/vars/main.yml").read_text())
    for option in [word for word in command if word.startswith("--")]:
        assert option in variables["__stickyring_edge_command"]
