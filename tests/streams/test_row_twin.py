"""The row twin of bars: many rows at once, byte for byte what the row codec writes one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processors.avro_rows import encode_rows
from schemas.codec import RowCodec, frame_dtypes, schema_text
from schemas.symbols import parse_key
from schemas.timeframes import NAME_BY_SECONDS
from streams.row_twin import RowTwin

SYMBOLS = ("binance:BTC-USDT", "kraken:ETH-EUR", "mexc:" + "X" * 70 + "-USDT")
INT64 = st.integers(-(2**63), 2**63 - 1)
BAR = frame_dtypes(schema_text("bars"))


def strategy(dtype: np.dtype[Any]) -> st.SearchStrategy[Any]:
    """Any value of a column."""
    if dtype.kind == "f":
        return st.floats(allow_nan=False)
    return st.integers(-(2 ** (8 * dtype.itemsize - 1)), 2 ** (8 * dtype.itemsize - 1) - 1)


@st.composite
def bars(draw: st.DrawFn) -> dict[str, np.ndarray[Any, Any]]:
    """Columns of a bars frame with any numbers, final and open rows mixed."""
    rows = draw(st.integers(0, 12))
    found = {name: np.array([draw(strategy(dtype)) for _ in range(rows)], dtype) for name, dtype in BAR.items()}
    found["symbol_code"] = np.array([draw(st.integers(0, len(SYMBOLS) - 1)) for _ in range(rows)], np.int32)
    found["timeframe_s"] = np.array([draw(st.sampled_from(sorted(NAME_BY_SECONDS))) for _ in range(rows)], np.int32)
    for name in ("is_final", "complete"):
        found[name] = np.array([draw(st.integers(0, 1)) for _ in range(rows)], np.int8)
    return found


@settings(max_examples=80, deadline=None)
@given(columns=bars(), offset=INT64)
def test_every_final_bar_is_written_as_the_row_codec_writes_it(columns: dict[str, np.ndarray[Any, Any]], offset: int) -> None:
    """Any numbers, any series, final rows only and in their order; keys name the series."""
    codec = RowCodec("bars_row", 300)
    records = RowTwin(codec).records(2, offset, SYMBOLS, columns)
    rows = np.flatnonzero(columns["is_final"]).tolist()
    assert len(records) == len(rows)
    for record, row in zip(records, rows, strict=True):
        instrument = parse_key(SYMBOLS[columns["symbol_code"][row]])
        timeframe = NAME_BY_SECONDS[int(columns["timeframe_s"][row])]
        wanted = {name: column[row].item() for name, column in columns.items() if name not in ("symbol_code", "timeframe_s")}
        wanted |= {"exchange": instrument.exchange, "symbol": instrument.symbol, "timeframe": timeframe, "input_offset": offset}
        wanted |= {name: bool(wanted[name]) for name in ("is_final", "complete")}
        assert record.value == codec.encode(wanted)
        assert (record.topic, record.partition, record.key) == ("bars.rows", 2, f"{instrument.key}:{timeframe}".encode())


def test_a_series_has_the_same_bytes_the_second_time() -> None:
    """What is remembered of a series changes nothing."""
    columns = {name: np.ones(2, dtype) for name, dtype in BAR.items()}
    columns["symbol_code"] = np.zeros(2, np.int32)
    twin = RowTwin(RowCodec("bars_row", 3))
    assert twin.records(0, 7, SYMBOLS, columns) == twin.records(0, 7, SYMBOLS, columns)


def test_a_schema_of_another_form_is_refused() -> None:
    """Dead letters hold text and bytes after their names."""
    with pytest.raises(ValueError, match="deadletter"):
        RowTwin(RowCodec("deadletter", 4))


def test_columns_that_do_not_fit_are_refused() -> None:
    """No row is written from columns of other lengths."""
    with pytest.raises(ValueError, match="do not fit"):
        encode_rows([b"a", b"b"], np.zeros(1, np.int8), [np.zeros(3, np.int64)])
