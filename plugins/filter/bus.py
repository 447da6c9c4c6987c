"""The filters for the variables of the bus."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ansible_collections.stickyring.fleet.plugins.plugin_utils.addresses import is_address
from ansible_collections.stickyring.fleet.plugins.plugin_utils.certificates import certificate_problems

SHORTEST_PASSWORD = 16
PLAIN = r"[A-Za-z0-9._~!$%&()*+,/:;<=>?@\[\]^{|}-]*"
"""What the server's configuration takes without quotes."""
PASSWORDS = {
    "password": (
        "give one of at least 16 characters, such as `openssl rand -hex 24` prints; encrypt it with Ansible Vault"
    ),
    "emitter_password": "give one of at least 16 characters, or leave it empty",
    "replication_password": "with several hosts, give one of at least 16 characters",
}
RANGES = {
    "port": (1024, 65535, "is not between 1024 and 65535"),
    "sentinel_port": (1024, 65535, "is not between 1024 and 65535"),
    "memory_mib": (64, 2**24, "is too little: 64 or more"),
    "max_connections": (100, 2**24, "is too few: 100 or more"),
}


def bus_mistakes(variables: Mapping[str, Any], pems: Mapping[str, str]) -> list[str]:
    """Return the mistakes in the role's variables, one sentence each without full stop.

    variables: those to check, by their names without the role's prefix; numbers may be texts. pems: by path, the text
    of each file of `tls` that exists on the controller.
    """
    return [f"stickyring_bus_{mistake}" for mistake in _mistakes(variables, pems)]


def _mistakes(variables: Mapping[str, Any], pems: Mapping[str, str]) -> Iterator[str]:
    peers, address = variables["peers"], variables["address"]
    yield from _password_mistakes(variables)
    for name, (low, high, fault) in RANGES.items():
        value = str(variables[name])
        if not (value.isdecimal() and low <= int(value) <= high):
            yield f"{name}: {value} {fault}"
    if peers and (len(peers) not in {1, 3} or not all(map(is_address, peers))):
        hosts = ", ".join(map(str, peers))
        yield f"peers: {hosts} are {len(peers)}. Give the addresses of one host or of three, so that two can agree"
    elif len(peers) > 1 and address not in peers:
        yield f"peers: {', '.join(peers)} are without this host's stickyring_bus_address, {address}"
    if (tls := variables["tls"]) and not {"certificate", "key"} <= set(tls):
        yield "tls: give certificate and key, and ca if it is your own"
    elif tls:
        yield from (one.removesuffix(".") for one in certificate_problems("tls.", tls, pems, address))
        if tls.get("ca") and tls["ca"] not in pems:
            yield f"tls.ca {tls['ca']} is no file on the controller"


def _password_mistakes(variables: Mapping[str, Any]) -> Iterator[str]:
    needed = {"password": True, "emitter_password": False, "replication_password": len(variables["peers"]) > 1}
    given = {name: str(variables[name]) for name in needed}
    for name, text in PASSWORDS.items():
        if 0 < len(given[name]) < SHORTEST_PASSWORD or (needed[name] and not given[name]):
            yield f"{name}: {text}"
    chosen = [one for one in given.values() if one]
    for name in ("emitter_password", "replication_password"):
        if given[name] and chosen.count(given[name]) > 1:
            yield f"{name}: give another one than to the nodes and to others"
    for account, passwords in variables["accepted_passwords"].items():
        if any(len(str(one)) < SHORTEST_PASSWORD for one in passwords):
            yield f"accepted_passwords.{account}: give passwords of at least {SHORTEST_PASSWORD} characters"
    if not re.fullmatch(PLAIN, given["replication_password"]):
        yield "replication_password: use letters, digits and -._~!$%&()*+,/:;<=>?@[]^{|}"


def bus_digests(account: tuple[str, str], accepted: Mapping[str, list[str]]) -> tuple[str, str]:
    """Return the name of an account, of which a name and a password are given, and the digests that its line lists.

    accepted: by account, the passwords that it accepts too.
    """
    name, password = account
    passwords = [password, *accepted.get(name, [])]
    return name, " ".join(f"#{hashlib.sha256(str(one).encode()).hexdigest()}" for one in passwords)


class FilterModule:
    """The role's filters."""

    def filters(self) -> dict[str, Any]:
        """Name to function."""
        return {"bus_mistakes": bus_mistakes, "bus_digests": bus_digests}
