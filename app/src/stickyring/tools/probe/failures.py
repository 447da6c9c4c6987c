"""Why a session failed, in words that are the same each time, so that they can be counted."""

import asyncio
import errno
import json

import aiohttp

INVALID_SESSION = "Invalid session"
TWO_NODES = "answered by two nodes"
LONGEST = 120


class Failure(Exception):
    """A session ended before it was complete; the text is the cause as it is counted."""


def refusal(status: int, body: str) -> Failure:
    """The failure that an HTTP answer other than 200 or 101 stands for.

    python-engineio answers a session that it does not know with 400 `"Invalid session <sid>"`, Engine.IO on Node.js
    with 400 `{"code":1,"message":"Session ID unknown"}`: the same fact, a request that reached another node.
    """
    if status == 400 and (INVALID_SESSION in body or "Session ID unknown" in body):
        return Failure(INVALID_SESSION)
    if 300 <= status < 400:
        return Failure(f"HTTP {status} (a redirect, not followed)")
    words = explanation(body) if status == 400 else ""
    return Failure(f"HTTP {status}: {words}" if words else f"HTTP {status}")


def explanation(body: str) -> str:
    """The human part of an Engine.IO error body (JSON text, or an object with `message`), at most 80 characters."""
    try:
        content = json.loads(body)
    except ValueError:
        return ""
    if isinstance(content, dict):
        content = content.get("message", "")
    return " ".join(str(content).split())[:80]


def cause(error: BaseException, stage: str) -> str:
    """Name the cause of an exception of aiohttp, asyncio or this package; `stage` is what was under way."""
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
    """Name an operating system error of a connection."""
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
