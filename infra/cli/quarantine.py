"""`marketstream quarantine list|show|release|discard`: suspect trades, and what people decide on them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from api.quality import REASONS, STATES, SuspectFilter, shown
from infra.cli.context import settings_of
from infra.cli.output import Output
from infra.errors import SettingsError
from infra.quarantine import Decided, desk
from infra.seam import SystemClock
from infra.settings import Settings
from processors.quality import DISCARDED, HELD, RELEASED
from schemas.errors import nearest
from schemas.timeframes import format_time_us, parse_duration_us, parse_time_us


def list_suspects(
    output: Output,
    *,
    data_dir: Path | None,
    exchange: str | None,
    symbol: str | None,
    reason: str | None,
    state: str | None,
    since: str | None,
    limit: int,
) -> None:
    """List suspects, newest trade first. Raises SettingsError for a reason, state or time that is none, UnreachableError."""
    asked = SuspectFilter(
        exchange=exchange or "",
        symbol=symbol or "",
        reason=_word("--reason", reason, REASONS),
        state=_word("--state", state, STATES),
        since_us=_since(since),
    )
    rows = [shown(row) for row in asyncio.run(_read(settings_of(data_dir), asked, limit))]
    if output.as_json:
        output.emit({"suspects": rows})
        return
    if not rows:
        output.line("No suspect trades of that kind.")
        return
    output.table(
        ("market", "trade id", "state", "reason", "price", "size", "side", "band", "time"),
        [
            (
                f"{row['exchange']}:{row['symbol']}",
                str(row["trade_id"]),
                row["state"],
                row["reason"],
                row["price"],
                row["size"],
                row["side"],
                _band(row),
                format_time_us(row["exchange_time_us"]),
            )
            for row in rows
        ],
    )


def show(output: Output, *, data_dir: Path | None, trade_id: int, exchange: str | None, symbol: str | None) -> None:
    """One suspect, or those of several markets with that id. Raises SettingsError when the trade was never held."""
    asked = SuspectFilter(exchange=exchange or "", symbol=symbol or "", trade_ids=(trade_id,))
    rows = [shown(row) for row in asyncio.run(_wanted(settings_of(data_dir), asked))]
    if output.as_json:
        output.emit({"suspects": rows})
        return
    for row in rows:
        for name, value in row.items():
            if value is not None:
                output.line(f"{name:<16} {format_time_us(value) if name.endswith('_us') and value > 0 else value}")


def release(output: Output, **how: Any) -> int:
    """Let suspects into the bars. Arguments as :func:`decide`."""
    return decide(output, RELEASED, **how)


def discard(output: Output, **how: Any) -> int:
    """Keep suspects out of the bars for good. Arguments as :func:`decide`."""
    return decide(output, DISCARDED, **how)


def decide(
    output: Output,
    state: int,
    *,
    data_dir: Path | None,
    trade_ids: Sequence[int],
    exchange: str | None,
    symbol: str | None,
    reason: str | None,
) -> int:
    """Give suspects a state; the repair makes their bars anew. Named trades whatever their state, else all that are held and match.

    Returns 0. Raises SettingsError when nothing says which, and for a trade that was never held.
    """
    verb = "release" if state == RELEASED else "discard"
    if not (trade_ids or exchange or symbol or reason):
        raise SettingsError(
            f"quarantine {verb} wants trade ids, --exchange, --symbol or --reason: `marketstream quarantine list` shows what is held."
        )
    asked = SuspectFilter(
        exchange=exchange or "",
        symbol=symbol or "",
        trade_ids=tuple(trade_ids),
        reason=_word("--reason", reason, REASONS),
        state="" if trade_ids else STATES[HELD],
    )
    decided = asyncio.run(_decide(settings_of(data_dir), asked, state))
    if output.as_json:
        output.emit({"results": [asdict(one) for one in decided], **Counter(one.state for one in decided if one.state != one.before)})
        return 0
    if not decided:
        output.line("No trade of that kind is held.")
    for one in decided:
        what = f"{one.state}; the repair makes its bars anew" if one.state != one.before else f"was {one.before} already"
        output.line(f"{one.exchange}:{one.symbol} {one.trade_id}: {what}.")
    return 0


async def _read(settings: Settings, asked: SuspectFilter, limit: int) -> list[dict[str, Any]]:
    async with desk(settings) as suspects:
        return await suspects.quality.suspects(asked, limit=limit)


async def _wanted(settings: Settings, asked: SuspectFilter) -> list[dict[str, Any]]:
    async with desk(settings) as suspects:
        return await suspects.wanted(asked)


async def _decide(settings: Settings, asked: SuspectFilter, state: int) -> list[Decided]:
    async with desk(settings) as suspects:
        found = await suspects.wanted(asked)
        if asked.trade_ids:
            _one_market_each(found)
        return await suspects.decide(found, state)


def _one_market_each(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise SettingsError for a trade id that several markets have: a decision must not reach further than meant."""
    markets: dict[int, str] = {}
    for row in rows:
        market = f"{row['exchange']}:{row['symbol']}"
        other = markets.setdefault(row["trade_id"], market)
        if other != market:
            raise SettingsError(f"Trade {row['trade_id']} is a suspect of {other} and of {market}: name one by --exchange and --symbol.")


def _word(option: str, text: str | None, known: Mapping[int, str]) -> str:
    if not text or text in known.values():
        return text or ""
    guess = nearest(text, known.values())
    raise SettingsError(
        f"{option} is '{text[:40]}'; " + (f"did you mean {guess}?" if guess else f"it is one of {', '.join(known.values())}.")
    )


def _since(text: str | None) -> int:
    if text is None:
        return 0
    try:
        return SystemClock().now_us() - parse_duration_us(text)
    except ValueError:
        pass
    try:
        return parse_time_us(text)
    except (ValueError, OverflowError):
        raise SettingsError(f"--since is '{text[:40]}'; write a time (2024-08-08T23:54:13Z) or how long ago, as in 10m.") from None


def _band(row: dict[str, Any]) -> str:
    low, high = row["band_low"], row["band_high"]
    return "" if low is None or high is None else f"{low:g} .. {high:g}"
