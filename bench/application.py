"""The echo of `stickyring.echo` in plain python-socketio: for the stock setup, and for other workers.

It sends `node#bench: welcome` on connect, and for each `message` the same event with `node#bench: <text>`, which is
also the acknowledgement.
"""

from collections.abc import Callable

import socketio

NAME = "bench"
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
        async_handlers=False,
        always_connect=True,
        cors_allowed_origins=None,
    )


def asgi() -> socketio.ASGIApp:
    """Return the echo for an ASGI server, with the options of `stickyring.echo`."""
    server = socketio.AsyncServer(
        async_mode="asgi", async_handlers=False, always_connect=True, cors_allowed_origins=None
    )

    async def welcome(sid: str, environ: dict[str, object]) -> None:
        await server.emit("message", f"node#{NAME}: welcome", to=sid)

    async def echo(sid: str, text: str) -> str:
        answer = f"node#{NAME}: {text}"
        await server.emit("message", answer, to=sid)
        return answer

    server.on("connect", welcome)
    server.on("message", echo)
    return socketio.ASGIApp(server)


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
