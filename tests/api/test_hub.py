"""The hub: history and live join without a seam, each row once, in order, whatever the interleaving."""

# ruff: noqa: D102, D103 - helpers say what they do by their names
from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.cursors import LEAST, LiveCursor, decode_live
from api.deps import StreamLimits
from api.errors import PositionLostError
from api.live.client import Client, Subscription
from api.live.hub import Hub
from api.live.series import SeriesKey
from api.metrics import Metrics
from tests.api.support import EPOCH, ManualClock, MemoryKafka, MemoryStore, bar_open_us, bars_frame, trades_frame, truth

KEY = "binance:BTC-USDT"
BARS = SeriesKey("bars", "binance", "BTC-USDT", 60)
TRADES = SeriesKey("trades", "binance", "BTC-USDT")
METRICS = Metrics()


class Reader:
    """A client of one series that keeps what a person would keep: rows by key and the last cursor. It is its own Writer."""

    def __init__(self, hub: Hub, key: SeriesKey, limits: StreamLimits) -> None:
        self.hub = hub
        self.key = key
        self.messages: list[dict[str, Any]] = []
        self.cursor: str | None = None
        self._client = Client(self, limits.queue_bytes, METRICS)
        self.subscription = Subscription(1, key, self._client, 200)

    def ready(self) -> bool:
        return True

    def on_ready(self, callback: Callable[[], None]) -> None:
        pass

    def write(self, texts: Sequence[bytes]) -> None:
        for text in texts:
            message = json.loads(text)
            self.messages.append(message)
            self.cursor = message["cursor"]

    async def start(self, cursor: str | None = None, limit: int = 200) -> None:
        await self.hub.subscribe(self.subscription, decode_live(cursor) if cursor else None, limit)

    async def stop(self) -> None:
        self.hub.unsubscribe(self.subscription)
        for _ in range(3):
            await asyncio.sleep(0)

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    def final_rows(self) -> list[tuple[int, int]]:
        """(key, revision) of every final row delivered after the snapshot, in order."""
        name = "open_time_us" if self.key.timeframe_s else "trade_id"
        return [
            (row[name], row.get("revision", 0))
            for message in self.messages
            if message["type"] in ("update", "corrected")
            for row in message["data"]
            if row.get("is_final", True)
        ]

    def snapshot_rows(self) -> list[tuple[int, int]]:
        name = "open_time_us" if self.key.timeframe_s else "trade_id"
        first = next(message for message in self.messages if message["type"] == "snapshot")
        return [(row[name], row.get("revision", 0)) for row in first["data"] if row.get("is_final", True)]


async def start_hub(kafka: MemoryKafka, store: MemoryStore, **changes: Any) -> tuple[Hub, ManualClock, StreamLimits]:
    clock, limits = ManualClock(), StreamLimits(**changes)
    hub = Hub(kafka, store, clock, kafka.partitions, limits)
    await hub.start()
    return hub, clock, limits


def expected(kafka: MemoryKafka, key: SeriesKey) -> list[tuple[int, int]]:
    return [(one, revision) for one, revision, _, _ in truth(kafka, key)]


async def test_snapshot_then_live_has_no_seam_although_store_and_tail_stand_elsewhere() -> None:
    """Rows between what is stored and where the tail stands are in the snapshot; later ones follow; none is missed or doubled."""
    kafka = MemoryKafka()
    store = MemoryStore(kafka)
    for number in range(10):
        kafka.append("bars", bars_frame(KEY, [(number, 0, 1), (number + 1, 0, 0)]))
    store.stored["bars"] = 4
    kafka.handed[("bars", 0)] = 6
    hub, _, limits = await start_hub(kafka, store)
    reader = Reader(hub, BARS, limits)
    task = asyncio.ensure_future(reader.start())
    await asyncio.sleep(0)
    kafka.hand("bars", count=2)
    await task
    kafka.hand("bars")
    await reader.settle()
    assert reader.snapshot_rows() + reader.final_rows() == expected(kafka, BARS)
    assert [message["seq"] for message in reader.messages] == list(range(1, len(reader.messages) + 1))
    await hub.stop()


async def test_open_bar_is_last_in_the_snapshot_and_stale_updates_of_a_closed_bar_are_not_shown() -> None:
    """A snapshot ends with the open bar; after its final row no update of it comes, also when a worker sends old frames again."""
    kafka = MemoryKafka()
    store = MemoryStore(kafka)
    kafka.append("bars", bars_frame(KEY, [(0, 0, 1)], input_offset=1))
    kafka.append("bars", bars_frame(KEY, [(1, 0, 0)], input_offset=2))
    kafka.handed[("bars", 0)] = 0
    hub, _, limits = await start_hub(kafka, store)
    kafka.hand("bars")
    reader = Reader(hub, BARS, limits)
    await reader.start()
    kafka.append("bars", bars_frame(KEY, [(1, 0, 1), (2, 0, 0)], input_offset=3))
    kafka.append("bars", bars_frame(KEY, [(1, 0, 0)], input_offset=2))
    kafka.append("bars", bars_frame(KEY, [(1, 0, 1), (2, 0, 0)], input_offset=3))
    kafka.hand("bars")
    await reader.settle()
    shown = [(row["open_time_us"], row["is_final"]) for message in reader.messages for row in message["data"]]
    assert shown == [
        (bar_open_us(0), True),
        (bar_open_us(1), False),
        (bar_open_us(1), True),
        (bar_open_us(2), False),
    ]
    await hub.stop()


async def test_a_quiet_symbol_shows_its_open_bar_although_the_update_is_long_past() -> None:
    """The newest update of an open bar is remembered for every symbol; a bar that has closed since is not shown as open."""
    kafka = MemoryKafka()
    store = MemoryStore(kafka)
    hub, _, limits = await start_hub(kafka, store, ring_bytes=500)
    for number in range(80):
        kafka.append("bars", bars_frame(f"binance:S{number}-USDT", [(5, 0, 1), (6, 0, 0)], input_offset=number))
    kafka.append("bars", bars_frame("binance:S3-USDT", [(6, 0, 1)], input_offset=90))
    kafka.hand("bars")
    store.catch_up("bars")
    for symbol, flags in (("S2-USDT", [True, False]), ("S79-USDT", [True, False]), ("S3-USDT", [True, True])):
        reader = Reader(hub, SeriesKey("bars", "binance", symbol, 60), limits)
        await reader.start()
        await reader.settle()
        assert [row["is_final"] for row in reader.messages[0]["data"]] == flags
        assert reader.messages[0]["data"][-1]["trade_count"] == 6
    await hub.stop()


async def test_a_late_trade_shows_as_a_corrected_bar_once() -> None:
    """A higher revision comes as ``corrected``, the same one sent again does not."""
    kafka = MemoryKafka()
    store = MemoryStore(kafka)
    hub, _, limits = await start_hub(kafka, store)
    reader = Reader(hub, BARS, limits)
    await reader.start()
    for rows in ([(0, 0, 1)], [(1, 0, 1)], [(0, 1, 1)], [(0, 1, 1)], [(0, 0, 1)], [(0, 2, 1), (2, 0, 1)]):
        kafka.append("bars", bars_frame(KEY, rows))
    kafka.hand("bars")
    await reader.settle()
    kinds = [(message["type"], [(row["trade_count"], row["revision"]) for row in message["data"]]) for message in reader.messages[1:]]
    assert kinds == [
        ("update", [(0, 0)]),
        ("update", [(1, 0)]),
        ("corrected", [(0, 1)]),
        ("corrected", [(0, 2)]),
        ("update", [(2, 0)]),
    ]
    await hub.stop()


async def test_a_repaired_bar_of_the_past_shows_as_corrected_between_the_workers_updates() -> None:
    """A frame of the repair names no input; it revises closed bars, also those only the store knows, and leaves the open bar alone."""
    kafka = MemoryKafka()
    store = MemoryStore(kafka)
    for number in range(4):
        kafka.append("bars", bars_frame(KEY, [(number, 0, 1)], input_offset=number))
    store.catch_up("bars")
    hub, _, limits = await start_hub(kafka, store)
    reader = Reader(hub, BARS, limits)
    await reader.start(limit=2)
    kafka.append("bars", bars_frame(KEY, [(4, 0, 0)], input_offset=7))
    kafka.append("bars", bars_frame(KEY, [(0, 1, 1), (3, 1, 1)], input_offset=-1))
    kafka.append("bars", bars_frame(KEY, [(0, 1, 1), (3, 1, 1)], input_offset=-1))
    kafka.append("bars", bars_frame(KEY, [(4, 0, 1)], input_offset=9))
    kafka.hand("bars")
    await reader.settle()
    kinds = [
        (message["type"], [(row["trade_count"], row["revision"], row["is_final"]) for row in message["data"]])
        for message in reader.messages[1:]
    ]
    assert kinds == [
        ("update", [(4, 0, False)]),
        ("corrected", [(0, 1, True), (3, 1, True)]),
        ("update", [(4, 0, True)]),
    ]
    await hub.stop()


async def test_the_workers_row_is_shown_after_the_repairs_of_the_same_revision() -> None:
    """The repair closed a bar while the worker was away, and the worker does when it is back: the later row is valid, here and in history."""
    kafka = MemoryKafka()
    store = MemoryStore(kafka)
    kafka.append("bars", bars_frame(KEY, [(0, 0, 1)], input_offset=1))
    kafka.append("bars", bars_frame(KEY, [(1, 0, 1)], input_offset=-1))
    store.catch_up("bars")
    hub, _, limits = await start_hub(kafka, store)
    reader = Reader(hub, BARS, limits)
    await reader.start()
    for _ in range(2):  # the second time after a crash
        kafka.append("bars", bars_frame(KEY, [(0, 0, 1)], input_offset=1))
        kafka.append("bars", bars_frame(KEY, [(1, 0, 1)], input_offset=7))
        kafka.hand("bars")
        await reader.settle()
    assert reader.snapshot_rows() == [(bar_open_us(0), 0), (bar_open_us(1), 0)]
    assert reader.final_rows() == [(bar_open_us(1), 0)]
    await hub.stop()


async def test_resuming_between_two_messages_of_one_record_delivers_the_rest_of_it() -> None:
    """A cursor may stand inside a record: rows before it are not repeated."""
    kafka = MemoryKafka()
    store = MemoryStore(kafka)
    hub, _, limits = await start_hub(kafka, store)
    first = Reader(hub, BARS, limits)
    await first.start()
    kafka.append("bars", bars_frame(KEY, [(0, 0, 1), (1, 0, 1)]))
    kafka.append("bars", bars_frame(KEY, [(0, 1, 1), (2, 0, 1), (3, 0, 0)]))
    kafka.hand("bars")
    await first.settle()
    corrected = next(message for message in first.messages if message["type"] == "corrected")
    for fresh in (False, True):
        if fresh:
            await hub.stop()
            hub, _, limits = await start_hub(kafka, store)
        second = Reader(hub, BARS, limits)
        await second.start(corrected["cursor"])
        await second.settle()
        assert second.final_rows() == [(bar_open_us(2), 0)]
        assert second.messages[-1]["data"][-1]["is_final"] is False
    await hub.stop()


async def test_trades_sent_again_long_after_are_recognised_by_the_store() -> None:
    """Ids older than what a series remembers are asked for: known ones are dropped, never seen ones are delivered."""
    kafka = MemoryKafka()
    store = MemoryStore(kafka)
    for first in range(0, 400, 10):
        kafka.append("trades", trades_frame(KEY, range(1000 + first, 1010 + first)))
    store.catch_up("trades")
    hub, _, limits = await start_hub(kafka, store)
    reader = Reader(hub, TRADES, limits)
    await reader.start()
    kafka.append("trades", trades_frame(KEY, range(1000, 1020)))
    kafka.append("trades", trades_frame(KEY, [1400, 1401]))
    kafka.append("trades", trades_frame(KEY, [990, 991, 1005]))
    kafka.hand("trades")
    await reader.settle()
    kafka.append("trades", trades_frame(KEY, [1402, 990]))
    store.catch_up("trades")
    kafka.hand("trades")
    await reader.settle()
    assert [one for one, _ in reader.final_rows()] == [1400, 1401, 990, 991, 1402]
    await hub.stop()


@pytest.mark.parametrize("channel", ["bars", "trades"])
async def test_late_rows_sent_twice_before_the_store_has_them_show_once(channel: str) -> None:
    """A row older than what a series remembers, and again before the sink has stored it: the series remembers having shown it."""
    kafka = MemoryKafka()
    store = MemoryStore(kafka)
    key = BARS if channel == "bars" else TRADES
    for number in range(100, 140):
        kafka.append(channel, bars_frame(KEY, [(number, 0, 1)]) if channel == "bars" else trades_frame(KEY, [number]))
    store.catch_up(channel)
    hub, _, limits = await start_hub(kafka, store, snapshot_bars=5, snapshot_trades=5)
    reader = Reader(hub, key, limits)
    await reader.start(limit=5)
    for _ in range(3):
        kafka.append(channel, bars_frame(KEY, [(3, 1, 1)]) if channel == "bars" else trades_frame(KEY, [3]))
        kafka.hand(channel)
        await reader.settle()
    assert len(reader.final_rows()) == 1
    await hub.stop()


async def test_a_cursor_of_another_epoch_or_older_than_the_topic_is_lost() -> None:
    """Such a cursor cannot be continued exactly, and the hub says so instead of guessing."""
    kafka = MemoryKafka()
    store = MemoryStore(kafka)
    for number in range(20):
        kafka.append("bars", bars_frame(KEY, [(number, 0, 1)]))
    store.catch_up("bars")
    hub, _, limits = await start_hub(kafka, store)
    other = LiveCursor(topic="bars", partition=0, offset=5, epoch=1).encode()
    with pytest.raises(PositionLostError):
        await Reader(hub, BARS, limits).start(other)
    kafka.low = 10
    with pytest.raises(PositionLostError):
        await Reader(hub, BARS, limits).start(LiveCursor(topic="bars", partition=0, offset=5, epoch=EPOCH).encode())
    await hub.stop()


async def test_restart_sends_reset_and_a_snapshot_even_if_the_store_is_away_for_a_while() -> None:
    """After a reset the client gets a snapshot as soon as there is one, then live."""
    kafka = MemoryKafka()
    store = MemoryStore(kafka)
    for number in range(5):
        kafka.append("bars", bars_frame(KEY, [(number, 0, 1)]))
    store.catch_up("bars")
    hub, clock, limits = await start_hub(kafka, store)
    reader = Reader(hub, BARS, limits)
    await reader.start()
    await reader.settle()
    store.reachable = False
    kafka.append("bars", bars_frame(KEY, [(5, 0, 1)]))
    kafka.move("bars", 0, 6)
    await reader.settle()
    store.catch_up("bars")
    store.reachable = True
    await clock.advance(2)
    await reader.settle()
    assert [message["type"] for message in reader.messages] == ["snapshot", "reset", "snapshot"]
    assert [row["trade_count"] for row in reader.messages[-1]["data"]] == [0, 1, 2, 3, 4, 5]
    await hub.stop()


async def test_silent_series_gets_heartbeats_whose_cursor_moves_with_the_topic() -> None:
    """A symbol without trades keeps a fresh cursor, so that retention never makes it too old."""
    kafka = MemoryKafka()
    store = MemoryStore(kafka)
    hub, clock, limits = await start_hub(kafka, store)
    reader = Reader(hub, BARS, limits)
    await reader.start()
    for number in range(7):
        kafka.append("bars", bars_frame("binance:ETH-USDT", [(number, 0, 1)]))
    kafka.hand("bars")
    for _ in range(3):
        await clock.advance(limits.heartbeat_s)
    await reader.settle()
    beat = reader.messages[-1]
    assert beat["type"] == "heartbeat"
    assert decode_live(beat["cursor"]).offset == 7
    await hub.stop()


async def test_garbage_in_the_topic_is_skipped_and_counted() -> None:
    """A record that is no frame costs one log line, not the tail."""
    kafka = MemoryKafka()
    store = MemoryStore(kafka)
    hub, _, limits = await start_hub(kafka, store)
    reader = Reader(hub, BARS, limits)
    await reader.start()
    kafka.append("bars", bars_frame(KEY, [(0, 0, 1)]))
    kafka.log("bars").append(b"\x00\x00\x00\x00\x01garbage")
    kafka.log("bars").append(b"")
    kafka.append("bars", bars_frame(KEY, [(1, 0, 1)]))
    kafka.hand("bars")
    await reader.settle()
    assert [one for one, _ in reader.final_rows()] == [bar_open_us(0), bar_open_us(1)]
    assert sum(tail.bad_records for tail in hub.tails()) == 2
    await hub.stop()


async def test_a_page_that_ended_before_the_present_is_continued_from_the_store_and_then_the_topic() -> None:
    """The live cursor of an inner page brings the rest of history first, each bar's newest revision, then live."""
    kafka = MemoryKafka()
    store = MemoryStore(kafka)
    for number in range(30):
        kafka.append("bars", bars_frame(KEY, [(number, 0, 1)]))
    kafka.append("bars", bars_frame(KEY, [(12, 1, 1)]))
    store.catch_up("bars")
    kafka.low = 25  # the rest has been deleted by retention
    hub, _, limits = await start_hub(kafka, store)
    cursor = LiveCursor(topic="bars", partition=0, offset=31, epoch=EPOCH, floor_key=bar_open_us(9), until_us=LEAST)
    reader = Reader(hub, BARS, limits)
    await reader.start(cursor.encode())
    kafka.append("bars", bars_frame(KEY, [(30, 0, 1)]))
    kafka.hand("bars")
    await reader.settle()
    assert reader.final_rows() == [(bar_open_us(n), 1 if n == 12 else 0) for n in range(10, 31)]
    await hub.stop()


async def test_an_idle_series_is_forgotten_after_its_linger_time() -> None:
    """Memory is bounded: without readers a series goes, and a later reader starts it anew."""
    kafka = MemoryKafka()
    store = MemoryStore(kafka)
    hub, clock, limits = await start_hub(kafka, store)
    reader = Reader(hub, BARS, limits)
    await reader.start()
    await reader.stop()
    tail = next(tail for tail in hub.tails() if tail.topic == "bars")
    assert len(tail.followers()) == 1
    for _ in range(10):
        await clock.advance(limits.heartbeat_s)
    assert tail.followers() == []
    await hub.stop()


STEPS = st.lists(
    st.sampled_from(
        [
            "produce",
            "produce",
            "produce",
            "again",
            "late",
            "hand",
            "hand1",
            "store",
            "connect",
            "leave",
            "restart",
            "yield",
            "foreign",
            "other",
        ]
    ),
    min_size=10,
    max_size=80,
)


@settings(max_examples=100, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 2**32), channel=st.sampled_from(["bars", "trades"]))
def test_any_interleaving_gives_each_row_once_and_in_order(steps: list[str], seed: int, channel: str) -> None:
    """Frames, re-sent frames, late rows, a lagging store, disconnects and API restarts in any order: snapshot + stream = truth."""
    asyncio.run(_interleave(steps, Random(seed), BARS if channel == "bars" else TRADES))


async def _interleave(steps: list[str], random: Random, key: SeriesKey) -> None:
    topic = key.channel
    kafka = MemoryKafka()
    store = MemoryStore(kafka)
    small = {"log_messages": 3, "ring_bytes": 2_000, "snapshot_bars": 5, "snapshot_trades": 5}
    hub, _, limits = await start_hub(kafka, store, **small)
    reader: Reader | None = None
    starting: asyncio.Task[None] | None = None
    snapshot: list[tuple[int, int]] | None = None
    received: list[tuple[int, int]] = []
    cursor: str | None = None
    counter = 0
    others: list[asyncio.Task[None]] = []

    async def leave() -> None:
        nonlocal reader, starting, cursor, snapshot
        if reader is None:
            return
        if starting is not None and not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        await reader.settle()
        await reader.stop()
        cursor = reader.cursor or cursor
        if snapshot is None and any(message["type"] == "snapshot" for message in reader.messages):
            snapshot = reader.snapshot_rows()
        received.extend(reader.final_rows())
        reader = starting = None

    for step in steps:
        if step == "produce":
            rows = random.randint(1, 3)
            if topic == "bars":
                bars = [(counter + n, 0, 1) for n in range(rows)] + [(counter + rows, 0, 0)]
                kafka.append(topic, bars_frame(KEY, bars, input_offset=len(kafka.log(topic))))
            else:
                kafka.append(topic, trades_frame(KEY, range(counter, counter + rows), others=["binance:ETH-USDT"]))
            counter += rows
        elif step == "again" and kafka.log(topic):
            kafka.log(topic).append(random.choice(kafka.log(topic)))
        elif step == "late" and counter:
            if topic == "bars":
                made = random.choice([-1, len(kafka.log(topic))])  # by the repair, or of a late trade
                kafka.append(topic, bars_frame(KEY, [(random.randrange(counter), random.randint(0, 2), 1)], input_offset=made))
            else:
                kafka.append(topic, trades_frame(KEY, [-random.randint(1, 50)]))
        elif step == "hand":
            kafka.hand(topic)
        elif step == "hand1":
            kafka.hand(topic, count=1)
        elif step == "store":
            store.catch_up(topic, random.randint(1, 5))
        elif step == "foreign":
            other = "binance:ETH-USDT"
            kafka.append(topic, bars_frame(other, [(counter, 0, 1)]) if topic == "bars" else trades_frame(other, [counter]))
        elif step == "other":  # somebody else keeps the series warm, or starts it
            others.append(asyncio.ensure_future(Reader(hub, key, limits).start()))
        elif step == "connect" and reader is None:
            reader = Reader(hub, key, limits)
            starting = asyncio.ensure_future(reader.start(cursor, 5))
        elif step == "leave":
            await leave()
        elif step == "restart":
            await leave()
            await _cancel(others)
            await hub.stop()
            kafka.handed[(topic, 0)] = random.randint(0, len(kafka.log(topic)))
            hub, _, limits = await start_hub(kafka, store, **small)
        elif step == "yield":
            for _ in range(random.randint(1, 6)):
                await asyncio.sleep(0)
    await leave()
    kafka.hand(topic)
    reader = Reader(hub, key, limits)
    starting = asyncio.ensure_future(reader.start(cursor, 5))
    await asyncio.wait_for(starting, 5)
    await leave()
    await _cancel(others)
    await hub.stop()
    _check(kafka, key, snapshot or [], received)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    tasks.clear()


def _check(kafka: MemoryKafka, key: SeriesKey, snapshot: list[tuple[int, int]], received: list[tuple[int, int]]) -> None:
    """What came after the snapshot is the end of the truth, exactly, in order; the snapshot is the newest of what stood before."""
    everything = expected(kafka, key)
    before = everything[: len(everything) - len(received)]
    assert received == everything[len(before) :]
    newest = dict(before)
    assert snapshot == sorted(newest.items())[-5:]
