"""Parquet and Arrow files in, blocks of checked trades out: our exports, and trades with Binance's column names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import polars as pl
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from collectors.replay.bytesource import access_error
from collectors.replay.csv_reader import block_of
from collectors.replay.errors import FormatError, NoRowsError
from collectors.replay.layout import MARKETSTREAM, Layout, layout_of_names
from collectors.replay.rows import MICROS, MILLIS, Block, TimeUnit, unit_of
from schemas.symbols import Instrument

PARQUET_MAGIC: Final = b"PAR1"
ARROW_MAGIC: Final = b"ARROW1"
_BATCH_ROWS: Final = 131_072


class ColumnarReader:
    """One Parquet or Arrow file. Raises FormatError when it is damaged or has other columns, NoRowsError when it is empty."""

    def __init__(self, path: Path, *, is_parquet: bool, base_sizes: bool, batch_rows: int = _BATCH_ROWS) -> None:
        self._path = path
        self._is_parquet = is_parquet
        self._batch_rows = batch_rows
        self.rows_done = 0
        first = next((frame for frame in self._frames() if frame.height), None)
        if first is None:
            raise NoRowsError(path, "holds no row.")
        names = first.columns
        draft = layout_of_names(path, names, MICROS, base_sizes=base_sizes)
        unit = _unit(path, first.to_series(draft.roles["time"]), ours=draft.format == MARKETSTREAM)
        self.layout: Layout = layout_of_names(path, names, unit, base_sizes=base_sizes)

    def read(self, instrument: Instrument, on_symbol: Callable[[str], None]) -> Iterator[Block]:
        """Blocks of the trades of ``instrument``; other rows are rejected, as in a CSV file."""
        self.rows_done = 0
        for frame in self._frames():
            start = self.rows_done

            def raw_of(row: int, frame: pl.DataFrame = frame, start: int = start) -> tuple[int, bytes]:
                return start + row + 1, ",".join("" if value is None else str(value) for value in frame.row(row)).encode()

            yield block_of(_by_role(frame, self.layout), self.layout, instrument, raw_of, on_symbol)
            self.rows_done += frame.height

    def _frames(self) -> Iterator[pl.DataFrame]:
        try:
            for batch in self._parquet_batches() if self._is_parquet else self._arrow_batches():
                # a damaged file can hold offsets beyond its buffers and text that is no UTF-8: reading those ends the process
                batch.validate(full=True)
                table = _plain(batch)
                for start in range(0, table.num_rows, self._batch_rows):
                    found = pl.from_arrow(table.slice(start, self._batch_rows))
                    assert isinstance(found, pl.DataFrame)
                    yield found
        except (pa.ArrowException, pl.exceptions.PolarsError, UnicodeDecodeError) as exc:
            kind = "Parquet" if self._is_parquet else "Arrow"
            raise FormatError(self._path, f"is a damaged or incomplete {kind} file ({_first_sentence(exc)}); write it again.") from exc
        except OSError as exc:
            if exc.errno is None:  # Arrow reports broken content as OSError too
                raise FormatError(self._path, f"is damaged ({_first_sentence(exc)}); write it again.") from exc
            raise access_error(self._path, exc) from exc

    def _parquet_batches(self) -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(self._path, page_checksum_verification=True) as file:
            yield from file.iter_batches(batch_size=self._batch_rows)

    def _arrow_batches(self) -> Iterator[Any]:
        with pa.OSFile(str(self._path), "rb") as raw, pyarrow.ipc.open_file(raw) as file:
            for index in range(file.num_record_batches):
                yield file.get_batch(index)


def _plain(batch: Any) -> Any:
    """The columns and names of ``batch`` and nothing else: damaged metadata and time zones make polars panic. Times stay UTC."""
    arrays = [column.cast(pa.timestamp(column.type.unit)) if pa.types.is_timestamp(column.type) else column for column in batch.columns]
    return pa.Table.from_arrays(arrays, names=batch.schema.names)


def _first_sentence(exc: Exception) -> str:
    return str(exc).splitlines()[0][:120] if str(exc) else type(exc).__name__


def _unit(path: Path, times: pl.Series, *, ours: bool) -> TimeUnit:
    if isinstance(times.dtype, pl.Datetime):
        return MICROS
    known = times.cast(pl.Int64, strict=False).drop_nulls()
    unit = unit_of(int(known.sort()[known.len() // 2])) if known.len() else None
    if unit is None or unit not in ((MICROS,) if ours else (MILLIS, MICROS)):
        seen = f"in {unit.name}" if unit is not None else "no times between 2009 and 2100 in any unit"
        raise FormatError(path, f"the times are {seen}; this format has microseconds{'' if ours else ' or milliseconds'}: convert them.")
    return unit


def _by_role(frame: pl.DataFrame, layout: Layout) -> pl.DataFrame:
    columns = [_cast(frame.to_series(position), role).alias(role) for role, position in layout.roles.items()]
    return pl.DataFrame([*columns, pl.Series("_extra", [None] * frame.height, pl.String)])


def _cast(series: pl.Series, role: str) -> pl.Series:
    """``series`` with the type its role has; null where it cannot be read."""
    if role in ("id", "time", "receive"):
        if isinstance(series.dtype, pl.Datetime):
            return series.dt.epoch("us")
        return series.cast(pl.Int64, strict=False)
    if role in ("price", "size"):
        return series.cast(pl.Float64, strict=False)
    if role == "maker" and series.dtype != pl.Boolean:
        return (
            series.cast(pl.String).str.to_lowercase().replace_strict({"true": True, "false": False}, default=None, return_dtype=pl.Boolean)
        )
    if role == "side" and series.dtype.is_integer():
        return series.replace_strict({1: "buy", -1: "sell"}, default=None, return_dtype=pl.String)
    return series if role == "maker" else series.cast(pl.String)
