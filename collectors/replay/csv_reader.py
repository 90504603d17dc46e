"""Blocks of lines of a CSV file in, blocks of checked trades out, through polars' CSV parser.

Measured on one core of two: 5.9 M rows/s parsed, of which checking costs a fifth. The parser is asked for nulls instead of errors, and a row
a line, so that a bad row is found by its position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import numpy as np
import polars as pl

from collectors.replay.layout import MARKETSTREAM, Layout
from collectors.replay.lines import LineBlock
from collectors.replay.rows import OTHER_SYMBOL, Array, Block, Rejected, check_rows, to_us
from schemas.symbols import SIDE_BUY, SIDE_SELL, Instrument

_DTYPES: Final[dict[str, Any]] = {
    "id": pl.Int64,
    "price": pl.Float64,
    "size": pl.Float64,
    "time": pl.Int64,
    "receive": pl.Int64,
    "maker": pl.Boolean,
}
_HIGH_TO_QUESTION_MARK: Final = bytes(range(128)) + b"?" * 128


def read_csv(blocks: Iterable[LineBlock], layout: Layout, instrument: Instrument, on_symbol: Callable[[str], None]) -> Iterator[Block]:
    """Blocks of the trades of ``instrument``. A file that names exchange and symbol has its other rows rejected as ``other_symbol``.

    ``on_symbol`` is told the ``exchange:symbol`` of such rows.
    """
    for lines in blocks:
        yield _read_block(lines, layout, instrument, on_symbol)


def _parse(data: bytes, layout: Layout) -> pl.DataFrame:
    # A header of our own, or polars takes the number of columns from the first row, which may be the bad one. It has one column more
    # than the file: that is null unless a row is too wide.
    by_position = {position: role for role, position in layout.roles.items()}
    names = [by_position.get(position, f"_{position}") for position in range(layout.field_count)] + ["_extra"]
    return pl.read_csv(
        ",".join(names).encode() + b"\n" + data,
        schema={name: _DTYPES.get(name, pl.String) for name in names},
        columns=[position for position, name in enumerate(names) if name in layout.roles or name == "_extra"],
        quote_char=None,
        ignore_errors=True,
        truncate_ragged_lines=True,
    )


def _read_block(lines: LineBlock, layout: Layout, instrument: Instrument, on_symbol: Callable[[str], None]) -> Block:
    data = lines.data
    try:
        frame = _parse(data, layout)
    except pl.exceptions.PolarsError:  # bytes that are no UTF-8 refuse the whole block; as '?' they spoil their own row only
        frame = _parse(data.translate(_HIGH_TO_QUESTION_MARK), layout)
    texts: list[bytes] = []

    def raw_of(row: int) -> tuple[int, bytes]:
        if not texts:
            texts.extend(data.split(b"\n"))
        return lines.first_line + row, texts[row].rstrip(b"\r")

    return block_of(frame, layout, instrument, raw_of, on_symbol)


def block_of(
    frame: pl.DataFrame,
    layout: Layout,
    instrument: Instrument,
    raw_of: Callable[[int], tuple[int, bytes]],
    on_symbol: Callable[[str], None],
) -> Block:
    """The block of ``frame``, whose columns are named by role (id, price, size, time, maker or side, ...; ``_extra`` not null = too wide).

    Blank lines are no rows. ``raw_of`` gives line and text of a row; it is asked only for rows that are not published.
    """
    malformed = _malformed(frame, layout)
    keep, others = _select(frame, layout, malformed, instrument, raw_of, on_symbol)
    if malformed is not None:
        blank = np.zeros(len(malformed), bool)
        blank[[row for row in np.flatnonzero(malformed).tolist() if not raw_of(row)[1].strip()]] = True
        keep = ~blank if keep is None else keep & ~blank
    if keep is None:
        return _checked(frame, layout, malformed, raw_of)
    rows = np.flatnonzero(keep)
    block = _checked(frame[rows], layout, None if malformed is None else malformed[rows], lambda row: raw_of(int(rows[row])))
    if not others:
        return block
    rejected = sorted([*block.rejected, *others], key=lambda item: item.line)
    return Block(columns=block.columns, rejected=tuple(rejected))


def _malformed(frame: pl.DataFrame, layout: Layout) -> Array | None:
    """Rows with a field missing, unreadable or too many; None for none."""
    bad = ~frame["_extra"].is_null() if frame["_extra"].null_count() != frame.height else None
    for role in layout.roles:
        if frame[role].null_count():
            missing = frame[role].is_null()
            bad = missing if bad is None else bad | missing
    if layout.format == MARKETSTREAM:
        wrong = ~frame["side"].is_in(["buy", "sell"]).fill_null(value=False)
        if wrong.any():
            bad = wrong if bad is None else bad | wrong
    return None if bad is None else bad.to_numpy()


def _select(
    frame: pl.DataFrame,
    layout: Layout,
    malformed: Array | None,
    instrument: Instrument,
    raw_of: Callable[[int], tuple[int, bytes]],
    on_symbol: Callable[[str], None],
) -> tuple[Array | None, list[Rejected]]:
    """Rows of the instrument (None = all) and the others, rejected. A malformed row is judged as such, not by its symbol."""
    if layout.format != MARKETSTREAM:
        return None, []
    mine = (frame["exchange"] == instrument.exchange) & (frame["symbol"] == instrument.symbol)
    keep: Array = mine.fill_null(value=False).to_numpy()
    if malformed is not None:
        keep = keep | malformed
    if keep.all():
        return None, []
    rejected = []
    keys = (frame["exchange"] + ":" + frame["symbol"]).to_list()
    for row in np.flatnonzero(~keep).tolist():
        line, raw = raw_of(row)
        on_symbol(keys[row])
        detail = f"The row is of {keys[row]}, the replay is of {instrument.key}."
        rejected.append(Rejected(reason=OTHER_SYMBOL, detail=detail, line=line, raw=raw))
    return keep, rejected


def _checked(frame: pl.DataFrame, layout: Layout, malformed: Array | None, raw_of: Callable[[int], tuple[int, bytes]]) -> Block:
    def column(role: str, fill: float) -> Array:
        series = frame[role]
        return (series.fill_null(fill) if malformed is not None else series).to_numpy()

    raw_time = column("time", 0)
    times, good_time = to_us(raw_time, layout.unit)
    # the maker was waiting in the book: where that is the buyer, the taker sold
    sell = column("maker", 0).astype(bool) if "maker" in layout.roles else (frame["side"] == "sell").fill_null(value=False).to_numpy()
    columns = {
        "trade_id": column("id", 0),
        "price": column("price", 1),
        "size": column("size", 1),
        "side": np.where(sell, SIDE_SELL, SIDE_BUY).astype(np.int8),
        "exchange_time_us": times,
        "receive_time_us": column("receive", 0) if "receive" in layout.roles else times,
    }
    bad_time = None if good_time.all() else ~good_time
    return check_rows(columns, malformed, raw_of, bad_time=bad_time, raw_time=raw_time, unit_name=layout.unit.name)
