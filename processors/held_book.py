"""Which trades of each symbol are held back, and how many of them lie in the interval of each bar.

Comes in: suspects held and released. Goes out: the ``held_count`` column of bars, and which trades of a frame are held already. Part of the
state of its shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

MAX_HELD: Final = 1024
"""Held trades remembered per symbol; of more the oldest are not counted any more. A market that has moved is followed after a few, so that
more than this within a day comes only of a feed that is broken."""


class HeldBook:
    """Held trades of the symbols of one partition.

    Args:
        keep_us: a trade is forgotten when a new one of its symbol is held this long after it: no bar that reaches back to it can be published.
    """

    def __init__(self, keep_us: int) -> None:
        self._keep_us = keep_us
        self._times: dict[str, dict[int, int]] = {}

    def __len__(self) -> int:
        """Symbols with held trades."""
        return len(self._times)

    def hold(self, key: str, trade_id: int, time_us: int) -> None:
        """A trade is held back."""
        times = self._times.setdefault(key, {})
        times[trade_id] = time_us
        past = [old for old, at_us in times.items() if at_us < time_us - self._keep_us]
        for old in past:
            del times[old]
        while len(times) > MAX_HELD:
            del times[next(iter(times))]

    def release(self, key: str, trade_id: int) -> None:
        """A trade is held back no more."""
        times = self._times.get(key, {})
        times.pop(trade_id, None)
        if not times:
            self._times.pop(key, None)

    def known(self, symbols: tuple[str, ...], columns: Mapping[str, Array]) -> Array | None:
        """Rows that are held already, whoever brings them again: bool, shape (n,); None when none is."""
        if not self._times or not columns:
            return None
        largest = np.array([max(self._times[key]) if key in self._times else -1 for key in symbols], np.int64)
        codes, ids = columns["symbol_code"], columns["trade_id"]
        # a feed that goes on has larger ids: only what comes again is looked at closely
        again = np.flatnonzero((ids >= 0) & (ids <= largest[codes])) if len(symbols) else np.zeros(0, np.int64)
        if not len(again):
            return None
        found = np.zeros(len(ids), np.bool_)
        for code in np.unique(codes[again]).tolist():
            mine = again[codes[again] == code]
            held = self._times[symbols[code]]
            found[mine] = np.isin(ids[mine], np.fromiter(held, np.int64, len(held)))
        return found if found.any() else None

    def counts(self, symbols: tuple[str, ...], bars: dict[str, Array]) -> Array | None:
        """Held trades in the interval of each bar, int64, shape (n,); None when no symbol of these bars has any."""
        if not self._times or not len(bars["symbol_code"]):
            return None
        held = {code: self._times[key] for code, key in enumerate(symbols) if key in self._times}
        if not held:
            return None
        codes = bars["symbol_code"]
        concerned = np.zeros(len(symbols), np.bool_)
        concerned[list(held)] = True
        rows = np.flatnonzero(concerned[codes])
        # sorted by symbol once: thousands of symbols with held trades must not each look at every bar
        rows = rows[np.argsort(codes[rows], kind="stable")]
        starts = np.searchsorted(codes[rows], list(held), side="left").tolist()
        ends = np.searchsorted(codes[rows], list(held), side="right").tolist()
        counts = np.zeros(len(codes), np.int64)
        for times, start, end in zip(held.values(), starts, ends, strict=True):
            mine = rows[start:end]
            sorted_times = np.sort(np.fromiter(times.values(), np.int64, len(times)))
            opens, closes = bars["open_time_us"][mine], bars["close_time_us"][mine]
            counts[mine] = np.searchsorted(sorted_times, closes) - np.searchsorted(sorted_times, opens)
        return counts

    def to_state(self) -> list[list[Any]]:
        """The whole book as plain lists, for the shard's snapshot."""
        return [[key, list(times.items())] for key, times in self._times.items()]

    @classmethod
    def from_state(cls, keep_us: int, state: Sequence[Sequence[Any]]) -> HeldBook:
        """The book that :meth:`to_state` gave. Raises ValueError for what is none."""
        book = cls(keep_us)
        for key, times in state:
            found = {int(trade_id): int(time_us) for trade_id, time_us in times}
            if not isinstance(key, str) or not 0 < len(found) <= MAX_HELD or key in book._times:
                raise ValueError("The held trades of this state contradict themselves.")
            book._times[key] = found
        return book
