"""Exports from the real ClickHouse engine: columns, order, bits, newest revisions, and what is said when there is nothing."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from collectors.replay.detect import Reader
from infra import export as module
from infra.clickhouse.client import apply_schema, connect
from infra.errors import SettingsError, UnreachableError
from infra.export import BAR_COLUMNS, TRADE_COLUMNS, NothingFoundError, OutputFileError, export
from infra.settings import Settings, load_settings
from schemas.frames import concat_columns
from schemas.symbols import Instrument

pytestmark = pytest.mark.integration

T0_US = 1_723_161_255_342_000
COUNT = 10_000
READERS = {"csv": pl.read_csv, "parquet": pl.read_parquet, "arrow": pl.read_ipc}


def _settings(port: int) -> Settings:
    return load_settings(environ={}, overrides={"ports.clickhouse": str(port)})


@pytest.fixture(scope="module")
def clickhouse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """An engine of our own with our tables, on a port the system gives."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "infra.stack.clickhouse_server",
        "--path",
        str(tmp_path_factory.mktemp("clickhouse")),
        "--port",
        str(port),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ping", trust_env=False).is_success:
                    break
            except httpx.HTTPError:
                time.sleep(0.1)
        settings = _settings(port)
        apply_schema(settings.clickhouse)
        client = connect(settings.clickhouse)
        client.insert_arrow("trades", _trades().to_arrow(compat_level=pl.CompatLevel.oldest()))
        client.insert_arrow("bars", _bars().to_arrow(compat_level=pl.CompatLevel.oldest()))
        client.close()
        yield settings
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _trades() -> pl.DataFrame:
    """Trades of two symbols in a random order; ids and times run together."""
    rng = np.random.default_rng(7)
    ids = np.arange(COUNT)
    one = pl.DataFrame(
        {
            "exchange": ["binance"] * COUNT,
            "symbol": ["BTC-USDT"] * COUNT,
            "trade_id": ids,
            "price": rng.lognormal(10, 1, COUNT),
            "size": rng.lognormal(-10, 5, COUNT),
            "side": rng.choice(np.array([1, -1], np.int8), COUNT),
            "exchange_time_us": T0_US + ids * 1_000,
            "receive_time_us": T0_US + ids * 1_000 - 1_250_000,
            "kafka_partition": np.zeros(COUNT, np.uint16),
            "kafka_offset": (ids // 100).astype(np.uint64),
            "known_at_us": T0_US + ids // 100,
        }
    )
    return pl.concat([one, one.with_columns(symbol=pl.lit("ETH-USDT")).head(10)]).sample(fraction=1, shuffle=True, seed=3)


def _bars() -> pl.DataFrame:
    """1,000 minutes: each with two live updates and a final bar; every tenth also revised."""
    rows: list[dict[str, Any]] = []
    for minute in range(1_000):
        states = [(0, 0, 1.0), (0, 0, 2.0), (0, 1, 3.0)] + ([(1, 1, 4.0 + minute / 7)] if minute % 10 == 0 else [])
        for turn, (revision, is_final, volume) in enumerate(states):
            rows.append(_bar(minute, revision, is_final, volume, offset=minute * 10 + turn))
    rows.append(_bar(1_000, 0, 0, 1.0, offset=20_001))
    rows.append(_bar(1_000, 0, 0, 1.5, offset=20_002))  # the open bar: its newest live update
    return (
        pl.DataFrame(rows)
        .sample(fraction=1, shuffle=True, seed=5)
        .with_columns(
            pl.col("timeframe_s", "revision").cast(pl.Int32),
            pl.col("is_final", "complete").cast(pl.Int8),
            pl.col("kafka_partition").cast(pl.UInt16),
            pl.col("kafka_offset").cast(pl.UInt64),
        )
    )


def _bar(minute: int, revision: int, is_final: int, volume: float, *, offset: int) -> dict[str, Any]:
    start = 1_723_161_240_000_000 + minute * 60_000_000
    return {
        "exchange": "binance", "symbol": "BTC-USDT", "timeframe_s": 60, "open_time_us": start, "close_time_us": start + 60_000_000,
        "open": 1.1, "high": 3.3, "low": 0.1, "close": 2.2, "volume": volume, "quote_volume": volume / 3, "buy_volume": volume / 7,
        "trade_count": 5, "vwap": 1 / 3, "first_trade_id": minute, "last_trade_id": minute + 1, "revision": revision, "is_final": is_final,
        "complete": 1, "last_receive_time_us": start, "input_offset": offset, "kafka_partition": 0, "kafka_offset": offset,
        "known_at_us": T0_US + offset,
    }  # fmt: skip


@pytest.mark.parametrize("file_format", list(READERS))
def test_trades_come_by_id_and_read_back_bit_equal(
    clickhouse: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    """Exactly the columns of the interface, in pages that do not show."""
    monkeypatch.setattr(module, "PAGE_ROWS", 999)
    path, told = tmp_path / f"x.{file_format}", []
    path.write_text("an older file")
    summary = export(
        clickhouse,
        "trades",
        exchange="binance",
        symbol="BTC-USDT",
        output=path,
        file_format=file_format,
        progress=lambda rows, total: told.append((rows, total)),
    )
    expected = _trades().filter(pl.col.symbol == "BTC-USDT").sort("trade_id").select(TRADE_COLUMNS)
    words = expected.with_columns(side=pl.when(pl.col.side == 1).then(pl.lit("buy")).otherwise(pl.lit("sell")))
    assert_frame_equal(READERS[file_format](path), words, check_exact=True)
    assert (summary.rows, summary.size_bytes) == (COUNT, path.stat().st_size)
    assert told[0] == (999, COUNT)
    assert told[-1] == (COUNT, COUNT)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("file_format", list(READERS))
def test_an_export_is_replayed_to_the_same_rows(clickhouse: Settings, tmp_path: Path, file_format: str) -> None:
    """Export -> replay: every bit of every column, in every format."""
    path = tmp_path / f"x.{file_format}"
    export(clickhouse, "trades", exchange="binance", symbol="BTC-USDT", output=path, file_format=file_format)
    reader = Reader(path, Instrument("binance", "BTC-USDT"))
    columns = concat_columns([block.columns for block in reader.blocks()])
    expected = _trades().filter(pl.col.symbol == "BTC-USDT").sort("trade_id")
    assert reader.format == "marketstream"
    for name, column in columns.items():
        np.testing.assert_array_equal(column, expected[name].to_numpy(), err_msg=name)


@pytest.mark.parametrize("file_format", list(READERS))
def test_bars_come_in_their_newest_revision(
    clickhouse: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    """A revised bar replaces the final one, a final one the live updates, the last live update those before it."""
    monkeypatch.setattr(module, "PAGE_ROWS", 77)
    path = tmp_path / f"x.{file_format}"
    assert (
        export(clickhouse, "bars", exchange="binance", symbol="BTC-USDT", timeframe="1m", output=path, file_format=file_format).rows
        == 1_001
    )
    frame = READERS[file_format](path)
    newest = _bars().sort("open_time_us", "revision", "is_final", "kafka_offset").group_by("open_time_us", maintain_order=True).last()
    assert_frame_equal(frame, newest.select(BAR_COLUMNS), check_exact=True, check_dtypes=file_format != "csv")
    assert frame["volume"][0] == 4.0
    assert frame["volume"][1] == 3.0
    assert frame.row(-1, named=True)["volume"] == 1.5


def test_known_at_shows_the_revisions_of_that_time(clickhouse: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each version of a bar is kept: before its revision was published the earlier one is the newest, and later rows are not there."""
    monkeypatch.setattr(module, "PAGE_ROWS", 77)
    path = tmp_path / "x.parquet"
    ask: dict[str, Any] = {"exchange": "binance", "symbol": "BTC-USDT", "output": path, "file_format": "parquet"}
    for known in (2, 3, 5_002, 5_003, 20_002):
        summary = export(clickhouse, "bars", **ask, known_at_us=T0_US + known)
        newest = _bars().filter(pl.col.kafka_offset <= known).sort("open_time_us", "revision", "is_final", "kafka_offset")
        expected = newest.group_by("open_time_us", maintain_order=True).last().select(BAR_COLUMNS)
        assert summary.rows == expected.height
        assert_frame_equal(pl.read_parquet(path), expected, check_exact=True)
    assert export(clickhouse, "trades", **ask, known_at_us=T0_US + 9).rows == 1_000
    assert pl.read_parquet(path)["trade_id"].to_list() == list(range(1_000))
    with pytest.raises(NothingFoundError, match=r"No trades of binance BTC-USDT were known at 2024-.*: move --known-at\."):
        export(clickhouse, "trades", **ask, known_at_us=T0_US - 1)


def test_a_range_holds_its_start_and_not_its_end(clickhouse: Settings, tmp_path: Path) -> None:
    """[start, end) by exchange time of trades and open time of bars."""
    path = tmp_path / "x.csv"
    export(clickhouse, "trades", exchange="binance", symbol="BTC-USDT", output=path, start_us=T0_US + 10_000, end_us=T0_US + 20_000)
    assert pl.read_csv(path)["trade_id"].to_list() == list(range(10, 20))
    start = 1_723_161_240_000_000
    export(clickhouse, "bars", exchange="binance", symbol="BTC-USDT", output=path, start_us=start + 60_000_000, end_us=start + 180_000_000)
    assert pl.read_csv(path)["first_trade_id"].to_list() == [1, 2]


NOTHING = [
    (("trades", {"symbol": "BTC-USDC"}), r"No trades of binance BTC-USDC are stored: did you mean binance BTC-USDT\?"),
    (("bars", {"timeframe": "1h"}), r"No bars of binance BTC-USDT of that timeframe are stored; there are 1m\."),
    (("trades", {"end_us": T0_US}), r"lie in that range; those stored go from 2024-08-08T23:54:15\.342000Z to .*: move --start or --end"),
]


@pytest.mark.parametrize(("call", "message"), NOTHING)
def test_nothing_found_says_what_there_is(clickhouse: Settings, tmp_path: Path, call: tuple[str, dict[str, Any]], message: str) -> None:
    """No file is written, and the sentence names what to ask for instead."""
    path = tmp_path / "x.csv"
    with pytest.raises(NothingFoundError, match=message):
        export(clickhouse, call[0], **{"exchange": "binance", "symbol": "BTC-USDT", "output": path, **call[1]})
    assert not path.exists()


def test_words_that_are_none(clickhouse: Settings, tmp_path: Path) -> None:
    """Unknown exchange, timeframe, format, symbol and a range that runs backwards name the nearest known word or the remedy."""
    good: dict[str, Any] = {"exchange": "binance", "symbol": "BTC-USDT", "output": tmp_path / "x.csv"}
    for change, message in (
        ({"exchange": "binanse"}, "did you mean 'binance'"),
        ({"timeframe": "1min"}, "did you mean '1m'"),
        ({"file_format": "cvs"}, "did you mean 'csv'"),
        ({"symbol": "btc/usdt"}, "did you mean 'BTC-USDT'"),
        ({"start_us": T0_US, "end_us": T0_US}, "is not before the end"),
    ):
        with pytest.raises(SettingsError, match=message):
            export(clickhouse, "bars", **{**good, **change})


def test_a_file_that_cannot_be_written(clickhouse: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, a folder that is not there, a full disk: one sentence, and an older file stays as it was."""
    ask: dict[str, Any] = {"exchange": "binance", "symbol": "BTC-USDT"}
    with pytest.raises(OutputFileError, match="is a folder; name a file in it"):
        export(clickhouse, "trades", **ask, output=tmp_path)
    with pytest.raises(OutputFileError, match="does not exist; create it"):
        export(clickhouse, "trades", **ask, output=tmp_path / "no" / "x.csv")
    path = tmp_path / "x.csv"
    path.write_text("older")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(Exception, match="is full; nothing was written there") as caught:
        export(clickhouse, "trades", **ask, output=path)
    assert caught.value.exit_code == 5  # type: ignore[attr-defined]
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_server_the_url_is_named(tmp_path: Path) -> None:
    """Exit code 6."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(UnreachableError, match=f"ClickHouse at http://127.0.0.1:{port} does not answer"):
        export(_settings(port), "trades", exchange="binance", symbol="BTC-USDT", output=tmp_path / "x.csv")
