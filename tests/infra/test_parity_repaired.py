"""Bars of the repair beside the bars of their trades: what the repair would publish is right, and every other value is found and named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from infra.parity_repaired import JUDGED, REPAIRED, RepairedFindings, Wrong, compare_repaired, newest_of, only, total
from infra.parity_repairs import Job, answers
from infra.parity_rows import Difference
from processors.reconcile import STORED, VALUES, Evidence, dense_runs, rebuild, reconcile
from tests.processors.test_reconcile import END_US, START_US, TIMEFRAMES, columns, none_stored

SECOND = 1_000_000
TRADES = columns([(ms * 700, 40 + ms % 7, 1 + ms % 3, 1) for ms in range(120)])
MADE = rebuild([TRADES], TIMEFRAMES, END_US)
DENSE = Evidence(dense=dense_runs(TRADES["trade_id"], TRADES["exchange_time_us"]))


def published(evidence: Evidence = DENSE, **changes: Any) -> dict[str, Any]:
    """What the repair publishes for these trades where nothing was stored, as it stands in the table."""
    rows = reconcile(none_stored(), MADE, [(START_US, END_US)], evidence).rows
    found = {name: rows[name].copy() for name in STORED}
    count = len(found["open"])
    found |= {name: np.zeros(count, np.int64) for name in REPAIRED if name not in STORED}
    found["input_offset"] -= 1
    return found | changes


def test_what_the_repair_publishes_is_the_bar_of_its_trades() -> None:
    """Every timeframe, flat bars among them, complete or not."""
    assert len(published()["open"]) > 200
    assert 0 in published()["trade_count"]
    for evidence in (
        DENSE,
        Evidence(),
        Evidence(missing=np.array([[START_US, START_US + 9 * SECOND]]), held_us=TRADES["exchange_time_us"][:5]),
    ):
        assert compare_repaired(published(evidence), MADE, evidence) == []


@pytest.mark.parametrize("column", [*VALUES, *JUDGED])
def test_any_value_that_is_not_that_of_the_trades_is_named(column: str) -> None:
    """The least change of one column: that bar, that column, both values."""
    rows = published()
    right = rows[column][7]
    rows[column][7] = np.nextafter(right, np.inf) if rows[column].dtype.kind == "f" else 1 - right if column == "complete" else right + 1
    [wrong] = compare_repaired(rows, MADE, DENSE)
    assert (wrong.row, wrong.columns) == (7, {column: (rows[column][7].item(), right.item())})
    assert wrong.in_values == (column not in JUDGED)


def test_a_bar_without_trades_behind_it_is_wrong() -> None:
    """One before the first trade, and one that does not begin where bars begin."""
    rows = published()
    rows["open_time_us"][3] = START_US - 5 * SECOND
    rows["open_time_us"][4] += 1
    assert [(wrong.row, list(wrong.columns)) for wrong in compare_repaired(rows, MADE, DENSE)] == [(3, []), (4, ["open_time_us"])]
    assert Wrong(3, {}).in_values


def test_a_bar_that_was_complete_stays_so_until_something_is_missing() -> None:
    """Nobody vouches for it any more: still complete. A hole that touches it: no more."""
    rows = published()
    assert {tuple(wrong.columns) for wrong in compare_repaired(rows, MADE, Evidence())} == {("complete",)}
    rows["was_complete"][:] = 1
    rows["complete"][:] = 1
    assert compare_repaired(rows, MADE, Evidence()) == []
    hole = Evidence(missing=np.array([[START_US + 10 * SECOND, START_US + 11 * SECOND]]))
    touched = compare_repaired(rows, MADE, hole)
    assert 0 < len(touched) < 20
    assert all(wrong.columns == {"complete": (1, 0)} for wrong in touched)


def test_where_the_worker_has_the_last_word_the_values_are_compared_alone() -> None:
    """Its view of what is complete comes from its own book."""
    rows = published()
    rows["complete"][:] = 1 - rows["complete"]
    rows["input_offset"][:] = 12
    assert compare_repaired(rows, MADE, DENSE) == []
    rows["volume"][0] += 1
    assert [list(wrong.columns) for wrong in compare_repaired(rows, MADE, DENSE)] == [["volume"]]


def test_of_each_bar_the_newest_revision_counts_and_the_one_before_says_whether_it_was_complete() -> None:
    """Rows as the table gives them: newest first, two of a bar at most."""
    rows = {name: np.zeros(5, np.int64) for name in STORED}
    rows["timeframe_s"] = np.array([1, 1, 1, 60, 60], np.int32)
    rows["open_time_us"] = np.array([1, 1, 2, 2, 2])
    rows["revision"] = np.array([3, 2, 0, 1, 0])
    rows["complete"] = np.array([0, 1, 1, 1, 0])
    found = newest_of(rows)
    assert (found["revision"].tolist(), found["was_complete"].tolist()) == ([3, 0, 1], [1, 0, 0])
    assert len(newest_of(only(rows, []))["was_complete"]) == 0


def test_a_job_answers_for_a_bar_from_its_end_on() -> None:
    """Not done: open. Done: what was known when it was ordered is in the bar. Flat bars behind it belong to it for a day."""
    job = Job("a:B", 60 * SECOND, 61 * SECOND, "x", created_us=7, until_us=70 * SECOND)
    for instrument, open_s, close_s, flat, expected in (
        ("a:B", 60, 70, False, (7, False)),
        ("a:B", 60, 71, False, (0, True)),
        ("a:B", 61, 62, False, (0, False)),
        ("a:B", 61, 62, True, (7, False)),
        ("a:C", 60, 61, False, (0, False)),
    ):
        assert answers([job])(instrument, open_s * SECOND, close_s * SECOND, flat) == expected


def test_findings_add_up() -> None:
    """Differences are kept up to a number, counts are not."""
    wrong = Difference(what="x", partition=0, bars_offset=1, input_offset=-1)
    one = RepairedFindings(bars=3, equal=1, pending=1, unexplained=1, differences=[wrong])
    one.explained["y"] = 2
    both = total([one, one], 1)
    assert (both.bars, both.equal, both.pending, both.unexplained, both.explained, len(both.differences)) == (6, 2, 2, 2, {"y": 4}, 1)
    assert both.value()["explained"] == {"y": 4}
