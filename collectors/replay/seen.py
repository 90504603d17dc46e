"""Trade ids in, which of them are new out. Remembers runs of ids, not ids: a venue counts without gaps, so a file is a few runs."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

MAX_RUNS: Final = 1 << 20
"""Runs kept, 16 MiB. A file with more gaps than that forgets its smallest ids; a repeat of those is dropped by the stages behind."""

Array = np.ndarray[Any, Any]


class SeenIds:
    """The ids met so far as sorted, disjoint runs ``[first, last]``; memory is bounded by ``max_runs``."""

    def __init__(self, max_runs: int = MAX_RUNS) -> None:
        self._max_runs = max_runs
        self._first = np.empty(0, np.int64)
        self._last = np.empty(0, np.int64)

    def new(self, ids: Array) -> Array | None:
        """Add ``ids`` (int64); bool per id, False for a repeat (of an earlier call or of this one); None when all are new."""
        if not len(ids):
            return None
        ascending = len(ids) == 1 or bool((np.diff(ids) > 0).all())
        if ascending and (not len(self._last) or ids[0] > self._last[-1]):
            self._add(ids)
            return None
        distinct, places = np.unique(ids, return_index=True)  # the first place of each id
        known = self._known(distinct)
        if known.any():
            distinct, places = distinct[~known], places[~known]
        fresh = np.zeros(len(ids), bool)
        fresh[places] = True
        if len(distinct):
            self._add(distinct)
        return None if fresh.all() else fresh

    def _known(self, distinct: Array) -> Array:
        if not len(self._first):
            return np.zeros(len(distinct), bool)
        run = np.searchsorted(self._first, distinct, side="right") - 1
        known: Array = (run >= 0) & (distinct <= self._last[np.maximum(run, 0)])
        return known

    def _add(self, distinct: Array) -> None:
        """Add ascending ids, none of them known."""
        breaks = np.flatnonzero(np.diff(distinct) != 1)
        first = np.concatenate([self._first, distinct[:1], distinct[breaks + 1]])
        last = np.concatenate([self._last, distinct[breaks], distinct[-1:]])
        order = np.argsort(first, kind="stable")
        first, last = first[order], last[order]
        # runs that touch become one
        apart = np.flatnonzero(first[1:] != last[:-1] + 1)
        first = np.concatenate([first[:1], first[apart + 1]])
        last = np.concatenate([last[apart], last[-1:]])
        self._first, self._last = first[-self._max_runs :], last[-self._max_runs :]
