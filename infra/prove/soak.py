"""Soak: a thousand million trades through a worker's shard and the sink's core in one process; memory, order and what waits, in figures.

``python -m infra.prove.soak --trades 1000000000``. Every trade goes the whole way: a frame is encoded, the shard decodes it, checks it, makes
bars, and its records and the trade's own go through the sink's core into a store that only counts and checks ids. A snapshot is taken every two
million trades. The trades are a simulated market of 200 symbols, played again and again with ids and times moved on, so that only
the state can grow. Exit code 0: memory grew by less than 1 MB per 1e8 trades, every trade was stored once and in order, nothing waits.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collectors.simulated.market import Market
from collectors.simulated.regimes import MarketConfig
from infra.prove.figures import conclude
from processors.bars import BarConfig
from schemas.codec import FrameCodec, RowCodec
from schemas.errors import DecodeError
from schemas.frames import Frame
from streams.bar_shard import BarCodecs, BarShard
from streams.quality_records import QualityCodecs
from streams.sink import Batch, Received, TopicSink

SYMBOLS: Final = 200
RATE: Final = 20_000.0
BLOCK_S: Final = 50
"""A million trades are played again and again."""
FRAME_ROWS: Final = 4_096
SNAPSHOT_TRADES: Final = 2_000_000
WARM_SHARE: Final = 0.2
"""Memory is judged after this share of the trades: rings and buffers have filled by then."""
SLOPE_LIMIT_MB: Final = 1.0
JUDGED_FROM: Final = 50_000_000
"""Trades from which on a run has a slope."""
START_MS: Final = 1_723_161_600_000


class Block:
    """One stretch of a simulated market, for ever: each round continues ids and times of the one before."""

    def __init__(self) -> None:
        market = Market(MarketConfig(symbols=SYMBOLS, rate=RATE, seed=5), start_ms=START_MS)
        blocks = [market.step() for _ in range(BLOCK_S * 1_000 // market.config.step_ms)]
        universe = market.universe
        code = np.concatenate([block.code for block in blocks])
        self.keys = tuple(f"binance:{symbol.removesuffix('USDT')}-USDT" for symbol in universe.symbols)
        self._ids = np.bincount(code, minlength=SYMBOLS).astype(np.int64)
        time_us = np.concatenate([block.time_ms for block in blocks]) * 1_000
        self.columns: dict[str, npt.NDArray[Any]] = {
            "symbol_code": code.astype(np.int32),
            "trade_id": np.concatenate([block.trade_id for block in blocks]),
            "price": np.concatenate([block.price for block in blocks]) / 10.0 ** universe.price_decimals[code],
            "size": np.concatenate([block.size for block in blocks]) / 10.0 ** universe.size_decimals[code],
            "side": np.where(np.concatenate([block.buyer_is_maker for block in blocks]), -1, 1).astype(np.int8),
            "exchange_time_us": time_us,
            "receive_time_us": time_us + 1_500,
        }
        self.rows = len(code)
        self._at = self._round = 0

    def next(self, most: int) -> Frame:
        """The next frame, at most ``most`` rows."""
        stop = min(self._at + FRAME_ROWS, self.rows, self._at + most)
        part = {name: column[self._at : stop] for name, column in self.columns.items()}
        part["trade_id"] = part["trade_id"] + self._round * self._ids[part["symbol_code"]]
        for name in ("exchange_time_us", "receive_time_us"):
            part[name] = part[name] + self._round * BLOCK_S * 1_000_000
        self._at = stop
        if stop == self.rows:
            self._at, self._round = 0, self._round + 1
        return Frame(source="soak", watermark_us=int(part["exchange_time_us"].max()), symbols=self.keys, columns=part)


@dataclass
class CountingStore:
    """A store that keeps nothing: it counts rows, and checks that each symbol's ids come once and in order."""

    rows: dict[str, int] = field(default_factory=dict)
    wrong_ids: int = 0
    _next: dict[str, int] = field(default_factory=dict)

    def insert(self, batch: Batch) -> None:
        """Count and check a batch."""
        self.rows[batch.table] = self.rows.get(batch.table, 0) + batch.row_count
        if batch.table != "trades":
            return
        codes, ids = batch.columns["symbol_code"], batch.columns["trade_id"]
        order = np.argsort(codes, kind="stable")
        starts = np.flatnonzero(np.append(True, np.diff(codes[order]) != 0))
        self.wrong_ids += int(np.count_nonzero(np.delete(np.diff(ids[order]), starts[1:] - 1) != 1))
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
            key = batch.keys[codes[order[start]]]
            first = int(ids[order[start]])
            self.wrong_ids += self._next.get(key, first) != first
            self._next[key] = int(ids[order[stop - 1]]) + 1

    def stored_positions(self, table: str, partition: int, since_offset: int) -> set[tuple[int, int]]:
        """Nothing is in doubt: the process never ends in the middle."""
        return set()

    def largest_ids(self) -> dict[str, int]:
        """None yet."""
        return {}

    def held_ids(self, key: str, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """None of them."""
        return ids[:0]

    def newest_input_offset(self, table: str, partition: int, before_offset: int) -> int:
        """None yet."""
        return -1


class Chain:
    """Shard and sink, a record at a time."""

    def __init__(self) -> None:
        codecs = BarCodecs(
            trades=FrameCodec("trades", 1),
            bars=FrameCodec("bars", 2),
            rows=RowCodec("bars_row", 3),
            deadletter=RowCodec("deadletter", 4),
            fetch_schema=_no_schema,
            quality=QualityCodecs(quality=FrameCodec("quality", 5), quarantine=FrameCodec("quarantine", 6)),
        )
        self.store = CountingStore()
        self.shard = BarShard(0, BarConfig(), codecs)
        self.offset = self.snapshots = self.snapshot_bytes = self.dead_letters = 0
        self._trades = codecs.trades
        columns = {"trades": "exchange_time_us", "bars": "open_time_us"}
        self._sinks = {
            topic: TopicSink(topic, column, codec, self.store, _no_schema, _undecodable)
            for (topic, column), codec in zip(columns.items(), (codecs.trades, codecs.bars), strict=True)
        }
        for sink in self._sinks.values():
            sink.resume(0, 0)
        self._offsets = dict.fromkeys(self._sinks, 0)

    def play(self, frame: Frame) -> None:
        """One frame the whole way."""
        value = self._trades.encode(frame)
        self._store("trades", value)
        for record in self.shard.process(self.offset, value):
            if record.topic in self._sinks:
                self._store(record.topic, record.value)
            self.dead_letters += record.topic == "deadletter"
        self.offset += 1

    def snapshot(self) -> None:
        """What a worker does once a second."""
        self.snapshot_bytes = len(self.shard.snapshot())
        self.snapshots += 1

    def _store(self, topic: str, value: bytes) -> None:
        sink, offset = self._sinks[topic], self._offsets[topic]
        self._offsets[topic] += 1
        for batch in sink.batches([Received(0, offset, value)]):
            self.store.insert(batch)
            sink.inserted(batch)


def _no_schema(schema_id: int) -> str:
    raise KeyError(schema_id)


def _undecodable(topic: str, record: Received, exc: DecodeError) -> None:
    raise exc


def rss_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope_mb(points: Sequence[tuple[int, int]]) -> float:
    """Growth of memory in MB per 1e8 trades: the straight line nearest to (trades, bytes)."""
    if len(points) < 2:
        return 0.0
    trades, memory = np.array(points, np.float64).T
    return float(np.polyfit(trades / 1e8, memory / 1e6, 1)[0])


def soak(trades: int, *, told: Callable[[str], None]) -> dict[str, Any]:
    """Run ``trades`` through the chain; the figures."""
    block, chain = Block(), Chain()
    points: list[tuple[int, int]] = []
    done = since_snapshot = 0
    begun = time.perf_counter()
    step = max(trades // 100, 1)
    while done < trades:
        frame = block.next(trades - done)
        chain.play(frame)
        done += frame.row_count
        since_snapshot += frame.row_count
        if since_snapshot >= SNAPSHOT_TRADES:
            chain.snapshot()
            since_snapshot = 0
        if done // step > (done - frame.row_count) // step:
            gc.collect()
            points.append((done, rss_bytes()))
            if len(points) % 10 == 0:
                told(f"{done:,} trades, {points[-1][1] / 1e6:.1f} MB, {done / (time.perf_counter() - begun):,.0f} trades/s")
    seconds = time.perf_counter() - begun
    warm = [point for point in points if point[0] >= trades * WARM_SHARE]
    figures = {
        "trades": done,
        "seconds": seconds,
        "trades_per_s": done / seconds,
        "stored": chain.store.rows.get("trades", 0),
        "bars": chain.store.rows.get("bars", 0),
        "ids_out_of_order": chain.store.wrong_ids,
        "dead_letters": chain.dead_letters,
        "waiting": chain.offset - 1 - chain.shard.applied_offset,
        "snapshots": chain.snapshots,
        "snapshot_bytes": chain.snapshot_bytes,
        "rss_mb": points[-1][1] / 1e6 if points else 0.0,
    }
    # A short run is still filling its rings and buffers: a line through that says nothing.
    return figures | ({"slope_mb_per_1e8": slope_mb(warm)} if done >= JUDGED_FROM else {})


def problems(figures: dict[str, Any]) -> list[str]:
    """What does not hold; the slope only of a run long enough to have one."""
    found = []
    if figures["stored"] != figures["trades"] or figures["ids_out_of_order"]:
        found.append(f"{figures['stored']:,} of {figures['trades']:,} trades were stored, {figures['ids_out_of_order']:,} ids out of order")
    if figures["waiting"]:
        found.append(f"{figures['waiting']:,} records were not applied")
    if figures["dead_letters"]:
        found.append(f"{figures['dead_letters']:,} dead letters")
    if figures.get("slope_mb_per_1e8", 0.0) >= SLOPE_LIMIT_MB:
        found.append(f"memory grows by {figures['slope_mb_per_1e8']:.2f} MB per 1e8 trades")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run, tell; 0 when everything holds."""
    parser = argparse.ArgumentParser(description="Trades through worker and sink, for hours or seconds")
    parser.add_argument("--trades", type=int, default=1_000_000_000, help="how many; a thousand million take about a quarter of an hour")
    arguments = parser.parse_args(argv)
    figures = soak(arguments.trades, told=lambda text: print(text, file=sys.stderr, flush=True))
    return conclude("soak", figures, problems(figures))


if __name__ == "__main__":
    sys.exit(main())
