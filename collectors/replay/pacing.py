"""Ordered trades in, frames in time out: as fast as they are taken, or by exchange time on an injected clock.

A frame's watermark is the time of the next row to be sent: the replay knows its order. At a finite speed it is also never ahead of the replayed clock,
and a frame without rows is sent once a second, as a live collector does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from collectors.replay.order import Columns, Ordered
from schemas.frames import END_OF_SOURCE, Frame
from schemas.seam import Clock

MAX_FRAME_ROWS: Final = 4_000
"""4.3 M trades/s per core of a Faust agent at 2,000 to 4,000 rows a frame, 1.3 M/s at 200: the broker's record stays under 250 KiB."""
HEARTBEAT_US: Final = 1_000_000
LINGER_US: Final = 20_000
"""At a finite speed rows that fall due within 20 ms share a frame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pacing:
    """How frames are cut.

    Attributes:
        source: the frames' source.
        key: instrument key of all rows.
        speed: exchange seconds a second; None as fast as possible.
        max_frame_rows: rows of a frame at most.
    """

    source: str
    key: str
    speed: float | None = None
    max_frame_rows: int = MAX_FRAME_ROWS


async def paced(groups: AsyncIterator[Ordered], pacing: Pacing, clock: Clock) -> AsyncIterator[Frame]:
    """Frames of ``groups``; the last one, which may be empty, carries END_OF_SOURCE.

    At a finite speed a group is sent while its rows fall due, measured from the first row of all; a caller that is slower than the
    speed is caught up with by fuller frames. Never drops or reorders a row.
    """
    cutter = _Cutter(pacing)
    timer = _Timer(clock, pacing.speed) if pacing.speed is not None else None
    async for group in groups:
        times = group.columns["exchange_time_us"]
        start, count = 0, len(times)
        while start < count:
            if timer is None:
                stop = min(start + pacing.max_frame_rows, count)
            else:
                due_us = timer.position_us(int(times[start]))
                stop = min(int(np.searchsorted(times, due_us, side="right")), start + pacing.max_frame_rows)
                if stop <= start:
                    if timer.heartbeat_due():
                        yield cutter.frame(group.columns, start, start, min(due_us, int(times[start])))
                        timer.sent()
                    await timer.wait_for(int(times[start]))
                    continue
            following = int(times[stop]) if stop < count else group.watermark_us
            yield cutter.frame(
                group.columns, start, stop, following if timer is None else min(following, max(due_us, int(times[stop - 1])))
            )
            start = stop
            if timer is not None:
                timer.sent()
                if start < count:
                    await timer.linger()
    yield cutter.end()


class _Cutter:
    """Makes frames; keeps the watermark from going back."""

    def __init__(self, pacing: Pacing) -> None:
        self._pacing = pacing
        self._watermark_us = 0

    def frame(self, columns: Columns, start: int, stop: int, watermark_us: int) -> Frame:
        self._watermark_us = max(self._watermark_us, watermark_us)
        rows = {name: column[start:stop] for name, column in columns.items()}
        return Frame(
            source=self._pacing.source,
            watermark_us=self._watermark_us,
            symbols=(self._pacing.key,),
            columns={"symbol_code": np.zeros(stop - start, np.int32), **rows},
        )

    def end(self) -> Frame:
        return Frame(source=self._pacing.source, watermark_us=self._watermark_us, symbols=(self._pacing.key,), flags=END_OF_SOURCE)


class _Timer:
    """Where the replay is in exchange time."""

    def __init__(self, clock: Clock, speed: float) -> None:
        self._clock = clock
        self._speed = speed
        self._started_us = -1
        self._first_us = 0
        self._sent_us = 0

    def position_us(self, next_row_us: int) -> int:
        """The exchange time that is now; begins at the first row asked for."""
        now = self._clock.monotonic_us()
        if self._started_us < 0:
            self._started_us, self._first_us, self._sent_us = now, next_row_us, now
        return self._first_us + int((now - self._started_us) * self._speed)

    def sent(self) -> None:
        self._sent_us = self._clock.monotonic_us()

    def heartbeat_due(self) -> bool:
        return self._clock.monotonic_us() - self._sent_us >= HEARTBEAT_US

    async def wait_for(self, row_us: int) -> None:
        """Sleep until the row or the next heartbeat is due, whichever is earlier, and at least the linger."""
        now = self._clock.monotonic_us()
        row_due = self._started_us + int((row_us - self._first_us) / self._speed) - now
        beat_due = self._sent_us + HEARTBEAT_US - now
        await self._clock.sleep(max(min(row_due, beat_due), LINGER_US) / 1e6 if row_due > LINGER_US else max(row_due, 1_000) / 1e6)

    async def linger(self) -> None:
        await self._clock.sleep(LINGER_US / 1e6)


def parse_speed(speed: str | float | None) -> float | None:
    """Exchange seconds a second of ``max`` (None) or a number above 0, with or without an ``x``. Raises ValueError."""
    if speed is None or speed == "max":
        return None
    try:
        value = float(str(speed).removesuffix("x"))
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"'{speed}' is no speed: write max, 1 (as recorded) or 60 (a minute a second).")
    return value
