"""The WebSocket of a node, case by case: sections 1 to 7 and 10 of the Autobahn test suite, judged strictly.

Each case is what a client sends, piece by piece, and all frames that it gets. In cases with a protocol error, the
client sends nothing after it, so the node must reject it at once.
"""

import itertools
import socket
import struct
import threading
from collections.abc import Iterable, Sequence

import pytest

from stickyring.node.websocket import SOCKET_VARIABLE, WebSocket, frame

FINAL, CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x80, 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
RESERVED_BITS = range(0x10, 0x80, 0x10)
MASK = b"\x37\xfa\x21\x3d"
DEADLINE_SECONDS = 20
NORMAL, PROTOCOL_ERROR, NOT_UTF8 = (struct.pack("!H", status) for status in (1000, 1002, 1007))
GREEK = bytes.fromhex("cebae1bdb9cf83cebcceb5")  # 2, 3, 2, 2 and 2 octets
MIXED = "Hello-µ@ßöäüàá-UTF-8!!".encode()
BEYOND = b"\xf4\x90\x80\x80"  # the first value above Unicode's range


class Server:
    max_http_buffer_size: float = 2**20

    def start_background_task(self, *_: object) -> None:
        raise AssertionError("everything is sent at once here")


def masked(opcode: int, payload: bytes = b"", *, final: bool = True, reserved: int = 0) -> bytes:
    """A client's frame."""
    size = len(payload)
    first = opcode | reserved | (FINAL if final else 0)
    if size < 126:
        head = bytes((first, 0x80 | size))
    else:
        head = struct.pack("!BBH", first, 0xFE, size) if size < 65536 else struct.pack("!BBQ", first, 0xFF, size)
    return head + MASK + bytes(byte ^ key for byte, key in zip(payload, itertools.cycle(MASK), strict=False))


def answer(opcode: int, payload: bytes = b"") -> bytes:
    """A server's frame; for a message, its echo."""
    if opcode == TEXT:
        return frame(payload.decode())
    return frame(payload) if opcode == BINARY else bytes((FINAL | opcode, len(payload))) + payload


def chopped(data: bytes, size: int = 1) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def fragments(opcode: int, payloads: Iterable[bytes]) -> list[bytes]:
    """A message with one frame for each payload."""
    parts = [*payloads]
    return [
        masked(CONTINUATION if number else opcode, part, final=number == len(parts) - 1)
        for number, part in enumerate(parts)
    ]


def closing(payload: bytes) -> bytes:
    return masked(CLOSE, payload)


def refused(status: bytes) -> bytes:
    return answer(CLOSE, status)


BYE, CLOSED = closing(NORMAL), refused(NORMAL)
A_TEXT, ITS_ECHO = masked(TEXT, b"*" * 10), answer(TEXT, b"*" * 10)

Case = tuple[str, Sequence[bytes], Sequence[bytes]]


def echoed(name: str, sent: Sequence[bytes], *answers: bytes) -> Case:
    """A case in which the client closes after it has got all answers."""
    return name, [*sent, BYE], [*answers, CLOSED]


def framing() -> Iterable[Case]:
    for section, opcode, byte in ((1, TEXT, b"*"), (2, BINARY, b"\xfe")):
        for number, size in enumerate((0, 125, 126, 127, 128, 65535, 65536), start=1):
            payload = byte * size
            yield echoed(f"1.{section}.{number}", [masked(opcode, payload)], answer(opcode, payload))
        yield echoed(f"1.{section}.8", chopped(masked(opcode, byte * 65536), 997), answer(opcode, byte * 65536))


def pings() -> Iterable[Case]:
    for number, payload in enumerate(
        (b"", b"Hello, world!", b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff", b"\xfe" * 125), start=1
    ):
        yield echoed(f"2.{number}", [masked(PING, payload)], answer(PONG, payload))
    yield "2.5", [masked(PING, b"\xfe" * 126)], [refused(PROTOCOL_ERROR)]
    yield echoed("2.6", chopped(masked(PING, b"\xfe" * 125)), answer(PONG, b"\xfe" * 125))
    for number, payload in ((7, b""), (8, b"unsolicited")):
        yield echoed(f"2.{number}", [masked(PONG, payload)])
    yield echoed("2.9", [masked(PONG, b"unsolicited"), masked(PING, b"ping")], answer(PONG, b"ping"))
    ten = [f"payload-{number}".encode() for number in range(10)]
    sent, pongs = b"".join(masked(PING, payload) for payload in ten), [answer(PONG, payload) for payload in ten]
    yield echoed("2.10", [sent], *pongs)
    yield echoed("2.11", chopped(sent), *pongs)


def reserved_bits() -> Iterable[Case]:
    wrong = [(TEXT, b"*"), (TEXT, b"*"), (TEXT, b"*"), (TEXT, b"*"), (BINARY, b"*"), (PING, b"*"), (CLOSE, NORMAL)]
    for number, (bits, (opcode, payload)) in enumerate(zip(RESERVED_BITS, wrong, strict=True), start=1):
        pieces = [masked(opcode, payload, reserved=bits)]
        if number in {2, 3, 4}:
            pieces = [A_TEXT, *pieces, masked(PING)]
        if number == 3:
            pieces = [b"".join(pieces)]
        if number == 4:
            pieces = chopped(b"".join(pieces))
        yield f"3.{number}", pieces, [*([ITS_ECHO] if number in {2, 3, 4} else []), refused(PROTOCOL_ERROR)]


def opcodes() -> Iterable[Case]:
    for section, first in ((1, 0x3), (2, 0xB)):
        for number, opcode in enumerate(range(first, first + 5), start=1):
            wrong = masked(opcode, b"" if number in {1, 3} else b"payload")
            pieces = [wrong] if number < 3 else [A_TEXT, wrong, masked(PING)]
            if number == 5:
                pieces = chopped(b"".join(pieces))
            yield f"4.{section}.{number}", pieces, [*([] if number < 3 else [ITS_ECHO]), refused(PROTOCOL_ERROR)]


def fragmentation() -> Iterable[Case]:
    one, two = fragments(TEXT, [b"fragment1", b"fragment2"])
    ping, pong, both = masked(PING, b"ping"), answer(PONG, b"ping"), answer(TEXT, b"fragment1fragment2")
    stray, open_ended = masked(CONTINUATION, b"stray"), masked(CONTINUATION, b"stray", final=False)
    wrong = [refused(PROTOCOL_ERROR)]
    yield "5.1", fragments(PING, [b"fragment1", b"fragment2"]), wrong
    yield "5.2", fragments(PONG, [b"fragment1", b"fragment2"]), wrong
    for number, pieces in ((3, [one, two]), (4, [one + two]), (5, chopped(one + two))):
        yield echoed(f"5.{number}", pieces, both)
    for number, pieces in ((6, [one, ping, two]), (7, [one + ping + two]), (8, chopped(one + ping + two))):
        yield echoed(f"5.{number}", pieces, pong, both)
    for number, piece in ((9, stray), (12, open_ended)):
        yield f"5.{number}", [piece, A_TEXT], wrong
        yield f"5.{number + 1}", [piece + A_TEXT], wrong
        yield f"5.{number + 2}", chopped(piece + A_TEXT), wrong
    yield "5.15", [one + two + open_ended, one + two], [both, *wrong]
    for number, piece in ((16, open_ended), (17, stray)):
        yield f"5.{number}", [piece, one, two] * 2, wrong
    yield "5.18", [one, masked(TEXT, b"fragment2")], wrong
    five = fragments(TEXT, [f"fragment{number}".encode() for number in range(1, 6)])
    whole = answer(TEXT, b"fragment1fragment2fragment3fragment4fragment5")
    yield echoed("5.19", [*five[:2], ping, *five[2:4], ping, five[4]], pong, pong, whole)
    yield echoed("5.20", [b"".join([*five[:2], ping, *five[2:4], ping, five[4]])], pong, pong, whole)


def texts() -> Iterable[Case]:
    for number, parts in enumerate(([b""], [b"", b"", b""], [b"", b"middle frame payload", b""]), start=1):
        yield echoed(f"6.1.{number}", fragments(TEXT, parts), answer(TEXT, b"".join(parts)))
    in_pieces = ([MIXED], [MIXED[:12], MIXED[12:]], chopped(MIXED), chopped(GREEK))
    for number, parts in enumerate(in_pieces, start=1):
        yield echoed(f"6.2.{number}", fragments(TEXT, parts), answer(TEXT, b"".join(parts)))
    surrogate = GREEK + b"\xed\xa0\x80" + b"edited"
    yield "6.3.1", [masked(TEXT, surrogate)], [refused(NOT_UTF8)]
    # Nothing is sent after the invalid octet, so it must be rejected as soon as it arrives.
    yield "6.3.2", fragments(TEXT, chopped(surrogate))[: len(GREEK) + 2], [refused(NOT_UTF8)]
    yield "6.4.1", fragments(TEXT, [GREEK, BEYOND, b"edited"])[:2], [refused(NOT_UTF8)]
    yield "6.4.2", fragments(TEXT, [GREEK + BEYOND[:1], BEYOND[1:2], BEYOND[2:] + b"edited"])[:2], [refused(NOT_UTF8)]
    whole = masked(TEXT, GREEK + BEYOND + b"edited")
    head = len(whole) - len(GREEK + BEYOND + b"edited") + len(GREEK)
    yield "6.4.3", [whole[:head], whole[head : head + 4]], [refused(NOT_UTF8)]
    yield "6.4.4", [whole[: head + 1], whole[head + 1 : head + 2]], [refused(NOT_UTF8)]
    long = masked(TEXT, b"*" * 70_000 + BEYOND + b"*" * 70_000)
    yield "6.4 in a long message", [long[: 14 + 70_002]], [refused(NOT_UTF8)]
    late = fragments(TEXT, [b"*" * 70_001 + "ö".encode()[:1], b"**", b""])
    yield "6.4 between long fragments", [late[0], late[1][:-1]], [refused(NOT_UTF8)]


VALID = {
    "6.5": [GREEK[:size] for size in (2, 5, 7, 9, 11)],
    "6.7": [b"\0", b"\xc2\x80", b"\xe0\xa0\x80", b"\xf0\x90\x80\x80"],
    "6.9": [b"\x7f", b"\xdf\xbf", b"\xef\xbf\xbf", b"\xf4\x8f\xbf\xbf"],
    "6.11": [b"\xed\x9f\xbf", b"\xee\x80\x80", b"\xef\xbf\xbd", b"\xf4\x8f\xbf\xbf", b"\xf0\xbf\xbf\xbf"],
    "6.22": [
        *(b"\xef\xbf" + bytes([last]) for last in (0xBE, 0xBF)),
        *(chr((plane << 16) + last).encode() for plane in range(1, 17) for last in (0xFFFE, 0xFFFF)),
    ],
    "6.23": [chr(point).encode() for point in range(0xFFF9, 0xFFFE)],
}
INVALID = {
    "6.6": [GREEK[:size] for size in range(1, len(GREEK)) if size not in {2, 5, 7, 9}],
    "6.8": [b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80"],
    "6.10": [b"\xf7\xbf\xbf\xbf", b"\xfb\xbf\xbf\xbf\xbf", b"\xfd\xbf\xbf\xbf\xbf\xbf"],
    "6.12": [b"\x80", b"\xbf"],
    "6.13": [b"\x80" * size for size in range(2, 8)],
    "6.14": [bytes([lead, 0x20]) for lead in range(0xC0, 0xFE)],
    "6.15": [b"\xc0", b"\xe0\x80", b"\xf0\x80\x80", b"\xf8\x80\x80\x80", b"\xfc\x80\x80\x80\x80"],
    "6.16": [b"\xdf", b"\xef\xbf", b"\xf7\xbf\xbf", b"\xfb\xbf\xbf\xbf", b"\xfd\xbf\xbf\xbf\xbf"],
    "6.17": [b"\xfe", b"\xff", b"\xfe\xfe\xff\xff"],
    "6.18": [b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf", b"\xf8\x80\x80\x80\xaf", b"\xfc\x80\x80\x80\x80\xaf"],
    "6.19": [b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf", b"\xf8\x87\xbf\xbf\xbf", b"\xfc\x83\xbf\xbf\xbf\xbf"],
    "6.20": [b"\xc0\x80", b"\xe0\x80\x80", b"\xf0\x80\x80\x80", b"\xf8\x80\x80\x80\x80", b"\xfc\x80\x80\x80\x80\x80"],
    "6.21": [
        *(
            chr(point).encode("utf-8", "surrogatepass")
            for point in (0xD800, 0xDB7F, 0xDB80, 0xDBFF, 0xDC00, 0xDF80, 0xDFFF)
        ),
        b"\xed\xa0\x80\xed\xb0\x80",
        b"\xed\xaf\xbf\xed\xbf\xbf",
    ],
}


def utf8() -> Iterable[Case]:
    for section, payloads in VALID.items():
        for number, payload in enumerate(payloads, start=1):
            yield echoed(f"{section}.{number}", [masked(TEXT, payload)], answer(TEXT, payload))
            yield echoed(f"{section}.{number} chopped", chopped(masked(TEXT, payload)), answer(TEXT, payload))
    for section, payloads in INVALID.items():
        for number, payload in enumerate(payloads, start=1):
            yield f"{section}.{number}", [masked(TEXT, payload)], [refused(NOT_UTF8)]
            yield f"{section}.{number} in pieces", fragments(TEXT, chopped(payload)), [refused(NOT_UTF8)]


def closes() -> Iterable[Case]:
    first, last = fragments(TEXT, [b"fragment1", b"fragment2"])
    yield echoed("7.1.1", [A_TEXT], ITS_ECHO)
    yield "7.1.2", [BYE, BYE], [CLOSED]
    yield "7.1.3", [BYE, masked(PING)], [CLOSED]
    yield "7.1.4", [BYE, A_TEXT], [CLOSED]
    yield "7.1.5", [first, BYE, last], [CLOSED]
    yield (
        "7.1.6",
        [masked(TEXT, b"*" * 2**18), A_TEXT, BYE, masked(PING)],
        [answer(TEXT, b"*" * 2**18), ITS_ECHO, CLOSED],
    )
    yield "7.3.1", [closing(b"")], [CLOSED]
    yield "7.3.2", [closing(b"a")], [refused(PROTOCOL_ERROR)]
    for number, reason in ((3, b""), (4, b"Hello, world!"), (5, b"*" * 123)):
        yield f"7.3.{number}", [closing(NORMAL + reason)], [CLOSED]
    yield "7.3.6", [closing(NORMAL + b"*" * 124)], [refused(PROTOCOL_ERROR)]
    yield "7.5.1", [closing(NORMAL + GREEK + BEYOND)], [refused(NOT_UTF8)]
    statuses = (*range(1000, 1004), *range(1007, 1012), 3000, 3999, 4000, 4999)
    for number, status in enumerate(statuses, start=1):
        yield f"7.7.{number}", [closing(struct.pack("!H", status))], [refused(struct.pack("!H", status))]
    for number, status in enumerate((0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999), start=1):
        yield f"7.9.{number}", [closing(struct.pack("!H", status))], [refused(PROTOCOL_ERROR)]
    # Undefined in the suite; rejected here.
    for number, status in enumerate((5000, 65535), start=1):
        yield f"7.13.{number}", [closing(struct.pack("!H", status))], [refused(PROTOCOL_ERROR)]


def long_in_fragments() -> Iterable[Case]:
    yield echoed("10.1.1", fragments(TEXT, chopped(b"*" * 65536, 1300)), answer(TEXT, b"*" * 65536))


CASES = [
    pytest.param(sent, expected, id=name)
    for name, sent, expected in itertools.chain(
        framing(),
        pings(),
        reserved_bits(),
        opcodes(),
        fragmentation(),
        texts(),
        utf8(),
        closes(),
        long_in_fragments(),
    )
]


def echo(websocket: WebSocket) -> None:
    while (message := websocket.wait()) is not None:
        websocket.send(message)


@pytest.mark.parametrize(("sent", "expected"), CASES)
def test_case(sent: Sequence[bytes], expected: Sequence[bytes]) -> None:
    client, server = socket.socketpair()
    environ = {"HTTP_SEC_WEBSOCKET_KEY": "dGhlIHNhbXBsZSBub25jZQ==", SOCKET_VARIABLE: server}
    # In a thread, because it reads while the client sends.
    node = threading.Thread(target=WebSocket(echo, Server()), args=(environ, lambda *_: None))
    node.start()
    with client, server:
        client.settimeout(DEADLINE_SECONDS)
        received = b""
        for piece in sent:
            client.sendall(piece)
        while data := client.recv(65536):
            received += data
        client.close()
        node.join(DEADLINE_SECONDS)
    assert received.partition(b"\r\n\r\n")[2] == b"".join(expected)
