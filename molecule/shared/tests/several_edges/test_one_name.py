"""A name with the addresses of all edges: clients that try each of them reach another edge when one is gone."""

from __future__ import annotations

import random
import shlex
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environment
import pytest
from faults import EDGE, clients_cut_off
from lab_monitor import wait_for
from playwright.sync_api import Page, expect, sync_playwright
from residents import Connection, Residents

NAME = "edges.example"
USERS = [f"user-{number}" for number in range(24)]
PAUSE_SECONDS = 0.3
SETTLED_SECONDS = 60
PING_INTERVAL_SECONDS = 25  # Engine.IO's defaults, as the next one
PING_SECONDS = PING_INTERVAL_SECONDS + 20  # and the ping timeout


@pytest.fixture
def residents(edges: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Residents]:
    """Users who connect to the name; some of them are on each edge."""
    places = [edge.url("sticky").removeprefix("http://").split(":") for edge in edges]
    resolve = socket.getaddrinfo

    def resolve_name(host: Any, *more: Any, **options: Any) -> list[Any]:
        if host != NAME:
            return resolve(host, *more, **options)
        # In another order each time, as DNS servers answer.
        shuffled = random.sample(places, len(places))
        return [found for address, _ in shuffled for found in resolve(address, *more, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve_name)
    with Residents(f"http://{NAME}:{places[0][1]}", USERS, PAUSE_SECONDS, answer=2 * PING_SECONDS) as connected:
        connected.settle(SETTLED_SECONDS)
        yield connected
        assert not [one for one in connected if one.lost]


@pytest.fixture
def websockets(ask_envoy: Any) -> Any:
    """How many WebSockets an edge has open."""

    def count(edge: Any) -> int:
        stats = ask_envoy(edge, "stats?format=json&filter=downstream_cx_upgrades_active")["stats"]
        return sum(one["value"] for one in stats)

    return count


def disconnected(residents: Residents, since: float) -> list[Connection]:
    return [one for one in residents if one.count("disconnect", since)]


@pytest.fixture
def machines(edges: Any, machine: Any) -> Iterator[list[Any]]:
    """Those of the edges, in their order; at the end their Envoys run, with open ports."""
    found = [machine(edge.name) for edge in edges]
    yield found
    for host in found:
        host.check_output(f"systemctl start {EDGE}")
    places = [
        (edge.variables["stickyring_address"], listener["port"])
        for edge in edges
        for listener in edge.variables["stickyring_edge_listeners"]
    ]
    wait_for(lambda: all(is_open(*place) for place in places), SETTLED_SECONDS)


def is_open(address: str, port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex((address, port)) == 0


def test_before_an_edge_stops_its_users_go_to_another(
    edges: Any, residents: Residents, machines: Any, websockets: Any
) -> None:
    """As a reboot does. Users of WebSockets notice it once, and others not at all."""
    here, since = websockets(edges[1]), time.monotonic()
    machines[1].check_output(f"systemctl stop {EDGE}")
    residents.settle(SETTLED_SECONDS)
    assert 0 < len(disconnected(residents, since)) == here < len(residents.connections)
    for one in residents:
        assert one.count("disconnect", since) <= ("websocket" in one.transports), one
        assert one.count("failed", since) == 0, one


def test_users_are_asked_once_when_all_edges_change(residents: Residents, edge_play: Any) -> None:
    """Users whom the first edge asked at once could go to the second one, and be asked again.

    The nodes need not be part of the run.
    """
    since = time.monotonic()
    edge_play("-e", "stickyring_edge_request_headers_timeout=12", "--limit", "edge")
    residents.settle(SETTLED_SECONDS)
    for one in residents:
        assert one.count("disconnect", since) == ("websocket" in one.transports), one
        assert one.count("failed", since) == 0, one


def test_a_killed_edge(edges: Any, residents: Residents, machines: Any, websockets: Any) -> None:
    """A polling client whose POST fails at this edge, while its poll waits at the other, notices at the next ping.

    How many do is chance.
    """
    here, since = websockets(edges[1]), time.monotonic() - 2 * PAUSE_SECONDS
    assert here
    machines[1].check_output(f"systemctl kill --signal=KILL --kill-whom=all {EDGE}")
    bound = 5
    residents.wait_for_answers(since + bound, SETTLED_SECONDS)
    affected = disconnected(residents, since)
    assert here <= len(affected) < len(residents.connections)
    polling = [one.silence(since) for one in residents if "websocket" not in one.transports]
    assert max(one.silence(since) for one in affected if "websocket" in one.transports) <= bound
    assert max(polling) <= PING_INTERVAL_SECONDS + bound


@pytest.fixture
def page(edges: Any, tmp_path: Path) -> Iterator[Page]:
    """A browser's page, for which the name has the addresses of all edges."""
    names, program = tmp_path / "hosts", tmp_path / "chromium"
    addresses = [edge.variables["stickyring_address"] for edge in edges]
    names.write_text("".join(f"{address} {NAME}\n" for address in addresses))
    inside = f'mount --bind {shlex.quote(str(names))} /etc/hosts && exec {environment.CHROMIUM} "$@"'
    program.write_text(f'#!/bin/sh\nexec unshare --mount sh -c {shlex.quote(inside)} chromium "$@"\n')
    program.chmod(0o755)
    with sync_playwright() as playwright:
        # Chromium's own resolver takes one address of a name from that file.
        switches = [*environment.SWITCHES, "--disable-features=AsyncDns"]
        chromium = playwright.chromium.launch(executable_path=program, args=switches)
        yield chromium.new_page()
        chromium.close()


def test_a_page_reaches_another_edge(edges: Any, page: Page, machines: Any, websockets: Any) -> None:
    state, reconnects = page.get_by_test_id("state"), page.get_by_test_id("reconnects")
    before = [websockets(edge) for edge in edges]
    page.goto(f"http://{NAME}:{edges[0].url('sticky').rpartition(':')[2]}/index2.html")
    expect(page.get_by_test_id("transport")).to_have_text("websocket")
    # The resolver decides to which one it connects first.
    here = next(place for place, edge in enumerate(edges) if websockets(edge) > before[place])
    # Without the stop, systemd would start it again.
    machines[here].check_output(f"systemctl kill --signal=KILL --kill-whom=all {EDGE} && systemctl stop {EDGE}")
    expect(reconnects).not_to_have_text("0", timeout=5000)
    expect(state).to_have_text("connected", timeout=5000)
    page.get_by_label("Message").fill("over the other edge")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("log").locator(".echo").last).to_contain_text("over the other edge", timeout=5000)
    assert websockets(edges[1 - here]) == before[1 - here] + 1


@pytest.mark.soak
def test_a_vanished_edge(edges: Any, residents: Residents, machine: Any, websockets: Any) -> None:
    """Only the missing ping tells its clients, and a connection that is begun there does not delay them."""
    assert websockets(edges[1])
    since, bound = time.monotonic() - 2 * PAUSE_SECONDS, PING_SECONDS + 5
    with clients_cut_off(machine, edges[1]):
        residents.wait_for_answers(since + bound, SETTLED_SECONDS)
    affected = disconnected(residents, since)
    assert 0 < len(affected) < len(residents.connections)
    assert max(one.silence(since) for one in affected) <= bound
