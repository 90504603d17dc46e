"""What a collector counts. Plain integers: the entry point exports them, the hot path only adds."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class FeedStats:
    """Counters of one connection shard since the start of the process."""

    trades: int = 0
    """Rows handed to the batcher."""
    frames: int = 0
    """Frames taken from the batcher, heartbeats included."""
    messages: int = 0
    duplicates: int = 0
    ignored: int = 0
    """Valid messages that are no trades of the market."""
    backfilled: int = 0
    """Rows that came over REST."""
    reconnections: int = 0
    renewals: int = 0
    stale_reconnects: int = 0
    stale_symbols: int = 0
    """Symbols silent beyond their law now."""
    pauses: int = 0
    """Times reading stopped because the sink could not take more."""
    gaps_opened: int = 0
    gaps_filled: int = 0
    gaps_unfillable: int = 0
    gaps_open: int = 0
    """Gaps open now."""
    oldest_gap_us: int = 0
    """How long the oldest of them has been open, microseconds."""
    symbols_lost: int = 0
    """Symbols of which nobody knows now whether something is missed."""
    last_exchange_time_us: int = 0
    last_receive_time_us: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    """Reason -> how often: rejected messages, failed connections, failed REST calls."""

    def error(self, reason: str, count: int = 1) -> None:
        """Count an error."""
        self.errors[reason] = self.errors.get(reason, 0) + count
