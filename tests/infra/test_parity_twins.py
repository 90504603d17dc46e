"""The row twin beside bars: the last word of every series is its newest bar, and every other last word is explained or found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from infra.parity_compare import LiveRecord, Record
from infra.parity_outputs import OutputFindings
from infra.parity_twins import BEFORE, LATER, OTHER_SCHEMA, OVERTAKEN, SENT_AGAIN, Terms, TwinBook
from schemas.codec import RowCodec
from schemas.frames import Frame
from streams.bar_shard import BarShard
from streams.row_twin import RowTwin
from tests.infra.test_parity import TRADES
from tests.streams.test_bar_shard import CODECS, CONFIG

UNTIL_US = 5_000_000
STOP = len(TRADES)


def run() -> tuple[list[Frame], list[Record]]:
    """What a worker publishes for the trades: frames of bars, and records of the twin."""
    shard = BarShard(0, CONFIG, CODECS)
    frames, twins = [], []
    for offset, value in enumerate(TRADES):
        for out in shard.process(offset, value):
            if out.topic == "bars":
                frames.append(CODECS.bars.decode(out.value))
            if out.topic == "bars.rows":
                twins.append(Record(len(twins), 1, out.value, out.key or b""))
    return frames, twins


FRAMES, TWINS = run()
LAST = {record.key: record for record in TWINS}
KEY, _ = Counter(record.key for record in TWINS).most_common(1)[0]


def decode(value: bytes) -> dict[str, Any] | None:
    """A row, whatever its schema id; None for garbage."""
    return dict(CODECS.rows.decode(b"\0\0\0\0\3" + value[5:])) if value[:1] == b"\0" else None


def compare(
    frames: Iterable[Frame],
    records: Iterable[Record],
    *,
    killed: bool = False,
    stop: int = STOP,
    stored: Callable[[bytes], bytes | None] = {}.get,
    bars_stop: int = 10_000,
) -> OutputFindings:
    """The findings for these frames and records of the twin."""
    book = TwinBook(0, RowTwin(CODECS.rows), bars_stop)
    for offset, frame in enumerate(frames):
        book.take(LiveRecord(offset, 1, b"", frame))
    found = OutputFindings(topic="bars.rows")
    book.check(records, Terms(first=0, stop=stop, until_us=UNTIL_US, killed=killed, decode=decode, stored=stored), found)
    return found


def row_of(record: Record, **changes: Any) -> dict[str, Any]:
    """The row of a record with some values changed."""
    row = decode(record.value)
    assert row is not None
    return row | changes


def sent(record: Record, offset: int, **changes: Any) -> Record:
    """A record of the twin with some values changed, at another place."""
    return record._replace(offset=offset, value=CODECS.rows.encode(row_of(record, **changes)))


def repair(record: Record, **changes: Any) -> Frame:
    """A frame of the repair with the bar of that record."""
    row = row_of(record, **changes)
    seconds = {"1s": 1, "1m": 60, "5m": 300, "15m": 900}[row["timeframe"]]
    values = row | {"symbol_code": 0, "timeframe_s": seconds}
    columns = {name: np.array([values[name]], dtype) for name, dtype in CODECS.bars.dtypes.items()}
    return Frame(source="repair", watermark_us=0, symbols=(f"{row['exchange']}:{row['symbol']}",), columns=columns, input_offset=-1)


def series(count: int) -> list[Record]:
    """The last records of a series of seconds, oldest first."""
    return [record for record in TWINS if record.key == KEY][-count:]


def test_the_last_record_of_every_series_is_its_last_row_of_bars() -> None:
    """All records, and what compaction leaves of them."""
    assert KEY.endswith(b":1s")
    for records in (TWINS, LAST.values()):
        found = compare(FRAMES, records)
        assert (found.records, found.equal, found.unexplained, found.explained) == (len(LAST), len(LAST), 0, {})


@pytest.mark.parametrize("column", ["close", "volume", "trade_count", "complete", "revision", "open_time_us", "input_offset"])
def test_another_last_word_is_found_and_named(column: str) -> None:
    """The least change of one value of one record: that series, that column, both values."""
    right = row_of(LAST[KEY])
    value = not right[column] if column == "complete" else right[column] - 1
    found = compare(FRAMES, [*TWINS, sent(LAST[KEY], 9_999, **{column: value})])
    assert (found.equal, found.unexplained) == (len(LAST) - 1, 1)
    [difference] = found.differences
    assert difference.key is not None
    assert f"{difference.key.instrument}:1s".encode() == KEY
    assert difference.columns == {column: (value, right[column])}
    assert "bars.rows[0]@9999" in difference.text()


def test_a_record_too_few_or_too_many_is_found() -> None:
    """A last bar that was never told, a series never told, one that bars does not have, and garbage."""
    found = compare(FRAMES, [record for record in TWINS if record != LAST[KEY]])
    assert [sorted(item.columns)[0] for item in found.differences] == ["buy_volume"]
    found = compare(FRAMES, [record for record in TWINS if record.key != KEY])
    assert [item.what for item in found.differences] == ["has no record in bars.rows"]
    other = sent(LAST[KEY], 9_999, symbol="NEW-USDT")._replace(key=b"binance:NEW-USDT:1s")
    found = compare(FRAMES, [*TWINS, other])
    assert [item.what for item in found.differences] == ["is told of in bars.rows, and bars has no such series (bars.rows[0]@9999)"]
    found = compare(FRAMES, [*TWINS, LAST[KEY]._replace(value=b"garbage", offset=9_999)])
    assert ["cannot be read" in item.what for item in found.differences] == [True]
    assert compare(FRAMES, [*TWINS, Record(9_999, 1, b"garbage", b"x")]).unexplained == 1


def test_a_killed_run_may_not_have_told_its_last_bars() -> None:
    """Older records of it, or none, are pending; other values are not."""
    old = [record for record in TWINS if record != LAST[KEY]]
    assert (compare(FRAMES, old, killed=True).unexplained, compare(FRAMES, old, killed=True).pending) == (0, 1)
    assert compare(FRAMES, [], killed=True).pending == len(LAST)
    for change in ({}, {"input_offset": -1}):
        assert compare(FRAMES, [*TWINS, sent(LAST[KEY], 9_999, volume=1.0, **change)], killed=True).unexplained == 1


def test_what_came_after_the_run_is_explained() -> None:
    """Of later trades, or published later; a series of another run is none of this one's business."""
    for later in (sent(LAST[KEY], 9_999, input_offset=STOP), sent(LAST[KEY], 9_999, volume=1.0)._replace(timestamp_ms=5_001)):
        found = compare(FRAMES, [*TWINS, later])
        assert (found.unexplained, found.explained) == (0, {LATER: 1})
    assert compare(FRAMES, [*TWINS, sent(LAST[KEY], 9_999, input_offset=STOP)._replace(key=b"x")]).unexplained == 0
    less = FRAMES[:-5]
    assert compare(less, TWINS, stop=len(less)).unexplained == 0
    assert compare(FRAMES, TWINS, stop=len(less), bars_stop=len(less)).unexplained == 0


def test_records_of_bars_that_were_sent_twice_change_nothing() -> None:
    """Whatever they hold: the comparison of bars tells of them."""
    assert compare([*FRAMES, FRAMES[len(FRAMES) // 2]], TWINS).unexplained == 0


def test_the_schema_of_another_release_is_no_difference() -> None:
    """The same row under another schema id is the same row."""
    other = LAST[KEY]._replace(value=b"\0\0\0\0\x4d" + LAST[KEY].value[5:])
    assert RowCodec("bars_row", 77).encode(row_of(LAST[KEY])) == other.value
    found = compare(FRAMES, [*TWINS, other])
    assert (found.unexplained, found.explained) == (0, {OTHER_SCHEMA: 1})


def test_behind_the_repair_the_last_word_is_the_newest_bar_again() -> None:
    """An older bar made anew is told, then the newest; without that, or untold, it is found."""
    older, newest = series(2)
    change = {"revision": 1, "volume": 1.5, "input_offset": -1}
    frames, told = [*FRAMES, repair(older, **change)], sent(older, 9_000, **change)
    assert compare(frames, [*TWINS, told, newest]).equal == len(LAST)
    found = compare(frames, [*TWINS, told])
    assert [set(item.columns) >= {"volume", "open_time_us"} for item in found.differences] == [True]
    frames, told = [*FRAMES, repair(newest, **change)], sent(newest, 9_000, **change)
    assert compare(frames, [*TWINS, told]).equal == len(LAST)
    assert [item.columns for item in compare(frames, TWINS).differences] == [
        {"revision": (0, 1), "volume": (row_of(newest)["volume"], 1.5), "input_offset": (row_of(newest)["input_offset"], -1)}
    ]


def test_what_may_come_between_worker_and_repair_is_explained() -> None:
    """The worker's own last word again after a restart; a newest bar overtaken by a newer one; the newest bar of before the run."""
    oldest, older, newest = series(3)
    change = {"revision": 1, "volume": 1.5, "input_offset": -1}
    told = sent(newest, 9_000, **change)
    found = compare([*FRAMES, repair(newest, **change)], [*TWINS, told, newest])
    assert (found.unexplained, found.explained) == (0, {SENT_AGAIN: 1})
    found = compare([*FRAMES, repair(oldest, **change)], [*TWINS, sent(oldest, 9_000, **change), older])
    assert (found.unexplained, found.explained) == (0, {OVERTAKEN: 1})
    found = compare([repair(oldest, **change)], [sent(oldest, 9_000, **change), newest], stored={KEY: newest.value}.get)
    assert (found.unexplained, found.explained) == (0, {BEFORE: 1})
    assert compare([repair(oldest, **change)], [sent(oldest, 9_000, **change), newest], stop=STOP).unexplained == 1


def test_a_revision_of_the_worker_may_be_the_last_word() -> None:
    """It is the last row of bars as well, and missing where it is not."""
    older = series(2)[0]
    frame = replace(repair(older, revision=1, volume=1.5), source="worker", input_offset=STOP)
    revised = sent(older, 9_000, revision=1, volume=1.5, input_offset=STOP)
    assert compare([*FRAMES, frame], [*TWINS, revised], stop=STOP + 1).equal == len(LAST)
    assert compare([*FRAMES, frame], TWINS, stop=STOP + 1).unexplained == 1
