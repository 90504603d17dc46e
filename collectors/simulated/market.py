"""The market: who trades what, when and at which price; seeded, with time as an argument.

Comes in: a :class:`MarketConfig` and calls of :meth:`Market.step`, one per ``step_ms`` of market time. Goes out: one :class:`TradeBlock`
(columns, in time order) a step. The same config and the same sequence of calls give the same trades, byte for byte; how the calls are
spread over wall time does not matter. No clock, socket or global randomness is used.

The model, in the order it is computed in a step:

* a regime (calm, volatile, trending) of one to some minutes sets volatility, activity and drift of everything;
* the log mid price of each symbol moves by a share of a common factor plus its own noise, scaled by a slowly wandering volatility (so that
  moves cluster and have fat tails), with rare jumps of one symbol or all;
* orders arrive by a self-exciting (Hawkes) process per symbol: each order raises that symbol's rate for a while, a jump raises it much;
* takers' sides come in runs; an order is filled in one or several trades that walk up (or down) the book, between bid and ask the price
  bounces; sizes are log-normal with a share of round lots.
"""

from __future__ import annotations

import math

import numpy as np

from collectors.simulated.blocks import BoolArray, FloatArray, IntArray, TradeBlock
from collectors.simulated.errors import SimulationConfigError
from collectors.simulated.regimes import ID_EPOCH_S, IDS_A_SECOND, LEVELLING_S, MAX_FILLS, MAX_LOTS, MAX_RATE, REGIMES, MarketConfig, Regime
from collectors.simulated.universe import Universe, build_universe


class Market:
    """A market that is stepped.

    Args:
        config: what to simulate.
        start_ms: market time of the first step's start, milliseconds since the epoch; rounded down to a multiple of ``step_ms``.
        leader: a market whose prices this one follows (the perpetual follows spot); it must be stepped first, each step, and list at
            least as many symbols with the same seed.
        max_trades: stop for good after exactly this many trades; None: never.

    Raises:
        SimulationConfigError: the config cannot be run.
    """

    def __init__(self, config: MarketConfig, *, start_ms: int, leader: Market | None = None, max_trades: int | None = None) -> None:
        if leader is not None and len(leader.universe) < config.symbols:
            raise SimulationConfigError(f"symbols={config.symbols}: a following market lists at most its leader's {len(leader.universe)}")
        self.config = config
        self.universe: Universe = build_universe(kind=config.kind, symbols=config.symbols, seed=config.seed)
        self._codes = {symbol: index for index, symbol in enumerate(self.universe.symbols)}
        self.time_ms = start_ms - start_ms % config.step_ms
        self.trades_made = 0
        self.max_trades = max_trades
        self.rate = config.rate
        self.regime: Regime = REGIMES[0]
        # Ids follow the start time, so that an exchange started anew never hands out an id its clients have seen: they would drop those
        # trades as duplicates. To them a restart looks like trades missed while the exchange was down.
        started_s = max(0, self.time_ms // 1_000 - ID_EPOCH_S)
        self.next_trade_id: IntArray = self.universe.first_trade_id + started_s * IDS_A_SECOND
        self.next_agg_id: IntArray = self.next_trade_id // 2
        self.paused: BoolArray = np.zeros(config.symbols, dtype=np.bool_)
        self._leader = leader
        self._rng = np.random.Generator(np.random.SFC64([config.seed, 2 if config.kind == "spot" else 3]))
        self._unit: FloatArray = 10.0 ** -self.universe.price_decimals.astype(np.float64)
        self._lot: FloatArray = 10.0 ** self.universe.size_decimals.astype(np.float64)
        self._anchor: FloatArray = np.log(self.universe.price0)
        self._log_mid: FloatArray = self._anchor.copy()
        self._log_move: FloatArray = np.zeros(config.symbols)
        self._basis: FloatArray = np.zeros(config.symbols)
        self._log_volatility: FloatArray = np.zeros(config.symbols)
        self._imbalance: FloatArray = np.zeros(config.symbols)
        self._buy_probability: FloatArray = np.full(config.symbols, 0.5)
        # Begins as busy as it will be on average; from nothing the process would need some memory_s to get there.
        self._excited: FloatArray = self._usual_excitement()
        self._illiquidity: FloatArray = 1.0 - np.exp(-np.arange(config.symbols) / 15.0)
        self._steps = 0
        self._steps_a_second = max(1, 1000 // config.step_ms)
        self._regime_until_ms = self.time_ms
        self._regime_sign = 1.0
        self._owed = 0.0
        self._wander()

    # What can be changed while it runs; each takes effect at the next step.

    def set_rate(self, rate: float) -> None:
        """Aim at ``rate`` trades a second from the next step on; what was owed at the old rate is forgotten."""
        if not 0.0 <= rate <= MAX_RATE:
            raise SimulationConfigError(f"rate={rate}: must be within 0..{MAX_RATE:g}")
        self.rate = rate
        self._owed = 0.0
        self._excited = self._usual_excitement()

    def _usual_excitement(self) -> FloatArray:
        return self.universe.weight * (self.rate / self.config.mean_fills * self.config.excitation)

    def skip_ids(self, code: int, count: int) -> None:
        """Leave ``count`` ids of a symbol out: trades that never existed, a true hole in the numbering."""
        self.next_trade_id[code] += count

    def jump_to(self, time_ms: int) -> None:
        """Move market time forward without trading, as an exchange that was down."""
        self.time_ms = max(self.time_ms, time_ms - time_ms % self.config.step_ms)

    @property
    def exhausted(self) -> bool:
        """True once ``max_trades`` have been made."""
        return self.max_trades is not None and self.trades_made >= self.max_trades

    # Reading.

    def code(self, symbol: str) -> int | None:
        """The code of an exchange symbol, or None."""
        return self._codes.get(symbol)

    def quotes(self) -> tuple[IntArray, IntArray]:
        """Best bid and ask of all symbols now, in price units, int64."""
        bid = self._bid_units(np.exp(self._log_mid), slice(None))
        return bid, bid + self._spread_units

    def mids(self) -> FloatArray:
        """Mid prices of all symbols now, quote units, float64."""
        return np.exp(self._log_mid)

    def index_prices(self) -> FloatArray:
        """The leader's mid prices (spot); the own ones where nothing is followed."""
        return np.exp(self._log_mid - self._basis) if self._leader is not None else self.mids()

    # The step.

    def step(self) -> TradeBlock:
        """Advance by ``step_ms`` and return the trades of that interval (possibly none)."""
        if self.time_ms >= self._regime_until_ms:
            self._change_regime()
        if self._steps % self._steps_a_second == 0:
            self._wander()
        self._steps += 1
        start_ms = self.time_ms
        self.time_ms = start_ms + self.config.step_ms
        previous = self._log_mid.copy()
        self._move_prices()
        if self.exhausted:
            return self._empty()
        code, offset_ms, fills, buys = self._arrivals()
        if not len(code):
            return self._empty()
        return self._trades(start_ms, previous, code, offset_ms, fills, buys)

    def _empty(self) -> TradeBlock:
        none = np.zeros(0, dtype=np.int64)
        return TradeBlock(self.time_ms, none, none, none, none, none, np.zeros(0, dtype=np.bool_), none, none, none, none)

    def _change_regime(self) -> None:
        """Draw the next regime and how long it stays."""
        shares = np.array([regime.share for regime in REGIMES])
        self.regime = REGIMES[int(self._rng.choice(len(REGIMES), p=shares / shares.sum()))]
        self._regime_sign = 1.0 if self._rng.random() < 0.5 else -1.0
        self._regime_until_ms = self.time_ms + int(1000 * (5.0 + self._rng.exponential(self.regime.mean_s)))

    def _wander(self) -> None:
        """Once a second of market time: let volatilities, imbalances and spreads of all symbols drift."""
        symbols = self.config.symbols
        noise = self._rng.standard_normal((3, symbols))
        # Log-volatility reverts over 60 s with a standard deviation of 0.55; imbalance of sides over 8 s; basis over 300 s.
        self._log_volatility = self._log_volatility * 0.9835 + 0.55 * 0.181 * noise[0]
        self._imbalance = self._imbalance * 0.88 + 0.475 * noise[1]
        self._basis = self._basis * 0.9967 + 2e-5 * noise[2]
        self._buy_probability = 0.5 + 0.4 * np.tanh(self._imbalance)
        step_s = self.config.step_ms / 1000.0
        self._sigma: FloatArray = self.universe.volatility * np.exp(self._log_volatility) * math.sqrt(step_s)
        # A tick for the leaders, about half a basis point for small coins; wider when volatile.
        price = np.exp(self._log_mid)
        ticks = np.rint(0.5e-4 * self._illiquidity * np.exp(self._log_volatility) * price / (self._unit * self.universe.tick_units))
        self._spread_units: IntArray = np.clip(ticks, 1, 50).astype(np.int64) * self.universe.tick_units

    def _move_prices(self) -> None:
        """Move every mid by factor, own noise, drift and jumps (or follow the leader)."""
        if self._leader is not None:
            previous = self._log_mid
            self._log_mid = self._leader._log_mid[: self.config.symbols] + self._basis
            self._log_move = self._log_mid - previous
            return
        rng, universe, regime = self._rng, self.universe, self.regime
        step_s = self.config.step_ms / 1000.0
        factor = rng.standard_normal() * regime.volatility
        if regime.drift:
            factor += regime.drift * self._regime_sign * math.sqrt(step_s)
        own = rng.standard_normal(self.config.symbols)
        # beta of 0.85 gives a correlation of about 0.5 between two symbols.
        move = self._sigma * (0.85 * universe.beta * factor + (0.7 * regime.volatility) * own)
        # A pull back to the listing price over about a day: an unattended week must not run prices to nothing.
        move += (self._anchor - self._log_mid) * (step_s / 86_400.0)
        if rng.random() < step_s * (self.config.symbols / 900.0 + 1 / 600.0):
            self._jump(move)
        self._log_move = move
        self._log_mid = self._log_mid + move

    def _jump(self, move: FloatArray) -> None:
        """A piece of news: one symbol (sometimes all) leaps by 8 to 40 one-second deviations and is traded heavily for a while."""
        rng = self._rng
        size = float(rng.uniform(8.0, 40.0)) * (1.0 if rng.random() < 0.5 else -1.0)
        share = self.rate * (1.0 - self.config.excitation) / self.config.mean_fills
        if rng.random() < 0.05:
            move += 0.3 * size * self.universe.volatility * self.universe.beta
            self._excited += 1.0 * share * self.universe.weight
            self._imbalance += math.copysign(1.0, size)
            return
        # The heavier traded, the likelier in the news.
        index = int(np.searchsorted(np.cumsum(np.sqrt(self.universe.weight)), rng.random() * np.sqrt(self.universe.weight).sum()))
        move[index] += size * self.universe.volatility[index]
        self._excited[index] += 15.0 * share * self.universe.weight[index]
        self._imbalance[index] += math.copysign(1.5, size)

    def _arrivals(self) -> tuple[IntArray, IntArray, IntArray, BoolArray]:
        """The orders of this step in time order: symbol code, offset in ms, number of fills, taker buys."""
        config, rng = self.config, self._rng
        step_s = config.step_ms / 1000.0
        # The controller: bursts are free, but what is owed (or was overdrawn) is levelled out, so the long-run rate is exact.
        self._owed += self.rate * step_s
        correction = min(max(1.0 + self._owed / (self.rate * LEVELLING_S), 0.2), 3.0) if self.rate else 0.0
        order_rate = self.rate / config.mean_fills * (1.0 - config.excitation) * self.regime.activity * correction
        if not self.rate:
            self._excited[:] = 0.0
        intensity = self.universe.weight * order_rate + self._excited
        intensity[self.paused] = 0.0
        self._excited *= math.exp(-step_s / config.memory_s)
        cumulative = np.cumsum(intensity)
        total = float(cumulative[-1])
        count = int(rng.poisson(total * step_s)) if total > 0 else 0
        uniform = rng.random((3, count))
        code = np.searchsorted(cumulative, uniform[0] * total, side="right")
        np.minimum(code, config.symbols - 1, out=code)
        offset_ms = np.sort((uniform[1] * config.step_ms).astype(np.int64))
        buys: BoolArray = uniform[2] < self._buy_probability[code]
        fills = np.minimum(rng.geometric(1.0 / config.mean_fills, count), MAX_FILLS)
        self._excited += np.bincount(code, minlength=config.symbols) * (config.excitation / config.memory_s)
        return code, offset_ms, fills, buys

    def _trades(
        self, start_ms: int, previous: FloatArray, order_code: IntArray, offset_ms: IntArray, fills: IntArray, order_buys: BoolArray
    ) -> TradeBlock:
        """Expand orders into trades: prices, sizes and ids."""
        universe = self.universe
        order = np.repeat(np.arange(len(order_code)), fills)
        if self.max_trades is not None:
            order = order[: self.max_trades - self.trades_made]
        count = len(order)
        code = order_code[order]
        first_fill = np.empty(count, dtype=np.bool_)
        first_fill[0] = True
        np.not_equal(order[1:], order[:-1], out=first_fill[1:])

        # Prices: the mid moves evenly through the step; a taker pays the ask or gets the bid; later fills walk on with probability 0.45.
        fraction = (offset_ms + 1.0) / self.config.step_ms
        mid = np.exp(previous[order_code] + self._log_move[order_code] * fraction)
        bid = self._bid_units(mid, order_code)
        best = np.where(order_buys, bid + self._spread_units[order_code], bid)
        uniform = self._rng.random((2, count))
        walked = np.cumsum((uniform[0] < 0.45) & ~first_fill)
        starts = np.flatnonzero(first_fill)
        walked -= np.repeat(walked[starts], np.diff(starts, append=count))
        tick = universe.tick_units[code]
        buys = order_buys[order]
        price = np.maximum(best[order] + np.where(buys, walked, -walked) * tick, tick)

        trade_id, agg_id, by_symbol, group_start, group_code = self._number(code, first_fill, walked)
        self.trades_made += count
        self._owed -= count
        return TradeBlock(
            end_ms=self.time_ms,
            code=code,
            trade_id=trade_id,
            price=price,
            size=self._sizes(code, mid[order], uniform[1]),
            time_ms=start_ms + offset_ms[order],
            buyer_is_maker=~buys,
            agg_id=agg_id,
            by_symbol=by_symbol,
            group_start=group_start,
            group_code=group_code,
        )

    def _bid_units(self, mid: FloatArray, index: IntArray | slice) -> IntArray:
        """Best bid in price units for mid prices of the symbols ``index``: a multiple of the tick, at least one."""
        tick = self.universe.tick_units[index]
        half_spread = self._spread_units[index] / 2.0
        return np.maximum(np.floor((mid / self._unit[index] - half_spread) / tick + 0.5), 1.0).astype(np.int64) * tick

    def _sizes(self, code: IntArray, mid: FloatArray, uniform: FloatArray) -> IntArray:
        """Sizes in lots: log-normal notional over the price; a third are round numbers, as people type them."""
        notional = self.universe.typical_notional[code] * np.exp(1.5 * self._rng.standard_normal(len(code)))
        lots = np.clip(notional / mid * self._lot[code], 1.0, MAX_LOTS)
        # One significant digit, or a half step for the larger part: 1, 1.5, 2, ... 9.5 times a power of ten.
        power = 10.0 ** np.floor(np.log10(lots))
        round_lots = np.maximum(np.rint(lots / power * 2.0) * power / 2.0, 1.0)
        return np.floor(np.where(uniform < 0.34, round_lots, lots)).astype(np.int64)

    def _number(self, code: IntArray, first_fill: BoolArray, walked: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
        """Trade ids and aggregate ids, consecutive per symbol (USD-M leaves some out), and the grouping by symbol."""
        count = len(code)
        by_symbol = np.argsort(code, kind="stable")
        sorted_code = code[by_symbol]
        new_group = np.empty(count, dtype=np.bool_)
        new_group[0] = True
        np.not_equal(sorted_code[1:], sorted_code[:-1], out=new_group[1:])
        group_start = np.flatnonzero(new_group)
        group_code = sorted_code[group_start]
        sizes = np.diff(group_start, append=count)
        base = np.repeat(group_start, sizes)
        rank = np.arange(count) - base
        if self.config.kind == "usdm":
            # Insurance-fund and ADL trades take ids but are not published: recorded REST replies jump by up to a thousand.
            skips = np.where(self._rng.random(count) < 0.002, self._rng.integers(1, 50, count), 0)
            total_skips = np.cumsum(skips)
            rank = rank + total_skips - np.repeat(total_skips[group_start] - skips[group_start], sizes)
        ids = self.next_trade_id[sorted_code] + rank
        last = np.append(group_start[1:], count) - 1
        self.next_trade_id[group_code] = ids[last] + 1

        # A new aggregate starts with each order and wherever the order reached a new price.
        level_changed = np.empty(count, dtype=np.bool_)
        level_changed[0] = True
        np.not_equal(walked[1:], walked[:-1], out=level_changed[1:])
        opened = np.cumsum((first_fill | level_changed)[by_symbol])
        aggregate = self.next_agg_id[sorted_code] + opened - np.repeat(opened[group_start], sizes)
        self.next_agg_id[group_code] = aggregate[last] + 1

        trade_id = np.empty(count, dtype=np.int64)
        agg_id = np.empty(count, dtype=np.int64)
        trade_id[by_symbol] = ids
        agg_id[by_symbol] = aggregate
        return trade_id, agg_id, by_symbol, group_start, group_code
