"""Writes stored trades or bars into a file: ClickHouse in, CSV, Parquet or Arrow out.

Rows come in pages by key, so memory is that of one page whatever the range; the file appears under its name when it is whole. Columns and
their order are an interface: scripts rely on them, and ``replay`` reads an export of trades back.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import polars as pl
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
from clickhouse_connect.driver.exceptions import ClickHouseError

from collectors.replay.layout import EXPORT_COLUMNS
from infra.clickhouse.client import connect, unreachable
from infra.errors import DiskFullError, MarketstreamError, SettingsError
from infra.settings import Settings
from schemas.errors import SchemaError, VocabularyError, nearest
from schemas.symbols import SIDE_BUY, check_exchange, check_symbol
from schemas.timeframes import format_time_us, timeframe_name, timeframe_seconds

KINDS: Final = ("trades", "bars")
FILE_FORMATS: Final = ("csv", "parquet", "arrow")
TRADE_COLUMNS: Final = EXPORT_COLUMNS
BAR_COLUMNS: Final = (
    "open_time_us",
    "close_time_us",
    "open",
    "high",
    "low",
    "close",
    "volume",
    "quote_volume",
    "buy_volume",
    "trade_count",
    "vwap",
    "first_trade_id",
    "last_trade_id",
    "revision",
    "is_final",
    "complete",
)
PAGE_ROWS: Final = 250_000
"""About 16 MB of Arrow a page; the engine answers it in 0.2 s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSummary:
    """What was written."""

    path: str
    rows: int
    size_bytes: int


class NothingFoundError(MarketstreamError):
    """No row matches; the message names what there is. No file was written."""


class OutputFileError(MarketstreamError):
    """The file cannot be written."""

    exit_code = 7


def export(
    settings: Settings,
    kind: str,
    *,
    exchange: str,
    symbol: str,
    output: Path,
    timeframe: str = "1m",
    start_us: int | None = None,
    end_us: int | None = None,
    known_at_us: int | None = None,
    file_format: str = "csv",
    progress: Callable[[int, int], None] | None = None,
) -> ExportSummary:
    """Write the trades (by trade id) or bars (newest revision, by open time) of one instrument; replaces ``output`` when whole.

    Args:
        settings: where ClickHouse is.
        kind: ``trades`` or ``bars``.
        exchange: venue.
        symbol: canonical symbol.
        output: file to write; its folder must exist.
        timeframe: of bars.
        start_us: exchange time of a trade, open time of a bar: from here on.
        end_us: up to but without this.
        known_at_us: what was known then: trades and revisions published later are left out. Trades of a release that did not note the
            time count as known from the beginning, its bars from their close on.
        file_format: ``csv``, ``parquet`` or ``arrow`` (IPC file). Floats in CSV are the shortest text that reads back to the same bits.
        progress: told (rows written, rows to write in all) after each page.

    Raises:
        SettingsError: an unknown word, or a start that is not before the end.
        NothingFoundError: no row; the message names the nearest symbol, or the range or timeframes there are.
        OutputFileError, DiskFullError: the file cannot be written.
        UnreachableError: ClickHouse does not answer.
    """
    try:
        query = _Query(kind, exchange, symbol, timeframe, start_us, end_us, known_at_us)
        if file_format not in FILE_FORMATS:
            raise VocabularyError("file format", file_format, FILE_FORMATS)
    except SchemaError as exc:
        raise SettingsError(str(exc)) from exc
    client = connect(settings.clickhouse)
    try:
        total = query.count(client)
        if not total:
            raise NothingFoundError(query.what_there_is(client))
        return _write(query.pages(client), query.columns, total, output, file_format, progress)
    except ClickHouseError as exc:
        raise unreachable(settings.clickhouse, exc) from exc
    finally:
        client.close()


class _Query:
    """One export's questions to ClickHouse."""

    def __init__(
        self,
        kind: str,
        exchange: str,
        symbol: str,
        timeframe: str,
        start_us: int | None,
        end_us: int | None,
        known_at_us: int | None,
    ) -> None:
        if kind not in KINDS:
            raise VocabularyError("kind of rows", kind, KINDS)
        if start_us is not None and end_us is not None and start_us >= end_us:
            raise SettingsError(f"The start {format_time_us(start_us)} is not before the end {format_time_us(end_us)}: swap them.")
        self.is_bars = kind == "bars"
        self.table = kind
        self.columns = BAR_COLUMNS if self.is_bars else TRADE_COLUMNS
        self._time = "open_time_us" if self.is_bars else "exchange_time_us"
        self._key = "open_time_us" if self.is_bars else "trade_id"
        self._parameters: dict[str, Any] = {"e": check_exchange(exchange), "s": check_symbol(symbol)}
        where = ["exchange = {e:String}", "symbol = {s:String}"]
        if self.is_bars:
            self._parameters["f"] = timeframe_seconds(timeframe)
            where.append("timeframe_s = {f:Int32}")
        self._name = f"{exchange} {symbol}"
        self._range = start_us is not None or end_us is not None
        self._of_instrument = " AND ".join(where)
        self._known_at_us = known_at_us
        if known_at_us is not None:
            self._parameters["t"] = known_at_us
            where.append("known_at_us <= {t:Int64}")
            if self.is_bars:  # a release that did not note the time published a bar no sooner than it closed
                where.append("(known_at_us > 0 OR close_time_us <= {t:Int64})")
        for limit, sign, name in ((start_us, ">=", "a"), (end_us, "<", "b")):
            if limit is not None:
                self._parameters[name] = limit
                where.append(f"{self._time} {sign} {{{name}:Int64}}")
        self._where = " AND ".join(where)

    def count(self, client: Any) -> int:
        """Rows the export will have."""
        what = "uniqExact(open_time_us)" if self.is_bars else "count()"
        return int(client.query(f"SELECT {what} FROM {self.table} WHERE {self._where}", parameters=self._parameters).result_rows[0][0])

    def pages(self, client: Any) -> Iterator[pl.DataFrame]:
        """The rows in order, at most ``PAGE_ROWS`` at once."""
        # the order of the primary key up to the key: the engine reads on from where the last page ended and stops after the limit
        # live updates of an open bar share its revision: the last one written is the newest
        order = "open_time_us, revision DESC, is_final DESC, kafka_offset DESC LIMIT 1 BY open_time_us" if self.is_bars else "trade_id"
        after: int | None = None
        while True:
            where = self._where if after is None else f"{self._where} AND {self._key} > {{k:Int64}}"
            parameters = self._parameters if after is None else {**self._parameters, "k": after}
            text = f"SELECT {', '.join(self.columns)} FROM {self.table} WHERE {where} ORDER BY {order} LIMIT {PAGE_ROWS}"
            page = pl.from_arrow(client.query_arrow(text, parameters=parameters, use_strings=True))
            assert isinstance(page, pl.DataFrame)
            if page.height:
                yield page
            if page.height < PAGE_ROWS:
                return
            after = int(page[self._key][-1])

    def what_there_is(self, client: Any) -> str:
        """One sentence on why nothing was found and what to ask for instead."""
        held = client.query(
            f"SELECT min({self._time}), max({self._time}), count() FROM {self.table} WHERE {self._of_instrument}",
            parameters=self._parameters,
        ).result_rows[0]
        if held[2] and self._known_at_us is not None and not self._range:
            return f"No {self.table} of {self._name} were known at {format_time_us(self._known_at_us)}: move --known-at."
        if held[2]:
            span = f"{format_time_us(held[0])} to {format_time_us(held[1])}"
            return f"No {self.table} of {self._name} lie in that range; those stored go from {span}: move --start or --end."
        if self.is_bars:
            frames = client.query(
                "SELECT DISTINCT timeframe_s FROM bars WHERE exchange = {e:String} AND symbol = {s:String} ORDER BY timeframe_s",
                parameters=self._parameters,
            ).result_rows
            if frames:
                names = ", ".join(timeframe_name(row[0]) for row in frames)
                return f"No bars of {self._name} of that timeframe are stored; there are {names}."
        rows = client.query(f"SELECT DISTINCT exchange, symbol FROM {self.table}").result_rows
        if not rows:
            return f"No {self.table} are stored at all: start a source, or replay a file."
        found = nearest(f"{self._parameters['e']} {self._parameters['s']}", [f"{exchange} {symbol}" for exchange, symbol in rows])
        hint = f"did you mean {found}?" if found else "`marketstream status` and /api/v1/symbols say what is."
        return f"No {self.table} of {self._name} are stored: {hint}"


class _Writer(Protocol):
    def write(self, page: pl.DataFrame) -> None: ...

    def close(self) -> None: ...


class _CsvWriter:
    def __init__(self, file: Any) -> None:
        self._file = file
        self._header = True

    def write(self, page: pl.DataFrame) -> None:
        page.write_csv(self._file, include_header=self._header)
        self._header = False

    def close(self) -> None:
        self._file.flush()


class _ArrowWriter:
    def __init__(self, file: Any, *, parquet: bool) -> None:
        self._file = file
        self._parquet = parquet
        self._writer: Any = None

    def write(self, page: pl.DataFrame) -> None:
        # polars hands out string views, which few readers know
        table = pa.table({name: _plain(page[name]) for name in page.columns})
        if self._writer is None:
            if self._parquet:  # checksums: a flipped bit in a column of numbers is another number, and nothing else would tell
                self._writer = pyarrow.parquet.ParquetWriter(self._file, table.schema, write_page_checksum=True)
            else:
                self._writer = pa.ipc.new_file(self._file, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        self._writer.close()
        self._file.flush()


def _plain(series: pl.Series) -> Any:
    array = series.to_arrow()
    return array.cast(pa.string()) if series.dtype == pl.String else array


def _write(
    pages: Iterator[pl.DataFrame],
    columns: tuple[str, ...],
    total: int,
    output: Path,
    file_format: str,
    progress: Callable[[int, int], None] | None,
) -> ExportSummary:
    if output.is_dir():
        raise OutputFileError(f"{output} is a folder; name a file in it with -o.")
    partial = output.with_name(f".{output.name}.{os.getpid()}.part")
    rows = 0
    try:
        with partial.open("wb") as file:
            writer: _Writer = _CsvWriter(file) if file_format == "csv" else _ArrowWriter(file, parquet=file_format == "parquet")
            for page in pages:
                writer.write(_as_text(page).select(columns))
                rows += page.height
                if progress is not None:
                    progress(rows, max(total, rows))
            writer.close()
            os.fsync(file.fileno())
        partial.replace(output)
    except OSError as exc:
        raise _unwritable(output, exc) from exc
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return ExportSummary(path=str(output), rows=rows, size_bytes=output.stat().st_size)


def _as_text(page: pl.DataFrame) -> pl.DataFrame:
    """``page`` with exchange, symbol and side as words."""
    if "side" not in page.columns:
        return page
    side = pl.when(pl.col("side") == SIDE_BUY).then(pl.lit("buy")).otherwise(pl.lit("sell"))
    return page.with_columns(side.alias("side"), pl.col("exchange", "symbol").cast(pl.String))


def _unwritable(output: Path, exc: OSError) -> MarketstreamError:
    if exc.errno == errno.ENOSPC:
        return DiskFullError(f"The disk of {output} is full; nothing was written there: free some space or name another folder with -o.")
    if isinstance(exc, FileNotFoundError):
        return OutputFileError(f"The folder {output.parent} does not exist; create it or name another with -o.")
    return OutputFileError(f"{output} cannot be written ({exc.strerror or exc}); name another file with -o.")
