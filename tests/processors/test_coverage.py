"""The coverage ledger's interval algebra against a moment-by-moment oracle."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from processors.coverage import UNKNOWN, Interval, LedgerRow, covered, covered_ranges, gaps_within, newest, shares, spans, timeline
from schemas.frames import GAP_COMPLETE, GAP_FILLED, GAP_OPEN, GAP_UNFILLABLE

ROWS = st.lists(
    st.builds(
        LedgerRow,
        gap_id=st.integers(-1, 6),
        start_time_us=st.integers(0, 40),
        end_time_us=st.integers(-1, 40),
        state=st.integers(0, 3),
        evidence=st.integers(1, 4),
    ),
    max_size=14,
)


def oracle(rows: list[LedgerRow], moment: int) -> tuple[int, tuple[int, ...]]:
    """State and evidence of one microsecond, by looking at every row."""
    valid = [row for index, row in enumerate(rows) if row.gap_id < 0 or row.gap_id not in {later.gap_id for later in rows[index + 1 :]}]
    speaking = []
    for row in valid:
        if row.state == GAP_COMPLETE:
            hit = row.start_time_us <= moment < row.end_time_us
        elif row.end_time_us < row.start_time_us:
            hit = moment >= row.start_time_us
        else:
            hit = row.start_time_us <= moment <= row.end_time_us
        if hit:
            speaking.append(row)
    for state in (GAP_UNFILLABLE, GAP_OPEN, GAP_FILLED):
        evidence = tuple(sorted({row.evidence for row in speaking if row.state == state}))
        if evidence:
            return state, evidence
    return (GAP_COMPLETE, ()) if speaking else (UNKNOWN, ())


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(0, 45), st.integers(0, 45))
def test_timeline_says_of_every_moment_what_the_rows_say(rows: list[LedgerRow], start: int, end: int) -> None:
    """Sorted, without a hole or an overlap, neighbours differ, and each microsecond has the oracle's state and evidence."""
    found = timeline(rows, start, end)
    if end <= start:
        assert found == []
        return
    assert (found[0].start_us, found[-1].end_us) == (start, end)
    for before, after in zip(found, found[1:], strict=False):
        assert before.end_us == after.start_us
        assert before[2:] != after[2:]
    for interval in found:
        for moment in range(interval.start_us, interval.end_us):
            assert oracle(rows, moment) == (interval.state, interval.evidence)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.lists(st.tuples(st.integers(0, 45), st.integers(0, 45)), max_size=12))
def test_ranges_are_covered_when_each_of_their_moments_is(rows: list[LedgerRow], ranges: list[tuple[int, int]]) -> None:
    """One by one and all at once."""
    expected = [all(oracle(rows, moment)[0] in (GAP_COMPLETE, GAP_FILLED) for moment in range(*pair)) for pair in ranges]
    assert [covered(rows, *pair) for pair in ranges] == expected
    starts = np.array([low for low, _ in ranges], np.int64)
    ends = np.array([high for _, high in ranges], np.int64)
    assert covered_ranges(rows, starts, ends).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_shares_are_counted_moments(rows: list[LedgerRow]) -> None:
    """Over 45 microseconds; they add up to one."""
    found = shares(timeline(rows, 0, 45))
    states = [oracle(rows, moment)[0] for moment in range(45)]
    assert abs(found["open"] - states.count(GAP_OPEN) / 45) < 1e-12
    assert abs(found["covered"] - (states.count(GAP_COMPLETE) + states.count(GAP_FILLED)) / 45) < 1e-12
    assert abs(sum(share for name, share in found.items() if name != "covered") - 1) < 1e-12


def test_a_gap_counts_until_it_is_filled() -> None:
    """Inside a growing complete interval: open, then filled under the same id."""
    grown = [LedgerRow(1, 0, 50, GAP_COMPLETE), LedgerRow(2, 20, 29, GAP_OPEN, 1, 7, 9), LedgerRow(1, 0, 100, GAP_COMPLETE)]
    assert timeline(grown, 0, 100) == [Interval(0, 20, 0), Interval(20, 30, 1, (1,)), Interval(30, 100, 0)]
    assert not covered(grown, 25, 35)
    assert covered(grown, 30, 100)
    grown.append(LedgerRow(2, 20, 29, GAP_FILLED, 1, 7, 9, 3))
    assert covered(grown, 0, 100)
    assert not covered(grown, 0, 101)


def test_what_is_lost_for_good_hides_what_is_filled_around_it() -> None:
    """A gap recovered in part: the whole of it filled under one id, what the venue lacks unfillable under others."""
    rows = [LedgerRow(1, 10, 19, GAP_UNFILLABLE, 5, 4, 4), LedgerRow(2, 10, 39, GAP_FILLED, 5)]
    assert [tuple(interval) for interval in timeline(rows, 0, 50)] == [
        (0, 10, UNKNOWN, ()),
        (10, 20, GAP_UNFILLABLE, (5,)),
        (20, 40, GAP_FILLED, (5,)),
        (40, 50, UNKNOWN, ()),
    ]
    assert [row.gap_id for row in gaps_within(rows, 19, 20)] == [1, 2]
    assert [row.gap_id for row in gaps_within(rows, 20, 50)] == [2]


def test_a_gap_without_an_end_reaches_to_now() -> None:
    """The collector is still cut off: everything since is open."""
    rows = [LedgerRow(1, 0, 100, GAP_COMPLETE), LedgerRow(2, 60, -1, GAP_OPEN, 4)]
    assert spans(timeline(rows, 0, 500), {GAP_OPEN}) == [(60, 500)]


def test_rows_without_an_id_stand_each_for_themselves() -> None:
    """Rows of a release before ids: none replaces another."""
    rows = [LedgerRow(-1, 0, 4, GAP_FILLED), LedgerRow(-1, 10, 14, GAP_FILLED)]
    assert len(newest(rows)) == 2


def test_a_state_of_a_later_release_is_left_out() -> None:
    """Nobody knows what it means: what it covers is not said to be held."""
    assert not covered([LedgerRow(1, 0, 10, 9)], 2, 3)


def test_an_empty_ledger_is_unknown_and_has_no_share() -> None:
    """Nobody watched."""
    assert timeline([], 5, 9) == [Interval(5, 9, UNKNOWN)]
    assert shares([])["covered"] == 0.0
    assert covered_ranges([], np.empty(0, np.int64), np.empty(0, np.int64)).tolist() == []
