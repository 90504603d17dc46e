"""What was seen: against plain sets, with memory bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from api.live import filters
from api.live.filters import BarFilter, Shown, TradeFilter, Verdict
from tests.api.support import seen as seen_after


@given(ids=st.lists(st.integers(-40, 40), max_size=200), seeded=st.sets(st.integers(-40, 40)))
def test_trade_filter_is_a_set(ids: list[int], seeded: set[int]) -> None:
    """Whatever the order, an id is fresh the first time only."""
    found = TradeFilter()
    found.seed(seeded)
    seen = set(seeded)
    for one in ids:
        assert found.admit(one) is (one not in seen)
        seen.add(one)


@given(ids=st.lists(st.integers(0, 60), max_size=100), floor=st.integers(0, 30), stored=st.sets(st.integers(0, 30)))
def test_trade_filter_asks_below_its_floor_and_believes_the_answer(ids: list[int], floor: int, stored: set[int]) -> None:
    """Below the floor ids are UNKNOWN until the store has spoken; then each is fresh once unless stored."""
    found = TradeFilter(floor)
    seen = {one for one in stored if one <= floor}
    for one in ids:
        if found.judge(one) is Verdict.UNKNOWN:
            assert one <= floor
            found.learn([one], {one} & stored)
        assert found.admit(one) is (one not in seen)
        seen.add(one)


def test_trade_filter_stays_bounded_when_every_id_leaves_a_gap() -> None:
    """Ids far apart raise the floor instead of growing memory."""
    found = TradeFilter()
    for one in range(0, 20 * filters.MAX_INTERVALS, 10):
        assert found.admit(one)
    assert len(found._starts) == filters.MAX_INTERVALS
    assert found.judge(0) is Verdict.UNKNOWN
    assert found.judge(20 * filters.MAX_INTERVALS - 10) is Verdict.DUPLICATE
    assert found.judge(20 * filters.MAX_INTERVALS - 5) is Verdict.FRESH


ROWS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2), st.integers(-1, 3)), max_size=100)


@given(
    rows=ROWS,
    seeded=st.dictionaries(st.integers(0, 8), st.tuples(st.integers(0, 2), st.integers(-1, 3))),
    floor=st.none() | st.integers(0, 8),
)
def test_bar_filter_shows_each_row_once_and_never_an_older_revision(
    rows: list[tuple[int, int, int]], seeded: dict[int, tuple[int, int]], floor: int | None
) -> None:
    """A row is fresh when its revision is higher than what was seen of its bar; or as high, and made of a newer input or by the repair."""
    found = BarFilter(floor)
    found.seed((opened, revision) for opened, (revision, _) in seeded.items())
    stored = {opened: Shown(revision, made, made < 0) for opened, (revision, made) in seeded.items()}
    known = dict(stored)
    for opened, revision, made in rows:
        if found.judge(opened, revision, made) is Verdict.UNKNOWN:
            found.learn([opened], {opened: stored[opened]} if opened in stored else {})
        before = known.get(opened)
        fresh = before is None or before.is_news(revision, made)
        assert found.admit(opened, revision, made) is fresh
        if fresh:
            known[opened] = seen_after(before, revision, made)


def test_the_worker_and_the_repair_may_show_one_revision_each() -> None:
    """A bar that the repair closed while the worker was away: both rows are shown, neither of them twice."""
    for first, second in ((-1, 5), (5, -1)):
        found = BarFilter()
        assert [found.admit(60, 0, made) for made in (first, second, first, second)] == [True, True, False, False]
        assert found.admit(60, 1, 6)
        assert not found.admit(60, 0, 7)


def test_bar_filter_asks_who_made_the_bars_of_a_snapshot() -> None:
    """A second row of a revision in it is fresh unless the store has it; a higher one is fresh without a question."""
    found = BarFilter()
    found.seed([(60, 0), (120, 0)])
    assert found.judge(120, 1, 9) is Verdict.FRESH
    assert found.judge(60, 0, 5) is Verdict.UNKNOWN
    found.learn([60], {60: Shown(0, 5)})
    assert (found.judge(60, 0, 5), found.judge(60, 0, -1)) == (Verdict.DUPLICATE, Verdict.FRESH)


def test_bar_filter_stays_bounded_and_asks_about_what_it_forgot() -> None:
    """Beyond its memory a bar is UNKNOWN; what the store says counts, what it then admitted is remembered."""
    found = BarFilter()
    for opened in range(filters.MAX_BARS + 5):
        assert found.admit(opened, 0, opened)
    assert len(found._shown) == filters.MAX_BARS
    assert found.judge(2, 1, 9_000) is Verdict.UNKNOWN
    found.learn([2], {2: Shown(0, 2)})
    assert found.admit(2, 1, 9_000)
    found.learn([], {})
    assert found.judge(2, 1, 9_000) is Verdict.DUPLICATE


def test_open_bar_updates_go_forward_only() -> None:
    """Not of a bar that is final, not from an older input than the one shown."""
    found = BarFilter()
    assert found.admit_open(10, 5)
    assert found.admit_open(10, 6)
    assert not found.admit_open(10, 4)
    assert found.admit(10, 0, 6)
    assert not found.admit_open(10, 9)
    assert found.admit_open(20, 7)
    assert not found.admit_open(15, 8)
