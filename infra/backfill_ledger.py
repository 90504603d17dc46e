"""What a backfill says in the coverage ledger: rows that are there and what the venue lacked in, rows to publish out. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any, Final, NamedTuple

import numpy as np

from processors.coverage import LedgerRow
from schemas.frames import GAP_COMPLETE, GAP_FILLED, GAP_OPEN, GAP_UNFILLABLE
from schemas.timeframes import MAX_TIME_US

EVIDENCE: Final = 7
"""A person asked for it."""
_TRADES_CHANNEL: Final = 1


class Lacking(NamedTuple):
    """Trades the venue does not have, between two it has."""

    first_id: int
    """-1 unknown."""
    last_id: int
    start_us: int
    """Time of the row before, or the start of the range."""
    end_us: int
    """Time of the row after."""


def ledger_rows(
    held: Iterable[LedgerRow], start_us: int, end_us: int, lacking: Sequence[Lacking], rows: int, now_us: int
) -> list[LedgerRow]:
    """Rows to publish after every trade of ``[start_us, end_us)`` that the venue has was fetched.

    Gaps that were given up are filled as far as the range goes and the venue had them; what is left of one keeps its id, further parts get
    new ones. An open gap is filled when all of it lies in the range. One that reaches beyond it stays as it is: its collector knows it by its
    id alone, and would never end a part of it. What is lacking and in no gap yet becomes one, unfillable. The range itself is complete; a gap
    in it counts more.

    Args:
        held: valid rows that touch the range.
        start_us, end_us: the range, microseconds UTC.
        lacking: what the venue did not have.
        rows: trades fetched.
        now_us: wall clock; new ids are made of it.
    """
    fresh = count(now_us)
    found: list[LedgerRow] = []
    told: list[tuple[int, int]] = []
    for row in held:
        if row.state not in (GAP_OPEN, GAP_UNFILLABLE) or row.gap_id < 0:
            continue
        first, last = row.start_time_us, MAX_TIME_US - 1 if row.end_time_us < row.start_time_us else row.end_time_us
        if row.state == GAP_OPEN:
            if start_us <= first and last < end_us:
                found.append(_filled(row, rows, now_us))
            continue
        left = [(first, min(last, start_us - 1))] if first < start_us else []
        inside = [(max(first, one.start_us), min(last, one.end_us)) for one in lacking if one.start_us <= last and one.end_us >= first]
        told += inside
        left += inside
        if last >= end_us:
            left.append((max(first, end_us), last))
        if not left:
            found.append(_filled(row, rows, now_us))
            continue
        for place, (low, high) in enumerate(left):
            found.append(
                row._replace(
                    gap_id=next(fresh) if place else row.gap_id,
                    start_time_us=low,
                    end_time_us=row.end_time_us if high == MAX_TIME_US - 1 else high,
                    receive_time_us=now_us,
                )
            )
    untold = [one for one in lacking if not any(low <= one.start_us and high >= one.end_us for low, high in told)]
    found += [
        LedgerRow(next(fresh), one.start_us, one.end_us, GAP_UNFILLABLE, EVIDENCE, one.first_id, one.last_id, 0, now_us) for one in untold
    ]
    found.append(LedgerRow(next(fresh), start_us, end_us, GAP_COMPLETE, EVIDENCE, -1, -1, rows, now_us))
    return found


def _filled(row: LedgerRow, rows: int, now_us: int) -> LedgerRow:
    return row._replace(state=GAP_FILLED, recovered=row.recovered + rows, receive_time_us=now_us)


def ledger_columns(rows: Sequence[LedgerRow]) -> dict[str, np.ndarray[Any, Any]]:
    """The columns of a ``gaps`` frame for rows of its one symbol."""
    number, small = np.int64, np.int8
    return {
        "symbol_code": np.zeros(len(rows), np.int32),
        "first_missing_id": np.array([row.first_missing_id for row in rows], number),
        "last_missing_id": np.array([row.last_missing_id for row in rows], number),
        "start_time_us": np.array([row.start_time_us for row in rows], number),
        "end_time_us": np.array([row.end_time_us for row in rows], number),
        "evidence": np.array([row.evidence for row in rows], small),
        "state": np.array([row.state for row in rows], small),
        "exchange_time_us": np.array([row.end_time_us for row in rows], number),
        "receive_time_us": np.array([row.receive_time_us for row in rows], number),
        "gap_id": np.array([row.gap_id for row in rows], number),
        "channel": np.full(len(rows), _TRADES_CHANNEL, small),
        "recovered": np.array([row.recovered for row in rows], number),
    }
