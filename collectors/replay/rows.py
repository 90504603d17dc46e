"""Parsed columns in, checked trades out; every row that is not a trade becomes a :class:`Rejected` with its reason and place.

A price is finite and above 0, a size finite and above 0 (a trade of nothing is no trade), an id is 0 or more, a time lies between
2009 and 2100. Nothing is repaired and nothing dropped: rows = good rows + rejected rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from schemas.timeframes import MAX_TIME_US, MIN_TIME_US

Array = np.ndarray[Any, Any]

TRADE_DTYPES: Final[dict[str, Any]] = {
    "trade_id": np.int64,
    "price": np.float64,
    "size": np.float64,
    "side": np.int8,
    "exchange_time_us": np.int64,
    "receive_time_us": np.int64,
}
"""Columns of a block: those of the ``trades`` topic without ``symbol_code`` (a replay is of one instrument)."""

MALFORMED: Final = "malformed_row"
BAD_ID: Final = "bad_id"
BAD_PRICE: Final = "bad_price"
BAD_SIZE: Final = "bad_size"
BAD_TIME: Final = "bad_time"
OTHER_SYMBOL: Final = "other_symbol"

_MAX_RAW_BYTES: Final = 1 << 20

# Spot dumps went from ms to us on this day (2025-01-01); a file joined from both sides of it has both units, rightly.
_UNIT_SWITCH_US: Final = 1_735_689_600_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """One row that is not published but dead-lettered."""

    reason: str
    """Stable code: malformed_row, bad_id, bad_price, bad_size, bad_time, other_symbol."""
    detail: str
    """One sentence."""
    line: int
    """1-based line of the decompressed file (row, in a columnar file)."""
    raw: bytes
    """The line without its newline, at most 1 MiB of it."""
    time_us: int = 0
    """The row's own time where it could be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Some rows of a file, in its order."""

    columns: dict[str, Array]
    """Good rows: ``TRADE_DTYPES``."""
    rejected: tuple[Rejected, ...] = ()
    skipped: int = 0
    """Trades that were not asked for: another symbol or another kind of event of a capture."""

    @property
    def rows(self) -> int:
        """Trades of the instrument read, good or not."""
        return len(self.columns["trade_id"]) + len(self.rejected)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeUnit:
    """Unit of a file's times: microseconds of one unit as a fraction."""

    name: str
    numerator: int
    denominator: int = 1


SECONDS: Final = TimeUnit(name="seconds", numerator=1_000_000)
MILLIS: Final = TimeUnit(name="milliseconds", numerator=1_000)
MICROS: Final = TimeUnit(name="microseconds", numerator=1)
NANOS: Final = TimeUnit(name="nanoseconds", numerator=1, denominator=1_000)
UNITS: Final = (SECONDS, MILLIS, MICROS, NANOS)


def unit_of(value: int) -> TimeUnit | None:
    """The unit in which ``value`` is a time between 2009 and 2100; the four ranges do not overlap."""
    for unit in UNITS:
        if MIN_TIME_US <= value * unit.numerator // unit.denominator < MAX_TIME_US:
            return unit
    return None


def to_us(values: Array, unit: TimeUnit) -> tuple[Array, Array]:
    """``values`` (int64, in ``unit`` = MILLIS or MICROS) in microseconds, and where they are plausible (bool).

    A row in the other of the two units is a mistake, except on the other side of the day Binance's dumps changed theirs.
    """
    low, high = MIN_TIME_US // unit.numerator, MAX_TIME_US // unit.numerator
    good = (values >= low) & (values < high)
    if good.all():
        return values * unit.numerator, good
    other = MICROS if unit is MILLIS else MILLIS
    times = np.where(good, values, 0) * unit.numerator
    in_other = (values >= MIN_TIME_US // other.numerator) & (values < MAX_TIME_US // other.numerator)
    as_other = np.where(in_other, values, 0) * other.numerator
    in_other &= (as_other >= _UNIT_SWITCH_US) if other is MICROS else (as_other < _UNIT_SWITCH_US)
    return np.where(in_other, as_other, times), good | in_other


def check_rows(
    columns: Mapping[str, Array],
    malformed: Array | None,
    raw_of: Callable[[int], tuple[int, bytes]],
    *,
    bad_time: Array | None = None,
    raw_time: Array | None = None,
    unit_name: str = "microseconds",
) -> Block:
    """The block of ``columns``.

    Args:
        columns: ``TRADE_DTYPES``, all rows, times already in microseconds; values of a malformed row are arbitrary.
        malformed: bool, rows of which some field could not be read; None for none.
        raw_of: (line, text) of a row, asked for rejected rows only.
        bad_time: bool, rows whose time is not in the file's unit; None for none.
        raw_time: int64, the times as they stand in the file, for the message.
        unit_name: the file's unit, for the message.
    """
    price, size = columns["price"], columns["size"]
    times, received = columns["exchange_time_us"], columns["receive_time_us"]
    # comparisons with NaN are false, so "not good" catches it
    good_price = (price > 0) & (price < np.inf)
    good_size = (size > 0) & (size < np.inf)
    good_id = columns["trade_id"] >= 0
    good_time = (times >= MIN_TIME_US) & (times < MAX_TIME_US) & (received >= MIN_TIME_US) & (received < MAX_TIME_US)
    if bad_time is not None:
        good_time &= ~bad_time
    good = good_price & good_size & good_id & good_time
    if malformed is not None:
        good &= ~malformed
    if good.all():
        return Block(columns={name: np.ascontiguousarray(columns[name], dtype) for name, dtype in TRADE_DTYPES.items()})
    rejected = []
    for row in np.flatnonzero(~good).tolist():
        line, raw = raw_of(row)
        if malformed is not None and malformed[row]:
            reason, detail = MALFORMED, "A field is missing, too many, or cannot be read."
        elif not good_id[row]:
            reason, detail = BAD_ID, f"The trade id {columns['trade_id'][row]} is negative."
        elif not good_price[row]:
            reason, detail = BAD_PRICE, f"The price {price[row]} is not a number above 0."
        elif not good_size[row]:
            reason, detail = BAD_SIZE, f"The size {size[row]} is not a number above 0."
        else:
            reason, detail = BAD_TIME, _time_detail(int((times if raw_time is None else raw_time)[row]), unit_name)
        time_us = int(times[row]) if good_time[row] else 0
        rejected.append(Rejected(reason=reason, detail=detail, line=line, raw=raw[:_MAX_RAW_BYTES], time_us=time_us))
    return Block(
        columns={name: np.ascontiguousarray(columns[name][good], dtype) for name, dtype in TRADE_DTYPES.items()}, rejected=tuple(rejected)
    )


def _time_detail(value: int, unit_name: str) -> str:
    unit = unit_of(value)
    if unit is None:
        return f"The time {value} is none between 2009 and 2100 in {unit_name}."
    return f"The time {value} is in {unit.name}, the file's times are in {unit_name}."


def empty_columns() -> dict[str, Array]:
    """Columns without a row."""
    return {name: np.empty(0, dtype) for name, dtype in TRADE_DTYPES.items()}
