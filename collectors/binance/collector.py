"""The Binance collector: wanted symbols in, frames of trades and gaps out.

It spreads streams over connection shards, fills gaps over REST, and knows the state of every symbol. Reading settings, PostgreSQL and
Kafka is the entry point's business (``infra.collector``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from collectors.backoff import Backoff, BackoffConfig
from collectors.batcher import Batcher, BatcherConfig
from collectors.binance.feed import BinanceFeed, Venue, stream_name
from collectors.binance.mapper import BinanceMapper
from collectors.binance.rest import BinanceRest, VenueSymbol
from collectors.breaker import Breaker, BreakerConfig
from collectors.coverage import Coverage, CoverageConfig, Resume
from collectors.dedupe import Sequencer, base_of
from collectors.errors import BreakerOpenError, VenueError
from collectors.filler import FillerConfig, GapFiller
from collectors.pipeline import Pipeline
from collectors.session import SessionConfig, Shard
from collectors.stale import StaleConfig, StaleDetector
from collectors.stats import FeedStats
from collectors.watermark import Watermark, WatermarkConfig
from collectors.wire import TRADE_DTYPES, Array, DeadLetters, FrameSink
from schemas.seam import Clock

logger = logging.getLogger(__name__)

REQUEST_IDS_A_SHARD: Final = 1_000_000_000
"""Each shard numbers its requests in a range of its own."""
LISTING_REFRESH_S: Final = 30.0
"""The venue's list of markets is asked again for an unknown symbol after this; it may have been listed meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectorConfig:
    """Sizes and times of the whole collector."""

    streams_per_shard: int = 1_024
    """Streams of one connection at most; the venue allows 1,024."""
    ask_after_s: float = 5.0
    """A symbol of which nobody knows for so long whether it misses something is asked for over REST, a page each, in the background."""
    filler: FillerConfig = field(default_factory=FillerConfig)
    coverage: CoverageConfig = field(default_factory=CoverageConfig)
    batcher: BatcherConfig = field(default_factory=BatcherConfig)
    watermark: WatermarkConfig = field(default_factory=WatermarkConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    stale: StaleConfig = field(default_factory=StaleConfig)
    backoff: BackoffConfig = field(default_factory=BackoffConfig)
    breaker: BreakerConfig = field(default_factory=BreakerConfig)


class BinanceCollector:
    """All shards of one venue in one process.

    Args:
        venue: which exchange and where.
        rest: its REST client.
        sink: takes frames.
        dead_letters: takes rejected bytes.
        clock: time, sleep, randomness.
        config: sizes and times.
        resume: by canonical symbol; what was missed since is fetched after the first connect, and gaps left open are fetched further.
    """

    def __init__(
        self,
        *,
        venue: Venue,
        rest: BinanceRest,
        sink: FrameSink,
        dead_letters: DeadLetters,
        clock: Clock,
        config: CollectorConfig | None = None,
        resume: Mapping[str, Resume] | None = None,
    ) -> None:
        self.venue = venue
        self.rest = rest
        self.shards: list[Shard] = []
        self.states: dict[str, str] = {}
        """Wanted symbol -> ``collecting``, or why it is not."""
        self._config = config or CollectorConfig()
        self._sink, self._dead_letters, self._clock = sink, dead_letters, clock
        self._resume = dict(resume or {})
        self._listed: dict[str, VenueSymbol] = {}
        self._listed_us: int | None = None
        self._placed: dict[str, tuple[Shard, str]] = {}  # symbol -> (shard, stream)
        self._tasks: set[asyncio.Task[None]] = set()
        self._filler = GapFiller(self._page, clock, self._config.filler)
        self._stopped = asyncio.Event()
        self._failed: asyncio.Future[None] | None = None

    # Symbols.

    async def want(self, symbols: set[str]) -> dict[str, str]:
        """Collect exactly these (canonical) symbols from now on; the state of each. Raises VenueError, BreakerOpenError.

        An unknown symbol is logged once and has a state that says so; the others go on.
        """
        unknown = symbols - self._listed.keys()
        if symbols and (self._listed_us is None or (unknown and self._listing_age_s() > LISTING_REFRESH_S)):
            self._listed = await self.rest.symbols()
            self._listed_us = self._clock.monotonic_us()
        for symbol in self._placed.keys() - symbols:
            self._remove(symbol)
        for symbol in self.states.keys() - symbols:
            del self.states[symbol]
        for symbol in sorted(symbols - self._placed.keys()):
            self._add(symbol)
        for shard in self.shards:
            shard.want({stream for placed, stream in self._placed.values() if placed is shard})
        return dict(self.states)

    async def listed(self) -> list[str]:
        """Canonical names of all markets that trade now. Raises VenueError, BreakerOpenError."""
        if self._listed_us is None:
            self._listed = await self.rest.symbols()
            self._listed_us = self._clock.monotonic_us()
        return [entry.symbol for entry in self._listed.values() if entry.status == "TRADING"]

    def _listing_age_s(self) -> float:
        return 0.0 if self._listed_us is None else (self._clock.monotonic_us() - self._listed_us) / 1e6

    def _add(self, symbol: str) -> None:
        entry = self._listed.get(symbol)
        if entry is None:
            state = f"unknown: {self.venue.exchange} lists no market '{symbol}'"
            if self.states.get(symbol) != state:
                logger.error("%s lists no market '%s': it is not collected. Check the row in table symbols.", self.venue.exchange, symbol)
            self.states[symbol] = state
            return
        shard = self._shard_with_room()
        stream = stream_name(entry.raw, self.venue.kind)
        resume = self._resume.pop(symbol, None)
        shard.pipeline.add_symbol(
            f"{self.venue.exchange}:{symbol}",
            stream,
            self._clock.monotonic_us(),
            resume=resume,
            wall_us=self._clock.now_us(),
        )
        self._placed[symbol] = (shard, stream)
        self.states[symbol] = "collecting"

    def _remove(self, symbol: str) -> None:
        shard, _ = self._placed.pop(symbol)
        shard.pipeline.remove_symbol(f"{self.venue.exchange}:{symbol}")

    def _shard_with_room(self) -> Shard:
        counts = {id(shard): 0 for shard in self.shards}
        for shard, _ in self._placed.values():
            counts[id(shard)] += 1
        for shard in self.shards:
            if counts[id(shard)] < self._config.streams_per_shard:
                return shard
        return self._new_shard()

    def _new_shard(self) -> Shard:
        number, config = len(self.shards), self._config
        source = f"{self.venue.exchange}/ws/{number}"
        stats = FeedStats()
        shard: Shard
        pipeline = Pipeline(
            exchange=self.venue.exchange,
            mapper=BinanceMapper(self.venue.kind, has_execution_type=self.venue.has_execution_type),
            sequencer=Sequencer(consecutive=self.venue.consecutive_ids),
            watermark=Watermark(config.watermark),
            batcher=Batcher(source, TRADE_DTYPES, config.batcher),
            stale=StaleDetector(config.stale),
            dead_letters=self._dead_letters,
            stats=stats,
            on_reply=lambda reply: shard.reply(reply),
            on_gap=lambda gap: self._filler.add(pipeline, gap),
            coverage=Coverage(config.coverage),
        )
        shard = Shard(
            feed=BinanceFeed(self.venue, first_id=1 + number * REQUEST_IDS_A_SHARD),
            pipeline=pipeline,
            sink=self._sink,
            clock=self._clock,
            backoff=Backoff(config.backoff, self._clock.random),
            breaker=Breaker(source, config.breaker),
            config=config.session,
            on_connected=self._recover,
            on_silence=self._ask,
        )
        self.shards.append(shard)
        self._spawn(shard.run())
        return shard

    # Life.

    async def run(self) -> None:
        """Until :meth:`stop`. Raises what ended a shard for good."""
        self._failed = asyncio.get_running_loop().create_future()
        stopped = asyncio.create_task(self._stopped.wait())
        self._spawn(self._filler.run())
        self._spawn(self._ask_again())
        either: set[asyncio.Future[Any]] = {stopped, self._failed}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                self._failed.result()
        finally:
            stopped.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def stop(self) -> None:
        """Close the connections and hand everything received to the sink."""
        await asyncio.gather(*(shard.stop() for shard in self.shards))
        self._stopped.set()

    def reasons(self) -> dict[str, str]:
        """What is not ready, by name; empty when every shard is live."""
        found = {shard.name: shard.trouble or "Streams are being subscribed." for shard in self.shards if not shard.is_live}
        if self.venue and not self.shards:
            found["symbols"] = "No symbol is collected yet."
        return found

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        if self._failed is not None and not self._failed.done() and error is not None:
            self._failed.set_exception(error)
        else:
            logger.error("%s: a task of the collector failed", self.venue.exchange, exc_info=error)

    # Gaps.

    async def _page(self, key: str, from_id: int, *, background: bool) -> tuple[dict[str, Array], bool]:
        """See FetchPage. Raises KeyError for a market that is not listed."""
        base = base_of(from_id)
        page, exhausted = await self.rest.page(self._listed[key.partition(":")[2]].raw, from_id - base, background=background)
        return {**page, "trade_id": page["trade_id"] + base}, exhausted

    async def _recover(self, shard: Shard) -> None:
        """After a reconnect: one request tells which symbols traded meanwhile; each of them gets a gap at once.

        Without it a symbol that traded once during the outage and is silent since would be missed until its next trade.
        """
        pipeline = shard.pipeline
        known = self._known(shard)
        if not known or self.venue.kind != "trade":  # the request tells ids of single trades only
            return
        losses = pipeline.ledger.losses
        try:
            newest = await self.rest.last_ids()
        except (VenueError, BreakerOpenError) as exc:
            pipeline.stats.error("recovery_failed")
            logger.warning("%s: cannot ask what was missed: %s Gaps are found by the next trade of each symbol.", shard.name, exc)
            return
        if pipeline.ledger.losses != losses:  # lost again meanwhile: the answer is of the time before, and the next reconnect asks anew
            return
        now = self._clock.monotonic_us()
        before = pipeline.stats.gaps_opened
        for code, symbol in known.items():
            last_id, time_us = newest.get(self._listed[symbol].raw, (-1, 0))
            pipeline.ledger.venue_is_at(code, pipeline.sequencer.numbered_id(code, last_id), time_us, now)
        logger.info("%s: %d of %d symbols traded meanwhile; fetching.", shard.name, pipeline.stats.gaps_opened - before, len(known))

    def _known(self, shard: Shard) -> dict[int, str]:
        """Code -> symbol of everything on a shard of which a trade is known."""
        pipeline = shard.pipeline
        placed = [symbol for symbol, (where, _) in self._placed.items() if where is shard and symbol in self._listed]
        codes = {pipeline.batcher.code_of(f"{self.venue.exchange}:{symbol}"): symbol for symbol in placed}
        return {code: symbol for code, symbol in codes.items() if pipeline.sequencer.last_id(code) >= 0}

    async def _ask_again(self) -> None:
        """Ask for symbols that stay lost: they do not trade, or the venue was not reachable when the feed came back."""
        while True:
            await self._clock.sleep(self._config.ask_after_s)
            for shard in list(self.shards):
                lost = shard.pipeline.ledger.coverage.lost.tolist()
                if lost and shard.is_live:
                    await self._ask(shard, lost)

    async def _ask(self, shard: Shard, codes: list[int]) -> None:
        """Ask the venue, symbol by symbol, whether something came after our newest trade."""
        ledger, sequencer = shard.pipeline.ledger, shard.pipeline.sequencer
        known = self._known(shard)
        for code in codes:
            last = sequencer.last_id(code) if code in known else -1
            if last < 0 or not shard.is_live or not sequencer.doubtful(np.array([code]))[0]:
                continue
            losses = ledger.losses
            try:
                page, exhausted = await self._page(f"{self.venue.exchange}:{known[code]}", last, background=True)
            except (VenueError, BreakerOpenError) as exc:
                shard.pipeline.stats.error("recovery_failed")
                logger.debug("%s: cannot ask whether %s missed anything: %s", shard.name, known[code], exc)
                return
            if ledger.losses != losses:
                return
            ids = page["trade_id"]
            # our newest trade among them: the venue's ids go on from it, and nothing between it and the page's end was overlooked
            if len(ids) and sequencer.last_id(code) == last and (last in ids or (not exhausted and int(ids[0]) > last)):
                ledger.venue_is_at(code, int(ids[-1]), int(page["exchange_time_us"].max()), self._clock.monotonic_us())
                if sequencer.last_id(code) > last and shard.pipeline.stale.is_silent(code):
                    ledger.went_silent([code])  # it trades and its stream says nothing: beyond the page nobody knows either
