"""Why a session failed, in fixed words, so that causes can be counted."""

import asyncio
import errno
import json

import aiohttp

INVALID_SESSION = "Invalid session"
TWO_NODES = "answered by two nodes"
LONGEST = 120


class Failure(Exception):
    """A session ended before it was complete; the text is its cause."""


def refusal(status: int, body: str) -> Failure:
    """Return the failure for an HTTP answer other than 200 or 101.

    For an unknown session, python-engineio answers 400 `"Invalid session <sid>"`, and Engine.IO on Node.js 400
    `{"code":1,"message":"Session ID unknown"}`. Both mean that the request reached another node.
    """
    if status == 400 and (INVALID_SESSION in body or "Session ID unknown" in body):
        return Failure(INVALID_SESSION)
    if 300 <= status < 400:
        return Failure(f"HTTP {status} (a redirect, not followed)")
    words = explanation(body) if status == 400 else ""
    return Failure(f"HTTP {status}: {words}" if words else f"HTTP {status}")


def explanation(body: str) -> str:
    """Return the text of an Engine.IO error body (JSON string, or object with `message`), at most 80 characters."""
    try:
        content = json.loads(body)
    except ValueError:
        return ""
    if isinstance(content, dict):
        content = content.get("message", "")
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
