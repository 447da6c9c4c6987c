"""Connection state recovery: the official client goes on with its session, at this node or another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from bus_fleet import Bus, Client
from conftest import ServeProcess

Node, Connect = Callable[..., ServeProcess], Callable[..., Client]


@pytest.mark.parametrize("transport", ["websocket", "polling"])
@pytest.mark.parametrize("same", [True, False], ids=["at the same node", "at another"])
def test_a_client_that_was_away_gets_what_it_missed_and_its_session(
    node: Node, client: Connect, transport: str, *, same: bool
) -> None:
    first, second = node("first"), node("second")
    ann, bob = client(first, transport), client(first)
    _, sid, recovered, pid = ann.until("connect")
    assert not recovered
    assert ann.until("hello")[1] == [False, None]
    ann.ask("join", "club")
    ann.ask("note", "mine")
    ann.ask("say", "club", "before")
    assert ann.said(1) == ["before"]
    ann.away(first if same else second)
    for number in range(5):
        bob.ask("say", ["club", "elsewhere", None][number % 3], number)
    assert ann.back() == [sid, True, pid]
    bob.ask("say", None, "after")
    assert ann.said(4) == [0, 2, 3, "after"]
    assert ann.until("hello")[1] == [True, None]
    assert sorted(ann.ask("join", "another")) == sorted([sid, "club", "another"])
    assert ann.ask("noted") == {"noted": "mine"}
