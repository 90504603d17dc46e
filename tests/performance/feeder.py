"""A collector fed from memory: recorded JSON frames through the real mapper, sequencer and batcher into topic ``trades``, as fast as it goes.

``python -m tests.performance.feeder --seconds 60 --symbols 1000 --max-behind 500000``. It stops reading while worker or sink is behind by
more than that, as a full socket would stop a venue. Says ``{"event": "ready"}`` when the pool is made, then one line a second, and at the
end what it published, by symbol.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
from typing import Any

from collectors.batcher import Batcher, BatcherConfig
from collectors.dedupe import Gap, Sequencer
from collectors.pipeline import Pipeline
from collectors.stale import StaleDetector
from collectors.stats import FeedStats
from collectors.watermark import Watermark
from collectors.wire import TRADE_DTYPES
from infra.kafka import FrameProducer
from infra.registry_client import RegistryClient
from infra.settings import load_settings
from schemas.frames import END_OF_SOURCE, Frame
from tests.performance.box import Lag
from tests.performance.captures import Pool, RoundMapper, make_pool

SOURCE = "binance/ws/0"
CHUNK = 16_384
"""Messages a round of the batcher, about what a busy socket holds after 60 ms."""
LOOK_S = 0.1
PAUSE_S = 0.01


class NoDeadLetters:
    """Recorded frames are good: one that is rejected is a failure of the benchmark."""

    def put(self, **letter: Any) -> None:
        """Raises RuntimeError."""
        raise RuntimeError(f"rejected: {letter['reason']}: {letter['detail']}")


class Brake:
    """Watches from a thread how many of the published rows the slowest stage has done."""

    def __init__(self, lag: Lag, partitions: int) -> None:
        self.records: dict[str, int] = {}
        self.done = 0
        """Rows that worker and sink are through with."""
        self._lag = lag
        self._first, _ = lag.offsets()
        self._rows: list[list[int]] = [[0] for _ in range(partitions)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def sent(self, partition: int, rows: int) -> None:
        """A record of so many rows was published."""
        self._rows[partition].append(self._rows[partition][-1] + rows)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_S):
            ends, stored = self._lag.offsets()
            done = 0
            for partition, rows in enumerate(self._rows):
                trades, bars = self._first["trades", partition], self._first["bars", partition]
                # the worker writes one record of bars for each record of trades, so both count the same records
                records = min(stored["trades", partition] - trades, ends["bars", partition] - bars, stored["bars", partition] - bars)
                done += rows[min(max(records, 0), len(rows) - 1)]
            self.done = done
            self.records = {
                "worker": sum(ends["trades", partition] - ends["bars", partition] for partition in range(len(self._rows))),
                "sink_trades": sum(ends["trades", partition] - stored["trades", partition] for partition in range(len(self._rows))),
                "sink_bars": sum(ends["bars", partition] - stored["bars", partition] for partition in range(len(self._rows))),
            }


def make_pipeline(pool: Pool, partitions: int) -> tuple[Pipeline, RoundMapper]:
    """The parts a live Binance shard has, on the pool's symbols."""
    mapper = RoundMapper(pool)
    batcher = Batcher(SOURCE, TRADE_DTYPES, BatcherConfig(partitions=partitions))

    def refuse(gap: Gap) -> None:
        raise RuntimeError(f"the pool has a hole: {gap}")

    pipeline = Pipeline(
        exchange="binance",
        mapper=mapper,
        sequencer=Sequencer(consecutive=True),
        watermark=Watermark(),
        batcher=batcher,
        stale=StaleDetector(),
        dead_letters=NoDeadLetters(),
        stats=FeedStats(),
        on_reply=lambda _: None,
        on_gap=refuse,
    )
    now_us = time.monotonic_ns() // 1000
    for symbol, stream in zip(pool.symbols, pool.streams, strict=True):
        pipeline.add_symbol(f"binance:{symbol}", stream, now_us)
    return pipeline, mapper


def say(**line: Any) -> None:
    """One line of JSON."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


async def feed(seconds: float, pool: Pool, max_behind: int, trades: int = sys.maxsize) -> dict[str, Any]:
    """Publish for ``seconds``, or until ``trades`` were; what was published."""
    settings = load_settings()
    with RegistryClient.from_settings(settings) as registry:
        producer = FrameProducer(settings.kafka, registry)
        brake = Brake(Lag(settings), settings.kafka.partitions)
        brake.start()
        pipeline, mapper = make_pipeline(pool, settings.kafka.partitions)
        began = told = time.monotonic()
        sent = frames = at = 0
        waited_s = 0.0
        previous_us = time.monotonic_ns() // 1000
        last_frame: dict[int, Frame] = {}
        while (now := time.monotonic()) < began + seconds and sent < trades:
            if now - told >= 1.0:
                told = now
                say(event="lag", seconds=round(now - began, 2), trades=sent, behind=sent - brake.done, **brake.records)
            if sent - brake.done > max_behind:
                waited_s += PAUSE_S
                await asyncio.sleep(PAUSE_S)
                continue
            chunk = pool.messages[at : at + CHUNK]
            pipeline.receive(chunk, time.time_ns() // 1000)
            mono_us = time.monotonic_ns() // 1000
            for topic, partition, frame in pipeline.take(mono_us, previous_us):
                await producer.send(topic, partition, frame)
                brake.sent(partition, frame.row_count)
                last_frame[partition] = frame
                frames += 1
            previous_us = mono_us
            sent += len(chunk)
            at += CHUNK
            if at >= len(pool.messages):
                at = 0
                mapper.round += 1
        took_s = time.monotonic() - began
        for partition, frame in last_frame.items():
            await producer.send("trades", partition, Frame(source=SOURCE, watermark_us=frame.watermark_us, flags=END_OF_SOURCE))
        await producer.flush(60)
        brake.stop()
        truth = {
            symbol: [int(pool.first_id[code]), pipeline.sequencer.last_id(code)]
            for code, symbol in enumerate(pool.symbols)
            if pipeline.sequencer.last_id(code) >= 0
        }
    return {"event": "done", "trades": sent, "frames": frames, "seconds": took_s, "waited_s": waited_s, "truth": truth}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--trades", type=int, default=sys.maxsize)
    parser.add_argument("--symbols", type=int, default=1000)
    parser.add_argument("--span-s", type=int, default=20)
    parser.add_argument("--max-behind", type=int, default=500_000)
    arguments = parser.parse_args()
    pool = make_pool(arguments.symbols, span_s=arguments.span_s)
    say(event="ready", messages=len(pool.messages), message_bytes=sum(map(len, pool.messages)) / len(pool.messages))
    sys.stdin.close()
    say(**asyncio.run(feed(arguments.seconds, pool, arguments.max_behind, arguments.trades)))


if __name__ == "__main__":
    main()
