"""Asks sessions of this node to reconnect, at a bounded rate, so that the edge sends their users to another node."""

import logging
import random
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from stickyring.node.sessions import Session

log = logging.getLogger(__name__)

BATCH_SECONDS = 0.1
"""Short, so that the other nodes get a steady stream of clients instead of bursts."""
JITTER = 0.5
"""Pauses vary by this share, so that nodes which started together do not stay in step."""
RETURN_SECONDS = 2.0
"""Clients wait 0.5 to 1.5 s before they reconnect: after this, those that the edge sends back here have arrived."""
TICK_SECONDS = 0.05
FASTEST_RATE = 10_000


class Move:
    """One run that asks the sessions selected by `leaves` to reconnect; the caller runs `run()` in a thread.

    All sessions of one user (one key; a session without a key counts as one user) are asked together, users in random
    order, on average `rate` sessions per second, in batches of a tenth of a second. A session ends once nothing is
    under way in it (`Session.quiet`), or after twice PATIENCE_SECONDS.

    Users who arrive during the run and should leave are asked after the others. Users who come back to this node,
    because the edge has another ring than the caller, are not asked again: their sessions are counted. Sessions that
    another run has asked are skipped.

    Numbers of sessions, also while it runs: `to_move` found so far, `asked`, `left` (asked, and ended), `returned`
    (here at the end, though they should have left). `asked` may stay below `to_move`: the others left by themselves.
    `users_asked` and `users_returned` count the users of these sessions.
    """

    def __init__(
        self,
        sessions: Mapping[str, Session],
        leaves: Callable[[Session], bool],
        rate: float,
        on_asked: Callable[[], None],
    ) -> None:
        self.rate = rate
        self.asked = 0
        self.left = 0
        self.returned = 0
        self.users_returned = 0
        self._sessions = sessions
        self._leaves = leaves
        self._on_asked = on_asked
        self._asked_at: dict[Hashable, float] = {}
        self._leaving = threading.Condition()
        self._began = time.monotonic()
        self._ended: float | None = None
        self._users = self._to_ask()
        self.to_move = sum(map(len, self._users))

    @property
    def running(self) -> bool:
        """Whether the run has not ended yet."""
        return self._ended is None

    @property
    def users_asked(self) -> int:
        """Number of users asked so far."""
        return len(self._asked_at)

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, or took, in seconds."""
        return (self._ended or time.monotonic()) - self._began

    def progress(self) -> dict[str, Any]:
        """Return what every run of this kind reports on the control socket."""
        return {
            "running": self.running,
            "rate": self.rate,
            "seconds": round(self.seconds, 3),
            "to_move": self.to_move,
            "asked": self.asked,
            "left": self.left,
        }

    def run(self) -> None:
        """Ask the users who are here, then once those who arrived meanwhile; return when all of them have left."""
        with self._ending():
            self._ask(self._users)
            self._wait_for_asked()
            if self.asked:
                time.sleep(RETURN_SECONDS)
            late = self._to_ask()
            self.to_move += sum(map(len, late))
            self._ask(late)
            self._wait_for_asked()
            back = [session for session in [*self._sessions.values()] if self._should_leave(session)]
            self.returned, self.users_returned = len(back), len({_user(session) for session in back})

    def ask(self) -> None:
        """Ask only the users who are here, and do not wait for them: instead of `run`, for a caller who repeats it."""
        with self._ending():
            self._ask(self._users)

    @contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            log.exception("asking sessions to reconnect has failed")
        finally:
            self._ended = time.monotonic()

    def _should_leave(self, session: Session) -> bool:
        return not (session.ended or session.asked) and self._leaves(session)

    def _to_ask(self) -> list[list[Session]]:
        """Return, by user, the sessions that should leave and began before their user was asked."""
        users: dict[Hashable, list[Session]] = {}
        for session in [*self._sessions.values()]:
            user = _user(session)
            if self._should_leave(session) and session.began <= self._asked_at.get(user, session.began):
                users.setdefault(user, []).append(session)
        return [*users.values()]

    def _ask(self, users: list[list[Session]]) -> None:
        random.shuffle(users)
        for batch in self._batches(users):
            for session in batch:
                self._asked_at[_user(session)] = time.monotonic()
                if session.asked:
                    continue  # by another run, meanwhile
                session.asked = True
                self.asked += 1
                self._on_asked()
                session.see_off(self._count_as_left)
            time.sleep(len(batch) / self.rate * random.uniform(1 - JITTER, 1 + JITTER))

    def _wait_for_asked(self) -> None:
        with self._leaving:
            self._leaving.wait_for(lambda: self.left == self.asked)

    def _batches(self, users: list[list[Session]]) -> Iterator[list[Session]]:
        batch: list[Session] = []
        for sessions in users:
            batch += [session for session in sessions if self._should_leave(session)]
            if len(batch) >= self.rate * BATCH_SECONDS and batch:
                yield batch
                batch = []
        if batch:
            yield batch

    def _count_as_left(self) -> None:
        with self._leaving:
            self.left += 1
            self._leaving.notify_all()


def _user(session: Session) -> Hashable:
    return session if session.key is None else session.key
