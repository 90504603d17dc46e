"""Frames and rows survive the wire; hostile bytes give a typed error and nothing else."""

from __future__ import annotations

import json
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.codec import MAX_RECORD_BYTES, FrameCodec, RowCodec, decode_learning, schema_text
from schemas.errors import DecodeError, EncodeError, FrameTooLargeError, UnknownSchemaError
from schemas.frames import GAP_OPEN, Frame, GapNotice, frame_from_polars
from schemas.topics import TOPICS


def trades(rows: int = 5, **changes: object) -> Frame:
    """A frame of ``rows`` trades of two symbols."""
    columns = {
        "symbol_code": np.arange(rows, dtype=np.int32) % 2,
        "trade_id": np.arange(rows, dtype=np.int64),
        "price": np.linspace(1, 2, rows),
        "size": np.full(rows, 0.5),
        "side": np.ones(rows, np.int8),
        "exchange_time_us": np.arange(rows, dtype=np.int64) + 1_700_000_000_000_000,
        "receive_time_us": np.arange(rows, dtype=np.int64) + 1_700_000_000_000_100,
    }
    columns.update(changes.pop("columns", {}))  # type: ignore[call-overload]
    fields = {"source": "binance/ws", "watermark_us": 17, "symbols": ("binance:BTC-USDT", "binance:ETH-USDT"), "columns": columns}
    return Frame(**{**fields, **changes})  # type: ignore[arg-type]


CODEC = FrameCodec("trades", 7)


def test_frame_comes_back_as_it_was_sent() -> None:
    """Every head field and column survives encode and decode bit for bit."""
    sent = trades(11, input_offset=42, flags=1)
    got = CODEC.decode(CODEC.encode(sent))
    assert (got.source, got.watermark_us, got.input_offset, got.flags, got.symbols) == ("binance/ws", 17, 42, 1, sent.symbols)
    for name, column in sent.columns.items():
        assert got.columns[name].dtype == CODEC.dtypes[name]
        assert np.array_equal(got.columns[name], column)


def test_heartbeat_has_no_rows() -> None:
    """An empty frame carries its watermark and empty columns."""
    got = CODEC.decode(CODEC.encode(Frame(source="s", watermark_us=5)))
    assert got.row_count == 0
    assert got.watermark_us == 5


def test_same_frame_gives_same_bytes() -> None:
    """Encoding is a function of the frame alone."""
    assert CODEC.encode(trades()) == CODEC.encode(trades())


def test_polars_round_trip_keeps_every_value() -> None:
    """Frame -> DataFrame -> frame gives the same rows."""
    table = trades(6).to_polars()
    assert table.columns[:2] == ["exchange", "symbol"]
    back = frame_from_polars(table, source="s", watermark_us=0, dtypes=CODEC.dtypes)
    assert back.to_polars().equals(table)


def test_missing_column_in_dataframe_is_named() -> None:
    """A DataFrame without a column of the topic is refused by its name."""
    with pytest.raises(EncodeError, match="price"):
        frame_from_polars(trades(2).to_polars().drop("price"), source="s", watermark_us=0, dtypes=CODEC.dtypes)


def test_every_schema_of_the_catalogue_encodes_an_empty_frame_or_is_a_row() -> None:
    """Each .avsc in the catalogue parses, and every frame schema has the head and a symbol_code."""
    for topic in TOPICS.values():
        if topic.kind == "frame":
            codec = FrameCodec(topic.schema, 1)
            assert "symbol_code" in codec.dtypes
            assert codec.decode(codec.encode(Frame(source="s", watermark_us=1))).row_count == 0
        elif topic.kind == "row":
            RowCodec(topic.schema, 1)


@pytest.mark.parametrize(
    ("column", "value", "word"),
    [
        ("price", np.zeros(4), "5"),  # another length than the frame
        ("trade_id", np.zeros(5), "float64"),  # floats never become ids silently
    ],
)
def test_columns_that_do_not_fit_are_refused(column: str, value: np.ndarray, word: str) -> None:
    """A wrong length or dtype kind names the column."""
    with pytest.raises(EncodeError, match=column) as caught:
        CODEC.encode(trades(5, columns={column: value}))
    assert word in str(caught.value)


def test_code_outside_the_dictionary_is_refused() -> None:
    """A symbol_code that names no symbol never reaches a kernel."""
    data = CODEC.encode(trades(5, columns={"symbol_code": np.array([0, 1, 2, 0, 0], np.int32)}))
    with pytest.raises(DecodeError, match="symbol_code"):
        CODEC.decode(data)


def test_unknown_schema_id_names_the_id() -> None:
    """A record of a newer schema says which id to fetch."""
    data = FrameCodec("trades", 9).encode(trades())
    with pytest.raises(UnknownSchemaError) as caught:
        CODEC.decode(data)
    assert caught.value.schema_id == 9


def test_newer_schema_is_learned_and_read() -> None:
    """A frame written with one more column is read by an older reader once the registry has told it the schema."""
    field = '{"name":"liquidity","type":{"type":"bytes","logicalType":"int8-le"},"default":""}'
    newer = schema_text("trades").replace('{"name":"receive_time_us"', field + ',{"name":"receive_time_us"')
    writer = FrameCodec("trades", 9, newer)
    data = writer.encode(trades(3, columns={"liquidity": np.zeros(3, np.int8)}))
    reader = FrameCodec("trades", 7)
    assert decode_learning(reader, data, {9: newer}.__getitem__).row_count == 3
    with pytest.raises(DecodeError, match="no schema with id 9"):
        decode_learning(FrameCodec("trades", 7), data, {}.__getitem__)


def test_record_of_100_megabytes_is_refused_unread() -> None:
    """A giant record is refused by its size before anything is parsed."""
    with pytest.raises(FrameTooLargeError, match="104,857,600"):
        CODEC.decode(b"\0" * (100 * 1024 * 1024))
    assert MAX_RECORD_BYTES < 100 * 1024 * 1024


@pytest.mark.parametrize("data", [b"", b"\0", b"\1aaaaaaaa", b"{}", b"\0\0\0\0\7", b"\0\0\0\0\7" + b"\xff" * 40])
def test_garbage_is_a_decode_error(data: bytes) -> None:
    """Bytes that are no frame raise DecodeError."""
    with pytest.raises(DecodeError):
        CODEC.decode(data)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_behind_a_header_raise_only_decode_errors(body: bytes) -> None:
    """Random bodies never crash and never raise anything but DecodeError."""
    for schema in ("trades", "bars"):
        try:
            FrameCodec(schema, 7).decode(b"\0\0\0\0\7" + body)
        except DecodeError:
            continue


def test_mutated_frames_never_crash_and_never_allocate_unboundedly() -> None:
    """20,000 seeded mutations (flips, cuts, splices, huge lengths) raise DecodeError or decode, in bounded memory."""
    seed = 20_241_121
    print("seed", seed)
    rng = random.Random(seed)
    base = CODEC.encode(trades(50))
    tracemalloc.start()
    try:
        for _ in range(20_000):
            data = bytearray(base)
            for _ in range(rng.randint(1, 4)):
                place = rng.randrange(5, len(data))
                choice = rng.randrange(4)
                if choice == 0:
                    data[place] ^= 1 << rng.randrange(8)
                elif choice == 1:
                    del data[place:]
                    data += b"\0" * 6
                elif choice == 2:
                    data[place : place + 1] = b"\xff\xff\xff\xff\xff\xff\xff\x7f"
                else:
                    data[place : place + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
            try:
                CODEC.decode(bytes(data))
            except DecodeError:
                continue
        assert tracemalloc.get_traced_memory()[1] < 8 * 1024 * 1024
    finally:
        tracemalloc.stop()


def test_a_frame_of_an_earlier_release_is_read_with_the_fill_of_the_columns_it_lacks() -> None:
    """Bars written before ``held_count`` existed hold 0 there, not an empty column that fits no row."""
    fields = [field for field in json.loads(schema_text("bars"))["fields"] if field["name"] != "held_count"]
    earlier = FrameCodec("bars", 1, json.dumps({**json.loads(schema_text("bars")), "fields": fields}))
    columns = {name: np.ones(3, dtype) for name, dtype in earlier.dtypes.items() if name != "symbol_code"}
    written = earlier.encode(
        Frame(source="worker", watermark_us=1, symbols=("binance:BTC-USDT",), columns={"symbol_code": np.zeros(3, np.int32), **columns})
    )
    now = FrameCodec("bars", 2)
    now.add_writer(1, json.dumps({**json.loads(schema_text("bars")), "fields": fields}))
    read = now.decode(written)
    assert read.columns["held_count"].tolist() == [0, 0, 0]
    assert read.columns["open"].tolist() == [1.0, 1.0, 1.0]


def test_gap_notices_travel_with_the_trades_and_one_outside_the_dictionary_is_refused() -> None:
    """What a collector knows to be missing comes in the order of the rows."""
    notice = GapNotice(symbol_code=1, gap_id=5, start_time_us=10, end_time_us=20, state=GAP_OPEN)
    assert CODEC.decode(CODEC.encode(trades(gaps=(notice,)))).gaps == (notice,)
    with pytest.raises(DecodeError, match="symbol code"):
        CODEC.decode(CODEC.encode(trades(gaps=(notice._replace(symbol_code=2),))))


def test_equal_dictionaries_decode_to_the_same_tuple() -> None:
    """Readers tell by identity that they know a dictionary; another one, also of the same ends and length, is itself; memory is bounded."""
    codec = FrameCodec("trades", 1)

    def decoded(*symbols: str) -> tuple[str, ...]:
        return codec.decode(codec.encode(Frame(source="s", watermark_us=0, symbols=symbols))).symbols

    first = decoded("a", "b", "c")
    assert decoded("a", "b", "c") is first
    assert decoded("a", "x", "c") == ("a", "x", "c")
    assert decoded("a", "b", "c") == first
    assert decoded() == ()
    for number in range(1_000):
        assert decoded(f"s{number}") == (f"s{number}",)
    assert len(codec._dictionaries) <= 256
