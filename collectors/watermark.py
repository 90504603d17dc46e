"""How far a feed is complete: the watermark of one source. Pure: the monotonic clock is an argument, the wall clock is not asked.

Comes in: the newest exchange time of every batch, and the reasons to hold. Goes out: "no row older than this will follow".

The venue's time now is the newest exchange time seen plus the monotonic time since; the watermark is that minus the lateness we
allow. Our wall clock may be seconds off (the recorded captures: 1.27 s behind) or jump: it does not enter. Time moves the watermark
only as far as the feed is known to be alive: by its rows, or by the answer to a ping, before which the venue sent all it had.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class WatermarkConfig:
    """What is allowed to be late and how long one source may hold the others."""

    lateness_us: int = 500_000
    """How much later than its peers a row may arrive. Measured: event time - trade time up to 220 ms in the recorded captures."""
    hold_limit_us: int = 10_000_000
    """A hold longer than this is ignored: bars close incomplete and are revised, rather than a dead feed freezing its partition."""
    jump_us: int = 60_000_000
    """A time further ahead of the venue's clock than this is not believed until ``confirmations`` batches in a row say so."""
    first_jump_us: int = 3_600_000_000
    """The same against our own clock before anything is known of the venue's. An hour: clocks of machines are minutes off, not more."""
    confirmations: int = 3
    """One wild time must not move the watermark for ever; three batches in a row mean that the machine slept."""


class Watermark:
    """Watermark of one source. Never goes back."""

    def __init__(self, config: WatermarkConfig | None = None) -> None:
        self._config = config or WatermarkConfig()
        self._anchor: tuple[int, int] | None = None  # (newest exchange time, monotonic time when it was seen), us
        self._heard_us = 0
        self._holds: dict[str, int] = {}  # reason -> monotonic us since when
        self._value: int | None = None
        self._wild = 0

    def limit_us(self, mono_us: int, wall_us: int = 0) -> int | None:
        """The latest exchange time that is believed now; None before the first observation where the wall clock is not told either."""
        if self._anchor is None:
            return wall_us + self._config.first_jump_us if wall_us else None
        return self.venue_us(mono_us) + self._config.jump_us

    def observe(self, newest_us: int, mono_us: int, wall_us: int = 0) -> bool:
        """A batch arrived whose newest exchange time is ``newest_us``. Returns False when that time is not believed (yet).

        A batch that is not believed must not be published either: its rows would lie beyond the watermark's reach. ``wall_us``: our clock,
        against which the first batch is held; 0: it is believed.
        """
        limit = self.limit_us(mono_us, wall_us)
        if limit is not None and newest_us > limit:
            self._wild += 1
            if self._wild < self._config.confirmations:
                return False
        self._wild = 0
        self._heard_us = max(self._heard_us, mono_us)
        if self._anchor is None or newest_us > self._anchor[0]:
            self._anchor = (newest_us, mono_us)
        return True

    def heard(self, mono_us: int) -> None:
        """The venue had nothing more to say at ``mono_us``: it answered a ping sent then, and TCP keeps the order.

        Without such a proof silence moves the watermark by the allowed lateness only: nobody knows whether the feed is quiet or dead.
        """
        self._heard_us = max(self._heard_us, mono_us)

    def hold(self, reason: str, mono_us: int) -> None:
        """Stop the watermark where it is: connection down, silent, renewing, backfilling. A repeated reason keeps its first time."""
        self._holds.setdefault(reason, mono_us)

    def release(self, reason: str) -> None:
        """The reason is gone; a reason that was not held is fine."""
        self._holds.pop(reason, None)

    def holding(self, mono_us: int) -> list[str]:
        """Reasons that hold it now, oldest first; those beyond the hold limit no longer do."""
        limit = self._config.hold_limit_us
        return [reason for reason, since in sorted(self._holds.items(), key=lambda item: item[1]) if mono_us - since < limit]

    @property
    def value(self) -> int | None:
        """What was promised last; None for nothing yet."""
        return self._value

    @property
    def lateness_us(self) -> int:
        """How much later than its peers a row may arrive."""
        return self._config.lateness_us

    def venue_us(self, mono_us: int) -> int:
        """The venue's time now, as far as it is known: its newest row's and what has passed since. 0 before the first row."""
        return 0 if self._anchor is None else self._anchor[0] + max(0, mono_us - self._anchor[1])

    def resume(self, promised_us: int, wall_us: int = 0) -> None:
        """An earlier process promised this much in one partition: a hold from the start keeps it there. Without effect after the first row.

        Of several the least counts: what was promised in one partition only would be news in the others, and close bars there that lack
        what nobody has fetched yet. A promise of times that are still to come (``wall_us``: our clock) was a wild row's, and is not kept.
        """
        if wall_us and promised_us > wall_us + self._config.first_jump_us:
            return
        if promised_us > 0 and self._anchor is None:
            self._value = promised_us if self._value is None else min(self._value, promised_us)

    def read(self, mono_us: int) -> int | None:
        """The watermark, microseconds UTC; None before the first row.

        ``mono_us`` must be a moment up to which everything the socket held has been observed: callers pass the time of their
        PREVIOUS round, because what arrived since may not have been read yet (a blocked event loop would otherwise let the
        clock run past rows that wait in the socket).
        """
        if self._anchor is None:
            return None
        if self._value is not None and self._holds and self.holding(mono_us):
            return self._value
        newest_us, seen_us = self._anchor
        elapsed_us = max(0, mono_us - seen_us)
        if mono_us - self._heard_us < self._config.hold_limit_us:
            elapsed_us = min(elapsed_us, max(0, self._heard_us - seen_us) + self._config.lateness_us)
        target = newest_us + elapsed_us - self._config.lateness_us
        self._value = target if self._value is None else max(self._value, target)
        return self._value
