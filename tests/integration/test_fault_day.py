"""One recorded stretch of the market in many ways gives the same tables, to the last bit of their SHA-256.

At the pace it was recorded, at full speed, shuffled, doubled, on 1, 2 and 4 workers that come and go.

The longest recording at hand spans 10 min 51 s over midnight, 2024-08-08 and 09: BTC and ETH spot. The full form
(``PROVE_DAY=full``) makes a day of it, its trades repeated 133 times with times and ids moved on, for the runs at full speed, and runs the
whole recording once at its own pace. The short form takes one pass of it, and eight seconds at its own pace.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import polars as pl
import pytest

from infra.kafka import FrameProducer
from infra.provision import provision
from infra.registry_client import RegistryClient
from infra.replay import replay_file
from infra.stack.kafka import free_ports
from schemas.frames import END_OF_SOURCE, Frame
from schemas.partitions import partition_of
from tests.integration.conftest import RunningStack
from tests.integration.fault_chain import Chain, eventually, figure, isolated, table

FULL = os.environ.get("PROVE_DAY", "short") == "full"
FOLDER = Path(__file__).parents[3] / "shared" / "data" / "ws" / "binance"
PASSES = 133 if FULL else 1
STRETCH_US = 651_000_000
LATENESS_ROWS = 60
"""A shuffled trade comes up to so many trades of its symbol after its turn. The bars remember a bounded number of id holes a symbol; beyond it
a trade is given to the repair, which is another test's matter."""
LATENESS_US = 2_000_000
"""In files, where the reader sorts."""
FRAME_ROWS = 2_000
RECORDINGS = {
    "BTC-USDT": ("spot_btcusdt_20240808", "spot_btcusdt_20240809"),
    "ETH-USDT": ("spot_ethusdt_20240808", "spot_ethusdt_20240809"),
    # The same trades under names that lie in other partitions, so that four workers have something to do.
    "SOL-USDT": ("spot_btcusdt_20240809",),
    "BNB-USDT": ("spot_ethusdt_20240809",),
    "XRP-USDT": ("spot_btcusdt_20240808",),
    "ADA-USDT": ("spot_ethusdt_20240808",),
}
LEFT_OUT = ("kafka_partition", "kafka_offset", "known_at_us", "input_offset")
"""Positions in Kafka, and when the record was published: the only columns that may differ."""


def _recorded(names: tuple[str, ...]) -> pl.DataFrame:
    """Trades of capture files by id: trade_id, price, size, side, exchange_time_us."""
    rows = []
    for name in names:
        path = FOLDER / f"{name}.ws.gz"
        if not path.exists():
            pytest.skip(f"recorded data is not here: {path.name}")
        with gzip.open(path, "rb") as stream:
            for line in stream:
                if b"@trade" in line:
                    data = msgspec.json.decode(line.partition(b" ")[2])["data"]
                    rows.append((data["t"], float(data["p"]), float(data["q"]), -1 if data["m"] else 1, data["T"] * 1000))
    schema = {"trade_id": pl.Int64, "price": pl.Float64, "size": pl.Float64, "side": pl.Int8, "exchange_time_us": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row").unique("trade_id").sort("trade_id")


@pytest.fixture(scope="module")
def market() -> dict[str, pl.DataFrame]:
    """Symbol -> its trades by id, ``PASSES`` passes of the recording."""
    found = {}
    for symbol, names in RECORDINGS.items():
        one = _recorded(names)
        step = int(one["trade_id"][-1] - one["trade_id"][0]) + 1
        passes = [
            one.with_columns(trade_id=pl.col("trade_id") + number * step, exchange_time_us=pl.col("exchange_time_us") + number * STRETCH_US)
            for number in range(PASSES)
        ]
        found[symbol] = pl.concat(passes)
    return found


def frames_of(symbol: str, trades: pl.DataFrame, *, shuffle: Random | None = None, rows: int = FRAME_ROWS) -> Iterator[Frame]:
    """Trades as frames of one source. Shuffled: each row comes up to 60 rows after its turn; watermarks say what may still come."""
    time_us = trades["exchange_time_us"].to_numpy()
    order = np.lexsort((trades["trade_id"].to_numpy(), time_us))
    if shuffle is not None:
        turn = np.arange(len(order)) + np.random.Generator(np.random.PCG64(shuffle.getrandbits(63))).integers(0, LATENESS_ROWS, len(order))
        turn[0] = -1  # where a source begins decides from when on its bars are complete: the first trade stays the first
        order = order[np.argsort(turn, kind="stable")]
    columns = {name: trades[name].to_numpy()[order] for name in trades.columns}
    columns["receive_time_us"] = columns["exchange_time_us"].copy()
    columns["symbol_code"] = np.zeros(len(order), np.int32)
    # No row after place i is older than this.
    still_to_come = np.append(np.minimum.accumulate(columns["exchange_time_us"][::-1])[::-1], time_us.max() + 1)
    key = f"binance:{symbol}"
    for start in range(0, len(order), rows):
        stop = min(start + rows, len(order))
        yield Frame(
            source=f"prove/{symbol}",
            watermark_us=int(still_to_come[stop]),
            symbols=(key,),
            columns={name: column[start:stop] for name, column in columns.items()},
            flags=END_OF_SOURCE if stop == len(order) else 0,
        )


class Run:
    """One way of running it: topics, database and workers of its own."""

    def __init__(self, stack: RunningStack, prefix: str, folder: Path) -> None:
        self.settings = isolated(stack, prefix, MARKETSTREAM_WORKER_SESSION_TIMEOUT_S="6", MARKETSTREAM_WORKER_SNAPSHOT_INTERVAL_S="0.5")
        folder.mkdir()
        self.chain = Chain(self.settings, folder)
        self.texts: dict[str, str] = {}

    def worker(self, index: int) -> None:
        """Start worker ``index``."""
        port = {"MARKETSTREAM_PORT_WORKER": str(free_ports(1)[0] - index)}
        self.chain.start("worker", alias=f"worker-{index}", arguments=("--index", str(index)), **port)

    async def publish(
        self, market: dict[str, pl.DataFrame], *, shuffle: Random | None = None, pace: float = 0.0, rows: int = FRAME_ROWS
    ) -> None:
        """Send every symbol's frames in the order of their watermarks; ``pace``: exchange seconds a second, 0 as fast as it goes."""
        frames = sorted(
            (frame for symbol, trades in market.items() for frame in frames_of(symbol, trades, shuffle=shuffle, rows=rows)),
            key=lambda frame: int(frame.columns["exchange_time_us"][-1]),
        )
        first_us, begun = int(frames[0].columns["exchange_time_us"][0]), time.monotonic()
        with RegistryClient.from_settings(self.settings) as registry:
            producer = FrameProducer(self.settings.kafka, registry)
            for frame in frames:
                if pace:
                    due = begun + (int(frame.columns["exchange_time_us"][-1]) - first_us) / 1e6 / pace
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                await producer.send("trades", partition_of(frame.symbols[0], self.settings.kafka.partitions), frame)
            await producer.flush()

    async def stored(self, rows: int, timeout_s: float) -> None:
        """Until all trades and the bars of all of them are stored."""
        last = ""

        def done() -> bool:
            nonlocal last
            trades = table(self.settings, "SELECT count() AS n FROM trades")["n"][0]
            bars = table(
                self.settings,
                "SELECT sum(trade_count) AS n FROM (SELECT symbol, timeframe_s, open_time_us, trade_count FROM bars WHERE timeframe_s = 1 AND is_final = 1 ORDER BY symbol, open_time_us, revision DESC LIMIT 1 BY symbol, open_time_us)",
            )["n"][0]
            last = f"{trades} trades and bars over {bars} of {rows} are stored"
            return trades == rows and bars == rows

        try:
            await eventually(done, timeout_s, "not stored")
        except AssertionError:
            raise AssertionError(last) from None

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every table that has rows: newest bars, everything else whole, by key, without :data:`LEFT_OUT`."""
        names = table(self.settings, f"SELECT name FROM system.tables WHERE database = '{self.settings.clickhouse.database}' ORDER BY name")
        found = {}
        for name in names["name"].to_list():
            newest = " ORDER BY exchange, symbol, timeframe_s, open_time_us, revision DESC LIMIT 1 BY exchange, symbol, timeframe_s, open_time_us"
            rows = table(self.settings, f"SELECT * EXCEPT ({', '.join(LEFT_OUT)}) FROM {name}{newest if name == 'bars' else ''}")
            if len(rows):
                text = rows.sort(rows.columns).write_csv(float_scientific=False)
                found[name] = hashlib.sha256(text.encode()).hexdigest()
                self.texts[name] = text
        return found


async def _wait_for_some(run: Run, rows: int) -> None:
    """Until about a fifth of the trades has gone through, so that what comes next comes in the middle."""
    await eventually(lambda: table(run.settings, "SELECT count() AS n FROM trades")["n"][0] > rows // 5, 120, "nothing is stored")


async def _replay_doubled(run: Run, market: dict[str, pl.DataFrame], folder: Path, random: Random) -> None:
    """Every symbol as a file in which half of the rows stand twice and neighbours are out of order, through ``replay``."""
    for symbol, trades in market.items():
        generator = np.random.Generator(np.random.PCG64(random.getrandbits(63)))
        doubled = pl.concat([trades, trades.filter(pl.Series(generator.random(len(trades)) < 0.5))])
        late_us = generator.integers(0, LATENESS_US, len(doubled))
        rows = doubled.with_columns(turn=pl.col("exchange_time_us") + pl.Series(late_us)).sort("turn")
        path = folder / f"{symbol}.csv"
        columns = {"quote": pl.col("price") * pl.col("size"), "time": pl.col("exchange_time_us") // 1000, "maker": pl.col("side") == -1}
        shown = rows.with_columns(**columns).select("trade_id", "price", "size", "quote", "time", "maker", best=pl.lit(True))
        text = shown.with_columns(pl.col("maker", "best").cast(pl.String).str.to_titlecase()).write_csv(include_header=False)
        path.write_text(text)
        await replay_file(run.settings, path, exchange="binance", symbol=symbol, speed="max")


@pytest.mark.timeout(7200)
async def test_one_stretch_in_many_ways_gives_the_same_tables(
    stack: RunningStack, topic_prefix: str, tmp_path: Path, market: dict[str, pl.DataFrame]
) -> None:
    """Straight on one worker; shuffled on two, one of which joins in the middle; shuffled on four, two of which go; doubled through replay."""
    rows = sum(map(len, market.values()))
    limit_s = 1800.0 if FULL else 90.0
    found: dict[str, dict[str, str]] = {}
    texts: dict[str, dict[str, str]] = {}

    async def way(name: str, act) -> None:  # type: ignore[no-untyped-def]
        run = Run(stack, f"{topic_prefix}{name}.", tmp_path / name)
        await asyncio.to_thread(provision, run.settings)
        begun = time.monotonic()
        with run.chain:
            run.chain.start("sink")
            await act(run)
            await run.stored(rows, limit_s)
            found[name] = await asyncio.to_thread(run.hashes)
            texts[name] = run.texts
        figure("day", way=name, trades=rows, seconds=time.monotonic() - begun, bars_sha256=found[name]["bars"][:16])

    async def straight(run: Run) -> None:
        run.worker(0)
        await run.publish(market)

    async def shuffled_on_two(run: Run) -> None:
        run.worker(0)
        await run.publish(market, shuffle=Random(2), rows=500)
        await _wait_for_some(run, rows)
        run.worker(1)

    async def shuffled_on_four(run: Run) -> None:
        for index in range(4):
            run.worker(index)
        await run.publish(market, shuffle=Random(4))
        await _wait_for_some(run, rows)
        run.chain.signal("worker-1", signal.SIGTERM)
        run.chain.kill("worker-2")

    async def doubled(run: Run) -> None:
        run.worker(0)
        run.worker(1)
        await _replay_doubled(run, market, tmp_path, Random(5))

    await way("straight", straight)
    await way("shuffled-2", shuffled_on_two)
    await way("shuffled-4", shuffled_on_four)
    await way("doubled-2", doubled)
    for name, hashes in found.items():
        # Scores are of a feed: they name it, and count what came with each of its frames; between equal frames they are equal (below).
        hashes, wanted = {**hashes, "quality": ""}, {**found["straight"], "quality": ""}
        assert hashes == wanted, f"{name} differs: {_difference(texts['straight'], texts[name])}"


def _difference(one: dict[str, str], other: dict[str, str]) -> dict[str, list[str]]:
    """The first rows of each table that only one of them has."""
    found = {}
    for name in one.keys() | other.keys():
        mine, theirs = one.get(name, "").splitlines(), other.get(name, "").splitlines()
        if mine != theirs:
            found[name] = [*mine[:1], *sorted(set(mine) ^ set(theirs))[:6]]
    return found


@pytest.mark.timeout(3600)
async def test_at_its_own_pace_the_tables_are_those_of_full_speed(
    stack: RunningStack, topic_prefix: str, tmp_path: Path, market: dict[str, pl.DataFrame]
) -> None:
    """One exchange second a second; the whole recording in the full form, eight seconds of it in the short."""
    first_us = min(int(trades["exchange_time_us"][0]) for trades in market.values())
    end_us = first_us + (STRETCH_US if FULL else 8_000_000)
    slice_of = {symbol: trades.filter(pl.col("exchange_time_us") < end_us) for symbol, trades in market.items()}
    slice_of = {symbol: trades for symbol, trades in slice_of.items() if len(trades)}
    rows = sum(map(len, slice_of.values()))
    hashes = []
    for pace in (0.0, 1.0):
        run = Run(stack, f"{topic_prefix}pace{int(pace)}.", tmp_path / f"pace{int(pace)}")
        await asyncio.to_thread(provision, run.settings)
        begun = time.monotonic()
        with run.chain:
            run.chain.start("sink")
            run.worker(0)
            await run.publish(slice_of, pace=pace, rows=20)
            await run.stored(rows, 60)
            hashes.append(await asyncio.to_thread(run.hashes))
        figure("day", way=f"pace {pace:g}", trades=rows, seconds=time.monotonic() - begun, bars_sha256=hashes[-1]["bars"][:16])
    assert hashes[0] == hashes[1]
