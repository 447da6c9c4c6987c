"""The same code for asyncio and for green threads.

The bus is written with `async def`. Under asyncio its coroutines wait as any. In a green thread nothing that they await
suspends them: it blocks the thread, and `run` drives the coroutine from its first line to its last.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")


class Event(Protocol):
    """Set at most once; tasks or threads wait for it."""

    def set(self) -> None:
        """Let those go on that wait."""

    def is_set(self) -> bool:
        """Return whether it is set."""

    async def wait(self, seconds: float) -> bool:
        """Wait at most so long; return whether it is set."""


class Waiting(Protocol):
    """How the code of the bus waits, and does several things at a time."""

    asyncio: bool

    def event(self) -> Event:
        """Return a new event."""

    def lock(self) -> AbstractAsyncContextManager[object]:
        """Return a new lock."""

    def current(self) -> object:
        """Return what stands for the task or thread that runs."""

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine beside the others."""

    def function(self, method: Callable[..., Coroutine[Any, Any, Result]]) -> Callable[..., Any]:
        """Return what calls a coroutine function as the libraries of this kind call: it runs at once, or is awaited."""

    async def sleep(self, seconds: float) -> None:
        """Let others run."""


async def settle(value: Any) -> Any:  # noqa: ANN401 - of a library that has a kind for each
    """Return a value, or the result of an awaitable, of a library that returns one or the other."""
    return await value if inspect.isawaitable(value) else value


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine that nothing suspends; return its result."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: Result = end.value
        return result
    coroutine.close()
    raise RuntimeError("something was awaited that does not block")


class _AsyncEvent(asyncio.Event):
    async def wait(self, seconds: float) -> bool:  # type: ignore[override]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(super().wait(), seconds)
        return self.is_set()


class AsyncWaiting:
    """For asyncio."""

    asyncio = True

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def event(self) -> Event:
        """Return a new event."""
        return _AsyncEvent()

    def lock(self) -> AbstractAsyncContextManager[object]:
        """Return a new lock."""
        return asyncio.Lock()

    def current(self) -> object:
        """Return the task."""
        return asyncio.current_task()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in a task."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def function(self, method: Callable[..., Coroutine[Any, Any, Result]]) -> Callable[..., Any]:
        """Return the coroutine function."""
        return method

    async def sleep(self, seconds: float) -> None:
        """Let other tasks run."""
        await asyncio.sleep(seconds)


class _GreenEvent(threading.Event):
    async def wait(self, seconds: float) -> bool:  # type: ignore[override]
        return super().wait(seconds)


class _GreenLock:
    def __init__(self) -> None:
        self._lock = threading.Lock()

    async def __aenter__(self) -> None:
        self._lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


class GreenWaiting:
    """For green threads, in a process in which eventlet or gevent has patched `threading`, `time` and `socket`."""

    asyncio = False

    def __init__(self, start: Callable[..., object]) -> None:
        self._start = start

    def event(self) -> Event:
        """Return a new event."""
        return _GreenEvent()

    def lock(self) -> AbstractAsyncContextManager[object]:
        """Return a new lock."""
        return _GreenLock()

    def current(self) -> object:
        """Return the identity of the green thread."""
        return threading.get_ident()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in a green thread."""
        self._start(run, coroutine)

    def function(self, method: Callable[..., Coroutine[Any, Any, Result]]) -> Callable[..., Any]:
        """Return a function that runs the coroutine."""

        def call(*arguments: Any, **more: Any) -> Result:  # noqa: ANN401 - the coroutine's
            return run(method(*arguments, **more))

        return call

    async def sleep(self, seconds: float) -> None:
        """Let other green threads run."""
        time.sleep(seconds)
