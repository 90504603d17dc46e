"""De-duplication keeps exactly the first row of each id the store does not hold."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from processors.unseen import group_by_month, unseen_mask

ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=60)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.sets(st.tuples(st.integers(0, 3), st.integers(0, 30))))
def test_kept_rows_are_the_first_of_each_new_id(rows: list[tuple[int, int]], stored: set[tuple[int, int]]) -> None:
    """Equal to a dict-and-set loop over the rows in order."""
    largest = np.array([max((i for c, i in stored if c == code), default=-1) for code in range(4)], np.int64)

    def held(code: int, ids: np.ndarray) -> np.ndarray:
        return np.array([i for i in ids.tolist() if (code, i) in stored], np.int64)

    mask = unseen_mask(np.array([c for c, _ in rows], np.int32), np.array([i for _, i in rows], np.int64), largest, held)
    seen = set(stored)
    expected = []
    for row in rows:
        expected.append(row not in seen)
        seen.add(row)
    assert mask.tolist() == expected


def test_a_steady_feed_asks_the_store_nothing() -> None:
    """Ids that only grow beyond what is held need no query."""

    def held(code: int, ids: np.ndarray) -> np.ndarray:
        raise AssertionError("the store was asked")

    codes = np.array([0, 1, 0, 1], np.int32)
    assert unseen_mask(codes, np.array([5, 9, 6, 10], np.int64), np.array([4, 8], np.int64), held).all()


def test_rows_are_grouped_by_calendar_month() -> None:
    """A batch over a month's end splits there and keeps the order of its rows."""
    last, first = 1_725_148_799_999_999, 1_725_148_800_000_000  # 2024-08-31T23:59:59.999999Z and the next microsecond
    groups = group_by_month(np.array([first, last, first + 5], np.int64))
    assert [(month, rows.tolist()) for month, rows in groups] == [(54 * 12 + 7, [1]), (54 * 12 + 8, [0, 2])]
    assert group_by_month(np.array([], np.int64)) == []
