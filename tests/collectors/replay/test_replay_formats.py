"""Every layout of a dump, every wrapping of a file, and the exports of our own."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replay_files import BTC, T0_MS, dump, replay, write

from collectors.replay.detect import Reader
from collectors.replay.layout import EXPORT_COLUMNS
from collectors.replay.rows import TRADE_DTYPES
from schemas.frames import concat_columns
from schemas.symbols import Instrument

LAYOUTS = {
    "spot trades": (None, "7,61837.5,0.5,30918.75,{t},True,True", "binance-trades"),
    "spot trades with header": (
        "id,price,qty,quoteQty,time,isBuyerMaker,isBestMatch",
        "7,61837.5,0.5,30918.75,{t},True,True",
        "binance-trades",
    ),
    "futures trades": (None, "7,61837.5,0.5,30918.75,{t},true", "binance-trades"),
    "futures trades with header": ("id,price,qty,quote_qty,time,is_buyer_maker", "7,61837.5,0.5,30918.75,{t},true", "binance-trades"),
    "spot aggTrades": (None, "7,61837.5,0.5,11,12,{t},True,True", "binance-aggtrades"),
    "spot aggTrades by letters": ("a,p,q,f,l,T,m,M", "7,61837.5,0.5,11,12,{t},True,False", "binance-aggtrades"),
    "futures aggTrades": (None, "7,61837.5,0.5,11,12,{t},true", "binance-aggtrades"),
    "futures aggTrades with header": (
        "agg_trade_id,price,quantity,first_trade_id,last_trade_id,transact_time,is_buyer_maker",
        "7,61837.5,0.5,11,12,{t},true",
        "binance-aggtrades",
    ),
}


@pytest.mark.parametrize("unit", [1, 1000], ids=["ms", "us"])
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_every_layout_of_a_dump_is_recognised(tmp_path: Path, layout: str, unit: int) -> None:
    """Spot and futures, trades and aggTrades, with and without header, ms and us give the same trade."""
    header, row, kind = LAYOUTS[layout]
    path = write(tmp_path / "x.csv", ([header] if header else []) + [row.format(t=T0_MS * unit)])
    result = await replay(path)
    assert result.replay.format == kind
    assert {name: column.tolist() for name, column in result.columns.items()} == {
        "symbol_code": [0],
        "trade_id": [7],
        "price": [61837.5],
        "size": [0.5],
        "side": [-1],
        "exchange_time_us": [T0_MS * 1000],
        "receive_time_us": [T0_MS * 1000],
    }
    assert (await replay(path, format_name=kind)).ids == [7]


@pytest.mark.parametrize(
    "wrapping", ["plain", "gz", "gz of two members", "zip", "gz without its name", "windows lines", "BOM", "no last newline", "blank lines"]
)
async def test_every_wrapping_gives_the_same_rows(tmp_path: Path, wrapping: str) -> None:
    """Compression is told by content; line ends and byte order marks do not matter."""
    lines = dump(50)
    data = "".join(line + "\n" for line in lines).encode()
    path = tmp_path / "x.csv"
    if wrapping == "gz":
        path = tmp_path / "x.csv.gz"
        path.write_bytes(gzip.compress(data))
    elif wrapping == "gz of two members":
        cut = data.index(b"\n", 700) - 10
        path.write_bytes(gzip.compress(data[:cut]) + gzip.compress(data[cut:]) + b"\0" * 512)
    elif wrapping == "gz without its name":
        path.write_bytes(gzip.compress(data))
    elif wrapping == "zip":
        path = tmp_path / "x.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.mkdir("folder")
            archive.writestr("folder/x.csv", data)
    else:
        changed = {
            "windows lines": data.replace(b"\n", b"\r\n"),
            "BOM": b"\xef\xbb\xbf" + data,
            "no last newline": data[:-1],
            "blank lines": b"\n" + data.replace(b"\n", b"\n \r\n\n", 7),
        }
        path.write_bytes(changed.get(wrapping, data))
    result = await replay(path)
    assert result.ids == list(range(100, 150))
    assert result.columns["side"].tolist() == [1, -1] * 25
    assert (result.stats.rows, result.stats.problem) == (50, None)


async def test_spot_file_across_the_day_its_unit_changed(tmp_path: Path) -> None:
    """2024 in ms and 2025 in us, joined in one file, are both read; the same mix within one year is not."""
    end_of_2024_ms = 1_735_689_599_999
    rows = [f"1,5.0,1.0,5.0,{end_of_2024_ms},True,True", f"2,5.0,1.0,5.0,{(end_of_2024_ms + 1) * 1000},True,True"]
    assert (await replay(write(tmp_path / "a.csv", rows))).columns["exchange_time_us"].tolist() == [
        end_of_2024_ms * 1000,
        (end_of_2024_ms + 1) * 1000,
    ]
    assert (await replay(write(tmp_path / "b.csv", rows[::-1]))).ids == [1, 2]


async def test_coin_margined_dump_gives_base_units(tmp_path: Path) -> None:
    """COIN-M counts contracts in qty; the size is base_qty."""
    path = write(tmp_path / "x.csv", ["id,price,qty,base_qty,time,is_buyer_maker", f"7,61837.5,3,0.00485,{T0_MS},true"])
    assert (await replay(path, Instrument("binance-coinm", "BTC-USD-PERP"))).columns["size"].tolist() == [0.00485]


async def test_bare_frames_take_the_exchange_time_as_receive_time(tmp_path: Path) -> None:
    """A file of frames alone, with or without the combined stream's wrapper."""
    event = {"e": "trade", "E": T0_MS + 1, "s": "BTCUSDT", "t": 7, "p": "61837.63000000", "q": "0.02", "T": T0_MS, "m": True, "M": True}
    lines = [json.dumps(event), json.dumps({"stream": "btcusdt@trade", "data": {**event, "t": 8}}), '{"result":null,"id":1}']
    result = await replay(write(tmp_path / "x.jsonl", lines))
    assert result.ids == [7, 8]
    assert result.columns["receive_time_us"].tolist() == [T0_MS * 1000] * 2


async def test_single_trades_are_preferred_to_aggregates_of_them(tmp_path: Path) -> None:
    """A capture of both streams gives the trades once, not twice; the aggregates count as skipped."""
    trade = {"e": "trade", "s": "BTCUSDT", "t": 7, "p": "5", "q": "1", "T": T0_MS, "m": True}
    aggregate = {"e": "aggTrade", "s": "BTCUSDT", "a": 3, "f": 7, "l": 7, "p": "5", "q": "1", "T": T0_MS, "m": True}
    lines = [f"{T0_MS}000000 " + json.dumps({"stream": "x", "data": data}) for data in (aggregate, trade)]
    result = await replay(write(tmp_path / "x.ws", lines))
    assert (result.ids, result.stats.skipped) == ([7], 1)


def _export(count: int = 20) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "exchange": ["binance"] * count,
            "symbol": ["BTC-USDT"] * count,
            "trade_id": range(count),
            "price": [61837.63 + i / 7 for i in range(count)],
            "size": [1e-8 * (i + 1) for i in range(count)],
            "side": ["buy", "sell"] * (count // 2),
            "exchange_time_us": [T0_MS * 1000 + i * 977 for i in range(count)],
            "receive_time_us": [T0_MS * 1000 + i * 977 - 1_250_000 for i in range(count)],
        }
    )


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "parquet", "arrow"])
async def test_our_own_export_reads_back_bit_equal(tmp_path: Path, kind: str) -> None:
    """What `export trades` writes is replayed with every bit, receive times included."""
    frame, path = _export(), tmp_path / f"x.{kind}"
    if kind == "parquet":
        frame.write_parquet(path)
    elif kind == "arrow":
        frame.write_ipc(path, compat_level=pl.CompatLevel.oldest())
    elif kind == "csv":
        frame.write_csv(path)
    else:
        path.write_bytes(gzip.compress(frame.write_csv().encode()))
    result = await replay(path)
    assert result.replay.format == "marketstream"
    assert tuple(frame.columns) == EXPORT_COLUMNS
    for name in ("trade_id", "price", "size", "exchange_time_us", "receive_time_us"):
        assert result.columns[name].tolist() == frame[name].to_list(), name
    assert result.columns["side"].tolist() == [1, -1] * 10


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prices=st.lists(
        st.floats(1e-12, 1e15, exclude_min=True) | st.decimals("0.00000001", 10**9, places=8).map(float), min_size=1, max_size=40
    ),
    block_bytes=st.integers(1, 4000),
    bad_every=st.integers(0, 7),
)
def test_any_block_size_gives_the_same_rows_and_python_s_floats(
    tmp_path: Path, prices: list[float], block_bytes: int, bad_every: int
) -> None:
    """Cutting the file anywhere changes nothing, and a price is the float64 Python reads from the same text."""
    lines = []
    for number, price in enumerate(prices):
        price_text = "nan" if bad_every and number % bad_every == 0 else repr(price)
        lines.append(f"{number},{price_text},0.5,1,{T0_MS + number},True,True")
    path = write(tmp_path / "x.csv", [*dump(1, start=10_000), *lines])

    def read(size: int) -> tuple[dict[str, list[float]], list[tuple[int, str, bytes]]]:
        blocks = list(Reader(path, BTC, block_bytes=size).blocks())
        columns = concat_columns([block.columns for block in blocks])
        return {name: columns[name].tolist() for name in TRADE_DTYPES}, [
            (item.line, item.reason, item.raw) for block in blocks for item in block.rejected
        ]

    columns, rejected = read(block_bytes)
    assert (columns, rejected) == read(1 << 20)
    good = [price for number, price in enumerate(prices) if not (bad_every and number % bad_every == 0)]
    assert columns["price"][1:] == good
    assert [line for line, _, _ in rejected] == [number + 2 for number in range(len(prices)) if bad_every and number % bad_every == 0]
