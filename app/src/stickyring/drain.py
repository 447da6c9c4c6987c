"""Empties this node, before it stops or for maintenance: nobody new is taken in, and whoever is here is sent elsewhere.

What a user is promised is what `stickyring.rebalance` promises one who moves. New handshakes, and requests of sessions
that are no longer here, get 503 with the header `x-stickyring-draining`, on which the edge tries the next node of the
ring at once: where it would send the user if this node were gone. So a client's first attempt to come back succeeds,
whether or not the edge's health checks have noticed by then that `/readyz` says 503.
"""

import logging
import math
import threading
import time
from collections.abc import Mapping
from typing import Any

from stickyring.metrics import MoveMetrics
from stickyring.mover import Move
from stickyring.rebalance import HANDSHAKES_A_SECOND
from stickyring.sessions import Session

log = logging.getLogger(__name__)

DRAINING_HEADER = "x-stickyring-draining"
ASKING_SHARE = 0.5
"""Of the time that is given, the part in which all are asked; the rest is for what is still under way."""
TICK_SECONDS = 0.05


class Drain:
    """Whether this node is being emptied, and how far that is; `begin` and `cancel` may be called at any time.

    `active` tells the gate and `/readyz` to take nobody in.
    """

    def __init__(self, sessions: Mapping[str, Session], metrics: MoveMetrics) -> None:
        self._sessions = sessions
        self._metrics = metrics
        self._move: Move | None = None
        self.active = False
        metrics.draining.set_function(lambda: self.active)

    @property
    def empty(self) -> bool:
        """Whether nobody is here any more, and nobody will come."""
        # The engine's session ends before the application's disconnect handlers have run: `left` is after them.
        return self.active and not self._open() and self._move is not None and self._move.asked == self._move.left

    def begin(self, seconds: float = math.inf) -> None:
        """Take nobody in from now on, and ask everybody to leave within `seconds`; go on if that is under way."""
        if self.active:
            return
        self.active = True
        rate = max(HANDSHAKES_A_SECOND, len(self._sessions) / (seconds * ASKING_SHARE))
        self._move = Move(self._sessions, lambda session: self.active, rate, self._metrics.moved.inc)
        log.info("draining: %d sessions to move at %.1f a second", self._move.to_move, rate, extra=self.progress())
        threading.Thread(target=self._move.run, daemon=True).start()

    def cancel(self) -> None:
        """Take users in again; those who were not asked yet stay."""
        if self.active:
            self.active = False
            log.info("draining ended: taking users in again", extra=self.progress())

    def wait(self, seconds: float) -> bool:
        """Wait until nobody is here, for that long at most; return whether that is so."""
        deadline = time.monotonic() + seconds
        while not self.empty:
            if time.monotonic() > deadline:
                log.warning(
                    "not drained after %g s: %d sessions are left", seconds, self._open(), extra=self.progress()
                )
                return False
            time.sleep(TICK_SECONDS)
        log.info("drained", extra=self.progress())
        return True

    def progress(self) -> dict[str, Any]:
        """Return the numbers of `GET /drain`."""
        move = self._move
        return {
            "draining": self.active,
            "sessions": self._open(),
            "to_move": move.to_move if move else 0,
            "asked": move.asked if move else 0,
            "left": move.left if move else 0,
        }

    def _open(self) -> int:
        return sum(not session.ended for session in [*self._sessions.values()])
