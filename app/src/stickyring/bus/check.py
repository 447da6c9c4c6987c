"""Whether nodes can use a bus, and why it refuses or is away, in one sentence."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from typing import Any

import redis

from stickyring.bus.connection import APPEND, SAVE, SWAP, TRIM, Address

OLDEST_VERSION = 7
MEANINGS = {
    "WRONGPASS": "The bus does not accept the user and the password of its URL.",
    "NOPERM": "The user of the nodes lacks a right on the bus: {}",
    "OOM": "The memory of the bus is full.",
    "NOREPLICAS": "Too few replicas of the bus follow its primary.",
    "MasterNotFoundError": "No Sentinel knows a primary of the bus: {}",
}
"""What a refusal means, by its first word or by the name of redis-py's exception."""
EXCEPTIONS = {"AuthenticationError": "WRONGPASS", "NoPermissionError": "NOPERM", "OutOfMemoryError": "OOM"}
"""Those for which redis-py removes the first word."""


def explain(error: BaseException) -> str:
    """Return in one sentence why the bus refuses, or is away."""
    for one in _causes(error):
        if isinstance(one, ssl.SSLCertVerificationError):
            return f"The certificate of the bus is not valid: {one.verify_message}."
    kind, said = type(error).__name__, str(error).partition(" : ")[0]
    word = EXCEPTIONS.get(kind, said.partition(" ")[0])
    return MEANINGS.get(word, MEANINGS.get(kind, "The bus does not answer: {}")).format(said)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def problem_with(address: Address) -> str:
    """Do to a bus what nodes do, on keys of its own; return what is wrong in one sentence, nothing if it works."""
    client = address.client(asyncio=False)
    try:
        if address.replicated:
            _ask_sentinels(client.connection_pool.sentinel_manager.sentinels)
        version = _version_of(client)
        if int(version.partition(".")[0]) < OLDEST_VERSION:
            return f"The bus is version {version}, and {OLDEST_VERSION} or newer is needed."
        _try_commands(client, address)
    except (redis.RedisError, OSError) as error:
        return explain(error)
    finally:
        client.close()
    return ""


def _ask_sentinels(sentinels: list[Any]) -> None:
    """Ask each; if none answers, raise the reason of one, which redis-py does not raise."""
    for one in sentinels:
        try:
            one.sentinel_masters()
        except (redis.RedisError, OSError) as error:
            reason = error
        else:
            return
    raise reason


def _version_of(client: Any) -> str:  # noqa: ANN401 - redis-py's
    # HELLO needs no right.
    told = client.execute_command("HELLO")
    pairs = told.items() if isinstance(told, dict) else zip(told[::2], told[1::2], strict=True)
    version: str = dict(pairs)[b"version"].decode()
    return version


def _try_commands(client: Any, address: Address) -> None:  # noqa: ANN401 - redis-py's
    keys = stream, number, session, value, processes, answers = [
        f"{address.name}:check:{number}" for number in range(6)
    ]
    client.ping()
    client.set(value, "1", nx=True)
    client.xadd(stream, {"name": "value"})
    client.xread({stream: "0"}, count=1)
    client.xrange(stream, count=1)
    client.xrevrange(stream, count=1)
    client.xtrim(stream, maxlen=0)
    client.hset(session, "s", "")
    client.pexpire(session, 1000)
    client.time()
    client.zadd(processes, {"check": 1})
    client.zincrby(processes, 1, "check")
    client.zrange(processes, 0, -1)
    client.zrevrange(processes, 0, -1)
    client.zremrangebyscore(processes, 0, 0)
    client.zrem(processes, "check")
    client.rpush(answers, "check")
    client.blpop([answers], timeout=1)
    # After their commands, because the refusal of a script does not name the command.
    client.eval(SWAP, 1, value, "1", "2")
    client.eval(APPEND, 2, stream, number, "check", 1, 10, 2, "name", "value")
    client.eval(TRIM, 2, value, stream, "0-0", 1)
    client.eval(SAVE, 1, session, "check", "{}", 1000, 0)
    pipeline = client.pipeline(transaction=True)
    pipeline.get(value)
    pipeline.hget(session, "s")
    pipeline.execute()
    pipeline = client.pipeline(transaction=False)
    pipeline.delete(*keys)
    address.add_wait(pipeline)
    address.confirmed(pipeline.execute())
