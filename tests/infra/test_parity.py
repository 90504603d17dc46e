"""The comparison behind `marketstream parity`: equal runs give no difference, every planted one is found and named, what is known is explained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infra.errors import InputFileError, IntegrityError
from infra.parity import Report
from infra.parity_compare import NOT_RETAINED, OTHER_SCHEMA, SENT_TWICE, Comparison, LiveRecord, Record
from infra.parity_findings import Findings
from infra.parity_html import read_certificate, write
from infra.parity_outputs import Origin, OutputFindings, Outputs
from infra.parity_repaired import RepairedFindings
from infra.parity_repairs import Job, explain
from infra.parity_rows import Difference, RowKey
from infra.runs import Run
from schemas.codec import FrameCodec, schema_text
from schemas.frames import Frame
from streams.bar_shard import BarShard
from streams.records import OutRecord
from tests.performance import market
from tests.streams.test_bar_shard import CODECS, CONFIG

TRADES = [
    CODECS.trades.encode(frame) for _, frame in market.frames(*market.trades(2_000, 5, per_second=50), partitions=1, rows_per_frame=10)
]


def published(trades: list[bytes] = TRADES) -> list[bytes]:
    """What a worker publishes into ``bars`` for these trades."""
    shard = BarShard(0, CONFIG, CODECS)
    return [out.value for offset, value in enumerate(trades) for out in shard.process(offset, value) if out.topic == "bars"]


def compare(
    live: list[bytes],
    *,
    trades: list[bytes] = TRADES,
    first: int = 0,
    begin: int = 0,
    jobs: tuple[Job, ...] = (),
    seen: list[LiveRecord] | None = None,
) -> Findings:
    """The findings for a run whose topics hold ``trades`` from ``begin`` on and ``live``."""
    records: Iterator[Record] = iter([Record(offset, 1, value) for offset, value in enumerate(live)])
    comparison = Comparison(
        BarShard(0, CONFIG, CODECS),
        CODECS,
        records,
        first=max(first, begin),
        stop=len(trades),
        whole=begin == 0,
        bars_stop=len(live),
        explain_repair=explain(jobs),
        on_live=(seen if seen is not None else []).append,
    )
    taken = begin
    for offset in range(begin, len(trades)):
        taken = offset + 1
        if not comparison.take(Record(offset, 1, trades[offset])):
            break
    return comparison.finish(pending=len(trades) - taken)


def altered(value: bytes, column: str = "close", row: int = -1) -> bytes:
    """A record with one value changed by the smallest step."""
    frame = CODECS.bars.decode(value)
    columns = {name: held.copy() for name, held in frame.columns.items()}
    columns[column][row] = np.nextafter(columns[column][row], np.inf) if columns[column].dtype.kind == "f" else columns[column][row] + 1
    return CODECS.bars.encode(replace(frame, columns=columns))


def final_row(live: list[bytes], place: int) -> tuple[Frame, dict[str, np.ndarray]]:
    """The frame at or behind ``place`` that has a final bar, and the columns of its last one."""
    frame = next(frame for frame in map(CODECS.bars.decode, live[place:]) if frame.columns and frame.columns["is_final"].any())
    row = int(np.flatnonzero(frame.columns["is_final"])[-1])
    return frame, {name: held[row : row + 1].copy() for name, held in frame.columns.items()}


def record_with_rows(live: list[bytes]) -> int:
    """Offset of a record in the middle that has rows."""
    return next(offset for offset in range(len(live) // 2, len(live)) if CODECS.bars.decode(live[offset]).row_count)


def test_a_run_equals_its_replay_byte_for_byte() -> None:
    """Every record is identical, every row equal, and the hashes of both sides are the same."""
    seen: list[LiveRecord] = []
    found = compare(published(), seen=seen)
    assert found.unexplained == 0
    assert found.rows == found.equal > 1_000
    assert found.identical_records == found.records == len(TRADES) == len(seen)
    assert found.run_sha256 == found.replay_sha256 != found.inputs_sha256
    assert sum(sum(counts.values()) for counts in found.by_timeframe.values()) == found.rows == sum(cell[0] for cell in found.strip)


@pytest.mark.parametrize("column", ["close", "volume", "trade_count", "complete", "last_receive_time_us"])
def test_one_altered_value_is_found_and_named(column: str) -> None:
    """The least change of one column of one row: exactly that row, with both values."""
    live = published()
    place = record_with_rows(live)
    live[place] = altered(live[place], column)
    found = compare(live)
    assert found.unexplained == 1
    assert found.run_sha256 != found.replay_sha256
    [difference] = found.differences
    assert (difference.what, difference.bars_offset, difference.input_offset) == ("differs", place, place)
    assert list(difference.columns) == [column]
    frame = CODECS.bars.decode(live[place])
    assert difference.key is not None
    assert difference.key.open_time_us == frame.columns["open_time_us"][-1]
    assert column in difference.text()
    assert difference.key.instrument in difference.text()


def test_a_row_or_record_too_few_or_too_many_is_found() -> None:
    """A row cut out, a row invented, a record left out: each is one unexplained thing."""
    live = published()
    place = record_with_rows(live)
    frame = CODECS.bars.decode(live[place])
    shorter = CODECS.bars.encode(replace(frame, columns={name: held[:-1] for name, held in frame.columns.items()}))
    found = compare([*live[:place], shorter, *live[place + 1 :]])
    assert [item.what for item in found.differences] == ["not in the run"]
    invented = altered(live[place], "open_time_us")
    found = compare([*live[:place], invented, *live[place + 1 :]])
    assert sorted(item.what for item in found.differences) == ["not in the replay", "not in the run"]
    found = compare(live[:place] + live[place + 1 :])
    assert {item.what for item in found.differences} == {"not in the run"}
    assert found.unexplained == frame.row_count


def test_garbage_in_the_topic_is_found() -> None:
    """A record nobody can read is a difference, and so is the one missing for it."""
    live = published()
    place = record_with_rows(live)
    rows = CODECS.bars.decode(live[place]).row_count
    live[place] = b"garbage"
    found = compare(live)
    assert found.unexplained == 1 + rows
    assert "cannot be read" in found.differences[0].what


def test_a_record_sent_twice_is_explained_only_with_the_same_bytes() -> None:
    """A lost acknowledgement sends a record again; other bytes for the same trades are a difference."""
    live = published()
    place = record_with_rows(live)
    rows = CODECS.bars.decode(live[place]).row_count
    found = compare([*live[: place + 3], live[place], *live[place + 3 :]])
    assert (found.unexplained, found.explained) == (0, {SENT_TWICE: rows})
    found = compare([*live[: place + 3], altered(live[place]), *live[place + 3 :]])
    assert found.unexplained == 1
    assert "other bytes" in found.differences[0].what


def test_rows_of_the_repair_need_a_job_that_explains_them() -> None:
    """A repaired bar is explained by the job whose interval it touches, and by no other."""
    live = published()
    place = record_with_rows(live)
    frame, one = final_row(live, place)
    repaired = CODECS.bars.encode(Frame(source="repair", watermark_us=0, symbols=frame.symbols, columns=one, input_offset=-1))
    live.insert(place + 1, repaired)
    instrument = frame.symbols[int(one["symbol_code"][0])]
    open_us, close_us = int(one["open_time_us"][0]), int(one["close_time_us"][0])
    job = Job(instrument, open_us, open_us + 1, "gap filled")
    assert compare(live, jobs=(job,)).explained == {"repair: gap filled": 1}
    for other in (job._replace(instrument="binance:OTHER-USDT"), job._replace(start_us=close_us, end_us=close_us + 1)):
        found = compare(live, jobs=(other,))
        assert found.unexplained == 1
        assert "repair" in found.differences[0].what


def test_an_open_bar_of_the_repair_is_explained_by_nothing() -> None:
    """It publishes closed bars alone; ClickHouse would not have it."""
    live = published()
    frame, one = final_row(live, len(live) // 2)
    one["is_final"][:] = 0
    live.insert(-1, CODECS.bars.encode(Frame(source="repair", watermark_us=0, symbols=frame.symbols, columns=one, input_offset=-1)))
    instrument, open_us = frame.symbols[int(one["symbol_code"][0])], int(one["open_time_us"][0])
    found = compare(live, jobs=(Job(instrument, open_us, open_us + 1, "gap filled"),))
    assert [item.what for item in found.differences] == ["is an open bar of the repair, which publishes closed ones alone"]


def test_bars_that_carry_a_repaired_price_on_are_explained_with_it() -> None:
    """Bars without trades right behind the job's last bar; not one with trades, and not one after a hole."""
    live = published()
    frame, one = final_row(live, record_with_rows(live))
    columns = {name: np.repeat(held, 4) for name, held in one.items()}
    width_us = int(columns["timeframe_s"][0]) * 1_000_000
    columns["open_time_us"] = columns["open_time_us"] + np.array([0, 1, 2, 4]) * width_us
    columns["trade_count"] = np.array([3, 0, 0, 0], np.int64)
    instrument = frame.symbols[int(columns["symbol_code"][0])]
    job = Job(instrument, int(columns["open_time_us"][0]), int(columns["open_time_us"][0]) + 1, "gap filled")
    for trades, explained in ((0, 3), (1, 1)):
        columns["trade_count"][1] = trades
        repaired = CODECS.bars.encode(Frame(source="repair", watermark_us=0, symbols=frame.symbols, columns=columns, input_offset=-1))
        found = compare([*live[:-1], repaired, live[-1]], jobs=(job,))
        assert (found.explained, found.unexplained) == ({"repair: gap filled": explained}, 4 - explained)


def test_what_the_worker_has_not_done_yet_is_pending_not_wrong() -> None:
    """A run that was killed, or still goes, ends before its trades do."""
    found = compare(published()[:-7])
    assert (found.unexplained, found.pending) == (0, 7)
    assert compare([]).pending == len(TRADES)


def test_a_run_in_the_middle_of_the_topic_is_replayed_from_its_beginning() -> None:
    """The state comes from all trades; only the run's own are compared."""
    found = compare(published(), first=20)
    assert (found.unexplained, found.records, found.trades_records) == (0, len(TRADES) - 20, len(TRADES))


def test_bars_older_than_the_topic_are_explained_as_not_retained() -> None:
    """Without the first trades the bars that began with them cannot be replayed; all later ones must be equal."""
    found = compare(published(), begin=15)
    assert found.unexplained == 0
    assert found.explained[NOT_RETAINED] > 0
    assert found.by_timeframe[1]["equal"] > 5 * found.by_timeframe[1]["explained"] > 0
    live = published()
    place = next(offset for offset in reversed(range(len(live) - 1)) if CODECS.bars.decode(live[offset]).columns["is_final"].any())
    live[place] = altered(live[place], "volume", int(np.argmax(CODECS.bars.decode(live[place]).columns["is_final"])))
    assert compare(live, begin=15).unexplained == 1


def test_the_schema_of_another_release_is_no_difference() -> None:
    """The same rows under another schema id are the same rows."""
    other = FrameCodec("bars", 77)
    CODECS.bars.add_writer(77, schema_text("bars"))
    live = published()
    place = record_with_rows(live)
    frame = CODECS.bars.decode(live[place])
    live[place] = other.encode(frame)
    found = compare(live)
    assert (found.unexplained, found.explained) == (0, {OTHER_SCHEMA: frame.row_count})


def outputs_of(*values: bytes) -> Outputs:
    """A replay that made these dead letters of partition 1, one a trades record from offset 10 on."""
    made = Outputs()
    for place, value in enumerate(values):
        made.take(10 + place, OutRecord("deadletter", 0, None, value), 1)
    return made


def held_against(made: Outputs, *values: bytes, killed: bool = False, stop: int = 20) -> OutputFindings:
    """The findings where the topic holds ``values``; each tells its origin as ``name@offset``."""
    records = [(0, Record(place, 1, value)) for place, value in enumerate(values)]

    def origin(_: int, value: bytes) -> Origin | None:
        return Origin(1, int(value.partition(b"@")[2])) if b"@" in value else None

    return made.check("deadletter", records, origin, {1: (5, stop)}, killed=killed)


def test_other_outputs_are_compared_as_a_set() -> None:
    """In any order, sent again or not, and beside records of other writers."""
    found = held_against(outputs_of(b"a@10", b"b@11"), b"b@11", b"of a person", b"a@10", b"b@11")
    assert (found.records, found.equal, found.again, found.unexplained) == (2, 2, 1, 0)


def test_an_output_too_few_or_too_many_is_found() -> None:
    """Unless a killed run never sent it, or it belongs to trades that were not compared."""
    found = held_against(outputs_of(b"a@10", b"b@11"), b"a@10", b"x@12")
    assert [(item.what, item.input_offset) for item in found.differences] == [
        ("a record of deadletter (0@1) is not in the replay", 12),
        ("the run published no such record of deadletter", 11),
    ]
    found = held_against(outputs_of(b"a@10", b"b@11"), b"a@10", killed=True)
    assert (found.unexplained, found.pending) == (0, 1)
    assert held_against(outputs_of(b"a@10", b"b@11"), b"a@10", b"x@12", stop=11).unexplained == 0


def report(found: Findings) -> Report:
    """A report of one partition."""
    places = {"trades": {0: 0}, "bars": {0: 0}}
    run = Run(
        id="calm-otter-01",
        started_us=market.START_US,
        ended_us=None,
        state="running",
        source="sim",
        topic_prefix="",
        settings={"worker.timeframes": "1s,<b>"},
        start=places,
        end={"trades": {0: len(TRADES)}, "bars": {0: len(TRADES)}},
    )
    return Report(
        run=run,
        findings=[found],
        store=[],
        outputs=[held_against(outputs_of(b"a@10"), b"a@10")],
        settings=run.settings,
        replayed={0: (0, 0, len(TRADES))},
        not_retained=0,
        seconds=1.0,
        finished_us=market.START_US,
    )


def test_a_certificate_states_its_verdict_and_cannot_be_changed_unseen(tmp_path: Path) -> None:
    """It reads back with its sum; an edited one, and another page, are refused in one sentence."""
    live = published()
    place = record_with_rows(live)
    live[place] = altered(live[place])
    file = tmp_path / "certificate.html"
    checksum = write(file, report(compare(live)))
    data, found = read_certificate(file)
    assert (found, data["verdict"], data["unexplained"]) == (checksum, "difference", 1)
    text = file.read_text("utf-8")
    assert "<b>" not in text.split("What was run")[1].split("</main>")[0]
    assert "http" not in text.split('<script id="data"')[0]  # nothing is loaded from anywhere
    file.write_text(text.replace('"unexplained":1', '"unexplained":0'), "utf-8")
    with pytest.raises(IntegrityError, match="were changed"):
        read_certificate(file)
    file.write_text("<html></html>", "utf-8")
    with pytest.raises(InputFileError, match="no certificate"):
        read_certificate(file)


def test_a_certificate_names_what_the_repair_got_wrong(tmp_path: Path) -> None:
    """The bar, the column and both values; the verdict is a difference though every row has a reason."""
    key = RowKey("a:B", 60, 60_000_000, 2, 1)
    wrong = Difference(what="is wrong", partition=0, bars_offset=7, input_offset=-1, key=key, columns={"volume": (2.0, 1.0)})
    repaired = RepairedFindings(bars=3, equal=1, explained=Counter({"<later>": 1}), unexplained=1, differences=[wrong])
    file = tmp_path / "certificate.html"
    write(file, replace(report(compare(published())), repaired=repaired))
    data, _ = read_certificate(file)
    assert (data["verdict"], data["unexplained"], data["repaired"]["unexplained"]) == ("difference", 1, 1)
    text = file.read_text("utf-8").split('<script id="data"')[0]
    assert "volume: 2.0 / 1.0" in text
    assert "a repaired bar: &lt;later&gt;" in text


def test_a_certificate_of_parity_says_so(tmp_path: Path) -> None:
    """Zero unexplained rows."""
    file = tmp_path / "certificate.html"
    write(file, report(compare(published())))
    assert read_certificate(file)[0]["verdict"] == "parity"
    assert "0 unexplained rows" in file.read_text("utf-8")


def test_row_keys_name_rows() -> None:
    """The repair's rows are matched by what a bar covers: its end is exclusive."""
    reason = explain([Job("a:B", 60_000_000, 61_000_000, "x")])
    assert reason(RowKey("a:B", 60, 60_000_000, 0, 1)) == "repair: x"
    assert reason(RowKey("a:B", 60, 0, 0, 1)) is None
