"""The exchange without its sockets: one or two markets, what they remember, their limits and their faults.

Comes in: an :class:`ExchangeConfig` and market time. Goes out: blocks to send, and the state REST reads. Pure: the server drives it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collectors.simulated.blocks import TradeBlock
from collectors.simulated.errors import SimulationConfigError
from collectors.simulated.faults import KEPT_FAULTS, FaultPlan, FaultRequest
from collectors.simulated.history import MinuteCandles, TradeRing, Trades
from collectors.simulated.limits import RestTrouble, WeightLimit
from collectors.simulated.market import Market
from collectors.simulated.regimes import MarketConfig
from collectors.simulated.universe import MarketKind
from collectors.simulated.wire import Wire

MAX_WARMUP_S: Final = 3_600.0


@dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """What the exchange lists and remembers.

    Attributes:
        spot: the spot market.
        usdm: the USD-M market, following spot's prices; None: only spot.
        history: trades kept per market, 43 bytes each; 500,000 are four minutes at 2,000 a second and 22 MB.
        kline_minutes: one-minute candles kept per symbol, 88 bytes each.
        warmup_s: market time traded before the start, so that REST has a past at once; cut to what ``history`` holds.
        max_trades: each market stops after this many; None: never.
        weight_limit: request weight a minute; None: Binance's own (6,000 spot, 2,400 USD-M).
    """

    spot: MarketConfig = field(default_factory=MarketConfig)
    usdm: MarketConfig | None = None
    history: int = 500_000
    kline_minutes: int = 720
    warmup_s: float = 30.0
    max_trades: int | None = None
    weight_limit: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be run, naming it."""
        if self.spot.kind != "spot" or (self.usdm is not None and self.usdm.kind != "usdm"):
            raise SimulationConfigError("spot and usdm: each market must be of its own kind")
        if self.usdm is not None and self.usdm.step_ms != self.spot.step_ms:
            raise SimulationConfigError(f"step_ms={self.usdm.step_ms}: both markets step together, spot has {self.spot.step_ms}")
        if not 0.0 <= self.warmup_s <= MAX_WARMUP_S:
            raise SimulationConfigError(f"warmup_s={self.warmup_s}: must be within 0..{MAX_WARMUP_S:g}")
        if self.max_trades is not None and self.max_trades < 0:
            raise SimulationConfigError(f"max_trades={self.max_trades}: must not be negative")


class Venue:
    """One market with everything that belongs to it.

    Args:
        config: which market.
        exchange: what is kept.
        start_ms: market time of the first step.
        leader: the market whose prices this one follows.
    """

    def __init__(self, config: MarketConfig, exchange: ExchangeConfig, *, start_ms: int, leader: Market | None = None) -> None:
        self.market = Market(config, start_ms=start_ms, leader=leader)
        self.wire = Wire(self.market.universe)
        self.ring = TradeRing(exchange.history)
        self.candles = MinuteCandles(self.market, minutes=exchange.kline_minutes)
        self.faults = FaultPlan()
        self.limit = WeightLimit(exchange.weight_limit or (6_000 if config.kind == "spot" else 2_400))
        self.trouble = RestTrouble()
        # What was traded before the ids were last reset: the trades of a life that REST has forgotten.
        self.earlier: TradeRing | None = None
        # Symbols whose pause ends by itself: code -> market time.
        self.pauses: dict[int, int] = {}

    def step(self) -> TradeBlock:
        """Trade one step and remember it."""
        market = self.market
        for code in [code for code, until_ms in self.pauses.items() if until_ms <= market.time_ms]:
            self.resume(code)
        self.candles.roll(market.time_ms)
        block = market.step()
        if len(block):
            self.ring.append(block)
            self.candles.add(block)
        return block

    def resume(self, code: int) -> None:
        """Let a paused symbol trade again."""
        self.market.paused[code] = False
        self.pauses.pop(code, None)

    def known(self, code: int) -> Trades:
        """The trades of a symbol REST has: those still kept, without those a ``lose`` took from it."""
        kept = self.ring.of_symbol(code)
        lost = self.faults.lost.get(code)
        if not lost:
            return kept
        return kept.where(~np.isin(kept.trade_id, lost))

    def reset_ids(self) -> None:
        """Number trades from 1 again and forget those made before (:attr:`earlier` keeps them for the ground truth)."""
        self.market.next_trade_id[:] = 1
        self.market.next_agg_id[:] = 1
        self.earlier, self.ring = self.ring, TradeRing(self.ring.capacity)
        self.faults.clear()
        self.faults.lost.clear()

    def truth(self, code: int, *, earlier: bool = False) -> dict[str, npt.NDArray[Any]]:
        """Every trade of a symbol that is still kept, as the market made it, untouched by faults.

        Args:
            code: the symbol.
            earlier: the trades made before the last reset of the ids (none where there was none).

        Returns:
            ``trade_id`` i8, ``price`` f8, ``size`` f8, ``side`` i1 (taker's), ``exchange_time_us`` i8, by id.
        """
        ring = (self.earlier or TradeRing(1_000)) if earlier else self.ring
        trades = ring.of_symbol(code)
        universe = self.market.universe
        return {
            "trade_id": trades.trade_id,
            # Both operands are exact, so the quotient is the double nearest to the decimal text, as a parser gives it.
            "price": trades.price / 10.0 ** float(universe.price_decimals[code]),
            "size": trades.size / 10.0 ** float(universe.size_decimals[code]),
            "side": np.where(trades.buyer_is_maker, -1, 1).astype(np.int8),
            "exchange_time_us": trades.time_ms * 1_000,
        }


class Exchange:
    """All markets, stepped together.

    Args:
        config: what to simulate.
        start_ms: market time at which the caller begins to step (the past before it is traded at once).
    """

    def __init__(self, config: ExchangeConfig, *, start_ms: int) -> None:
        self.config = config
        step_ms = config.spot.step_ms
        rate = max(config.spot.rate, config.usdm.rate if config.usdm else 0.0)
        warmup_s = min(config.warmup_s, config.history / rate) if rate else 0.0
        first_ms = start_ms - int(warmup_s * 1000)
        spot = Venue(config.spot, config, start_ms=first_ms)
        self.venues: dict[MarketKind, Venue] = {"spot": spot}
        if config.usdm is not None:
            self.venues["usdm"] = Venue(config.usdm, config, start_ms=first_ms, leader=spot.market)
        self.skew_ms = 0
        self.faults: list[FaultRequest] = []
        self._down_until_ms = 0
        self._resets_ids = False
        while self.time_ms + step_ms <= start_ms:
            self.step()
        for venue in self.venues.values():
            venue.market.trades_made = 0
            venue.market.max_trades = config.max_trades

    @property
    def time_ms(self) -> int:
        """Market time: everything before it has been traded."""
        return self.venues["spot"].market.time_ms

    @property
    def exhausted(self) -> bool:
        """True once every market has made ``max_trades``."""
        return all(venue.market.exhausted for venue in self.venues.values())

    @property
    def is_down(self) -> bool:
        """True while it restarts: time passes, nothing trades, nobody is answered."""
        return self.time_ms < self._down_until_ms

    def go_down(self, seconds: float, *, reset_ids: bool) -> None:
        """Stop trading for ``seconds`` of market time; then go on, with ids from 1 where ``reset_ids``."""
        self._down_until_ms = self.time_ms + max(int(seconds * 1_000), self.config.spot.step_ms)
        self._resets_ids = reset_ids

    def step(self) -> list[tuple[Venue, TradeBlock]]:
        """One step of every market; none while it is down."""
        if self.is_down:
            self.jump_to(self.time_ms + self.config.spot.step_ms)
            if not self.is_down and self._resets_ids:
                for venue in self.venues.values():
                    venue.reset_ids()
            return []
        return [(venue, venue.step()) for venue in self.venues.values()]

    def jump_to(self, time_ms: int) -> None:
        """Move time forward without trading (the machine slept, or cannot keep up)."""
        for venue in self.venues.values():
            venue.market.jump_to(time_ms)

    def remember(self, fault: FaultRequest) -> None:
        """Keep a fault for ``/sim/status``; the oldest makes room."""
        self.faults.append(fault)
        del self.faults[:-KEPT_FAULTS]
