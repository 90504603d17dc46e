"""Request weight, as Binance counts it: per minute, 429 beyond the limit, 418 for those who do not stop; and REST that is ill.

Pure; time is an argument. One instance counts one address; everything on loopback is one address.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from collectors.simulated.errors import SimulationConfigError

REFUSALS_BEFORE_BAN: Final = 10
"""Requests answered 429 in one minute before the address is banned. Binance does not publish the number."""

FIRST_BAN_S: Final = 120
"""The first ban lasts two minutes, each further one twice as long, up to three days (Binance's documented range)."""

LONGEST_BAN_S: Final = 3 * 86_400

MINUTE_MS: Final = 60_000

ON_ITS_WAY_MS: Final = 250
"""A request that comes within this time of a refusal was sent before the refusal was read: five of the collector's are under way at once."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a request.

    Attributes:
        status: 200, 429 or 418.
        used: weight used in this minute, this request included if it was let in.
        retry_after_s: seconds to wait; 0 where it was let in.
        banned_until_ms: end of the ban, milliseconds since the epoch; 0 where there is none.
    """

    status: int
    used: int
    retry_after_s: int = 0
    banned_until_ms: int = 0


class WeightLimit:
    """Counts the weight of one address.

    Args:
        limit: weight a minute; Binance: 6,000 spot, 2,400 USD-M.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise SimulationConfigError(f"weight_limit={limit}: must be at least 1")
        self.limit = limit
        self._minute = -1
        self._used = 0
        self._refused = 0
        self._bans = 0
        self._banned_until_ms = 0
        self._forced_until_ms = 0
        self._forced_status = 429
        self._told_ms = 0
        self._told_until_ms = 0
        self.refused = 0
        """Requests answered 429 or 418."""
        self.too_early = 0
        """Requests that came before the Retry-After of an earlier refusal had ended, though its answer had long been read."""

    def force(self, status: int, until_ms: int) -> None:
        """Answer ``status`` (429 or 418) to everything until ``until_ms``, whatever was used."""
        self._forced_status = status
        self._forced_until_ms = until_ms

    def clear(self) -> None:
        """Forget every refusal and ban."""
        self._used = self._refused = self._bans = self._banned_until_ms = self._forced_until_ms = self._told_until_ms = 0

    def admit(self, weight: int, now_ms: int) -> Verdict:
        """Count a request of ``weight`` at ``now_ms`` and say whether it may pass."""
        self.too_early += self._told_ms + ON_ITS_WAY_MS < now_ms < self._told_until_ms
        verdict = self._judge(weight, now_ms)
        if verdict.status != 200:
            self.refused += 1
            if now_ms >= self._told_until_ms:
                self._told_ms = now_ms
            self._told_until_ms = max(self._told_until_ms, now_ms + verdict.retry_after_s * 1_000)
        return verdict

    def _judge(self, weight: int, now_ms: int) -> Verdict:
        minute = now_ms // MINUTE_MS
        if minute != self._minute:
            self._minute, self._used, self._refused = minute, 0, 0
        if now_ms < self._forced_until_ms:
            until = self._forced_until_ms if self._forced_status == 418 else 0
            return Verdict(self._forced_status, self._used, _seconds(self._forced_until_ms - now_ms), until)
        if now_ms < self._banned_until_ms:
            return Verdict(418, self._used, _seconds(self._banned_until_ms - now_ms), self._banned_until_ms)
        if self._used + weight > self.limit:
            self._refused += 1
            if self._refused > REFUSALS_BEFORE_BAN:
                self._banned_until_ms = now_ms + 1000 * min(FIRST_BAN_S * 2**self._bans, LONGEST_BAN_S)
                self._bans += 1
                return Verdict(418, self._used, _seconds(self._banned_until_ms - now_ms), self._banned_until_ms)
            return Verdict(429, self._used, _seconds((minute + 1) * MINUTE_MS - now_ms))
        self._used += weight
        return Verdict(200, self._used)


@dataclass(slots=True)
class RestTrouble:
    """How REST of one market is ill; all times in milliseconds since the epoch, 0: not.

    Attributes:
        error_status: answered to every request until ``error_until_ms``.
        delay_s: every answer comes this much later until ``delay_until_ms``.
        page_rows: rows of a page of trades at most until ``pages_until_ms``.
        cuts: pages of trades still to be cut in the middle.
    """

    error_status: int = 503
    error_until_ms: int = 0
    delay_s: float = 0.0
    delay_until_ms: int = 0
    page_rows: int = 1_000
    pages_until_ms: int = 0
    cuts: int = 0

    def delay(self, now_ms: int) -> float:
        """Seconds an answer that is due now is late."""
        return self.delay_s if now_ms < self.delay_until_ms else 0.0

    def rows(self, limit: int, now_ms: int) -> int:
        """How many rows a page holds where ``limit`` were asked for."""
        return min(limit, self.page_rows) if now_ms < self.pages_until_ms else limit

    def shorten(self, body: str) -> str:
        """The body of a page, cut where that is due."""
        if not self.cuts:
            return body
        self.cuts -= 1
        return body[: len(body) // 2]


def _seconds(milliseconds: int) -> int:
    return max(1, -(-milliseconds // 1000))
