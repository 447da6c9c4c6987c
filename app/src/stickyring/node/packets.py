"""What a client may send: checks of payloads and packets where python-engineio and python-socketio ignore errors.

Both log an invalid packet and go on: they answer a POST with OK although its packets are lost, and a client that joins
a namespace waits for ever. Here an error is raised, and the caller ends the session, so that the client notices.
Rules: Engine.IO protocol revision 4, Socket.IO protocol revision 5.
"""

import logging
from collections.abc import Callable, Iterator
from json import JSONDecoder, JSONEncoder
from typing import TYPE_CHECKING, Any

import engineio.json
import socketio
from engineio.packet import Packet as EnginePacket
from socketio.packet import ACK, BINARY_ACK, BINARY_EVENT, CONNECT, DISCONNECT, EVENT

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = logging.getLogger(__name__)

SEPARATOR = "\x1e"
FROM_CLIENT = frozenset("134b")
"""First characters of a client's packets: CLOSE, PONG, MESSAGE, and a binary MESSAGE in base64."""
LIFECYCLE_EVENTS = ("connect", "disconnect")
"""Applications handle these like a client's events, but no client may send them."""
UNKNOWN_NAMESPACE = {"message": "Invalid namespace"}
ATTACHMENTS = 10
"""The attachments of one event may take as much as this many messages of the largest size; socket.io allows 10."""
LONGEST_INT = 100
ATTACHMENT_BYTES = 100
"""Memory of an attachment beside its content: empty ones need some too."""


class TooLongError(ValueError):
    """A body is longer than `maxPayload`, which the handshake announces."""


class HandlerError(Exception):
    """The application's connect handler raised an exception, so the client did not join the namespace."""


def body_of(environ: "WSGIEnvironment", longest: int) -> str:
    """Return the body of a POST, with Content-Length or chunked; `longest` is in bytes.

    Raises:
        TooLongError: it is longer.
        ValueError: it is shorter than its Content-Length, or not UTF-8.
        Exception: the server's error for a lost connection or invalid chunks.
    """
    declared = environ.get("CONTENT_LENGTH")
    if not declared and not environ.get("wsgi.input_terminated"):
        return ""  # PEP 3333: without a length there is no body
    length = int(declared) if declared else longest + 1
    if declared and length > longest:
        raise TooLongError
    return checked_body(environ, environ["wsgi.input"].read(length), longest)


def checked_body(environ: "WSGIEnvironment", body: bytes, longest: int) -> str:
    """Return a body that was read, of which `longest` bytes are allowed.

    Raises:
        TooLongError: it is longer.
        ValueError: it is shorter than its Content-Length, or not UTF-8.
    """
    if len(body) > longest:
        raise TooLongError
    if (declared := environ.get("CONTENT_LENGTH")) and len(body) < int(declared):
        raise ValueError("the body is shorter than its Content-Length")
    return body.decode()


def packets_of(body: str) -> Iterator[EnginePacket]:
    """Return a payload's packets, however many; none for an empty payload.

    Raises:
        ValueError: a client may not send one of them.
        Exception: an error of the JSON module, or RecursionError.
    """
    for encoded in body.split(SEPARATOR) if body else ():
        if encoded[:1] not in FROM_CLIENT:
            raise ValueError("not a packet that a client may send")
        yield EnginePacket(encoded_packet=encoded)


def check_packets(server: socketio.Server) -> None:
    """Make a Socket.IO server raise an error for each invalid packet, and isolate errors of the application.

    Exceptions of event handlers and callbacks are logged, and the session goes on, as with `async_handlers`. If a
    disconnect handler fails, the other ones still run and the client is removed. The replaced private names are mostly
    those that python-socketio's own admin instrumentation replaces.
    """
    server.packet_class = checked(server.packet_class, ATTACHMENTS * int(server.eio.max_http_buffer_size))
    manager, disconnect = server.manager, server.disconnect
    handle_connect, handle_disconnect = server._handle_connect, server._handle_disconnect
    send_packet = server._send_packet

    def forget(sid: str | None, namespace: str) -> None:
        # As python-socketio does after a handler returns.
        if sid is not None:
            manager.disconnect(sid, namespace, ignore_queue=True)

    def send_as_clients_read_it(engine_sid: str, packet: Any) -> None:  # noqa: ANN401 - python-socketio has no types
        # socket.io-client reads `message` of an object; of python-socketio's plain text it would show "undefined".
        if packet.packet_type == socketio.packet.CONNECT_ERROR and isinstance(packet.data, str):
            packet.data = UNKNOWN_NAMESPACE
        send_packet(engine_sid, packet)

    def connect_or_raise(engine_sid: str, namespace: str | None, data: object) -> None:
        try:
            handle_connect(engine_sid, namespace, data)
        except Exception as error:
            log.exception("a connect handler has failed")
            forget(manager.sid_from_eio_sid(engine_sid, namespace or "/"), namespace or "/")
            raise HandlerError from error

    def handle_disconnect_and_forget(engine_sid: str, namespace: str | None, reason: str | None = None) -> None:
        try:
            handle_disconnect(engine_sid, namespace, reason)
        except Exception:
            log.exception("a disconnect handler has failed")
            forget(manager.sid_from_eio_sid(engine_sid, namespace or "/"), namespace or "/")

    def disconnect_and_forget(sid: str, namespace: str | None = None, ignore_queue: bool = False) -> None:
        try:
            disconnect(sid, namespace=namespace, ignore_queue=ignore_queue)
        except Exception:
            forget(sid, namespace or "/")
            raise

    server.disconnect, server._send_packet = disconnect_and_forget, send_as_clients_read_it
    server._handle_connect, server._handle_disconnect = connect_or_raise, handle_disconnect_and_forget
    server._handle_event_internal = _logging("an event handler has failed", server._handle_event_internal)
    server._handle_ack = _logging("the callback of an acknowledgement has failed", server._handle_ack)


def _logging(message: str, call: Callable[..., object]) -> Callable[..., None]:
    """Return a function that calls `call`, and logs `message` if it raises."""

    def call_and_log(*args: object) -> None:
        try:
            call(*args)
        except Exception:
            log.exception(message)

    return call_and_log


def _bounded_int(digits: str) -> int:
    # As python-engineio: to convert longer ones would take too long.
    if len(digits) > LONGEST_INT:
        raise ValueError("too large an integer")
    return int(digits)


class Json:
    """What packets use of `engineio.json`, with a decoder and an encoder that are not made again for each packet."""

    loads = JSONDecoder(parse_int=_bounded_int).decode
    _encode = JSONEncoder(separators=(",", ":")).encode

    @classmethod
    def dumps(cls, data: object, separators: tuple[str, str]) -> str:
        """Return the JSON text; packets never ask for other separators."""
        return cls._encode(data)


def _is_plain(packet_class: Any) -> bool:  # noqa: ANN401 - python-socketio has no types
    """Return whether packets are encoded and decoded by python-socketio's own code, with its default JSON module."""
    plain = socketio.packet.Packet
    return packet_class.json is engineio.json and all(
        getattr(packet_class, name) is getattr(plain, name) for name in ("encode", "decode")
    )


def checked(packet_class: Any, longest: int) -> Any:  # noqa: ANN401 - python-socketio has no types
    """Return a packet class that decodes only what a client may send; `longest` bounds its attachments, in bytes."""

    class CheckedPacket(packet_class):
        packet_type: int
        json = Json if _is_plain(packet_class) else packet_class.json

        def decode(self, encoded_packet: str | bytes) -> int:
            self.attached = 0
            attachments: int = super().decode(encoded_packet) or 0
            kind, data = self.packet_type, self.data
            if kind in {EVENT, BINARY_EVENT}:
                # With 0 attachments there is nothing to wait for.
                self.packet_type = BINARY_EVENT if attachments else EVENT
                if isinstance(data, list) and data and isinstance(data[0], str | int | float):
                    valid = data[0] not in LIFECYCLE_EVENTS
                else:
                    valid = False
            elif kind in {ACK, BINARY_ACK}:
                self.packet_type = BINARY_ACK if attachments else ACK
                # Ids begin at 1; under id 0, python-socketio keeps its counter of a client's ids.
                valid = isinstance(data, list) and isinstance(self.id, int) and self.id > 0
            else:
                valid = kind in {CONNECT, DISCONNECT}
            if not valid:
                raise ValueError("not a packet that a client may send")
            return attachments

        def add_attachment(self, attachment: object) -> bool:
            if not isinstance(attachment, bytes):
                raise TypeError("text instead of an attachment")
            self.attached += len(attachment) + ATTACHMENT_BYTES
            if self.attached > longest:
                raise TooLongError
            return bool(super().add_attachment(attachment))

    return CheckedPacket
