"""Empties this node, before it stops or for maintenance: nobody new is taken in, and whoever is here is sent elsewhere.

What a user is promised is what `stickyring.node.rebalance` promises one who moves. New handshakes, and requests of
sessions that are not here, are sent on (`stickyring.node.gate.SocketIOGate`): where the edge would send the user if
this node were gone. So a client's first attempt to come back succeeds, long before the edge's health checks miss this
node.
"""

import logging
import math
import threading
import time
from collections.abc import Mapping, Set
from typing import Any

from stickyring.node.metrics import MoveMetrics
from stickyring.node.mover import Move
from stickyring.node.rebalance import HANDSHAKES_A_SECOND
from stickyring.node.sessions import Session

log = logging.getLogger(__name__)

ASKING_SHARE = 0.5
"""Of the time that is given, the part in which all are asked; the rest is for what is still under way."""
TICK_SECONDS = 0.05


class Drain:
    """Whether this node is being emptied, and how far that is; `begin` and `cancel` may be called at any time.

    `active` tells the gate and `/readyz` to take nobody in. `requests` are those that the application is answering,
    which are let end.
    """

    def __init__(self, sessions: Mapping[str, Session], requests: Set[object], metrics: MoveMetrics) -> None:
        self._sessions = sessions
        self._requests = requests
        self._metrics = metrics
        self._moves: list[Move] = []
        self._final = False
        self.active = False
        metrics.draining.set_function(lambda: self.active)

    @property
    def final(self) -> bool:
        """Whether the node is about to stop."""
        return self._final

    @property
    def empty(self) -> bool:
        """Whether nobody is here any more, nothing is being answered, and nobody will come."""
        # The engine's session ends before the application's disconnect handlers have run: `left` is after them.
        gone = not self._open() and all(move.asked == move.left for move in self._moves)
        return self.active and gone and not self._requests

    def begin(self, seconds: float = math.inf, *, final: bool = False) -> None:
        """Take nobody in from now on, and ask everybody to leave within `seconds`; `final`: nothing can cancel it."""
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
        """Take users in again, and let those stay who were not asked yet; return False if the drain is final."""
        if self._final:
            return False
        if self.active:
            self.active = False
            self._moves = []
            log.info("draining ended: taking users in again", extra=self.progress())
        return True

    def wait(self, seconds: float) -> None:
        """Wait until nobody is here, for that long at most."""
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
            "to_move": sum(move.to_move for move in self._moves),
            "asked": sum(move.asked for move in self._moves),
            "left": sum(move.left for move in self._moves),
        }

    def _add_move(self, moves: list[Move], rate: float) -> None:
        # One drain, one list: those of a drain that was cancelled ask nobody any more.
        moves.append(Move(self._sessions, lambda session: self._moves is moves, rate, self._metrics.moved.inc))

    def _ask_until_empty(self, moves: list[Move]) -> None:
        """Ask those who are here, and whoever was on his way in when it began."""
        moves[0].run()
        while self._moves is moves:
            if self._open():
                self._add_move(moves, moves[-1].rate)
                moves[-1].run()
            time.sleep(TICK_SECONDS)

    def _open(self) -> int:
        return sum(not session.ended for session in [*self._sessions.values()])
