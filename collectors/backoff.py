"""How long to wait before trying again: capped exponential backoff with full jitter. Pure: time and randomness are arguments.

Source: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015 ("full jitter": uniform between zero and the
capped exponential), which of the variants measured there needs the fewest calls until all clients are served.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, kw_only=True, slots=True)
class BackoffConfig:
    """Bounds of the wait."""

    initial_s: float = 1.0
    """Ceiling of the first wait, seconds."""
    factor: float = 2.0
    """Growth of the ceiling from one failure to the next."""
    maximum_s: float = 60.0
    """The ceiling never exceeds this, seconds."""
    minimum_s: float = 0.05
    """Shortest wait: full jitter may draw zero, and a loop without any pause would spin when a port refuses at once."""
    stable_s: float = 5.0
    """A connection that held this long ends the series: the next failure starts from ``initial_s`` again. At 30 s a feed that broke
    every 6 s waited 23 s for its seventh connection; a connection each 5 s at most is a fifth of what Binance allows (300 in 5 minutes)."""


class Backoff:
    """Waits for one connection or client."""

    def __init__(self, config: BackoffConfig, random: Random) -> None:
        self._config = config
        self._random = random
        self._up_since_us: int | None = None
        self.failures = 0
        """Failures since the last stable period."""

    def ceiling_s(self) -> float:
        """Upper bound of the next wait, seconds."""
        # the exponent is bounded: 2.0**1100 overflows a float after a night of failures
        exponent = min(self.failures, 64)
        return min(self._config.maximum_s, self._config.initial_s * self._config.factor**exponent)

    def connected(self, mono_us: int) -> None:
        """A connection is up since ``mono_us``."""
        self._up_since_us = mono_us

    def failed(self, mono_us: int) -> float:
        """Record a failure or a lost connection; returns the seconds to wait before the next attempt."""
        since = self._up_since_us
        self._up_since_us = None
        if since is not None and mono_us - since >= self._config.stable_s * 1_000_000:
            self.failures = 0
        ceiling = self.ceiling_s()
        self.failures += 1
        return max(self._config.minimum_s, self._random.uniform(0.0, ceiling))
