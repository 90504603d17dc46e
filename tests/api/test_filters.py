"""What was seen: against plain sets, with memory bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from api.live import filters
from api.live.filters import BarFilter, TradeFilter, Verdict


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


@given(rows=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3)), max_size=100))
def test_bar_filter_shows_each_revision_once_and_never_an_older_one(rows: list[tuple[int, int]]) -> None:
    """A revision is fresh when it is higher than what was seen of its bar."""
    found, seen = BarFilter(), dict[int, int]()
    for opened, revision in rows:
        assert found.admit(opened, revision) is (revision > seen.get(opened, -1))
        seen[opened] = max(revision, seen.get(opened, -1))


def test_bar_filter_stays_bounded_and_asks_about_what_it_forgot() -> None:
    """Beyond its memory a bar is UNKNOWN; what the store says counts, what it then admitted is remembered."""
    found = BarFilter()
    for opened in range(filters.MAX_BARS + 5):
        assert found.admit(opened, 0)
    assert len(found._revisions) == filters.MAX_BARS
    assert found.judge(2, 1) is Verdict.UNKNOWN
    found.learn([2], {2: 0})
    assert found.admit(2, 1)
    found.learn([], {})
    assert found.judge(2, 1) is Verdict.DUPLICATE


def test_open_bar_updates_go_forward_only() -> None:
    """Not of a bar that is final, not from an older input than the one shown."""
    found = BarFilter()
    assert found.admit_open(10, 5)
    assert found.admit_open(10, 6)
    assert not found.admit_open(10, 4)
    assert found.admit(10, 0)
    assert not found.admit_open(10, 9)
    assert found.admit_open(20, 7)
    assert not found.admit_open(15, 8)
