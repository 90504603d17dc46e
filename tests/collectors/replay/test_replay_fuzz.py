"""Damaged files of every kind: the answer is rows that add up or one ReplayError, never another exception."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replay_files import BTC, T0_MS, dump

from collectors.replay import lines
from collectors.replay.bytesource import ByteSource
from collectors.replay.detect import Reader
from collectors.replay.errors import FormatError, ReplayError
from collectors.replay.lines import line_blocks
from schemas.timeframes import MAX_TIME_US, MIN_TIME_US

_DUMP = "".join(line + "\n" for line in dump(40)).encode()


def _export(kind: str) -> bytes:
    frame = pl.DataFrame(
        {
            "exchange": ["binance"] * 40,
            "symbol": ["BTC-USDT"] * 40,
            "trade_id": range(40),
            "price": [5.5] * 40,
            "size": [0.5] * 40,
            "side": ["buy", "sell"] * 20,
            "exchange_time_us": [T0_MS * 1000] * 40,
            "receive_time_us": [T0_MS * 1000] * 40,
        }
    )
    out = io.BytesIO()
    {"csv": frame.write_csv, "parquet": frame.write_parquet, "arrow": frame.write_ipc}[kind](out)
    return out.getvalue()


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.csv", _DUMP)
    return out.getvalue()


def _capture() -> bytes:
    event = {"e": "trade", "s": "BTCUSDT", "p": "5.5", "q": "1", "T": T0_MS, "m": True}
    rows = [f"{T0_MS + i}000000 " + json.dumps({"stream": "btcusdt@trade", "data": {**event, "t": i}}) for i in range(40)]
    return "\n".join(rows).encode()


def _kraken() -> bytes:
    rows = [["5.5", "1", 1762795433.97 + i, "b", "l", "", i] for i in range(40)]
    return json.dumps({"error": [], "result": {"XBTUSDT": rows, "last": "1"}}).encode()


WHOLE = {
    "dump": _DUMP,
    "gzip": gzip.compress(_DUMP, mtime=0),
    "zip": _zip(),
    "capture": _capture(),
    "kraken": _kraken(),
    "export": _export("csv"),
    "parquet": _export("parquet"),
    "arrow": _export("arrow"),
}


@st.composite
def _damage(draw: st.DrawFn) -> tuple[str, bytes]:
    """A whole file with a few bytes changed, cut out or put in."""
    kind = draw(st.sampled_from(sorted(WHOLE)))
    data = bytearray(WHOLE[kind])
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["change", "cut", "insert", "end"])):
            case "change":
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[place : place + draw(st.integers(1, 50))]
            case "insert":
                data[place:place] = draw(st.binary(max_size=8) | st.sampled_from([b"\n", b",", b'"', b"{", b"\0", b"nan", b"-", b"9" * 30]))
            case "end":
                del data[place:]
    return kind, bytes(data)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_damage())
def test_a_damaged_file_gives_sound_rows_or_a_replay_error(tmp_path: Path, damaged: tuple[str, bytes]) -> None:
    """Whatever is given out is a trade; whatever is not is rejected with its line, or the file is refused in one sentence."""
    path = tmp_path / "x"
    path.write_bytes(damaged[1])
    try:
        for block in Reader(path, BTC).blocks():
            columns = block.columns
            assert (columns["price"] > 0).all()
            assert (columns["size"] > 0).all()
            assert (columns["trade_id"] >= 0).all()
            assert ((columns["exchange_time_us"] >= MIN_TIME_US) & (columns["exchange_time_us"] < MAX_TIME_US)).all()
            assert set(columns["side"].tolist()) <= {1, -1}
            assert all(item.line >= 1 and item.detail and item.reason for item in block.rejected)
    except ReplayError as error:
        assert "\n" not in str(error)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_garbage_is_refused(tmp_path: Path, data: bytes) -> None:
    """Random bytes are no file of trades."""
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(ReplayError):
        list(Reader(path, BTC).blocks())


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that never breaks is no text; the limit bounds what is held."""
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "x.csv"
    path.write_bytes(_DUMP + b"9" * (8 << 20))
    with pytest.raises(FormatError, match="a line is longer than 1 MiB: this is no text file"):
        list(line_blocks(ByteSource(path), 4096))
