"""What asks for a repair, which bars are due, and how a look at a job ends: pure parts, without servers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.repair_jobs import Job, Wanted
from infra.repair_publish import BarPublisher
from infra.repair_reader import Clock
from infra.repair_run import SETTLE_US, Outcome, SymbolRun
from infra.repair_triggers import merge, of_gaps, of_letter, of_quarantine
from infra.symbol_reader import Neighbour
from schemas.codec import FrameCodec, RowCodec
from schemas.frames import Frame
from schemas.timeframes import TIMEFRAMES, timeframe_seconds

DAY_US = 86_400_000_000
T0_US = 1_723_161_600_000_000
"""Midnight."""
SECOND = 1_000_000


def rows(topic: str, *values: dict[str, int]) -> Frame:
    """A frame of one symbol with these values; the others are 0."""
    columns = {name: np.array([value.get(name, 0) for value in values], dtype) for name, dtype in FrameCodec(topic, 1).dtypes.items()}
    return Frame(source="test", watermark_us=0, symbols=("binance:BTC-USDT",), columns=columns)


def test_gaps_that_were_decided_ask_for_their_bars() -> None:
    """Filled and unfillable ones of trades; open ones, other channels, endless ones and what a person fetched do not."""
    base = {"start_time_us": T0_US, "end_time_us": T0_US + 5, "channel": 1, "evidence": 1}
    frame = rows(
        "gaps",
        base | {"state": 2},
        base | {"state": 3, "end_time_us": T0_US},
        base | {"state": 1},
        base | {"state": 0},
        base | {"state": 2, "channel": 2},
        base | {"state": 3, "end_time_us": 0},
        base | {"state": 2, "evidence": 7},
    )
    found = [(one.reason, one.start_us - T0_US, one.end_us - T0_US) for one in of_gaps(frame, "gaps/0/1")]
    assert found == [("gap_filled", 0, 6), ("gap_unfillable", 0, 1)]
    assert list(of_gaps(Frame(source="x", watermark_us=0), "gaps/0/1")) == []


def test_decided_suspects_ask_for_their_bar() -> None:
    """Confirmed, released and discarded; not those that are just held."""
    frame = rows("quarantine", *({"state": state, "exchange_time_us": T0_US + state} for state in (1, 2, 3, 4)))
    assert [one.start_us - T0_US for one in of_quarantine(frame, "quarantine/0/1")] == [2, 3, 4]


def letter(**changes: Any) -> dict[str, Any]:
    """A dead letter of the worker."""
    raw = json.dumps({"key": "binance:BTC-USDT", "trade_id": 1, "exchange_time_us": T0_US}).encode()
    return {"reason": "too_late", "component": "worker", "raw": raw} | changes


def test_letters_of_trades_too_late_ask_for_their_bar() -> None:
    """Others, and letters of others, do not; broken ones are no error."""
    (found,) = of_letter(letter(), "deadletter/0/1")
    assert (found.exchange, found.symbol, found.start_us, found.end_us) == ("binance", "BTC-USDT", T0_US, T0_US + 1)
    for change in (
        {"reason": "bad_price"},
        {"component": "collector"},
        {"raw": b"\xff"},
        {"raw": b"[]"},
        {"raw": b'{"key":"x","exchange_time_us":1}'},
    ):
        assert list(of_letter(letter(**change), "deadletter/0/1")) == []


def wanted(start_s: int, end_s: int, offset: int, symbol: str = "BTC-USDT") -> Wanted:
    """A stretch in seconds after T0."""
    return Wanted(
        exchange="binance",
        symbol=symbol,
        start_us=T0_US + start_s * SECOND,
        end_us=T0_US + end_s * SECOND,
        reason="gap_filled",
        trigger=f"gaps/0/{offset}",
    )


@settings(max_examples=60, deadline=None)
@given(spans=st.lists(st.tuples(st.integers(0, 5_000), st.integers(1, 300), st.sampled_from(["BTC-USDT", "ETH-USDT"])), max_size=12))
def test_merged_stretches_cover_what_was_asked_and_lie_apart(spans: list[tuple[int, int, str]]) -> None:
    """Every stretch is inside one of the merged; two of one symbol are more than a minute apart and have triggers of their own."""
    asked = [wanted(start, start + length, offset, symbol) for offset, (start, length, symbol) in enumerate(spans)]
    merged = merge(asked)
    for one in asked:
        assert any(each.symbol == one.symbol and each.start_us <= one.start_us and one.end_us <= each.end_us for each in merged)
    for symbol in ("BTC-USDT", "ETH-USDT"):
        mine = sorted((each.start_us, each.end_us) for each in merged if each.symbol == symbol)
        assert all(after[0] - before[1] > 60 * SECOND for before, after in zip(mine, mine[1:], strict=False))
    assert len({(each.symbol, each.trigger) for each in merged}) == len(merged)
    assert merge(asked) == merged


class FakeReader:
    """What a plan asks of the store."""

    def __init__(self, first_us: int, last_us: int, clock: Clock, after: Neighbour | None) -> None:
        self._extent, self._clock, self._after = (first_us, last_us), clock, after

    def extent(self) -> tuple[int, int]:
        """First and last trade."""
        return self._extent

    def clock(self, _: int) -> Clock:
        """The worker's newest bar."""
        return self._clock

    def after_in_bars(self, _: int) -> Neighbour | None:
        """The next trade."""
        return self._after


def job(start_us: int, end_us: int, *, until_us: int = 0, reason: str = "gap_filled", created_us: int = 0) -> Job:
    """A pending job."""
    return Job(
        id=1, exchange="binance", symbol="BTC-USDT", start_us=start_us, end_us=end_us, reason=reason, trigger="t", state="pending", due_us=0,
        until_us=until_us, checked=0, revised=0, attempts=0, note="", created_us=created_us, updated_us=0,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    start=st.integers(0, 2 * 86_400),
    length=st.integers(1, 15_000),
    until=st.integers(0, 3 * 86_400),
    now=st.integers(0, 4 * 86_400),
    moving=st.booleans(),
)
def test_the_pieces_of_a_plan_are_the_due_bars_each_once(start: int, length: int, until: int, now: int, moving: bool) -> None:
    """Every bar that touches the range, is due and not done lies in one piece, in order of the days; none that is not due does."""
    now_us = T0_US + now * SECOND + 5
    clock = Clock(now_us // SECOND * SECOND, now_us if moving else now_us - 60 * SECOND)
    start_us, end_us = T0_US + start * SECOND + 7, T0_US + (start + length) * SECOND + 3
    reader = FakeReader(T0_US - DAY_US, max(now_us, end_us), clock, Neighbour(9, end_us))
    run = SymbolRun(reader, TIMEFRAMES, now_us)  # type: ignore[arg-type]
    one = job(start_us, end_us, until_us=T0_US + until * SECOND if until else 0)
    plan = run.plan([one])
    pieces = list(run.pieces(plan))
    assert [piece.start_us for piece in pieces] == sorted(piece.start_us for piece in pieces)
    for seconds in map(timeframe_seconds, TIMEFRAMES):
        width = seconds * SECOND
        found = {at for piece in pieces for low, high in piece.spans.get(seconds, []) for at in range(low, high, width)}
        assert sum((high - low) // width for piece in pieces for low, high in piece.spans.get(seconds, [])) == len(found)
        due = {
            at
            for at in range(max(start_us, one.until_us) // width * width, end_us, width)
            if at + width > start_us and at + width > one.until_us and at + width <= plan.limit_us
        }
        assert found == due
    for piece in pieces:
        assert piece.start_us // DAY_US == (piece.end_us - 1) // DAY_US
    done_us = max(plan.limit_us, one.until_us)
    left = run.left(one, plan, done_us)
    open_ends = [
        at + seconds * SECOND
        for seconds in map(timeframe_seconds, TIMEFRAMES)
        for at in range(start_us // (seconds * SECOND) * seconds * SECOND, end_us, seconds * SECOND)
        if at + seconds * SECOND > done_us
    ]
    assert left == min(open_ends, default=None)


@pytest.mark.parametrize(
    ("reason", "known_age_s", "close_age_s", "expected_s"),
    [
        ("gap_filled", 1, 2, 2),  # live: the worker's own clock
        ("gap_filled", 11, 40, 0),  # nothing moves: the wall clock
        ("gap_filled", 1, 9_000, 9_000),  # a replay of the past that moves
        ("backfill", 1, 9_000, 0),  # the past, and a person is done with it
        ("backfill", 1, 2, 2),  # a person's, but the symbol is live
    ],
)
def test_a_bar_is_due_when_nobody_else_revises_it(reason: str, known_age_s: int, close_age_s: int, expected_s: int) -> None:
    """``expected_s``: how far behind now the clock is that counts."""
    now_us = T0_US + 10_000 * SECOND
    clock = Clock(now_us - close_age_s * SECOND, now_us - known_age_s * SECOND)
    run = SymbolRun(FakeReader(T0_US, now_us, clock, None), TIMEFRAMES, now_us)  # type: ignore[arg-type]
    plan = run.plan([job(T0_US, T0_US + SECOND, reason=reason, created_us=now_us)])
    assert plan.limit_us == now_us - expected_s * SECOND - SETTLE_US


def test_the_next_trade_is_followed_for_a_day_at_most() -> None:
    """A trade that says it is of years ago does not have the years filled with flat bars."""
    now_us = T0_US + 4_000 * DAY_US
    reader = FakeReader(T0_US, now_us, Clock(now_us, now_us), Neighbour(9, now_us - SECOND))
    run = SymbolRun(reader, TIMEFRAMES, now_us)  # type: ignore[arg-type]
    plan = run.plan([job(T0_US, T0_US + 1)])
    assert plan.ranges[1] == (T0_US, T0_US + 1 + DAY_US)
    assert len(list(run.pieces(plan))) == 2


def test_flat_bars_after_the_last_trade_are_waited_for_while_the_symbol_moves() -> None:
    """Until its next trade; for a day at most."""
    now_us = T0_US + 10_000 * SECOND
    live = FakeReader(T0_US, T0_US + 5 * SECOND, Clock(now_us, now_us), None)
    run = SymbolRun(live, TIMEFRAMES, now_us)  # type: ignore[arg-type]
    young, old = job(T0_US, T0_US + SECOND, created_us=now_us), job(T0_US, T0_US + SECOND, created_us=now_us - 2 * DAY_US)
    assert run.plan([young]).endless == {1}
    assert run.plan([young]).ranges[1] == (T0_US, now_us)
    assert run.plan([old]).endless == set()


class Producer:
    """A producer that dies when it is to flush for the ``dies``-th time."""

    def __init__(self, dies: int) -> None:
        self.left = dies
        self.sent: list[str] = []

    async def send(self, topic: str, partition: int, frame: Frame) -> None:
        """See FrameProducer."""
        self.sent.append(topic)

    async def send_raw(self, topic: str, partition: int, key: bytes, value: bytes) -> None:
        """See FrameProducer."""
        self.sent.append(topic)

    async def flush(self) -> None:
        """See FrameProducer."""
        self.left -= 1
        if not self.left:
            raise KilledError
        self.sent.append("acknowledged")


class KilledError(Exception):
    """The process is gone."""


class Registry:
    """Knows the schema of the twin."""

    def row_codec(self, topic: str) -> RowCodec:
        """See RegistryClient."""
        assert topic == "bars.rows"
        return RowCodec("bars_row", 3)


async def test_the_twin_is_acknowledged_before_the_bars_are_sent() -> None:
    """Killed in between the repair finds that the bars still differ, and tells both again; the other way round the twin stayed behind."""
    count = 5
    columns = {name: np.zeros(count, dtype) for name, dtype in FrameCodec("bars", 1).dtypes.items() if name != "symbol_code"}
    columns |= {"timeframe_s": np.ones(count, columns["timeframe_s"].dtype), "is_final": np.ones(count, columns["is_final"].dtype)}
    newest = {name: column[-1:] for name, column in columns.items()} | {"input_offset": np.array([9])}
    outcome = Outcome(rows=columns, newest=[newest], checked=count, waits_us=None)
    producer = Producer(dies=0)
    await BarPublisher(producer, Registry()).publish("binance:BTC-USDT", 0, outcome)  # type: ignore[arg-type]
    assert producer.sent == ["bars.rows"] * (count + 1) + ["acknowledged", "bars", "acknowledged"]
    producer = Producer(dies=1)
    with pytest.raises(KilledError):
        await BarPublisher(producer, Registry()).publish("binance:BTC-USDT", 0, outcome)  # type: ignore[arg-type]
    assert "bars" not in producer.sent
