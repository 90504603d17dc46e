"""Files that are not what they should be: one sentence that names file, line, trouble and remedy, and no row lost."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import polars as pl
import pyarrow.parquet
import pytest
from replay_files import BTC, T0_MS, FakeClock, dump, recorded, replay, write

from collectors.replay.detect import Reader
from collectors.replay.errors import FileAccessError, FormatError, NoRowsError, ReplayError, StrictError, TruncatedError
from collectors.replay.feed import Replay
from collectors.replay.pacing import parse_speed
from schemas.errors import VocabularyError
from schemas.frames import END_OF_SOURCE
from schemas.symbols import Instrument

# Structural: refused before anything is given out.


def _zip(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "\n".join(dump()))
    return path


def _bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _frame(path: Path, **columns: object) -> Path:
    pl.DataFrame(columns).write_parquet(path)
    return path


REFUSED = {
    "missing": (lambda d: d / "nowhere.csv", FileAccessError, "does not exist; check the name"),
    "folder": (lambda d: d, FileAccessError, "is a folder; name a file in it"),
    "empty": (lambda d: _bytes(d / "x.csv", b""), NoRowsError, "is empty"),
    "blank": (lambda d: _bytes(d / "x.csv", b"\n\n  \n"), NoRowsError, "is empty"),
    "header only": (lambda d: write(d / "x.csv", ["id,price,qty,quote_qty,time,is_buyer_maker"]), NoRowsError, "holds no trade at all"),
    "empty gzip": (lambda d: _bytes(d / "x.gz", gzip.compress(b"")), NoRowsError, "is empty"),
    "named gz": (lambda d: write(d / "x.csv.gz", dump()), FormatError, r"is named \.gz but does not begin like one .* rename it"),
    "named zip": (lambda d: _bytes(d / "x.zip", b"<html>404</html>"), FormatError, r"is named \.zip but"),
    "gzip header only": (lambda d: _bytes(d / "x.gz", gzip.compress(b"1,2,3")[:8]), TruncatedError, "the gzip stream ends early"),
    "zip of several": (lambda d: _zip(d / "x.zip", ["a.csv", "b.csv"]), FormatError, r"holds 2 files \(a.csv, b.csv\); unpack it"),
    "zip of none": (lambda d: _zip(d / "x.zip", []), FormatError, "zip archive without a member"),
    "zip cut off": (
        lambda d: _bytes(d / "x.zip", _zip(d / "y.zip", ["a.csv"]).read_bytes()[:-30]),
        FormatError,
        "broken or incomplete zip",
    ),
    "zstd": (lambda d: _bytes(d / "x.zst", b"\x28\xb5\x2f\xfd" + b"\0" * 9), FormatError, "zstd -d"),
    "binary": (lambda d: _bytes(d / "x.csv", bytes(range(256)) * 40), FormatError, "is no text"),
    "prose": (lambda d: write(d / "x.txt", ["Dear reader"]), FormatError, "line 1: begins with 'Dear reader'"),
    "candles": (
        lambda d: write(d / "x.csv", ["open_time,open,high,low,close,volume", "1,2,3,4,5,6"]),
        FormatError,
        "line 1: the columns are open_time, open, .*price, size, time is missing",
    ),
    "headless candles": (lambda d: write(d / "x.csv", [f"{T0_MS},1,2,3,4,5,6"]), FormatError, "has 7 column"),
    "seconds": (
        lambda d: write(d / "x.csv", [f"{i},5,1,5,{T0_MS // 1000},True,True" for i in range(3)]),
        FormatError,
        "the times are in seconds .* milliseconds or microseconds",
    ),
    "nanoseconds": (
        lambda d: write(d / "x.csv", [f"{i},5,1,5,{T0_MS}000000,True,True" for i in range(3)]),
        FormatError,
        "the times are in nanoseconds",
    ),
    "no times": (
        lambda d: write(d / "x.csv", [f"{i},5,1,5,{i},True,True" for i in range(3)]),
        FormatError,
        "no times between 2009 and 2100",
    ),
    "export in ms": (
        lambda d: write(
            d / "x.csv",
            ["exchange,symbol,trade_id,price,size,side,exchange_time_us,receive_time_us", f"binance,BTC-USDT,1,5,1,buy,{T0_MS},{T0_MS}"],
        ),
        FormatError,
        "the times are in milliseconds .* has microseconds",
    ),
    "other json": (lambda d: write(d / "x.json", ["[1, 2]"]), FormatError, "is JSON of no known kind"),
    "kraken error": (lambda d: write(d / "x.json", ['{"error":["EGeneral:Too many"],"result":{}}']), FormatError, "EGeneral:Too many"),
    "kraken candles": (lambda d: write(d / "x.json", ['{"error":[],"result":{"XBTUSDT":[[1,"5","5"]]}}']), None, ""),
    "kraken of another pair": (
        lambda d: write(d / "x.json", ['{"error":[],"result":{"ETHUSDT":[]}}']),
        NoRowsError,
        "holds no trade of BTC-USDT; it has ETHUSDT: name one",
    ),
    "parquet cut off": (
        lambda d: _bytes(d / "x.parquet", _frame(d / "y.parquet", a=[1]).read_bytes()[:-9]),
        FormatError,
        "damaged or incomplete Parquet",
    ),
    "parquet of other columns": (lambda d: _frame(d / "x.parquet", a=[1], b=[2]), FormatError, "the columns are a, b"),
    "parquet in seconds": (
        lambda d: _frame(d / "x.parquet", id=[1], price=[5.0], qty=[1.0], time=[T0_MS // 1000], is_buyer_maker=[True]),
        FormatError,
        "the times are in seconds",
    ),
    "parquet without rows": (lambda d: _frame(d / "x.parquet", id=[]), NoRowsError, "holds no row"),
    "capture of another pair": (
        lambda d: write(d / "x.ws", ['1723161254347673567 {"e":"trade","s":"ETHUSDT","t":1,"p":"5","q":"1","T":1723161255617,"m":true}']),
        NoRowsError,
        "holds no trade of BTC-USDT; it has ETHUSDT: name one of them with --symbol",
    ),
    "capture without trades": (
        lambda d: write(d / "x.ws", ['1723161254347673567 {"e":"depthUpdate"}']),
        NoRowsError,
        "holds no trade at all",
    ),
}


@pytest.mark.parametrize("case", [name for name, (_, error, _) in REFUSED.items() if error])
async def test_a_file_that_is_not_the_format_is_refused_with_one_sentence(tmp_path: Path, case: str) -> None:
    """Nothing is given out; the message names the file once, what is wrong and what to do."""
    make, error, message = REFUSED[case]
    assert error is not None
    path = make(tmp_path)
    with pytest.raises(error, match=message) as caught:
        await replay(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert len(text) < 500


async def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No permission is said as such; root may read everything, so the system call is made to refuse."""
    path = write(tmp_path / "x.csv", dump())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(FileAccessError, match="may not be read by this user; change its permissions"):
        Reader(path, BTC)


def test_the_wrong_format_by_name_says_which_it_is(tmp_path: Path) -> None:
    """--format binance-aggtrades for a dump of trades."""
    with pytest.raises(FormatError, match="is not binance-aggtrades but looks like binance-trades"):
        Reader(write(tmp_path / "x.csv", dump()), BTC, "binance-aggtrades")
    with pytest.raises(VocabularyError, match="did you mean 'binance-trades'"):
        Reader(tmp_path / "x.csv", BTC, "binance-trade")


def test_aggregates_that_count_contracts_are_refused(tmp_path: Path) -> None:
    """COIN-M aggTrades hold no base units."""
    path = write(tmp_path / "x.csv", [f"7,61837.5,3,11,12,{T0_MS},true"])
    with pytest.raises(FormatError, match="count contracts, not base units; replay the `trades` dump"):
        Reader(path, Instrument("binance-coinm", "BTC-USD-PERP"))


@pytest.mark.parametrize("speed", ["0", "-1", "fast", "nan", "inf", ""])
def test_a_speed_that_is_none(speed: str) -> None:
    """Zero, negative, words."""
    with pytest.raises(ValueError, match="is no speed: write max, 1"):
        parse_speed(speed)


# Single rows: dead-lettered with reason and line, the others go on.

BAD_ROWS = {
    "nan price": ("{i},NaN,1,5,{t},True,True", "bad_price"),
    "zero price": ("{i},0.00000000,1,5,{t},True,True", "bad_price"),
    "negative price": ("{i},-5,1,5,{t},True,True", "bad_price"),
    "infinite price": ("{i},inf,1,5,{t},True,True", "bad_price"),
    "price beyond float64": ("{i},1e999,1,5,{t},True,True", "bad_price"),
    "zero size": ("{i},5,0,5,{t},True,True", "bad_size"),
    "negative size": ("{i},5,-1,5,{t},True,True", "bad_size"),
    "nan size": ("{i},5,nan,5,{t},True,True", "bad_size"),
    "negative id": ("-{i},5,1,5,{t},True,True", "bad_id"),
    "time in seconds": ("{i},5,1,5,1723161255,True,True", "bad_time"),
    "time in us among ms": ("{i},5,1,5,{t}000,True,True", "bad_time"),
    "negative time": ("{i},5,1,5,-{t},True,True", "bad_time"),
    "word for a price": ("{i},five,1,5,{t},True,True", "malformed_row"),
    "word for a side": ("{i},5,1,5,{t},maybe,True", "malformed_row"),
    "id beyond int64": ("99999999999999999999,5,1,5,{t},True,True", "malformed_row"),
    "too few columns": ("{i},5,1", "malformed_row"),
    "too many columns": ("{i},5,1,5,{t},True,True,9", "malformed_row"),
    "cut in the middle": ("{i},5,1,5,17231", "malformed_row"),
    "no utf-8": (b"\xff\xfe,5,1,5,1,True,True", "malformed_row"),
    "nul bytes": (b"\0\0\0\0", "malformed_row"),
}


@pytest.mark.parametrize("position", [0, 2, 5], ids=["first", "middle", "last"])
@pytest.mark.parametrize("case", BAD_ROWS)
async def test_a_bad_row_is_rejected_and_the_others_go_on(tmp_path: Path, case: str, position: int) -> None:
    """The reason, the line and the row's bytes are kept, wherever the row stands."""
    text, reason = BAD_ROWS[case]
    bad = text if isinstance(text, bytes) else text.format(i=102, t=T0_MS).encode()
    lines: list[str | bytes] = [*dump()]
    lines.insert(position, bad)
    path = write(tmp_path / "x.csv", lines)
    if case == "nul bytes" and position == 0:
        with pytest.raises(FormatError, match="is no text"):  # a file that begins with NUL is refused as a whole
            await replay(path)
        return
    result = await replay(path)
    assert result.reasons == [(position + 1, reason)]
    assert result.rejected[0].raw == bad
    assert result.rejected[0].detail.endswith(".")
    assert result.ids == [100, 101, 102, 103, 104]
    assert (result.stats.rows, result.stats.reasons) == (6, {reason: 1})


async def test_strict_refuses_a_bad_row_before_anything_is_given_out(tmp_path: Path) -> None:
    """The first bad row is named with its line and what to do."""

    async def never(_: object) -> None:
        raise AssertionError

    path = write(tmp_path / "x.csv", [*dump(), "9,0,1,5,1723161255342,True,True"])
    made = Replay(path, BTC, clock=FakeClock(), on_rejected=never)
    with pytest.raises(StrictError, match=r"line 6: The price 0\.0 is not a number above 0\. .*without --strict"):
        made.refuse_bad_rows()


async def test_rows_of_another_symbol_in_an_export_are_rejected_by_name(tmp_path: Path) -> None:
    """A file of mixed symbols gives the one asked for; the others are dead letters, not losses."""
    head = "exchange,symbol,trade_id,price,size,side,exchange_time_us,receive_time_us"
    row = "{e},{s},{i},5.0,1.0,{side},1723161255342000,1723161255342000"
    lines = [
        row.format(e="binance", s="BTC-USDT", i=1, side="buy"),
        row.format(e="binance", s="ETH-USDT", i=2, side="buy"),
        row.format(e="kraken", s="BTC-USDT", i=3, side="sell"),
        row.format(e="binance", s="BTC-USDT", i=4, side="hold"),
        row.format(e="binance", s="BTC-USDT", i=5, side="sell"),
    ]
    path = write(tmp_path / "x.csv", [head, *lines])
    result = await replay(path)
    assert result.ids == [1, 5]
    assert result.reasons == [(3, "other_symbol"), (4, "other_symbol"), (5, "malformed_row")]
    assert "is of binance:ETH-USDT, the replay is of binance:BTC-USDT" in result.rejected[0].detail
    assert result.rejected[0].raw == lines[1].encode()


async def test_repeats_are_counted_and_left_out(tmp_path: Path) -> None:
    """An id that comes again, next to its first or much later, is published once."""
    lines = dump(6)
    result = await replay(write(tmp_path / "x.csv", [*lines, lines[5], *lines[1:3]]))
    assert result.ids == list(range(100, 106))
    assert (result.stats.rows, result.stats.duplicates) == (9, 3)


async def test_ids_that_go_back_are_put_in_order(tmp_path: Path) -> None:
    """A file that runs backwards gives the same frames' rows as one that does not."""
    lines = dump(300)
    there = await replay(write(tmp_path / "a.csv", lines), window_rows=200)
    back = await replay(write(tmp_path / "b.csv", lines[::-1]), window_rows=400)
    assert there.ids == back.ids == list(range(100, 400))
    assert (there.stats.late, back.stats.late) == (0, 0)


async def test_rows_beyond_the_window_are_published_late_and_counted(tmp_path: Path) -> None:
    """A row further back than the window follows its watermark; it is not lost."""
    lines = dump(100)
    result = await replay(write(tmp_path / "x.csv", [*lines[50:], *lines[:50]]), window_rows=10)
    assert sorted(result.ids) == list(range(100, 200))
    assert result.stats.late == 50


@pytest.mark.parametrize(
    "line", ['1723161254347673567 {"e":"trade","s":"BTCUSDT"', '{"e":"trade","s":"BTCUSDT","t":"x"}', "\xff\xfe", "hello"]
)
async def test_a_malformed_line_of_a_capture_is_rejected(tmp_path: Path, line: str) -> None:
    """Cut, of another shape or no JSON: dead-lettered with its line; the trades around it go on."""
    event = '1723161254347673567 {"e":"trade","s":"BTCUSDT","t":%d,"p":"5","q":"1","T":1723161255617,"m":true}'
    result = await replay(write(tmp_path / "x.ws", [event % 1, line, event % 2]))
    assert result.ids == [1, 2]
    assert result.reasons == [(2, "malformed_row")]
    assert result.rejected[0].raw == line.encode()


async def test_bad_trades_of_a_capture_are_rejected(tmp_path: Path) -> None:
    """Prices, sizes and times of frames are judged as those of rows are."""
    event = {"e": "trade", "s": "BTCUSDT", "t": 1, "p": "5", "q": "1", "T": T0_MS, "m": True}
    changes = [{}, {"p": "0"}, {"p": "NaN"}, {"q": "-1"}, {"t": -5}, {"T": 5}, {"t": 2**70}, {"m": "yes"}, {"t": 9}]
    lines = [f"{T0_MS}000000 " + json.dumps({"data": {**event, **change}}) for change in changes]
    result = await replay(write(tmp_path / "x.ws", lines))
    assert result.ids == [1, 9]
    assert [reason for _, reason in result.reasons] == [
        "bad_price", "bad_price", "bad_size", "bad_id", "bad_time", "malformed_row", "malformed_row",
    ]  # fmt: skip


async def test_a_kraken_trade_that_cannot_be_read_is_rejected(tmp_path: Path) -> None:
    """Rows without an id, with another side or a bad number; the row's place in the list is its line."""
    rows = [["5", "1", 1762795433.97, "b", "l", "", 1], ["5", "1", 1762795433.97, "b", "l", ""], ["x", "1", 1762795433.97, "b", "l", "", 3],
            ["5", "0", 1762795433.97, "s", "l", "", 4], ["5", "1", 1762795433.97, "q", "l", "", 5], ["5", "1", 17, "s", "l", "", 6]]  # fmt: skip
    result = await replay(write(tmp_path / "x.json", [json.dumps({"error": [], "result": {"XBTUSDT": rows, "last": "1"}})]))
    assert result.ids == [1]
    assert result.reasons == [(2, "malformed_row"), (3, "malformed_row"), (4, "bad_size"), (5, "malformed_row"), (6, "bad_time")]


# Truncation: what could be read is given out, and what is missing is said.


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.9999])
async def test_a_truncated_gzip_gives_what_it_holds_and_says_what_is_missing(tmp_path: Path, kept: float) -> None:
    """Whole lines before the break are published, the cut line is not, the source is closed, and the problem names row count and line."""
    data = gzip.compress("".join(line + "\n" for line in dump(20_000)).encode())
    path = _bytes(tmp_path / "x.csv.gz", data[: int(len(data) * kept)])
    result = await replay(path)
    count = len(result.ids)
    assert 20_000 * kept * 0.8 < count <= 20_000
    assert result.ids == list(range(100, 100 + count))
    assert result.frames[-1].flags == END_OF_SOURCE
    assert isinstance(result.stats.problem, TruncatedError)
    assert str(result.stats.problem) == (
        f"{path}, line {count + 1:,}: the gzip stream ends early: {count:,} rows before were read, everything from this line on is missing; "
        "get the file again."
    )


async def test_a_gzip_with_a_broken_middle(tmp_path: Path) -> None:
    """Rows before the damage are published, none after it."""
    data = bytearray(gzip.compress("".join(line + "\n" for line in dump(40_000)).encode()))
    middle = len(data) // 2
    data[middle : middle + 64] = b"\xff" * 64
    result = await replay(_bytes(tmp_path / "x.csv.gz", bytes(data)))
    assert 100 < len(result.ids) < 40_000
    assert "the gzip stream" in str(result.stats.problem)
    assert result.ids == list(range(100, 100 + len(result.ids)))


async def test_a_truncated_recorded_capture(tmp_path: Path) -> None:
    """Half of a recorded capture gives the first half of its trades."""
    data = recorded("ws/binance/spot_btcusdt_20240808.ws.gz").read_bytes()
    result = await replay(_bytes(tmp_path / "x.ws.gz", data[: len(data) // 2]))
    assert result.ids == list(range(3735683259, 3735683259 + len(result.ids)))
    assert 2_000 < len(result.ids) < 9_757
    assert result.stats.problem is not None


async def test_a_zip_with_a_broken_member(tmp_path: Path) -> None:
    """A wrong checksum is a break like any other."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("x.csv", "".join(line + "\n" for line in dump(40_000)))
    data = bytearray(path.read_bytes())
    data[2_000_000] = data[2_000_000] ^ 1
    result = await replay(_bytes(path, bytes(data)))
    assert len(result.ids) > 10_000
    assert "the zip member is damaged" in str(result.stats.problem)


async def test_a_parquet_file_with_a_broken_row_group(tmp_path: Path) -> None:
    """What stands before the damage is published; the problem says that the rest is missing."""
    path, count = tmp_path / "x.parquet", 300_000
    frame = pl.DataFrame({"id": range(count), "price": [5.0] * count, "qty": [1.0] * count, "time": [T0_MS] * count})
    table = frame.with_columns(is_buyer_maker=True).to_arrow()
    pyarrow.parquet.write_table(table, path, row_group_size=140_000, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    middle = len(data) * 3 // 5
    data[middle : middle + 2_000] = b"\xff" * 2_000
    result = await replay(_bytes(path, bytes(data)))
    assert 0 < len(result.ids) < count
    assert "is damaged (could not verify page integrity" in str(result.stats.problem)
    assert str(result.stats.problem).endswith("everything from there on is missing; get the file again.")


async def test_every_error_is_one_of_ours(tmp_path: Path) -> None:
    """Whatever prefix of a gzip, a zip or a capture is left, the answer is rows or a ReplayError, never anything else."""
    text = "".join(line + "\n" for line in dump(300)).encode()
    packed = gzip.compress(text)
    for size in [*range(0, 40), *range(40, len(packed), 97)]:
        path = _bytes(tmp_path / "x.csv", packed[:size])
        try:
            result = await replay(path)
        except ReplayError:
            continue
        assert result.stats.problem is not None
