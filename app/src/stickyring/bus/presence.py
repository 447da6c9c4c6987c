"""Which processes are at the bus, and the question to all of them who is in a room."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis

from stickyring.bus.entry import WHO, Entry
from stickyring.bus.waiting import settle

if TYPE_CHECKING:
    from stickyring.bus.stream import Stream

log = logging.getLogger(__name__)

LIFE_SECONDS = 60.0
"""A process that has given no sign of life for so long has ended. Its clients have left before: they wait for 45 s
(`ping_interval` and `ping_timeout` of Socket.IO)."""
PAUSE_SECONDS = 10.0
"""If nobody has given a sign for so long, the bus was away, which makes nobody older. Each gives one every 5 s."""
SETTLE_SECONDS = 5.0
"""When the bus was away, or is new, all that can reach it have given a sign after so long."""
LOOK_SECONDS = 0.5
ANSWERS_SECONDS = 60
SIGN = """#!lua flags=allow-oom
-- Give a sign of life, and remove processes that have given none for long. Return for how many milliseconds they are
-- known without a pause, and the processes. KEYS: the processes by their last signs, since when they are known.
-- ARGV: the process, milliseconds of a life, milliseconds of a pause.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local gap = now - tonumber(redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2] or '0')
if math.abs(gap) > tonumber(ARGV[3]) then
  for _, process in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    redis.call('ZINCRBY', KEYS[1], gap, process)
  end
  redis.call('SET', KEYS[2], now)
end
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
return {now - redis.call('GET', KEYS[2]), unpack(redis.call('ZRANGE', KEYS[1], 0, -1))}
"""


class UnansweredError(TimeoutError):
    """It is not known who is in a room: `missing` of `processes` have not answered; 0 of 0 if the bus is away."""

    def __init__(self, text: str, missing: int = 0, processes: int = 0) -> None:
        super().__init__(text)
        self.missing = missing
        self.processes = processes


class Presence:
    """Gives signs of life of a process, and asks the others.

    In the bus, a process is `<origin> <process id> <place>`. Its place is the name of its node and the namespace of its
    process id: a process at the same place, such as the one that is started in its stead, sees whether it still runs.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        name, namespace = os.environ.get("STICKYRING_NODE_NAME"), Path("/proc/self/ns/pid")
        self._place = f"{name}/{namespace.stat().st_ino}" if name and namespace.exists() else ""
        self._pid = 0

    def sign(self, pipeline: Any) -> None:  # noqa: ANN401 - one of two classes
        """Add a sign of life to a pipeline; its result is for `forget_ended`."""
        if not self._pid:
            self._pid = os.getpid()
            atexit.register(self._leave)
        keys = self._stream.address.processes, self._stream.address.processes_since
        pipeline.eval(SIGN, 2, *keys, self._process, int(LIFE_SECONDS * 1000), int(PAUSE_SECONDS * 1000))

    @property
    def _process(self) -> str:
        return f"{self._stream.outbox.origin} {self._pid} {self._place}"

    async def forget_ended(self, signed: list[Any]) -> set[str]:
        """Remove the processes of this place that have ended without a word; return the origins of the others."""
        processes = [one.decode() for one in signed[1:]]
        ended = [one for one in processes if self._has_ended(*one.split(" ", 2)[1:])]
        if ended:
            await settle(self._stream.redis.zrem(self._stream.address.processes, *ended))
        return {one.partition(" ")[0] for one in processes if one not in ended}

    def _has_ended(self, pid: str, place: str) -> bool:
        if not place or place != self._place:
            return False
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def _leave(self) -> None:
        """At the end of the process, by a client of its own, because an event loop has ended before."""
        if self._pid == os.getpid():
            with contextlib.suppress(redis.RedisError, OSError):
                self._stream.address.client(asyncio=False).zrem(self._stream.address.processes, self._process)

    async def ask(self, header: dict[str, Any], seconds: float) -> set[str]:
        """Return the sids of a room, of all processes.

        Raises:
            UnansweredError: some have not answered in time, or the bus is away.
            BusFullError: the bus is away, and too much waits for it.
        """
        stream, deadline = self._stream, time.monotonic() + seconds
        stream.start()
        if not await stream.met.wait(seconds) or stream.away_since is not None:
            raise UnansweredError("the bus is away")
        try:
            asked = await self._settled(deadline)
            question = secrets.token_hex(8)
            await stream.publish(WHO, header | {"i": question})
            found, missing = await self._answers(question, asked, deadline)
        except UnansweredError:
            raise
        except (redis.RedisError, OSError) as error:
            raise UnansweredError(f"the bus is away: {type(error).__name__}: {error}") from error
        if missing:
            text = f"{len(missing)} of {len(asked)} processes at the bus have not answered within {seconds:g} s"
            raise UnansweredError(text, len(missing), len(asked))
        return found

    async def _known(self) -> tuple[float, set[str]]:
        """Return for how many seconds processes are known, and their origins."""
        pipeline = self._stream.redis.pipeline(transaction=False)
        self.sign(pipeline)
        (signed,) = await settle(pipeline.execute())
        return signed[0] / 1000, await self.forget_ended(signed)

    async def _settled(self, deadline: float) -> set[str]:
        """Return the origins of all processes, once all have had the time to say that they are there."""
        while True:
            seconds, origins = await self._known()
            left = min(SETTLE_SECONDS - seconds, deadline - time.monotonic())
            if seconds >= SETTLE_SECONDS:
                return origins
            if left <= 0:
                raise UnansweredError("the bus is back or new, and may not know all processes yet")
            await self._stream.wait.sleep(left)

    async def _answers(self, question: str, asked: set[str], deadline: float) -> tuple[set[str], set[str]]:
        """Return the sids in the answers, and the origins of processes that run and have not answered."""
        stream, found, missing = self._stream, set[str](), {*asked}
        while missing and (left := deadline - time.monotonic()) > 0:
            waits = max(0.01, min(left, LOOK_SECONDS))
            answer = await settle(stream.redis.blpop([stream.address.answers(question)], timeout=waits))
            if answer is None:
                missing &= (await self._known())[1]
            else:
                origin, sids = json.loads(answer[1])
                found.update(sids)
                missing.discard(origin)
        return found, missing

    def answer(self, entry: Entry) -> None:
        """Answer a question: who is in the room here, at its place in the stream."""
        header = entry.header
        sids = [sid for sid, _ in self._stream.manager.get_participants(header["n"], header.get("r"))]
        self._stream.wait.spawn(self._answer(header["i"], sids))

    async def _answer(self, question: str, sids: list[str]) -> None:
        stream = self._stream
        key = stream.address.answers(question)
        pipeline = stream.redis.pipeline(transaction=True)
        pipeline.rpush(key, json.dumps([stream.outbox.origin, sids], separators=(",", ":")))
        pipeline.pexpire(key, ANSWERS_SECONDS * 1000)
        try:
            await settle(pipeline.execute())
        except (redis.RedisError, OSError) as error:
            log.warning("a question who is in a room was not answered", extra={"error": repr(error)})
