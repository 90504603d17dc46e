"""Data quality: wild prints are held, markets that move are followed, and the verdict does not depend on how trades are cut into frames.

Held for good, of a million trades each (this file's markets): random walks with moves of 1e-6 to 2e-2: 0; t-distributed moves with 3 degrees
of freedom of 1e-5 to 3e-3: 0 (289 held and released at 3e-3), with 2 degrees: 0 (1,491 released); a drift of a ten-thousandth a trade: 0; a jump
of 20 % every thousand trades: 0 (1,998 released, two a jump); volatility that switches a hundredfold every 2,000 trades: 0, a thousandfold: 81;
prices that bounce over a spread of 5 %: 0, if only once in a hundred trades: 3; prices drawn evenly from 1 to 100: 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.simulated.market import Market
from collectors.simulated.regimes import MarketConfig
from processors.errors import QualityConfigError, SnapshotError
from processors.quality import REASON_PRICE, REASON_TIME, QualityGate, Suspect
from processors.quality_config import QualityConfig
from schemas.codec import FrameCodec
from schemas.frames import END_OF_SOURCE, HISTORY, Frame, frame_from_polars
from tests.processors.market_data import binance_capture, data_file, kraken_trades, with_symbol

Array = npt.NDArray[Any]
KEY = "binance:BTC-USDT"
T0 = 1_700_000_000_000_000
MILLION = 1_000_000
DTYPES = FrameCodec("trades", 1).dtypes


def market(price: Any, *, step_us: int = 10_000, ids: Any = None, times: Any = None, size: Any = None) -> dict[str, Array]:
    """Trades of one symbol at these prices, ``step_us`` apart."""
    price = np.asarray(price, np.float64)
    count = len(price)
    time_us = T0 + np.arange(count) * step_us if times is None else np.asarray(times, np.int64)
    return {
        "symbol_code": np.zeros(count, np.int32),
        "trade_id": np.arange(1, count + 1) if ids is None else np.asarray(ids, np.int64),
        "price": price,
        "size": np.ones(count) if size is None else np.asarray(size, np.float64),
        "side": np.ones(count, np.int8),
        "exchange_time_us": time_us,
        "receive_time_us": time_us + 1_000,
    }


def calm(count: int = 200, *, seed: int = 1, level: float = 100.0) -> Array:
    """Prices of a quiet market."""
    return level * np.exp(np.cumsum(np.random.default_rng(seed).normal(0, 1e-5, count)))


def cut(columns: dict[str, Array], sizes: int | list[int] = 1_000, *, source: str = "binance/ws", flags: int = 0) -> Iterator[Frame]:
    """Frames of ``sizes`` rows; their watermark is the newest time so far."""
    start, newest, turn = 0, 0, 0
    count = len(columns["price"])
    while start < count:
        stop = start + (sizes if isinstance(sizes, int) else sizes[turn % len(sizes)])
        part = {name: np.ascontiguousarray(column[start:stop]) for name, column in columns.items()}
        newest = max(newest, int(part["exchange_time_us"].max(initial=0)))
        yield Frame(source=source, watermark_us=newest, symbols=(KEY,), columns=part, flags=flags)
        start, turn = stop, turn + 1


class Outcome:
    """What a gate made of trades: ids in the order that the bars get them, ids held for good, suspects, scores."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self.held: dict[int, Suspect] = {}
        self.released = 0
        self.scores: list[dict[str, Array]] = []

    def add(self, gate: QualityGate, frame: Frame) -> None:
        """One frame."""
        verdict = gate.check(frame)
        columns = frame.columns if verdict is None else verdict.columns
        self.given += columns["trade_id"].tolist()
        for suspect in verdict.held if verdict else ():
            self.held[suspect.trade_id] = suspect
        for suspect in verdict.confirmed if verdict else ():
            self.held.pop(suspect.trade_id, None)
            self.released += 1
        scores = gate.scores(frame)
        if scores is not None:
            self.scores.append(scores[1])


def judged(columns: dict[str, Array], sizes: int | list[int] = 1_000, **how: Any) -> Outcome:
    """The outcome of these trades for a new gate."""
    gate, outcome = QualityGate(), Outcome()
    for frame in cut(columns, sizes, **how):
        outcome.add(gate, frame)
    return outcome


# Nothing is locked out.


@pytest.mark.parametrize("move", [1e-6, 1e-4, 1e-3, 2e-2])
def test_a_random_walk_of_a_million_trades_is_accepted(move: float) -> None:
    """At least 99.99 % go into the bars; in fact all."""
    prices = 100 * np.exp(np.cumsum(np.random.default_rng(1).normal(0, move, MILLION)))
    outcome = judged(market(prices))
    assert len(outcome.given) >= 0.9999 * MILLION
    assert not outcome.held


def wild(kind: str, rng: np.random.Generator) -> Array:
    """A million prices of a market that is hard on a band."""
    count = np.arange(MILLION)
    if kind == "uniform":
        return rng.uniform(1, 100, MILLION)
    if kind == "bounce":
        return np.where(rng.random(MILLION) < 0.01, 100.0, 105.0)
    moves = {
        "heavy tails": lambda: rng.standard_t(3, MILLION) * 3e-3,
        "drift": lambda: np.where(count // 5_000 % 2, 1e-4, -1e-4) + rng.normal(0, 1e-5, MILLION),
        "jumps": lambda: rng.normal(0, 1e-5, MILLION) + np.where(count % 1_000 == 0, 0.2 * (-1) ** (count // 1_000), 0.0),
        "regimes": lambda: rng.normal(0, 1, MILLION) * np.where(count // 2_000 % 2, 1e-3, 1e-5),
        "wild regimes": lambda: rng.normal(0, 1, MILLION) * np.where(count // 2_000 % 2, 1e-2, 1e-5),
    }[kind]()
    return 100 * np.exp(np.cumsum(moves))


@pytest.mark.parametrize(
    ("kind", "held"),
    [("heavy tails", 2), ("drift", 0), ("jumps", 0), ("regimes", 2), ("wild regimes", 150), ("bounce", 10), ("uniform", 10)],
)
def test_no_market_is_locked_out(kind: str, held: int) -> None:
    """However it moves, what is held for good stays below two in ten thousand; the figures are in this file's head."""
    outcome = judged(market(wild(kind, np.random.default_rng(1))))
    assert len(outcome.held) <= held
    assert len(outcome.given) + len(outcome.held) == MILLION


@pytest.mark.parametrize("factor", [1.2, 0.8, 3.0, 0.3])
def test_a_jump_is_followed_with_the_third_trade_and_the_bars_get_all_in_order(factor: float) -> None:
    """The first two are held, the third confirms them."""
    prices = calm(400)
    prices[200:] *= factor
    outcome = judged(market(prices), 1)
    assert outcome.given == list(range(1, 401))
    assert outcome.released == 2
    assert not outcome.held


def test_a_lone_wild_print_stays_held() -> None:
    """30 % off and back: the market goes on without it, and its reason and band say why."""
    prices = calm(400)
    prices[200] *= 0.7
    outcome = judged(market(prices), 50)
    assert outcome.given == [number for number in range(1, 401) if number != 201]
    (suspect,) = outcome.held.values()
    assert (suspect.key, suspect.trade_id, suspect.price, suspect.reason) == (KEY, 201, prices[200], REASON_PRICE)
    assert suspect.band_low == pytest.approx(99, abs=0.3)
    assert suspect.band_high == pytest.approx(101, abs=0.3)


@pytest.mark.parametrize(("ahead_s", "factor"), [(3_600, 1.0), (300, 2.0)])
def test_a_move_behind_a_stray_print_ahead_in_time_is_followed_with_the_fifth_trade(ahead_s: int, factor: float) -> None:
    """The print stays held; what comes after it looks late beside it, and still bears witness of the move."""
    prices = calm(600)
    prices[300:] *= 1.2
    prices[299] *= factor
    columns = market(prices)
    columns["exchange_time_us"][299] += ahead_s * MILLION
    gate, outcome = QualityGate(), Outcome()
    for frame in cut(columns, 1):
        outcome.add(gate, replace(frame, watermark_us=T0 + 6 * MILLION))
    assert list(outcome.held) == [300]
    assert outcome.released == 4
    assert outcome.given == [number for number in range(1, 601) if number != 300]


@pytest.mark.parametrize("slow", [1, 2, 3, 7])
def test_a_move_on_a_feed_whose_halves_are_apart_is_followed(slow: int) -> None:
    """One half is two seconds behind the other and has ``slow`` trades for each of its own: no witness is taken for stray for good."""
    count = 1_200
    prices = calm(count)
    times = T0 + np.arange(count) * 20_000
    times[np.arange(count) % (slow + 1) != 0] -= 2 * MILLION
    prices[times >= T0 + 12 * MILLION] *= 1.3
    outcome = judged(market(prices, times=times), 1)
    assert not outcome.held


def test_prints_of_one_instant_are_no_witnesses_of_each_other() -> None:
    """One order that eats through the book fills five times at one moment; then the market is where it was."""
    prices = calm(400)
    prices[200:205] *= 0.7
    times = T0 + np.arange(400) * 10_000
    times[200:205] = times[200]
    assert sorted(judged(market(prices, times=times), 7).held) == [201, 202, 203, 204, 205]


def test_after_a_silence_the_market_may_be_elsewhere() -> None:
    """A tenth away after an hour is no suspect; at once it is."""
    prices = np.concatenate([calm(100), calm(100, level=110.0)])
    times = T0 + np.arange(200) * 10_000
    assert judged(market(prices, times=times), 1).released == 2
    times[100:] += 3_600_000_000
    assert judged(market(prices, times=times), 1).released == 0


def test_late_trades_from_before_a_jump_are_believed() -> None:
    """They come after it, at the old price and the old time."""
    prices = calm(300)
    prices[200:] *= 1.3
    order = [*range(195), *range(200, 230), *range(195, 200), *range(230, 300)]
    columns = {name: column[order] for name, column in market(prices).items()}
    assert not judged(columns, 10).held


def test_a_venue_whose_clock_or_ids_went_back_is_learned_anew() -> None:
    """After a while without a trade in order the symbol starts again, elsewhere too."""
    before, after = market(calm(300), ids=np.arange(10_000, 10_300)), market(calm(2_000, level=250.0))
    after["exchange_time_us"] -= 3_600_000_000
    columns = {name: np.concatenate([before[name], after[name]]) for name in before}
    outcome = judged(columns, 100)
    assert len(outcome.held) < 256
    assert outcome.given[-1_000:] == list(range(1_001, 2_001))


def test_a_time_far_ahead_is_held_and_a_clock_that_stays_ahead_is_believed() -> None:
    """One print an hour ahead would close every bar before it; three in order are the venue's clock."""
    lone = market(calm(300))
    lone["exchange_time_us"][200] += 3_600_000_000
    gate, outcome = QualityGate(), Outcome()
    for frame in cut(lone, 10):
        outcome.add(gate, Frame(source="s", watermark_us=T0 + 2_000_000, symbols=(KEY,), columns=frame.columns))
    assert [(suspect.trade_id, suspect.reason) for suspect in outcome.held.values()] == [(201, REASON_TIME)]
    ahead = market(calm(300))
    ahead["exchange_time_us"][200:] += 3_600_000_000
    gate, outcome = QualityGate(), Outcome()
    for frame in cut(ahead, 1):
        outcome.add(gate, Frame(source="s", watermark_us=T0 + 2_000_000, symbols=(KEY,), columns=frame.columns))
    assert outcome.given == list(range(1, 301))
    assert outcome.released == 2


# The same trades give the same verdict.


def test_the_cut_into_frames_changes_nothing() -> None:
    """The bars get the same trades and the same are held, whatever the frames; one released later comes before the trade that confirmed it."""
    rng = np.random.default_rng(3)
    prices = calm(3_000)
    prices[1_000:] *= 1.25
    prices[rng.integers(0, 3_000, 20)] *= rng.choice([0.6, 1.7], 20)
    columns = market(prices)
    whole = judged(columns, 3_000)
    for sizes in (1, 2, 7, 100, [1, 50, 3]):
        outcome = judged(columns, sizes)
        assert (sorted(outcome.given), outcome.held) == (sorted(whole.given), whole.held)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), at=st.integers(0, 59))
def test_a_restored_gate_goes_on_byte_for_byte(seed: int, at: int) -> None:
    """Anywhere: verdicts, scores and the next snapshot are those of a gate that never stopped."""
    rng = np.random.default_rng(seed)
    prices = calm(600) * np.where(rng.random(600) < 0.1, rng.choice([0.6, 1.2, 1.21, 3.0], 600), 1.0)
    frames = list(cut(market(prices, step_us=200_000), 10))
    whole, first = QualityGate(), QualityGate()
    expected, got = Outcome(), Outcome()
    for frame in frames:
        expected.add(whole, frame)
    for frame in frames[:at]:
        got.add(first, frame)
    second = QualityGate.restore(first.snapshot())
    assert second.snapshot() == first.snapshot()
    for frame in frames[at:]:
        got.add(second, frame)
    assert (got.given, got.held) == (expected.given, expected.held)
    assert second.snapshot() == whole.snapshot()
    for mine, theirs in zip(got.scores, expected.scores, strict=True):
        assert all((mine[name] == theirs[name]).all() for name in mine)


def test_a_suspect_that_comes_again_is_no_witness() -> None:
    """Duplicates of a wild print are dropped with it and told of once."""
    columns = market(calm(400))
    columns["price"][200] *= 0.7
    order = np.sort(np.concatenate([np.arange(400), np.full(10, 200)]))
    outcome = judged({name: column[order] for name, column in columns.items()}, 3)
    assert list(outcome.held) == [201]
    assert 201 not in outcome.given


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_garbage_is_left_to_the_bar_engine_and_poisons_nothing(seed: int) -> None:
    """Values and times that cannot be: those rows pass, and the good trades after them are judged as if they had not been."""
    rng = np.random.default_rng(seed)
    columns = market(calm(400))
    bad = rng.choice(np.arange(20, 300), 40, replace=False)
    columns["price"][bad[:10]] = rng.choice([np.nan, np.inf, -np.inf, 0.0, -5.0, 1e300], 10)
    columns["size"][bad[10:20]] = rng.choice([np.nan, np.inf, -1.0, 1e300], 10)
    columns["trade_id"][bad[20:30]] = rng.choice([-1, 2**62, -(2**63)], 10)
    columns["exchange_time_us"][bad[30:40]] = rng.choice([0, -(2**63), 2**62, T0 * 1000], 10)
    outcome = judged(columns, int(rng.integers(1, 100)))
    assert not outcome.held
    assert len(outcome.given) == 400


# Recorded markets.


CAPTURES = ("spot_btcusdt_20240808", "spot_btcusdt_20240809", "spot_ethusdt_20240808", "spot_ethusdt_20240809", "usdm_btcusdt_20240808")


@pytest.mark.parametrize("name", [*CAPTURES, "kraken", "parquet"])
def test_no_recorded_trade_is_held(name: str) -> None:
    """56,000 trades of Binance and 1,000 of Kraken: not one is a suspect, for a moment even."""
    if name == "kraken":
        trades = kraken_trades()
    elif name == "parquet":
        path = data_file("trades", "binance_BTCUSDT_trades_20210108.parquet")
        raw = pl.read_parquet(path)
        time_us = raw["timestamp"].dt.epoch("us")
        columns = {
            "trade_id": raw["trade_id"].cast(pl.Int64),
            "price": raw["price"].cast(pl.Float64),
            "size": raw["quantity"].cast(pl.Float64),
        }
        side = pl.Series([-1 if maker else 1 for maker in raw["buyer_maker"]])
        trades = with_symbol(
            pl.DataFrame({**columns, "side": side, "exchange_time_us": time_us, "receive_time_us": time_us}), "binance", "BTC-USDT"
        )
    else:
        trades = binance_capture(f"{name}.ws.gz")
    gate = QualityGate()
    for start in range(0, len(trades), 500):
        part = trades[start : start + 500]
        newest = int(part["exchange_time_us"].max())  # type: ignore[arg-type]
        assert gate.check(frame_from_polars(part, source="s", watermark_us=newest, dtypes=DTYPES)) is None


def test_the_simulated_exchange_is_followed_through_its_regimes() -> None:
    """300 symbols, calm, volatile and trending, with jumps of one or all: nothing is held (nor of 6 million trades of seeds 1 to 3)."""
    exchange = Market(MarketConfig(symbols=300, rate=20_000, seed=4), start_ms=T0 // 1_000)
    prices, sizes = (10.0 ** -np.asarray(decimals) for decimals in (exchange.universe.price_decimals, exchange.universe.size_decimals))
    keys = tuple(f"simulated:{symbol}" for symbol in exchange.universe.symbols)
    gate, count = QualityGate(), 0
    while count < 300_000:
        block = exchange.step()
        time_us = block.time_ms * 1_000
        columns: dict[str, Array] = {
            "symbol_code": block.code.astype(np.int32),
            "trade_id": block.trade_id,
            "price": block.price * prices[block.code],
            "size": block.size * sizes[block.code],
            "side": np.where(block.buyer_is_maker, -1, 1).astype(np.int8),
            "exchange_time_us": time_us,
            "receive_time_us": time_us,
        }
        frame = Frame(source="simulated/ws", watermark_us=block.end_ms * 1_000, symbols=keys, columns=columns)
        assert gate.check(frame) is None
        count += len(block)


# Scores.


def test_a_clean_feed_scores_one_and_faults_lower_it_for_about_a_minute() -> None:
    """Rows come when the watermark enters another ten seconds; the score forgets half in about a minute."""
    columns = market(calm(3_000), step_us=50_000)
    columns["price"][1_000:1_200:4] *= np.random.default_rng(1).uniform(0.2, 0.7, 50)
    scores = judged(columns, 20).scores
    assert [int(rows["exchange_time_us"][0] // 10_000_000) for rows in scores] == list(range(T0 // 10_000_000 + 1, T0 // 10_000_000 + 15))
    values = [float(rows["score"][0]) for rows in scores]
    assert values[:4] == [1.0] * 4
    assert min(values) == pytest.approx(0.975, abs=0.003)  # a quarter of an interval, a tenth of the score
    assert 0.98 < values[-1] < 1
    held = [int(rows["held"][0]) for rows in scores]
    assert sum(held) == 50
    assert sum(int(rows["checks_passed"][0]) for rows in scores) + sum(held) <= 3_000
    assert all(rows["band_low"][0] < 100 < rows["band_high"][0] for rows in scores)


def test_only_symbols_with_news_are_scored_and_the_end_of_a_source_scores_the_rest() -> None:
    """A heartbeat that crosses a boundary tells of those that traded since; a source that ends is forgotten."""
    gate = QualityGate()
    frame = next(cut(market(calm(10)), 10))
    gate.check(frame)
    assert gate.scores(frame) is None
    for watermark_s, expected in ((30, 1), (60, 0)):
        beat = Frame(source="binance/ws", watermark_us=T0 + watermark_s * 1_000_000)
        assert gate.check(beat) is None
        scores = gate.scores(beat)
        assert (0 if scores is None else len(scores[0])) == expected
    gate.check(frame)
    end = Frame(source="binance/ws", watermark_us=T0, flags=END_OF_SOURCE)
    gate.check(end)
    scores = gate.scores(end)
    assert scores is not None
    assert scores[1]["checks_passed"].tolist() == [10]
    gate.check(frame)
    assert gate.scores(frame) is None  # new again


def test_what_the_bar_engine_refuses_lowers_the_score_once() -> None:
    """One vocabulary: the engine says why, the score counts it."""
    gate = QualityGate()
    frame = next(cut(market(calm(10)), 10))
    verdict = gate.check(frame)
    gate.refused(frame, {"row": np.array([1, 2, 3, 4]), "reason": np.array([3, 5, 6, 7], np.int8)}, verdict)
    end = Frame(source="binance/ws", watermark_us=T0, flags=END_OF_SOURCE)
    gate.check(end)
    scores = gate.scores(end)
    assert scores is not None
    counts = {name: int(scores[1][name][0]) for name in ("checks_passed", "checks_failed", "bad_values", "bad_times")}
    assert counts == {"checks_passed": 7, "checks_failed": 3, "bad_values": 2, "bad_times": 1}


def test_a_volume_spike_is_flagged_and_goes_into_the_bars() -> None:
    """500 times the usual size."""
    size = np.ones(400)
    size[300] = 500
    outcome = judged(market(calm(400), size=size, step_us=100_000), 10)
    assert sum(int(rows["volume_spikes"][0]) for rows in outcome.scores) == 1
    assert len(outcome.given) == 400


# Sources, bounds, states.


def test_sources_of_one_symbol_are_judged_apart() -> None:
    """A replay of a time when the price was half of today's is no suspect beside the live feed."""
    gate, outcome = QualityGate(), Outcome()
    for live, replayed in zip(cut(market(calm(400)), 10), cut(market(calm(400, level=50.0)), 10, source="replay"), strict=True):
        outcome.add(gate, live)
        outcome.add(gate, replayed)
    assert not outcome.held
    assert outcome.released == 0


def test_trades_of_the_past_are_checked_but_not_for_their_time() -> None:
    """A fetched page may lie far from its frame's watermark; a wild print in it is held."""
    gate, outcome = QualityGate(), Outcome()
    columns = market(calm(400))
    columns["price"][200] *= 0.5
    for frame in cut(columns, 50):
        past = Frame(source="binance/ws/fill", watermark_us=1, symbols=frame.symbols, columns=frame.columns, flags=HISTORY)
        outcome.add(gate, past)
    assert list(outcome.held) == [201]


def test_memory_is_bounded() -> None:
    """Beyond the slots trades pass unchecked; beyond the sources the one silent longest is forgotten and its slots are used again."""
    gate = QualityGate(QualityConfig(max_slots=200, max_sources=10))
    for number in range(500):
        columns = market(calm(5))
        keys = tuple(f"binance:S{number}X{code}-USDT" for code in range(30))
        columns = {name: np.tile(column, 30) for name, column in columns.items()}
        columns["symbol_code"] = np.repeat(np.arange(30, dtype=np.int32), 5)
        assert gate.check(Frame(source=f"source {number}", watermark_us=T0, symbols=keys, columns=columns)) is None
    assert len(gate.snapshot()) < 100_000


@pytest.mark.parametrize("damage", [b"x", b"\x02\0\0\0{}", b"\0\0\0\0"])
def test_hostile_state_is_a_typed_error(damage: bytes) -> None:
    """Bytes that are no state, and one cut off or with a place used twice."""
    with pytest.raises(SnapshotError):
        QualityGate.restore(damage)
    gate = QualityGate()
    for frame in cut(market(calm(100)), 10):
        gate.check(frame)
    state = gate.snapshot()
    for broken in (state[:-1], state.replace(b'"free":[]', b'"free":[0]')):
        with pytest.raises(SnapshotError):
            QualityGate.restore(broken)


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"moves": -1.0}, {"memory": 2.0}, {"witnesses": 0}, {"widest": 1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    """With the name of the setting."""
    with pytest.raises(QualityConfigError, match=next(iter(wrong))):
        QualityConfig(**wrong)
