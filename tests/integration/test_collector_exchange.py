"""The Binance collector against the simulated exchange, over real sockets: what was traded is what comes out, whatever goes wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import numpy as np
import pytest

from collectors.backoff import BackoffConfig
from collectors.binance.collector import BinanceCollector, CollectorConfig
from collectors.binance.feed import venue_of
from collectors.binance.rest import BinanceRest
from collectors.breaker import Breaker
from collectors.coverage import Resume
from collectors.dedupe import EVIDENCE_HEARTBEAT, EVIDENCE_RESTART, EVIDENCE_SILENCE, NUMBERING
from collectors.filler import FillerConfig
from collectors.session import SessionConfig
from collectors.simulated.config import ServerConfig
from collectors.simulated.exchange import ExchangeConfig
from collectors.simulated.regimes import MarketConfig
from collectors.simulated.server import SimulatedExchange, serve
from collectors.stats import FeedStats
from infra.seam import SystemClock
from processors.coverage import LedgerRow, covered, newest
from schemas.frames import GAP_FILLED, GAP_OPEN, GAP_UNFILLABLE, Frame
from tests.collectors.fakes import RecordingDeadLetters, RecordingSink, rows_of

SPOT = ServerConfig(exchange=ExchangeConfig(spot=MarketConfig(symbols=20, rate=800.0, seed=5), warmup_s=2.0))
QUICK = CollectorConfig(
    backoff=BackoffConfig(initial_s=0.3, maximum_s=1.0), session=SessionConfig(overlap_s=0.6), filler=FillerConfig(retry_s=0.3)
)


@dataclass
class Bench:
    """An exchange, a collector on it, and what the collector sent."""

    exchange: SimulatedExchange
    collector: BinanceCollector
    run: asyncio.Task[None]
    sink: RecordingSink = field(default_factory=RecordingSink)
    letters: RecordingDeadLetters = field(default_factory=RecordingDeadLetters)
    kind: str = "spot"

    @property
    def stats(self) -> FeedStats:
        """Counters of the first shard."""
        return self.collector.shards[0].pipeline.stats

    async def until(self, check: Callable[[], object], seconds: float = 15.0) -> None:
        """Until ``check()`` holds."""
        deadline = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < deadline, self.stats
            assert not self.run.done(), self.run
            await asyncio.sleep(0.02)

    async def trade(self, count: int) -> None:
        """Until ``count`` more trades were handed on."""
        goal = self.stats.trades + count
        await self.until(lambda: self.stats.trades >= goal)

    async def stop(self) -> None:
        """Drain."""
        await self.collector.stop()
        await self.run

    def assert_equal_to_truth(self, *, but: frozenset[str] = frozenset()) -> int:
        """Every trade between the first and the last we have of a symbol is there once, as the market made it. Returns how many."""
        columns: dict[str, dict[str, list[Any]]] = {}
        for _, frame in self.sink.trades:
            if not frame.row_count:
                continue
            for code, key in enumerate(frame.symbols):
                chosen = frame.columns["symbol_code"] == code
                held = columns.setdefault(key, {})
                for name in ("trade_id", "price", "size", "side", "exchange_time_us"):
                    held.setdefault(name, []).append(frame.columns[name][chosen])
        total = 0
        for key, parts in columns.items():
            if key in but:
                continue
            got = {name: np.concatenate(values) for name, values in parts.items()}
            order = np.argsort(got["trade_id"], kind="stable")
            truth = self.exchange.truth(key.partition(":")[2].removesuffix("-PERP").replace("-", ""), self.kind)  # type: ignore[arg-type]
            ids = got["trade_id"][order]
            inside = (truth["trade_id"] >= ids[0]) & (truth["trade_id"] <= ids[-1])
            for name, values in got.items():
                np.testing.assert_array_equal(values[order], truth[name][inside], err_msg=f"{key} {name}")
            total += len(ids)
        return total

    def ledger(self, key: str) -> list[LedgerRow]:
        """Rows of the coverage ledger of a symbol, in the order they were published."""
        found = []
        for frame in self.sink.gaps:
            mine = [row for row, code in enumerate(frame.columns["symbol_code"].tolist()) if frame.symbols[code] == key]
            found += [LedgerRow(*(int(frame.columns[name][row]) for name in LedgerRow._fields)) for row in mine]
        return found

    def named(self, key: str, state: int) -> set[int]:
        """Ids that the ledger's rows of this state name for a symbol."""
        rows = [row for row in self.ledger(key) if row.state == state and row.first_missing_id >= 0]
        return {trade_id for row in rows for trade_id in range(row.first_missing_id, row.last_missing_id + 1)}

    def doubted(self, key: str) -> list[LedgerRow]:
        """Rows that tell of a silence of a symbol: since when nobody knows, with unknown ids."""
        return [row for row in self.ledger(key) if (row.state, row.evidence) == (GAP_OPEN, EVIDENCE_SILENCE) and row.first_missing_id < 0]

    def assert_covered(self) -> None:
        """Of every symbol: from its first trade to its last everything is complete or filled."""
        times: dict[str, list[int]] = {}
        for _, frame in self.sink.trades:
            for code, time_us in zip(frame.columns.get("symbol_code", ()), frame.columns.get("exchange_time_us", ()), strict=True):
                times.setdefault(frame.symbols[code], []).append(int(time_us))
        for key, found in times.items():
            newest_us = max(found) - 1_000_000  # the watermark's lateness
            if min(found) < newest_us:
                assert covered(self.ledger(key), min(found), newest_us), (key, self.ledger(key))

    def late_rows(self) -> int:
        """Rows that were sent after a watermark that promised there would be none so old."""
        promised: dict[int, int] = {}
        late = 0
        for partition, frame in self.sink.trades:
            assert frame.watermark_us >= promised.get(partition, 0)
            if frame.row_count:
                late += int((frame.columns["exchange_time_us"] < promised.get(partition, 0)).sum())
            promised[partition] = frame.watermark_us
        return late


@asynccontextmanager
async def bench(
    server: ServerConfig = SPOT,
    config: CollectorConfig = QUICK,
    *,
    symbols: set[str] | None = None,
    exchange_name: str = "binance",
    sink: RecordingSink | None = None,
    resume: dict[str, Resume] | None = None,
    max_age_s: float | None = None,
) -> AsyncIterator[Bench]:
    """A collector of all (or some) symbols of a fresh exchange, connected and delivering."""
    clock = SystemClock()
    async with serve(server, clock) as running, httpx.AsyncClient(trust_env=False) as http:
        usdm = exchange_name == "binance-usdm"
        venue = venue_of(exchange_name, rest_url=running.rest_url, ws_url=running.usdm_ws_url if usdm else running.ws_url)
        if max_age_s is not None:
            venue = replace(venue, max_age_s=max_age_s)
        made = Bench(running, None, None, kind="usdm" if usdm else "spot")  # type: ignore[arg-type]
        made.sink = sink or made.sink
        made.collector = BinanceCollector(
            venue=venue,
            rest=BinanceRest(venue, http, clock, Breaker("rest")),
            sink=made.sink,
            dead_letters=made.letters,
            clock=clock,
            config=config,
            resume=resume,
        )
        made.run = asyncio.create_task(made.collector.run())
        try:
            await made.collector.want(symbols if symbols is not None else set(await made.collector.listed()))
            await made.until(lambda: not made.collector.reasons())
            await made.trade(200)
            yield made
        finally:
            made.run.cancel()
            await asyncio.gather(made.run, return_exceptions=True)


async def test_every_trade_of_every_symbol_comes_out_exactly_once() -> None:
    """Ids, prices, sizes, sides and times equal the market's own; nothing is late; every partition has a frame a second."""
    async with bench() as made:
        await made.trade(2_000)
        await made.stop()
        assert made.assert_equal_to_truth() >= 2_000
        assert made.late_rows() == 0
        assert made.letters.items == []
        assert made.stats.errors == {}
        assert {partition for partition, _ in made.sink.trades} == {0, 1, 2, 3}


async def test_a_dropped_message_is_fetched_by_id() -> None:
    """The exchange loses five messages; REST has them, and the gap is recorded as filled."""
    async with bench() as made:
        fault = made.exchange.inject({"fault": "drop", "symbol": "BTCUSDT", "count": 5})
        await made.until(lambda: made.stats.gaps_filled >= 1 and len(fault.touched) == 5)
        await made.trade(300)
        await made.stop()
        assert made.stats.gaps_unfillable == 0
        assert made.stats.backfilled >= 5
        made.assert_equal_to_truth()
        assert made.late_rows() == 0
        assert made.named("binance:BTC-USDT", GAP_OPEN) == made.named("binance:BTC-USDT", GAP_FILLED) == set(fault.touched)
        made.assert_covered()


async def test_ids_the_venue_does_not_have_are_recorded_as_unfillable() -> None:
    """A hole in the numbers themselves: one gap row with its ids, state 3; the feed goes on."""
    async with bench() as made:
        made.exchange.inject({"fault": "hole", "symbol": "BTCUSDT", "count": 3})
        await made.until(lambda: made.stats.gaps_unfillable >= 1)
        await made.trade(200)
        await made.stop()
        (row,) = [row for row in newest(made.ledger("binance:BTC-USDT")) if row.state == GAP_UNFILLABLE]
        assert row.last_missing_id - row.first_missing_id == 2
        assert not covered(made.ledger("binance:BTC-USDT"), row.start_time_us, row.end_time_us)
        made.assert_equal_to_truth()


async def test_repeated_and_reordered_messages_change_nothing() -> None:
    """Duplicates are dropped; what is merely out of order needs no request."""
    async with bench() as made:
        made.exchange.inject({"fault": "duplicate", "symbol": "BTCUSDT", "count": 10})
        made.exchange.inject({"fault": "reorder", "symbol": "ETHUSDT", "count": 4})
        await made.until(lambda: made.stats.duplicates >= 10 and made.stats.gaps_filled >= 1)
        await made.trade(200)
        await made.stop()
        made.assert_equal_to_truth()
        assert made.stats.gaps_unfillable == 0


async def test_garbage_is_dead_lettered_with_its_bytes() -> None:
    """A cut message among good ones; the connection stays."""
    async with bench() as made:
        made.exchange.inject({"fault": "malformed", "count": 3})
        await made.until(lambda: len(made.letters.items) >= 3)
        await made.stop()
        letter = made.letters.items[0]
        assert letter["reason"] == "malformed_message"
        assert letter["raw"].startswith(b'{"stream"')
        assert letter["raw_size"] == len(letter["raw"])
        assert letter["place"] == "binance/ws/0"
        assert made.stats.reconnections == 0
        made.assert_equal_to_truth()


@pytest.mark.parametrize("fault", ["close", "cut_24h"])
async def test_a_lost_connection_costs_no_trade(fault: str) -> None:
    """Broken without a word, and cut as at 24 hours: reconnected, the hole fetched before the watermark passes it."""
    async with bench() as made:
        made.exchange.inject({"fault": fault})
        await made.until(lambda: made.stats.reconnections == 1 and made.collector.shards[0].is_live)
        await made.trade(800)
        await made.until(lambda: made.stats.gaps_opened == made.stats.gaps_filled)
        await made.stop()
        made.assert_equal_to_truth()
        assert made.stats.gaps_unfillable == 0
        assert made.late_rows() == 0


@pytest.mark.parametrize(("fault", "evidence"), [("half_open", EVIDENCE_HEARTBEAT), ("stall", EVIDENCE_SILENCE)])
async def test_a_silent_connection_is_noticed_within_three_seconds(fault: str, evidence: int) -> None:
    """No data, no close; pings unanswered or answered. Found by the feed's own rate and told as open with unknown ids; then nothing is missing."""
    async with bench() as made:
        await made.trade(1_500)
        made.exchange.inject({"fault": fault})
        begin = time.monotonic()
        await made.until(lambda: made.stats.stale_reconnects == 1)
        assert time.monotonic() - begin < 3.0
        await made.until(lambda: [row for row in made.ledger("binance:BTC-USDT") if row.state == GAP_OPEN and row.first_missing_id < 0])
        lost = [row for row in made.ledger("binance:BTC-USDT") if row.state == GAP_OPEN and row.first_missing_id < 0]
        assert {(row.evidence, row.end_time_us) for row in lost} == {(evidence, -1)}
        await made.until(lambda: made.collector.shards[0].is_live)
        await made.trade(500)
        await made.until(lambda: made.stats.gaps_opened == made.stats.gaps_filled)
        await made.stop()
        made.assert_equal_to_truth()
        if fault == "half_open":  # answered pings move the watermark on: what a stalled feed missed amends bars
            assert made.late_rows() == 0


async def test_a_single_frozen_symbol_on_a_live_feed_is_noticed_within_three_seconds_and_fetched() -> None:
    """One stream says nothing while its symbol trades and the others flow: the ledger doubts that symbol alone while it lasts, REST has its trades."""
    async with bench() as made:
        await made.trade(1_500)
        frozen = made.exchange.inject({"fault": "drop", "symbol": "BTCUSDT", "count": 1_000_000})
        begin = time.monotonic()
        await made.until(lambda: made.doubted("binance:BTC-USDT"))
        took = time.monotonic() - begin
        print(f"found {took:.2f} s after its last trade")
        assert took < 3.0
        code = made.collector.shards[0].pipeline.batcher.code_of("binance:BTC-USDT")
        for _ in range(2):  # as long as it is frozen it stays in doubt, and is asked for
            missed = set(frozen.touched)
            await made.until(lambda missed=missed: missed <= made.named("binance:BTC-USDT", GAP_FILLED))
            assert missed <= set(rows_of(made.sink.trades)["binance:BTC-USDT"])
            assert made.collector.shards[0].pipeline.ledger.coverage.lost.tolist() == [code]
        made.exchange.inject({"fault": "clear"})
        await made.trade(500)
        await made.until(lambda: made.stats.gaps_opened == made.stats.gaps_filled)
        assert not len(made.collector.shards[0].pipeline.ledger.coverage.lost)
        await made.stop()
        keys = {made.collector.shards[0].pipeline.batcher.key_of(code) for code in range(20)}
        assert {key for key in keys if made.doubted(key)} == {"binance:BTC-USDT"}
        assert {key for key in keys if made.named(key, GAP_OPEN)} == {"binance:BTC-USDT"}
        assert made.named("binance:BTC-USDT", GAP_FILLED) >= set(frozen.touched)
        assert made.stats.reconnections == made.stats.stale_reconnects == 0
        made.assert_equal_to_truth()


async def test_a_venue_that_restarts_with_ids_from_one_loses_nothing_silently() -> None:
    """Trades of the new numbering are kept from the first on; each symbol has one entry that says restart, and no gap of bogus ids."""
    async with bench() as made:
        before = {key: max(ids) for key, ids in rows_of(made.sink.trades).items()}
        made.exchange.inject({"fault": "restart", "seconds": 1})
        await made.until(lambda: made.stats.reconnections >= 1 and made.collector.shards[0].is_live, 20.0)
        await made.trade(1_000)
        await made.until(lambda: not made.stats.symbols_lost or made.stats.trades > 5_000)
        await made.until(lambda: not list(made.collector.shards[0].pipeline.sequencer.open_gaps()), 20.0)
        await made.stop()
        anew = {key: rows[-1] for key in before if (rows := [row for row in newest(made.ledger(key)) if row.state == GAP_UNFILLABLE])}
        assert len(anew) >= 10
        assert {(row.evidence, row.first_missing_id) for row in anew.values()} == {(EVIDENCE_RESTART, -1)}
        for key in anew:
            ids = [trade_id - NUMBERING for trade_id in rows_of(made.sink.trades)[key] if trade_id > NUMBERING]
            assert sorted(ids) == list(range(1, max(ids) + 1)), key


async def test_a_renewal_overlaps_and_loses_nothing() -> None:
    """The new connection delivers before the old is closed; what both said is dropped by id; no gap opens, nothing reconnects."""
    async with bench(max_age_s=1.0) as made:
        await made.until(lambda: made.stats.renewals >= 2, 20.0)
        await made.trade(500)
        await made.stop()
        assert made.stats.reconnections == 0
        assert made.stats.duplicates > 0
        assert made.stats.gaps_opened == 0
        made.assert_equal_to_truth()
        assert made.late_rows() == 0


async def test_a_failed_renewal_keeps_the_old_connection() -> None:
    """The exchange takes no new connection: the old one goes on delivering."""
    async with bench() as made:
        shard = made.collector.shards[0]
        link = shard._links[0]
        shard._feed.url = "ws://127.0.0.1:1/stream"
        link.renewal.max_age_s = 0.0
        await made.until(lambda: made.stats.errors.get("renewal_failed") == 1)
        await made.trade(300)
        await made.stop()
        assert made.stats.renewals == 0
        assert made.stats.reconnections == 0
        made.assert_equal_to_truth()


@pytest.mark.parametrize("status", [429, 418])
async def test_a_rate_limited_backfill_waits_and_then_fills(status: int) -> None:
    """429 and 418 with Retry-After: the exchange counts no request before it ended; the gap is filled afterwards."""
    async with bench() as made:
        limit = made.exchange.exchange.venues["spot"].limit
        made.exchange.inject({"fault": "rate_limit", "seconds": 2, "status": status})
        made.exchange.inject({"fault": "drop", "symbol": "BTCUSDT", "count": 2})
        await made.until(lambda: made.stats.gaps_filled >= 1, 20.0)
        await made.stop()
        assert limit.refused >= 1
        assert limit.too_early == 0
        assert made.stats.gaps_unfillable == 0
        made.assert_equal_to_truth()


async def test_an_exchange_clock_that_is_wrong_does_no_harm() -> None:
    """Forty seconds off and back: watermarks follow the exchange's time, not ours."""
    async with bench() as made:
        made.exchange.inject({"fault": "skew", "milliseconds": -40_000})
        await made.trade(500)
        made.exchange.inject({"fault": "skew", "milliseconds": 0})
        await made.trade(500)
        await made.stop()
        assert made.letters.items == []
        ids = rows_of(made.sink.trades)
        assert all(sorted(found) == list(range(min(found), max(found) + 1)) for found in ids.values())


async def test_symbols_come_and_go_at_run_time() -> None:
    """Added ones deliver, removed ones stop, unknown ones have a state; nobody else notices."""
    async with bench(symbols={"BTC-USDT", "ETH-USDT"}) as made:
        states = await made.collector.want({"ETH-USDT", "SOL-USDT", "NOSUCH-USDT"})
        assert states["SOL-USDT"] == "collecting"
        assert states["NOSUCH-USDT"] == "unknown: binance lists no market 'NOSUCH-USDT'"
        await made.until(lambda: "binance:SOL-USDT" in rows_of(made.sink.trades), 5.0)
        await made.until(lambda: made.collector.shards[0].is_live)
        await asyncio.sleep(0.3)
        before = len(rows_of(made.sink.trades)["binance:BTC-USDT"])
        await made.trade(200)
        assert len(rows_of(made.sink.trades)["binance:BTC-USDT"]) == before
        await made.collector.want({"ETH-USDT", "BTC-USDT"})
        await made.until(lambda: len(rows_of(made.sink.trades)["binance:BTC-USDT"]) > before, 5.0)
        await made.stop()
        assert made.stats.gaps_opened == 0
        made.assert_equal_to_truth(but=frozenset({"binance:BTC-USDT"}))


async def test_streams_beyond_one_connection_get_another() -> None:
    """Seven streams a connection: three connections, each a source of its own, together everything."""
    async with bench(config=replace(QUICK, streams_per_shard=7)) as made:
        assert [shard.name for shard in made.collector.shards] == ["binance/ws/0", "binance/ws/1", "binance/ws/2"]
        assert [len(shard.streams) for shard in made.collector.shards] == [7, 7, 6]
        await made.trade(500)
        await made.stop()
        made.assert_equal_to_truth()
        assert {frame.source for _, frame in made.sink.trades} == {"binance/ws/0", "binance/ws/1", "binance/ws/2"}


class SlowSink(RecordingSink):
    """Takes nothing while ``blocked``."""

    def __init__(self) -> None:
        super().__init__()
        self.open = asyncio.Event()
        self.open.set()

    async def send(self, topic_name: str, partition: int, frame: Frame) -> None:
        """Wait, then keep."""
        await self.open.wait()
        await super().send(topic_name, partition, frame)


async def test_a_sink_that_takes_nothing_stops_the_reading_and_loses_nothing() -> None:
    """Kafka is away for three seconds: the socket is not read, the watermark stands, and afterwards everything is there."""
    sink = SlowSink()
    async with bench(sink=sink) as made:
        pipeline = made.collector.shards[0].pipeline
        pipeline._config = replace(pipeline._config, max_staged_bytes=20_000)
        sink.open.clear()
        await made.until(lambda: made.stats.pauses == 1)
        staged = pipeline.staged_bytes
        await asyncio.sleep(2)
        assert pipeline.staged_bytes < staged + 300_000  # one chunk at most came after the pause
        sink.open.set()
        await made.trade(2_000)
        await made.stop()
        made.assert_equal_to_truth()
        assert made.late_rows() == 0
        assert not any(made.doubted(key) for key in rows_of(sink.trades))  # that we did not read is no silence of a symbol


async def test_aggregate_trades_of_perpetuals() -> None:
    """USD-M: the documented stream, consecutive aggregate ids, symbols named -PERP."""
    usdm = MarketConfig(kind="usdm", symbols=8, rate=400.0, seed=5)
    server = ServerConfig(exchange=ExchangeConfig(spot=MarketConfig(symbols=8, rate=1.0, seed=5), usdm=usdm, warmup_s=2.0))
    async with bench(server, exchange_name="binance-usdm") as made:
        made.exchange.inject({"fault": "close", "market": "usdm"})
        await made.until(lambda: made.stats.reconnections == 1 and made.collector.shards[0].is_live)
        await made.trade(400)
        await made.until(lambda: made.stats.gaps_opened == made.stats.gaps_filled)
        await made.stop()
        ids = rows_of(made.sink.trades)
        assert all(key.endswith("-PERP") for key in ids)
        assert all(sorted(found) == list(range(min(found), max(found) + 1)) for found in ids.values())


async def test_a_restart_fetches_what_was_missed() -> None:
    """Positions of an earlier run: everything since is there, before any new trade of the symbol came."""
    async with bench() as first:
        await first.trade(100)
        truth = first.exchange.truth("BTCUSDT")
        resume = {"BTC-USDT": Resume(int(truth["trade_id"][-30]), int(truth["exchange_time_us"][-30]))}
        venue = first.collector.venue
        async with httpx.AsyncClient(trust_env=False) as http:
            sink = RecordingSink()
            clock = SystemClock()
            rest = BinanceRest(venue, http, clock, Breaker("rest"))
            second = BinanceCollector(
                venue=venue, rest=rest, sink=sink, dead_letters=first.letters, clock=clock, config=QUICK, resume=resume
            )
            run = asyncio.create_task(second.run())
            await second.want({"BTC-USDT"})
            await first.until(lambda: second.shards[0].pipeline.stats.gaps_filled >= 1)
            await first.trade(200)
            await second.stop()
            await run
        ids = sorted(rows_of(sink.trades)["binance:BTC-USDT"])
        assert ids[0] == resume["BTC-USDT"].trade_id + 1
        assert ids == list(range(ids[0], ids[-1] + 1))
        await first.stop()
