"""Jinja filters of the node role: mistakes in its variables, and the environment file of each instance."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

from ansible_collections.stickyring.fleet.plugins.module_utils.instances import instance_name, instance_port
from ansible_collections.stickyring.fleet.plugins.module_utils.secrets import quoted, secrets_digest
from ansible_collections.stickyring.fleet.plugins.plugin_utils.addresses import is_address

# The values are used in unit files, shells, folder names and headers: no character may have a special meaning there.
TEXTS = {
    "service": (
        r"[a-z][a-z0-9-]{0,30}",
        "also names a user: use at most 31 lower-case letters, digits and hyphens, beginning with a letter",
    ),
    "application": (
        r"[A-Za-z_][\w.]*:[A-Za-z_]\w*(\([^\"\\%$\n]*\))?",
        'is neither module:attribute nor module:factory(), or contains one of " \\ % $',
    ),
    "release": (r"[A-Za-z0-9][A-Za-z0-9._+-]*", "may contain only letters, digits and . _ + -"),
    "name": (
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}",
        "may contain only letters, digits and . _ -: rename the host in the inventory, or set its stickyring_node_name",
    ),
    "worker_class": (r"[A-Za-z_][\w.:#-]*", "is no worker class in gunicorn's notation"),
    "health_path": (r"/[!-~]*", "does not begin with /, or contains other than visible ASCII characters"),
    "index_url": (r"[!-~]*", "contains other than visible ASCII characters"),
    "python": (r"python3|pypy3", "is neither python3 nor pypy3"),
    "log_level": (r"debug|info|warning|error|critical", "is none of debug, info, warning, error and critical"),
}
RANGES = {
    "instances": (1, 64),
    "port": (1024, 65535),
    "start_timeout": (1, 3600),
    "watchdog": (0, 3600),
    "proving_time": (0, 3600),
    "releases_kept": (2, 1000),
    "max_connections": (1, 2**29),
    "messages_per_second": (0, 2**31),
    "bytes_per_second": (0, 2**40),
    "sessions_per_address": (0, 2**29),
    "drain_timeout": (0, 86400),
    "limit_nofile": (1024, 2**30),
}
BOOLEANS = ("prove", "surge", "keep_surplus", "enforce_limits")
BUS_URL = r"rediss?(\+sentinel)?://[!-~]+|unix://[!-~]+|"
VARIABLE = r"[A-Za-z_]\w*"
SECRET_BYTES = 65536
"""The kernel passes no variable above 128 KiB, and systemd logs the text of a variable that it refuses."""
DESCRIPTORS_BESIDE_CONNECTIONS = 100
BEATS = 3
"""The shortest watchdog, in seconds: a process gives a sign of life every second."""


def node_mistakes(variables: dict[str, Any]) -> list[str]:
    """Return the mistakes in the role's variables that need no look at the host, one sentence each without full stop.

    variables: those to check, by their names without the role's prefix. Numbers and booleans may be texts.
    """
    return [f"stickyring_node_{mistake}" for mistake in _mistakes(variables)]


def _mistakes(variables: dict[str, Any]) -> Iterator[str]:
    for name, (pattern, fault) in TEXTS.items():
        value = variables.get(name, "")
        if name in variables and not re.fullmatch(pattern, "" if value is None else str(value), re.ASCII):
            yield f"{name} {value!r} {fault}"
    if "address" in variables and not is_address(variables["address"]):
        yield (
            f"address {variables['address']!r} is no IP address: set stickyring_address to the one at which the edge"
            " reaches the host"
        )
    edges = variables.get("edges", [])
    if not isinstance(edges, list) or not all(map(is_address, edges)):
        yield f"edges is {edges!r}: give a list of IP addresses"
    if variables.get("worker_class") == "asgi" and variables.get("python") == "pypy3":
        yield "worker_class asgi needs stickyring_node_python python3: PyPy serves only WSGI applications"
    for name in BOOLEANS:
        if str(variables.get(name, "no")).lower() not in {"true", "false", "yes", "no", "on", "off", "1", "0"}:
            yield f"{name} is {variables[name]!r}: give true or false"
    yield from _mistakes_of_numbers(variables)
    yield from _mistakes_of_the_environment("environment", variables.get("environment", {}))
    yield from _mistakes_of_the_secrets(variables.get("secrets", {}), variables.get("environment", {}))
    if not re.fullmatch(BUS_URL, str(variables.get("bus_url", "")), re.ASCII):
        # Without the value, which has a password.
        yield "bus_url is no URL of a Redis or Valkey: give redis://, rediss:// or redis+sentinel:// with host and port"


def _mistakes_of_numbers(variables: dict[str, Any]) -> Iterator[str]:
    numbers = {}
    for name, (low, high) in RANGES.items():
        value = str(variables.get(name, low))
        if re.fullmatch(r"0|[1-9][0-9]*", value) and low <= int(value) <= high:
            numbers[name] = int(value) if name in variables else None
        else:
            yield f"{name} is {variables[name]!r}: give a whole number from {low} to {high}"
    watchdog, port, instances = (numbers.get(name) for name in ("watchdog", "port", "instances"))
    if watchdog and watchdog < BEATS:
        yield f"watchdog is {watchdog}: give {BEATS} or more, or 0 to turn it off; a process signals once a second"
    if port and instances and instance_port(port, instances) > 65535:
        yield f"port {port} is too high for {instances} instances: their ports would exceed 65535"
    files, connections = numbers.get("limit_nofile"), numbers.get("max_connections")
    if files and connections and files < connections + DESCRIPTORS_BESIDE_CONNECTIONS:
        yield (
            f"limit_nofile {files} is too low for {connections} connections (stickyring_node_max_connections) and"
            f" {DESCRIPTORS_BESIDE_CONNECTIONS} other files"
        )


def _mistakes_of_the_environment(setting: str, environment: object) -> Iterator[str]:
    if not isinstance(environment, dict):
        yield f"{setting} is {environment!r}: give a dictionary, {{NAME: value}}"
        return
    for name in environment:
        if not re.fullmatch(VARIABLE, str(name), re.ASCII):
            yield f"{setting}: {name!r} cannot name an environment variable"
        elif name.startswith("STICKYRING_"):
            yield f"{setting}: {name} is reserved for the runtime: use the role's variables instead"


def _mistakes_of_the_secrets(secrets: object, environment: object) -> Iterator[str]:
    """Yield sentences that contain no value, not even of something that is no dictionary."""
    if not isinstance(secrets, dict):
        yield "secrets is no dictionary: give {NAME: value}"
        return
    yield from _mistakes_of_the_environment("secrets", secrets)
    for name, value in secrets.items():
        if isinstance(environment, dict) and name in environment:
            yield f"secrets: {name} is in stickyring_node_environment too: remove it from one of them"
        if fault := _fault_of_a_secret(value):
            yield f"secrets: {name} {fault}"


def _fault_of_a_secret(value: object) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return "is neither a text nor a number: put its value in quotes"
    text = str(value)
    if "\0" in text:
        return "contains a NUL character, which no environment variable can"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "contains characters that UTF-8 does not have: encode it, for example with base64"
    return f"has {size} bytes: {SECRET_BYTES} are the most" if size > SECRET_BYTES else None


def node_variables(
    instance: int, *, service: str, host: str, port: int, name: str, shared: dict[str, Any]
) -> dict[str, str]:
    """Return the environment variables of an instance.

    host: IP address, IPv6 in brackets. port: of instance 1. name: of the node. shared: variables that all instances
    have.
    """
    own = {
        "STICKYRING_LISTEN": f"{host}:{instance_port(port, instance)}",
        "STICKYRING_NODE_NAME": instance_name(name, instance),
        "STICKYRING_CONTROL": f"/run/{service}/{instance}/control.sock",
    }
    return own | {key: str(value) for key, value in shared.items()}


def node_environments(
    instances: list[int], *, header: str, service: str, host: str, port: int, name: str, shared: dict[str, Any]
) -> dict[str, str]:
    """Return ``{path: text}`` in the notation of systemd.exec(5), EnvironmentFile, for node_variables.

    header: a comment that opens each text.
    """

    def variables(instance: int) -> dict[str, str]:
        return node_variables(instance, service=service, host=host, port=port, name=name, shared=shared)

    return {f"/etc/{service}/{instance}.env": _text(header, variables(instance)) for instance in instances}


def _text(header: str, variables: dict[str, str]) -> str:
    lines = [header.rstrip(), *(f"{key}={quoted(value)}" for key, value in variables.items())]
    lines += ["STICKYRING_ENVIRONMENT=", ""]
    return node_with_digest("\n".join(lines), "STICKYRING_ENVIRONMENT")


def node_with_digest(text: str, variable: str) -> str:
    """Return the text with its own SHA-256 as the value of a variable that is empty in it.

    A process that starts from the text has this variable, which shows what it was started from. It is the last one of
    that name: a value of several lines before it may contain the same words.
    """
    before, name, after = text.rpartition(f"{variable}=\n")
    return f"{before}{name[:-1]}{hashlib.sha256(text.encode()).hexdigest()}\n{after}"


class FilterModule:
    """The role's filters."""

    def filters(self) -> dict[str, Any]:
        """Name to function."""
        return {
            "instance_port": instance_port,
            "node_mistakes": node_mistakes,
            "node_variables": node_variables,
            "node_environments": node_environments,
            "node_with_digest": node_with_digest,
            "node_secrets_digest": secrets_digest,
        }
