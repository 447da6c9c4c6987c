"""Empties this node, before it stops or for maintenance: no new users are accepted, and all users are moved.

Users get the same guarantees as in a rebalance (`stickyring.node.rebalance`). The edge passes new handshakes, and
requests of sessions that are not here, to the next node (`stickyring.node.gate.SocketIOGate`): the one that it would
choose without this node. So a client's first attempt to reconnect succeeds, before health checks fail.
"""

import logging
import math
import threading
import time
from collections.abc import Mapping, Set
from functools import partial
from typing import Any

from stickyring.node.metrics import MoveMetrics
from stickyring.node.mover import Move
from stickyring.node.rebalance import HANDSHAKES_A_SECOND
from stickyring.node.sessions import Session

log = logging.getLogger(__name__)

ASKING_SHARE = 0.5
"""All users are asked within this share of the given time; the rest is for what is still under way."""
TICK_SECONDS = 0.05


class Drain:
    """The drain of this node and its progress; `begin` and `cancel` may be called at any time.

    While `active`, the gate and `/readyz` refuse new users. `requests` are those that the application is answering; the
    drain waits for them.
    """

    def __init__(self, sessions: Mapping[str, Session], requests: Set[object], metrics: MoveMetrics) -> None:
        self._sessions = sessions
        self._requests = requests
        self._metrics = metrics
        self._moves: list[Move] = []
        self._final = False
        self.active = False
        metrics.draining.set_function(lambda: self.active)
        for state in ("to_move", "asked", "left"):
            metrics.drain_sessions.labels(state).set_function(partial(self._sum, state))

    @property
    def final(self) -> bool:
        """Whether the node is about to stop."""
        return self._final

    @property
    def empty(self) -> bool:
        """Whether the node drains, all users have left, and no request is being answered."""
        # The engine's session ends before the application's disconnect handlers have run; `left` counts after them.
        gone = not self._open() and all(move.asked == move.left for move in self._moves)
        return self.active and gone and not self._requests

    def begin(self, seconds: float = math.inf, *, final: bool = False) -> None:
        """Accept no new users, and ask all users to reconnect within `seconds`; `final`: it cannot be cancelled."""
        self._final |= final
        rate = max(HANDSHAKES_A_SECOND, self._open() / (seconds * ASKING_SHARE))
        if self.active:
            self._moves[-1].rate = max(self._moves[-1].rate, rate)
            return
        self.active = True
        moves: list[Move] = []
        self._moves = moves
        self._add_move(moves, rate)
        log.info("draining: %d sessions to move at %.1f a second", moves[0].to_move, rate, extra=self.progress())
        threading.Thread(target=self._ask_until_empty, args=(moves,), daemon=True).start()

    def cancel(self) -> bool:
        """Accept users again, and stop asking the others to reconnect; return False if the drain is final."""
        if self._final:
            return False
        if self.active:
            self.active = False
            self._moves = []
            log.info("undrained: accepting users again", extra=self.progress())
        return True

    def wait(self, seconds: float) -> None:
        """Wait until the node is empty, at most `seconds`."""
        deadline = time.monotonic() + seconds
        while not self.empty:
            if time.monotonic() > deadline:
                log.warning(
                    "not drained after %g s: %d sessions and %d requests are left",
                    seconds,
                    self._open(),
                    len(self._requests),
                    extra=self.progress(),
                )
                return
            time.sleep(TICK_SECONDS)
        log.info("drained", extra=self.progress())

    def progress(self) -> dict[str, Any]:
        """Return the numbers of `GET /drain`."""
        return {
            "draining": self.active,
            "drained": self.empty,
            "sessions": self._open(),
            "requests": len(self._requests),
            "to_move": self._sum("to_move"),
            "asked": self._sum("asked"),
            "left": self._sum("left"),
        }

    def _sum(self, state: str) -> int:
        return sum(getattr(move, state) for move in self._moves)

    def _add_move(self, moves: list[Move], rate: float) -> None:
        # Each drain has a list of its own, so the moves of a cancelled drain ask nobody any more.
        moves.append(Move(self._sessions, lambda session: self._moves is moves, rate, self._metrics.moved.inc))

    def _ask_until_empty(self, moves: list[Move]) -> None:
        """Ask the users who are here, and those whose handshake was under way when the drain began."""
        moves[0].run()
        while self._moves is moves:
            if self._open():
                self._add_move(moves, moves[-1].rate)
                moves[-1].run()
            time.sleep(TICK_SECONDS)

    def _open(self) -> int:
        return sum(not session.ended for session in [*self._sessions.values()])
