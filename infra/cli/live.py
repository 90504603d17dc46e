"""What the stack is doing right now: frames of the ``bars`` topic in, rates, latency and last bars out.

One consumer of ``bars`` knows all of it: its final bars of the smallest timeframe count the trades, ``last_receive_time_us`` dates the
newest trade in an update, and ``input_offset`` says how far the worker is. Memory is bounded by ``MAX_SYMBOLS`` and ``MAX_SAMPLES``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from schemas.frames import Frame
from schemas.timeframes import US_PER_SECOND

MAX_SYMBOLS: Final = 256
"""Symbols whose last bar is kept to choose the busiest from."""
MAX_SAMPLES: Final = 4096
"""Latency samples kept; one a frame."""
WINDOW_US: Final = 10 * US_PER_SECOND
"""Rates and percentiles are over the last 10 s."""
STALE_US: Final = 600 * US_PER_SECOND
"""A trade received longer ago is replayed from a recording: its age is no latency."""
SHOWN_TIMEFRAME_S: Final = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class LastBar:
    """The newest 1 m bar of a symbol, open or closed."""

    instrument: str
    open_time_us: int
    open: float
    high: float
    low: float
    close: float
    volume: float
    trade_count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """Figures of the last ten seconds."""

    trades_per_s: float
    latency_p50_ms: float | None
    latency_p99_ms: float | None
    bars: tuple[LastBar, ...]
    """The busiest symbols' newest bars, most trades first."""

    def as_json(self) -> dict[str, Any]:
        """What a JSON line holds."""
        return {
            "trades_per_s": round(self.trades_per_s, 1),
            "latency_ms": {"p50": self.latency_p50_ms, "p99": self.latency_p99_ms},
            "bars": [
                {"symbol": bar.instrument, "open_time_us": bar.open_time_us, "close": bar.close, "trade_count": bar.trade_count}
                for bar in self.bars
            ],
        }


class LiveStats:
    """Digests frames of ``bars``; asks no clock, ``now_us`` is handed in."""

    def __init__(self) -> None:
        self._counts: deque[tuple[int, int]] = deque(maxlen=MAX_SAMPLES)
        self._latencies: deque[tuple[int, int]] = deque(maxlen=MAX_SAMPLES)
        self._bars: dict[str, LastBar] = {}
        self._newest: dict[str, int] = {}
        self._began_us = -1

    def add(self, frame: Frame, now_us: int) -> None:
        """Take one frame, read at ``now_us``."""
        if self._began_us < 0:
            self._began_us = now_us
        if frame.row_count == 0:
            return
        columns = frame.columns
        timeframe = columns["timeframe_s"]
        closed = (timeframe == timeframe.min()) & (columns["is_final"] == 1) & (columns["revision"] == 0)
        count = int(columns["trade_count"][closed].sum())
        if count and int(timeframe.min()) == 1:
            self._counts.append((now_us, count))
        self._time(frame, now_us)
        self._keep_bars(frame, np.flatnonzero(timeframe == SHOWN_TIMEFRAME_S))

    def _time(self, frame: Frame, now_us: int) -> None:
        received = int(frame.columns["last_receive_time_us"].max())
        # bars that close by the watermark alone repeat an old trade: only one that was not seen yet has a latency
        if received > self._newest.get(frame.source, -1):
            self._newest[frame.source] = received
            if len(self._newest) > MAX_SYMBOLS:
                del self._newest[next(iter(self._newest))]
            if 0 <= now_us - received < STALE_US:
                self._latencies.append((now_us, now_us - received))

    def _keep_bars(self, frame: Frame, places: np.ndarray[Any, Any]) -> None:
        columns = frame.columns
        last = dict(zip(columns["symbol_code"][places].tolist(), places.tolist(), strict=True))
        for code, place in last.items():
            name = frame.symbols[code]
            if name not in self._bars and len(self._bars) >= MAX_SYMBOLS:
                continue
            self._bars[name] = LastBar(
                instrument=name,
                open_time_us=int(columns["open_time_us"][place]),
                open=float(columns["open"][place]),
                high=float(columns["high"][place]),
                low=float(columns["low"][place]),
                close=float(columns["close"][place]),
                volume=float(columns["volume"][place]),
                trade_count=int(columns["trade_count"][place]),
            )

    def snapshot(self, now_us: int, symbols: int = 5) -> Snapshot:
        """Figures at ``now_us`` with the newest bars of the ``symbols`` busiest symbols."""
        since = now_us - WINDOW_US
        for samples in (self._counts, self._latencies):
            while samples and samples[0][0] < since:
                samples.popleft()
        seconds = min(WINDOW_US, max(now_us - self._began_us, US_PER_SECOND)) / US_PER_SECOND if self._began_us >= 0 else 1.0
        p50 = p99 = None
        if self._latencies:
            p50, p99 = (round(float(part) / 1000, 1) for part in np.percentile([value for _, value in self._latencies], (50, 99)))
        busiest = sorted(self._bars.values(), key=lambda bar: (-bar.open_time_us, -bar.trade_count, bar.instrument))[:symbols]
        return Snapshot(
            trades_per_s=sum(count for _, count in self._counts) / seconds, latency_p50_ms=p50, latency_p99_ms=p99, bars=tuple(busiest)
        )
