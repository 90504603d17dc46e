"""What the comparison of one partition came to, and the sums over all of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from infra.parity_rows import Difference

MOST_DIFFERENCES: Final = 50
"""Differing rows that are kept to be shown; all are counted."""
STRIP_CELLS: Final = 240


@dataclass(kw_only=True, slots=True)
class Findings:
    """What the comparison of a partition came to. Rows are rows of bars frames: final bars, revisions and updates of open bars."""

    partition: int
    trades_records: int = 0
    """Records of trades that were run through the shard."""
    trades: int = 0
    """Trades in them that were accepted."""
    records: int = 0
    """Records of bars the run published for its trades."""
    identical_records: int = 0
    """Of these, equal to the replay's byte for byte."""
    rows: int = 0
    """Rows compared: everything in the run's records or in the replay's."""
    equal: int = 0
    explained: Counter[str] = field(default_factory=Counter)
    """Reason -> rows."""
    unexplained: int = 0
    """Rows and records that nothing explains."""
    pending: int = 0
    """Trades records that the run had not yet turned into bars."""
    differences: list[Difference] = field(default_factory=list)
    by_timeframe: dict[int, Counter[str]] = field(default_factory=dict)
    """Timeframe in seconds -> ``equal | explained | unexplained`` -> rows."""
    strip: list[list[int]] = field(default_factory=lambda: [[0, 0, 0] for _ in range(STRIP_CELLS)])
    """(equal, explained, unexplained) rows along the run's trades."""
    inputs_sha256: str = ""
    """Of the values of all trades records replayed."""
    run_sha256: str = ""
    """Of the values of the run's bars records, without those of the repair and those sent twice."""
    replay_sha256: str = ""
    """Of the values of the records the replay made instead."""


def merge(parts: list[Findings]) -> dict[str, Any]:
    """The sums over all partitions."""
    explained: Counter[str] = Counter()
    by_timeframe: dict[int, Counter[str]] = {}
    for part in parts:
        explained.update(part.explained)
        for seconds, counts in part.by_timeframe.items():
            by_timeframe.setdefault(seconds, Counter()).update(counts)
    names = ("trades_records", "trades", "records", "identical_records", "rows", "equal", "unexplained", "pending")
    return {name: sum(getattr(part, name) for part in parts) for name in names} | {
        "explained": dict(explained),
        "by_timeframe": {seconds: dict(by_timeframe[seconds]) for seconds in sorted(by_timeframe)},
    }
