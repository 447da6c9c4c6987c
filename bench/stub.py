"""The stub: the cheapest server that answers the load, which shows the limit of the load itself.

It looks up the answer by the bytes of a message, and parses a message only the first time. It relies on the load to
write a frame at once and to wait for the answer. Called as `stub.py PORT [PLACE]`: the place, letters and digits,
begins each session's id, which shows which of several stubs an edge has chosen.
"""

import json
import os
import re
import select
import socket
import sys
from base64 import b64encode
from hashlib import sha1

NAME = "bench"
OPEN = '0{"sid":"%s","upgrades":["websocket"],"pingInterval":25000,"pingTimeout":20000,"maxPayload":1000000}'
JOINED = ('40{"sid":"joined"}', f'42["message","node#{NAME}: welcome"]')
CLOSE = b"\x88\x02\x03\xe8"
UPGRADE = (
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {}\r\n\r\n"
)
UNKNOWN = b'HTTP/1.1 400 BAD REQUEST\r\nContent-Length: 17\r\n\r\n"Invalid session"'
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3


def frame(text: str) -> bytes:
    """Return a server's frame of less than 65536 bytes."""
    payload = text.encode()
    size = len(payload)
    return bytes((0x81, size) if size < 126 else (0x81, 126, size >> 8, size & 0xFF)) + payload


def http(body: str) -> bytes:
    """Return an answer of HTTP."""
    return f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {len(body.encode())}\r\n\r\n{body}".encode()


class Stub:
    """Composes answers that are not yet in `known`."""

    def __init__(self, place: str) -> None:
        self.known: dict[bytes, bytes] = {}
        self._place = place
        self._opened = 0
        self._sessions: set[str] = set()
        self._parts: dict[int, bytes] = {}
        self._pending: dict[str, list[str]] = {}
        self._polls: dict[str, int] = {}
        self._upgrades: dict[int, str] = {}

    def answer(self, fd: int, data: bytes) -> bytes:
        """Return the bytes to write to the connection; empty if there is no answer yet."""
        if data[:1] in (b"G", b"P") or fd in self._parts:
            return self._when_whole(fd, self._parts.pop(fd, b"") + data)
        reply = b""
        while data:
            size = 6 + (data[1] & 0x7F)
            reply += self._frame(fd, data[:size])
            data = data[size:]
        return reply

    def forget(self, fd: int) -> None:
        """Forget a connection that has ended."""
        self._parts.pop(fd, None)
        self._upgrades.pop(fd, None)

    def _when_whole(self, fd: int, data: bytes) -> bytes:
        """Answer a request, which an edge may send in parts."""
        head, end, body = data.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if not end or (length and len(body) < int(length[1])):
            self._parts[fd] = data
            return b""
        found = re.search(rb"&sid=(\w+)", head)
        sid = found[1].decode() if found else ""
        return self._request(fd, sid, data.decode()) if not sid or sid in self._sessions else UNKNOWN

    def _request(self, fd: int, sid: str, request: str) -> bytes:
        head, _, body = request.partition("\r\n\r\n")
        if key := re.search(r"(?i)Sec-WebSocket-Key: (\S+)", head):
            accepted = UPGRADE.format(b64encode(sha1(f"{key[1]}{GUID}".encode()).digest()).decode()).encode()
            if sid:
                self._upgrades[fd] = sid
                return accepted
            return accepted + frame(self._open())
        if head.startswith("POST"):
            if body == "40":
                self._pending[sid] = list(JOINED)
            elif body == "1":
                self._sessions.discard(sid)
            return http("ok")
        if not sid:
            return http(self._open())
        if packets := self._pending.pop(sid, None):
            return http("\x1e".join(packets))
        self._polls[sid] = fd
        return b""

    def _open(self) -> str:
        self._opened += 1
        sid = f"{self._place}_{self._opened}"
        self._sessions.add(sid)
        return OPEN % sid

    def _frame(self, fd: int, data: bytes) -> bytes:
        if data[0] == 0x88:
            return CLOSE
        key, payload = data[2:6], data[6:]
        text = bytes(byte ^ key[at % 4] for at, byte in enumerate(payload)).decode()
        if text == "40":
            return b"".join(map(frame, JOINED))
        if text == "2probe":
            os.write(self._polls.pop(self._upgrades.pop(fd)), http("6"))
            return frame("3probe")
        if event := re.fullmatch(r'42(\d*)(\["message",.*)', text):
            answer = f"node#{NAME}: {json.loads(event[2])[1]}"
            reply = frame("42" + json.dumps(["message", answer], separators=(",", ":")))
            if event[1]:
                return reply + frame(f"43{event[1]}" + json.dumps([answer], separators=(",", ":")))
            self.known[data] = reply
            return reply
        return b""


def serve(port: int, place: str = "stub") -> None:
    """Serve forever."""
    listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    listener.setblocking(False)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    stub = Stub(place)
    known, read, write, accepting = stub.known, os.read, os.write, listener.fileno()
    while True:
        for fd, _ in poll.poll():
            if fd == accepting:
                client = listener.accept()[0]
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                poll.register(client, select.EPOLLIN)
                client.detach()
                continue
            try:
                data = read(fd, 4096)
                if reply := known.get(data) or (data and stub.answer(fd, data)):
                    write(fd, reply)
            except ConnectionError:
                data = b""
            if not data or reply == CLOSE:
                stub.forget(fd)
                os.close(fd)


if __name__ == "__main__":
    serve(int(sys.argv[1]), *sys.argv[2:])
