"""The load guard: which targets the probe may put load on, and the one address that it connects to."""

import asyncio
import ipaddress
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

LAB_BRIDGE = re.compile(r"stickyring\d+")
"""The device of a lab (role stickyring_lab): stickyring0, stickyring1, ..."""
DEFAULT_PORTS = {"http": 80, "https": 443}

Resolve = Callable[[str, int], Sequence[str]]
Route = Callable[[str], dict[str, Any] | None]


class TargetError(Exception):
    """The target cannot be used; the text is one line for the user."""


class NothingListensError(TargetError):
    """The target is allowed, but nothing accepts a connection there."""


@dataclass(frozen=True)
class Target:
    """An allowed target: `origin` is `scheme://host[:port]`, `query` is added to every request, `address` is an IP."""

    origin: str
    host: str
    port: int
    query: str
    address: str


def resolve_name(host: str, port: int) -> list[str]:
    """Return all addresses of `host`, each once, in the system's order of preference.

    Raises:
        TargetError: the name cannot be resolved.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a valid host name"
        raise TargetError(f"cannot resolve {host}: {reason}") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def kernel_route(address: str) -> dict[str, Any] | None:
    """Return the route to `address` as `ip -j route get` prints it; None without iproute2 or a route."""
    # An unprivileged user's PATH often lacks /usr/sbin, where Debian keeps `ip`.
    command = shutil.which("ip", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))
    if command is None:
        return None
    answer = subprocess.run(
        [command, "-j", "route", "get", address], capture_output=True, text=True, check=False, timeout=5
    )
    if answer.returncode != 0:
        return None
    routes = json.loads(answer.stdout or "[]")
    return routes[0] if routes else None


def is_ours(address: str, route: Route = kernel_route) -> bool:
    """Return whether `address` is loopback or a neighbour on a lab's bridge.

    A route through a gateway on the bridge does not count: networks behind a lab host are not the lab.
    """
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return True
    found = route(address)
    return found is not None and LAB_BRIDGE.fullmatch(found.get("dev", "")) is not None and "gateway" not in found


def parse(url: str) -> SplitResult:
    """Split and check a target URL: scheme, host, port, query, no path (that is `--path`), no fragment.

    Raises:
        TargetError: the URL is not valid.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise TargetError(f"bad URL {url}: {error}") from error
    if parts.scheme not in DEFAULT_PORTS or not url.lower().startswith(f"{parts.scheme}://"):
        raise TargetError(f"bad URL {url}: it must start with http:// or https://")
    if not parts.hostname or port == 0:
        raise TargetError(f"bad URL {url}: no host" if not parts.hostname else f"bad URL {url}: port 0")
    if parts.username is not None:
        raise TargetError(f"bad URL {url}: user names in URLs are not supported")
    if not url.isascii() or any(character <= " " for character in url):
        raise TargetError(f"bad URL {url}: percent-encode all characters that are not printable ASCII")
    if parts.path not in ("", "/") or parts.fragment:
        raise TargetError(f"bad URL {url}: give only scheme, host and port, and the Socket.IO path with --path")
    return parts


async def judge(
    url: str, *, owned: bool, timeout: float, resolve: Resolve = resolve_name, route: Route = kernel_route
) -> Target:
    """Decide whether load may be put on `url`, and choose the address to connect to.

    Every address of the name must be loopback or on a lab's bridge, unless the user says `owned`. The first address
    that accepts a connection within `timeout` seconds is used for the whole run, so the name is resolved only once.

    Raises:
        TargetError: no load is allowed there, or the URL is not valid.
        NothingListensError: no address accepts a connection.
    """
    parts = parse(url)
    host = parts.hostname or ""
    port = parts.port or DEFAULT_PORTS[parts.scheme]
    addresses = await asyncio.to_thread(resolve, host, port)
    if not owned:
        for address in addresses:
            if not await asyncio.to_thread(is_ours, address, route):
                where = host if address == host else f"{host} ({address})"
                raise TargetError(
                    f"{where} is neither loopback nor on the bridge of a lab (stickyring0): "
                    "use --i-own-this-target to put load on it"
                )
    failures: list[str] = []
    for address in addresses:
        try:
            async with asyncio.timeout(timeout):
                _, writer = await asyncio.open_connection(address, port)
        except ConnectionRefusedError:
            failures.append(f"{address}: refused")
        except TimeoutError:
            failures.append(f"{address}: no answer in {timeout:g} s")
        except OSError as error:
            failures.append(f"{address}: {error.strerror or error}")
        else:
            writer.close()
            return Target(f"{parts.scheme}://{parts.netloc}", host, port, parts.query, address)
    raise NothingListensError(f"nothing listens on {host} port {port} ({'; '.join(failures)})")
