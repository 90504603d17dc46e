"""Duplicates and gaps by trade id."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors import dedupe
from collectors.dedupe import EVIDENCE_ID_JUMP, EVIDENCE_RESTART, MAX_OPEN_GAPS, NUMBERING, Gap, Piece, Sequencer

T = 1_700_000_000_000_000
N = NUMBERING


def process(sequencer: Sequencer, ids: list[int], code: int = 0, times: list[int] | None = None) -> tuple[list[int], list[Gap]]:
    """Ids kept, as they are published; gaps opened."""
    when = times if times is not None else [T + trade_id for trade_id in ids]
    codes = np.full(len(ids), code, np.int32)
    numbered = sequencer.numbered(codes, np.array(ids, np.int64))
    mask, gaps = sequencer.process(codes, numbered, np.array(when, np.int64))
    return (numbered if mask is None else numbered[mask]).tolist(), gaps


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
    assert gap.missing == [(4, 4, T + 3, T + 5)]
    assert gap.recovered == 2
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
    """A test network was reset: ids a little smaller need a minute, ids below half of the newest a second."""
    made = sequencer()
    process(made, [9], times=[T])
    assert process(made, [5], times=[T + 2_000_000]) == ([], [])
    assert process(made, [4], times=[T + 1_000_000]) == ([], [])
    kept, (gap,) = process(made, [6], times=[T + 61_000_000])
    assert (kept, gap.missing, gap.anew) == ([N + 6], [(N, N + 5, T, T + 61_000_000)], True)
    assert process(made, [7], times=[T + 61_000_001]) == ([N + 7], [])
    assert made.resets == 1


def test_no_trade_of_a_new_numbering_shares_an_id_with_one_of_the_old() -> None:
    """The venue starts anew twice, in the middle of a batch; everything that is published has an id of its own, and a restart goes on there."""
    made = sequencer()
    published = process(made, [1, 2, 3])[0]
    published += process(made, [4, 1, 2], times=[T + 4, T + 62_000_000, T + 62_000_001])[0]
    published += process(made, [3], times=[T + 62_000_002])[0]
    published += process(made, [1, 2], times=[T + 124_000_000, T + 124_000_001])[0]
    assert published == [1, 2, 3, 4, N + 1, N + 2, N + 3, 2 * N + 1, 2 * N + 2]
    later = Sequencer(consecutive=True)
    later.add(0, published[-1], T + 124_000_001)
    kept, (gap,) = process(later, [5], times=[T + 125_000_000])
    assert (kept, gap.first_id, gap.last_id) == ([2 * N + 5], 2 * N + 3, 2 * N + 4)
    assert later.numbered_id(0, 7) == 2 * N + 7
    assert later.numbered_id(0, -1) == -1


def test_a_removed_symbol_starts_anew() -> None:
    """Off and on again: what was traded meanwhile was not wanted."""
    made = sequencer()
    process(made, [1])
    made.forget(0)
    assert process(made, [50]) == ([50], [])


def test_open_gaps_of_a_symbol_are_bounded() -> None:
    """Further ones become part of the oldest: none is given up."""
    made = sequencer()
    process(made, list(range(0, 2 * (MAX_OPEN_GAPS + 3), 2)))
    gaps = list(made.open_gaps())
    assert len(gaps) == MAX_OPEN_GAPS
    assert [piece[:2] for piece in gaps[0].missing] == [(1, 1), (3, 3), (5, 5)]
    assert [(gap is gaps[0], folded.first_id, folded.closed) for gap, folded in made.folded] == [(True, 3, True), (True, 5, True)]
    assert process(made, [3, 2 * MAX_OPEN_GAPS - 1, 3]) == ([3, 2 * MAX_OPEN_GAPS - 1], [])


def test_a_gap_in_too_many_pieces_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handed to the caller, who reports it: memory is bounded whatever a feed loses."""
    monkeypatch.setattr(dedupe, "MAX_OPEN_GAPS", 4)
    monkeypatch.setattr(dedupe, "MAX_PIECES", 10)
    made = sequencer()
    process(made, list(range(0, 40, 2)))
    assert [len(gap.missing) for gap in made.given_up] == [11]
    assert made.given_up[0].closed
    assert process(made, [1]) == ([], [])


def test_what_was_fetched_fills_every_gap_it_belongs_to() -> None:
    """A page of ids: those that were missing are kept once, wherever they were missing; times narrow what is still missing."""
    made = sequencer()
    process(made, [1, 4, 5, 9])
    ids = np.array([1, 2, 3, 4, 7, 7], np.int64)
    assert made.fill(0, ids, T + ids).tolist() == [False, True, True, False, True, False]
    (left,) = [gap for gap in made.open_gaps() if gap.missing]
    assert left.missing == [(6, 6, T + 5, T + 7), (8, 8, T + 7, T + 9)]


def test_a_gap_of_an_earlier_process_goes_on() -> None:
    """It lies before the newest id; rows that are missing fill it, others came before."""
    made = Sequencer(consecutive=True)
    made.add(0, 100, T)
    made.reopen(Gap(0, 50, 59, T - 60, T - 40, EVIDENCE_ID_JUMP, [Piece(50, 59, T - 60, T - 40)]))
    assert process(made, [101, 55, 49], times=[T + 1, T - 50, T - 55]) == ([101, 55], [])


def test_after_a_restart_of_the_venue_nothing_is_dropped_and_what_was_open_is_given_up() -> None:
    """Ids begin at 1 while the clock went back five minutes: kept; one gap says so, with the new ids before the first."""
    made = sequencer()
    process(made, [5_000])
    process(made, [5_003])
    made.connection_broke()
    kept, (gap,) = process(made, [3, 4], times=[T - 300_000_000, T - 299_000_000])
    assert kept == [N + 3, N + 4]
    assert (gap.anew, gap.evidence, gap.missing) == (True, EVIDENCE_RESTART, [(N, N + 2, T - 300_000_000, T + 5_003)])
    assert [old.first_id for old in made.given_up] == [5_001]
    assert process(made, [2]) == ([N + 2], [])
    assert process(made, [5], times=[T - 298_000_000]) == ([N + 5], [])


def test_what_the_venue_confirms_is_in_doubt_no_longer() -> None:
    """After a break each symbol is in doubt until a row or the venue's newest id says what was missed."""
    made = sequencer()
    process(made, [1])
    process(made, [7], code=1)
    codes = np.arange(3)
    made.connection_broke()
    assert made.doubtful(codes).tolist() == [True, True, True]
    process(made, [2])
    made.confirm(codes[1:2])
    assert made.doubtful(codes).tolist() == [False, False, True]


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
            missing = {
                n for gap in made.open_gaps() if gap.code == code for piece in gap.missing for n in range(piece.first, piece.last + 1)
            }
            assert missing == set(range(first, max(seen) + 1)) - expected


@pytest.mark.parametrize(
    ("before", "after"), [(5_400_000_000, 3_570_000_000_000), (3_570_000_000_000, 5_400_000_000), (5_400_000_000, 5_399_999_500)]
)
def test_a_jump_that_no_symbol_can_have_traded_is_another_numbering(before: int, after: int) -> None:
    """Another venue under the same name, a venue that rolled back: an hour is named as lost, and nobody asks for billions of trades."""
    made = sequencer()
    process(made, [before], times=[T])
    made.connection_broke()
    kept, (gap,) = process(made, [after], times=[T + 3_600_000_000])
    assert kept == [after if after > before else after + N]
    assert gap.anew
    assert gap.missing == []
    assert (gap.start_time_us, gap.end_time_us) == (T, T + 3_600_000_000)
    assert process(made, [after + 1], times=[T + 3_600_000_001]) == ([kept[0] + 1], [])


def test_a_week_of_a_busy_symbol_is_no_other_numbering() -> None:
    """The newest trade is a week old, and 60 were made in a second since."""
    made = sequencer()
    process(made, [1_000], times=[T])
    made.connection_broke()
    _, (gap,) = process(made, [1_000 + 60 * 604_800], times=[T + 604_800_000_000])
    assert not gap.anew
    assert gap.missing_ids == 60 * 604_800 - 1


def test_a_gap_between_neighbours_whose_times_lie_the_other_way_round_has_its_times_in_order() -> None:
    """A gap that ended before it began would have no end."""
    made = sequencer()
    process(made, [100], times=[T])
    _, (gap,) = process(made, [102], times=[T - 1_000])
    assert (gap.start_time_us, gap.end_time_us) == (T - 1_000, T)
    assert gap.missing == [Piece(101, 101, T - 1_000, T)]
