"""Events that are not lost: acknowledged, sent again until they are, and recognised when they come again.

Socket.IO delivers an event at most once: one that crosses the end of a connection is gone. It documents what to build
on that (https://socket.io/docs/v4/delivery-guarantees): the client sends an event again until it is acknowledged, and
gives it an id that stays the same. Here the id is the event's last argument, after at least one other: the string
`<sender>-<counter>` with

- sender: 16 to 64 letters and digits that the client has chosen at random (at least 64 bits) and shows to nobody else:
  who knows it can use up the numbers of its messages;
- counter: 1, 2, 3 ... in the order of the sender's messages; gaps are messages that it has given up.

A sender has one unacknowledged message at a time. `Sender` is such a client. The JavaScript client is one with its own
options `retries` and `ackTimeout`, and needs nothing from here. `Received` recognises repetitions on a node.

What is promised to such a sender:

- At least once: what has been acknowledged has been handled, and handling has ended without an exception.
- In order: a message is handled after all those of its sender that were acknowledged before; on one node, no message is
  handled before the handling of an earlier one has ended, nor after a later one.
- Once, as long as the user's sessions are on one node and its process lives: whatever becomes of connections.
- Once across a rebalance, a drain, a stop and a rolling update, if the acknowledgement is given within four seconds:
  the node writes it before it ends the session, and takes in nothing that wants one meanwhile.

A message can be handled twice, both times with its id, when the process dies between handling and acknowledgement (it
is killed if systemd stops the unit while its next process is taking its place), when the handler takes longer than that
while its user is sent to another node, when the connection is cut or the node hangs before the acknowledgement has
arrived and the user comes back on another node (a node that hung may then handle it late), and when more senders than
`Received` remembers were here, or used the same connection, in between. An application that must not do anything twice
stores the id together with the effect.

Not promised: that an event from the server arrives (Socket.IO: at most once), any order between senders, anything about
a message whose sender has given it up or is gone, nor anything to a sender with two messages under way: the earlier one
may then never be acknowledged, though none is acknowledged without having been handled.
"""

import asyncio
import functools
import itertools
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import socketio

MESSAGE_ID = re.compile(r"(?P<sender>[A-Za-z0-9]{16,64})-(?P<counter>[1-9][0-9]{0,15})")
SENDERS = 20_000
"""Twice the connections that a node takes by default. A repetition comes within seconds after the connection that it
replaces, so it is enough to remember those who were here just now."""
SENDERS_OF_A_CONNECTION = 32
"""A client is one sender, and a page may have several. One that makes senders up displaces its own only."""
ANSWER_BYTES = 64 * 1024 * 1024
"""What the acknowledgements may take in all: 3 KB for each sender, and a client can have large ones kept."""
OBJECT_BYTES = 64
"""What a value takes beside its content."""
WAITING_TURNS = 16
"""How many messages of one sender may wait for their turn: it repeats one every ten seconds or so."""
ACK_TIMEOUT_SECONDS = 10.0
"""A lost connection is noticed as such. This is for an acknowledgement that fails to come over a living one, because
the handler failed or takes long. More than the four seconds in which a node that sends its users away is silent."""


@dataclass(slots=True)
class _Turn:
    lock: threading.Lock
    users: int = 0


@dataclass(slots=True)
class _Last:
    """The last message of a sender: over which connection it came, and how many bytes the answer takes."""

    counter: int
    answer: object
    sid: str
    size: int


class Received:
    """Recognises messages that come again, of the last `senders` senders that this process has heard of.

    ::

        received = Received(server)

        @server.event
        @received.once
        def order(sid, goods, message_id=None):
            return "ordered"

    Of each sender the counter and the acknowledgement of its last message are kept, in the process's memory. One object
    may stand before several events: a sender counts all its messages together. Handlers are functions, in green threads
    or in real ones, and have to end: what else their sender sends waits for them.

    What is kept is bounded, whatever clients send: SENDERS_OF_A_CONNECTION are remembered of those that used a
    connection last, and ANSWER_BYTES of acknowledgements in all; who was not heard of for the longest time is forgotten
    first. Beyond WAITING_TURNS, a message is neither handled nor acknowledged, and its sender repeats it.
    """

    def __init__(self, server: socketio.Server, senders: int = SENDERS) -> None:
        self._not_acknowledged = server.not_handled
        self._senders = senders
        self._last: OrderedDict[str, _Last] = OrderedDict()
        self._of_connection: dict[str, dict[str, None]] = {}
        self._bytes = 0
        self._turns: dict[str, _Turn] = {}
        self._lock = threading.Lock()

    def once(self, handler: Callable[..., object]) -> Callable[..., object]:
        """Return an event handler that calls `handler` once for each id, with the id as keyword argument `message_id`.

        The id is no longer among the arguments. An event without one is handled as if there were nothing here.

        A repetition of the sender's last message gets that one's acknowledgement; while that is still being handled, it
        waits. If the handler raises, nothing is kept, and a repetition is handled. A message before the last one is
        neither handled nor acknowledged: it is late, its sender has given it up or had its acknowledgement.
        """

        @functools.wraps(handler)
        def handle(sid: str, *data: object) -> object:
            found = MESSAGE_ID.fullmatch(data[-1]) if len(data) > 1 and isinstance(data[-1], str) else None
            if found is None:
                return handler(sid, *data)
            sender, counter = found["sender"], int(found["counter"])
            with self._turn(sender) as its_turn:
                if not its_turn:
                    return self._not_acknowledged
                last = self._last.get(sender)
                if last is not None and counter < last.counter:
                    return self._not_acknowledged
                if last is not None and counter == last.counter:
                    answer = last.answer
                else:
                    answer = handler(sid, *data[:-1], message_id=data[-1])
                self._keep(sender, _Last(counter, answer, sid, _size(answer)))
                return answer

        return handle

    @contextmanager
    def _turn(self, sender: str) -> Iterator[bool]:
        """Wait until nothing of this sender is being handled, and have others wait; False if too many do already."""
        with self._lock:
            turn = self._turns.setdefault(sender, _Turn(threading.Lock()))
            takes_part = turn.users <= WAITING_TURNS
            turn.users += takes_part
        if not takes_part:
            yield False
            return
        try:
            with turn.lock:
                yield True
        finally:
            with self._lock:
                turn.users -= 1
                if not turn.users:
                    del self._turns[sender]

    def _keep(self, sender: str, last: _Last) -> None:
        with self._lock:
            if sender in self._last:
                self._forget(sender)
            self._last[sender] = last
            self._bytes += last.size
            of_connection = self._of_connection.setdefault(last.sid, {})
            of_connection[sender] = None
            if len(of_connection) > SENDERS_OF_A_CONNECTION:
                self._forget(next(iter(of_connection)))
            while len(self._last) > self._senders or (self._bytes > ANSWER_BYTES and len(self._last) > 1):
                self._forget(next(iter(self._last)))

    def _forget(self, sender: str) -> None:
        last = self._last.pop(sender)
        self._bytes -= last.size
        of_connection = self._of_connection[last.sid]
        del of_connection[sender]
        if not of_connection:
            del self._of_connection[last.sid]


def _size(answer: object) -> int:
    """Return about how many bytes an acknowledgement takes."""
    parts: Iterable[object] = ()
    if isinstance(answer, dict):
        parts = itertools.chain(answer, answer.values())
    elif isinstance(answer, list | tuple):
        parts = answer
    # Not sys.getsizeof(), which PyPy does not have.
    return OBJECT_BYTES + (len(answer) if isinstance(answer, str | bytes) else 0) + sum(map(_size, parts))


class Sender:
    """Sends messages through a `socketio.AsyncClient` until each is acknowledged, in order, one at a time.

    The client connects and reconnects as it always does, and has its default namespace; the sender watches it through
    public names of python-engineio's client: `on()` and `handlers`. `repeated` counts the repetitions.
    """

    def __init__(self, client: socketio.AsyncClient, *, ack_timeout: float = ACK_TIMEOUT_SECONDS) -> None:
        self._client = client
        self._ack_timeout = ack_timeout
        self._name = secrets.token_hex(16)
        self._counter = 0
        self._turn = asyncio.Lock()
        self._dropped: asyncio.Future[None] | None = None
        self._ended = False
        # Set while connected, and when waiting for that is in vain.
        self._settled = asyncio.Event()
        self.repeated = 0
        self._watch()

    async def send(self, event: str, data: object = None) -> Any:  # noqa: ANN401 - the application's
        """Send an event, and return its acknowledgement: None, a value, or a tuple of several.

        `data` is as for `AsyncClient.emit`, and the id follows it. The message is sent again as soon as a lost
        connection is back, and every `ack_timeout` seconds on one that lives. There is no other limit: bound it with
        `asyncio.timeout`. One that was cancelled is given up, and may have been handled or not.

        Raises:
            socketio.exceptions.DisconnectedError: the client was disconnected on purpose, or gave up reconnecting.
        """
        arguments = data if isinstance(data, tuple) and data else (data,)
        async with self._turn:
            self._counter += 1
            message = (*arguments, f"{self._name}-{self._counter}")
            answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

            def acknowledge(*answer: object) -> None:
                # A second one is that of a repetition.
                if not answered.done():
                    answered.set_result(answer if len(answer) > 1 else next(iter(answer), None))

            for repetition in itertools.count():
                await self._settled.wait()
                if self._ended:
                    raise socketio.exceptions.DisconnectedError
                self.repeated += repetition > 0
                self._dropped = asyncio.get_running_loop().create_future()
                await self._client.emit(event, message, callback=acknowledge)
                await asyncio.wait(
                    (answered, self._dropped), timeout=self._ack_timeout, return_when=asyncio.FIRST_COMPLETED
                )
                if answered.done():
                    break
            return answered.result()

    def _watch(self) -> None:
        """Put watching behind what the Socket.IO client does at the engine's events: its handlers are the user's."""
        client, engine = self._client, self._client.eio
        message, disconnect = engine.handlers["message"], engine.handlers["disconnect"]

        def note_connection() -> None:
            if "/" in client.namespaces:
                self._ended = False
                self._settled.set()

        async def on_message(data: object) -> None:
            await message(data)
            note_connection()

        async def on_disconnect(reason: str) -> None:
            await disconnect(reason)
            if not self._ended:
                self._settled.clear()
            if self._dropped is not None and not self._dropped.done():
                self._dropped.set_result(None)

        def on_end() -> None:
            self._ended = True
            self._settled.set()

        engine.on("message", on_message)
        engine.on("disconnect", on_disconnect)
        # The one event that tells whether the client will come back; python-socketio's own simple client uses it.
        client.on("__disconnect_final", on_end)
        note_connection()
