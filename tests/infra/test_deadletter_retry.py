"""What a retry of each kind of letter comes to: records to publish, stretches of bars to make anew, or a sentence why not."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from collectors.dedupe import NUMBERING
from infra.deadletter_retry import Planner
from infra.deadletter_sources import RefusedError, StillBadError, rows_of_line, rows_of_message
from schemas.codec import FrameCodec, RowCodec, schema_text
from schemas.frames import END_OF_SOURCE, GAP_FILLED, GAP_OPEN, HISTORY, Frame, GapNotice
from schemas.partitions import partition_of
from schemas.symbols import Instrument
from schemas.topics import TOPICS, topic
from tests.schemas.test_codec import trades

NOW_US = 1_700_000_100_000_000
START_US = 1_700_000_000_000_000
IDS = {entry.schema: number for number, entry in enumerate(TOPICS.values(), 1) if entry.schema}


class Registry:
    """The part of a registry client that planning asks."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}

    def frame_codec(self, name: str) -> FrameCodec:
        """A codec."""
        return FrameCodec(topic(name).schema, IDS[topic(name).schema])

    def row_codec(self, name: str) -> RowCodec:
        """A codec."""
        return RowCodec(topic(name).schema, IDS[topic(name).schema])

    def schema(self, schema_id: int) -> str:
        """A text."""
        return self.texts[schema_id]


REGISTRY = Registry()


def planner(**changes: Any) -> Planner:
    """A planner over nothing but that registry."""
    fields: dict[str, Any] = {
        "registry": REGISTRY,
        "partitions": 4,
        "symbols": {"binance": ["BTC-USDT", "ETH-USDT"], "binance-usdm": ["BTC-USDT-PERP"]},
        "read_record": lambda *_: None,
        "newer_rows": lambda _topic, _partition, _offset, frame: np.zeros(frame.row_count, bool),
        "stored_ids": lambda _key, _time_us: (-1, -1),
        "now_us": NOW_US,
    }
    return Planner(**fields | changes)


def letter(raw: bytes = b"", **fields: Any) -> dict[str, Any]:
    """A letter with its bytes."""
    base = {
        "id": 7,
        "reason": "malformed_message",
        "detail": "It was bad.",
        "component": "collector",
        "exchange": "binance",
        "symbol": "",
        "topic": "",
    }
    base |= {"partition": -1, "offset": -1, "place": "", "time_us": START_US, "raw_size": len(raw), "origin": -1}
    return {**base, "raw_base64": base64.b64encode(raw).decode()} | fields


def undecodable(name: str, raw: bytes, **fields: Any) -> dict[str, Any]:
    """A letter about a record of a topic."""
    return letter(raw, reason="undecodable_frame", component="sink", topic=name, partition=2, offset=40, **fields)


def sent(record: Any) -> Frame:
    """A published frame."""
    return REGISTRY.frame_codec(record.topic).decode(record.value)


# Records of topics.


def test_trades_go_out_as_of_the_past_with_a_repair_for_each_symbol() -> None:
    """Rows, order and partition stay; source, flags and notices are those of a retry."""
    notices = (GapNotice(0, 1, 5, 6, GAP_OPEN), GapNotice(1, 2, 5, 6, GAP_FILLED))
    frame = trades(5, gaps=notices, flags=END_OF_SOURCE, input_offset=3)
    plan = planner().plan(undecodable("trades", REGISTRY.frame_codec("trades").encode(frame)))
    (record,) = plan.records
    assert (record.topic, record.partition) == ("trades", 2)
    past = sent(record)
    assert (past.source, past.flags, past.input_offset, past.gaps) == ("binance/retry", HISTORY, -1, notices[1:])
    assert all(np.array_equal(past.columns[name], frame.columns[name]) for name in frame.columns)
    times = {one.symbol: (one.start_us, one.end_us, one.reason, one.trigger) for one in plan.repairs}
    assert times == {
        "BTC-USDT": (START_US, START_US + 5, "request", "deadletter/0/7/retry"),
        "ETH-USDT": (START_US + 1, START_US + 4, "request", "deadletter/0/7/retry"),
    }
    assert plan.what.startswith("5 trades published")


def test_a_record_of_a_schema_that_is_known_by_now_is_read() -> None:
    """The registry is asked for it."""
    column = '{"name":"extra","type":{"type":"bytes","logicalType":"int64-le"},"default":"","fill":0}'
    text = schema_text("trades")[:-2] + "," + column + "]}"
    raw = FrameCodec("trades", 999, text).encode(trades(3))
    with pytest.raises(StillBadError, match="no schema with id 999"):
        planner().plan(undecodable("trades", raw))
    REGISTRY.texts[999] = text
    assert sent(planner().plan(undecodable("trades", raw)).records[0]).row_count == 3


def test_a_heartbeat_needs_nothing() -> None:
    """A record without trades and news is settled without a word to anybody."""
    plan = planner().plan(undecodable("trades", REGISTRY.frame_codec("trades").encode(Frame(source="s", watermark_us=1))))
    assert (plan.records, plan.repairs) == ((), ())


def test_bars_are_made_anew_not_published_again() -> None:
    """Their input offset is behind those stored: the sink would drop them."""
    codec = REGISTRY.frame_codec("bars")
    columns = {name: np.ones(2, dtype) for name, dtype in codec.dtypes.items()} | {"symbol_code": np.zeros(2, np.int32)}
    columns |= {"open_time_us": np.array([START_US, START_US + 60]), "close_time_us": np.array([START_US + 60, START_US + 120])}
    plan = planner().plan(
        undecodable("bars", codec.encode(Frame(source="w", watermark_us=1, symbols=("binance:BTC-USDT",), columns=columns)))
    )
    assert plan.records == ()
    assert [(one.symbol, one.start_us, one.end_us) for one in plan.repairs] == [("BTC-USDT", START_US, START_US + 120)]


@pytest.mark.parametrize("name", ["quotes", "funding", "open_interest", "quality", "gaps", "quarantine"])
def test_records_of_other_topics_are_published_again_byte_for_byte(name: str) -> None:
    """To the same partition, without a repair."""
    codec = REGISTRY.frame_codec(name)
    columns = {column: np.ones(2, dtype) for column, dtype in codec.dtypes.items()} | {"symbol_code": np.zeros(2, np.int32)}
    raw = codec.encode(Frame(source="s", watermark_us=1, symbols=("binance:BTC-USDT",), columns=columns))
    plan = planner().plan(undecodable(name, raw))
    assert [(one.topic, one.partition, one.value) for one in plan.records] == [(name, 2, raw)]
    assert plan.repairs == ()


@pytest.mark.parametrize(("over", "left"), [([True, False], 1), ([True, True], 0)])
def test_rows_that_newer_ones_replaced_are_left_out(over: list[bool], left: int) -> None:
    """An old state of a gap must not come back; a record of which nothing counts any more is not published."""
    codec = REGISTRY.frame_codec("gaps")
    columns = {column: np.ones(2, dtype) for column, dtype in codec.dtypes.items()} | {"symbol_code": np.zeros(2, np.int32)}
    raw = codec.encode(Frame(source="s", watermark_us=1, symbols=("binance:BTC-USDT",), columns=columns))
    plan = planner(newer_rows=lambda *_: np.array(over)).plan(undecodable("gaps", raw))
    assert [sent(record).row_count for record in plan.records] == ([left] if left else [])
    assert f"{sum(over)} of its 2 rows" in plan.what


def test_a_row_is_published_again() -> None:
    """A letter about a letter, too."""
    raw = REGISTRY.row_codec("onchain").encode(
        {"chain": "c", "kind": "k", "transaction_id": "t", "asset": "a", "amount": 1.0, "exchange_time_us": 1, "receive_time_us": 1}
    )
    assert planner().plan(undecodable("onchain", raw)).records[0].value == raw


def test_a_long_record_is_fetched_from_its_topic() -> None:
    """A letter holds its first MiB; the whole is asked for by topic, partition and offset."""
    raw = REGISTRY.frame_codec("quotes").encode(Frame(source="s", watermark_us=1))
    asked = []

    def read(*place: Any) -> bytes:
        asked.append(place)
        return raw

    plan = planner(read_record=read).plan(undecodable("quotes", raw[:9]) | {"raw_size": len(raw)})
    assert plan.records[0].value == raw
    assert asked == [("quotes", 2, 40)]
    with pytest.raises(RefusedError, match=r"first 9 of .* quotes\[2\]@40 is not there any more"):
        planner().plan(undecodable("quotes", raw[:9]) | {"raw_size": len(raw)})


@pytest.mark.parametrize("raw", [b"", b"garbage", b"\0\0\0\0\1"])
def test_garbage_is_still_garbage(raw: bytes) -> None:
    """With the reason it had."""
    with pytest.raises(StillBadError) as caught:
        planner().plan(undecodable("trades", raw))
    assert caught.value.reason == "undecodable_frame"


@pytest.mark.parametrize(
    ("symbols", "times"),
    [
        (("nocolon",), START_US),
        (("moon:A-B",), START_US),
        (("binance:a b",), START_US),
        (("binance:BTC-USDT",), 5),
        (("binance:BTC-USDT",), 2**62),
    ],
)
def test_a_record_of_no_market_or_no_time_is_refused(symbols: tuple[str, ...], times: int) -> None:
    """Nothing of it can be a bar."""
    frame = trades(1, symbols=symbols, columns={"exchange_time_us": np.array([times])})
    with pytest.raises(RefusedError):
        planner().plan(undecodable("trades", REGISTRY.frame_codec("trades").encode(frame)))


# Trades that the worker refused.


def test_a_trade_too_late_needs_its_bars_only() -> None:
    """It is stored: nothing is published."""
    raw = json.dumps({"key": "binance:BTC-USDT", "exchange_time_us": START_US}).encode()
    fields = {"component": "worker", "symbol": "BTC-USDT", "topic": "trades", "partition": 1, "offset": 3}
    for reason, of_job in (("too_late", "too_late"), ("too_many_symbols", "request")):
        plan = planner().plan(letter(raw, reason=reason, **fields))
        assert plan.records == ()
        assert [(one.start_us, one.end_us, one.reason) for one in plan.repairs] == [(START_US, START_US + 1, of_job)]
    with pytest.raises(RefusedError, match="It was bad. No other try"):
        planner().plan(letter(raw, reason="bad_price", **fields))


# Messages of a venue.

SPOT = {"e": "trade", "E": 1, "s": "ETHUSDT", "t": 9, "p": "2500.5", "q": "2", "T": START_US // 1000, "m": False, "M": True}
AGGREGATE = {
    "e": "aggTrade",
    "E": 1,
    "s": "BTCUSDT",
    "a": 9,
    "p": "61800.3",
    "q": "0.006",
    "f": 1,
    "l": 2,
    "T": START_US // 1000,
    "m": True,
}


@pytest.mark.parametrize(
    ("exchange", "stream", "data", "key", "row"),
    [
        ("binance", "ethusdt@trade", SPOT, "binance:ETH-USDT", (9, 2500.5, 2.0, 1)),
        ("binance-usdm", "btcusdt@aggTrade", AGGREGATE, "binance-usdm:BTC-USDT-PERP", (9, 61800.3, 0.006, -1)),
    ],
)
def test_a_message_becomes_the_trade_it_says(exchange: str, stream: str, data: dict[str, Any], key: str, row: tuple[Any, ...]) -> None:
    """By the mapper of that venue, received when it was received, in its symbol's partition."""
    raw = json.dumps({"stream": stream, "data": data}).encode()
    plan = planner().plan(letter(raw, exchange=exchange, reason="unknown_stream", time_us=START_US + 77))
    (record,) = plan.records
    frame = sent(record)
    assert record.partition == partition_of(key, 4)
    assert (frame.source, frame.flags, frame.symbols) == (f"{exchange}/retry", HISTORY, (key,))
    assert tuple(frame.columns[name][0] for name in ("trade_id", "price", "size", "side")) == row
    assert frame.columns["receive_time_us"].tolist() == [START_US + 77]
    assert [(one.exchange, one.symbol, one.start_us) for one in plan.repairs] == [(exchange, key.partition(":")[2], START_US)]


@pytest.mark.parametrize(
    ("before", "after", "base"),
    [
        (-1, -1, 0),  # nothing is stored
        (8, 10, 0),
        (NUMBERING + 8, NUMBERING + 10, NUMBERING),  # the venue had begun its ids anew before
        (900, NUMBERING + 10, NUMBERING),  # the first of the new ids
        (8, NUMBERING + 1, 0),  # the last of the old ones
        (-1, NUMBERING + 10, NUMBERING),
        (900, 1_000, 0),  # late among its own
    ],
)
def test_a_retried_trade_is_numbered_as_the_collector_numbers_those_of_its_time(before: int, after: int, base: int) -> None:
    """After the venue began its ids anew a raw one would be that of another trade."""
    asked: list[tuple[str, int]] = []

    def stored_ids(key: str, time_us: int) -> tuple[int, int]:
        asked.append((key, time_us))
        return before, after

    raw = json.dumps({"stream": "ethusdt@trade", "data": SPOT}).encode()
    (record,) = planner(stored_ids=stored_ids).plan(letter(raw, reason="unknown_stream")).records
    assert sent(record).columns["trade_id"].tolist() == [9 + base]
    assert asked == [("binance:ETH-USDT", START_US)]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "malformed_message"),
        (json.dumps({"stream": "dogeusdt@trade", "data": SPOT}).encode(), "unknown_stream"),
        (json.dumps({"stream": "ethusdt@trade", "data": SPOT | {"p": "-1"}}).encode(), "impossible_value"),
        (json.dumps({"stream": "ethusdt@trade", "data": SPOT | {"T": (NOW_US + 120_000_000) // 1000}}).encode(), "implausible_time"),
    ],
)
def test_a_message_that_is_still_wrong_says_how(raw: bytes, reason: str) -> None:
    """The reason is the mapper's, of today."""
    with pytest.raises(StillBadError) as caught:
        planner().plan(letter(raw))
    assert caught.value.reason == reason


def test_a_message_that_is_no_trade_after_all_is_settled() -> None:
    """An event of another kind is understood and gives nothing."""
    plan = planner().plan(letter(json.dumps({"stream": "ethusdt@kline_1m", "data": {"e": "kline", "E": 1}}).encode()))
    assert (plan.records, plan.repairs) == ((), ())


def test_a_message_of_which_only_the_beginning_is_left_is_refused() -> None:
    """A cut message may say something else."""
    with pytest.raises(RefusedError, match="first 3 of 9 bytes"):
        planner().plan(letter(b"{}x", raw_size=9))


def test_a_venue_without_mapper_is_refused() -> None:
    """By name."""
    with pytest.raises(RefusedError, match="mapper of 'kraken'"):
        rows_of_message("kraken", b"{}", [], START_US, NOW_US)


# Lines of files.

INSTRUMENT = Instrument("binance", "BTC-USDT")


@pytest.mark.parametrize(
    ("lines", "line", "row"),
    [
        (
            ["1,100.5,1,100.5,1700000000000,True,True", "2,1,1,1,1700000000000,True,True"],
            "3,101.5,2,203,1700000000001,False,True",
            (3, 101.5, 2.0, 1),
        ),
        (["id,price,qty,quote_qty,time,is_buyer_maker", "1,1,1,1,1700000000000,true"], "5,2.5,4,10,1700000000001,true", (5, 2.5, 4.0, -1)),
        (
            ["1,100.5,1,1,1,1700000000000000,True,True", "2,1,1,1,1,1700000000000000,True,True"],
            "3,101.5,2,1,1,1700000000001000,False,True",
            (3, 101.5, 2.0, 1),
        ),
    ],
)
def test_a_line_is_read_by_the_layout_of_its_file(tmp_path: Path, lines: list[str], line: str, row: tuple[Any, ...]) -> None:
    """Trades and aggregates, with and without a header, in ms and us."""
    path = tmp_path / "dump.csv"
    path.write_text("\n".join(lines) + "\n")
    rows = rows_of_line(INSTRUMENT, f"{path}:9", line.encode())
    assert tuple(rows.columns[name][0] for name in ("trade_id", "price", "size", "side")) == row
    assert rows.columns["exchange_time_us"].tolist() == [START_US + 1_000]
    with pytest.raises(StillBadError) as caught:
        rows_of_line(INSTRUMENT, f"{path}:9", b"one,two")
    assert caught.value.reason == "malformed_row"


def test_a_line_of_a_capture_is_read_as_a_frame_of_the_venue(tmp_path: Path) -> None:
    """With the receive time it was recorded with."""
    path = tmp_path / "capture.txt"
    line = f"{START_US * 1000 + 5_000} " + json.dumps({"stream": "btcusdt@trade", "data": SPOT | {"s": "BTCUSDT"}})
    path.write_text(line + "\n")
    rows = rows_of_line(INSTRUMENT, f"{path}:1", line.encode())
    assert (rows.columns["trade_id"].tolist(), rows.columns["receive_time_us"].tolist()) == ([9], [START_US + 5])


@pytest.mark.parametrize("place", ["", "gone.csv:3", "no-number", "gone.csv:x"])
def test_a_line_whose_file_is_gone_is_refused(place: str) -> None:
    """Its layout is not known."""
    with pytest.raises(RefusedError, match="not there any more"):
        rows_of_line(INSTRUMENT, place, b"1,2,3")
