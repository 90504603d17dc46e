"""Which feeds have gone silent: per symbol by that symbol's own rate, and for the whole connection. Pure: time is an argument.

A symbol that trades every 10 ms is dead after seconds, one that trades every 10 minutes is not. For arrivals at rate r the
probability of a silence of s is exp(-r s); a feed is stale when that falls below ``probability`` (1e-6: 13.8 mean gaps).
Trades come in bursts, so arrivals are counted in batches (all trades of a burst are one arrival), and the mean gap learns longer
gaps ten times faster than shorter ones: it follows the lulls, not the bursts.

A symbol's mean gap is a plain mean until enough was seen, so that a busy one is watched closely after some fifty arrivals. After ``n`` of them
the rate itself is a guess: a silence of s has the probability (1 + s / (n mean)) ** -n, averaged over the rates they are evidence for; with
few arrivals that allows far more than 13.8 mean gaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from collectors.growable import grown

IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StaleConfig:
    """How improbable a silence must be, and the bounds of what is called silence."""

    probability: float = 1e-6
    """A silence less probable than this under the feed's own rate is no lull."""
    symbol_floor_us: int = 2_500_000
    """A symbol silent for less is never stale; one of less than 0.18 s between its trades is found within 3 s. A venue that pauses matching
    silences all of its symbols, which is the feed's matter. In 25 minutes of recorded BTC and ETH, spot and perpetual, nothing is called stale with
    a floor of 2 s either: the longest silences are 2.0 s of BTC and 3.8 s of ETH, which trades every 0.3 s."""
    symbol_ceiling_us: int = 3_600_000_000
    """A symbol silent for longer is stale, however seldom it trades."""
    feed_floor_us: int = 2_000_000
    """A whole feed silent for less is never stale; with a check every 250 ms an active feed is found dead within 2.3 s."""
    feed_ceiling_us: int = 600_000_000
    """A whole feed silent for longer is reconnected, however seldom its symbols trade; the heartbeat finds dead sockets long before."""
    first_gap_us: int = 5_000_000
    """Mean gap assumed before anything was learnt."""
    told_again: float = 3.0
    """A silence that goes on is told again when it is this many times as long as when it was told before,"""
    again_us: int = 300_000_000
    """or this much longer: a page of the venue's REST says whether the symbol traded."""
    learn_longer: float = 0.2
    """Weight of a gap above the mean."""
    learn_shorter: float = 0.02
    """Weight of a gap below the mean."""


class StaleDetector:
    """Silence of one feed and of each of its symbols (by code)."""

    def __init__(self, config: StaleConfig | None = None) -> None:
        self._config = config or StaleConfig()
        self._sigmas = -math.log(self._config.probability)
        self._heard = np.empty(0, np.int64)  # code -> monotonic us of the last arrival; -1: not watched
        self._gap = np.empty(0, np.float64)  # code -> mean gap, us
        self._arrivals = np.empty(0, np.int64)  # code -> batches with rows of it
        self._told = np.empty(0, np.int64)  # code -> its silence when that was last reported, us; 0: not silent beyond its law
        self._feed_heard_us = 0
        self._feed_gap = float(self._config.first_gap_us)
        self._feed_arrivals = 1  # what is assumed at first counts as one arrival

    def watch(self, code: int, mono_us: int) -> None:
        """Start to watch a symbol; its first silence counts from now."""
        size = code + 1
        self._heard = grown(self._heard, size, -1)
        self._gap = grown(self._gap, size, self._config.symbol_ceiling_us)
        self._arrivals = grown(self._arrivals, size, 0)
        self._told = grown(self._told, size, 0)
        self._heard[code] = mono_us
        self._told[code] = 0

    def forget(self, code: int) -> None:
        """Stop watching a symbol."""
        if code < len(self._heard):
            self._heard[code] = -1

    def connected(self, mono_us: int) -> None:
        """The connection is (again) up: silence counts from now, what was learnt stays."""
        self._feed_heard_us = mono_us
        self._heard[self._heard >= 0] = mono_us
        self._told[:] = 0

    def observe(self, codes: IntArray, mono_us: int) -> None:
        """A batch arrived with rows of these symbols (each code once)."""
        self._feed_arrivals += 1
        self._feed_gap = self._learn(self._feed_gap, mono_us - self._feed_heard_us)
        self._feed_heard_us = mono_us
        gap = (mono_us - self._heard[codes]).astype(np.float64)
        mean = self._gap[codes]
        first = mean >= self._config.symbol_ceiling_us
        self._arrivals[codes] += 1
        weight = np.where(gap > mean, self._config.learn_longer, self._config.learn_shorter)
        weight = np.maximum(weight, 1.0 / self._arrivals[codes])
        self._gap[codes] = np.where(first, np.maximum(gap, self._config.first_gap_us), mean + weight * (gap - mean))
        self._heard[codes] = np.where(self._heard[codes] >= 0, mono_us, -1)
        self._told[codes] = 0

    def newly_stale(self, mono_us: int) -> list[int]:
        """Codes of symbols that became stale since the last call; a silence that goes on is reported again, less and less often."""
        seen = np.maximum(self._arrivals, 1)
        # of an unlikely silence after n arrivals: n (p ** (-1 / n) - 1) mean gaps, 13.8 for many
        law = self._gap * seen * np.expm1(np.minimum(self._sigmas / seen, 50.0))
        again = np.minimum(self._config.told_again * self._told, self._told + self._config.again_us)
        limit = np.maximum(np.clip(law, self._config.symbol_floor_us, self._config.symbol_ceiling_us), again)
        codes = np.flatnonzero((self._heard >= 0) & (mono_us - self._heard > limit))
        self._told[codes] = mono_us - self._heard[codes]
        return [int(code) for code in codes]

    def is_silent(self, code: int) -> bool:
        """Whether a symbol is silent beyond its law since it was last reported."""
        return bool(self._told[code] > 0)

    def stale_symbols(self) -> int:
        """How many watched symbols are silent beyond their law now."""
        return int(np.count_nonzero((self._told > 0) & (self._heard >= 0)))

    def feed_silence_us(self, mono_us: int) -> int:
        """How long nothing has arrived."""
        return max(0, mono_us - self._feed_heard_us)

    def feed_limit_us(self) -> int:
        """Silence of the whole feed that is no lull."""
        return int(min(max(self._feed_gap * self._sigmas, self._config.feed_floor_us), self._config.feed_ceiling_us))

    def feed_is_stale(self, mono_us: int) -> bool:
        """Whether the whole feed is silent beyond its law."""
        return self.feed_silence_us(mono_us) > self.feed_limit_us()

    def silence_was_quiet(self, mono_us: int) -> None:
        """A reconnect did not end the silence: it was the market. Learn it, so that the next verdict waits three times as long."""
        self._feed_gap = max(self._feed_gap, 3.0 * self.feed_limit_us() / self._sigmas)
        self._feed_heard_us = mono_us

    def _learn(self, mean: float, gap: float) -> float:
        weight = self._config.learn_longer if gap > mean else self._config.learn_shorter
        weight = max(weight, 1.0 / self._feed_arrivals)  # a plain mean until enough was seen
        return mean + weight * (gap - mean)
