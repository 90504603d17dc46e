"""`marketstream quality`: how good each feed is, what it did wrong lately and which prices it may have."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

from api.quality import Quality
from infra.cli.context import settings_of
from infra.cli.output import Output
from infra.quarantine import desk
from schemas.timeframes import format_time_us

_DIGITS: Final = 4


def quality(output: Output, *, data_dir: Path | None, symbol: str | None, exchange: str | None, limit: int) -> None:
    """Show the feeds of a symbol, or of all, worst first; with a symbol also its newest scores. Raises UnreachableError."""
    feeds, held = asyncio.run(_read(data_dir, symbol or "", exchange or "", limit))
    feeds.sort(key=lambda feed: (feed["score"], feed["exchange"], feed["symbol"], feed["source"]))
    if output.as_json:
        output.emit({"feeds": feeds, **({"held_now": held} if symbol else {})})
        return
    if not feeds:
        output.line("No scores yet: a feed has its first after ten seconds of trades.")
        return
    output.table(("market", "source", "score", "passed", "failed", *_ANOMALIES, "band", "as of"), [_row(feed) for feed in feeds])
    for name, count in held.items():
        if count:
            output.note(f"{count:,} trade(s) of {name}:{symbol} held back: `marketstream quarantine list --symbol {symbol}` shows them.")


_ANOMALIES: Final = ("bad values", "bad times", "held", "confirmed", "spikes")


def _row(feed: dict[str, Any]) -> tuple[object, ...]:
    band = "" if feed["band_low"] is None else f"{feed['band_low']:g} .. {feed['band_high']:g}"
    return (
        f"{feed['exchange']}:{feed['symbol']}",
        feed["source"],
        round(feed["score"], _DIGITS),
        feed["checks_passed"],
        feed["checks_failed"],
        *feed["anomalies"].values(),
        band,
        format_time_us(feed["time_us"])[:19],
    )


async def _read(data_dir: Path | None, symbol: str, exchange: str, limit: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    async with desk(settings_of(data_dir)) as suspects:
        found: Quality = suspects.quality
        return await found.feeds(symbol, exchange=exchange, limit=limit), await found.held_now(symbol, exchange) if symbol else {}
