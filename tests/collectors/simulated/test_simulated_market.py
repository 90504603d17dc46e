"""The seeded market: reproducible, numbered like the real one, and moving like one."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.simulated.blocks import TradeBlock
from collectors.simulated.errors import SimulationConfigError
from collectors.simulated.market import Market
from collectors.simulated.regimes import MarketConfig
from collectors.simulated.universe import build_universe

START_MS = 1_723_161_255_000


def run(market: Market, steps: int) -> list[TradeBlock]:
    """The blocks of so many steps."""
    return [market.step() for _ in range(steps)]


def joined(blocks: list[TradeBlock], name: str) -> np.ndarray:
    """One column of several blocks."""
    return np.concatenate([getattr(block, name) for block in blocks])


def fingerprint(blocks: list[TradeBlock]) -> str:
    """A digest of every column."""
    digest = hashlib.sha256()
    for name in ("code", "trade_id", "price", "size", "time_ms", "buyer_is_maker", "agg_id"):
        digest.update(joined(blocks, name).tobytes())
    return digest.hexdigest()


# Reproducible.


@pytest.mark.parametrize("kind", ["spot", "usdm"])
def test_same_seed_gives_the_same_trades_byte_for_byte(kind: str) -> None:
    """Two markets of one seed trade alike; another seed does not."""
    first, second, other = (
        fingerprint(run(Market(MarketConfig(kind=kind, symbols=50, rate=20_000, seed=seed), start_ms=START_MS), 200)) for seed in (3, 3, 4)
    )
    assert first == second != other


def test_universe_of_more_symbols_begins_with_the_smaller_one() -> None:
    """Listing more coins does not change which coin a code is."""
    small, large = build_universe(kind="spot", symbols=100, seed=5), build_universe(kind="spot", symbols=1_000, seed=5)
    assert large.symbols[:100] == small.symbols
    assert np.array_equal(large.price0[:100], small.price0)
    assert len(set(large.symbols)) == 1_000


# Numbered.


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), rate=st.floats(10, 100_000), symbols=st.integers(1, 200))
def test_spot_ids_of_a_symbol_are_consecutive_and_times_never_go_back(seed: int, rate: float, symbols: int) -> None:
    """Whatever the load, a symbol's ids have no hole and its times are in order; prices and sizes are positive."""
    market = Market(MarketConfig(symbols=symbols, rate=rate, seed=seed), start_ms=START_MS)
    first = market.next_trade_id.copy()
    blocks = run(market, 25)
    code, ids, times = (joined(blocks, name) for name in ("code", "trade_id", "time_ms"))
    for symbol in np.unique(code):
        rows = code == symbol
        assert ids[rows].tolist() == list(range(first[symbol], market.next_trade_id[symbol]))
        assert (np.diff(times[rows]) >= 0).all()
    assert (joined(blocks, "price") > 0).all()
    assert (joined(blocks, "size") > 0).all()


def test_usdm_leaves_ids_out_and_prices_on_the_tick() -> None:
    """Perpetual ids rise with gaps, as recorded; BTCUSDT trades in steps of 0.10."""
    market = Market(MarketConfig(kind="usdm", symbols=5, rate=20_000), start_ms=START_MS)
    blocks = run(market, 100)
    rows = joined(blocks, "code") == 0
    steps = np.diff(joined(blocks, "trade_id")[rows])
    assert steps.min() == 1
    assert steps.max() > 1
    assert (joined(blocks, "price")[rows] % 10 == 0).all()


def test_aggregates_share_order_price_and_side() -> None:
    """Trades of one aggregate are neighbours with one price, side and time; ids of aggregates have no hole."""
    blocks = run(Market(MarketConfig(symbols=10, rate=20_000), start_ms=START_MS), 50)
    code, agg = joined(blocks, "code"), joined(blocks, "agg_id")
    several = 0
    for symbol in range(10):
        rows = np.flatnonzero(code == symbol)
        assert set(np.diff(agg[rows]).tolist()) <= {0, 1}
        same = np.flatnonzero(np.diff(agg[rows]) == 0)
        several += len(same)
        for name in ("price", "buyer_is_maker", "time_ms"):
            column = joined(blocks, name)[rows]
            assert (column[same] == column[same + 1]).all()
    assert several > 100


def test_a_later_start_never_reuses_ids() -> None:
    """An exchange started again a second later numbers beyond what the first one used in that second."""
    market = Market(MarketConfig(symbols=3, rate=20_000), start_ms=START_MS)
    run(market, 25)
    again = Market(MarketConfig(symbols=3, rate=20_000), start_ms=START_MS + 1_000)
    assert (again.next_trade_id > market.next_trade_id).all()


def test_max_trades_stops_exactly() -> None:
    """The last order is cut, so that the count is exact; afterwards time goes on without trades."""
    market = Market(MarketConfig(symbols=5, rate=20_000), start_ms=START_MS, max_trades=1_234)
    blocks = run(market, 100)
    assert sum(len(block) for block in blocks) == 1_234
    assert market.exhausted
    assert blocks[-1].end_ms == START_MS // 40 * 40 + 100 * 40


# Driven.


def test_long_run_rate_is_the_one_asked_for_and_can_be_changed() -> None:
    """Bursts aside, a minute holds rate x 60 trades within 5 %; zero means silence."""
    market = Market(MarketConfig(symbols=100, rate=5_000), start_ms=START_MS)
    run(market, 1_000)
    assert sum(len(block) for block in run(market, 1_500)) == pytest.approx(300_000, rel=0.05)
    market.set_rate(0)
    assert sum(len(block) for block in run(market, 50)) == 0
    market.set_rate(20_000)
    run(market, 500)
    assert sum(len(block) for block in run(market, 1_500)) == pytest.approx(1_200_000, rel=0.05)


def test_paused_symbol_does_not_trade_and_holes_skip_ids() -> None:
    """A pause silences one symbol only; a hole moves its next id on."""
    market = Market(MarketConfig(symbols=5, rate=20_000), start_ms=START_MS)
    market.paused[1] = True
    blocks = run(market, 50)
    assert 1 not in joined(blocks, "code")
    assert 0 in joined(blocks, "code")
    following = int(market.next_trade_id[0])
    market.skip_ids(0, 5)
    more = run(market, 5)
    assert joined(more, "trade_id")[joined(more, "code") == 0][0] == following + 5


def test_perpetual_follows_spot_prices() -> None:
    """The perpetual's mid stays within a few basis points of spot."""
    spot = Market(MarketConfig(symbols=10, rate=2_000), start_ms=START_MS)
    perpetual = Market(MarketConfig(kind="usdm", symbols=5, rate=500), start_ms=START_MS, leader=spot)
    for _ in range(2_000):
        spot.step()
        perpetual.step()
    assert perpetual.mids() == pytest.approx(spot.mids()[:5], rel=2e-3)
    assert perpetual.index_prices() == pytest.approx(spot.mids()[:5], rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"symbols": 0}, "symbols=0"),
        ({"symbols": 10_001}, "symbols=10001"),
        ({"rate": -1.0}, "rate=-1.0"),
        ({"step_ms": 7}, "step_ms=7"),
        ({"excitation": 1.0}, "excitation=1.0"),
    ],
)
def test_unusable_settings_are_named(changes: dict[str, float], named: str) -> None:
    """The sentence names the setting and its value."""
    with pytest.raises(SimulationConfigError, match=named):
        Market(MarketConfig(**changes), start_ms=START_MS)


# Moving like a market.


@pytest.fixture(scope="module")
def long_run() -> dict[str, np.ndarray]:
    """Forty minutes of one-second log returns and trade counts of eight symbols, and the leader's trade by trade prices and sides."""
    market = Market(MarketConfig(symbols=8, rate=400, seed=11, step_ms=100), start_ms=START_MS)
    mids, counts, price, sells = [], [], [], []
    for _ in range(2_400):
        count = np.zeros(8)
        for _ in range(10):
            block = market.step()
            count += np.bincount(block.code, minlength=8)
            price.append(block.price[block.code == 0])
            sells.append(block.buyer_is_maker[block.code == 0])
        mids.append(np.log(market.mids()))
        counts.append(count)
    return {
        "returns": np.diff(np.array(mids), axis=0),
        "counts": np.array(counts),
        "price": np.concatenate(price).astype(float),
        "sells": np.concatenate(sells),
    }


def autocorrelation(values: np.ndarray, lag: int) -> float:
    """Correlation of a series with itself, so many steps later."""
    return float(np.corrcoef(values[:-lag], values[lag:])[0, 1])


def test_returns_have_fat_tails(long_run: dict[str, np.ndarray]) -> None:
    """Kurtosis of one-second returns is well above the normal distribution's 3 for most symbols."""
    standard = (long_run["returns"] - long_run["returns"].mean(axis=0)) / long_run["returns"].std(axis=0)
    assert np.median((standard**4).mean(axis=0)) > 4.0


def test_volatility_clusters_while_returns_do_not(long_run: dict[str, np.ndarray]) -> None:
    """Sizes of moves are correlated over 10 s, their directions hardly."""
    returns = np.clip(long_run["returns"], *np.quantile(long_run["returns"], [0.001, 0.999]))
    sizes = [autocorrelation(np.abs(returns[:, symbol]), 10) for symbol in range(8)]
    directions = [autocorrelation(returns[:, symbol], 10) for symbol in range(8)]
    assert np.median(sizes) > 0.15
    assert abs(np.median(directions)) < 0.05


def test_trades_come_in_bursts(long_run: dict[str, np.ndarray]) -> None:
    """Counts a second vary more than a Poisson process of the same mean, and a busy second follows a busy one."""
    counts = long_run["counts"][100:]
    assert np.median(counts.var(axis=0) / counts.mean(axis=0)) > 3.0
    assert np.median([autocorrelation(counts[:, symbol], 1) for symbol in range(8)]) > 0.3


def test_symbols_move_together(long_run: dict[str, np.ndarray]) -> None:
    """Returns of different symbols are correlated through the common factor, but not the same."""
    ranks = long_run["returns"].argsort(axis=0).argsort(axis=0)  # of ranks, so that single jumps do not decide
    correlation = np.corrcoef(ranks.T)[np.triu_indices(8, 1)]
    assert 0.3 < np.median(correlation) < 0.8


def test_sides_cluster_and_prices_bounce(long_run: dict[str, np.ndarray]) -> None:
    """Buys follow buys; at the level of trades, a price change tends to be undone (bid-ask bounce)."""
    assert autocorrelation(long_run["sells"].astype(float), 1) > 0.2
    market = Market(MarketConfig(symbols=60, rate=5_000, seed=3), start_ms=START_MS)
    blocks = run(market, 1_500)
    bounces = []
    for symbol in range(30, 60):
        changes = np.diff(joined(blocks, "price")[joined(blocks, "code") == symbol].astype(float))
        bounces.append(autocorrelation(changes, 1))
    assert np.median(bounces) < -0.1


def test_activity_follows_a_power_law_and_sizes_are_often_round() -> None:
    """The first symbol trades far more than the hundredth; a third of sizes are round numbers."""
    blocks = run(Market(MarketConfig(symbols=300, rate=50_000), start_ms=START_MS), 500)
    counts = np.bincount(joined(blocks, "code"), minlength=300)
    assert counts[0] > 20 * counts[150:].mean()
    size = joined(blocks, "size")[joined(blocks, "code") == 0]
    round_share = np.mean([len(str(value).rstrip("0")) <= 2 for value in size[size > 10_000].tolist()])
    assert 0.2 < round_share < 0.6
