"""What a backfill says in the ledger: which gaps it fills, which it leaves to their collector, and that it all adds up."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from infra.backfill_ledger import Lacking, ledger_rows
from processors.coverage import LedgerRow, covered_ranges, newest, timeline
from schemas.frames import GAP_COMPLETE, GAP_FILLED, GAP_OPEN, GAP_UNFILLABLE

NOW_US = 10**15
SPANS = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 20)), max_size=4)


@hypothesis_settings(max_examples=80, deadline=None)
@given(gaps=SPANS, lacks=SPANS, start=st.integers(10, 40), length=st.integers(1, 50))
def test_the_ledgers_of_a_backfill_add_up(gaps: list[tuple[int, int]], lacks: list[tuple[int, int]], start: int, length: int) -> None:
    """Gaps inside are filled, those given up that it only touches keep the rest, open ones stay; the range is complete but for what lacks."""
    end = start + length
    states = (GAP_OPEN, GAP_UNFILLABLE)
    held = [LedgerRow(place + 1, at, at + size, states[place % 2], 1) for place, (at, size) in enumerate(gaps)]
    lacking = [Lacking(1, 2, max(at, start), min(at + size, end - 1)) for at, size in lacks if max(at, start) <= min(at + size, end - 1)]
    touching = [row for row in held if row.start_time_us < end and row.end_time_us >= start]
    rows = [*held, *ledger_rows(touching, start, end, lacking, 7, NOW_US)]
    assert len({row.gap_id for row in newest(rows)}) == len(newest(rows))
    theirs = [row for row in held if row.state == GAP_OPEN and not (row.start_time_us >= start and row.end_time_us < end)]
    assert all(row in newest(rows) for row in theirs)
    moments = np.arange(start, end)
    found = covered_ranges(rows, moments, moments + 1)
    for moment, is_covered in zip(moments.tolist(), found.tolist(), strict=True):
        lacks_it = any(one.start_us <= moment <= one.end_us for one in lacking)
        assert is_covered == (not lacks_it and not any(row.start_time_us <= moment <= row.end_time_us for row in theirs))
    for moment in (moment for moment in range(120) if not start <= moment < end):
        was = any(row.start_time_us <= moment <= row.end_time_us for row in held)
        now = any(row.state in states and row.start_time_us <= moment <= row.end_time_us for row in newest(rows))
        assert was == now


def test_an_outage_that_goes_on_is_left_to_its_collector() -> None:
    """It has no end yet, and its collector ends it under its id: no part of it may have another."""
    outage = LedgerRow(7, 100, -1, GAP_OPEN, 3)
    rows = [outage, *ledger_rows([outage], 200, 300, [], 9, NOW_US)]
    assert [row.state for row in newest(rows)] == [GAP_OPEN, GAP_COMPLETE]
    rows += [outage._replace(end_time_us=350, state=GAP_FILLED), LedgerRow(8, 350, 900, GAP_COMPLETE)]
    assert [one.state_name for one in timeline(rows, 100, 900)] == ["filled", "complete"]


def test_an_open_gap_that_lies_in_the_range_is_filled_but_for_what_the_venue_lacks() -> None:
    """What is lacking is a gap of its own: the collector may still end the one it found."""
    gap = LedgerRow(7, 100, 200, GAP_OPEN, 1, 5, 9, 2)
    rows = [gap, *ledger_rows([gap], 50, 300, [Lacking(6, 7, 120, 150)], 3, NOW_US)]
    filled, lost, _ = newest(rows)
    assert (filled.gap_id, filled.state, filled.recovered) == (7, GAP_FILLED, 5)
    assert (lost.state, lost.start_time_us, lost.end_time_us, lost.first_missing_id) == (GAP_UNFILLABLE, 120, 150, 6)
    again = [*rows, gap._replace(state=GAP_FILLED)]
    assert [one.state_name for one in timeline(again, 100, 200)] == ["filled", "unfillable", "filled"]
