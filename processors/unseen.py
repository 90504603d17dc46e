"""Which rows are new: exact de-duplication of (symbol, id) columns against what a store already holds.

Comes in: codes and ids of a batch and the largest id held per code. Goes out: a mask of rows to keep. The store is asked only about rows
whose id is not above everything it holds, so a steady feed costs no query.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Held = Callable[[int, Int64s], Int64s]
"""``held(code, ids) -> those of ids (sorted, unique) that the store holds``."""


def unseen_mask(codes: npt.NDArray[np.int32], ids: Int64s, largest_held: Int64s, held: Held) -> npt.NDArray[np.bool_]:
    """True for the first row of each (code, id) in the batch that the store does not hold.

    Args:
        codes: int32, shape (n,), index into ``largest_held``.
        ids: int64, shape (n,), any order.
        largest_held: int64, shape (codes,): the largest id the store holds per code, smaller than any id where it holds none.
        held: asked once for each code that has rows at or below ``largest_held``.

    Returns:
        bool, shape (n,).
    """
    keep = np.ones(len(ids), np.bool_)
    if not len(ids):
        return keep
    order = np.argsort(codes, kind="stable")
    sorted_codes, sorted_ids = codes[order], ids[order]
    same_code = sorted_codes[1:] == sorted_codes[:-1]
    old = ids <= largest_held[codes]
    if not old.any() and bool(np.all(sorted_ids[1:][same_code] > sorted_ids[:-1][same_code])):
        return keep
    # Slow path: ids repeat, go back, or are at or below what is held.
    order = np.lexsort((np.arange(len(ids)), ids, codes))
    sorted_codes, sorted_ids = codes[order], ids[order]
    repeated = np.zeros(len(ids), np.bool_)
    repeated[1:] = (sorted_codes[1:] == sorted_codes[:-1]) & (sorted_ids[1:] == sorted_ids[:-1])
    keep[order] = ~repeated
    candidates = np.flatnonzero(old & keep)
    for code in np.unique(codes[candidates]).tolist():
        rows = candidates[codes[candidates] == code]
        found = held(code, np.unique(ids[rows]))
        keep[rows[np.isin(ids[rows], found)]] = False
    return keep


def group_by_month(time_us: Int64s) -> list[tuple[int, npt.NDArray[Any]]]:
    """(months since 1970-01, row indices) for each calendar month in ``time_us`` (int64 microseconds UTC), months ascending."""
    if not len(time_us):
        return []
    months = time_us.astype("datetime64[us]").astype("datetime64[M]").astype(np.int64)
    first = int(months[0])
    if bool(np.all(months == first)):
        return [(first, np.arange(len(months)))]
    return [(int(month), np.flatnonzero(months == month)) for month in np.unique(months)]
