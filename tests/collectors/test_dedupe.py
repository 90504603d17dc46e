"""Duplicates and gaps by trade id."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.dedupe import EVIDENCE_ID_JUMP, EVIDENCE_RESTART, MAX_OPEN_GAPS, Gap, Sequencer

T = 1_700_000_000_000_000


def process(sequencer: Sequencer, ids: list[int], code: int = 0, times: list[int] | None = None) -> tuple[list[int], list[Gap]]:
    """Ids kept, gaps opened."""
    when = times if times is not None else [T + trade_id for trade_id in ids]
    mask, gaps = sequencer.process(np.full(len(ids), code, np.int32), np.array(ids, np.int64), np.array(when, np.int64))
    return ids if mask is None else [trade_id for trade_id, keep in zip(ids, mask.tolist(), strict=True) if keep], gaps


def sequencer(*, consecutive: bool = True, codes: int = 5) -> Sequencer:
    """One that knows some symbols."""
    made = Sequencer(consecutive=consecutive)
    for code in range(codes):
        made.add(code)
    return made


def test_consecutive_ids_pass_and_the_first_of_a_symbol_is_no_gap() -> None:
    """The usual case, several symbols in one batch."""
    made = sequencer()
    mask, gaps = made.process(np.array([0, 1, 0, 1], np.int32), np.array([7, 900, 8, 901]), np.full(4, T))
    assert mask is None
    assert gaps == []
    assert [made.last_id(code) for code in range(3)] == [8, 901, -1]


def test_what_came_before_is_dropped() -> None:
    """Two connections overlap at a renewal."""
    made = sequencer()
    process(made, [1, 2, 3])
    assert process(made, [2, 3, 4]) == ([4], [])
    assert process(made, [5, 5, 6]) == ([5, 6], [])
    assert made.duplicates == 3


def test_a_jump_is_a_gap_with_its_times() -> None:
    """What is missing, since when, until when."""
    made = sequencer()
    process(made, [1, 2])
    kept, gaps = process(made, [6])
    assert kept == [6]
    assert [(gap.first_id, gap.last_id, gap.start_time_us, gap.end_time_us, gap.evidence) for gap in gaps] == [
        (3, 5, T + 2, T + 6, EVIDENCE_ID_JUMP)
    ]
    assert list(made.open_gaps()) == gaps


def test_late_rows_fill_a_gap_once() -> None:
    """Reordered by the venue, or fetched over REST; the second time they are duplicates."""
    made = sequencer()
    process(made, [1])
    _, (gap,) = process(made, [5])
    assert process(made, [3, 3, 2]) == ([3, 2], [])
    assert gap.missing == [(4, 4)]
    assert gap.missing_ids == 1
    made.close(gap)
    assert process(made, [4]) == ([], [])


def test_on_venues_that_skip_ids_only_a_broken_connection_makes_a_gap() -> None:
    """USD-M: holes between trades are no losses."""
    made = sequencer(consecutive=False)
    assert process(made, [1, 5, 9]) == ([1, 5, 9], [])
    made.connection_broke()
    kept, gaps = process(made, [20, 25])
    assert kept == [20, 25]
    assert [(gap.first_id, gap.last_id, gap.evidence) for gap in gaps] == [(10, 19, EVIDENCE_RESTART)]
    assert process(made, [25, 30]) == ([30], [])


def test_the_venue_tells_what_was_missed() -> None:
    """After a reconnect: a gap up to the venue's newest id, before any new trade came; rows a second newer than ours still fill it."""
    made = sequencer()
    process(made, [1, 2])
    made.connection_broke()
    gap = made.open_until(0, 5, T + 10_000_000)
    assert gap is not None
    assert (gap.first_id, gap.last_id) == (3, 5)
    assert process(made, [3, 4, 5], times=[T + 5_000_000] * 3) == ([3, 4, 5], [])
    assert gap.missing == []
    assert made.open_until(0, 5, T) is None
    assert made.open_until(1, 100, T) is None


def test_a_restart_continues_after_what_was_stored() -> None:
    """What was traded while the process was dead is a gap."""
    made = Sequencer(consecutive=True)
    made.add(0, 100, T)
    _, gaps = process(made, [104])
    assert [(gap.first_id, gap.last_id, gap.evidence) for gap in gaps] == [(101, 103, EVIDENCE_RESTART)]


def test_ids_that_start_anew_are_believed_when_time_says_so() -> None:
    """A test network was reset: smaller ids, a minute newer."""
    made = sequencer()
    process(made, [1_000_000], times=[T])
    assert process(made, [5], times=[T + 1_000_000]) == ([], [])
    assert process(made, [6], times=[T + 61_000_000]) == ([6], [])
    assert process(made, [7], times=[T + 61_000_001]) == ([7], [])
    assert made.resets == 1


def test_a_removed_symbol_starts_anew() -> None:
    """Off and on again: what was traded meanwhile was not wanted."""
    made = sequencer()
    process(made, [1])
    made.forget(0)
    assert process(made, [50]) == ([50], [])


def test_open_gaps_of_a_symbol_are_bounded() -> None:
    """The oldest is given up and handed to the caller."""
    made = sequencer()
    process(made, list(range(0, 2 * (MAX_OPEN_GAPS + 3), 2)))
    assert len(list(made.open_gaps())) == MAX_OPEN_GAPS
    assert [gap.first_id for gap in made.abandoned] == [1, 3]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), max_size=120), st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_every_id_is_kept_exactly_once_in_any_order_and_batching(rows: list[tuple[int, int]], cuts: list[int]) -> None:
    """An id that was seen, or lies before the first of its symbol, is dropped; any other is kept once; gaps say what is missing."""
    made = sequencer(codes=3)
    kept: list[tuple[int, int]] = []
    position = 0
    cut = 0
    while position < len(rows):
        batch = rows[position : position + cuts[cut % len(cuts)]]
        position += len(batch)
        cut += 1
        codes = np.array([code for code, _ in batch], np.int32)
        ids = np.array([trade_id for _, trade_id in batch], np.int64)
        mask, _ = made.process(codes, ids, T + ids)
        kept += batch if mask is None else [row for row, keep in zip(batch, mask.tolist(), strict=True) if keep]
    assert len(kept) == len(set(kept))
    for code in range(3):
        seen = [trade_id for other, trade_id in rows if other == code]
        if seen:
            first = seen[0]
            expected = {trade_id for trade_id in seen if trade_id >= first}
            assert {trade_id for other, trade_id in kept if other == code} == expected
            missing = {n for gap in made.open_gaps() if gap.code == code for a, b in gap.missing for n in range(a, b + 1)}
            assert missing == set(range(first, max(seen) + 1)) - expected
