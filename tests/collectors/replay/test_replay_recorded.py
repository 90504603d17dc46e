"""Recorded market data replayed whole: the counts and ids of the manifest, and values as another parser reads them."""

from __future__ import annotations

import gzip
import json

import numpy as np
import polars as pl
import pytest
from replay_files import recorded, replay

from schemas.frames import END_OF_SOURCE
from schemas.symbols import Instrument

CAPTURES = [
    # file, exchange, symbol, trades, first id
    ("spot_btcusdt_20240808", "binance", "BTC-USDT", 9_757, 3735683259),
    ("spot_btcusdt_20240809", "binance", "BTC-USDT", 10_147, 3735693016),
    ("spot_ethusdt_20240808", "binance", "ETH-USDT", 6_106, 0),
    ("spot_ethusdt_20240809", "binance", "ETH-USDT", 8_409, 0),
    ("usdm_btcusdt_20240808", "binance-usdm", "BTC-USDT-PERP", 21_313, 0),
]


@pytest.mark.parametrize(("name", "exchange", "symbol", "count", "first_id"), CAPTURES)
async def test_capture_gives_every_trade_of_the_manifest_once(name: str, exchange: str, symbol: str, count: int, first_id: int) -> None:
    """A recorded connection yields exactly its trades, ids without a gap, values as the json module reads them."""
    path = recorded(f"ws/binance/{name}.ws.gz")
    result = await replay(path, Instrument(exchange, symbol))
    assert (result.replay.format, result.stats.published, result.stats.rejected, result.stats.late) == ("binance-ws", count, 0, 0)
    assert result.stats.last_id - result.stats.first_id + 1 == count
    assert not first_id or result.stats.first_id == first_id
    lines = [line.split(" ", 1) for line in gzip.decompress(path.read_bytes()).decode().splitlines() if '"e":"trade"' in line]
    trades = sorted(((json.loads(text)["data"], int(stamp)) for stamp, text in lines), key=lambda item: (item[0]["T"], item[0]["t"]))
    expected = {
        "trade_id": [trade["t"] for trade, _ in trades],
        "price": [float(trade["p"]) for trade, _ in trades],
        "size": [float(trade["q"]) for trade, _ in trades],
        "side": [-1 if trade["m"] else 1 for trade, _ in trades],
        "exchange_time_us": [trade["T"] * 1000 for trade, _ in trades],
        "receive_time_us": [stamp // 1000 for _, stamp in trades],
    }
    for column, values in expected.items():
        assert result.columns[column].tolist() == values, column
    assert [frame.flags for frame in result.frames] == [0] * (len(result.frames) - 1) + [END_OF_SOURCE]


async def test_capture_of_many_pairs_gives_the_one_asked_for() -> None:
    """The ten pairs of a cryptofeed capture hold 1,240 aggTrades; each replay takes its own and counts the others as skipped."""
    path = recorded("ws/cryptofeed/BINANCE-20210405.0.gz")
    pairs = ["BTC-AUD", "MANA-USDT", "ETH-BRL", "DENT-USDT", "ZIL-USDT", "BTCST-USDT", "QTUM-ETH", "AXS-BNB"]
    total = 0
    for symbol in pairs:
        result = await replay(path, Instrument("binance", symbol))
        assert result.stats.published + result.stats.skipped == 1_240
        assert result.ids == list(range(result.stats.first_id, result.stats.last_id + 1))
        total += result.stats.published
    assert total == 1_240


async def test_cryptofeed_capture_keeps_its_receive_time_to_the_microsecond() -> None:
    """Seconds with six decimals become microseconds exactly."""
    result = await replay(recorded("ws/cryptofeed/BINANCE.ws.1.0.gz"), Instrument("binance", "NKN-USDT"))
    assert result.ids == [15683430]
    assert result.columns["receive_time_us"].tolist() == [1633998523957215]
    assert result.columns["price"].tolist() == [0.3528]


async def test_futures_capture_of_perpetuals() -> None:
    """91 aggTrades of four perpetuals, of which 38 are CTKUSDT's."""
    result = await replay(recorded("ws/cryptofeed/BINANCE_FUTURES.ws.1.0.gz"), Instrument("binance-usdm", "CTK-USDT-PERP"))
    assert (result.stats.published, result.stats.skipped) == (38, 53)


async def test_kraken_rest_reply_gives_its_thousand_trades() -> None:
    """Kraken's Trades reply: XBTUSDT is BTC-USDT, seconds with a fraction become microseconds, b and s are the taker's side."""
    path = recorded("trades/kraken_XBTUSDT_trades.json.gz")
    result = await replay(path, Instrument("kraken", "BTC-USDT"))
    rows = json.loads(gzip.decompress(path.read_bytes()), parse_float=str)["result"]["XBTUSDT"]
    assert (result.replay.format, result.stats.published) == ("kraken-rest", 1_000)
    assert result.ids == [row[6] for row in rows]
    assert result.columns["price"].tolist() == [float(row[0]) for row in rows]
    assert result.columns["side"].tolist() == [1 if row[3] == "b" else -1 for row in rows]
    whole = [row[2].partition(".") for row in rows]
    assert result.columns["exchange_time_us"].tolist() == [int(a) * 1_000_000 + int((b + "000000")[:6]) for a, _, b in whole]


async def test_parquet_of_binance_trades() -> None:
    """A Parquet file with timestamp, quantity and a textual buyer_maker."""
    path = recorded("trades/binance_BTCUSDT_trades_20210108.parquet")
    result = await replay(path)
    frame = pl.read_parquet(path).sort("timestamp", "trade_id")
    assert (result.replay.format, result.stats.published) == ("binance-trades", 2_001)
    assert result.ids == frame["trade_id"].to_list()
    np.testing.assert_array_equal(result.columns["price"], frame["price"].to_numpy())
    np.testing.assert_array_equal(result.columns["exchange_time_us"], frame["timestamp"].dt.epoch("us").to_numpy())
    np.testing.assert_array_equal(result.columns["receive_time_us"], result.columns["exchange_time_us"])
    np.testing.assert_array_equal(result.columns["side"] == -1, (frame["buyer_maker"] == "True").to_numpy())
