"""Figures, verdict and tables of hand-made records."""

import io
import itertools
import json

import pytest
from rich.console import Console

from stickyring.tools.probe import report as report_module
from stickyring.tools.probe.failures import INVALID_SESSION, refusal
from stickyring.tools.probe.report import Report, percentile
from stickyring.tools.probe.session import Record
from stickyring.tools.probe.settings import SESSIONS, Dialect, Manner, Shape
from stickyring.tools.probe.targets import Target

TARGET = Target("http://127.0.0.1:9002", "127.0.0.1", 9002, "", "127.0.0.1")


def record(user: str, *nodes: str, manner: Manner = Manner.POLLING, cause: str | None = None) -> Record:
    return Record(
        user, manner, header_nodes=set(nodes), handshake=0.004, round_trips=[0.001], opened=not cause, cause=cause
    )


def reported(*records: Record, manners: tuple[Manner, ...] = (Manner.POLLING,), hold: float | None = None) -> Report:
    shape = Shape(sorted({entry.user for entry in records}), manners, connections=1, hold=hold)
    return Report(TARGET, Dialect(), shape, records, interrupted=False, elapsed=1.5)


def rendered(report: Report, width: int = 100) -> str:
    output = io.StringIO()
    Console(file=output, width=width).print(report)
    return output.getvalue()


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(1, 0.5, 1), (2, 0.5, 1), (100, 0.5, 50), (100, 0.99, 99), (1000, 0.99, 990)]
)
def test_percentiles_are_nearest_rank(count: int, share: float, expected: int) -> None:
    assert percentile(list(range(count, 0, -1)), share) == expected


def test_without_values_there_is_no_percentile() -> None:
    assert percentile([], 0.5) is None


def test_busiest_over_mean_counts_ids_not_sessions() -> None:
    report = reported(record("a", "n1"), record("b", "n1"), record("c", "n1"), record("d", "n2"))
    assert report.total.busiest_over_mean == 1.5
    assert dict(report.total.ids_per_node) == {"n1": 3, "n2": 1}


def test_an_id_on_two_nodes_over_two_transports_counts_in_all_only() -> None:
    manners = (Manner.POLLING, Manner.WEBSOCKET)
    report = reported(record("a", "n1"), record("a", "n2", manner=Manner.WEBSOCKET), manners=manners)
    assert [len(figures.split_ids) for figures in report.by_manner.values()] == [0, 0]
    assert report.total.split_ids == {"a": ["n1", "n2"]}
    assert not report.sticky
    assert report.as_json()["split_ids"] == {"a": ["n1", "n2"]}


def test_a_missing_session_is_not_sticky() -> None:
    complete = reported(record("a", "n1"), record("b", "n2"))
    assert complete.sticky
    short = Report(TARGET, Dialect(), complete.shape, complete.records[:1], interrupted=False, elapsed=1)
    assert not short.sticky


def test_mixed_failures_are_all_named() -> None:
    report = reported(
        record("a", "n1", "n2", cause=INVALID_SESSION), record("b", "n1", cause="HTTP 503"), record("c", "n1")
    )
    assert report.verdict == (
        "not sticky: 1 of 3 sessions got HTTP 400 Invalid session: "
        "the requests of one session reached different nodes; "
        "1 of 3 ids were on more than one node; 1 of 3 sessions failed: 1 x HTTP 503"
    )


def test_failures_unrelated_to_stickiness_are_not_called_unsticky() -> None:
    report = reported(record("a", "n1", cause="HTTP 503"), record("b", "n2"))
    assert report.verdict == "not proven sticky: 1 of 2 sessions failed: 1 x HTTP 503"


@pytest.mark.parametrize(
    ("status", "body", "cause"),
    [
        (400, '"Invalid session lv_VI97HAXpY6yYWAAAC"', INVALID_SESSION),
        (400, '{"code":1,"message":"Session ID unknown"}', INVALID_SESSION),
        (400, '"The client is using an unsupported version of the Socket.IO or Engine.IO protocols"', None),
        (400, '"Not an accepted origin."', "HTTP 400: Not an accepted origin."),
        (400, "<html>Bad Request</html>", "HTTP 400"),
        (502, '"Invalid session"', "HTTP 502"),
    ],
)
def test_only_an_unknown_session_is_an_invalid_session(status: int, body: str, cause: str | None) -> None:
    found = str(refusal(status, body))
    assert found == cause if cause else found.startswith("HTTP 400: The client is using an unsupported version")


def test_the_tables_fit_into_80_columns_and_with_hold_into_100() -> None:
    records = [
        Record(
            f"user-{number:05}",
            manner,
            header_nodes={f"node{number % 3 + 1}-1"},
            handshake=12.3456,
            round_trips=[0.0987, 1.5],
            opened=True,
            cause="timeout (echo)" if number % 7 == 0 else None,
        )
        for number, manner in itertools.product(range(1200), SESSIONS)
    ]
    for hold, width in ((None, 80), (30.0, 100)):
        text = rendered(reported(*records, manners=SESSIONS, hold=hold), width)
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        for word in ("websocket-first", "1200", "98.7/1500", "node3-1", "timeout (echo)"):
            assert word in text
        assert ("drop-" in text) is (hold is not None)


def test_markup_in_what_a_server_sends_is_text() -> None:
    assert "[red]n1[/red]" in rendered(reported(record("a", "[red]n1[/red]"), record("b", "n2")))
    assert "HTTP 400: [/b]" in rendered(reported(record("a", "n1", cause="HTTP 400: [/b]")))


def test_the_json_has_the_documented_keys() -> None:
    content = json.loads(json.dumps(reported(record("a", "n1")).as_json()))
    documented = report_module.__doc__ or ""
    for key in (*content, *content["total"]):
        assert f'"{key}"' in documented, key
    assert content["transports"] == {"polling": content["total"]}
    assert content["total"]["handshake_ms"] == {"p50": 4.0, "p99": 4.0}
