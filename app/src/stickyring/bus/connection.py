"""The bus: where it is, and what a process says to it.

The commands are the same for redis-py's synchronous and asyncio clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.connection
import redis.sentinel
from redis.backoff import NoBackoff
from redis.retry import Retry

from stickyring.bus.entry import Entry
from stickyring.bus.offset import BEGIN, Position

TIMEOUT_SECONDS = 2.0
"""A bus that does not answer for so long is away."""
REPLICA_MILLISECONDS = 1000
"""How long a replica may take to have what was written."""
MOST_CONNECTIONS = 1000
"""Of a process, which keeps them. Each user who comes back needs one or two for a moment, and tries again beyond that;
redis-py by itself has 100."""
BLOCK_MILLISECONDS = 1000
AT_ONCE = 500
"""Entries that are read or written in one go."""
REMEMBERED_SECONDS = 3600
"""How long the bus knows the last number of a process that writes nothing."""
APPEND = """#!lua
-- Append entries of one origin to the stream, except those that it has: a writer repeats what got no answer.
-- KEYS: the stream, the origin's last number. ARGV: origin, first number, seconds, then for each entry the number of
-- its fields and values, and these. Returns the positions of those that are appended.
local last, positions = tonumber(redis.call('GET', KEYS[2]) or '0'), {}
local number, at = tonumber(ARGV[2]), 4
while at <= #ARGV do
  local size = tonumber(ARGV[at])
  if number > last then
    local position = redis.call('XADD', KEYS[1], '*', 'o', ARGV[1], 'q', number, unpack(ARGV, at + 1, at + size))
    table.insert(positions, position)
    last = number
  end
  at, number = at + size + 1, number + 1
end
redis.call('SET', KEYS[2], last, 'EX', ARGV[3])
return positions
"""
SAVE = """#!lua
-- Save a session, unless another process goes on with it. KEYS: the session. ARGV: the process, the session as text or
-- nothing to forget it, milliseconds for which it is kept, and 1 to take it from another process.
local owner = redis.call('HGET', KEYS[1], 'o')
if owner and owner ~= ARGV[1] and ARGV[4] ~= '1' then
  return 0
end
if ARGV[2] == '' then
  redis.call('DEL', KEYS[1])
else
  redis.call('HSET', KEYS[1], 'o', ARGV[1], 's', ARGV[2])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return 1
"""
TRIM = """#!lua flags=allow-oom
-- Remove old entries, and note the position before which some are missing. KEYS: the note, the stream. ARGV: from where
-- on entries are kept, and how many at most. Redis removes whole blocks of entries, and by itself at most 100 of them.
local removed = redis.call('XTRIM', KEYS[2], 'MINID', '~', ARGV[1], 'LIMIT', 0)
removed = removed + redis.call('XTRIM', KEYS[2], 'MAXLEN', '~', ARGV[2], 'LIMIT', 0)
if removed > 0 then
  redis.call('SET', KEYS[1], redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1][1])
end
return removed
"""
SWAP = """#!lua
-- Replace a value if it is still the expected one; return what it is then.
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[2])
end
return redis.call('GET', KEYS[1])
"""


@dataclass(frozen=True)
class Address:
    """A bus, or a part of it that one application uses alone: `name` begins all its keys."""

    url: str
    name: str

    @property
    def stream(self) -> str:
        """The key of the stream."""
        return f"{self.name}:events"

    @property
    def epoch(self) -> str:
        """The key of what names the stream's history."""
        return f"{self.name}:epoch"

    @property
    def floor(self) -> str:
        """The key of the position before which entries have been removed."""
        return f"{self.name}:floor"

    @property
    def reached(self) -> str:
        """The key of the position that a process has read last: what a replica has, if it has this."""
        return f"{self.name}:reached"

    def written(self, origin: str) -> str:
        """Return the key of the number of an origin's last entry."""
        return f"{self.name}:written:{origin}"

    @property
    def processes(self) -> str:
        """The key of the processes at the bus."""
        return f"{self.name}:processes"

    @property
    def processes_since(self) -> str:
        """The key of the time since when they are known."""
        return f"{self.name}:processes:since"

    def answers(self, question: str) -> str:
        """Return the key of the answers to a question."""
        return f"{self.name}:answers:{question}"

    def session(self, pid: str) -> str:
        """Return the key of a session that can be recovered."""
        return f"{self.name}:session:{pid}"

    @property
    def replicated(self) -> bool:
        """Whether the bus has replicas, one of which goes on if the primary fails."""
        return "+sentinel://" in self.url

    def client(self, *, asyncio: bool) -> Any:  # noqa: ANN401 - one of two classes
        """Return a client of redis-py; it connects when it is used.

        The URL is one that redis-py takes (`redis://`, `rediss://`, `unix://`, with its options), or one of Sentinels,
        as python-socketio's RedisManager takes it, also with `rediss` and with redis-py's options:
        `redis+sentinel://USER:PASSWORD@HOST:PORT,HOST:PORT/DB/SERVICE`.

        Raises:
            ValueError: the URL is none of these.
        """
        try:
            return self._client(asyncio=asyncio)
        except ValueError:
            # Its own text may have a part of the password.
            raise ValueError("the URL of the bus is not valid; write a / in its password as %2F") from None

    def _client(self, *, asyncio: bool) -> Any:  # noqa: ANN401 - one of two classes
        options: dict[str, Any] = {
            "socket_timeout": TIMEOUT_SECONDS,
            "socket_connect_timeout": TIMEOUT_SECONDS,
            "max_connections": MOST_CONNECTIONS,
            # A repeated command would be written twice, and nobody would know.
            "retry": (redis.asyncio.retry.Retry if asyncio else Retry)(NoBackoff(), 0),
        }
        if not self.replicated:
            return (redis.asyncio.Redis if asyncio else redis.Redis).from_url(self.url, **options)
        sentinels, service, login = _parse_sentinel_url(self.url)
        of_sentinels = options | {name: value for name, value in login.items() if name.startswith("ssl")}
        of_kind = redis.asyncio.sentinel if asyncio else redis.sentinel
        return of_kind.Sentinel(sentinels, sentinel_kwargs=of_sentinels).master_for(service, **options, **login)

    def add_wait(self, pipeline: Any) -> None:  # noqa: ANN401 - one of two classes
        """Have a pipeline, at its end, wait until a replica has what it writes, if the bus has replicas."""
        if self.replicated:
            pipeline.wait(1, REPLICA_MILLISECONDS)

    def confirmed(self, answers: list[Any]) -> list[Any]:
        """Return the answers to a pipeline without that to `add_wait`.

        Raises:
            redis.ConnectionError: no replica has what was written, which is lost if another one becomes the primary.
        """
        if self.replicated and not answers.pop():
            raise redis.ConnectionError("no replica of the bus follows its primary")
        return answers

    def append_keys(self, origin: str) -> list[str]:
        """Return the keys of APPEND."""
        return [self.stream, self.written(origin)]


def _parse_sentinel_url(url: str) -> tuple[list[tuple[str, int]], str, dict[str, Any]]:
    """Return the addresses of Sentinels, the name of their service, and redis-py's options for its servers."""
    parts = urlsplit(url)
    login, _, hosts = parts.netloc.rpartition("@")
    database, _, service = parts.path.strip("/").partition("/")
    sentinels = [urlsplit(f"//{host}") for host in hosts.split(",")]
    if not service or not all(one.hostname and one.port for one in sentinels):
        raise ValueError("give the URL of the bus as redis+sentinel://USER:PASSWORD@HOST:PORT,HOST:PORT/DB/SERVICE")
    scheme = parts.scheme.removesuffix("+sentinel")
    options: dict[str, Any] = redis.connection.parse_url(  # type: ignore[no-untyped-call]
        f"{scheme}://{login}@{sentinels[0].netloc}/{database}?{parts.query}"
    )
    options["ssl"] = scheme == "rediss"
    for name in ("host", "port", "connection_class"):
        options.pop(name, None)
    return [(str(one.hostname), int(one.port or 0)) for one in sentinels], service, options


def append_arguments(entries: Sequence[tuple[Entry, Sequence[str | bytes]]]) -> list[str | bytes | int]:
    """Return the arguments of APPEND for entries of one origin with consecutive numbers, and the fields of each."""
    first = entries[0][0]
    arguments: list[str | bytes | int] = [first.origin, first.number, REMEMBERED_SECONDS]
    for _, fields in entries:
        arguments += [len(fields), *fields]
    return arguments


def parsed(reply: Any) -> list[tuple[Position, Entry]]:  # noqa: ANN401 - redis-py's
    """Return the entries of an answer to XRANGE, or to XREAD of one stream."""
    if reply and isinstance(reply[0][1], list):
        reply = reply[0][1]
    return [(Position.parse(name), Entry.of(fields)) for name, fields in reply or []]


def end_of(reply: Any) -> Position:  # noqa: ANN401 - redis-py's
    """Return the position of the one entry of an answer; the beginning without one."""
    return Position.parse(reply[0][0]) if reply else BEGIN
