"""The load guard, with fake answers of the resolver and the kernel."""

import asyncio
import shutil
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from stickyring.tools.probe import targets
from stickyring.tools.probe.targets import NothingListensError, TargetError, is_ours, judge, parse

ROUTES: dict[str, dict[str, Any]] = {
    "198.51.100.11": {"dst": "198.51.100.11", "dev": "stickyring0", "prefsrc": "198.51.100.1"},
    "198.51.100.99": {"dst": "198.51.100.99", "dev": "stickyring0", "gateway": "198.51.100.11"},
    "198.51.100.139": {"dst": "198.51.100.139", "dev": "stickyring1", "prefsrc": "198.51.100.129"},
    "198.51.100.140": {"dst": "198.51.100.140", "dev": "stickyring0.7", "prefsrc": "198.51.100.129"},
    "192.0.2.7": {"dst": "192.0.2.7", "dev": "eth0", "gateway": "192.0.2.1"},
}


@pytest.fixture
def port() -> Iterator[int]:
    """A port on 127.0.0.1 that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "ours"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("198.51.100.11", True),
        ("198.51.100.139", True),
        ("198.51.100.140", False),
        ("198.51.100.99", False),
        ("192.0.2.7", False),
        ("203.0.113.5", False),
        ("::ffff:192.0.2.7", False),
        ("fe80::1%eth0", False),
        ("0.0.0.0", False),
    ],
)
def test_loopback_and_neighbours_on_the_bridge_are_ours(address: str, ours: bool) -> None:
    assert is_ours(address, ROUTES.get) is ours


def test_without_iproute2_nothing_but_loopback_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert is_ours("127.0.0.1")
    assert not is_ours("198.51.100.11")


def test_the_kernel_has_a_route_to_loopback() -> None:
    route = targets.kernel_route("127.0.0.1")
    assert route is not None
    assert route["dev"] == "lo"


def judged(url: str, addresses: list[str], *, owned: bool = False) -> targets.Target:
    return asyncio.run(judge(url, owned=owned, timeout=2, resolve=lambda host, port: addresses, route=ROUTES.get))


def test_one_foreign_address_among_several_refuses_the_name(port: int) -> None:
    url = f"http://mixed.example:{port}"
    assert judged(url, ["127.0.0.1"]).address == "127.0.0.1"
    with pytest.raises(TargetError, match=r"mixed\.example \(192\.0\.2\.7\) is neither loopback nor .*stickyring0"):
        judged(url, ["127.0.0.1", "192.0.2.7"])


def test_load_is_allowed_on_an_owned_target(port: int) -> None:
    # 192.0.2.7 is second, so nothing is sent there.
    assert judged(f"http://mixed.example:{port}", ["127.0.0.1", "192.0.2.7"], owned=True).address == "127.0.0.1"


def test_the_first_address_that_listens_is_used_and_the_name_kept(port: int) -> None:
    target = judged(f"http://Lab.Example:{port}/?token=x", ["127.0.0.2", "127.0.0.1"])
    assert target == targets.Target(f"http://Lab.Example:{port}", "lab.example", port, "token=x", "127.0.0.1")


def test_nothing_listens(port: int) -> None:
    with pytest.raises(
        NothingListensError, match=rf"nothing listens on lab\.example port {port} \(127\.0\.0\.2: refused"
    ):
        judged(f"http://lab.example:{port}", ["127.0.0.2"])


def test_a_name_that_does_not_resolve() -> None:
    with pytest.raises(TargetError, match=r"cannot resolve nowhere\.invalid: "):
        asyncio.run(judge("http://nowhere.invalid", owned=True, timeout=2))


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("127.0.0.1:9002", "must start with http:// or https://"),
        ("localhost", "must start with http:// or https://"),
        ("ws://127.0.0.1:9002", "must start with http:// or https://"),
        ("http:127.0.0.1", "must start with http:// or https://"),
        ("http://", "no host"),
        ("http://127.0.0.1:99999", "[Pp]ort"),
        ("http://127.0.0.1:0", "port 0"),
        ("http://[::1", "bad URL"),
        ("http://user:secret@127.0.0.1", "user names"),
        ("http://bücher.example", "percent-encode"),
        ("http://127.0.0.1/socket.io/", "--path"),
        ("http://127.0.0.1#here", "--path"),
        ("http://127.0.0.1?a=b c", "percent-encode"),
    ],
)
def test_a_bad_url_is_refused_in_one_line(url: str, complaint: str) -> None:
    with pytest.raises(TargetError, match=complaint) as raised:
        parse(url)
    assert "\n" not in str(raised.value)
