"""Silence: by each symbol's own law, and of a whole feed."""

import gzip
from random import Random

import numpy as np
import pytest

from collectors.stale import StaleConfig, StaleDetector
from tests.collectors.fakes import recorded

S = 1_000_000


def arrive(detector: StaleDetector, code: int, now: int) -> None:
    """One row of a symbol."""
    detector.observe(np.array([code], np.int64), now)


def arrivals(detector: StaleDetector, count: int, gap_us: int) -> int:
    """So many rows of a symbol, one every ``gap_us`` from 0 on; the time of the last."""
    for number in range(count):
        arrive(detector, 0, number * gap_us)
    return (count - 1) * gap_us


def test_a_busy_symbol_is_stale_within_seconds_and_a_quiet_one_is_not() -> None:
    """Same silence, other law: 10 s after trading every 100 ms against every minute."""
    detector = StaleDetector(StaleConfig(symbol_floor_us=2 * S))
    detector.watch(0, 0)
    detector.watch(1, 0)
    now = 0
    for step in range(6_000):
        now = step * S // 10
        arrive(detector, 0, now)
        if step % 600 == 0:
            arrive(detector, 1, now)
    assert detector.newly_stale(now + 15 * S) == [0]
    assert detector.newly_stale(now + 16 * S) == []
    assert detector.stale_symbols() == 1
    arrive(detector, 0, now + 17 * S)
    assert detector.stale_symbols() == 0


def test_poisson_arrivals_are_never_called_stale() -> None:
    """Two hours of random arrivals at five rates: a probability of 1e-6 stays one."""
    random = Random(3)
    for mean_s in (0.05, 0.5, 2.0, 10.0, 60.0):
        detector = StaleDetector(StaleConfig(symbol_floor_us=0, feed_floor_us=0))
        detector.watch(0, 0)
        now = 0
        for _ in range(min(20_000, int(7_200 / mean_s))):
            gap = int(random.expovariate(1 / mean_s) * S)
            assert not detector.newly_stale(now + gap - 1), mean_s
            assert not detector.feed_is_stale(now + gap - 1), mean_s
            now += gap
            arrive(detector, 0, now)


def test_the_first_arrivals_of_a_symbol_are_no_law_yet() -> None:
    """Two hundred beginnings at five rates, 60 arrivals each: what a few of them happen to be is not taken for the rate."""
    random = Random(7)
    for mean_s in (0.05, 0.5, 2.0, 10.0, 60.0):
        for _ in range(200):
            detector = StaleDetector(StaleConfig(symbol_floor_us=0))
            detector.watch(0, 0)
            now = 0
            for _ in range(60):
                gap = int(random.expovariate(1 / mean_s) * S)
                assert not detector.newly_stale(now + gap - 1), mean_s
                now += gap
                arrive(detector, 0, now)


def test_a_busy_symbol_is_found_frozen_within_three_seconds_of_its_first_ones() -> None:
    """Three seconds at 20 arrivals a second are enough to know it; a look every 250 ms."""
    detector = StaleDetector()
    detector.watch(0, 0)
    now = arrivals(detector, 60, S // 20)
    looks = [now + look * 250_000 for look in range(1, 20)]
    found = next(look for look in looks if detector.newly_stale(look))
    assert found - now <= 3 * S


@pytest.mark.parametrize(
    "name",
    ["spot_btcusdt_20240808", "spot_btcusdt_20240809", "spot_ethusdt_20240808", "spot_ethusdt_20240809", "usdm_btcusdt_20240808"],
)
def test_recorded_lulls_are_never_called_stale(name: str) -> None:
    """Five recordings of the venue, bursts and lulls as they were, taken in rounds of 20 ms."""
    with gzip.open(recorded(f"binance/{name}.ws.gz"), "rt") as stream:
        times = [int(line.partition('"T":')[2].partition(",")[0]) * 1_000 for line in stream if '"e":"trade"' in line]
    assert len(times) > 5_000
    detector = StaleDetector()
    rounds = sorted({time_us // 20_000 for time_us in times})
    detector.watch(0, rounds[0] * 20_000)
    for each in rounds:
        assert not detector.newly_stale(each * 20_000 - 1)
        arrive(detector, 0, each * 20_000)


def test_a_silence_that_goes_on_is_told_again_and_less_often() -> None:
    """At three times its length when it was told before; after a row it begins anew, after a reconnect as well."""
    detector = StaleDetector()
    detector.watch(0, 0)
    now = arrivals(detector, 600, S // 20)
    told = [look for look in range(1, 200) if detector.newly_stale(now + look * S)]
    assert told == [3, 10, 31, 94]
    assert detector.is_silent(0)
    arrive(detector, 0, now + 200 * S)
    assert not detector.is_silent(0)
    assert detector.newly_stale(now + 203 * S) == []
    detector.connected(now + 300 * S)
    assert detector.newly_stale(now + 302 * S) == []


def test_an_active_feed_is_found_dead_within_three_seconds() -> None:
    """The floor of 2 s and a look every 250 ms."""
    detector = StaleDetector()
    detector.watch(0, 0)
    now = arrivals(detector, 2_000, 20_000)
    looks = [now + look * 250_000 for look in range(1, 20)]
    found = next(look for look in looks if detector.feed_is_stale(look))
    assert found - now <= 3 * S


def test_a_market_that_pauses_is_reconnected_less_and_less_often() -> None:
    """Each reconnect that brings nothing triples the patience."""
    detector = StaleDetector()
    now = 0
    for step in range(2_000):
        now = step * 20_000
        arrive(detector, 0, now) if step else detector.watch(0, 0)
    limits = []
    for _ in range(4):
        limits.append(detector.feed_limit_us())
        detector.silence_was_quiet(now)
    assert limits == sorted(limits)
    assert limits[-1] >= 20 * limits[0]


def test_a_reconnect_restarts_every_silence_but_keeps_what_was_learnt() -> None:
    """Symbols are not called stale for the outage."""
    detector = StaleDetector(StaleConfig(symbol_floor_us=2 * S))
    detector.watch(0, 0)
    for step in range(500):
        arrive(detector, 0, step * 100_000)
    detector.connected(200 * S)
    assert detector.newly_stale(201 * S) == []
    assert detector.newly_stale(280 * S) == [0]


def test_a_forgotten_symbol_is_not_watched() -> None:
    """Removed at run time; a row still under way does not bring it back."""
    detector = StaleDetector()
    detector.watch(0, 0)
    detector.forget(0)
    arrive(detector, 0, S)
    assert detector.newly_stale(10**12) == []
