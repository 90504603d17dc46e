"""Files of trades to replay, a clock that only moves when told, and the rows of a whole replay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from collectors.replay.feed import Replay
from collectors.replay.rows import Rejected
from schemas.frames import Frame, concat_columns
from schemas.symbols import Instrument

BTC = Instrument("binance", "BTC-USDT")
T0_MS = 1_723_161_255_342
"""2024-08-08 23:54:15.342, the first trade of a recorded capture."""

RECORDED = Path(__file__).parents[4] / "shared" / "data"


def recorded(name: str) -> Path:
    """A recorded file; the test is skipped where it is absent."""
    path = RECORDED / name
    if not path.exists():
        pytest.skip(f"recorded market data is not here: {path}")
    return path


class FakeClock:
    """Time that passes only in ``sleep``; remembers what was slept."""

    def __init__(self) -> None:
        self.random = Random(1)
        self.time_us = 0
        self.slept: list[float] = []

    def now_us(self) -> int:
        """Wall clock, in 2027."""
        return 1_800_000_000_000_000 + self.time_us

    def monotonic_us(self) -> int:
        """What was slept so far."""
        return self.time_us

    async def sleep(self, seconds: float) -> None:
        """Move the time on."""
        self.slept.append(seconds)
        self.time_us += round(seconds * 1e6)


class Result:
    """Everything one replay gave out."""

    def __init__(self, replay: Replay, frames: Sequence[Frame], rejected: Sequence[Rejected], sent_us: Sequence[int]) -> None:
        self.replay = replay
        self.stats = replay.stats
        self.frames = list(frames)
        self.rejected = list(rejected)
        self.sent_us = list(sent_us)
        """When each frame came, by the clock."""
        parts = [frame.columns for frame in frames if frame.row_count]
        self.columns: dict[str, np.ndarray[Any, Any]] = concat_columns(parts) if parts else {}

    @property
    def ids(self) -> list[int]:
        """Published trade ids in the order they came."""
        return self.columns["trade_id"].tolist() if self.columns else []

    @property
    def reasons(self) -> list[tuple[int, str]]:
        """Line and reason of every rejected row."""
        return [(item.line, item.reason) for item in self.rejected]


async def replay(path: Path, instrument: Instrument = BTC, *, clock: FakeClock | None = None, **options: Any) -> Result:
    """Replay ``path`` to its end. The rows always add up."""
    rejected: list[Rejected] = []

    async def on_rejected(items: Sequence[Rejected]) -> None:
        rejected.extend(items)

    clock = clock or FakeClock()
    made = Replay(path, instrument, clock=clock, on_rejected=on_rejected, **options)
    frames, sent_us = [], []
    async for frame in made.frames():
        frames.append(frame)
        sent_us.append(clock.time_us)
    stats = made.stats
    assert stats.rows == stats.published + stats.duplicates + stats.rejected
    assert stats.rejected == len(rejected)
    assert stats.published == sum(frame.row_count for frame in frames)
    return Result(made, frames, rejected, sent_us)


def dump(count: int = 5, *, start: int = 100, unit: int = 1, step_ms: int = 10) -> list[str]:
    """Lines of a spot `trades` dump without header; odd ids are sells. ``unit`` 1,000 gives microseconds."""
    return [
        f"{start + i},{61837.63 + i:.8f},0.02000000,1236.75260000,{(T0_MS + i * step_ms) * unit},{'True' if (start + i) % 2 else 'False'},True"
        for i in range(count)
    ]


def write(path: Path, lines: Sequence[str | bytes]) -> Path:
    """``path`` with these lines."""
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path
