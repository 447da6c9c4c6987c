"""Asks the users whose WebSockets an edge's old process carries to reconnect, so that this process can end.

For them it is as in a rebalance (`stickyring.node.rebalance`), and they come back to the same node. Polling sessions
are not asked: each of their requests takes the edge's new process, without their notice.
"""

import logging
from collections.abc import Mapping, Set
from typing import Any

from stickyring.node.metrics import MoveMetrics
from stickyring.node.mover import Move
from stickyring.node.sessions import Session

log = logging.getLogger(__name__)


class Reconnection:
    """One run for these processes of edges, as sessions name them (`Session.process`); `Move` does the asking.

    The empty name is that of an edge that names no process, as earlier versions did not. Sessions that came through no
    edge are not asked.
    """

    def __init__(self, sessions: Mapping[str, Session], processes: Set[str], rate: float, metrics: MoveMetrics) -> None:
        self._processes = processes
        self._move = Move(sessions, self._leaves, rate, metrics.moved.inc)

    @property
    def running(self) -> bool:
        """Whether the run has not ended yet."""
        return self._move.running

    def run(self) -> None:
        """Ask them, and return when they have left."""
        move = self._move
        log.info("the edge changes: %d sessions to reconnect at %.1f a second", move.to_move, move.rate)
        move.run()
        log.info("the edge changes: %d sessions left in %.1f s", move.left, move.seconds, extra=self.progress())

    def progress(self) -> dict[str, Any]:
        """Return the numbers of `GET /reconnect`."""
        return self._move.progress()

    def _leaves(self, session: Session) -> bool:
        return session.transport == "websocket" and session.cluster is not None and session.process in self._processes
