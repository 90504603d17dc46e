"""Releases live side by side: old records are read by new code and new ones by old code, and a change that breaks it is found."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.cli.main import main
from infra.errors import SettingsError
from infra.schema_evolution import SchemaEvolutionError, current, freeze, problems, released
from schemas.codec import FrameCodec, RowCodec, decode_learning, frame_dtypes
from schemas.errors import DecodeError
from schemas.frames import GAP_OPEN, HISTORY, Frame, GapNotice
from schemas.topics import TOPICS

OLD_ID, NEW_ID = 1, 2
FRAMES = sorted({(release, topic.schema) for release in released() for topic in TOPICS.values() if topic.kind == "frame"})
ROWS = sorted({(release, topic.schema) for release in released() for topic in TOPICS.values() if topic.kind == "row"})
FRAMES = [(release, name) for release, name in FRAMES if name in released()[release]]
ROWS = [(release, name) for release, name in ROWS if name in released()[release]]


def _edited(text: str, edit: Callable[[dict[str, Any]], object]) -> str:
    schema = json.loads(text)
    edit(schema)
    return json.dumps(schema)


def _field(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(field for field in schema["fields"] if field["name"] == name)
    return found


def _column(name: str, dtype: str = "int64-le", **more: Any) -> dict[str, Any]:
    return {"name": name, "type": {"type": "bytes", "logicalType": dtype}, **more}


@st.composite
def _frames(draw: st.DrawFn, text: str) -> Frame:
    """Any frame a writer with that schema can make."""
    symbols = tuple(f"binance:S{number}-USDT" for number in range(draw(st.integers(1, 4))))
    rows = draw(st.integers(0, 12))
    seed = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    columns: dict[str, Any] = {}
    for name, dtype in frame_dtypes(text).items():
        columns[name] = np.frombuffer(seed.bytes(rows * dtype.itemsize), dtype)  # any bits at all, NaN payloads too
    columns["symbol_code"] = seed.integers(0, len(symbols), rows).astype(np.int32)
    return Frame(
        source=draw(st.text(max_size=20)),
        watermark_us=draw(st.integers(-(2**63), 2**63 - 1)),
        symbols=symbols,
        columns=columns,
        input_offset=draw(st.integers(-1, 2**62)),
        flags=draw(st.integers(0, 3)),
    )


def _same(read: Frame, sent: Frame, names: Any) -> None:
    assert (read.source, read.watermark_us, read.symbols, read.input_offset, read.flags) == (
        sent.source,
        sent.watermark_us,
        sent.symbols,
        sent.input_offset,
        sent.flags,
    )
    for name in names:
        assert read.columns[name].tobytes() == sent.columns[name].tobytes()


# The promise.


def test_every_schema_is_fully_compatible_with_every_released_one() -> None:
    """New code reads old records and old code reads new ones, whatever two releases they are."""
    assert released()
    assert problems(current(), released()) == []


def test_the_command_says_so_too(capsys: pytest.CaptureFixture[str]) -> None:
    """`marketstream schemas check --json` lists schemas, releases and no problem."""
    assert main(["schemas", "check", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["problems"] == []
    assert answer["releases"] == list(released())
    assert set(answer["schemas"]) == set(current())


def test_every_topic_of_the_catalogue_has_its_schema() -> None:
    """No topic names a schema that is not there, and none is left over."""
    assert {topic.schema for topic in TOPICS.values() if topic.schema} == set(current())


@pytest.mark.parametrize(("release", "name"), FRAMES)
def test_old_frames_are_read_by_this_release(release: str, name: str) -> None:
    """Every column comes back bit for bit; columns the writer lacked hold their fill."""
    text = released()[release][name]
    now = json.loads(current()[name])
    fills = {field["name"]: field["fill"] for field in now["fields"] if "fill" in field}
    writer, reader = FrameCodec(name, OLD_ID, text), FrameCodec(name, NEW_ID)

    @settings(max_examples=30, deadline=None)
    @given(_frames(text))
    def check(sent: Frame) -> None:
        read = decode_learning(reader, writer.encode(sent), {OLD_ID: text}.__getitem__)
        _same(read, sent, writer.dtypes)
        for column in reader.dtypes.keys() - writer.dtypes.keys():
            assert read.columns[column].tolist() == [fills[column]] * sent.row_count
        assert read.gaps == ()

    check()


@pytest.mark.parametrize(("release", "name"), FRAMES)
def test_new_frames_are_read_by_an_old_release(release: str, name: str) -> None:
    """The columns it knows come back bit for bit, the others are passed over."""
    text = released()[release][name]
    writer, reader = FrameCodec(name, NEW_ID), FrameCodec(name, OLD_ID, text)

    @settings(max_examples=30, deadline=None)
    @given(_frames(current()[name]))
    def check(sent: Frame) -> None:
        _same(decode_learning(reader, writer.encode(sent), {NEW_ID: current()[name]}.__getitem__), sent, reader.dtypes)

    check()


def test_a_heartbeat_of_an_old_release_is_read() -> None:
    """A frame without rows has no bytes of any column, and the reader's default for a missing one is text to fastavro."""
    text = released()["0.1.0"]["bars"]
    sent = FrameCodec("bars", OLD_ID, text).encode(Frame(source="worker", watermark_us=5, input_offset=9))
    read = decode_learning(FrameCodec("bars", NEW_ID), sent, {OLD_ID: text}.__getitem__)
    assert (read.watermark_us, read.input_offset, read.row_count) == (5, 9, 0)
    assert read.columns["held_count"].dtype == np.int64


def test_a_writer_whose_columns_are_text_is_a_decode_error() -> None:
    """Avro lets text pass for bytes; a column of it is refused like any other record that cannot be read."""
    text = _edited(current()["trades"], lambda schema: _field(schema, "price").update(type="string"))
    sent = RowCodec("trades", OLD_ID, text).encode(
        {
            **dict.fromkeys(FrameCodec("trades", 1).dtypes, b""),
            "price": "8 bytes.",
            "source": "s",
            "watermark_us": 1,
            "row_count": 1,
            "symbols": ["a:B"],
        }
    )
    with pytest.raises(DecodeError):
        decode_learning(FrameCodec("trades", NEW_ID), sent, {OLD_ID: text}.__getitem__)


def test_gap_notices_and_flags_do_not_disturb_an_old_reader() -> None:
    """What a later release tells beside the rows is not seen by an older one; its rows are."""
    notice = GapNotice(symbol_code=0, gap_id=1, start_time_us=1, end_time_us=2, state=GAP_OPEN)
    columns = {name: np.ones(3, dtype) for name, dtype in FrameCodec("trades", NEW_ID).dtypes.items()}
    columns["symbol_code"] = np.zeros(3, np.int32)
    sent = Frame(source="s", watermark_us=1, symbols=("binance:BTC-USDT",), columns=columns, flags=HISTORY, gaps=(notice,))
    old = FrameCodec("trades", OLD_ID, released()["0.1.0"]["trades"])
    read = decode_learning(old, FrameCodec("trades", NEW_ID).encode(sent), {NEW_ID: current()["trades"]}.__getitem__)
    assert read.columns["trade_id"].tolist() == [1, 1, 1]
    assert read.gaps == ()


@pytest.mark.parametrize(("release", "name"), ROWS)
def test_rows_pass_between_releases_both_ways(release: str, name: str) -> None:
    """A row written by one is the same row read by the other, as far as both know its fields."""
    old_text, new_text = released()[release][name], current()[name]
    old, new = RowCodec(name, OLD_ID, old_text), RowCodec(name, NEW_ID)
    old.add_writer(NEW_ID, new_text)
    new.add_writer(OLD_ID, old_text)
    known = {field["name"] for field in json.loads(old_text)["fields"]}

    @settings(max_examples=30, deadline=None)
    @given(_row(old_text), _row(new_text))
    def check(from_old: dict[str, Any], from_new: dict[str, Any]) -> None:
        assert new.decode(old.encode(from_old)).items() >= from_old.items()
        assert old.decode(new.encode(from_new)) == {field: value for field, value in from_new.items() if field in known}

    check()


def _row(text: str) -> st.SearchStrategy[dict[str, Any]]:
    of_type: dict[str, st.SearchStrategy[Any]] = {
        "string": st.text(max_size=20),
        "long": st.integers(-(2**63), 2**63 - 1),
        "int": st.integers(-(2**31), 2**31 - 1),
        "double": st.floats(allow_nan=False),
        "bytes": st.binary(max_size=50),
        "boolean": st.booleans(),
        "null": st.none(),
    }

    def strategy(kind: Any) -> st.SearchStrategy[Any]:
        return st.one_of(*map(strategy, kind)) if isinstance(kind, list) else of_type[kind if isinstance(kind, str) else kind["type"]]

    return st.fixed_dictionaries({field["name"]: strategy(field["type"]) for field in json.loads(text)["fields"]})


# What breaks the promise is found.

BREAKS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "a column without default": ("trades", lambda s: s["fields"].append(_column("venue")), "cannot read old data"),
    "a column without fill": ("trades", lambda s: s["fields"].append(_column("venue", default="")), "without"),
    "a column with a default that is no column": (
        "trades",
        lambda s: s["fields"].append(_column("venue", default="\0", fill=0)),
        "without",
    ),
    "a column removed": ("bars", lambda s: s["fields"].remove(_field(s, "vwap")), "'vwap' is gone"),
    "a column renamed": ("bars", lambda s: _field(s, "vwap").update(name="mean"), "'vwap' is gone"),
    "a column of another dtype": ("trades", lambda s: _field(s, "price")["type"].update(logicalType="int64-le"), "was float64-le"),
    "a column of narrower numbers": ("trades", lambda s: _field(s, "trade_id")["type"].update(logicalType="int32-le"), "was int64-le"),
    "a head field removed": ("trades", lambda s: s["fields"].remove(_field(s, "row_count")), "old schema cannot read new data"),
    "a head field of another type": ("trades", lambda s: _field(s, "watermark_us").update(type="string"), "cannot read"),
    "a wider head field": ("trades", lambda s: _field(s, "flags").update(type="long"), "old schema cannot read new data"),
    "a record of another name": ("trades", lambda s: s.update(name="Trades"), "cannot read"),
    "a row field without default": ("deadletter", lambda s: s["fields"].append({"name": "venue", "type": "long"}), "cannot read old data"),
    "a row field removed": ("deadletter", lambda s: s["fields"].remove(_field(s, "raw")), "old schema cannot read new data"),
}


@pytest.mark.parametrize("planted", BREAKS)
def test_a_planted_break_is_found(planted: str) -> None:
    """Each way to break a schema is named with the schema and the release it breaks with."""
    name, edit, words = BREAKS[planted]
    found = problems({**current(), name: _edited(current()[name], edit)}, released())
    assert any(words in problem for problem in found), found
    assert all(problem.startswith(f"{name}.avsc: ") and "release 0.1.0" in problem for problem in found)


def test_a_schema_that_vanished_is_found() -> None:
    """The topics of an older process must keep their readers."""
    assert problems({name: text for name, text in current().items() if name != "gaps"}, released()) == [
        "gaps.avsc of release 0.1.0 is gone: keep it, its topics hold records."
    ]


def test_a_fill_that_changed_is_found() -> None:
    """Old rows must not mean something else tomorrow."""
    earlier = {"0.2.0": {"gaps": current()["gaps"]}}
    changed = _edited(current()["gaps"], lambda schema: _field(schema, "channel").update(fill=2))
    assert problems({"gaps": changed}, earlier) == [
        "gaps.avsc: the fill of column 'channel' was 1: rows of older releases would change their meaning. (release 0.2.0)"
    ]


def test_compatibility_is_with_every_release_not_only_the_last() -> None:
    """A column that came and went between two releases is still held against."""
    second = _edited(current()["trades"], lambda schema: schema["fields"].append(_column("venue", default="", fill=0)))
    found = problems(current(), {**released(), "0.2.0": {**current(), "trades": second}, "0.3.0": current()})
    assert found == ["trades.avsc: column 'venue' is gone: keep it, tables and old readers have it. (release 0.2.0)"]


# Freezing a release.


def test_freezing_writes_todays_schemas_byte_for_byte(tmp_path: Any) -> None:
    """They are a copy, one file a schema, under the version's name."""
    written = freeze("7.0.0", tmp_path)
    assert {path.stem: path.read_text("utf-8") for path in written} == current()
    assert {path.parent for path in written} == {tmp_path / "7.0.0"}


@pytest.mark.parametrize(("version", "words"), [("next", "no version"), ("0.0.9", "not above 0.1.0"), ("0.1.0", "not above")])
def test_a_release_is_frozen_once_and_upward(version: str, words: str, tmp_path: Any) -> None:
    """What was released is never written again."""
    with pytest.raises(SettingsError, match=words):
        freeze(version, tmp_path)
    assert not list(tmp_path.iterdir())


def test_incompatible_schemas_cannot_be_frozen(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command refuses, with the first problem and how many there are."""
    monkeypatch.setattr("infra.schema_evolution.current", lambda: {name: text for name, text in current().items() if name != "gaps"})
    with pytest.raises(SchemaEvolutionError, match="1 problem.*gaps.avsc of release 0.1.0 is gone"):
        freeze("7.0.0", tmp_path)
