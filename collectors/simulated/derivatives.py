"""REST bodies only perpetuals have: funding, premium index, open interest. Pure functions of seed, symbol and time; JSON text out."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from collectors.simulated.exchange import Venue

FUNDING_MS: Final = 8 * 3_600_000
"""Funding is paid every eight hours, at 00, 08 and 16 UTC."""


def _funding_of(venue: Venue, code: int, period: int) -> float:
    """The funding rate of one period: 0.01 % and noise around it, the same whenever it is asked for."""
    noise = np.random.Generator(np.random.PCG64([venue.market.config.seed, 7, code, period])).standard_normal()
    return round(0.0001 + 0.00008 * float(noise), 8)


def funding_rate(venue: Venue, codes: list[int] | None, *, start_ms: int | None, end_ms: int | None, limit: int, now_ms: int) -> str:
    """The body of ``fundingRate``: ascending by time; the newest ``limit`` without a start, else the oldest."""
    last = min(now_ms, end_ms if end_ms is not None else now_ms) // FUNDING_MS
    first = last - limit + 1 if start_ms is None else -(-start_ms // FUNDING_MS)
    first = max(first, (now_ms - 90 * 86_400_000) // FUNDING_MS)
    rows: list[str] = []
    for period in range(first, last + 1):
        for code in range(len(venue.wire.universe)) if codes is None else codes:
            if len(rows) == limit:
                break
            mark = f"{float(venue.wire.universe.price0[code]):.8f}"
            rows.append(
                f'{{"symbol":"{venue.wire.universe.symbols[code]}","fundingTime":{period * FUNDING_MS},'
                f'"fundingRate":"{_funding_of(venue, code, period):.8f}","markPrice":"{mark}"}}'
            )
    return "[" + ",".join(rows) + "]"


def premium_index(venue: Venue, code: int, now_ms: int) -> str:
    """The body of ``premiumIndex`` for one symbol."""
    mark, index = float(venue.market.mids()[code]), float(venue.market.index_prices()[code])
    period = now_ms // FUNDING_MS
    return (
        f'{{"symbol":"{venue.wire.universe.symbols[code]}","markPrice":"{mark:.8f}","indexPrice":"{index:.8f}",'
        f'"estimatedSettlePrice":"{index:.8f}","lastFundingRate":"{_funding_of(venue, code, period):.8f}","interestRate":"0.00010000",'
        f'"nextFundingTime":{(period + 1) * FUNDING_MS},"time":{now_ms}}}'
    )


def open_interest(venue: Venue, code: int, now_ms: int) -> str:
    """The body of ``openInterest`` for one symbol: swings by a tenth over hours around a level that fits its activity."""
    universe = venue.wire.universe
    coins = 4e9 * float(universe.weight[code]) / float(universe.price0[code])
    swing = 1.0 + 0.1 * math.sin(now_ms / 1.7e7 + code)
    lots = round(coins * swing * 10.0 ** int(universe.size_decimals[code]))
    return f'{{"openInterest":"{venue.wire.size(code, lots)}","symbol":"{universe.symbols[code]}","time":{now_ms}}}'
