"""What a client may send: checks of payloads and packets where python-engineio and python-socketio let errors pass.

Both log an error in what a client sends and go on: a POST is answered with OK though its packets are gone, and a
client that waits for its place in a namespace waits for ever. Here an error is raised, and whoever calls ends the
session, so that the client knows. Rules: Engine.IO protocol revision 4, Socket.IO protocol revision 5.
"""

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import socketio
from engineio.packet import Packet as EnginePacket
from socketio.packet import ACK, BINARY_ACK, BINARY_EVENT, CONNECT, DISCONNECT, EVENT

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = logging.getLogger(__name__)

SEPARATOR = "\x1e"
FROM_CLIENT = frozenset("134b")
"""How a client's packets begin: CLOSE, PONG, MESSAGE, and a binary MESSAGE in base64."""
LIFECYCLE_EVENTS = ("connect", "disconnect")
"""An application handles them like events of a client, and no client may send them."""
UNKNOWN_NAMESPACE = {"message": "Invalid namespace"}
ATTACHMENTS = 10
"""How many messages of the largest size the attachments of one event may fill: socket.io takes 10 attachments."""
ATTACHMENT_BYTES = 100
"""What an attachment takes beside its content: empty ones take room as well."""


class TooLongError(ValueError):
    """A body is longer than `maxPayload`, which every client is told."""


class HandlerError(Exception):
    """The application's connect handler has failed, and the client is in none of the namespaces that it asked for."""


def body_of(environ: "WSGIEnvironment", longest: int) -> str:
    """Return the body of a POST, also of one without Content-Length (chunked); `longest` is in bytes.

    Raises:
        TooLongError: it is longer.
        ValueError: it ended before its length was reached, or is not UTF-8.
        Exception: what the server raises for a connection that is lost or chunks that are none.
    """
    declared = environ.get("CONTENT_LENGTH")
    if not declared and not environ.get("wsgi.input_terminated"):
        return ""  # PEP 3333: nothing says where it would end
    length = int(declared) if declared else longest + 1
    if declared and length > longest:
        raise TooLongError
    body: bytes = environ["wsgi.input"].read(length)
    if len(body) > longest:
        raise TooLongError
    if declared and len(body) < length:
        raise ValueError("the body has ended early")
    return body.decode()


def packets_of(body: str) -> Iterator[EnginePacket]:
    """Return a payload's packets; none of an empty one. There may be as many as find room in it.

    Raises:
        ValueError: a client may not send one of them.
        Exception: the JSON module's, or RecursionError.
    """
    for encoded in body.split(SEPARATOR) if body else ():
        if encoded[:1] not in FROM_CLIENT:
            raise ValueError("not a packet of a client's")
        yield EnginePacket(encoded_packet=encoded)


def check_packets(server: socketio.Server) -> None:
    """Have a Socket.IO server raise an error for each packet that is none, and keep the application's errors apart.

    What event handlers and callbacks raise is logged; the session goes on, as it always did with `async_handlers`.
    A disconnect handler that fails no longer keeps others from running and the client from being forgotten. The names
    that begin with an underscore are those that python-socketio's own admin instrumentation replaces, and their like.
    """
    server.packet_class = _checked(server.packet_class, ATTACHMENTS * int(server.eio.max_http_buffer_size))
    manager, disconnect = server.manager, server.disconnect
    handle_connect, handle_disconnect = server._handle_connect, server._handle_disconnect
    send_packet = server._send_packet

    def forget(sid: str | None, namespace: str) -> None:
        # As python-socketio does when a handler returns.
        if sid is not None:
            manager.disconnect(sid, namespace, ignore_queue=True)

    def send_as_clients_read_it(engine_sid: str, packet: Any) -> None:  # noqa: ANN401 - python-socketio has no types
        # socket.io-client takes `message` of it, and would say "undefined" of the text that python-socketio sends.
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
    """Return a call whose errors are logged and end there."""

    def call_and_log(*args: object) -> None:
        try:
            call(*args)
        except Exception:
            log.exception(message)

    return call_and_log


def _checked(packet_class: Any, longest: int) -> Any:  # noqa: ANN401 - python-socketio has no types
    """Return a packet class that decodes only what a client may send; `longest` bounds attachments, in bytes."""

    class CheckedPacket(packet_class):
        packet_type: int

        def decode(self, encoded_packet: str | bytes) -> int:
            self.attached = 0
            attachments: int = super().decode(encoded_packet) or 0
            kind, data = self.packet_type, self.data
            if kind in {EVENT, BINARY_EVENT}:
                # Whoever says 0 attachments has nothing to be waited for.
                self.packet_type = BINARY_EVENT if attachments else EVENT
                if isinstance(data, list) and data and isinstance(data[0], str | int | float):
                    valid = data[0] not in LIFECYCLE_EVENTS
                else:
                    valid = False
            elif kind in {ACK, BINARY_ACK}:
                self.packet_type = BINARY_ACK if attachments else ACK
                # Numbers begin at 1; behind 0, python-socketio keeps the counter of a client's numbers.
                valid = isinstance(data, list) and isinstance(self.id, int) and self.id > 0
            else:
                valid = kind in {CONNECT, DISCONNECT}
            if not valid:
                raise ValueError("not a packet of a client's")
            return attachments

        def add_attachment(self, attachment: object) -> bool:
            if not isinstance(attachment, bytes):
                raise TypeError("text where an attachment is due")
            self.attached += len(attachment) + ATTACHMENT_BYTES
            if self.attached > longest:
                raise TooLongError
            return bool(super().add_attachment(attachment))

    return CheckedPacket
