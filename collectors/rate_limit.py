"""How much may be sent to a venue: a token bucket by weight that also obeys what the venue answers. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RateLimitConfig:
    """The venue's budget and how much of it we take."""

    weight_per_minute: float = 6000.0
    """Binance spot 6,000 a minute and address, USD-M 2,400 (``exchangeInfo.rateLimits``)."""
    burst: float = 600.0
    """Weight that may be spent at once; the bucket's depth."""
    share: float = 0.8
    """Part of the budget we use: other programs behind the same address count as well."""


class RateLimit:
    """A token bucket; one for each budget (address and API)."""

    def __init__(self, config: RateLimitConfig) -> None:
        self._rate_per_us = config.weight_per_minute * config.share / 60e6
        self._burst = config.burst
        self._budget = config.weight_per_minute * config.share
        self._tokens = config.burst
        self._updated_us: int | None = None
        self._blocked_until_us = 0
        self.used_weight = 0
        """Weight of the running minute as the venue last reported it."""

    def wait_s(self, weight: float, mono_us: int, *, reserve_share: float = 0.0) -> float:
        """Seconds to wait before a request of ``weight`` may be sent; 0: now. Takes nothing.

        ``reserve_share``: this part of the bucket must be left afterwards, for requests that matter more.
        """
        self._refill(mono_us)
        blocked_us = max(0, self._blocked_until_us - mono_us)
        # a request heavier than the bucket passes when the bucket is full; otherwise it would wait for ever
        missing = min(weight + reserve_share * self._burst, self._burst) - self._tokens
        return max(blocked_us, missing / self._rate_per_us, 0.0) / 1e6

    def take(self, weight: float, mono_us: int) -> None:
        """Count a request of ``weight`` that is sent now; the bucket may go below zero, later requests pay for it."""
        self._refill(mono_us)
        self._tokens -= weight

    def block(self, seconds: float, mono_us: int) -> None:
        """Send nothing for ``seconds`` (Retry-After of a 429, length of a ban)."""
        self._blocked_until_us = max(self._blocked_until_us, mono_us + int(seconds * 1e6))

    def observe(self, headers: Mapping[str, str], mono_us: int) -> None:
        """Read ``X-MBX-USED-WEIGHT-1M``: what the venue counted, other programs included, lowers what is left for us."""
        text = headers.get("x-mbx-used-weight-1m", headers.get("X-MBX-USED-WEIGHT-1M", ""))
        if not text.isdecimal():
            return
        self.used_weight = int(text)
        self._refill(mono_us)
        self._tokens = min(self._tokens, self._budget - self.used_weight)

    def _refill(self, mono_us: int) -> None:
        if self._updated_us is not None:
            earned = max(0, mono_us - self._updated_us) * self._rate_per_us
            self._tokens = min(self._burst, self._tokens + earned)
        self._updated_us = mono_us


def retry_after_s(headers: Mapping[str, str], default_s: float) -> float:
    """Seconds of a ``Retry-After`` header; ``default_s`` where it is missing or unreadable. Bounded to three days, the longest ban."""
    text = headers.get("retry-after", headers.get("Retry-After", "")).strip()
    try:
        seconds = float(text)
    except ValueError:
        return default_s
    return min(max(seconds, 0.0), 3 * 86_400.0) if seconds == seconds else default_s
