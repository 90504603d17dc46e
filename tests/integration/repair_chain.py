"""Worker, sink and repair on the real stack, a small market to feed them with, and the bars that market has when nothing goes wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from infra.clickhouse.client import connect
from infra.kafka import FrameProducer, committed_offsets, end_offsets
from infra.progress import SINK_GROUP, wait_stored
from infra.provision import provision
from infra.registry_client import RegistryClient
from infra.repair_jobs import Job, RepairJobs
from infra.settings import Settings
from infra.stack.kafka import free_ports
from processors.reconcile import VALUES, rebuild
from schemas.frames import END_OF_SOURCE, GAP_FILLED, HISTORY, Frame
from schemas.partitions import partition_of
from tests.integration.conftest import RunningStack

START_US = 1_723_161_540_000_000
"""2024-08-08T23:59:00Z: a minute before midnight, so that every timeframe has a boundary close by."""
SECOND = 1_000_000
COLUMNS = ("trade_id", "price", "size", "side", "exchange_time_us", "receive_time_us")


@dataclass
class Chain:
    """Our processes on topics and a database of their own."""

    settings: Settings
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, **environ: str) -> None:
        """Run ``python -m infra.NAME``."""
        variables = self.settings.as_environ() | {"PATH": "/usr/bin:/bin"} | environ
        self.processes[name] = subprocess.Popen([sys.executable, "-m", f"infra.{name}"], env=variables)

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """End a process."""
        process = self.processes.pop(name)
        os.kill(process.pid, number)
        process.wait(30)

    def query(self, sql: str, **parameters: Any) -> pl.DataFrame:
        """What ClickHouse says."""
        client = connect(self.settings.clickhouse)
        try:
            found = pl.from_arrow(client.query_arrow(sql, parameters=parameters, use_strings=True))
        finally:
            client.close()
        assert isinstance(found, pl.DataFrame)
        return found

    def bars(self, symbol: str) -> pl.DataFrame:
        """Every stored version of every bar."""
        return self.query(
            "SELECT * FROM bars WHERE symbol = {s:String} ORDER BY timeframe_s, open_time_us, revision, kafka_offset", s=symbol
        )

    def newest(self, symbol: str) -> pl.DataFrame:
        """The newest version of every bar."""
        return self.bars(symbol).group_by("timeframe_s", "open_time_us", maintain_order=True).last()

    async def jobs(self, symbol: str) -> list[Job]:
        """Jobs of a symbol, newest first."""
        async with RepairJobs(self.settings) as jobs:
            return [job for job in await jobs.newest(100) if job.symbol == symbol]

    async def until_done(self, symbol: str, count: int, seconds: float = 40.0) -> list[Job]:
        """Return when ``count`` jobs of the symbol are done and what they published is stored."""
        until = time.monotonic() + seconds
        while True:
            found = await self.jobs(symbol)
            if len(found) >= count and all(job.state == "done" for job in found):
                break
            assert time.monotonic() < until, found
            await asyncio.sleep(0.2)
        await self.until_stored()
        return found

    async def until_reconciled(self, symbol: str, count: int, seconds: float = 40.0) -> list[Job]:
        """As :meth:`until_done`, but bars that reach beyond the jobs' ranges may still be open."""
        until = time.monotonic() + seconds
        while True:
            found = await self.jobs(symbol)
            if len(found) >= count and all(job.state == "done" or job.until_us >= job.end_us for job in found):
                break
            assert time.monotonic() < until, found
            await asyncio.sleep(0.2)
        await self.until_stored()
        return found

    async def until_stored(self) -> None:
        """Return when the sink has stored all there is."""
        names = ("trades", "bars", "gaps")
        ends = end_offsets(self.settings.kafka, names)
        until = time.monotonic() + 30
        while True:
            stored = committed_offsets(self.settings.kafka, SINK_GROUP, names)
            if all(stored[name][place] >= end for name, places in ends.items() for place, end in places.items() if end):
                return
            assert time.monotonic() < until, (ends, stored)
            await asyncio.sleep(0.1)


@contextmanager
def running(stack: RunningStack, prefix: str, *names: str, **variables: str) -> Iterator[Chain]:
    """The chain with these of its processes started."""
    worker, sink, repair = free_ports(3)
    settings = stack.with_prefix(
        prefix,
        MARKETSTREAM_CLICKHOUSE_DATABASE=prefix.rstrip(".").replace("-", "_").replace(".", "_"),
        MARKETSTREAM_PORT_WORKER=str(worker),
        MARKETSTREAM_PORT_SINK=str(sink),
        MARKETSTREAM_PORT_REPAIR=str(repair),
        **variables,
    )
    provision(settings)
    chain = Chain(settings)
    try:
        for name in names:
            chain.start(name)
        yield chain
    finally:
        for name in list(chain.processes):
            chain.stop(name)


def market(seconds: int, *, seed: int = 1, first_id: int = 1_000, per_s: int = 5) -> pl.DataFrame:
    """Trades with ids that follow each other, ``per_s`` a second, and a silence of three seconds now and then."""
    rng = np.random.default_rng(seed)
    count = seconds * per_s
    times = np.sort(rng.integers(0, seconds * 1_000, count)) * 1_000 + START_US
    times = times[(times - START_US) // SECOND % 20 < 17]
    count = len(times)
    return pl.DataFrame(
        {
            "trade_id": np.arange(first_id, first_id + count),
            "price": np.round(2_000 * np.exp(np.cumsum(rng.normal(0, 1e-4, count))), 2),  # calm: nothing is suspect
            "size": np.round(rng.lognormal(0, 1, count), 5) + 1e-5,
            "side": rng.choice(np.array([-1, 1], np.int8), count),
            "exchange_time_us": times,
            "receive_time_us": times + 2_500,
        }
    )


def no_fault(trades: pl.DataFrame, end_us: int) -> pl.DataFrame:
    """The bars of all trades up to ``end_us``, values only."""
    columns = {name: trades[name].to_numpy() for name in COLUMNS}
    bars = rebuild([columns], ("1s", "1m", "5m", "15m", "30m", "1h", "4h", "1d"), end_us)
    return pl.DataFrame({name: bars[name] for name in ("timeframe_s", "open_time_us", *VALUES)}).sort("timeframe_s", "open_time_us")


class Feed:
    """A source of one symbol's trades."""

    def __init__(self, chain: Chain, symbol: str) -> None:
        self.key = f"binance:{symbol}"
        self._chain = chain
        self._registry = RegistryClient.from_settings(chain.settings)
        self._producer = FrameProducer(chain.settings.kafka, self._registry)
        self.partition = partition_of(self.key, chain.settings.kafka.partitions)

    async def send(
        self, trades: pl.DataFrame, *, source: str = "binance/ws/0", flags: int = 0, watermark_us: int = 0, rows: int = 50
    ) -> None:
        """Publish trades, the watermark behind them (none for the past), and wait until they and their bars are stored."""
        for start in range(0, max(trades.height, 1), rows):
            part = trades[start : start + rows]
            columns = {name: part[name].to_numpy() for name in COLUMNS}
            columns["symbol_code"] = np.zeros(part.height, np.int32)
            mark = int(part["exchange_time_us"][-1]) if part.height and not flags & HISTORY else watermark_us
            last = start + rows >= trades.height
            ends = flags & END_OF_SOURCE if last else 0
            await self._producer.send(
                "trades",
                self.partition,
                Frame(
                    source=source,
                    watermark_us=max(mark, watermark_us) if last else mark,
                    symbols=(self.key,),
                    columns=columns,
                    flags=(flags & ~END_OF_SOURCE) | ends,
                ),
            )
        await wait_stored(self._chain.settings, await self._producer.flush(), deadline_s=60)

    async def gap(self, gap_id: int, start_us: int, end_us: int, state: int) -> None:
        """Publish a row of the ledger."""
        values: dict[str, Any] = {
            "first_missing_id": -1, "last_missing_id": -1, "start_time_us": start_us, "end_time_us": end_us, "evidence": 1, "state": state,
            "exchange_time_us": end_us, "receive_time_us": end_us, "gap_id": gap_id, "channel": 1, "recovered": 0 if state != GAP_FILLED else 9,
        }  # fmt: skip
        dtypes = {name: np.int8 if name in ("evidence", "state", "channel") else np.int64 for name in values}
        columns = {name: np.array([value], dtypes[name]) for name, value in values.items()}
        columns["symbol_code"] = np.zeros(1, np.int32)
        await self._producer.send(
            "gaps", self.partition, Frame(source="binance/ws/0", watermark_us=0, symbols=(self.key,), columns=columns)
        )
        await self._producer.flush()

    async def suspect(self, trade: pl.DataFrame, state: int) -> None:
        """Publish a person's word on a trade."""
        columns = {name: trade[name].to_numpy() for name in COLUMNS}
        columns |= {"symbol_code": np.zeros(1, np.int32), "reason": np.ones(1, np.int8), "state": np.array([state], np.int8)}
        columns |= {"band_low": np.full(1, -1.0), "band_high": np.full(1, -1.0)}
        await self._producer.send(
            "quarantine", self.partition, Frame(source="person", watermark_us=0, symbols=(self.key,), columns=columns)
        )
        await self._producer.flush()

    def close(self) -> None:
        """Close the registry's connection."""
        self._registry.close()


async def eventually(check: Callable[[], Any], seconds: float = 20.0) -> None:
    """Until ``check()`` holds."""
    until = time.monotonic() + seconds
    while not (found := await asyncio.to_thread(check)):
        assert time.monotonic() < until, f"still {found!r} after {seconds} s"
        await asyncio.sleep(0.1)


def values(bars: pl.DataFrame, names: Sequence[str] = ("timeframe_s", "open_time_us", *VALUES)) -> pl.DataFrame:
    """The columns that follow from trades alone, in order."""
    return bars.select(names).cast({"timeframe_s": pl.Int32}).sort("timeframe_s", "open_time_us")
