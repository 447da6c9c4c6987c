"""Sends the users of this node whom the ring has elsewhere to where the ring has them, and leaves the others alone.

It begins when every edge has the new ring: users go where the edge sends them. What a user is promised who moves:

- One disconnect, after which the clients of JavaScript and of Python connect again by themselves, as after any lost
  connection: the first attempt comes after 0.5 to 1.5 s with their default options. The application's disconnect
  handlers run once, with the reason `transport close`.
- The acknowledgement of every event that reached the application is written before the end, if it is given within four
  seconds, and so is everything else that waits for a WebSocket. An event that wanted an acknowledgement and got none
  did not reach the application, unless the handler takes longer than that: who sends it again has it handled once.
  Nor did anything that was sent after it. Over polling, the request that brought it is answered with an error.
- The same over polling: a request that reaches the new node before is sent on to the old one, the next on the ring.
  Only a node that is on no ring any more is out of reach for those who poll: they connect again because of that.

Not promised: that events without acknowledgement arrive which cross the end on their way, as with any lost connection.
"""

import logging
from collections.abc import Mapping
from typing import Any

from stickyring.node.metrics import MoveMetrics
from stickyring.node.mover import Move
from stickyring.node.sessions import Session
from stickyring.ring import Ring

log = logging.getLogger(__name__)

HANDSHAKES_A_SECOND = 250
"""What a node is asked to take in beside its users' traffic: at 0.7 (WebSocket) to 1.9 ms (polling) of CPU for a
handshake (docs/benchmarks/nodes.md), they cost it 18 to 48 % of its core."""


def default_rate(ring: Ring) -> float:
    """Return sessions a second that no node takes harm from.

    After a node has been added all others send it their users at the same time, so its HANDSHAKES_A_SECOND are divided
    among them.
    """
    return HANDSHAKES_A_SECOND / max(1, len(ring.names) - 1)


class Rebalance:
    """One rebalance of the node `name`, with `Move`: who is asked, at what rate, and what happens with late arrivals.

    A session without a key is left alone: nobody knows where the edge will place its user. So is one that came by
    another cluster of the edge's than the ring's: this ring does not place it.
    """

    def __init__(
        self, name: str, sessions: Mapping[str, Session], ring: Ring, rate: float, metrics: MoveMetrics
    ) -> None:
        self._name = name
        self._ring = ring
        present = [session for session in [*sessions.values()] if not session.ended]
        self._without_key = sum(self._concerns(session) and session.key is None for session in present)
        self._move = Move(sessions, self._belongs_elsewhere, rate, metrics.moved.inc)
        self._staying = len(present) - self._without_key - self._move.to_move
        metrics.rebalances.inc()

    @property
    def running(self) -> bool:
        """Whether users are still to be asked or to leave."""
        return self._move.running

    def run(self) -> None:
        """Ask until all have left whom the ring has elsewhere."""
        move = self._move
        log.info("rebalancing: %d sessions to move at %.1f a second", move.to_move, move.rate, extra=self.progress())
        move.run()
        log.info("rebalanced: %d sessions left in %.1f s", move.left, move.seconds, extra=self.progress())
        if move.returned:
            log.warning(
                "%d sessions came back, or came, though the ring has their users elsewhere: has every edge this ring?",
                move.returned,
            )

    def progress(self) -> dict[str, Any]:
        """Return the numbers of `GET /rebalance`."""
        move = self._move
        return {
            "running": move.running,
            "rate": move.rate,
            "seconds": round(move.seconds, 3),
            "to_move": move.to_move,
            "staying": self._staying,
            "without_key": self._without_key,
            "asked": move.asked,
            "left": move.left,
            "returned": move.returned,
            "users_asked": move.users_asked,
            "users_returned": move.users_returned,
        }

    def _concerns(self, session: Session) -> bool:
        return session.cluster in {None, self._ring.cluster}

    def _belongs_elsewhere(self, session: Session) -> bool:
        return self._concerns(session) and session.key is not None and self._ring.owner(session.key) != self._name
