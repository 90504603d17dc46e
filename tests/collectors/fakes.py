"""What tests of the collectors share: a clock that is moved by hand, sinks that remember, recorded data."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from collectors.wire import TRADE_DTYPES
from schemas.frames import Frame

SHARED = Path(os.environ.get("MARKETSTREAM_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "ws"


class HandClock:
    """`schemas.seam.Clock` that stands still until told; sleeping moves it."""

    def __init__(self, now_us: int = 1_700_000_000_000_000, seed: int = 1) -> None:
        self.random = Random(seed)
        self.now = now_us
        self.mono = 1_000_000

    def now_us(self) -> int:
        """Wall clock."""
        return self.now

    def monotonic_us(self) -> int:
        """Monotonic clock."""
        return self.mono

    def advance(self, microseconds: int) -> None:
        """Move both clocks."""
        self.now += microseconds
        self.mono += microseconds

    async def sleep(self, seconds: float) -> None:
        """Move both clocks instead of waiting."""
        self.advance(int(seconds * 1e6))


class RecordingSink:
    """A FrameSink that keeps everything."""

    def __init__(self) -> None:
        self.trades: list[tuple[int, Frame]] = []
        self.gaps: list[Frame] = []

    async def send(self, topic_name: str, partition: int, frame: Frame) -> None:
        """See FrameSink.send."""
        if topic_name == "trades":
            self.trades.append((partition, frame))
        else:
            assert topic_name == "gaps"
            self.gaps.append(frame)

    async def wait_acknowledged(self) -> None:
        """See FrameSink.wait_acknowledged."""


class RecordingDeadLetters:
    """DeadLetters that keep everything."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []

    def put(self, **letter: Any) -> None:
        """See DeadLetters.put."""
        self.items.append(letter)

    @property
    def reasons(self) -> list[str]:
        """Reason of every letter."""
        return [letter["reason"] for letter in self.items]


def recorded(name: str) -> Path:
    """A recorded file, or the test is skipped saying so."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"the recorded data file {path} is not here; set MARKETSTREAM_TEST_DATA")
    return path


def capture(name: str) -> Iterator[tuple[int, bytes]]:
    """(receive time us, raw message) of every line of a Binance capture."""
    with gzip.open(recorded(f"binance/{name}.ws.gz"), "rb") as stream:
        for line in stream:
            received, _, message = line.strip().partition(b" ")
            yield int(received) // 1000, message


def trade_columns(codes: list[int], ids: list[int], times: list[int] | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """Rows of a batcher; the price is the id, so that a mixed-up column shows."""
    rows = len(codes)
    columns = {name: np.zeros(rows, dtype) for name, dtype in TRADE_DTYPES.items()}
    columns["symbol_code"][:] = codes
    columns["trade_id"][:] = ids
    columns["price"][:] = ids
    columns["exchange_time_us"][:] = times if times is not None else ids
    return columns


def rows_of(frames: list[tuple[int, Frame]]) -> dict[str, list[int]]:
    """Instrument key -> trade ids in the order sent."""
    found: dict[str, list[int]] = {}
    for _, frame in frames:
        if frame.row_count:
            for code, trade_id in zip(frame.columns["symbol_code"].tolist(), frame.columns["trade_id"].tolist(), strict=True):
                found.setdefault(frame.symbols[code], []).append(trade_id)
    return found
