"""Which feeds have gone silent: per symbol by that symbol's own rate, and for the whole connection. Pure: time is an argument.

A symbol that trades every 10 ms is dead after seconds, one that trades every 10 minutes is not. For arrivals at rate r the
probability of a silence of s is exp(-r s); a feed is stale when that falls below ``probability`` (1e-6: 13.8 mean gaps).
Trades come in bursts, so arrivals are counted in batches (all trades of a burst are one arrival), and the mean gap learns longer
gaps ten times faster than shorter ones: it follows the lulls, not the bursts.
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
    symbol_floor_us: int = 10_000_000
    """A symbol silent for less is never stale: venues pause matching for some seconds."""
    symbol_ceiling_us: int = 3_600_000_000
    """A symbol silent for longer is stale, however seldom it trades."""
    again_us: int = 300_000_000
    """A symbol that stays silent is reported again after this at the latest; a page of the venue's REST says whether it traded."""
    feed_floor_us: int = 2_000_000
    """A whole feed silent for less is never stale; with a check every 250 ms an active feed is found dead within 2.3 s."""
    feed_ceiling_us: int = 600_000_000
    """A whole feed silent for longer is reconnected, however seldom its symbols trade; the heartbeat finds dead sockets long before."""
    first_gap_us: int = 5_000_000
    """Mean gap assumed before anything was learnt."""
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
        self._told = np.empty(0, np.int64)  # code -> monotonic us of its last report as stale; -1: it is not
        self._feed_heard_us = 0
        self._feed_gap = float(self._config.first_gap_us)
        self._feed_arrivals = 1  # what is assumed at first counts as one arrival

    def watch(self, code: int, mono_us: int) -> None:
        """Start to watch a symbol; its first silence counts from now."""
        size = code + 1
        self._heard = grown(self._heard, size, -1)
        self._gap = grown(self._gap, size, self._config.symbol_ceiling_us)
        self._told = grown(self._told, size, -1)
        self._heard[code] = mono_us
        self._told[code] = -1

    def forget(self, code: int) -> None:
        """Stop watching a symbol."""
        if code < len(self._heard):
            self._heard[code] = -1

    def connected(self, mono_us: int) -> None:
        """The connection is (again) up: silence counts from now, what was learnt stays."""
        self._feed_heard_us = mono_us
        self._heard[self._heard >= 0] = mono_us
        self._told[:] = -1

    def observe(self, codes: IntArray, mono_us: int) -> None:
        """A batch arrived with rows of these symbols (each code once)."""
        self._feed_arrivals += 1
        self._feed_gap = self._learn(self._feed_gap, mono_us - self._feed_heard_us)
        self._feed_heard_us = mono_us
        gap = (mono_us - self._heard[codes]).astype(np.float64)
        mean = self._gap[codes]
        first = mean >= self._config.symbol_ceiling_us
        weight = np.where(gap > mean, self._config.learn_longer, self._config.learn_shorter)
        self._gap[codes] = np.where(first, np.maximum(gap, self._config.first_gap_us), mean + weight * (gap - mean))
        self._heard[codes] = np.where(self._heard[codes] >= 0, mono_us, -1)
        self._told[codes] = -1

    def newly_stale(self, mono_us: int) -> list[int]:
        """Codes of symbols that are stale and were not reported lately.

        A silence that goes on is reported again each time it has doubled, after ``again_us`` at the latest: a stream that died and that the
        venue does not revive must not pass for a quiet one because somebody asked once.
        """
        limit = np.clip(self._gap * self._sigmas, self._config.symbol_floor_us, self._config.symbol_ceiling_us)
        again = np.minimum(self._told - self._heard, np.maximum(self._config.again_us, limit))
        due = np.where(self._told >= 0, mono_us - self._told > again, mono_us - self._heard > limit)
        codes = np.flatnonzero((self._heard >= 0) & due)
        self._told[codes] = mono_us
        return [int(code) for code in codes]

    def stale_symbols(self) -> int:
        """How many watched symbols are silent beyond their law now."""
        return int(np.count_nonzero((self._told >= 0) & (self._heard >= 0)))

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
