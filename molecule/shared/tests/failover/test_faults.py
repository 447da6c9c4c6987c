"""What each fault costs its users, in seconds from the last echo before it to the next; other users notice nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.request import urlopen

import pytest
from faults import EDGE, NODE, clients_cut_off, cut_off, exhausted, listens_at
from figures import keep, percentile_99
from residents import Connection, Residents

JOURNAL = "/var/log/journal"
LISTENERS = [f"listener-{number}" for number in range(30)]
USERS = [f"user-{number}" for number in range(60)]
PAUSE_SECONDS = 0.3
SETTLED_SECONDS = 60
PING_SECONDS = 25 + 20  # Engine.IO's ping interval and ping timeout


@pytest.fixture
def settle_health(ask_envoy: Any, edge: Any) -> Callable[[], None]:
    """Waits until Envoy finds every instance healthy in each cluster; clusters have health checks of their own."""
    clusters = edge.variables["stickyring_edge_clusters"]
    wanted = {(cluster["name"], one["name"]) for cluster in clusters for one in cluster["endpoints"]}

    def wait() -> None:
        deadline = time.monotonic() + SETTLED_SECONDS
        healthy: set[tuple[str, str]] = set()
        while not wanted <= healthy:
            assert time.monotonic() < deadline, wanted - healthy
            healthy = {
                (cluster["name"], member["hostname"])
                for cluster in ask_envoy(edge, "clusters?format=json")["cluster_statuses"]
                for member in cluster.get("host_statuses", [])
                if member["health_status"] == {"eds_health_status": "HEALTHY"}
            }

    return wait


@pytest.fixture
def all_healthy(settle_health: Callable[[], None]) -> None:
    settle_health()


@pytest.fixture
def residents(edge_url: Any, all_healthy: None) -> Iterator[Residents]:
    """Users who send several messages a second, each on the assigned node."""
    with Residents(edge_url("sticky"), USERS, PAUSE_SECONDS, answer=2 * PING_SECONDS) as all_of_them:
        all_of_them.settle(SETTLED_SECONDS)
        yield all_of_them
        assert not [one for one in all_of_them if one.lost]


def have_not_noticed(connections: Iterable[Connection], since: float) -> None:
    for one in connections:
        assert one.count("disconnect", since) == 0, one
        assert not [began for began in one.repeated if began >= since], one


def judge(fault: str, rounds: list[list[float]], bound: float) -> None:
    """Writes the silences of the round with the median 99th percentile, and compares that with the bound."""
    figures = keep(fault, sorted(rounds, key=percentile_99)[len(rounds) // 2], bound)
    assert figures["p99"] <= bound, figures


@contextmanager
def silences(residents: Residents, node: str, bound: float) -> Iterator[list[float]]:
    """Whatever happens to the node in the block, its users are back in time on other nodes; other users notice nothing.

    After the block, the list has the silence of each of them, in seconds.
    """
    affected = [one for one in residents if one.node == f"{node}-1"]
    others = [one for one in residents if one.node not in {f"{node}-1", ""}]
    assert len(affected) + len(others) == len(residents.connections)
    since = time.monotonic() - 2 * PAUSE_SECONDS
    costs: list[float] = []
    yield costs
    residents.wait_for_answers(since + bound, 3 * bound + SETTLED_SECONDS)
    have_not_noticed(others, since)
    costs.extend(one.silence(since) for one in affected)


@contextmanager
def fault_on_node1(residents: Residents, name: str, bound: float) -> Iterator[None]:
    with silences(residents, "node1", bound) as costs:
        yield
    judge(name, [costs], bound)


def test_a_killed_process(residents: Residents, machine: Any, settle_health: Callable[[], None]) -> None:
    """The median of three kills: the clients' own wait takes most of the bound, and one busy moment may exceed it.

    Nobody is asked to return in between: each kill finds the users where the one before it has left them.
    """
    rounds = []
    for node in ("node1", "node2", "node3"):
        settle_health()
        with silences(residents, node, 3) as costs:
            machine(node).check_output(f"systemctl kill --signal=KILL --kill-whom=all {NODE}")
        rounds.append(costs)
    judge("killed process", rounds, 3)


def test_a_hung_process(residents: Residents, machine: Any) -> None:
    """Its kernel still accepts connections and acknowledges data."""
    node1 = machine("node1")
    hung = node1.check_output(f"systemctl show {NODE} --property=MainPID --value")
    with fault_on_node1(residents, "hung process", 20):
        node1.check_output(f"systemctl kill --signal=STOP --kill-whom=all {NODE}")
    assert node1.check_output(f"systemctl show {NODE} --property=MainPID --value") != hung
    assert "watchdog" in node1.check_output(f"journalctl --unit={NODE} --no-pager --since=-2min").lower()


@pytest.fixture
def cut(machine: Any, edge: Any, nodes: Any) -> Iterator[Callable[[], None]]:
    """Cuts node1 off from the edge until the end of the test."""
    with ExitStack() as cuts:
        node1 = next(node for node in nodes if node.name == "node1")
        yield lambda: cuts.enter_context(cut_off(machine, node1, edge))


def test_a_vanished_host(residents: Residents, cut: Any) -> None:
    with fault_on_node1(residents, "vanished host", 12):
        cut()


@pytest.fixture
def listeners(edge_url: Any, all_healthy: None) -> Iterator[Residents]:
    """Users who send nothing during a test, each on the assigned node."""
    with Residents(edge_url("sticky"), LISTENERS, 10 * SETTLED_SECONDS) as silent:
        silent.settle(SETTLED_SECONDS)
        silent.wait(lambda: all(one.answers for one in silent), SETTLED_SECONDS)
        yield silent


def test_a_vanished_host_of_users_who_only_listen(listeners: Residents, cut: Any) -> None:
    """They send nothing that could stay unacknowledged: only TCP's keepalive can notice."""
    affected = [one for one in listeners if one.node == "node1-1"]
    assert affected
    since = time.monotonic()
    cut()
    listeners.wait(lambda: all(one.count("connect", since) for one in affected), PING_SECONDS)
    back = [one.first("connect", since) - since for one in affected]
    figures = keep("vanished host, of users who only listen", back, 15)
    assert figures["last"] <= figures["bound"]
    have_not_noticed([one for one in listeners if one not in affected], since)


@contextmanager
def nobody_notices(residents: Residents, seconds: float) -> Iterator[None]:
    """Whatever happens in the block, no user is disconnected in it or in so many seconds after it."""
    since = time.monotonic() - 2 * PAUSE_SECONDS
    yield
    ended = time.monotonic() + seconds
    residents.wait_for_answers(ended, SETTLED_SECONDS)
    have_not_noticed(residents, since)
    assert max(one.silence(since) for one in residents) < seconds


@pytest.fixture
def journal_disks(machine: Any, edge: Any) -> Iterator[list[Any]]:
    """The edge and node1, each with its journal on a small disk of its own."""
    hosts = [machine(edge.name), machine("node1")]
    for host in hosts:
        host.check_output(f"mount -t tmpfs -o size=16m journal {JOURNAL} && systemctl restart systemd-journald")
        # Moves the journal from memory to the disk.
        host.check_output("journalctl --flush")
        assert host.check_output(f"ls {JOURNAL}/*/system.journal"), "the journal is not on this disk"
    yield hosts
    for host in hosts:
        host.check_output(f"umount --lazy {JOURNAL} && systemctl restart systemd-journald")


def test_a_full_disk(residents: Residents, journal_disks: list[Any]) -> None:
    with nobody_notices(residents, 5):
        for host in journal_disks:
            filling = host.run(f"dd if=/dev/zero of={JOURNAL}/filling bs=4k")
            assert "No space left on device" in filling.stderr
    _, node1 = journal_disks
    with fault_on_node1(residents, "node restarted on a full disk", 5):
        node1.check_output(f"systemctl restart {NODE}")


def test_exhausted_descriptors(residents: Residents, machine: Any, nodes: Any) -> None:
    """WebSockets stay open, and the edge retries what the node refuses on the next node.

    That may include requests of a polling session. The Python client notices when its poll ends, after the ping
    interval at most, and then reconnects to a node that has descriptors.
    """
    on_websockets = [one for one in residents if one.transports == ["websocket"]]
    since = time.monotonic() - 2 * PAUSE_SECONDS
    node1 = next(node for node in nodes if node.name == "node1")
    with ExitStack() as faults, fault_on_node1(residents, "exhausted descriptors", 30):
        refusal = faults.enter_context(exhausted(machine, node1))
        assert refusal.startswith("HTTP/1.1 503 Service Unavailable\r\nx-stickyring-elsewhere: 1\r\n")
    have_not_noticed(on_websockets, since)


@pytest.fixture
def sessions(nodes: Any) -> Callable[[], int]:
    """The number of sessions on the nodes, from their metrics."""

    def count() -> int:
        total = 0
        for node in nodes:
            with urlopen("http://{}:{}/metrics".format(*listens_at(node)), timeout=10) as answer:
                lines = answer.read().decode().splitlines()
            total += sum(int(float(line.split()[-1])) for line in lines if line.startswith("stickyring_connections{"))
        return total

    return count


def test_a_cut_between_clients_and_edge(
    residents: Residents, machine: Any, edge: Any, sessions: Callable[[], int]
) -> None:
    """Clients notice the missing ping. So does the server, which ends the sessions of clients that are gone."""
    since = time.monotonic()
    with clients_cut_off(machine, edge):
        residents.wait(lambda: all(one.count("disconnect", since) for one in residents), 2 * PING_SECONDS)
        # Some clients are back before the command that ends the cut returns.
        ended = time.monotonic()
    residents.wait_for_answers(ended, SETTLED_SECONDS)
    residents.settle(SETTLED_SECONDS)
    noticed = [one.first("disconnect", since) - since for one in residents]
    back = [one.first("connect", ended) - ended for one in residents]
    for figures in (
        keep("clients cut off, noticed", noticed, PING_SECONDS + 2),
        keep("clients cut off, back", back, 15),
    ):
        assert figures["last"] <= figures["bound"], figures
    residents.wait(lambda: sessions() == len(residents.connections), PING_SECONDS)


@pytest.mark.parametrize(
    ("fault", "command"), [("restarted edge", "systemctl restart"), ("killed edge", "systemctl kill --signal=KILL")]
)
def test_an_edge_that_comes_back(residents: Residents, machine: Any, edge: Any, fault: str, command: str) -> None:
    since = time.monotonic() - 2 * PAUSE_SECONDS
    machine(edge.name).check_output(f"{command} {EDGE}")
    bound = 5
    residents.wait_for_answers(since + bound, SETTLED_SECONDS)
    judge(fault, [[one.silence(since) for one in residents]], bound)
