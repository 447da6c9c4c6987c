"""Asks moved users, who are connected here but assigned to another node, to reconnect; other users are not affected.

It starts when every edge has the new ring, because the edge decides where users reconnect. For a moved user:

- There is one disconnect. JavaScript and Python clients reconnect by themselves, as after any lost connection: with
  default options after 0.5 to 1.5 s. The application's disconnect handlers run once, with the reason `transport close`.
- Every event that reached the application is acknowledged before the session ends, if the handler answers within four
  seconds. Everything else that is queued for a WebSocket is sent too. If an event asks for an acknowledgement and gets
  none, neither it nor anything sent after it has reached the application, unless the handler takes longer than that. So
  a client that sends it again has it handled once. Over polling, its request is answered with an error.
- Polling clients get the same: a request that reaches the new node too early is passed on to the old one, which is the
  next on the ring. Only a node that was removed from the ring cannot be reached; its polling clients reconnect for that
  reason.

Not guaranteed: events without acknowledgement that are under way when the session ends, as with any lost connection.
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
"""Handshakes that a node can accept beside its users' traffic: at 0.7 ms (WebSocket) to 1.9 ms (polling) of CPU each
(docs/benchmarks/nodes.md), they take 18 to 48 % of its core."""


def default_rate(ring: Ring) -> float:
    """Return a rate, in sessions per second, that overloads no node.

    When a node is added, all others send it users at the same time, so they share its HANDSHAKES_A_SECOND.
    """
    return HANDSHAKES_A_SECOND / max(1, len(ring.names) - 1)


class Rebalance:
    """One rebalance of the node `name`; `Move` does the asking.

    Sessions without a key are not asked: it is unknown where the edge will send their users. Nor are sessions of
    another cluster than the ring's, which this ring does not place.
    """

    def __init__(
        self, name: str, sessions: Mapping[str, Session], ring: Ring, rate: float, metrics: MoveMetrics
    ) -> None:
        self._name = name
        self._sessions = sessions
        self._ring = ring
        present = [session for session in [*sessions.values()] if not session.ended]
        self._without_key = sum(self._concerns(session) and session.key is None for session in present)
        self._move = Move(sessions, self._belongs_elsewhere, rate, metrics.moved.inc)
        self._staying = len(present) - self._without_key - self._move.to_move
        metrics.rebalances.inc()

    @property
    def running(self) -> bool:
        """Whether the rebalance has not ended yet."""
        return self._move.running

    def run(self) -> None:
        """Ask moved users to reconnect, and return when they have left."""
        move = self._move
        log.info("rebalancing: %d sessions to move at %.1f a second", move.to_move, move.rate, extra=self.progress())
        move.run()
        log.info("rebalanced: %d sessions left in %.1f s", move.left, move.seconds, extra=self.progress())
        if move.returned:
            log.warning(
                "%d sessions came back or arrived, but their users are assigned to another node: does every edge have "
                "this ring?",
                move.returned,
            )

    def progress(self) -> dict[str, Any]:
        """Return the numbers of `GET /rebalance`."""
        move = self._move
        return move.progress() | {
            "staying": self._staying,
            "without_key": self._without_key,
            "returned": move.returned,
            "users_asked": move.users_asked,
            "users_returned": move.users_returned,
        }

    def count_elsewhere(self) -> int:
        """Return the number of sessions that are here now, but belong to another node."""
        present = [session for session in [*self._sessions.values()] if not session.ended and self._concerns(session)]
        owners = self._ring.owners(session.key for session in present if session.key is not None)
        return sum(owner != self._name for owner in owners)

    def _concerns(self, session: Session) -> bool:
        return session.cluster in {None, self._ring.cluster}

    def _belongs_elsewhere(self, session: Session) -> bool:
        return self._concerns(session) and session.key is not None and self._ring.owner(session.key) != self._name
