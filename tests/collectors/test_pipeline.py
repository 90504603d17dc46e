"""One shard's pipeline: bytes in, frames out, by hand-moved time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors import pipeline as pipeline_module
from collectors.batcher import Batcher, BatcherConfig
from collectors.binance.mapper import BinanceMapper
from collectors.dedupe import Gap, Sequencer
from collectors.pipeline import Pipeline, PipelineConfig
from collectors.stale import StaleDetector
from collectors.stats import FeedStats
from collectors.watermark import Watermark
from collectors.wire import TRADE_DTYPES, Reply
from schemas.codec import FrameCodec
from schemas.frames import Frame
from tests.collectors.fakes import RecordingDeadLetters, capture, rows_of

T_MS = 1_723_161_255_342
STEP = 10_000


class Bench:
    """A pipeline of two symbols with everything it calls recorded."""

    def __init__(self, **config: Any) -> None:
        self.letters = RecordingDeadLetters()
        self.replies: list[Reply] = []
        self.gaps: list[Gap] = []
        self.now = 1_000_000
        self.frames: list[tuple[int, Frame]] = []
        self.pipeline = Pipeline(
            exchange="binance",
            mapper=BinanceMapper("trade"),
            sequencer=Sequencer(consecutive=True),
            watermark=Watermark(),
            batcher=Batcher("binance/ws/0", TRADE_DTYPES, BatcherConfig()),
            stale=StaleDetector(),
            dead_letters=self.letters,
            stats=FeedStats(),
            on_reply=self.replies.append,
            on_gap=self.gaps.append,
            config=PipelineConfig(**config),
        )
        self.codes = {
            "BTC": self.pipeline.add_symbol("binance:BTC-USDT", "btcusdt@trade", self.now),
            "ETH": self.pipeline.add_symbol("binance:ETH-USDT", "ethusdt@trade", self.now),
        }

    def round(self, *messages: bytes, received_us: int | None = None) -> None:
        """Receive, wait a linger, take."""
        if messages:
            self.pipeline.receive(list(messages), self.now if received_us is None else received_us)
        before, self.now = self.now, self.now + STEP
        self.frames += [(partition, frame) for _, partition, frame in self.pipeline.take(self.now, before)]


def trade(number: int, *, symbol: str = "btc", ms: int | None = None, price: str = "1.5") -> bytes:
    """A message; its time moves with its number."""
    at = T_MS + number if ms is None else ms
    return (
        f'{{"stream":"{symbol}usdt@trade","data":{{"e":"trade","E":{at},"s":"{symbol.upper()}USDT","t":{number},"p":"{price}","q":"2.0",'
        f'"T":{at},"m":false,"M":true}}}}'
    ).encode()


def test_rows_carry_when_their_chunk_was_received() -> None:
    """Two chunks in one round, each with its own time."""
    made = Bench()
    made.pipeline.receive([trade(1), trade(2)], 111)
    made.pipeline.receive([trade(3)], 222)
    made.round()
    (frame,) = [frame for _, frame in made.frames if frame.row_count]
    assert frame.columns["receive_time_us"].tolist() == [111, 111, 222]
    assert frame.columns["exchange_time_us"].tolist() == [(T_MS + n) * 1000 for n in (1, 2, 3)]
    assert FrameCodec("trades", 1).decode(FrameCodec("trades", 1).encode(frame)).source == "binance/ws/0"


def test_a_gap_holds_the_watermark_until_it_is_filled() -> None:
    """What is fetched is never older than what was promised."""
    made = Bench()
    made.round(trade(1), trade(2))
    held = made.frames[-1][1].watermark_us
    made.round(trade(2_005))
    (gap,) = made.gaps
    for number in range(50):
        made.round(trade(2_006 + number * 10))
    assert {frame.watermark_us for _, frame in made.frames[1:] if frame.row_count} == {held}
    columns = made.pipeline.mapper.parse([trade(number) for number in range(3, 2_005)]).columns
    assert made.pipeline.backfill(columns, 5, made.now) == 2_002
    topic, _, frame = made.pipeline.gap_done(gap, 5, complete=False)
    assert (topic, frame.columns["state"].tolist()) == ("gaps", [2])
    assert frame.columns["first_missing_id"].tolist() == [3]
    FrameCodec("gaps", 1).encode(frame)


def test_what_the_venue_cannot_give_is_told_interval_by_interval() -> None:
    """A partly filled gap: two intervals are lost, each a row with state 3."""
    made = Bench()
    made.round(trade(1))
    made.round(trade(10))
    made.round(trade(5))
    (gap,) = made.gaps
    _, _, frame = made.pipeline.gap_done(gap, 5, complete=False)
    intervals = list(zip(frame.columns["first_missing_id"].tolist(), frame.columns["last_missing_id"].tolist(), strict=True))
    assert intervals == [(2, 4), (6, 9)]
    assert frame.columns["state"].tolist() == [3, 3]
    assert made.pipeline.stats.gaps_unfillable == 1
    assert made.pipeline.watermark.holding(made.now) == []


def test_a_wild_time_is_dead_lettered_and_found_missing() -> None:
    """A trade dated next year: its bytes are kept, its neighbours pass, bars do not close."""
    made = Bench()
    made.round(trade(1))
    wild = trade(2, ms=T_MS + 365 * 86_400_000)
    made.round(wild, trade(3))
    assert made.letters.reasons == ["implausible_time"]
    assert made.letters.items[0]["raw"] == wild
    assert rows_of(made.frames)["binance:BTC-USDT"] == [1, 3]
    assert [(gap.first_id, gap.last_id) for gap in made.gaps] == [(2, 2)]
    assert max(frame.watermark_us for _, frame in made.frames) < (T_MS + 1_000) * 1000


def test_a_machine_that_slept_is_believed_after_three_rounds() -> None:
    """An hour is missing: two rounds are dead-lettered (and fetched as gaps), then the new time holds."""
    made = Bench()
    made.round(trade(1))
    hour = T_MS + 3_600_000
    for number in range(2, 6):
        made.round(trade(number, ms=hour + number))
    assert made.letters.reasons == ["implausible_time"] * 2
    assert rows_of(made.frames)["binance:BTC-USDT"] == [1, 4, 5]


def test_our_wall_clock_may_jump() -> None:
    """Receive times go back an hour; watermarks do not care."""
    made = Bench()
    for number in range(1, 20):
        made.round(trade(number), received_us=10**15 - number * 10**9)
    marks = [frame.watermark_us for _, frame in made.frames]
    assert marks == sorted(marks)
    assert marks[-1] >= (T_MS + 19) * 1000 - 500_000


def test_rejected_bytes_carry_reason_place_and_time() -> None:
    """And the counter of the reason."""
    made = Bench()
    made.round(trade(1), b"\xff\xfe garbage", trade(2), received_us=777)
    (letter,) = made.letters.items
    assert letter["raw"] == b"\xff\xfe garbage"
    assert (letter["reason"], letter["exchange"], letter["place"], letter["time_us"]) == (
        "malformed_message",
        "binance",
        "binance/ws/0",
        777,
    )
    assert made.pipeline.stats.errors == {"malformed_message": 1}
    assert rows_of(made.frames)["binance:BTC-USDT"] == [1, 2]


def test_a_flood_of_garbage_is_kept_in_part_and_counted_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A venue that changed its format does not flood the dead letters."""
    monkeypatch.setattr(pipeline_module, "MAX_REJECTED_A_ROUND", 10)
    made = Bench()
    made.round(*[b"x"] * 25)
    assert len(made.letters.items) == 10
    assert made.pipeline.stats.errors == {"malformed_message": 10, "rejected_not_kept": 15}


def test_staging_says_when_it_is_full_and_when_it_has_room() -> None:
    """Bounded by bytes; the shell stops and starts reading by it."""
    made = Bench(max_staged_bytes=1_000)
    assert made.pipeline.has_room
    made.pipeline.receive([trade(number) for number in range(1, 10)], 1)
    assert made.pipeline.is_full
    made.round()
    assert not made.pipeline.is_full
    assert made.pipeline.has_room


def test_recorded_midnight_goes_through_unchanged() -> None:
    """Both BTCUSDT captures through the whole pipeline in rounds of 40 ms of their own time: 19,904 trades, ids without a hole, none late."""
    made = Bench()
    started = None
    chunk: list[bytes] = []
    for day in ("20240808", "20240809"):
        for received_us, message in capture(f"spot_btcusdt_{day}"):
            if b"@trade" not in message:
                continue
            started = started or received_us
            while received_us - started > made.now - 1_000_000 + 4 * STEP:
                made.now += 3 * STEP
                made.round(*chunk)
                chunk = []
            chunk.append(message)
    made.round(*chunk)
    assert rows_of(made.frames)["binance:BTC-USDT"] == list(range(3_735_683_259, 3_735_703_163))
    promised: dict[int, int] = {}
    for partition, frame in made.frames:
        if frame.row_count:
            assert int(frame.columns["exchange_time_us"].min()) >= promised.get(partition, 0)
        promised[partition] = frame.watermark_us
    assert made.gaps == []
    assert made.letters.items == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.one_of(st.integers(1, 40), st.binary(max_size=8)), max_size=8), max_size=15))
def test_every_message_is_a_row_a_duplicate_or_a_letter(rounds: list[list[int | bytes]]) -> None:
    """Nothing vanishes, whatever order and garbage."""
    made = Bench()
    total = 0
    for items in rounds:
        messages = [trade(item, ms=T_MS) if isinstance(item, int) else item for item in items]
        total += len(messages)
        made.round(*messages)
    rows = sum(len(found) for found in rows_of(made.frames).values())
    stats = made.pipeline.stats
    assert rows + stats.duplicates + len(made.letters.items) + len(made.replies) + stats.ignored == total
