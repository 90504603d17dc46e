"""A worker's bar state in a process of its own: symbols and trades in; memory and snapshot size, as it goes, out.

``python -m tests.performance.memory_probe --symbols 1000 --trades 5000000``: one JSON line a tenth of the trades. The trades are one block, played again
and again with ids and times moved on, so that only the engine can grow.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from typing import Any

import numpy as np
import psutil

from processors.bars import BarConfig, BarEngine
from schemas.frames import Frame
from tests.performance import market

BLOCK = 1_000_000
ROWS = 4_096
TRADES_PER_S = 20_000


class Source:
    """One block of trades, for ever."""

    def __init__(self, symbols: int) -> None:
        self.keys, columns = market.trades(BLOCK, symbols, per_second=TRADES_PER_S)
        self._count = np.bincount(columns["symbol_code"], minlength=symbols).astype(np.int64)
        self._columns = columns
        times = columns["exchange_time_us"]
        self._span_us = int(times[-1] - times[0]) + 1_000_000 // TRADES_PER_S
        self._round = 0
        self._at = 0

    def next(self) -> Frame:
        """The next frame."""
        stop = min(self._at + ROWS, BLOCK)
        part = {name: column[self._at : stop] for name, column in self._columns.items()}
        shift = self._round * self._span_us
        part["trade_id"] = part["trade_id"] + self._round * self._count[part["symbol_code"]]
        for name in ("exchange_time_us", "receive_time_us"):
            part[name] = part[name] + shift
        frame = Frame(source="bench", watermark_us=int(part["exchange_time_us"][-1]), symbols=self.keys, columns=part)
        self._at = stop
        if stop == BLOCK:
            self._at, self._round = 0, self._round + 1
        return frame


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--symbols", type=int, required=True)
    parser.add_argument("--trades", type=int, required=True)
    arguments = parser.parse_args()
    source = Source(arguments.symbols)
    engine = BarEngine(BarConfig(max_symbols=max(16_384, arguments.symbols)))
    process = psutil.Process()
    done, told, bars = 0, 0, 0
    gc.collect()
    before = process.memory_info().rss
    began = time.monotonic()
    while done < arguments.trades:
        frame = source.next()
        answer = engine.process(frame)
        done += frame.row_count
        bars += int(answer.bars["is_final"].sum())
        if done - told >= arguments.trades / 10 or done >= arguments.trades:
            told = done
            say(trades=done, rss_bytes=process.memory_info().rss, start_bytes=before, final_bars=bars)
    took_s = time.monotonic() - began
    began = time.monotonic()
    state = engine.snapshot()
    say(
        snapshot_bytes=len(state),
        snapshot_ms=(time.monotonic() - began) * 1000,
        symbols=engine.symbol_count,
        trades_per_s=done / took_s,
        array_bytes=engine.config.bytes_per_symbol,
        rss_bytes=process.memory_info().rss,
        start_bytes=before,
    )


def say(**line: Any) -> None:
    """One line of JSON."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
