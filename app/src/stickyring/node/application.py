"""The deployed application: how it is imported, which Socket.IO servers are in it, and why one cannot be served."""

import functools
import gc
import importlib
import inspect
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

import engineio
import gunicorn.util
import socketio
from gunicorn.errors import AppImportError
from gunicorn.workers.base import Worker

from stickyring.node.logs import one_line

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

OWN_SERVERS = ("aiohttp", "tornado")
"""Frameworks whose applications can be called, but are neither WSGI nor ASGI."""
MOST_MIDDLEWARES = 20
ASYNC_MODES = {
    "stickyring.node.worker": ("eventlet", "threading"),
    "stickyring.node.asgi.worker": ("asgi",),
    "gunicorn.workers.ggevent": ("gevent", "threading"),
}
"""The values of python-socketio's `async_mode` that work on a worker class, by its module. On eventlet, the threads of
`threading` are green."""


class CannotBeServedError(Exception):
    """Why an application cannot be served, and what to write instead, in one sentence."""


class Paths:
    """Where Socket.IO is served: `known` paths without their last slash, anywhere in a URL's path.

    The application may mount python-socketio under a prefix, or leave the path to another middleware; then the query of
    a request shows it.
    """

    def __init__(self, known: Iterable[str]) -> None:
        self.known = tuple(dict.fromkeys(known))

    def match(self, path: str, query: str) -> bool:
        """Return whether a request is for Socket.IO."""
        return any(f"{known}/" in f"{path}/" for known in self.known) or ("EIO=" in query and "transport=" in query)


@dataclass(frozen=True)
class Application:
    """An imported application, WSGI or ASGI, the Socket.IO servers in it, and their paths.

    `outer` is the name of a middleware of python-socketio, if that passes requests on to the application.
    """

    call: Any
    servers: Sequence[Any] = ()
    paths: Paths = field(default_factory=lambda: Paths(()))
    outer: str = ""

    def check_handshake(self, path: str, status: int, *, begun: bool) -> None:
        """Check its answer to a handshake; `begun`: a session has begun.

        Raises:
            CannotBeServedError: its users could not connect.
        """
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise CannotBeServedError(f"it answers a handshake on {path} with {status}")
        # Other statuses may be of a login, or of a redirection to https.
        if self.outer and not begun and (status == HTTPStatus.NOT_FOUND or status < HTTPStatus.MULTIPLE_CHOICES):
            raise CannotBeServedError(f"it has no Socket.IO, which is in the middleware around it: name {self.outer}")


def load(path: str, worker: type[Worker]) -> Application:
    """Import an application, `module:attribute` or `module:factory()`, in the process that will serve it.

    All servers and middlewares of python-socketio that exist afterwards are its own: a process serves nothing else.

    Raises:
        CannotBeServedError: the reason.
    """
    try:
        found = gunicorn.util.import_app(path)
    except (Exception, SystemExit) as error:
        raise CannotBeServedError(_cause(path, error)) from error
    asgi = bool(getattr(worker, "asgi", False))
    _check_interface(path, found, worker, asgi=asgi)
    gc.collect()
    existing = gc.get_objects()
    ours = [one for one in existing if issubclass(type(one), engineio.ASGIApp if asgi else engineio.WSGIApp)]
    middleware = "socketio.ASGIApp" if asgi else "socketio.WSGIApp"
    servers = {id(server): server for server in (one.engineio_server if asgi else one.engineio_app for one in ours)}
    for server in servers.values():
        _check_server(server, worker)
    for one in existing:
        if issubclass(type(one), socketio.Server | socketio.AsyncServer) and id(one) not in servers:
            name = type(one).__name__
            raise CannotBeServedError(
                f"it has a socketio.{name} that no {middleware} serves: write application = {middleware}(server), "
                f"or {middleware}(server, other_application)"
            )
    paths = Paths(known for one in ours if (known := (one.engineio_path or "").rstrip("/")))
    return Application(found, [*servers.values()], paths, _outer(path, found, ours))


def _outer(path: str, found: object, middlewares: Sequence[Any]) -> str:
    """Return what to name in place of `found`, if one of python-socketio's middlewares is around it."""
    module = path.partition(":")[0]
    for one in middlewares:
        if _leads_to(one.other_asgi_app if isinstance(one, engineio.ASGIApp) else one.wsgi_app, found):
            names = [name for name, value in vars(importlib.import_module(module)).items() if value is one]
            return f"{module}:{names[0]}" if names else f"the socketio.{type(one).__name__}"
    return ""


def _leads_to(outer: object, found: object) -> bool:
    """Return whether it is `found`, its bound method, or a middleware around it, most of which have an `app`."""
    for _ in range(MOST_MIDDLEWARES):
        if outer is found or getattr(outer, "__self__", None) is found:
            return True
        outer = getattr(outer, "app", None)
    return False


def try_once(path: str, application: "WSGIApplication", target: str = "/", query: str = "") -> str:
    """Let an application answer one GET, as a worker does; return the status.

    Raises:
        CannotBeServedError: it raises an exception, or what it returns is no answer.
    """
    begun: list[str] = []

    def begin(status: str, _headers: object, *_exc_info: object) -> Callable[[bytes], object]:
        begun.append(status)
        return lambda _: None

    environ: WSGIEnvironment = {"PATH_INFO": target, "QUERY_STRING": query, "REMOTE_ADDR": "127.0.0.1"}
    setup_testing_defaults(environ)
    try:
        answer = application(environ, begin)
        first: object = next(iter(answer), b"") if isinstance(answer, Iterable) else answer
        if close := getattr(answer, "close", None):
            close()
    except Exception as error:
        raise CannotBeServedError(f"it fails on a request for {target}: {describe(error)}") from error
    if first is answer:
        raise CannotBeServedError(
            f"for a request it returns an object of {type(answer).__name__}, which is no WSGI answer; "
            f"if it makes the application, write {path}()"
        )
    if not (begun and isinstance(first, bytes)):
        raise CannotBeServedError(f"its answer to a request is no WSGI answer: it begins with {first!r:.40}")
    return begun[-1]


def describe(error: BaseException) -> str:
    """Return an error in one line, with the file and line of the application that raised it."""
    if isinstance(error, AppImportError):
        return str(error)
    return f"{one_line(error)}{_place(error)}"


def _place(error: BaseException, *libraries: str) -> str:
    """Return ` (file:line)` of the innermost frame that is not in these libraries nor in what imports applications."""
    loaders = (__file__, gunicorn.util.__file__, importlib.__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in loaders
        and not frame.filename.startswith("<frozen")
        and not any(f"/{library}/" in frame.filename for library in libraries)
    ]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _cause(path: str, error: BaseException) -> str:
    """Return why an import failed; for a Socket.IO object in place of an application, what to write."""
    if isinstance(error, AppImportError) and "must be callable" in str(error):
        module, _, name = path.partition(":")
        found = getattr(importlib.import_module(module), name.partition("(")[0], None)
        if isinstance(found, socketio.Server):
            return "it is a socketio.Server: name its application, socketio.WSGIApp(server)"
        if isinstance(found, socketio.AsyncServer):
            return "it is a socketio.AsyncServer: name its application, socketio.ASGIApp(server)"
        if type(found).__module__.partition(".")[0] == "flask_socketio":
            return f"it is a {type(found).__name__} of Flask-SocketIO: name the Flask application, such as {module}:app"
        return f"it is a {type(found).__name__}, which cannot be called: name a WSGI application"
    if isinstance(error, ValueError) and str(error) == "Invalid async_mode specified":
        place = _place(error, "engineio", "socketio", "flask_socketio")
        return f"it asks for an async_mode whose package is not installed{place}: install it, or leave async_mode out"
    return describe(error)


def _check_interface(path: str, found: Callable[..., Any], worker: type[Worker], *, asgi: bool) -> None:
    if inspect.isclass(found):
        raise CannotBeServedError(f"it is a class: write {path}() to make the application")
    if (framework := type(found).__module__.partition(".")[0]) in OWN_SERVERS:
        raise CannotBeServedError(
            f"it is an application of {framework}, which only the server of {framework} can serve"
        )
    factory = f"if it makes the application, write {path}()"
    if _is_asgi(found) != asgi:
        if asgi and _accepts(found, 3) and not _accepts(found, 2):
            raise CannotBeServedError("it takes (scope, receive, send), but is no coroutine function: write async def")
        if asgi and (inspect.isroutine(found) or isinstance(found, functools.partial)) and _accepts(found, 0):
            raise CannotBeServedError(f"it is no coroutine function (scope, receive, send); {factory}")
        raise CannotBeServedError(
            f"it is {'a WSGI' if asgi else 'an ASGI'} application, which {worker.__name__} does not serve: "
            f"set stickyring_node_worker_class (--worker-class) to {'eventlet' if asgi else 'asgi'}"
        )
    if not _accepts(found, 3 if asgi else 2):
        request = "(scope, receive, send)" if asgi else "(environ, start_response)"
        raise CannotBeServedError(f"it does not take a request {request}; {factory}")


def _accepts(found: Callable[..., Any], arguments: int) -> bool:
    try:
        inspect.signature(found).bind(*([None] * arguments))
    except TypeError:
        return False
    except ValueError:  # a callable that does not tell its parameters
        pass
    return True


def _is_asgi(found: object) -> bool:
    return inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(getattr(found, "__call__", None))  # noqa: B004


def _check_server(server: object, worker: type[Worker]) -> None:
    if not isinstance(server, socketio.Server | socketio.AsyncServer):
        raise CannotBeServedError("it has an engineio.Server without Socket.IO, which nodes do not serve")
    if (allowed := ASYNC_MODES.get(worker.__module__)) is None:
        raise CannotBeServedError(
            f"it has a Socket.IO server, each of whose users would hold a thread or process of {worker.__name__}: "
            "set stickyring_node_worker_class (--worker-class) to eventlet, gevent or asgi"
        )
    if server.async_mode not in allowed:
        raise CannotBeServedError(
            f"its async_mode is {server.async_mode!r}, but {worker.__name__} needs {' or '.join(map(repr, allowed))}: "
            # python-socketio prefers eventlet, which is always installed here. An AsyncServer prefers aiohttp to asgi.
            + ("set it, or leave it out" if "eventlet" in allowed else "set it")
        )
