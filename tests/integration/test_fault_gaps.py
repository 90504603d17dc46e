"""Trades lost in more than twenty ways on the real stack: the ledger names exactly those ids, and after the repair nothing is missing.

Each way of losing trades has a symbol of its own, on one exchange, one collector, worker, sink and repair. ``PROVE_FAULT_IDS`` ids are
dropped in all (default 200; 1,000 for the full proof). What the exchange really sent is known to it (``track_sent``), so the ids that did not
arrive are computed from the market's own record and not from what was asked for. A feed that goes silent is timed by what the ledger says of
it: from the moment the exchange stopped sending to the row that doubts every symbol, and from that row to the new subscription.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from collectors.dedupe import EVIDENCE_HEARTBEAT, EVIDENCE_RESTART, EVIDENCE_SILENCE
from collectors.simulated.config import ServerConfig
from collectors.simulated.exchange import ExchangeConfig
from collectors.simulated.faults import FaultRequest
from collectors.simulated.peer import Peer
from collectors.simulated.regimes import MarketConfig
from collectors.simulated.server import SimulatedExchange, serve
from infra.provision import provision
from infra.seam import SystemClock
from schemas.timeframes import TIMEFRAME_SECONDS
from tests.integration.conftest import RunningStack
from tests.integration.fault_chain import (
    Chain,
    eventually,
    figure,
    ids_of,
    isolated,
    ledger,
    repair_times_s,
    stored_trades,
    table,
)
from tests.integration.fault_rig import canonical
from tests.integration.fault_tables import BAR_KEY, TRADE_COLUMNS, closed_bars, difference, final_bars, sha256, undisturbed

TOTAL_IDS = int(os.environ.get("PROVE_FAULT_IDS", "200"))
SYMBOLS = 10
RATE = 2_000.0 if TOTAL_IDS <= 400 else 4_000.0
STALE_LIMIT_S, RECONNECT_LIMIT_S, REPAIR_LIMIT_S = 3.0, 1.0, 10.0
# Full jitter doubles a first back-off of half a second at most; opening, subscribing and the exchange's step of 40 ms come on top.
JITTER_S = 1.0
PROVEN_S = 5.6
STALE_METRIC = "collector_stale_reconnects_total"

Way = Callable[["Scene", str, int], Awaitable[None]]


@dataclass
class Scene:
    """The exchange and the chain, and what was done to them."""

    exchange: SimulatedExchange
    chain: Chain
    late: dict[str, set[int]] = field(default_factory=dict)
    """Ids that were sent, but after newer ones."""
    holes: dict[str, set[int]] = field(default_factory=dict)
    lost: dict[str, set[int]] = field(default_factory=dict)
    windows: list[dict[str, tuple[int, int]]] = field(default_factory=list)
    """Ids made while a connection or the collector went down and came back: see :func:`_excused`."""
    figures: dict[str, float] = field(default_factory=dict)

    def mark(self) -> dict[str, int]:
        """The next id of every symbol."""
        market = self.exchange.exchange.venues["spot"].market
        return dict(zip(market.universe.symbols, market.next_trade_id.tolist(), strict=True))

    async def touched(self, fault: str, symbol: str, count: int, **more: Any) -> FaultRequest:
        """Begin a fault on a symbol's trades and wait until it touched all it should."""
        request = self.exchange.inject({"fault": fault, "symbol": symbol, "count": count, **more})
        async with asyncio.timeout(60):
            while request.remaining:
                await asyncio.sleep(0.005)
        return request

    @asynccontextmanager
    async def disturbed(self) -> AsyncIterator[None]:
        """What happens inside breaks connections; the ids made meanwhile are noted."""
        # A connection that breaks before it is proven counts as a failed attempt, and the next one waits longer.
        now_us = self.exchange.monotonic_us()
        await asyncio.sleep(max([0.3, *(PROVEN_S - (now_us - peer.opened_us) / 1e6 for peer in self.exchange.connections)]))
        before = self.mark()
        yield
        await asyncio.sleep(1.0)
        after = self.mark()
        self.windows.append({symbol: (first, after[symbol]) for symbol, first in before.items()})

    async def reconnected(self, symbol: str, old: set[Peer], limit_s: float = 20.0) -> float:
        """Seconds until a connection that is not in ``old`` has subscribed to ``symbol``."""
        begun = time.monotonic()
        code = self.exchange.exchange.venues["spot"].market.code(symbol)
        while not any(peer not in old and peer.subscriptions.trades.mask[code] for peer in self.exchange.connections):
            assert time.monotonic() - begun < limit_s, "no new connection"
            await asyncio.sleep(0.002)
        return time.monotonic() - begun

    def peers(self) -> set[Peer]:
        """The open connections."""
        return set(self.exchange.connections)


# Ways that need nothing but a symbol: they run side by side.


async def singles(scene: Scene, symbol: str, count: int) -> None:
    """One here, one there."""
    for _ in range(count):
        await scene.touched("drop", symbol, 1)
        await asyncio.sleep(0.1)


async def burst(scene: Scene, symbol: str, count: int) -> None:
    """Many in a row."""
    await scene.touched("drop", symbol, count)


async def overlapping(scene: Scene, symbol: str, count: int) -> None:
    """Two holes, the second opens before the first is closed."""
    await scene.touched("drop", symbol, count // 2)
    await asyncio.sleep(0.2)
    await scene.touched("drop", symbol, count - count // 2)


async def dropped_then_doubled(scene: Scene, symbol: str, count: int) -> None:
    """What follows the hole comes twice."""
    await scene.touched("drop", symbol, count)
    await scene.touched("duplicate", symbol, count)


async def doubled_then_dropped(scene: Scene, symbol: str, count: int) -> None:
    """What precedes the hole comes twice."""
    await scene.touched("duplicate", symbol, count)
    await scene.touched("drop", symbol, count)


async def late_beyond_grace(scene: Scene, symbol: str, count: int) -> None:
    """They come, two seconds after newer ones: found missing, fetched, then dropped as known."""
    request = await scene.touched("late", symbol, count, seconds=2)
    scene.late.setdefault(symbol, set()).update(request.touched)


async def reordered_and_dropped(scene: Scene, symbol: str, count: int) -> None:
    """A hole between trades that come newest first."""
    request = await scene.touched("reorder", symbol, 4)
    scene.late.setdefault(symbol, set()).update(request.touched)
    await scene.touched("drop", symbol, count)
    request = await scene.touched("reorder", symbol, 4)
    scene.late.setdefault(symbol, set()).update(request.touched)


async def garbage_in_the_hole(scene: Scene, symbol: str, count: int) -> None:
    """Malformed messages come where the trades should be."""
    request = scene.exchange.inject({"fault": "drop", "symbol": symbol, "count": count})
    while request.remaining:
        scene.exchange.inject({"fault": "malformed"})
        await asyncio.sleep(0.1)


async def never_existed(scene: Scene, symbol: str, count: int) -> None:
    """Ids the venue left out: nobody has them."""
    request = scene.exchange.inject({"fault": "hole", "symbol": symbol, "count": count})
    scene.holes.setdefault(symbol, set()).update(request.touched)


async def lost_for_good(scene: Scene, symbol: str, count: int) -> None:
    """Made, but neither sent nor kept by REST."""
    request = await scene.touched("lose", symbol, count)
    scene.lost.setdefault(symbol, set()).update(request.touched)


# Ways that make REST ill while there is something to fetch.


async def longer_than_a_page(scene: Scene, symbol: str, count: int) -> None:
    """A page holds three rows, or a sixth of them: pages of three would spend the minute's weight on all the holes of the other ways."""
    scene.exchange.inject({"fault": "short_pages", "seconds": 3, "count": max(3, count // 6)})
    await scene.touched("drop", symbol, count)


async def while_rate_limited(scene: Scene, symbol: str, count: int) -> None:
    """429 with Retry-After."""
    await _refused(scene, symbol, count, 429)


async def while_banned(scene: Scene, symbol: str, count: int) -> None:
    """418 with Retry-After."""
    await _refused(scene, symbol, count, 418)


async def _refused(scene: Scene, symbol: str, count: int, status: int) -> None:
    """The exchange refuses for two seconds; it counts requests, and those that came before the Retry-After it gave had ended."""
    limit = scene.exchange.exchange.venues["spot"].limit
    refused = limit.refused
    scene.exchange.inject({"fault": "rate_limit", "seconds": 2, "status": status})
    await scene.touched("drop", symbol, count)
    await eventually(lambda: limit.refused > refused, 10, f"a request that is refused with {status}")
    await asyncio.sleep(3.2)  # what it gave is told in whole seconds
    assert limit.too_early == 0, f"{limit.too_early} requests came before Retry-After had ended"


async def while_rest_fails(scene: Scene, symbol: str, count: int) -> None:
    """503 for a second."""
    scene.exchange.inject({"fault": "rest_error", "seconds": 1.5})
    await scene.touched("drop", symbol, count)


async def while_rest_is_slow(scene: Scene, symbol: str, count: int) -> None:
    """Every answer takes a second."""
    scene.exchange.inject({"fault": "slow_rest", "seconds": 3, "delay_s": 1})
    await scene.touched("drop", symbol, count)


async def while_pages_are_cut(scene: Scene, symbol: str, count: int) -> None:
    """The first page ends in the middle of a row."""
    scene.exchange.inject({"fault": "cut_pages", "count": 1})
    await scene.touched("drop", symbol, count)


async def while_connects_are_refused(scene: Scene, symbol: str, count: int) -> None:
    """REST takes no new connection for a second."""
    scene.exchange.inject({"fault": "refuse", "seconds": 1})
    await scene.touched("drop", symbol, count)


# Ways that break connections.


async def first_after_connect(scene: Scene, symbol: str, count: int) -> None:
    """The connection breaks, and the new one begins with a hole."""
    async with scene.disturbed():
        old = scene.peers()
        scene.exchange.inject({"fault": "close"})
        scene.figures["reconnect_s"] = await scene.reconnected(symbol, old)
        await scene.touched("drop", symbol, count)


async def last_before_disconnect(scene: Scene, symbol: str, count: int) -> None:
    """Dropped, and then the connection breaks before anything newer came."""
    async with scene.disturbed():
        old = scene.peers()
        await scene.touched("drop", symbol, count)
        scene.exchange.inject({"fault": "close"})
        scene.figures["reconnect_s"] = max(scene.figures.get("reconnect_s", 0.0), await scene.reconnected(symbol, old))


async def across_reconnect(scene: Scene, symbol: str, count: int) -> None:
    """The hole began before the break and ends after it."""
    async with scene.disturbed():
        request = scene.exchange.inject({"fault": "drop", "symbol": symbol, "count": count * 4})
        while request.remaining > count * 3:
            await asyncio.sleep(0.005)
        old = scene.peers()
        scene.exchange.inject({"fault": "close"})
        await scene.reconnected(symbol, old)


async def across_the_daily_cut(scene: Scene, symbol: str, count: int) -> None:
    """Closed as at 24 hours, in the middle of a hole."""
    async with scene.disturbed():
        request = scene.exchange.inject({"fault": "drop", "symbol": symbol, "count": count * 2})
        while request.remaining > count:
            await asyncio.sleep(0.005)
        old = scene.peers()
        scene.exchange.inject({"fault": "cut_24h"})
        await scene.reconnected(symbol, old)


async def half_open(scene: Scene, symbol: str, count: int) -> None:
    """The connection stays open and says nothing."""
    await _goes_silent(scene, symbol, "half_open")


async def stalled(scene: Scene, symbol: str, count: int) -> None:
    """The connection answers pings and carries no data."""
    await _goes_silent(scene, symbol, "stall")


async def _goes_silent(scene: Scene, symbol: str, fault: str) -> None:
    """Found by the ledger, told by the metric, connected anew; and how long each took."""
    async with scene.disturbed():
        stale = await asyncio.to_thread(scene.chain.metric, "collector", STALE_METRIC)
        old, begun_us = scene.peers(), time.time_ns() // 1_000
        scene.exchange.inject({"fault": fault})
        await scene.reconnected(symbol, old)
        connected_us = time.time_ns() // 1_000
        now = await asyncio.to_thread(scene.chain.metric, "collector", STALE_METRIC)
        assert now == stale + 1, "the connection was not given up for its silence"
    evidence = f"({EVIDENCE_HEARTBEAT}, {EVIDENCE_SILENCE})"
    query = (
        "SELECT symbol, min(receive_time_us) AS told_us FROM gaps"
        f" WHERE state = 1 AND evidence IN {evidence} AND first_missing_id < 0 AND receive_time_us >= {begun_us} GROUP BY symbol"
    )
    await eventually(lambda: len(table(scene.chain.settings, query)) == SYMBOLS, 15, f"{fault}: doubting every symbol")
    told_us = (await asyncio.to_thread(table, scene.chain.settings, query))["told_us"].max()
    scene.figures[f"{fault}_found_s"] = (told_us - begun_us) / 1e6
    scene.figures[f"{fault}_replaced_s"] = (connected_us - told_us) / 1e6


async def venue_restarts(scene: Scene, symbol: str, count: int) -> None:
    """The venue is away for a second and goes on with its ids."""
    async with scene.disturbed():
        scene.exchange.inject({"fault": "drop", "symbol": symbol, "count": count})
        await asyncio.sleep(0.5)
        old = scene.peers()
        scene.exchange.inject({"fault": "restart", "seconds": 1, "reset_ids": False})
        await scene.reconnected(symbol, old)


async def across_a_kill_of_the_collector(scene: Scene, symbol: str, count: int) -> None:
    """Kill -9 in the middle of a hole; what was made meanwhile is missing too."""
    async with scene.disturbed():
        request = scene.exchange.inject({"fault": "drop", "symbol": symbol, "count": count * 2})
        while request.remaining > count:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(scene.chain.kill, "collector")
        scene.chain.start("collector")
        await scene.chain.ready("collector")


SIDE_BY_SIDE: list[Way] = [
    singles, burst, overlapping, dropped_then_doubled, doubled_then_dropped, late_beyond_grace, reordered_and_dropped, garbage_in_the_hole,
    never_existed, lost_for_good,
]  # fmt: skip
ONE_BY_ONE: list[Way] = [
    longer_than_a_page, while_rate_limited, while_banned, while_rest_fails, while_rest_is_slow, while_pages_are_cut,
    while_connects_are_refused, first_after_connect, last_before_disconnect, across_reconnect, across_the_daily_cut, half_open, stalled,
    venue_restarts, across_a_kill_of_the_collector,
]  # fmt: skip
# Each of these waits 6 s for a connection that has proven itself; the short form has the other ways to lose one.
if TOTAL_IDS < 1_000:
    ONE_BY_ONE = [way for way in ONE_BY_ONE if way not in (across_reconnect, across_the_daily_cut, stalled, venue_restarts)]
WAYS = [*SIDE_BY_SIDE, *ONE_BY_ONE]
DROPPING = [way for way in WAYS if way not in (late_beyond_grace, half_open, stalled)]
"""Ways that lose as many ids as they are asked to: late ones come after all, and what a silent connection costs is up to its silence."""
TIMES: dict[Way, int] = {across_reconnect: 4, across_the_daily_cut: 2, across_a_kill_of_the_collector: 2}
"""Ways that lose so many times as many. No more are lost than asked for: each hole costs a request, and the venue's weight is for 192 a minute."""


async def interleaved(scene: Scene, symbols: list[str], count: int) -> None:
    """Several symbols lose trades turn by turn."""
    for _ in range(count):
        await asyncio.gather(*(scene.touched("drop", symbol, 1) for symbol in symbols))


@pytest.fixture
async def scene(stack: RunningStack, topic_prefix: str, tmp_path: Path) -> AsyncIterator[Scene]:
    """A chain that has been collecting for two seconds."""
    market = MarketConfig(symbols=SYMBOLS, rate=RATE, seed=11)
    config = ServerConfig(exchange=ExchangeConfig(spot=market, warmup_s=2.0, history=4_000_000), track_sent=True)
    async with serve(config, SystemClock()) as exchange:
        symbols = [canonical(name) for name in exchange.exchange.venues["spot"].wire.universe.symbols]
        settings = isolated(
            stack,
            topic_prefix,
            MARKETSTREAM_COLLECTOR_REST_URL=exchange.rest_url,
            MARKETSTREAM_COLLECTOR_WS_URL=exchange.ws_url,
            MARKETSTREAM_COLLECTOR_SYMBOLS=",".join(symbols),
        )
        await asyncio.to_thread(provision, settings)
        with Chain(settings, tmp_path) as chain:
            chain.start("worker", "sink", "repair", "collector")
            await chain.ready("worker", "sink", "collector")
            await asyncio.sleep(2)
            yield Scene(exchange, chain)


@pytest.mark.timeout(900)
async def test_trades_lost_in_more_than_twenty_ways_are_named_fetched_and_in_their_bars(scene: Scene) -> None:
    """The ledger names exactly the ids that did not come; after the repair every bar equals the one of an undisturbed feed."""
    names = list(scene.exchange.exchange.venues["spot"].wire.universe.symbols)
    count = -(-TOTAL_IDS // sum(TIMES.get(way, 1) for way in DROPPING))
    # busy symbols for those that run one by one: they wait for their trades
    order = [*ONE_BY_ONE, *SIDE_BY_SIDE]
    symbol_of = {way: names[number % SYMBOLS] for number, way in enumerate(order)}
    begun = time.monotonic()
    await asyncio.gather(
        *(way(scene, symbol_of[way], count) for way in SIDE_BY_SIDE),
        interleaved(scene, names[:3], max(1, count // 3)),
        _one_by_one(scene, symbol_of, count),
    )
    await asyncio.sleep(4)  # the last holes are fetched, and the bars around them close
    print(f"{len(WAYS) + 1} ways in {time.monotonic() - begun:.0f} s")
    settings = scene.chain.settings
    still = pl.DataFrame()
    for _ in range(40):
        still = (await asyncio.to_thread(ledger, settings)).filter(pl.col("state") == 1)
        if not len(still):
            break
        await asyncio.sleep(1)
    assert not len(still), f"holes are still open: {still.to_dicts()[:5]}"
    took = await asyncio.to_thread(repair_times_s, settings)
    scene.chain.stop("collector")
    await _stored(scene, names)
    checked = [await asyncio.to_thread(_check_ledger, scene, symbol) for symbol in names]
    named, excused = (sum(counts) for counts in zip(*checked, strict=True))
    dropped = sum(len(request.touched) for request in scene.exchange.exchange.faults if request.fault in ("drop", "lose", "hole"))
    bars, hashed = await _check_bars(scene, names)
    slowest = max(took)
    figure(
        "gaps", ways=len(WAYS) + 1, ids_dropped=dropped, ids_named=named, ids_named_around_a_break=excused, silent_gaps=0, holes=len(took),
        bars_equal=bars, bars_sha256=hashed[:16], repair_median_s=float(np.median(took)), repair_slowest_s=slowest, **scene.figures
    )  # fmt: skip
    assert dropped >= TOTAL_IDS
    assert slowest <= REPAIR_LIMIT_S
    assert scene.figures["reconnect_s"] <= RECONNECT_LIMIT_S + JITTER_S
    for fault in ("half_open", *(["stall"] if stalled in WAYS else [])):
        assert scene.figures[f"{fault}_found_s"] <= STALE_LIMIT_S
        assert scene.figures[f"{fault}_replaced_s"] <= RECONNECT_LIMIT_S + JITTER_S


async def _one_by_one(scene: Scene, symbol_of: dict[Way, str], count: int) -> None:
    for way in ONE_BY_ONE:
        begun = time.monotonic()
        await way(scene, symbol_of[way], count)
        settings = scene.chain.settings
        # each begins with nothing open, so that what it measures is its own
        await asyncio.sleep(0.3 + random.Random(way.__name__).random() * 0.2)
        await eventually(lambda: _open_gaps(scene.chain) == 0, 15, way.__name__)
        print(f"{way.__name__}: {time.monotonic() - begun:.1f} s", settings.kafka.topic_prefix)


def _open_gaps(chain: Chain) -> float:
    opened, filled, given_up = (chain.metric("collector", f"collector_gaps_{name}_total") for name in ("opened", "filled", "unfillable"))
    return opened - filled - given_up


async def _stored(scene: Scene, names: list[str]) -> None:
    """Until the tables stand still."""
    settings, last = scene.chain.settings, (-1, -1)
    for _ in range(120):
        counted = tuple(
            await asyncio.to_thread(
                lambda: table(settings, "SELECT (SELECT count() FROM trades) AS a, (SELECT count() FROM gaps) AS b").row(0)
            )
        )
        if counted == last:
            return
        last = counted
        await asyncio.sleep(1)
    raise AssertionError("the tables do not come to rest")


def _check_ledger(scene: Scene, symbol: str) -> tuple[int, int]:
    """Ids named are ids that did not come; everything else is stored as the market made it.

    How many were named, and how many of these the exchange has sent to a connection around its end (:func:`_excused`).
    """
    settings, name = scene.chain.settings, canonical(symbol)
    stored = stored_trades(settings, name)
    kept = _kept(scene, symbol, stored)
    lost, holes = scene.lost.get(symbol, set()), scene.holes.get(symbol, set())
    sent = set(scene.exchange.sent_ids(symbol).tolist())
    missing = ((set(kept["trade_id"].to_list()) | lost) - sent) | holes
    rows = ledger(settings).filter(pl.col("symbol") == name)
    named = ids_of(rows)
    assert not missing - named, f"{symbol}: silent gaps {sorted(missing - named)[:20]}"
    around = named - missing - scene.late.get(symbol, set())
    extra = around - _excused(scene, symbol, rows, dict(kept.select("trade_id", "exchange_time_us").iter_rows()))
    assert not extra, f"{symbol}: named though they came {sorted(extra)[:20]} of {len(extra)}"
    assert ids_of(rows.filter(pl.col("state") == 3)) == lost | holes, symbol
    assert not (text := difference(stored, kept, ("trade_id",))), f"{symbol}: stored trades differ: {text}"
    return len(named), len(around)


def _kept(scene: Scene, symbol: str, stored: pl.DataFrame) -> pl.DataFrame:
    """What the market made of a symbol while it was collected, without what nobody can have any more."""
    truth = pl.DataFrame(scene.exchange.truth(symbol)).filter(
        pl.col("trade_id").is_between(stored["trade_id"].min(), stored["trade_id"].max())
    )
    return truth.filter(~pl.col("trade_id").is_in(list(scene.lost.get(symbol, set())))).select(TRADE_COLUMNS)


def _excused(scene: Scene, symbol: str, rows: pl.DataFrame, made_us: dict[int, int]) -> set[int]:
    """Ids that the ledger may name though the exchange sent them: those of which it could not know better when it spoke.

    They cannot be told from the exchange's record. What it wrote to a socket shortly before the end of connection or collector may never have
    been read; and between the new subscription and the answer to "what is your newest trade?" trades come live that lie within the gap the
    answer opens. So they are ids made during the break, in a stretch that was lost with the connection and not found by an id jump, and no
    younger than the row that named them.
    """
    broken = rows.filter(pl.col("evidence").is_in([EVIDENCE_HEARTBEAT, EVIDENCE_SILENCE, EVIDENCE_RESTART]))
    told = table(
        scene.chain.settings,
        "SELECT gap_id, min(receive_time_us) AS told_us FROM gaps"
        f" WHERE symbol = '{canonical(symbol)}' AND state = 1 AND first_missing_id >= 0 GROUP BY gap_id",
    )
    told_us = dict(told.iter_rows())
    found: set[int] = set()
    for row in broken.iter_rows(named=True):
        ids = range(row["first_missing_id"], row["last_missing_id"] + 1)
        latest_us = told_us.get(row["gap_id"], 0)
        found.update(each for each in ids if made_us.get(each, latest_us + 1) <= latest_us)
    return {each for each in found if any(window[symbol][0] <= each < window[symbol][1] for window in scene.windows)}


async def _check_bars(scene: Scene, names: list[str]) -> tuple[int, str]:
    """Newest bars of all timeframes equal, to the bit, a batch over what the market made; those that touch an unfillable hole say so.

    How many were compared, and the SHA-256 of them.
    """
    problem, compared = "", 0
    for _ in range(60):
        problem, compared, equal = "", 0, []
        for symbol in names:
            bars, problem = await asyncio.to_thread(_compare_bars, scene, symbol)
            if problem:
                problem = f"{symbol}: {problem}"
                break
            equal.append(bars)
            compared += len(bars)
        if not problem:
            return compared, sha256(equal)
        await asyncio.sleep(1)
    raise AssertionError(problem)


def _compare_bars(scene: Scene, symbol: str) -> tuple[pl.DataFrame, str]:
    """The bars that closed, as they should be, and what of the stored ones differs from them."""
    settings, name = scene.chain.settings, canonical(symbol)
    trades = _kept(scene, symbol, stored_trades(settings, name))
    closed = final_bars(settings, name).filter(pl.col("timeframe_s") == TIMEFRAME_SECONDS["1s"])
    until_us = int(closed["close_time_us"].max())
    dark = ledger(settings).filter((pl.col("symbol") == name) & (pl.col("state") == 3)).select("start_time_us", "end_time_us").rows()
    wanted = undisturbed(trades, name, until_us, dark)
    assert wanted["close_time_us"].max() == until_us
    return wanted, difference(closed_bars(settings, name, until_us, trades), wanted, BAR_KEY)
