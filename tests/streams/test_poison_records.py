"""Whatever bytes a record holds, the bar processor gives its one bars record and goes on; and a letter told twice is stored once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processors.bars import BarConfig
from schemas.codec import MAX_RECORD_BYTES, FrameCodec, RowCodec
from schemas.frames import HISTORY, Frame, GapNotice
from streams.bar_shard import BarCodecs, BarShard
from streams.deadletters import RAW_LIMIT_BYTES, dead_letter
from streams.quality_records import QualityCodecs
from streams.sink import LetterKey, Received, TopicSink
from tests.schemas.test_codec import trades
from tests.streams.test_sink import MemoryStore

CODECS = BarCodecs(
    trades=FrameCodec("trades", 1),
    bars=FrameCodec("bars", 2),
    rows=RowCodec("bars_row", 3),
    deadletter=RowCodec("deadletter", 4),
    fetch_schema={}.__getitem__,
    quality=QualityCodecs(quality=FrameCodec("quality", 5), quarantine=FrameCodec("quarantine", 6)),
)
CONFIG = BarConfig(timeframes=("1s", "1m"))
W_US = 1_700_000_000_000_000
BIGGEST = np.iinfo(np.int64).max
GOOD = CODECS.trades.encode(trades(5, watermark_us=W_US))
NAN = np.full(5, np.nan)


def five(value: int) -> np.ndarray:
    """A column of one value."""
    return np.full(5, value, np.int64)


HOSTILE: dict[str, dict[str, Any]] = {
    "no key": {"symbols": ("nocolon", "x")},
    "no key and no price": {"symbols": ("nocolon", "x"), "columns": {"price": NAN}},
    "an empty key and no price": {"symbols": ("", ""), "columns": {"price": NAN}},
    "a colon and no price": {"symbols": (":", ":"), "columns": {"price": NAN}},
    "a key twice": {"symbols": ("binance:A-B", "binance:A-B")},
    "a long key": {"symbols": ("binance:" + "A" * 1_000_000, "b:\0")},
    "the last watermark": {"watermark_us": BIGGEST},
    "the first watermark": {"watermark_us": -BIGGEST - 1},
    "late times": {"columns": {"exchange_time_us": five(BIGGEST), "receive_time_us": five(BIGGEST)}},
    "early times": {"columns": {"exchange_time_us": five(-BIGGEST - 1), "receive_time_us": five(-BIGGEST - 1)}},
    "all times": {"columns": {"receive_time_us": np.array([-BIGGEST - 1, BIGGEST, 0, 1, 2])}},
    "early ids": {"columns": {"trade_id": five(-BIGGEST - 1)}},
    "late ids": {"columns": {"trade_id": five(BIGGEST)}},
    "prices that are none": {"columns": {"price": np.array([np.inf, -np.inf, np.nan, 0.0, -1.0])}},
    "prices too large to add": {"columns": {"price": np.full(5, 1e308), "size": np.full(5, 1e308)}},
    "smallest prices": {"columns": {"price": np.full(5, 5e-324), "size": np.full(5, 5e-324)}},
    "sides that are none": {"columns": {"side": np.array([5, -5, 0, 127, -128], np.int8)}},
    "all flags": {"flags": 2**31 - 1},
    "negative flags": {"flags": -1},
    "impossible gaps": {"gaps": (GapNotice(0, BIGGEST, -BIGGEST - 1, BIGGEST, 1), GapNotice(1, -1, 5, 0, 99), GapNotice(1, 5, 0, 0, -7))},
    "impossible gaps of the past": {"flags": HISTORY, "gaps": (GapNotice(0, BIGGEST, BIGGEST, -BIGGEST - 1, 2),)},
    "the past without a price": {"flags": HISTORY, "symbols": ("nocolon", ""), "columns": {"price": NAN}},
}


def check_goes_on(value: bytes) -> list[Any]:
    """Between good records the shard gives one bars record for it and can be saved and restored after it; what it gave."""
    shard = BarShard(0, CONFIG, CODECS)
    shard.process(0, GOOD)
    sent = shard.process(1, value)
    assert [record.topic for record in sent].count("bars") == 1
    shard = BarShard.restore(0, CONFIG, CODECS, shard.snapshot())
    after = shard.process(2, CODECS.trades.encode(trades(5, watermark_us=W_US + 5, columns={"trade_id": np.arange(5, 10)})))
    assert [record.topic for record in after].count("bars") == 1
    assert shard.applied_offset == 2
    return sent


@pytest.mark.parametrize("what", HOSTILE)
def test_a_frame_that_says_what_cannot_be_stops_no_partition(what: str) -> None:
    """Impossible keys, times, numbers, flags and gaps pass; rows that bars cannot hold become letters."""
    check_goes_on(CODECS.trades.encode(trades(5, **{"watermark_us": W_US} | HOSTILE[what])))


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\0",
        b"garbage",
        GOOD[:5],
        GOOD[:-1],
        GOOD + b"\0",
        GOOD[: len(GOOD) // 2],
        b"\0\0\0\0\x63" + GOOD[5:],
        GOOD[:5] + b"\xff" * 200,
    ],
    ids=["empty", "one byte", "garbage", "header", "cut", "long", "half", "unknown id", "huge lengths"],
)
def test_a_record_that_cannot_be_read_becomes_one_letter_with_its_bytes(value: bytes) -> None:
    """The letter names topic, partition and offset."""
    letters = [CODECS.deadletter.decode(record.value) for record in check_goes_on(value) if record.topic == "deadletter"]
    assert [(one["topic"], one["partition"], one["offset"], one["raw"], one["raw_size"]) for one in letters] == [
        ("trades", 0, 1, value, len(value))
    ]


def test_the_letter_of_a_record_of_8_mib_is_no_larger_than_a_record_may_be() -> None:
    """It holds the first MiB and the size."""
    value = GOOD[:5] + b"\xff" * MAX_RECORD_BYTES
    (letter,) = [CODECS.deadletter.decode(record.value) for record in check_goes_on(value) if record.topic == "deadletter"]
    assert (letter["raw"], letter["raw_size"]) == (value[:RAW_LIMIT_BYTES], len(value))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_mutated_frames_stop_no_partition(seed: int) -> None:
    """Any bytes of a good frame changed: a letter or bars, and on it goes."""
    rng = random.Random(seed)
    data = bytearray(GOOD)
    for _ in range(rng.randint(1, 6)):
        data[rng.randrange(5, len(data))] = rng.randrange(256)
    check_goes_on(bytes(data))


# Letters told twice.


class MemoryIndex:
    """`streams.sink.LetterIndex` over what a memory store holds."""

    def __init__(self, store: MemoryStore) -> None:
        self.asked = 0
        self._store = store

    def _keys(self) -> list[LetterKey]:
        names = ("topic", "partition", "offset", "place", "reason", "origin")
        return [tuple(row[name] for name in names) for row in self._store.rows["deadletter"]]  # type: ignore[misc]

    def newest_letters(self) -> dict[tuple[str, int], int]:
        """Largest offset by place."""
        found: dict[tuple[str, int], int] = {}
        for key in self._keys():
            found[key[:2]] = max(found.get(key[:2], -1), key[2])
        return found

    def known_letters(self, keys: Sequence[LetterKey]) -> set[LetterKey]:
        """Those held."""
        self.asked += 1
        return set(keys) & set(self._keys())


def received(at: int, **fields: Any) -> Received:
    """A letter as a record."""
    given_fields = {
        "reason": "too_late",
        "detail": "d",
        "component": "worker",
        "raw": b"x",
        "time_us": W_US,
        "topic": "trades",
        "partition": 0,
    }
    return Received(0, at, CODECS.deadletter.encode(dead_letter(**given_fields | fields)), W_US)


def feed(sink: TopicSink, store: MemoryStore, records: list[Received]) -> None:
    """Store a batch."""
    for batch in sink.batches(records):
        store.insert(batch)
        sink.inserted(batch)


def letters_sink(store: MemoryStore, index: MemoryIndex) -> TopicSink:
    """A sink of letters that has just started."""
    sink = TopicSink("deadletter", "time_us", CODECS.deadletter, store, {}.__getitem__, lambda *_: None, index)
    sink.resume(0, 0)
    return sink


def test_letters_written_again_after_a_crash_are_stored_once() -> None:
    """Whatever the cut into batches, and when the sink itself is started anew; new ones are not held up by a question to the table."""
    rng = random.Random(5)
    store = MemoryStore()
    index = MemoryIndex(store)
    letters = [{"offset": number // 3, "place": f"row {number % 3}"} for number in range(60)]
    sent = [*letters[:40], *letters[20:60], *letters[55:60]]
    sink, at = letters_sink(store, index), 0
    while at < len(sent):
        size = rng.randint(1, 7)
        feed(sink, store, [received(place, **sent[place]) for place in range(at, min(at + size, len(sent)))])
        at += size
        if rng.random() < 0.2:
            sink = letters_sink(store, index)
    assert [(row["offset"], row["place"]) for row in store.rows["deadletter"]] == [(one["offset"], one["place"]) for one in letters]


def test_new_letters_do_not_ask_the_table() -> None:
    """Beyond the newest offset of a partition a letter is new: 1,000 of them ask nothing."""
    store = MemoryStore()
    index = MemoryIndex(store)
    sink = letters_sink(store, index)
    for start in range(0, 1_000, 100):
        feed(sink, store, [received(start + number, offset=start + number, place="row 1") for number in range(100)])
    assert (len(store.rows["deadletter"]), index.asked) == (1_000, 0)


def test_letters_that_name_no_record_and_those_of_retries_are_all_kept() -> None:
    """The same line of a file replayed twice, and a retry that failed again, are letters of their own."""
    store = MemoryStore()
    sink = letters_sink(store, MemoryIndex(store))
    again = {"topic": "", "partition": -1, "offset": -1, "place": "file:3"}
    feed(
        sink,
        store,
        [received(0, **again), received(1, **again), received(2, offset=7, place="p"), received(3, offset=7, place="p", origin=2)],
    )
    feed(sink, store, [received(4, offset=7, place="p", origin=2), received(5, offset=7, place="p", origin=3)])
    assert [row["origin"] for row in store.rows["deadletter"]] == [-1, -1, -1, 2, 3]


def test_a_frame_that_is_empty_is_no_poison() -> None:
    """A heartbeat without symbols passes."""
    assert [record.topic for record in check_goes_on(CODECS.trades.encode(Frame(source="s", watermark_us=W_US)))] == ["bars"]
