"""The values of the options of `stickyring probe`, checked: ids, the login, headers."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

# RFC 3986, unreserved: characters that no client or edge rewrites.
PLAIN_ID = re.compile(r"[A-Za-z0-9._~-]+")
# RFC 9110, token, and a field with a value of visible characters.
TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
HEADER = re.compile(rf"({TOKEN.pattern}):[ \t]*([\x21-\x7e][\x20-\x7e\t]*?)[ \t]*")
OWN_HEADERS = {"connection", "content-length", "content-type", "te", "trailer", "transfer-encoding", "upgrade"}
"""Headers that the probe's requests need as they are; so is `Sec-WebSocket-*`."""

STDIN = "@-"
SHORTEST_SECRET = 4
SHORTEST_PART = 8
"""A word of a header's value counts as secret from this length: `Bearer` does not."""


class Refused(click.ClickException):
    """Bad usage, reported in one line without click's usage text."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Login:
    """The payload of the connect, headers, and the texts among them that must not appear in the output."""

    auth: dict[str, Any] | None
    headers: Sequence[tuple[str, str]]
    secrets: frozenset[str]


def made_ids(prefix: str, count: int) -> list[str]:
    """Return `count` ids, PREFIX00001 and so on, the same in every run."""
    if prefix and not PLAIN_ID.fullmatch(prefix):
        raise Refused(f"--id-prefix: {prefix!r} needs percent-encoding; use letters, digits and . _ ~ -")
    return [f"{prefix}{number:05}" for number in range(1, count + 1)]


def read_ids(file: Path) -> list[str]:
    """Return the ids in `file`, one per line; empty lines are skipped."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"--ids-file: cannot read {file}: {error}") from error
    ids: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name:
            continue
        if not PLAIN_ID.fullmatch(name):
            raise Refused(f"{file}, line {number}: {name!r} needs percent-encoding; use letters, digits and . _ ~ -")
        if name in ids:
            raise Refused(f"{file}, line {number}: {name} is already on line {ids[name]}")
        ids[name] = number
    if not ids:
        raise Refused(f"{file} contains no id")
    return list(ids)


def read_login(auth: str | None, headers: Sequence[str]) -> Login:
    """Return what the options --auth and --header give: JSON or `Name: value`, or @FILE with these, or @-.

    If both read standard input, its first line is the payload of the connect. Messages never show a value.
    """
    if headers.count(STDIN) > 1:
        raise Refused(f"--header: {STDIN} can be given once")
    payload = None
    secrets: set[str] = set()
    if auth is not None:
        content = sys.stdin.readline() if auth == STDIN and STDIN in headers else content_of("--auth", auth)
        payload = read_auth(content)
        if auth.startswith("@"):
            secrets |= {text for text in texts(payload) if len(text) >= SHORTEST_SECRET}
    pairs: list[tuple[str, str]] = []
    for header in headers:
        found = list(read_headers(header))
        pairs += found
        if header.startswith("@"):
            for _, value in found:
                secrets |= {value, *(part for part in re.split(r"[\s;,=]+", value) if len(part) >= SHORTEST_PART)}
    return Login(payload, pairs, frozenset(secrets))


def content_of(option: str, value: str) -> str:
    """Return the content of @FILE or @-; any other value is the content itself."""
    if not value.startswith("@"):
        return value
    try:
        return sys.stdin.read() if value == STDIN else Path(value[1:]).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"{option}: {value[1:]} is not a text in UTF-8") from error
    except OSError as error:
        raise Refused(f"{option}: cannot read {value[1:]}: {error.strerror}") from error


def read_auth(content: str) -> dict[str, Any]:
    """Return the JSON object in `content`."""
    example = """'{"token": "..."}' for example"""
    try:
        payload = json.loads(content)
    except ValueError as error:
        raise Refused(f"--auth: not JSON ({error}): give an object, {example}") from error
    if not isinstance(payload, dict):
        raise Refused(f"--auth: not a JSON object: give {example}")
    return payload


def read_headers(value: str) -> Iterator[tuple[str, str]]:
    """Yield name and value of each header: one on the command line, or one in each line of @FILE."""
    in_file = value.startswith("@")
    for number, line in enumerate(content_of("--header", value).splitlines() if in_file else [value], 1):
        if in_file and not line.strip():
            continue
        where = f"{value[1:]}, line {number}: " if in_file else ""
        match = HEADER.fullmatch(line)
        if match is None:
            raise Refused(f"--header: {where}give 'Name: value' in ASCII")
        name = match.group(1)
        if name.lower() in OWN_HEADERS or name.lower().startswith("sec-websocket-"):
            raise Refused(f"--header: {where}the probe sets {name} itself")
        yield name, match.group(2)


def texts(value: object) -> Iterator[str]:
    """Yield every text in a JSON value, names of members excepted."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inside in value.values() if isinstance(value, dict) else value:
            yield from texts(inside)
