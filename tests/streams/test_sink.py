"""The sink's core stores each row exactly once, wherever it is killed."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import pytest

from schemas.codec import FrameCodec, RowCodec
from schemas.errors import DecodeError
from schemas.frames import Frame
from streams.deadletters import dead_letter
from streams.sink import Batch, Received, TopicSink

TRADES = FrameCodec("trades", 1)
BARS = FrameCodec("bars", 2)
QUARANTINE = FrameCodec("quarantine", 4)
AUGUST_END = 1_725_148_799_000_000


class MemoryStore:
    """A history store in memory that inserts one batch atomically and can die before or after an insert."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, object]]] = defaultdict(list)
        self.die_in = -1
        """Inserts until it dies: odd dies after storing, even before; negative never."""

    def insert(self, batch: Batch) -> None:
        """Store all rows of the batch or none."""
        if self.die_in == 0:
            raise KeyboardInterrupt
        for row in range(batch.row_count):
            record: dict[str, object] = {name: column[row] for name, column in batch.columns.items()}
            record["month"] = batch.month
            if batch.keys:
                record["key"] = batch.keys[batch.columns["symbol_code"][row]]
            self.rows[batch.table].append(record)
        self.die_in -= 2
        if self.die_in == -1:
            raise KeyboardInterrupt

    def stored_positions(self, table: str, partition: int, since_offset: int) -> set[tuple[int, int]]:
        """Positions held."""
        return {
            (int(row["kafka_offset"]), int(row["month"]))  # type: ignore[call-overload]
            for row in self.rows[table]
            if row["kafka_partition"] == partition and row["kafka_offset"] >= since_offset  # type: ignore[operator]
        }

    def largest_ids(self) -> dict[str, int]:
        """Largest id by key."""
        found: dict[str, int] = {}
        for row in self.rows["trades"]:
            found[str(row["key"])] = max(found.get(str(row["key"]), -1), int(row["trade_id"]))  # type: ignore[call-overload]
        return found

    def held_ids(self, key: str, ids: np.ndarray) -> np.ndarray:
        """Ids held."""
        mine = {int(row["trade_id"]) for row in self.rows["trades"] if row["key"] == key}  # type: ignore[call-overload]
        return np.array([i for i in ids.tolist() if i in mine], np.int64)

    def newest_input_offset(self, table: str, partition: int, before_offset: int) -> int:
        """Largest input offset held before that record."""
        found = [
            int(row["input_offset"])  # type: ignore[call-overload]
            for row in self.rows[table]
            if row["kafka_partition"] == partition and row["kafka_offset"] < before_offset  # type: ignore[operator]
        ]
        return max(found, default=-1)


def trades(ids: list[int], time_us: int = AUGUST_END) -> bytes:
    """A trades record of one symbol with these ids; each id is a second later than the one before it."""
    count = len(ids)
    identity = np.array(ids, np.int64)
    columns = {
        "symbol_code": np.zeros(count, np.int32),
        "trade_id": identity,
        "price": np.ones(count),
        "size": np.ones(count),
        "side": np.ones(count, np.int8),
        "exchange_time_us": time_us + identity * 1_000_000,
        "receive_time_us": time_us + identity * 1_000_000,
    }
    return TRADES.encode(Frame(source="s", watermark_us=0, symbols=("binance:BTC-USDT",), columns=columns))


def bars(input_offset: int, finals: Iterable[int], open_time_us: int = AUGUST_END) -> bytes:
    """A bars record made of the trades record at ``input_offset``: one row per flag in ``finals``."""
    final = np.array(list(finals), np.int8)
    columns = {
        name: np.zeros(len(final), dtype) for name, dtype in BARS.dtypes.items() if name not in ("is_final", "open_time_us", "symbol_code")
    }
    columns.update(
        symbol_code=np.zeros(len(final), np.int32),
        is_final=final,
        open_time_us=open_time_us + (np.arange(len(final)) + input_offset * 10) * 1_000_000,
    )
    return BARS.encode(Frame(source="worker", watermark_us=0, symbols=("binance:BTC-USDT",), columns=columns, input_offset=input_offset))


def topic_sink(store: MemoryStore, topic: str = "trades", refused: list[Received] | None = None) -> TopicSink:
    """A sink as a new process makes it."""

    def undecodable(_: str, record: Received, __: DecodeError) -> None:
        assert refused is not None
        refused.append(record)

    codec = {"trades": TRADES, "bars": BARS, "deadletter": RowCodec("deadletter", 3), "quarantine": QUARANTINE}[topic]
    column = {"bars": "open_time_us", "deadletter": "time_us"}.get(topic, "exchange_time_us")
    return TopicSink(topic, column, codec, store, {}.__getitem__, undecodable)


def deliver(store: MemoryStore, sink: TopicSink, records: list[Received]) -> None:
    """One flush."""
    for batch in sink.batches(records):
        store.insert(batch)
        sink.inserted(batch)


def stored_ids(store: MemoryStore) -> list[int]:
    """Trade ids in the store, sorted, repeats included."""
    return sorted(int(row["trade_id"]) for row in store.rows["trades"])  # type: ignore[call-overload]


def test_a_batch_over_a_month_end_is_stored_in_two_inserts() -> None:
    """Each insert holds one month, since only that is atomic."""
    store = MemoryStore()
    sink = topic_sink(store)
    sink.resume(0, 0)
    batches = sink.batches([Received(0, 0, trades([0, 1, 2]))])
    assert [(batch.month, batch.row_count) for batch in batches] == [(54 * 12 + 7, 1), (54 * 12 + 8, 2)]


def test_the_same_trades_in_other_records_are_stored_once() -> None:
    """A second replay, an overlap after a reconnect and a repeat inside a record add nothing."""
    store = MemoryStore()
    sink = topic_sink(store)
    sink.resume(0, 0)
    deliver(store, sink, [Received(0, 0, trades([1, 2, 3, 3]))])
    deliver(store, sink, [Received(0, 1, trades([3, 4])), Received(0, 2, trades([4, 2, 7]))])
    deliver(store, sink, [Received(0, 3, trades([5, 6]))])  # late, never seen: below the largest id but not held
    assert stored_ids(store) == [1, 2, 3, 4, 5, 6, 7]
    assert sink.duplicates == 4


@pytest.mark.parametrize("topic", ["trades", "bars"])
@pytest.mark.parametrize("seed", range(25))
def test_killed_anywhere_nothing_is_lost_or_doubled(topic: str, seed: int) -> None:
    """Dying before or after any insert, with the commit lost or kept, leaves each row exactly once in the end."""
    print("seed", seed)
    rng = random.Random(seed)
    store = MemoryStore()
    if topic == "trades":
        log = [Received(0, offset, trades([offset * 3, offset * 3 + 1, offset * 3 + 2])) for offset in range(12)]
    else:
        log = [Received(0, offset, bars(offset, [rng.randint(0, 1) for _ in range(3)], AUGUST_END - 60_000_000)) for offset in range(12)]
        log.insert(5, Received(0, 99, log[4].value))  # the worker's re-sent frame, same input offset
        log = [Received(0, offset, record.value) for offset, record in enumerate(log)]
    committed = 0
    for _ in range(200):
        sink = topic_sink(store, topic)
        sink.resume(0, committed)
        store.die_in = rng.choice([-1_000_000, rng.randint(0, 7)])
        position = committed
        try:
            while position < len(log):
                take = rng.randint(1, 4)
                deliver(store, sink, log[position : position + take])
                position = min(position + take, len(log))
                if rng.random() < 0.7:
                    committed = position
        except KeyboardInterrupt:
            continue
        break
    if topic == "trades":
        assert stored_ids(store) == list(range(36))
    else:
        expected = sorted(
            (frame.input_offset, int(time))
            for frame in {BARS.decode(record.value).input_offset: BARS.decode(record.value) for record in log}.values()
            for time, final in zip(frame.columns["open_time_us"], frame.columns["is_final"], strict=True)
            if final
        )
        assert sorted((int(row["input_offset"]), int(row["open_time_us"])) for row in store.rows["bars"]) == expected  # type: ignore[call-overload]


def test_bars_of_the_repair_are_stored_beside_the_workers() -> None:
    """They come from no record of trades: the worker's place is neither needed nor moved, also in a sink that starts after them."""
    store = MemoryStore()
    sink = topic_sink(store, "bars")
    sink.resume(0, 0)
    deliver(store, sink, [Received(0, 0, bars(4, [1])), Received(0, 1, bars(-1, [1, 1])), Received(0, 2, bars(4, [1]))])
    again = topic_sink(store, "bars")
    again.resume(0, 2)
    deliver(store, again, [Received(0, 2, bars(4, [1])), Received(0, 3, bars(5, [1])), Received(0, 4, bars(-1, [1]))])
    assert sorted(int(row["input_offset"]) for row in store.rows["bars"]) == [-1, -1, -1, 4, 5]  # type: ignore[call-overload]


def test_suspects_told_of_twice_are_stored_once_and_what_a_person_says_always() -> None:
    """The worker repeats what lies behind its snapshot, with the same input offsets; a person's rows have none."""

    def suspects(input_offset: int, state: int, source: str) -> bytes:
        columns = {name: np.ones(1, dtype) for name, dtype in QUARANTINE.dtypes.items()}
        columns |= {"symbol_code": np.zeros(1, np.int32), "state": np.array([state], np.int8)}
        columns["exchange_time_us"] = np.array([AUGUST_END])
        frame = Frame(source=source, watermark_us=0, symbols=("binance:BTC-USDT",), columns=columns, input_offset=input_offset)
        return QUARANTINE.encode(frame)

    store = MemoryStore()
    first = [suspects(5, 1, "binance/ws"), suspects(7, 2, "binance/ws"), suspects(-1, 4, "person")]
    again = [suspects(5, 1, "binance/ws"), suspects(7, 2, "binance/ws"), suspects(9, 1, "binance/ws"), suspects(-1, 3, "person")]
    for start, values in ((0, first), (3, again)):
        sink = topic_sink(store, "quarantine")
        sink.resume(0, start)
        deliver(store, sink, [Received(0, offset, value) for offset, value in enumerate(values, start)])
    rows = [(row["input_offset"], row["state"], row["source"]) for row in store.rows["quarantine"]]
    assert rows == [(5, 1, "binance/ws"), (7, 2, "binance/ws"), (-1, 4, "person"), (9, 1, "binance/ws"), (-1, 3, "person")]


def test_open_bars_are_not_stored() -> None:
    """Only final rows reach the table."""
    store = MemoryStore()
    sink = topic_sink(store, "bars")
    sink.resume(0, 0)
    deliver(store, sink, [Received(0, 0, bars(0, [0, 1, 0])), Received(0, 1, bars(1, [0]))])
    assert len(store.rows["bars"]) == 1


def test_a_garbage_record_is_handed_over_and_the_rest_is_stored() -> None:
    """A poison record stops nothing."""
    store, refused = MemoryStore(), []
    sink = topic_sink(store, refused=refused)
    sink.resume(0, 0)
    poison = Received(0, 1, b"\0\0\0\0\1garbage")
    deliver(store, sink, [Received(0, 0, trades([1])), poison, Received(0, 2, trades([2]))])
    assert stored_ids(store) == [1, 2]
    assert refused == [poison]


def test_dead_letters_are_stored_with_their_bytes() -> None:
    """A row topic becomes columns too."""
    store = MemoryStore()
    sink = topic_sink(store, "deadletter")
    sink.resume(0, 0)
    letter = dead_letter(reason="malformed_message", detail="x", component="collector", raw=b"\xff\0", time_us=AUGUST_END)
    deliver(store, sink, [Received(0, 0, RowCodec("deadletter", 3).encode(letter))])
    assert store.rows["deadletter"][0]["raw"] == b"\xff\0"
    assert store.rows["deadletter"][0]["raw_size"] == 2
