"""Asks the users of WebSockets to reconnect because the edge's process that carries these is leaving.

The edge asks for it: it sends `POST /stickyring/reconnect?process=NAME&rate=SESSIONS_PER_SECOND` to every node, again
and again until that process has no requests left. So this works whoever replaces or stops the process, and a node that
was restarted meanwhile learns of it too. NAME is what the process tells nodes of itself (`PROCESS_VARIABLE`).

For the users it is as in a rebalance (`stickyring.node.rebalance`), but they come back to the same node, if through
another process or edge. Polling sessions are not asked: each of their requests takes a process that accepts it.
"""

import json
import logging
import threading
from collections.abc import Mapping
from http import HTTPStatus
from urllib.parse import parse_qs

from stickyring.node.metrics import MoveMetrics
from stickyring.node.mover import FASTEST_RATE, Move
from stickyring.node.sessions import Session

log = logging.getLogger(__name__)

RECONNECT = "POST", "/stickyring/reconnect"


class Reconnections:
    """Answers these requests; at any time, one `Move` does the asking, at the highest rate that it was told."""

    def __init__(self, sessions: Mapping[str, Session], metrics: MoveMetrics) -> None:
        self._sessions = sessions
        self._metrics = metrics
        self._leaving: set[str] = set()
        self._move: Move | None = None

    def answer(self, query: str) -> tuple[HTTPStatus, bytes]:
        """Return status and body (JSON) for a request with this query.

        202 with `to_move`, the number of sessions still to be asked: 0 means that nobody is here to ask; 400 with
        `error`, a line of text: the request is not valid.
        """
        given = parse_qs(query)
        try:
            (name,), (text,) = given["process"], given["rate"]
            rate = float(text)
        except (KeyError, ValueError):
            return _error("not one process and one rate, a number")
        if not 0 < rate <= FASTEST_RATE:
            return _error(f"rate: {rate:g} is not a number above 0, up to {FASTEST_RATE}")
        self._leaving.add(name)
        move = self._move
        if move is not None and move.running:
            move.rate = max(move.rate, rate)
            to_move = move.to_move - move.asked
        else:
            move = Move(self._sessions, self._leaves, rate, self._metrics.moved.inc)
            to_move = move.to_move
            if to_move:
                self._move = move
                threading.Thread(target=self._run, args=(move,), daemon=True).start()
        return HTTPStatus.ACCEPTED, json.dumps({"to_move": to_move}).encode()

    def _run(self, move: Move) -> None:
        log.info("an edge changes: %d sessions to reconnect at %.1f a second", move.to_move, move.rate)
        move.ask()
        log.info("an edge changes: %d sessions asked in %.1f s", move.asked, move.seconds, extra=move.progress())

    def _leaves(self, session: Session) -> bool:
        return session.transport == "websocket" and session.process in self._leaving


def _error(text: str) -> tuple[HTTPStatus, bytes]:
    return HTTPStatus.BAD_REQUEST, json.dumps({"error": text}).encode()
