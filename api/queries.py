"""SQL of the API: what to read in, a query with its parameters out. No I/O.

Every value travels as a query parameter; only names from our own tables stand in the text. ``kafka_offset < {before}`` pins an answer to one
state of the store: rows are stored in offset order, so whatever stands before an offset that is stored is stored too. ``known_at`` asks for an
earlier state of knowledge: rows published until then, and of those the newest revision of each bar (both revisions of a bar are kept).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from api.live.series import SeriesKey
from api.rows import COLUMNS, KEY, SELECT, TIME

Query = tuple[str, dict[str, Any]]
"""SQL and its parameters."""

# JSON as our own encoder writes it: numbers unquoted, NaN as null.
JSON_SETTINGS: Final = "output_format_json_quote_64bit_integers = 0, output_format_json_quote_denormals = 0"
"""For JSONEachRow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """Rows of one page."""

    key: SeriesKey
    start_us: int
    end_us: int
    """``[start, end)`` of the row's time."""
    before: int
    """Rows of records before this offset only."""
    backward: bool
    """The newest rows of the range instead of the oldest; they are listed oldest first either way."""
    beyond: int | None
    """Key of the outermost row of the page before, exclusive; None on the first page."""
    limit: int
    known_at_us: int | None = None
    """Rows published later are left out: the answer is what was known then. None: all."""


def series_where(key: SeriesKey) -> tuple[str, dict[str, Any]]:
    """The condition that names a series, with its parameters."""
    where = "exchange = {exchange:String} AND symbol = {symbol:String}"
    parameters: dict[str, Any] = {"exchange": key.exchange, "symbol": key.symbol}
    if key.timeframe_s:
        where += " AND timeframe_s = {timeframe_s:Int32}"
        parameters["timeframe_s"] = key.timeframe_s
    return where, parameters


def _newest_revision(key: SeriesKey, direction: str = "") -> str:
    """``ORDER BY`` along the primary key, and of each bar the newest revision."""
    name = KEY[key.channel]
    if not key.timeframe_s:
        return f"ORDER BY {name} {direction}"
    # the repair and the worker may publish one revision each (a bar the repair closed while the worker was away): the later one is valid
    return f"ORDER BY {name} {direction}, revision DESC, kafka_offset DESC LIMIT 1 BY {name}"


def _page_where(page: Page) -> tuple[str, dict[str, Any]]:
    where, parameters = series_where(page.key)
    time = TIME[page.key.channel]
    where += f" AND {time} >= {{start:Int64}} AND {time} < {{end:Int64}} AND kafka_offset < {{before:UInt64}}"
    parameters |= {"start": page.start_us, "end": page.end_us, "before": page.before}
    if page.known_at_us is not None:
        where += " AND known_at_us <= {known_at:Int64}"
        if page.key.timeframe_s:  # a release that did not note the time published a bar no sooner than it closed
            where += " AND (known_at_us > 0 OR close_time_us <= {known_at:Int64})"
        parameters["known_at"] = page.known_at_us
    if page.beyond is not None:
        where += f" AND {KEY[page.key.channel]} {'<' if page.backward else '>'} {{beyond:Int64}}"
        parameters["beyond"] = page.beyond
    return where, parameters


def page_rows(page: Page, *, json: bool = True, extra: int = 1) -> Query:
    """The page's rows and ``extra`` more that tell whether another page follows (the first row then, where it runs backward)."""
    channel = page.key.channel
    where, parameters = _page_where(page)
    direction = "DESC" if page.backward else ""
    inner = f"SELECT {COLUMNS[channel]} FROM {channel} WHERE {where} {_newest_revision(page.key, direction)} LIMIT {{limit:UInt64}}"
    parameters["limit"] = page.limit + extra
    order = f" ORDER BY {KEY[channel]}" if page.backward else ""
    settings = f" SETTINGS {JSON_SETTINGS}" if json else ""
    return f"SELECT {SELECT[channel]} FROM ({inner}){order}{settings}", parameters


def page_edge(page: Page) -> Query:
    """(key of the page's outermost row, rows of the page, rows seen when one more is read) as one TSV line."""
    channel, name = page.key.channel, KEY[page.key.channel]
    where, parameters = _page_where(page)
    direction = "DESC" if page.backward else ""
    distinct = f"LIMIT 1 BY {name}" if page.key.timeframe_s else ""
    rows = f"SELECT {name} AS k FROM {channel} WHERE {where} ORDER BY {name} {direction} {distinct} LIMIT {{limit:UInt64}}"
    parameters |= {"limit": page.limit + 1, "page": page.limit}
    edge = "min" if page.backward else "max"
    return f"SELECT {edge}(k), count(), (SELECT count() FROM ({rows})) FROM (SELECT k FROM ({rows}) LIMIT {{page:UInt64}})", parameters


def applied(channel: str, partition: int, at_least: int = 0) -> Query:
    """Offset of the newest record stored of a partition; no row where none from ``at_least`` on is.

    Asked from the last known offset on, the index over offsets leaves a few granules to read: 4 ms instead of 76 ms at 20 M trades.
    """
    sql = f"SELECT toInt64(max(kafka_offset)) FROM {channel} WHERE kafka_partition = {{partition:UInt16}} AND kafka_offset >= {{at_least:UInt64}}"
    return f"{sql} GROUP BY kafka_partition", {"partition": partition, "at_least": at_least}


def known_keys(key: SeriesKey, keys: Sequence[int], before: int) -> Query:
    """(key, newest revision, largest input offset of its rows, whether the repair's is among them) of those ``keys`` that are stored."""
    where, parameters = series_where(key)
    name = KEY[key.channel]
    parameters |= {"keys": list(keys), "before": before}
    where += f" AND {name} IN {{keys:Array(Int64)}} AND kafka_offset < {{before:UInt64}}"
    if not key.timeframe_s:
        return f"SELECT {name}, 0, -1, 0 FROM {key.channel} WHERE {where} GROUP BY {name}", parameters
    rows = f"SELECT {name}, revision, max(input_offset), max(input_offset < 0) FROM {key.channel} WHERE {where} GROUP BY {name}, revision"
    return f"{rows} ORDER BY {name}, revision DESC LIMIT 1 BY {name}", parameters


def due_rows(key: SeriesKey, floor_key: int, until_us: int, before: int, limit: int) -> Query:
    """Rows a page's reader has not had: key above ``floor_key``, time from ``until_us`` on, of records before ``before``."""
    where, parameters = series_where(key)
    channel = key.channel
    where += f" AND {KEY[channel]} > {{floor:Int64}} AND {TIME[channel]} >= {{until:Int64}} AND kafka_offset < {{before:UInt64}}"
    parameters |= {"floor": floor_key, "until": until_us, "before": before, "limit": limit}
    inner = f"SELECT {COLUMNS[channel]} FROM {channel} WHERE {where} {_newest_revision(key)} LIMIT {{limit:UInt64}}"
    return f"SELECT {SELECT[channel]} FROM ({inner}) SETTINGS {JSON_SETTINGS}", parameters


def traded() -> Query:
    """Per instrument: first and last trade time and count. Answered from the table's projection, a row an instrument and part."""
    return (
        "SELECT exchange, symbol, min(exchange_time_us) AS first_trade_time_us, max(exchange_time_us) AS last_trade_time_us,"
        f" count() AS trade_count FROM trades GROUP BY exchange, symbol ORDER BY exchange, symbol SETTINGS {JSON_SETTINGS}",
        {},
    )


def with_bars() -> Query:
    """Instruments that have bars."""
    return "SELECT DISTINCT exchange, symbol FROM bars WHERE timeframe_s = 86400 OR timeframe_s = 3600", {}
