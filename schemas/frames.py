"""Frames: the columnar micro-batch that flows through every topic, as numpy columns or a polars DataFrame.

A frame holds rows of one Kafka partition. ``symbols`` is its dictionary of instrument keys, ``columns["symbol_code"]`` indexes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from schemas.errors import EncodeError

if TYPE_CHECKING:
    import polars as pl

END_OF_SOURCE: Final = 1
"""Flag: the source ends here and will send no more; its open bars are closed as incomplete."""
HISTORY: Final = 2
"""Flag: trades of the past, fetched after their bars were closed. They are stored; bars of the past are made anew by the repair."""

Columns = Mapping[str, np.ndarray[Any, Any]]

GAP_COMPLETE: Final = 0
GAP_OPEN: Final = 1
GAP_FILLED: Final = 2
GAP_UNFILLABLE: Final = 3
"""States of an interval of the coverage ledger, in topic ``gaps`` and in :class:`GapNotice`."""


class GapNotice(NamedTuple):
    """What a collector knows to be missing of one symbol, told in the order of the trades: bars are not complete over it."""

    symbol_code: int
    gap_id: int
    """The gap's id in topic ``gaps``, unique per symbol."""
    start_time_us: int
    """Time of the last row before it."""
    end_time_us: int
    """Time of the first row after it."""
    state: int
    """GAP_OPEN, GAP_FILLED or GAP_UNFILLABLE."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """Rows of one partition with what their reader must know about them."""

    source: str
    """Who made the rows, e.g. ``binance/ws``; watermarks are per source."""
    watermark_us: int
    """No row of this source older than this will follow."""
    symbols: tuple[str, ...] = ()
    """Instrument keys that ``symbol_code`` indexes."""
    columns: Columns = field(default_factory=dict)
    """One contiguous array a column, all of the same length."""
    input_offset: int = -1
    """Kafka offset of the input record these rows were made from; -1 at a collector."""
    flags: int = 0
    """Bits: END_OF_SOURCE, HISTORY."""
    gaps: tuple[GapNotice, ...] = ()
    """Frames of trades only: what of the feed is missing or no longer missing, as of after this frame's rows."""

    @property
    def row_count(self) -> int:
        """Number of rows."""
        code = self.columns.get("symbol_code")
        return 0 if code is None else len(code)

    def to_polars(self) -> pl.DataFrame:
        """The rows as a polars DataFrame with ``exchange`` and ``symbol`` as text instead of the code."""
        import polars as pl  # not at the top: collectors never need polars, and it costs 40 MB a process

        codes = self.columns["symbol_code"] if self.columns else np.empty(0, np.int32)
        pairs = [key.partition(":") for key in self.symbols]
        exchange = np.array([p[0] for p in pairs], dtype=object)[codes] if pairs else np.empty(0, object)
        symbol = np.array([p[2] for p in pairs], dtype=object)[codes] if pairs else np.empty(0, object)
        data: dict[str, Any] = {
            "exchange": pl.Series(exchange, dtype=pl.String),
            "symbol": pl.Series(symbol, dtype=pl.String),
        }
        data.update({name: column for name, column in self.columns.items() if name != "symbol_code"})
        return pl.DataFrame(data)


def frame_from_polars(rows: pl.DataFrame, *, source: str, watermark_us: int, dtypes: Mapping[str, np.dtype[Any]]) -> Frame:
    """A frame of ``rows`` (``exchange``, ``symbol`` and the topic's columns), for all its symbols, whatever their partition.

    ``dtypes`` names the topic's columns (``FrameSchema.dtypes``). Raises EncodeError when one is missing.
    """
    missing = sorted(set(dtypes) - {"symbol_code"} - set(rows.columns))
    if missing:
        raise EncodeError(f"The DataFrame lacks the column(s) {', '.join(missing)}.")
    keys = [f"{exchange}:{symbol}" for exchange, symbol in rows.select("exchange", "symbol").iter_rows()]
    codes: dict[str, int] = {}
    symbol_code = np.fromiter((codes.setdefault(key, len(codes)) for key in keys), np.int32, len(keys))
    columns = {"symbol_code": symbol_code}
    for name, dtype in dtypes.items():
        if name != "symbol_code":
            columns[name] = np.ascontiguousarray(rows[name].to_numpy(), dtype=dtype)
    return Frame(source=source, watermark_us=watermark_us, symbols=tuple(codes), columns=columns)


def concat_columns(parts: Sequence[Columns]) -> dict[str, np.ndarray[Any, Any]]:
    """Columns of several parts after each other; all parts have the same columns."""
    if len(parts) == 1:
        return dict(parts[0])
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
