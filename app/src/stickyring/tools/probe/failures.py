"""Why a session failed, in fixed words, so that causes can be counted."""

import asyncio
import errno
import json

import aiohttp

INVALID_SESSION = "Invalid session"
TWO_NODES = "answered by two nodes"
LOGIN_REFUSED = "login refused"
NO_NAMESPACE = ("Unable to connect", "Invalid namespace")
"""How python-socketio and Socket.IO on Node.js refuse a namespace that they do not have."""
LONGEST = 120


class Failure(Exception):
    """A session ended before it was complete; the text is its cause."""


class Rejected(Failure):
    """The application rejected the login or the namespace of a session; it will do so again."""


def connect_refusal(namespace: str, content: object) -> Rejected:
    """Return the failure for a CONNECT_ERROR, whose content is an object with `message` or any other JSON."""
    if isinstance(content, dict):
        content = content.get("message", content)
    if content in NO_NAMESPACE:
        return Rejected(f"the application has no namespace {namespace}: {content}"[:LONGEST])
    return Rejected(f"{LOGIN_REFUSED}: {' '.join(str(content).split())}"[:LONGEST])


def refusal(status: int, body: str) -> Failure:
    """Return the failure for an HTTP answer other than 200 or 101.

    For an unknown session, python-engineio answers 400 `"Invalid session <sid>"`, and Engine.IO on Node.js 400
    `{"code":1,"message":"Session ID unknown"}`. Both mean that the request reached another node.
    """
    if status == 400 and (INVALID_SESSION in body or "Session ID unknown" in body):
        return Failure(INVALID_SESSION)
    if 300 <= status < 400:
        return Failure(f"HTTP {status} (a redirect, not followed)")
    words = explanation(body) if status in (400, 401, 403) else ""
    text = f"HTTP {status}: {words}" if words else f"HTTP {status}"
    return Rejected(f"{LOGIN_REFUSED}: {text}") if status == 401 else Failure(text)


def explanation(body: str) -> str:
    """Return the text of an error body, at most 80 characters.

    The body is a JSON string, or an object with `message` as in Engine.IO, or `error` or `detail` as in web frameworks,
    or plain text. A page of HTML has no text worth a line.
    """
    try:
        content = json.loads(body)
    except ValueError:
        content = "" if body.lstrip().startswith(("<", "{", "[")) else body
    if isinstance(content, dict):
        content = next((content[name] for name in ("message", "error", "detail") if name in content), "")
    return " ".join(str(content).split())[:80]


def cause(error: BaseException, stage: str) -> str:
    """Return the cause of an exception of aiohttp, asyncio or this package; `stage` is the step that failed."""
    match error:
        case Failure():
            text = str(error)
        case asyncio.TimeoutError():
            text = f"timeout ({stage})"
        case aiohttp.ClientConnectorCertificateError():
            reason = getattr(error.certificate_error, "verify_message", error.certificate_error)
            text = f"TLS certificate not accepted: {reason}"
        case aiohttp.ClientSSLError():
            text = f"TLS: {error.os_error.strerror or error.os_error}"
        case aiohttp.WSServerHandshakeError():
            text = f"websocket handshake: HTTP {error.status}, {error.message}"
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError():
            text = "connection closed without an answer"
        case OSError():
            text = os_cause(error)
        case _:
            text = f"{type(error).__name__}: {error}"
    return text[:LONGEST]


def os_cause(error: OSError) -> str:
    """Return the cause of an operating system error of a connection."""
    match error.errno:
        case errno.ECONNREFUSED:
            return "connection refused"
        case errno.ECONNRESET | errno.EPIPE:
            return "connection reset"
        case errno.EMFILE | errno.ENFILE:
            return "too many open files here (raise `ulimit -n` or lower --concurrency)"
        case errno.EADDRNOTAVAIL:
            return "no free local port here"
        case _:
            return error.strerror or str(error)
