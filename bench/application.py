"""The applications of the benchmark, in plain python-socketio.

The echo is that of `stickyring.echo`, for the stock setup and for other workers. It sends `node#bench: welcome` on
connect, and for each `message` the same event with `node#bench: <text>`, which is also the acknowledgement.

The other one broadcasts over a bus, whose URL is in the environment: for each `publish` everybody gets `numbered` with
the same arguments. For `count` with the last number and a rate, everybody gets `numbered` so many times a second, with
`all`, the number, and the time at which it was due.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator

import socketio

NAME = "bench"
BUS_URL = "STICKYRING_BUS_URL"
OPTIONS = {"async_handlers": False, "always_connect": True, "cors_allowed_origins": None}
"""Those of `stickyring.echo`."""
Decorator = Callable[[Callable[..., object]], Callable[..., object]]


def stock() -> socketio.WSGIApp:
    """Return the echo with python-socketio's defaults; the installed packages decide its asynchronous mode."""
    return _application()


def tuned(async_mode: str) -> socketio.WSGIApp:
    """Return the echo with the options of `stickyring.echo`, in another asynchronous mode."""
    from stickyring.delivery import Received  # noqa: PLC0415 - not installed for the stock setup

    return _application(
        lambda server: Received(server).once,
        async_mode=async_mode,
        **OPTIONS,
    )


def asgi() -> socketio.ASGIApp:
    """Return the echo for an ASGI server, with the options of `stickyring.echo`."""
    server = socketio.AsyncServer(async_mode="asgi", **OPTIONS)

    async def welcome(sid: str, environ: dict[str, object]) -> None:
        await server.emit("message", f"node#{NAME}: welcome", to=sid)

    async def echo(sid: str, text: str) -> str:
        answer = f"node#{NAME}: {text}"
        await server.emit("message", answer, to=sid)
        return answer

    server.on("connect", welcome)
    server.on("message", echo)
    return socketio.ASGIApp(server)


def broadcasting(manager: str) -> socketio.WSGIApp:
    """Return the broadcasts on eventlet; the manager is `ours`, `ours-recovery`, or python-socketio's, `redis`."""
    from stickyring import bus  # noqa: PLC0415 - not installed for the stock setup

    theirs = manager == "redis"
    chosen = socketio.RedisManager(os.environ[BUS_URL]) if theirs else bus.manager(recovery=manager != "ours")
    server = socketio.Server(async_mode="eventlet", client_manager=chosen, **OPTIONS)

    def publish(sid: str, *values: object) -> None:
        server.emit("numbered", values)

    def run(last: int, rate: float) -> None:
        for number, due in _due(last, rate):
            server.sleep(max(0.0, due - time.time()))
            server.emit("numbered", ("all", number, due))

    def count(sid: str, last: int, rate: float) -> None:
        server.start_background_task(run, last, rate)

    server.on("publish", publish)
    server.on("count", count)
    return socketio.WSGIApp(server)


def asgi_broadcasting(manager: str) -> socketio.ASGIApp:
    """Return the same for an ASGI server."""
    from stickyring import bus  # noqa: PLC0415 - not installed for the stock setup

    theirs = manager == "redis"
    chosen = (
        socketio.AsyncRedisManager(os.environ[BUS_URL]) if theirs else bus.async_manager(recovery=manager != "ours")
    )
    server = socketio.AsyncServer(async_mode="asgi", client_manager=chosen, **OPTIONS)

    async def publish(sid: str, *values: object) -> None:
        await server.emit("numbered", values)

    async def run(last: int, rate: float) -> None:
        for number, due in _due(last, rate):
            await asyncio.sleep(max(0.0, due - time.time()))
            await server.emit("numbered", ("all", number, due))

    async def count(sid: str, last: int, rate: float) -> None:
        server.start_background_task(run, last, rate)

    server.on("publish", publish)
    server.on("count", count)
    return socketio.ASGIApp(server)


def _due(last: int, rate: float) -> Iterator[tuple[int, float]]:
    """Yield the numbers, and when each is due, whatever the ones before it took."""
    begun = time.time()
    return ((number, begun + number / rate) for number in range(1, last + 1))


def _application(
    decorator: Callable[[socketio.Server], Decorator] | None = None, **options: object
) -> socketio.WSGIApp:
    server = socketio.Server(**options)

    def welcome(sid: str, environ: dict[str, object]) -> None:
        server.emit("message", f"node#{NAME}: welcome", to=sid)

    def echo(sid: str, text: str) -> str:
        answer = f"node#{NAME}: {text}"
        server.emit("message", answer, to=sid)
        return answer

    server.on("connect", welcome)
    server.on("message", decorator(server)(echo) if decorator else echo)
    return socketio.WSGIApp(server)
