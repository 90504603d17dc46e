"""Backfills from the simulated exchange: killed anywhere and run again they store each trade once, and the bars are those without a fault."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from collectors.simulated.config import ServerConfig
from collectors.simulated.exchange import ExchangeConfig
from collectors.simulated.regimes import MarketConfig
from collectors.simulated.server import SimulatedExchange, serve
from infra.backfill import backfill
from infra.errors import SettingsError, UnreachableError
from infra.seam import SystemClock
from infra.settings import Settings, load_settings
from schemas.frames import GAP_UNFILLABLE
from schemas.timeframes import format_time_us
from tests.integration.conftest import RunningStack
from tests.integration.repair_chain import SECOND, Chain, Feed, no_fault, running, values

KEYS = ["timeframe_s", "open_time_us"]
PAST_S = 130.0


@asynccontextmanager
async def exchange(rate: float = 800.0) -> AsyncIterator[SimulatedExchange]:
    """A simulated spot exchange with two minutes of history that goes no further by itself."""
    config = ServerConfig(exchange=ExchangeConfig(spot=MarketConfig(symbols=2, rate=rate, seed=11), warmup_s=PAST_S), pace=False)
    async with serve(config, SystemClock()) as made:
        yield made


def truth(made: SimulatedExchange, raw: str, start_us: int = 0, end_us: int = 2**62) -> pl.DataFrame:
    """The market's trades of a range."""
    trades = pl.DataFrame(made.truth(raw)).with_columns(receive_time_us=pl.col("exchange_time_us") + 1_000)
    return trades.filter((pl.col.exchange_time_us >= start_us) & (pl.col.exchange_time_us < end_us))


def pointed(chain: Chain, made: SimulatedExchange) -> Settings:
    """The chain's settings with the venue at the simulated exchange."""
    return load_settings({**chain.settings.as_environ(), "MARKETSTREAM_COLLECTOR_REST_URL": made.rest_url})


def begin(settings: Settings, start_us: int, end_us: int, symbol: str, *, as_json: bool = True) -> subprocess.Popen[str]:
    """``marketstream backfill`` as a person runs it."""
    command = [
        sys.executable,
        "-m",
        "infra.cli.main",
        "backfill",
        "--exchange",
        "binance",
        "--symbol",
        symbol,
        *(["--json"] if as_json else []),
    ]
    command += ["--start", format_time_us(start_us), "--end", format_time_us(end_us)]
    environ = settings.as_environ() | {"PATH": "/usr/bin:/bin"}
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def chain(stack: RunningStack) -> Any:
    """Worker, sink and repair."""
    with running(stack, "backfill.", "worker", "sink", "repair") as made:
        yield made


async def test_killed_in_the_middle_and_run_again_it_stores_each_trade_once_and_makes_its_bars(chain: Chain) -> None:
    """The second run goes on where the broker had acknowledged; a third changes nothing."""
    async with exchange() as made:
        settings = pointed(chain, made)
        newest_us = int(truth(made, "BTCUSDT")["exchange_time_us"].max())
        start_us, end_us = newest_us - 115 * SECOND + 1_234, newest_us - 45 * SECOND + 4_321
        wanted = truth(made, "BTCUSDT", start_us, end_us)
        made.inject({"fault": "slow_rest", "delay_s": 0.12, "seconds": 60})
        with begin(settings, start_us, end_us, "BTC-USDT") as first:

            def until_some() -> int:
                assert first.stderr is not None
                for line in first.stderr:
                    told = json.loads(line)
                    if told.get("progress", {}).get("stage") == "fetching" and told["progress"]["rows"] > 8_000:
                        os.kill(first.pid, signal.SIGKILL)
                        return int(told["progress"]["rows"])
                raise AssertionError("It ended before it could be killed.")

            killed_at = await asyncio.to_thread(until_some)
            assert await asyncio.to_thread(first.wait) == -signal.SIGKILL
        assert killed_at < wanted.height
        made.inject({"fault": "slow_rest", "delay_s": 0.0, "seconds": 1})
        with begin(settings, start_us, end_us, "BTC-USDT") as second:
            out, err = await asyncio.to_thread(second.communicate)
        assert second.returncode == 0, err
        summary = json.loads(out)
        assert summary["resumed"]
        assert (summary["rows"], summary["lacking"]) == (wanted.height, [])
        assert (summary["first_id"], summary["last_id"]) == (wanted["trade_id"][0], wanted["trade_id"][-1])
        await chain.until_stored()
        stored = chain.query("SELECT * FROM trades WHERE symbol = 'BTC-USDT' ORDER BY trade_id")
        names = ["trade_id", "price", "size", "side", "exchange_time_us"]
        assert_frame_equal(stored.select(names), wanted.select(names), check_exact=True)
        bars = chain.newest("BTC-USDT")
        whole = no_fault(wanted, end_us // SECOND * SECOND)
        inside = bars.join(whole.select(KEYS), on=KEYS, how="semi")
        assert_frame_equal(values(inside), values(whole), check_exact=True)
        complete = inside.filter((pl.col.open_time_us >= start_us) & (pl.col.close_time_us <= end_us))
        assert set(complete["complete"]) == {1}
        assert (
            inside.filter(pl.col.open_time_us < start_us)["complete"].to_list()
            == [0] * inside.filter(pl.col.open_time_us < start_us).height
        )
        ledger = chain.query("SELECT state, evidence, start_time_us, end_time_us, recovered FROM gaps WHERE symbol = 'BTC-USDT'")
        assert ledger.rows() == [(0, 7, start_us, end_us, wanted.height)]
        with begin(settings, start_us, end_us, "BTC-USDT", as_json=False) as third:
            out, err = await asyncio.to_thread(third.communicate)
        assert third.returncode == 0, err
        assert out.startswith(f"binance BTC-USDT: {wanted.height:,} trades ({wanted['trade_id'][0]} to {wanted['trade_id'][-1]}, ")
        assert "; 0 of " in out
        assert "gone on with" not in out
        await chain.until_stored()
        assert chain.query("SELECT count() AS n FROM trades WHERE symbol = 'BTC-USDT'")["n"].to_list() == [wanted.height]


async def test_a_hole_that_is_backfilled_leaves_the_bars_of_a_day_without_a_fault(chain: Chain) -> None:
    """One revision up, both versions kept, the ledger says filled; what the venue lost stays a gap whose bars are incomplete."""
    async with exchange() as made:
        trades = truth(made, "ETHUSDT")
        newest_us = int(trades["exchange_time_us"].max())
        start_us, end_us = newest_us - 90 * SECOND, newest_us - 70 * SECOND
        hole = (pl.col.exchange_time_us >= start_us) & (pl.col.exchange_time_us < end_us)
        live = trades.filter(~hole & (pl.col.exchange_time_us < newest_us - 20 * SECOND))
        feed = Feed(chain, "ETH-USDT")
        before = live.filter(pl.col.exchange_time_us < start_us)
        after = live.filter(pl.col.exchange_time_us >= end_us)
        await feed.send(before, rows=500)
        await feed.send(after, rows=500)
        await feed.gap(5, int(before["exchange_time_us"][-1]), int(after["exchange_time_us"][0]), GAP_UNFILLABLE)
        await chain.until_reconciled("ETH-USDT", 1)
        old = chain.newest("ETH-USDT").filter(pl.col.timeframe_s == 1)
        summary = await backfill(
            pointed(chain, made), exchange="binance", symbol="ETH-USDT", start_us=start_us - SECOND, end_us=end_us + SECOND
        )
        assert summary.lacking == []
        await chain.until_reconciled("ETH-USDT", 2)
        new = chain.newest("ETH-USDT").filter(pl.col.timeframe_s == 1)
        whole = no_fault(trades.filter(pl.col.exchange_time_us < newest_us - 20 * SECOND), int(new["close_time_us"].max()))
        assert_frame_equal(values(new), values(whole.filter(pl.col.timeframe_s == 1)), check_exact=True)
        inside = (pl.col.close_time_us > start_us) & (pl.col.open_time_us < end_us)
        changed = new.filter(inside)
        assert set(changed["complete"]) == {1}
        assert (changed["revision"] - old.filter(inside)["revision"]).to_list() == [1] * changed.height
        assert_frame_equal(
            new.filter(~inside & (pl.col.close_time_us < newest_us - 21 * SECOND)).select(values(new).columns),
            old.filter(~inside & (pl.col.close_time_us < newest_us - 21 * SECOND)).select(values(new).columns),
        )
        states = chain.query(
            "SELECT gap_id, argMax(state, kafka_offset) AS state FROM gaps WHERE symbol = 'ETH-USDT' GROUP BY gap_id ORDER BY gap_id"
        )
        assert states.rows()[0] == (5, 2)
        assert states["state"].to_list()[1:] == [0]
        feed.close()


async def test_bad_input_is_one_sentence(chain: Chain) -> None:
    """Each names the culprit and the remedy, and nothing is published."""
    now_us = time.time_ns() // 1000
    good: dict[str, Any] = {"exchange": "binance", "symbol": "BTC-USDT", "start_us": now_us - 9 * SECOND, "end_us": now_us - SECOND}
    async with exchange(rate=10.0) as made:
        settings = pointed(chain, made)
        for change, message in (
            ({"exchange": "binanse"}, "did you mean 'binance'"),
            ({"exchange": "kraken"}, "cannot be fetched; it can of binance and binance-usdm"),
            ({"symbol": "BTC-USDC"}, "lists no market 'BTC-USDC': did you mean 'BTC-USDT'"),
            ({"symbol": "btcusdt"}, "is not a canonical symbol"),
            ({"end_us": now_us - 10 * SECOND}, "is not before the end"),
            ({"end_us": now_us + 60 * SECOND}, "lies in the future"),
        ):
            with pytest.raises(SettingsError, match=message):
                await backfill(settings, **{**good, **change})
    refused = load_settings({**chain.settings.as_environ(), "MARKETSTREAM_COLLECTOR_REST_URL": "http://127.0.0.1:9"})
    clock = Hasty()
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9/.* cannot be reached.*next run goes on"):
        await backfill(refused, **good, clock=clock)


class Hasty(SystemClock):
    """A clock whose waits are short."""

    async def sleep(self, seconds: float) -> None:
        """A thousandth of it."""
        await asyncio.sleep(seconds / 1_000)


class Past(SystemClock):
    """A clock a minute behind: what the exchange makes is old enough to be compared at once."""

    def now_us(self) -> int:
        """The time a minute ago."""
        return super().now_us() - 60 * SECOND


async def test_what_the_venue_lost_is_named_and_no_bar_of_it_is_complete(chain: Chain) -> None:
    """Ids the venue skips, and the time before its history: unfillable in the ledger, the trades around them stored, in pages cut short."""
    config = ServerConfig(exchange=ExchangeConfig(spot=MarketConfig(symbols=3, rate=300.0, seed=5), warmup_s=5.0), pace=False)
    async with serve(config, Past()) as made:
        raw = made.exchange.venues["spot"].wire.universe.symbols[2]
        symbol = f"{raw.removesuffix('USDT')}-USDT"
        made.inject({"fault": "lose", "symbol": raw, "count": 7})
        made.inject({"fault": "short_pages", "count": 3, "seconds": 60})
        made.advance(3_000)
        trades = truth(made, raw)
        start_us, end_us = int(trades["exchange_time_us"].min()) - 2 * SECOND, int(trades["exchange_time_us"].max()) + 1
        summary = await backfill(pointed(chain, made), exchange="binance", symbol=symbol, start_us=start_us, end_us=end_us)
    named = [number for one in summary.lacking if one["first_id"] >= 0 for number in range(one["first_id"], one["last_id"] + 1)]
    assert len(named) == 7
    assert (summary.lacking[0]["first_id"], summary.lacking[0]["start_us"]) == (-1, start_us)
    await chain.until_stored()
    stored = chain.query("SELECT trade_id FROM trades WHERE symbol = {s:String} ORDER BY trade_id", s=symbol)
    assert stored["trade_id"].to_list() == [number for number in trades["trade_id"].to_list() if number not in named]
    ledger = chain.query("SELECT state, start_time_us, end_time_us FROM gaps WHERE symbol = {s:String}", s=symbol)
    assert sorted(ledger["state"].to_list()) == [0] + [3] * len(summary.lacking)
    bars = chain.newest(symbol).filter(pl.col.timeframe_s == 1)
    missing = ledger.filter(pl.col.state == 3)
    for bar in bars.iter_rows(named=True):
        touched = any(bar["close_time_us"] > low and bar["open_time_us"] <= high for _, low, high in missing.iter_rows())
        assert bar["complete"] == int(not touched and bar["close_time_us"] <= end_us)  # nobody knows how the last one goes on
    assert 0 < bars["complete"].sum() < bars.height
