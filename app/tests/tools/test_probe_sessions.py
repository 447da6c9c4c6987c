"""Real sessions against python-socketio nodes behind an edge that is sticky or not."""

import asyncio
import contextlib
import json
from collections.abc import Callable

import aiohttp
import pytest
from deployment import (
    Answer,
    Deployment,
    Request,
    astray,
    by_header,
    by_issued_cookie,
    by_parameter,
    deployed,
    owner,
    refuse,
)

from stickyring.tools.probe import session as session_module
from stickyring.tools.probe.failures import INVALID_SESSION, TWO_NODES
from stickyring.tools.probe.load import Load
from stickyring.tools.probe.report import Report
from stickyring.tools.probe.run import judge_and_measure, measure
from stickyring.tools.probe.settings import SESSIONS, Dialect, Manner, Parser, Shape
from stickyring.tools.probe.targets import Target, judge
from stickyring.tools.probe.transports import connector

IDS = tuple(f"user-{number:05}" for number in range(1, 9))
ALL = Shape(IDS, connections=2)
BRIEF = Shape(IDS, connections=1)
POLLING = Shape(IDS, [Manner.POLLING], connections=2)
WEBSOCKET = Shape(IDS, [Manner.WEBSOCKET], connections=2)
UNKEYED = Dialect(key_param=None)

pytestmark = pytest.mark.asyncio


async def probed(deployment: Deployment, shape: Shape, dialect: Dialect | None = None) -> Report:
    return await judge_and_measure(deployment.url, dialect or Dialect(), shape, owned=False)


async def test_a_keyed_edge_is_sticky_over_every_transport() -> None:
    async with deployed(by_parameter()) as deployment:
        report = await probed(deployment, ALL)
    assert report.sticky, report.verdict
    assert report.nodes_known_by == "header x-served-by"
    for manner, figures in report.by_manner.items():
        assert figures.completed == figures.sessions == 16, manner
        assert len(figures.handshakes) == len(figures.round_trips) == 16
        assert sum(figures.sessions_per_node.values()) == 16
    assert report.total.nodes_of == {name: {f"node{owner(name).node % 3 + 1}-1"} for name in IDS}
    assert report.verdict == "sticky: all 64 sessions completed, each of 8 ids on one of 3 nodes"


async def test_each_transport_sends_the_requests_of_its_name() -> None:
    steps = {}
    for manner in SESSIONS:
        async with deployed(by_parameter(), nodes=1) as deployment:
            await probed(deployment, Shape(IDS[:1], [manner], connections=1))
        steps[manner] = [
            ("websocket" if request.upgrade else "polling", request.parameter("sid") is not None)
            for request in deployment.requests
        ]
    assert steps[Manner.WEBSOCKET] == steps[Manner.WEBSOCKET_FIRST] == [("websocket", False)]
    assert steps[Manner.POLLING][0] == ("polling", False)
    assert set(steps[Manner.POLLING][1:]) == {("polling", True)}
    assert steps[Manner.UPGRADE][0] == ("polling", False)
    assert steps[Manner.UPGRADE].count(("websocket", True)) == 1


async def test_every_request_has_a_connection_of_its_own() -> None:
    async with deployed(by_parameter()) as deployment:
        await probed(deployment, ALL)
    # One more connection than requests: the check whether anything listens.
    assert deployment.connections - 1 == deployment.node_requests == len(deployment.requests)
    assert len({request.parameter("client_id") for request in deployment.requests}) == len(IDS)


async def test_sessions_are_closed_by_the_client_and_not_left_to_time_out() -> None:
    async with deployed(by_parameter()) as deployment:
        await probed(deployment, ALL)
        assert deployment.events == ["disconnect: client disconnect"] * ALL.total


@pytest.mark.parametrize("manner", [Manner.POLLING, Manner.UPGRADE])
async def test_an_edge_that_is_not_sticky_shows_invalid_sessions(manner: Manner) -> None:
    async with deployed(astray()) as deployment:
        report = await probed(deployment, Shape(IDS, [manner], connections=2))
    assert not report.sticky
    assert report.total.completed == 0
    assert report.total.failures == {INVALID_SESSION: 16}
    assert "16 of 16 sessions got HTTP 400 Invalid session" in report.verdict
    assert "the requests of one session reached different nodes" in report.verdict


async def test_an_upgrade_that_reaches_another_node_is_an_invalid_session() -> None:
    def upgrades_elsewhere(request: Request) -> Answer:
        return Answer(node=1 if request.upgrade else 0)

    async with deployed(upgrades_elsewhere) as deployment:
        report = await probed(deployment, Shape(IDS, [Manner.POLLING, Manner.UPGRADE], connections=1))
    assert report.by_manner["polling"].completed == 8
    assert report.by_manner["upgrade"].failures == {INVALID_SESSION: 8}


async def test_websockets_show_an_edge_that_is_not_sticky_by_ids_on_two_nodes() -> None:
    async with deployed(astray()) as deployment:
        report = await probed(deployment, Shape(IDS, [Manner.WEBSOCKET], connections=4))
    assert report.total.completed == report.total.sessions
    assert len(report.total.split_ids) == 8
    assert report.verdict == "not sticky: 8 of 8 ids were on more than one node"


async def test_without_a_key_the_same_edge_is_not_sticky() -> None:
    async with deployed(by_parameter()) as deployment:
        assert (await probed(deployment, POLLING)).sticky
        report = await probed(deployment, POLLING, UNKEYED)
        assert not any(request.parameter("client_id") for request in deployment.requests[-20:])
    assert report.total.invalid > 0
    assert "no id was sent" in report.verdict


async def test_the_id_can_be_sent_as_a_header() -> None:
    dialect = Dialect(key_param=None, key_header="X-Client-Id")
    async with deployed(by_header("x-client-id")) as deployment:
        report = await probed(deployment, BRIEF, dialect)
        assert report.sticky, report.verdict
        assert report.key == "header X-Client-Id"
        assert all(request.parameter("client_id") is None for request in deployment.requests)
        assert not (await probed(deployment, POLLING)).sticky


async def test_an_issued_cookie_is_kept_only_when_asked_for() -> None:
    async with deployed(by_issued_cookie()) as deployment:
        report = await probed(deployment, Shape(IDS, connections=1, keep_cookies=True), UNKEYED)
        assert report.sticky, report.verdict
        before = len(deployment.requests)
        report = await probed(deployment, POLLING, UNKEYED)
        assert not report.sticky
        assert report.total.invalid > 0
        assert not any("cookie" in request.headers for request in deployment.requests[before:])


async def test_without_the_header_the_application_names_the_node() -> None:
    async with deployed(by_parameter(), node_header=None) as deployment:
        report = await probed(deployment, BRIEF)
        assert report.sticky
        assert report.nodes_known_by == "texts of the application"
        assert set(report.total.sessions_per_node) == {"node1-1", "node2-1", "node3-1"}
    async with deployed(astray(), node_header=None) as deployment:
        assert len((await probed(deployment, WEBSOCKET)).total.split_ids) > 0


async def test_a_deployment_without_echo_and_names_is_judged_by_completion_alone() -> None:
    async with deployed(by_parameter(), node_header=None, echo=False) as deployment:
        report = await probed(deployment, BRIEF, Dialect(event=None))
        assert report.sticky
        assert report.nodes_known_by is None
        assert report.as_json()["total"]["ids_on_more_than_one_node"] is None
        assert len(report.total.round_trips) == BRIEF.total
        assert "unknown" in report.verdict
        report = await probed(deployment, Shape(IDS[:2], connections=1), Dialect(timeout=0.3))
    assert report.total.failures == {"timeout (echo)": 8}
    assert report.verdict.startswith("not proven sticky: 8 of 8 sessions failed: 8 x timeout (echo)")


@pytest.mark.parametrize("serializer", ["default", "msgpack"])
async def test_without_echo_an_application_may_have_any_serializer(serializer: str) -> None:
    async with deployed(by_parameter(), echo=False, serializer=serializer) as deployment:
        report = await probed(deployment, BRIEF, Dialect(event=None, timeout=3))
    assert report.sticky, report.verdict
    assert len(report.total.round_trips) == BRIEF.total


async def test_an_echo_in_msgpack_is_understood() -> None:
    async with deployed(by_parameter(), serializer="msgpack", node_header=None) as deployment:
        report = await probed(deployment, BRIEF, Dialect(parser=Parser.MSGPACK))
        assert deployment.events == ["disconnect: client disconnect"] * BRIEF.total
    assert report.sticky, report.verdict
    assert report.nodes_known_by == "texts of the application"


async def test_the_verdict_says_if_there_was_only_one_node() -> None:
    async with deployed(astray(), nodes=1) as deployment:
        report = await probed(deployment, POLLING)
    assert report.sticky
    assert "there was only one node (node1-1)" in report.verdict


async def test_a_session_answered_by_two_nodes_has_failed_even_if_it_went_through() -> None:
    def renamed(request: Request) -> Answer:
        return Answer(served_by="node1-1" if request.parameter("sid") is None else "node2-1")

    async with deployed(renamed, nodes=1) as deployment:
        report = await probed(deployment, POLLING)
    assert report.total.failures == {TWO_NODES: 16}
    assert report.verdict.startswith("not sticky")


async def test_websocket_first_falls_back_to_polling_and_websocket_does_not() -> None:
    def no_websockets(request: Request) -> Answer:
        return refuse("403 Forbidden", "x-served-by: gatekeeper") if request.upgrade else owner("one")

    async with deployed(no_websockets) as deployment:
        report = await probed(deployment, Shape(IDS, [Manner.WEBSOCKET_FIRST, Manner.WEBSOCKET], connections=1))
    first, only = report.by_manner["websocket-first"], report.by_manner["websocket"]
    assert (first.completed, first.fell_back) == (8, 8)
    # A node that refused the WebSocket does not count for the polling session.
    assert set(first.sessions_per_node) == {f"node{owner('one').node % 3 + 1}-1"}
    assert (only.completed, only.fell_back) == (0, 0)
    assert only.failures == {"HTTP 403": 8}


@pytest.mark.parametrize("manner", [Manner.POLLING, Manner.WEBSOCKET])
async def test_a_redirect_is_not_followed(manner: Manner) -> None:
    async with deployed(by_parameter()) as elsewhere:

        def moved(request: Request) -> Answer:
            return refuse("302 Found", f"location: {elsewhere.url}{request.target}")

        async with deployed(moved) as deployment:
            report = await probed(deployment, Shape(IDS, [manner], connections=1))
        assert report.total.failures == {"HTTP 302 (a redirect, not followed)": 8}
        assert elsewhere.connections == 0


@pytest.mark.parametrize(
    ("policy", "cause"),
    [
        (lambda _: refuse("503 Service Unavailable"), "HTTP 503"),
        (lambda _: Answer(own=b""), "connection closed without an answer"),
        (lambda _: refuse("200 OK"), "the answer to the handshake is not Engine.IO 4"),
    ],
)
async def test_other_failures_are_counted_by_cause(policy: Callable[[Request], Answer], cause: str) -> None:
    async with deployed(policy) as deployment:
        report = await probed(deployment, POLLING)
    assert report.total.failures == {cause: 16}
    assert report.verdict.startswith(f"not proven sticky: 16 of 16 sessions failed: 16 x {cause}")


async def test_a_server_that_stops_listening_is_reported() -> None:
    async with deployed(by_parameter()) as deployment:
        target = await judge(deployment.url, owned=False, timeout=5)
    report = await measure(target, Dialect(), POLLING)
    assert report.total.failures == {"connection refused": 16}


async def test_the_connection_goes_to_the_address_that_was_judged() -> None:
    async with deployed(by_parameter()) as deployment:
        url = f"http://sticky.invalid:{deployment.port}"
        target = await judge(url, owned=False, timeout=5, resolve=lambda host, port: ["127.0.0.1"])
        report = await measure(target, Dialect(), BRIEF)
        assert report.sticky, report.verdict
        assert {request.headers["host"] for request in deployment.requests} == {f"sticky.invalid:{deployment.port}"}
        # The same name with another judged address does not reach the server.
        other = Target(target.origin, target.host, target.port, target.query, "127.0.0.2")
        assert (await measure(other, Dialect(), POLLING)).total.failures == {"connection refused": 16}


async def test_no_connection_is_made_to_an_address_that_was_not_judged() -> None:
    async with deployed(by_parameter()) as deployment:
        for address, connections in (("127.0.0.1", 1), ("127.0.0.2", 1)):
            target = Target(deployment.url, "127.0.0.1", deployment.port, "", address)
            async with aiohttp.ClientSession(connector=connector(target)) as http:
                expected = contextlib.nullcontext() if address == "127.0.0.1" else pytest.raises(aiohttp.ClientError)
                with expected:
                    await (await http.get(f"{deployment.url}/")).read()
            assert deployment.connections == connections


async def test_the_query_of_the_url_is_sent_unchanged() -> None:
    async with deployed(by_parameter()) as deployment:
        report = await judge_and_measure(f"{deployment.url}/?token=%61b+c", Dialect(), BRIEF, owned=False)
        assert report.sticky
        assert all("&token=%61b+c&" in request.target for request in deployment.requests)


async def held(deployment: Deployment, shape: Shape, when_open: Callable[[], None]) -> tuple[Report, list[str]]:
    """Run a probe that calls `when_open` as soon as all sessions are open."""
    said: list[str] = []

    def announce(line: str) -> None:
        said.append(line)
        when_open()

    target = await judge(deployment.url, owned=False, timeout=5)
    load = Load(target, Dialect(timeout=5), shape, announce)
    await load.run()
    return Report(target, Dialect(), shape, load.records, load.interrupted, 0.0), said


# Quick pings come every 0.2 s, and an unanswered one ends the session 2 s later.
HELD = Shape(IDS, connections=1, hold=3, concurrency=5)


async def test_held_sessions_are_open_together_and_answer_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "ECHO_EVERY", 0.25)
    at_once: list[int] = []
    async with deployed(by_parameter(), quick_pings=True) as deployment:
        report, said = await held(deployment, HELD, lambda: at_once.append(len(deployment.live)))
    assert said == ["all 32 sessions are open"]
    # A polling session may be between two polls; every other one has its WebSocket.
    assert at_once[0] >= 24
    assert report.sticky, report.verdict
    assert min(len(record.round_trips) for record in report.records) >= 3


async def test_a_held_session_that_does_not_answer_pings_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = session_module.Session._act

    async def deaf(self: session_module.Session, packets: list[str]) -> None:
        await answer(self, [packet for packet in packets if packet != "2"])

    monkeypatch.setattr(session_module.Session, "_act", deaf)
    async with deployed(by_parameter(), quick_pings=True) as deployment:
        report, said = await held(deployment, Shape(IDS, [Manner.WEBSOCKET], 1, hold=4), lambda: None)
    assert said == ["all 8 sessions are open"]
    assert report.total.dropped == 8


async def test_dropped_sessions_are_counted() -> None:
    async with deployed(by_parameter()) as deployment:
        shape = Shape(IDS, [Manner.WEBSOCKET, Manner.UPGRADE], connections=1, hold=1)
        report, said = await held(deployment, shape, deployment.cut)
    assert said == ["all 16 sessions are open"]
    assert report.total.dropped == report.total.sessions == 16
    assert report.verdict.endswith("16 sessions were dropped after they had been open")


async def test_sessions_that_never_open_do_not_block_the_others() -> None:
    def one_in_two(request: Request) -> Answer:
        key = request.parameter("client_id") or ""
        return refuse("503 Service Unavailable") if int(key[-1]) % 2 else owner(key)

    async with deployed(one_in_two) as deployment:
        report, said = await held(deployment, Shape(IDS, [Manner.WEBSOCKET], 1, hold=0.1), lambda: None)
    assert said == ["4 of 8 sessions are open"]
    assert report.total.failures == {"HTTP 503": 4}
    assert report.total.dropped == 0


async def test_an_interrupted_load_closes_what_it_holds() -> None:
    async with deployed(by_parameter()) as deployment:
        target = await judge(deployment.url, owned=False, timeout=5)
        load = Load(target, Dialect(), Shape(IDS, connections=1, hold=60), lambda _: load.interrupt())
        async with asyncio.timeout(10):
            await load.run()
        report = Report(target, Dialect(), load.shape, load.records, load.interrupted, 0.0)
        assert report.total.completed == 32
        assert deployment.events == ["disconnect: client disconnect"] * 32
    assert report.verdict.startswith("interrupted: 32 of 32 sessions had ended")
    assert json.loads(json.dumps(report.as_json()))["sticky"] is None
