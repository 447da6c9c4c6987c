"""Events that are not lost: sent again until they are acknowledged, and recognised when they are repeated.

Socket.IO delivers an event at most once: an event under way when its connection ends is lost. Its documentation says
what to build on that (https://socket.io/docs/v4/delivery-guarantees): the client gives an event an id, and sends it
with that id until it is acknowledged. Here the id is the event's last argument, after at least one other: the string
`<sender>-<counter>` with

- sender: 16 to 64 letters and digits that the client chooses at random (at least 64 bits) and keeps secret: anyone who
  knows it can use up the sender's numbers;
- counter: 1, 2, 3 ... in the order of the sender's messages; a gap is a message that the sender gave up.

A sender has one unacknowledged message at a time. `Sender` is such a client. The JavaScript client does the same with
its own options `retries` and `ackTimeout`. `Received` recognises repetitions on a node.

For each sender:

- At least once: an acknowledged message was handled, and its handler raised no exception.
- In order: a message is handled after all messages that the sender got acknowledged before. On one node, messages are
  handled one at a time, and none after a later one.
- Once, while the user's sessions stay on one node and its process lives, even if connections fail.
- Once across a rebalance, drain, stop and rolling update, if the handler answers within four seconds: the node sends
  the acknowledgement before it ends the session, and meanwhile accepts no event that asks for one.

A message can be handled twice, both times with its id, when

- the process dies between handling and acknowledgement (systemd kills it if the unit is stopped during a takeover);
- the handler takes longer than four seconds while its user is moved to another node;
- the connection is cut or the node hangs before the acknowledgement arrives, and the user reconnects to another node (a
  node that hung may handle the message later);
- more senders than `Received` remembers were active in between, on the node or on the same connection.

An application that must not do something twice stores the id together with the effect.

Not guaranteed: events from the server to a client (Socket.IO: at most once), any order between senders, and messages
that a sender has given up. If a sender has two messages under way, the earlier one may never be acknowledged.
"""

import asyncio
import functools
import inspect
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
"""Twice the connections that a node takes by default. A repetition comes within seconds after its connection is lost,
so recent senders are enough."""
SENDERS_OF_A_CONNECTION = 32
"""A client is one sender, and a page may have several. A client that makes up senders displaces only its own."""
ANSWER_BYTES = 64 * 1024 * 1024
"""Bound of all acknowledgements together: 3 KB for each sender, since a client can cause large ones."""
OBJECT_BYTES = 64
"""The overhead of a value beside its content."""
WAITING_TURNS = 16
"""How many messages of one sender may wait for their turn: a sender repeats one about every ten seconds."""
ACK_TIMEOUT_SECONDS = 10.0
"""For an acknowledgement that does not arrive over an open connection, because the handler failed or takes long (a lost
connection is detected as such). Longer than the four seconds that a node waits for handlers when it moves users."""


@dataclass(slots=True)
class _Turn:
    lock: Any  # of threads, or of asyncio
    users: int = 0


@dataclass(slots=True)
class _Last:
    """The last message of a sender: `sid` is its connection, `size` the bytes that the answer takes."""

    counter: int
    answer: object
    sid: str
    size: int


class Received:
    """Recognises repeated messages of the last `senders` senders that sent something to this process.

    ::

        received = Received(server)

        @server.event
        @received.once
        def order(sid, goods, message_id=None):
            return "ordered"

    It keeps the counter and the acknowledgement of each sender's last message, in the process's memory. One object may
    wrap the handlers of several events: a sender counts all its messages together. Handlers are functions, in green
    threads or real ones, or coroutine functions of a `socketio.AsyncServer`, and must return: their sender's next
    messages wait for them.

    Memory is bounded, whatever clients send: at most SENDERS_OF_A_CONNECTION senders for each connection and
    ANSWER_BYTES of acknowledgements in all; the least recent senders are forgotten first. Beyond WAITING_TURNS waiting
    messages of a sender, a message is neither handled nor acknowledged, and the sender repeats it.
    """

    def __init__(self, server: socketio.Server, senders: int = SENDERS) -> None:
        self._not_acknowledged = server.not_handled
        self._asynchronous = isinstance(server, socketio.AsyncServer)
        self._senders = senders
        self._last: OrderedDict[str, _Last] = OrderedDict()
        self._of_connection: dict[str, dict[str, None]] = {}
        self._bytes = 0
        self._turns: dict[str, _Turn] = {}
        self._lock = threading.Lock()

    def once(self, handler: Callable[..., object]) -> Callable[..., object]:
        """Return an event handler that calls `handler` once for each id, with the id as keyword argument `message_id`.

        The id is no longer among the arguments. An event without an id is passed to the handler unchanged.

        A repetition of the sender's last message gets the same acknowledgement, and waits for it while the message is
        being handled. If the handler raises, nothing is kept, and a repetition is handled. An earlier message is
        neither handled nor acknowledged: its sender gave it up, or already got its acknowledgement.
        """

        if self._asynchronous:
            return self._once_async(handler)

        @functools.wraps(handler)
        def handle(sid: str, *data: object) -> object:
            if (found := _id_of(data)) is None:
                return handler(sid, *data)
            sender, counter = found
            with self._turn(sender, threading.Lock) as lock:
                if lock is None:
                    return self._not_acknowledged
                with lock:
                    known, answer = self._known(sender, counter)
                    if not known:
                        answer = handler(sid, *data[:-1], message_id=data[-1])
                    return self._keep(sender, counter, answer, sid)

        return handle

    def _once_async(self, function: Callable[..., object]) -> Callable[..., object]:
        async def handler(*arguments: object, **named: object) -> object:
            answer = function(*arguments, **named)
            return await answer if inspect.isawaitable(answer) else answer

        @functools.wraps(function)
        async def handle(sid: str, *data: object) -> object:
            if (found := _id_of(data)) is None:
                return await handler(sid, *data)
            sender, counter = found
            with self._turn(sender, asyncio.Lock) as lock:
                if lock is None:
                    return self._not_acknowledged
                async with lock:
                    known, answer = self._known(sender, counter)
                    if not known:
                        answer = await handler(sid, *data[:-1], message_id=data[-1])
                    return self._keep(sender, counter, answer, sid)

        return handle

    def _known(self, sender: str, counter: int) -> tuple[bool, object]:
        """Return whether a message is not to be handled, and how it is acknowledged then."""
        last = self._last.get(sender)
        if last is None or counter > last.counter:
            return False, None
        return True, last.answer if counter == last.counter else self._not_acknowledged

    @contextmanager
    def _turn(self, sender: str, make_lock: Callable[[], Any]) -> Iterator[Any]:
        """Return the lock to hold while a message of the sender is handled; None if too many wait already."""
        with self._lock:
            turn = self._turns.setdefault(sender, _Turn(make_lock()))
            takes_part = turn.users <= WAITING_TURNS
            turn.users += takes_part
        if not takes_part:
            yield None
            return
        try:
            yield turn.lock
        finally:
            with self._lock:
                turn.users -= 1
                if not turn.users:
                    del self._turns[sender]

    def _keep(self, sender: str, counter: int, answer: object, sid: str) -> object:
        """Note the acknowledgement of a message, and return it."""
        if answer is self._not_acknowledged:
            return answer
        last = _Last(counter, answer, sid, _size(answer))
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
        return answer

    def _forget(self, sender: str) -> None:
        last = self._last.pop(sender)
        self._bytes -= last.size
        of_connection = self._of_connection[last.sid]
        del of_connection[sender]
        if not of_connection:
            del self._of_connection[last.sid]


def _id_of(data: tuple[object, ...]) -> tuple[str, int] | None:
    """Return sender and counter of an event's id; None if it has none."""
    found = MESSAGE_ID.fullmatch(data[-1]) if len(data) > 1 and isinstance(data[-1], str) else None
    return None if found is None else (found["sender"], int(found["counter"]))


def _size(answer: object) -> int:
    """Return the approximate size of an acknowledgement in bytes."""
    parts: Iterable[object] = ()
    if isinstance(answer, dict):
        parts = itertools.chain(answer, answer.values())
    elif isinstance(answer, list | tuple):
        parts = answer
    # PyPy has no sys.getsizeof().
    return OBJECT_BYTES + (len(answer) if isinstance(answer, str | bytes) else 0) + sum(map(_size, parts))


class Sender:
    """Sends messages through a `socketio.AsyncClient` until each is acknowledged, in order, one at a time.

    The client connects and reconnects by itself, and uses the default namespace. The sender watches it through public
    names of python-engineio's client: `on()` and `handlers`. `repeated` counts the repetitions.
    """

    def __init__(self, client: socketio.AsyncClient, *, ack_timeout: float = ACK_TIMEOUT_SECONDS) -> None:
        self._client = client
        self._ack_timeout = ack_timeout
        self._name = secrets.token_hex(16)
        self._counter = 0
        self._turn = asyncio.Lock()
        self._dropped: asyncio.Future[None] | None = None
        self._ended = False
        # Set while connected, and when the client will not connect again.
        self._settled = asyncio.Event()
        self.repeated = 0
        self._watch()

    async def send(self, event: str, data: object = None) -> Any:  # noqa: ANN401 - the application's
        """Send an event, and return its acknowledgement: None, a value, or a tuple of several.

        `data` is as for `AsyncClient.emit`, and the id follows it. The message is sent again as soon as a lost
        connection is back, and every `ack_timeout` seconds while the connection is open, without limit: bound it with
        `asyncio.timeout`. A cancelled message is given up; it may have been handled or not.

        Raises:
            socketio.exceptions.DisconnectedError: the client was disconnected on purpose, or gave up reconnecting.
        """
        arguments = data if isinstance(data, tuple) and data else (data,)
        async with self._turn:
            self._counter += 1
            message = (*arguments, f"{self._name}-{self._counter}")
            answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

            def acknowledge(*answer: object) -> None:
                # A repetition is acknowledged too.
                if not answered.done():
                    answered.set_result(answer if len(answer) > 1 else next(iter(answer), None))

            sent = False
            while True:
                await self._settled.wait()
                if self._ended:
                    raise socketio.exceptions.DisconnectedError
                self._dropped = asyncio.get_running_loop().create_future()
                try:
                    await self._client.emit(event, message, callback=acknowledge)
                except socketio.exceptions.BadNamespaceError:
                    # The namespace is lost, and the engine's disconnect event is still to come.
                    self._settled.clear()
                    continue
                self.repeated += sent
                sent = True
                await asyncio.wait(
                    (answered, self._dropped), timeout=self._ack_timeout, return_when=asyncio.FIRST_COMPLETED
                )
                if answered.done():
                    break
            return answered.result()

    def _watch(self) -> None:
        """Wrap the Socket.IO client's own handlers of the engine's events: its event handlers are left to the user."""
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
        # The only event that says that the client will not reconnect; python-socketio's SimpleClient uses it too.
        client.on("__disconnect_final", on_end)
        note_connection()
