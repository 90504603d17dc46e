"""Replays through broker, worker and sink: trades in ClickHouse are the file's, bars are polars' on the same trades, again and again."""

from __future__ import annotations

import asyncio
import gzip
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from confluent_kafka import TopicPartition
from polars.testing import assert_frame_equal

from collectors.replay.detect import Reader
from infra.clickhouse.client import connect
from infra.errors import InputFileError, SettingsError, UnreachableError
from infra.export import NothingFoundError, export
from infra.kafka import consumer_config, end_offsets
from infra.provision import provision
from infra.replay import ReplayProgress, ReplaySummary, TruncatedFileError, replay_file
from infra.settings import Settings, load_settings
from infra.stack.kafka import free_ports
from schemas.codec import FrameCodec
from schemas.frames import END_OF_SOURCE, concat_columns
from schemas.partitions import partition_of
from schemas.symbols import Instrument
from schemas.timeframes import TIMEFRAME_SECONDS
from tests.integration.conftest import RunningStack

RECORDED = Path(__file__).parents[3] / "shared" / "data"
CAPTURES = [
    ("spot_btcusdt_20240808", "binance", "BTC-USDT", 9_757),
    ("spot_btcusdt_20240809", "binance", "BTC-USDT", 10_147),
    ("spot_ethusdt_20240808", "binance", "ETH-USDT", 6_106),
    ("spot_ethusdt_20240809", "binance", "ETH-USDT", 8_409),
    ("usdm_btcusdt_20240808", "binance-usdm", "BTC-USDT-PERP", 21_313),
]
SUMS = ("volume", "quote_volume", "buy_volume", "vwap")


def _capture(name: str) -> Path:
    path = RECORDED / "ws" / "binance" / f"{name}.ws.gz"
    if not path.exists():
        pytest.skip(f"recorded market data is not here: {path}")
    return path


@pytest.fixture(scope="module")
def pipeline(stack: RunningStack) -> Iterator[Settings]:
    """A worker and a sink of our own on the stack's servers, with topics and a database of our own."""
    worker, sink = free_ports(2)
    settings = stack.with_prefix(
        "replay.", MARKETSTREAM_CLICKHOUSE_DATABASE="replay", MARKETSTREAM_PORT_WORKER=str(worker), MARKETSTREAM_PORT_SINK=str(sink)
    )
    provision(settings)
    processes = [
        subprocess.Popen([sys.executable, "-m", module], env=settings.as_environ() | {"PATH": "/usr/bin:/bin"})
        for module in ("infra.worker", "infra.sink")
    ]
    try:
        yield settings
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)


def _replay(settings: Settings, path: Path, exchange: str, symbol: str, **options: Any) -> ReplaySummary:
    return asyncio.run(replay_file(settings, path, exchange=exchange, symbol=symbol, **options))


def _file_trades(path: Path, exchange: str, symbol: str) -> pl.DataFrame:
    """The file's trades as the reader has them (tests of its own compare that with the file), by id."""
    columns = concat_columns([block.columns for block in Reader(path, Instrument(exchange, symbol)).blocks()])
    return pl.DataFrame(columns).unique("trade_id").sort("trade_id")


def _exported(settings: Settings, kind: str, exchange: str, symbol: str, folder: Path, **options: Any) -> pl.DataFrame:
    path = folder / f"{kind}.parquet"
    export(settings, kind, exchange=exchange, symbol=symbol, output=path, file_format="parquet", **options)
    return pl.read_parquet(path)


def _oracle(trades: pl.DataFrame, seconds: int) -> pl.DataFrame:
    """Bars with trades of one timeframe, as polars has them."""
    width = seconds * 1_000_000
    price, size = pl.col("price"), pl.col("size")
    return (
        trades.sort("exchange_time_us", "trade_id")
        .group_by((pl.col("exchange_time_us") // width * width).alias("open_time_us"), maintain_order=True)
        .agg(
            price.first().alias("open"),
            price.max().alias("high"),
            price.min().alias("low"),
            price.last().alias("close"),
            size.sum().alias("volume"),
            (price * size).sum().alias("quote_volume"),
            size.filter(pl.col("side") == 1).sum().alias("buy_volume"),
            pl.len().cast(pl.Int64).alias("trade_count"),
            ((price * size).sum() / size.sum()).alias("vwap"),
            pl.col("trade_id").first().alias("first_trade_id"),
            pl.col("trade_id").last().alias("last_trade_id"),
        )
    )


def _check_tables(settings: Settings, trades: pl.DataFrame, exchange: str, symbol: str, folder: Path) -> list[pl.DataFrame]:
    """The tables hold exactly ``trades`` and their bars; returns them."""
    stored = _exported(settings, "trades", exchange, symbol, folder)
    words = stored.with_columns(side=pl.when(pl.col.side == "buy").then(1).otherwise(-1).cast(pl.Int8)).select(trades.columns)
    assert_frame_equal(words, trades, check_exact=True)
    found = [stored]
    for timeframe, seconds in TIMEFRAME_SECONDS.items():
        bars = _exported(settings, "bars", exchange, symbol, folder, timeframe=timeframe)
        assert bars["is_final"].to_list() == [1] * bars.height
        assert bars["complete"].to_list()[:-1].count(0) <= 1  # the first and the last are cut by the recording's ends
        filled = bars.filter(pl.col.trade_count > 0)
        oracle = _oracle(trades, seconds)
        exact = [name for name in oracle.columns if name not in SUMS]
        assert_frame_equal(filled.select(exact), oracle.select(exact), check_exact=True)
        assert_frame_equal(filled.select(SUMS), oracle.select(SUMS), rel_tol=1e-12, abs_tol=1e-12)
        times = bars["open_time_us"]
        assert times.diff().drop_nulls().unique().to_list() in ([], [seconds * 1_000_000])  # no minute without a bar
        found.append(bars)
    return found


@pytest.mark.parametrize(("name", "exchange", "symbol", "count"), CAPTURES)
def test_a_recorded_capture_is_stored_exactly_and_a_second_time_changes_nothing(
    pipeline: Settings, tmp_path: Path, name: str, exchange: str, symbol: str, count: int
) -> None:
    """Trades by id and bars of every timeframe; then the same file again."""
    path = _capture(name)
    told: list[ReplayProgress] = []
    summary = _replay(pipeline, path, exchange, symbol, progress=told.append)
    assert (summary.rows, summary.published, summary.duplicates, summary.deadlettered, summary.late) == (count, count, 0, 0, 0)
    assert summary.bars > 300
    assert {item.stage for item in told} == {"publishing", "storing"}
    earlier = [item for item in CAPTURES[: [item[0] for item in CAPTURES].index(name)] if item[1:3] == (exchange, symbol)]
    trades = pl.concat([_file_trades(_capture(item[0]), exchange, symbol) for item in [*earlier, (name,)]]).sort("trade_id")
    first = _check_tables(pipeline, trades, exchange, symbol, tmp_path)
    again = _replay(pipeline, path, exchange, symbol)
    assert (again.published, again.source) == (count, summary.source)
    for before, after in zip(first, _check_tables(pipeline, trades, exchange, symbol, tmp_path), strict=True):
        assert_frame_equal(before, after, check_exact=True)


@pytest.mark.parametrize("file_format", ["csv", "parquet", "arrow"])
def test_an_export_replayed_gives_the_same_table(pipeline: Settings, tmp_path: Path, file_format: str) -> None:
    """Export trades -> replay into an empty symbol's place -> export: byte for byte."""
    rows = [
        f"{i},{61837.63 + i / 7},{0.001 * (i % 9 + 1)},1,{1_723_161_255_342 + i * 13},{'True' if i % 3 else 'False'},True"
        for i in range(5_000)
    ]
    source = tmp_path / "dump.csv"
    source.write_text("\n".join(rows))
    symbol = f"{file_format.upper()}-USDT"
    _replay(pipeline, source, "binance", symbol)
    first = tmp_path / f"first.{file_format}"
    export(pipeline, "trades", exchange="binance", symbol=symbol, output=first, file_format=file_format)
    _replay(pipeline, first, "binance", symbol)
    second = tmp_path / f"second.{file_format}"
    export(pipeline, "trades", exchange="binance", symbol=symbol, output=second, file_format=file_format)
    assert first.read_bytes() == second.read_bytes()


def test_bad_rows_reach_the_deadletter_table_and_the_rest_the_trades(pipeline: Settings, tmp_path: Path) -> None:
    """Rows read = published + repeats + dead letters, each dead letter with its file, line, reason and bytes."""
    good = [f"{i},5.5,1,1,{1_723_161_255_342 + i},True,True" for i in range(100)]
    path = tmp_path / "bad.csv"
    path.write_text(
        "\n".join([*good[:50], "50,NaN,1,1,1723161255392,True,True", *good[50:], good[7], "100,5.5,0,1,1723161255442,True,True"])
    )
    summary = _replay(pipeline, path, "binance", "BAD-USDT")
    assert (summary.rows, summary.published, summary.duplicates, summary.deadlettered) == (103, 100, 1, 2)
    assert summary.reasons == {"bad_price": 1, "bad_size": 1}
    assert _exported(pipeline, "trades", "binance", "BAD-USDT", tmp_path).height == 100
    client = connect(pipeline.clickhouse)
    for _ in range(100):
        letters = client.query("SELECT reason, place, raw, component FROM deadletter WHERE symbol = 'BAD-USDT' ORDER BY place").result_rows
        if len(letters) == 2:
            break
        time.sleep(0.1)
    client.close()
    assert [(reason, place, component) for reason, place, _, component in letters] == [
        ("bad_size", f"{path}:103", "replay"),
        ("bad_price", f"{path}:51", "replay"),
    ]
    assert str(letters[1][2]).find("NaN") > 0


def test_a_truncated_file_is_stored_up_to_its_break(pipeline: Settings, tmp_path: Path) -> None:
    """Exit code 7, what was published is stored, and the message says what is missing."""
    rows = "".join(f"{i},5.5,1,1,{1_723_161_255_342 + i},True,True\n" for i in range(30_000)).encode()
    path = tmp_path / "cut.csv.gz"
    data = gzip.compress(rows)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(TruncatedFileError, match="ends early: .* rows before were read, everything from this line on is missing") as caught:
        _replay(pipeline, path, "binance", "CUT-USDT")
    assert caught.value.exit_code == 7
    summary = caught.value.summary
    assert 10_000 < summary.published < 30_000
    assert _exported(pipeline, "trades", "binance", "CUT-USDT", tmp_path)["trade_id"].to_list() == list(range(summary.published))


def test_frames_in_the_topic_are_those_of_the_file_and_the_last_ends_the_source(pipeline: Settings, tmp_path: Path) -> None:
    """All in the symbol's partition, watermarks never back, END_OF_SOURCE once, on the last."""
    from confluent_kafka import Consumer

    rows = "".join(f"{i},5.5,1,1,{1_723_161_255_342 + i},True,True\n" for i in range(9_000))
    path = tmp_path / "x.csv"
    path.write_text(rows)
    partition = partition_of("binance:TOP-USDT", pipeline.kafka.partitions)
    before = end_offsets(pipeline.kafka, ["trades"])["trades"]
    _replay(pipeline, path, "binance", "TOP-USDT")
    after = end_offsets(pipeline.kafka, ["trades"])["trades"]
    assert {number for number in after if after[number] > before[number]} == {partition}
    consumer = Consumer(consumer_config(pipeline.kafka, "test-frames"))
    consumer.assign([TopicPartition("replay.trades", partition, before[partition])])
    codec = FrameCodec("trades", 0)
    frames = []
    while len(frames) < after[partition] - before[partition]:
        message = consumer.poll(10)
        assert message is not None
        assert message.error() is None
        value = message.value()
        frames.append(codec.decode(bytes(5) + value[5:]))
    consumer.close()
    assert [frame.row_count for frame in frames] == [4_000, 4_000, 1_000, 0]
    assert [frame.flags for frame in frames] == [0, 0, 0, END_OF_SOURCE]
    assert len({frame.source for frame in frames}) == 1
    assert [frame.watermark_us for frame in frames] == sorted(frame.watermark_us for frame in frames)


def test_words_and_files_are_refused_before_anything_is_published(pipeline: Settings, tmp_path: Path) -> None:
    """Settings errors (2) and input errors (7); the topic does not grow; strict refuses a bad row."""
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    good.write_text("1,5.5,1,1,1723161255342,True,True\n")
    bad.write_text("1,5.5,1,1,1723161255342,True,True\n2,0,1,1,1723161255342,True,True\n")
    before = end_offsets(pipeline.kafka, ["trades", "deadletter"])
    for path, change, error, message in (
        (good, {"exchange": "binanse"}, SettingsError, "did you mean 'binance'"),
        (good, {"symbol": "btcusdt"}, SettingsError, "not a canonical symbol|No trades|BTC"),
        (good, {"format": "csv"}, SettingsError, "Unknown format 'csv'"),
        (good, {"speed": "fast"}, SettingsError, "is no speed"),
        (tmp_path / "none.csv", {}, InputFileError, "does not exist"),
        (bad, {"strict": True}, InputFileError, "line 2: The price"),
    ):
        options = {"exchange": "binance", "symbol": "NOT-USDT", **change}
        if "symbol" in change:
            options["symbol"] = "btc/usdt"
        with pytest.raises(error, match=message):
            asyncio.run(replay_file(pipeline, path, **options))
    assert end_offsets(pipeline.kafka, ["trades", "deadletter"]) == before
    with pytest.raises(NothingFoundError):
        _exported(pipeline, "trades", "binance", "NOT-USDT", tmp_path)


def test_without_a_stack_the_broker_is_named(tmp_path: Path) -> None:
    """Exit code 6, at once."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    path = tmp_path / "x.csv"
    path.write_text("1,5.5,1,1,1723161255342,True,True\n")
    settings = load_settings({"MARKETSTREAM_CONFIG": ""}, overrides={"kafka.bootstrap": f"127.0.0.1:{port}"})
    with pytest.raises(UnreachableError, match=f"Kafka at 127.0.0.1:{port} does not answer"):
        _replay(settings, path, "binance", "BTC-USDT")
