"""`marketstream coverage`: what of each feed was collected over a time, what is missing, and a report for the browser."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

from api.coverage import CHANNELS, CoverageQuery, TooMuchError
from api.errors import StoreUnavailableError
from infra.api_stores import ClickHouseHistory
from infra.cli.context import settings_of
from infra.cli.output import Output
from infra.coverage import LedgerReader
from infra.coverage_report import report
from infra.errors import SettingsError, UnreachableError
from infra.seam import SystemClock
from infra.settings import Settings
from schemas.errors import VocabularyError
from schemas.symbols import check_exchange, check_symbol
from schemas.timeframes import format_time_us, parse_time_us

_DAY_US: Final = 86_400_000_000
_MOST_GAPS: Final = 20
"""Gaps shown in a terminal, the newest; the report and --json have all."""


def coverage(
    output: Output,
    *,
    data_dir: Path | None,
    exchange: str | None,
    symbol: str | None,
    channel: str,
    start: str | None,
    end: str | None,
    html: Path | None,
) -> None:
    """Show coverage, or write it as a page. Raises SettingsError, UnreachableError."""
    now_us = SystemClock().now_us()
    wanted = _query(exchange, symbol, channel, start, end, now_us)
    feeds = asyncio.run(_read(settings_of(data_dir), wanted))
    if html is not None:
        page = report(feeds, start_us=wanted.start_us, end_us=wanted.end_us, channel=channel, written_us=now_us)
        html.write_text(page, "utf-8")
        output.note(f"{html}: {len(feeds)} feeds.")
    if output.as_json:
        output.emit({"channel": channel, "start_us": wanted.start_us, "end_us": wanted.end_us, "count": len(feeds), "feeds": feeds})
    elif html is None:
        _show(output, feeds, wanted)


def _query(exchange: str | None, symbol: str | None, channel: str, start: str | None, end: str | None, now_us: int) -> CoverageQuery:
    if channel not in CHANNELS:
        raise SettingsError(f"There is no channel '{channel}': one of {', '.join(CHANNELS)}.")
    if symbol and not exchange:
        raise SettingsError("--symbol is given without --exchange: the same symbol trades on several, name one.")
    try:
        if exchange:
            check_exchange(exchange)
        if symbol:
            check_symbol(symbol)
    except VocabularyError as exc:
        raise SettingsError(str(exc)) from None
    end_us = now_us if end is None else _time("--end", end)
    start_us = end_us - _DAY_US if start is None else _time("--start", start)
    if start_us >= end_us:
        raise SettingsError(f"--start {format_time_us(start_us)} is not before --end {format_time_us(end_us)}.")
    return CoverageQuery(start_us=start_us, end_us=end_us, exchange=exchange or "", symbol=symbol or "", channel=channel)


def _time(name: str, text: str) -> int:
    try:
        return parse_time_us(text)
    except (ValueError, OverflowError) as exc:
        raise SettingsError(f"{name}: {exc}") from None


async def _read(settings: Settings, wanted: CoverageQuery) -> list[dict[str, Any]]:
    store = ClickHouseHistory(settings.clickhouse)
    try:
        return await LedgerReader(store).read(wanted)
    except StoreUnavailableError as exc:
        raise UnreachableError(f"{exc.reason.rstrip('.')}: start the stack or set MARKETSTREAM_CLICKHOUSE_URL.") from exc
    except TooMuchError as exc:
        raise SettingsError(str(exc)) from None
    finally:
        await store.close()


def _show(output: Output, feeds: list[dict[str, Any]], wanted: CoverageQuery) -> None:
    if not feeds:
        output.line("No feed was collected in this time: a feed has its first interval a minute after it began.")
        return
    columns = ("market", "covered %", "filled", "open", "unfillable", "unknown %")
    rows = []
    for feed in feeds:
        states = [gap["state"] for gap in feed["gaps"]]
        counts = [states.count(state) for state in ("filled", "open", "unfillable")]
        rows.append((f"{feed['exchange']}:{feed['symbol']}", _percent(feed["covered"]), *counts, _percent(feed["shares"]["unknown"])))
    output.table(columns, rows, f"{format_time_us(wanted.start_us)[:19]} to {format_time_us(wanted.end_us)[:19]} UTC, {wanted.channel}")
    gaps = feeds[0]["gaps"] if len(feeds) == 1 else []
    if gaps:
        output.line("")
        output.table(("from", "to", "state", "evidence", "first id", "last id", "recovered"), [_gap(gap) for gap in gaps[-_MOST_GAPS:]])
    output.note("A complete interval is told once a minute: the last one may still be unknown.")


def _gap(gap: dict[str, Any]) -> tuple[object, ...]:
    end = "" if gap["end_us"] is None else format_time_us(gap["end_us"])
    ids = ("" if gap[name] is None else str(gap[name]) for name in ("first_id", "last_id"))
    return format_time_us(gap["start_us"]), end, gap["state"], gap["evidence"], *ids, gap["recovered"]


def _percent(share: float) -> float:
    return round(share * 100, 4)
