"""One recorded stretch of the market in many ways gives the same tables, to the last bit of their SHA-256.

At the pace it was recorded, at full speed, shuffled, late, doubled, on 1, 2 and 4 workers that come and go in the middle of it.

Every table means those that this pipeline writes of trades: ``trades``, ``bars`` and ``quality``. ``gaps``, ``quarantine`` and ``deadletter``
must stay without a row in every way, as this recording has no gap, no suspect and nothing that is refused; the other tables (tickers, books,
liquidations and the like) are of feeds that are not recorded here. Scores (``quality``) count what came with each frame of a feed that they name: they are
equal where the frames are, which is shown of the same frames at two paces, and on two workers of which one joins and four of which two go.

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
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import polars as pl
import pytest

from infra.clickhouse.schema import TABLES
from infra.kafka import FrameProducer, committed_offsets, end_offsets
from infra.progress import SINK_GROUP, worker_offsets
from infra.provision import provision
from infra.registry_client import RegistryClient
from infra.replay import replay_file
from infra.stack.kafka import free_ports
from schemas.frames import END_OF_SOURCE, Frame
from schemas.partitions import partition_of
from tests.integration.conftest import RunningStack
from tests.integration.fault_chain import Chain, eventually, figure, isolated, table
from tests.integration.test_worker import records

FULL = os.environ.get("PROVE_DAY", "short") == "full"
FOLDER = Path(__file__).parents[3] / "shared" / "data" / "ws" / "binance"
PASSES = 133 if FULL else 1
STRETCH_US = 651_000_000
LATENESS_ROWS = 60
"""A shuffled trade comes up to so many trades of its symbol after its turn, though not after a pause longer than bars are revised back. The bars
remember a bounded number of id holes a symbol; beyond either a trade is given to the repair, which is another test's matter."""
LATE_US = 28_000_000
"""A late trade comes up to so much exchange time after its turn, when its bars have long been published: they are revised up to 30 s back."""
LATE_SHARE = 0.01
"""Of all trades. Were every one late, 2 s would already leave 249 holes in the ids of BTC, whose trades come in bursts of one millisecond; the
bars remember 192 (``id_intervals``) and would give what lies in the forgotten ones to the repair."""
FILE_LATENESS_US = 2_000_000
"""In files, where the reader sorts."""
FRAME_ROWS = 2_000
SMALL_FRAME_ROWS = 500
TABLES_OF_TRADES = {"trades", "bars", "quality"}
REVISED = "bars, whatever their revision"
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


def frames_of(
    symbol: str,
    trades: pl.DataFrame,
    *,
    shuffle: Random | None = None,
    late: Random | None = None,
    doubled: Random | None = None,
    rows: int = FRAME_ROWS,
) -> Iterator[Frame]:
    """Trades as frames of one source.

    Args:
        shuffle: each row comes up to 60 rows after its turn; watermarks say what may still come.
        late: one row in a hundred comes up to 28 s after its turn; watermarks do not wait for it.
        doubled: half of the rows stand twice, and half of the frames are sent twice.
    """
    time_us = trades["exchange_time_us"].to_numpy()
    order = np.lexsort((trades["trade_id"].to_numpy(), time_us))
    if shuffle is not None:
        paused = np.append(0, np.cumsum(np.diff(time_us[order]) > LATE_US))  # what comes after so long a pause comes after all before it
        turn = np.arange(len(order)) + _generator(shuffle).integers(0, LATENESS_ROWS, len(order)) + LATENESS_ROWS * paused
        turn[0] = -1  # where a source begins decides from when on its bars are complete: the first trade stays the first
        order = order[np.argsort(turn, kind="stable")]
    if late is not None:
        generator = _generator(late)
        chosen = generator.random(len(order)) < LATE_SHARE
        turn = time_us[order] + np.where(chosen, generator.integers(0, LATE_US, len(order)), 0)
        turn[0] = -1
        order = order[np.argsort(turn, kind="stable")]
    if doubled is not None:
        order = np.repeat(order, 1 + (_generator(doubled).random(len(order)) < 0.5))
    columns = {name: trades[name].to_numpy()[order] for name in trades.columns}
    columns["receive_time_us"] = columns["exchange_time_us"].copy()
    columns["symbol_code"] = np.zeros(len(order), np.int32)
    if late is None:  # no row after place i is older than this
        watermarks = np.append(np.minimum.accumulate(columns["exchange_time_us"][::-1])[::-1], time_us.max() + 1)
    else:  # nor would be, were none late
        watermarks = np.append(0, np.maximum.accumulate(columns["exchange_time_us"]))
    key = f"binance:{symbol}"
    for start in range(0, len(order), rows):
        stop = min(start + rows, len(order))
        frame = Frame(
            source=f"prove/{symbol}",
            watermark_us=int(watermarks[stop]),
            symbols=(key,),
            columns={name: column[start:stop] for name, column in columns.items()},
            flags=END_OF_SOURCE if stop == len(order) else 0,
        )
        yield frame
        if doubled is not None and doubled.random() < 0.5:
            yield frame


def _generator(random: Random) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(random.getrandbits(63)))


def in_order(frames: Iterator[Frame]) -> list[Frame]:
    """Frames of all symbols by the newest trade a source has sent up to then, as a market sends them; those of one source in their order."""
    newest: dict[str, int] = {}
    dated = []
    for frame in frames:
        newest[frame.source] = max(newest.get(frame.source, 0), int(frame.columns["exchange_time_us"].max()))
        dated.append((newest[frame.source], frame))
    return [frame for _, frame in sorted(dated, key=lambda pair: pair[0])]


class Run:
    """One way of running it: topics, database and workers of its own."""

    def __init__(self, stack: RunningStack, prefix: str, folder: Path) -> None:
        self.settings = isolated(stack, prefix, MARKETSTREAM_WORKER_SESSION_TIMEOUT_S="6", MARKETSTREAM_WORKER_SNAPSHOT_INTERVAL_S="0.5")
        folder.mkdir()
        self.chain = Chain(self.settings, folder)
        self.ports: dict[int, int] = {}
        self.texts: dict[str, str] = {}

    def worker(self, index: int) -> None:
        """Start worker ``index``."""
        self.ports[index] = free_ports(1)[0]
        port = {"MARKETSTREAM_PORT_WORKER": str(self.ports[index] - index)}
        self.chain.start("worker", alias=f"worker-{index}", arguments=("--index", str(index)), **port)

    def asked(self, index: int, path: str) -> str:
        """What worker ``index`` answers with 200; empty otherwise."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[index]}{path}", timeout=2) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    async def joined(self, *indices: int) -> None:
        """Until each of these workers has been given its partitions."""
        await eventually(lambda: all(self.asked(index, "/readyz") for index in indices), 90, f"workers {indices} have no partitions")

    def turned(self, index: int) -> int:
        """Trades that worker ``index`` has turned into bars itself."""
        lines = self.asked(index, "/metrics").splitlines()
        return sum(int(float(line.rpartition(" ")[2])) for line in lines if line.startswith("worker_trades_total "))

    async def worked(self, *indices: int) -> None:
        """Until each of these workers has turned trades into bars itself: a partition is or was its own."""
        await eventually(lambda: all(self.turned(index) for index in indices), 90, f"not each of workers {indices} has made a bar")

    def partition(self, frame: Frame) -> int:
        """Where a frame goes."""
        return partition_of(frame.symbols[0], self.settings.kafka.partitions)

    def quarters(self, frames: list[Frame]) -> list[list[Frame]]:
        """Frames in four pieces, each with a quarter of every partition's."""
        found: list[list[Frame]] = [[] for _ in range(4)]
        counts, place = Counter(map(self.partition, frames)), Counter[int]()
        for frame in frames:
            partition = self.partition(frame)
            found[place[partition] * 4 // counts[partition]].append(frame)
            place[partition] += 1
        return found

    async def applied(self, sent: list[Frame]) -> None:
        """Until there are bars of all that was sent up to now, whoever made them."""
        wanted = Counter(map(self.partition, sent))
        await eventually(
            lambda: all(worker_offsets(self.settings)[partition][0] + 1 >= count for partition, count in wanted.items()),
            90,
            "not every partition was worked on",
        )

    async def is_in_the_middle(self, frames: list[Frame], *workers: int) -> None:
        """Assert it: each of these workers has made bars, and in every partition some records are done and some are still to come."""
        await self.worked(*workers)
        every = Counter(map(self.partition, frames))
        done: dict[int, int] = {}

        def begun() -> bool:
            done.update({partition: offset + 1 for partition, (offset, _) in worker_offsets(self.settings).items()})
            return done.keys() == every.keys() and all(done.values())

        await eventually(begun, 90, "not every partition was begun")  # a worker that is behind reads one far ahead of the others
        assert all(0 < done[partition] < count for partition, count in every.items()), f"{done} of {dict(every)} records are done"

    async def publish(self, frames: list[Frame], *, pace: float = 0.0) -> None:
        """Send frames; ``pace``: exchange seconds a second, 0 as fast as it goes."""
        first_us, begun = int(frames[0].columns["exchange_time_us"][0]), time.monotonic()
        with RegistryClient.from_settings(self.settings) as registry:
            producer = FrameProducer(self.settings.kafka, registry)
            for frame in frames:
                if pace:
                    due = begun + (int(frame.columns["exchange_time_us"][-1]) - first_us) / 1e6 / pace
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                await producer.send("trades", self.partition(frame), frame)
            await producer.flush()

    def rows_in_topic(self) -> int:
        """Rows of trades that Kafka holds, repeated ones too."""
        with RegistryClient.from_settings(self.settings) as registry:
            codec = registry.frame_codec("trades")
            return sum(codec.decode(record.value).row_count for record in records(self.settings, "trades"))

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
            last = f"{trades} trades and bars over {bars} of {rows} are stored; records that wait for the sink: {self.waiting()}"
            return trades == rows and bars == rows and not self.waiting()

        try:
            await eventually(done, timeout_s, "not stored")
        except AssertionError:
            raise AssertionError(last) from None

    def waiting(self) -> dict[str, int]:
        """Topic -> records that the sink has not stored; only those that have some."""
        ends, done = end_offsets(self.settings.kafka, TABLES), committed_offsets(self.settings.kafka, SINK_GROUP, TABLES)
        found = {name: sum(end - max(done[name][partition], 0) for partition, end in ends[name].items()) for name in ends}
        return {name: count for name, count in found.items() if count}

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every table that has rows: newest bars, everything else whole, by key, without :data:`LEFT_OUT`; and :data:`REVISED`."""
        names = table(self.settings, f"SELECT name FROM system.tables WHERE database = '{self.settings.clickhouse.database}' ORDER BY name")
        newest = (
            " ORDER BY exchange, symbol, timeframe_s, open_time_us, revision DESC LIMIT 1 BY exchange, symbol, timeframe_s, open_time_us"
        )
        found = {}
        for name in [*names["name"].to_list(), REVISED]:
            left_out = ", ".join((*LEFT_OUT, "revision") if name == REVISED else LEFT_OUT)
            source, order = ("bars", newest) if name in ("bars", REVISED) else (name, "")
            rows = table(self.settings, f"SELECT * EXCEPT ({left_out}) FROM {source}{order}")
            if len(rows):
                text = rows.sort(rows.columns).write_csv(float_scientific=False)
                found[name] = hashlib.sha256(text.encode()).hexdigest()
                self.texts[name] = text
        return found


async def _replay_doubled(run: Run, market: dict[str, pl.DataFrame], folder: Path, random: Random) -> None:
    """Every symbol as a file in which half of the rows stand twice and neighbours are out of order, through ``replay``."""
    for symbol, trades in market.items():
        generator = np.random.Generator(np.random.PCG64(random.getrandbits(63)))
        doubled = pl.concat([trades, trades.filter(pl.Series(generator.random(len(trades)) < 0.5))])
        late_us = generator.integers(0, FILE_LATENESS_US, len(doubled))
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
    """Straight on one worker; shuffled on two, one of which joins; on four, two of which go; late and doubled on two; doubled through replay."""
    rows = sum(map(len, market.values()))
    limit_s = 1800.0 if FULL else 90.0
    found: dict[str, dict[str, str]] = {}
    texts: dict[str, dict[str, str]] = {}
    shuffled = in_order(
        frame
        for symbol, trades in market.items()
        for frame in frames_of(symbol, trades, shuffle=Random(f"2/{symbol}"), rows=SMALL_FRAME_ROWS)
    )

    async def way(name: str, act: Callable[[Run], Awaitable[None]], *workers: int, doubled: bool = False) -> None:
        """Run it; ``workers`` that must have worked and still run, ``doubled``: whether Kafka must hold half of the rows twice or more."""
        run = Run(stack, f"{topic_prefix}{name}.", tmp_path / name)
        await asyncio.to_thread(provision, run.settings)
        begun = time.monotonic()
        with run.chain:
            run.chain.start("sink")
            await act(run)
            await run.stored(rows, limit_s)
            await run.worked(*workers)
            in_topic = await asyncio.to_thread(run.rows_in_topic)
            dropped = run.chain.metric("sink", 'sink_duplicates_total{table="trades"}')
            found[name] = await asyncio.to_thread(run.hashes)
            texts[name] = run.texts
        assert in_topic >= rows * 1.5 if doubled else in_topic == rows, f"{name}: {in_topic} rows of {rows} trades are in the topic"
        assert dropped == in_topic - rows, f"{name}: the sink dropped {dropped} of {in_topic - rows} repeated rows"
        figure("day", way=name, trades=rows, in_topic=in_topic, seconds=time.monotonic() - begun, bars_sha256=found[name]["bars"][:16])

    async def straight(run: Run) -> None:
        run.worker(0)
        await run.publish(in_order(frame for symbol, trades in market.items() for frame in frames_of(symbol, trades)))

    async def shuffled_on_two(run: Run) -> None:
        pieces = run.quarters(shuffled)
        run.worker(0)
        await run.publish(pieces[0] + pieces[1])
        await run.is_in_the_middle(shuffled, 0)
        run.worker(1)
        await run.publish(pieces[2])  # while the second joins
        await run.joined(1)
        await run.publish(pieces[3])

    async def shuffled_on_four(run: Run) -> None:
        pieces = run.quarters(shuffled)
        for index in range(4):
            run.worker(index)
        await run.joined(0, 1, 2, 3)
        await run.publish(pieces[0] + pieces[1])
        await run.is_in_the_middle(shuffled, 0, 1, 2, 3)
        run.chain.signal("worker-1", signal.SIGTERM)
        run.chain.kill("worker-2")
        await run.publish(pieces[2])  # while nobody has the partitions of these two
        await run.applied(pieces[0] + pieces[1] + pieces[2])
        await run.is_in_the_middle(shuffled)
        await run.publish(pieces[3])

    async def late_and_doubled(run: Run) -> None:
        run.worker(0)
        run.worker(1)
        await run.joined(0, 1)
        await run.publish(
            in_order(
                frame
                for symbol, trades in market.items()
                for frame in frames_of(symbol, trades, late=Random(f"3/{symbol}"), doubled=Random(f"4/{symbol}"), rows=SMALL_FRAME_ROWS)
            )
        )

    async def replayed(run: Run) -> None:
        run.worker(0)
        run.worker(1)
        await run.joined(0, 1)
        await _replay_doubled(run, market, tmp_path, Random(5))

    await way("straight", straight, 0)
    await way("shuffled-2", shuffled_on_two, 0, 1)
    await way("shuffled-4", shuffled_on_four, 0, 3)
    await way("late-doubled-2", late_and_doubled, 0, 1, doubled=True)
    await way("replayed-2", replayed, 0, 1)
    for name, hashes in found.items():
        assert hashes.keys() == TABLES_OF_TRADES | {REVISED}, f"{name} wrote {sorted(hashes)}"
        # A late trade revises bars that were published: what they say is the same then, and how often it was said is not.
        same = {"trades", REVISED} if name == "late-doubled-2" else {"trades", "bars"}
        differs = {table for table in same if hashes[table] != found["straight"][table]}
        assert not differs, f"{name} differs: {_difference(texts['straight'], texts[name], differs)}"
    assert found["late-doubled-2"]["bars"] != found["straight"]["bars"], "no late trade has revised a bar"
    assert found["shuffled-2"]["quality"] == found["shuffled-4"]["quality"]


def _difference(one: dict[str, str], other: dict[str, str], names: set[str]) -> dict[str, list[str]]:
    """The first rows of each of these tables that only one of them has."""
    found = {}
    for name in names:
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
            await run.publish(
                in_order(frame for symbol, trades in slice_of.items() for frame in frames_of(symbol, trades, rows=20)), pace=pace
            )
            await run.stored(rows, 60)
            hashes.append(await asyncio.to_thread(run.hashes))
        figure("day", way=f"pace {pace:g}", trades=rows, seconds=time.monotonic() - begun, bars_sha256=hashes[-1]["bars"][:16])
    assert hashes[0].keys() == TABLES_OF_TRADES | {REVISED}
    assert hashes[0] == hashes[1]
