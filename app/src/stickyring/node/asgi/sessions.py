"""The sessions of a node on asyncio.

python-engineio keeps a reader, a writer and a ping task for each WebSocket. Here a session handles what arrives, sends
without a queue and pings by a timer, so that an idle one has no task.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from engineio.exceptions import EngineIOError, QueueEmpty, SocketIsClosedError
from engineio.packet import CLOSE, NOOP, PING
from engineio.packet import Packet as EnginePacket

from stickyring.node.asgi.websocket import WebSocket
from stickyring.node.limits import Allowance
from stickyring.node.metrics import Engine, EngineSession, Packet
from stickyring.node.packets import FROM_CLIENT, TooLongError, checked_body, packets_of
from stickyring.node.sessions import (
    FAILED,
    PACKETS_AT_ONCE,
    PATIENCE_SECONDS,
    PROBE,
    PROBED,
    REASON,
    TICK_SECONDS,
    TURN_PACKETS,
    UPGRADE,
    UPGRADE_SECONDS,
    WAITING_MESSAGES,
    Session,
    size_of,
)
from stickyring.node.websocket import PROTOCOL_ERROR

LOST = "stickyring.lost"
"""Filled when the client has closed the connection of a request, in its environ."""
MOST_INCOMING = 64
"""A WebSocket reads no further while so many packets wait for the application."""
TIMED_OUT = "ping timeout"
"""The reason that applications get of a client that does not answer a ping."""


class AsyncSession(Session):
    """One open session; all methods but `see_off` are for the event loop's thread.

    The methods of python-engineio's session for sending, POSTs, polls, pings and the end are replaced by this object's.
    """

    __slots__ = (
        "_applicant",
        "_deadline",
        "_incoming",
        "_loop",
        "_ping",
        "_pinged",
        "_poll_turn",
        "_probed",
        "_tasks",
    )

    def __init__(
        self,
        engine: Engine,
        socket: EngineSession,
        on_failure: Callable[[str], None],
        allowance: Allowance | None = None,
    ) -> None:
        super().__init__(engine, socket, on_failure=on_failure, allowance=allowance)
        self._loop = asyncio.get_running_loop()
        self._incoming: deque[tuple[WebSocket, str | bytes | None]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._poll_turn: asyncio.Lock | None = None
        self._applicant: WebSocket | None = None  # the WebSocket of an upgrade that is not complete
        self._probed = False
        self._deadline: asyncio.TimerHandle | None = None
        self._ping: asyncio.TimerHandle | None = None
        self._pinged = False

    # What goes to the client.

    async def send(self, packet: Packet) -> None:  # type: ignore[override]
        """Send a packet, or queue it for the next poll.

        Raises:
            SocketIsClosedError: the session has ended.
        """
        if self.socket.closed:
            raise SocketIsClosedError
        self.push(packet)

    @property
    def waiting(self) -> int:
        """Bytes that wait for the client: queued, under way, or in the WebSocket's buffer."""
        return self._waiting + (self._carrier.transport.get_write_buffer_size() if self._carrier is not None else 0)

    def push(self, packet: Packet) -> None:
        """Send a packet, or queue it for the next poll; a client that does not read loses its session."""
        websocket = self._carrier
        if websocket is None:
            if self.has_room_for(packet):
                self._queue.put_nowait(packet)
        elif not self.failed:
            websocket.send(packet.encode())
            if websocket.transport.get_write_buffer_size() > WAITING_MESSAGES * self.engine.max_http_buffer_size:
                self.fail("unread")

    async def poll(self) -> list[Packet]:  # type: ignore[override]
        """Wait for the next packets; return none at the end of the session.

        Raises:
            QueueEmpty: no packet within the ping interval plus the ping timeout.
        """
        queue = self._queue
        # The client polls again, so the packets under way have arrived.
        self._waiting = max(0, self._waiting - self._under_way)
        self._under_way = 0
        packets: list[Packet] = []
        try:
            packet = await asyncio.wait_for(queue.get(), self.engine.ping_interval + self.engine.ping_timeout)
        except TimeoutError:
            raise QueueEmpty from None
        while packet is not None:
            queue.task_done()
            packets.append(packet)
            self._under_way += size_of(packet)
            if queue.empty() or len(packets) == PACKETS_AT_ONCE:
                return packets
            packet = queue.get_nowait()
        queue.task_done()
        if packets:
            queue.put_nowait(None)
        return packets

    @contextlib.asynccontextmanager
    async def polled(self):  # type: ignore[no-untyped-def]  # noqa: ANN201
        """The block may poll once no other poll waits. One that does ends, and its session as with `begin_poll`."""
        if self._poll_turn is None:
            self._poll_turn = asyncio.Lock()
        if self._poll_turn.locked():
            if not (self.ended or self.socket.upgrading or self.socket.upgraded):
                self._queue.put_nowait(EnginePacket(CLOSE))
                await self.close(wait=False, abort=True, reason=REASON)
            elif self._queue.empty():
                self._queue.put_nowait(EnginePacket(NOOP))
        async with self._poll_turn:
            yield

    def schedule_ping(self) -> None:
        """Ping the client after the ping interval; the answer to a ping schedules the next one."""
        if self._ping is not None and not self._pinged:
            return
        if self._ping is not None:
            self._ping.cancel()
        self._pinged = False
        self._ping = self._loop.call_later(self.engine.ping_interval, self._send_ping)

    def _send_ping(self) -> None:
        if not self.ended:
            self._pinged = True
            self._ping = self._loop.call_later(self.engine.ping_timeout, self._time_out)
            self.push(EnginePacket(PING))

    def _time_out(self) -> None:
        self.start(self.close(wait=False, abort=True, reason=TIMED_OUT))

    # What comes from the client.

    async def take_in(self, environ: dict[str, Any]) -> None:  # type: ignore[override]
        """Receive all packets of a POST in order.

        Raises:
            EngineIOError: a packet was not received. The session has ended, and the engine answers 400.
        """
        try:
            longest = int(self.engine.max_http_buffer_size)
            if int(environ.get("CONTENT_LENGTH") or 0) > longest:
                raise TooLongError  # noqa: TRY301 - as those of the body
            async with asyncio.timeout(self.engine.ping_timeout):
                received = await environ["wsgi.input"].read(longest + 1)
            if environ[LOST]:
                raise ConnectionResetError  # noqa: TRY301 - as those of the body
            admitted = self.admits(0, len(received))
            for number, packet in enumerate(packets_of(checked_body(environ, received, longest)), start=1):
                if self.ended or self.refused or not (admitted and self.admits(1, 0)):
                    break
                await self.socket.receive(packet)  # type: ignore[func-returns-value,misc]
                if number % TURN_PACKETS == 0:
                    await asyncio.sleep(0)
            else:
                if not (self.failed or self.refused):
                    return
        except Exception as error:
            await self.end_for("packet", error)
            self._stay_for_the_answer()
            raise EngineIOError from error
        # The mover still waits for acknowledgements of the application. An answer now would make the client leave.
        while self.refused and not self.ended:
            await asyncio.sleep(TICK_SECONDS)
        await self.end_for(self.failed)
        self._stay_for_the_answer()
        raise EngineIOError("the session ended, possibly before the last packet")

    def _stay_for_the_answer(self) -> None:
        # The engine answers 400 only to a request of a session that it has; then it forgets the session.
        self.engine.sockets[self.socket.sid] = self.socket

    def attach(self, websocket: WebSocket) -> None:
        """Open a WebSocket for this session: one that began with it, or one to upgrade to."""
        if self.socket.connected:
            self._applicant = websocket
            self._deadline = self._loop.call_later(UPGRADE_SECONDS, self._give_up, websocket)
        else:
            self.socket.connected = True
            self._carry(websocket)
        longest = int(self.engine.max_http_buffer_size)
        websocket.open(longest, lambda message: self._on_message(websocket, message), lambda _: self._on_end(websocket))
        if self._carrier is websocket:
            self._flush()

    def _carry(self, websocket: WebSocket) -> None:
        self.socket.upgraded, self.socket.upgrading = True, False
        self.websocket = websocket  # type: ignore[assignment]

    def _flush(self) -> None:
        """Send what was queued for polls."""
        while not self._queue.empty():
            packet = self._queue.get_nowait()
            self._queue.task_done()
            if packet is not None and packet.packet_type != NOOP:
                self.push(packet)

    @property
    def has_websocket(self) -> bool:
        """Whether a WebSocket carries it, or wants to."""
        return self._applicant is not None or self._carrier is not None

    def _on_message(self, websocket: WebSocket, message: str | bytes | None) -> None:
        """Queue a packet of a WebSocket, or None for its end, which comes after its packets."""
        self._incoming.append((websocket, message))
        if len(self._incoming) == 1:
            self.start(self._handle_incoming())
        elif len(self._incoming) == MOST_INCOMING and message is not None:
            websocket.transport.pause_reading()

    async def _handle_incoming(self) -> None:
        incoming = self._incoming
        number = 0
        while incoming:
            if (number := number + 1) % TURN_PACKETS == 0:
                await asyncio.sleep(0)
            websocket, message = incoming[0]
            try:
                if websocket is not self._carrier and websocket is not self._applicant:
                    pass  # what a WebSocket sent that was given up
                elif message is None:
                    await self.close(wait=False, abort=True, reason=REASON)
                else:
                    await self._receive(message)
            except Exception as error:
                await self.end_for("packet", error)
            if len(incoming) == MOST_INCOMING:
                with contextlib.suppress(RuntimeError):  # it is closing
                    websocket.transport.resume_reading()
            incoming.popleft()

    async def _receive(self, message: str | bytes) -> None:
        if self.ended:
            return
        if self._applicant is not None and not self.socket.upgraded:
            self._upgrade(self._applicant, message)
        elif isinstance(message, str) and message[:1] not in FROM_CLIENT:
            await self.end_for("packet")
        elif not self.admits(1, len(message)):
            await self.end_for("flooding")
        else:
            await self.socket.receive(EnginePacket(encoded_packet=message))  # type: ignore[func-returns-value,misc]

    def _upgrade(self, websocket: WebSocket, message: str | bytes) -> None:
        if message != (UPGRADE if self._probed else PROBE):
            websocket.fail(PROTOCOL_ERROR)
        elif not self._probed:
            self._probed = self.socket.upgrading = True
            websocket.send(PROBED)
            if self._queue.empty():
                self._queue.put_nowait(EnginePacket(NOOP))  # ends a waiting poll
        else:
            self._forget_applicant()
            self._carry(websocket)
            self._flush()

    def _give_up(self, websocket: WebSocket) -> None:
        if self._applicant is websocket:
            self._forget_applicant()
            websocket.close()

    def _forget_applicant(self) -> None:
        self._applicant, self._probed, self.socket.upgrading = None, False, False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_end(self, websocket: WebSocket) -> None:
        mine = websocket in {self._applicant, self._carrier}
        if self._applicant is websocket:
            self._forget_applicant()
        if mine and websocket.broken:
            self.fail("packet")
        elif self._carrier is websocket:
            self._on_message(websocket, None)

    # The end.

    def see_off(self, done: Callable[[], None]) -> None:
        """From any thread: end it once nothing is under way, so that its client reconnects; then call `done`."""

        async def wait_and_leave() -> None:
            try:
                await self._wait_for_quiet()
                self.taking = False
                await self._wait_for_quiet()
                await self.leave()
            finally:
                done()

        self._loop.call_soon_threadsafe(lambda: self.start(wait_and_leave()))

    async def leave(self) -> None:
        """End it so that its client reconnects by itself; on return, the application's disconnect handlers have run."""
        if not self.ended:
            self.moved = True
            await self.close(wait=False, abort=True, reason=REASON)

    async def _wait_for_quiet(self) -> None:  # type: ignore[override]
        deadline = self._loop.time() + PATIENCE_SECONDS
        while not (self.ended or self.quiet) and self._loop.time() < deadline:
            await asyncio.sleep(TICK_SECONDS)

    def fail(self, reason: str, error: BaseException | None = None) -> None:
        """End it for an error, and answer the client with an error; `reason` is one of `metrics.FAILURES`."""
        if not self.ended:
            self.start(self.end_for(reason, error))

    async def end_for(self, reason: str, error: BaseException | None = None) -> None:
        """End it at once for an error, as `fail`; on return, the application's disconnect handlers have run."""
        if self.ended:
            return
        if not self.failed:
            self._note_failure("too_long" if isinstance(error, TooLongError) else reason, error)
        await self.close(wait=False, abort=True, reason=FAILED)

    def _close_in_a_task(self) -> None:
        self.start(self.close(wait=False, abort=True, reason=FAILED))

    def lose(self) -> None:
        """End it because its connection has closed."""
        if not self.ended:
            self.start(self.close(wait=False, abort=True, reason=REASON))

    async def close(  # type: ignore[override]
        self, wait: bool = True, abort: bool = False, reason: str | None = None
    ) -> None:
        """End it as python-engineio does: the disconnect event, then a CLOSE unless `abort`.

        `wait`: until a polling client has its CLOSE, at most for the ping interval and the ping timeout.
        """
        if self.ended:
            return
        for timer in (self._ping, self._deadline):
            if timer is not None:
                timer.cancel()
        # A queued CLOSE must be the session's last packet, and its handlers may still send.
        await self._theirs(wait=False, abort=True, reason=reason)
        if not abort:
            self.push(EnginePacket(CLOSE))
        if self._applicant is not None:
            self._applicant.close()
        if self._carrier is None:
            if wait and not abort:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.engine.ping_interval + self.engine.ping_timeout):
                        await self._queue.join()
            self._queue.put_nowait(None)
        elif self.failed == "unread":
            self._carrier.abort()
        else:
            self._carrier.close()
        # The engine keeps an ended polling session until its next cleanup, and fails on a POST for it.
        if not wait:
            self.engine.sockets.pop(self.socket.sid, None)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in a task that is kept until it is done."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def _carrier(self) -> WebSocket | None:
        """The WebSocket that carries the session."""
        return self.websocket  # type: ignore[return-value]

    @property
    def _queue(self) -> "asyncio.Queue[Any]":
        return self.socket.queue  # type: ignore[return-value]
