"""Frames and rows as `tail` shows them, and what `bench` makes of a benchmark's answer."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from infra.cli import bench
from infra.cli.output import Output, cell_text
from infra.cli.progress import Progress
from infra.cli.rows import columns_of, rows_of_frame, shown
from infra.errors import MarketstreamError, SettingsError
from schemas.frames import Frame
from schemas.topics import TOPICS


def test_rows_of_a_frame_are_in_words() -> None:
    """Exchange, symbol, side and timeframe as words; everything else as it is; the position last."""
    columns = {
        "symbol_code": np.array([1, 0], np.int32),
        "side": np.array([1, -1], np.int8),
        "price": np.array([1.5, 2.5]),
    }
    frame = Frame(source="s", watermark_us=0, symbols=("binance:BTC-USDT", "binance:ETH-USDT"), columns=columns)
    first, second = rows_of_frame(frame, 3, 70)
    assert first == {"exchange": "binance", "symbol": "ETH-USDT", "side": "buy", "price": 1.5, "partition": 3, "offset": 70}
    assert (second["symbol"], second["side"]) == ("BTC-USDT", "sell")


@pytest.mark.parametrize("name", TOPICS)
def test_every_topic_has_columns(name: str) -> None:
    """Each topic of the catalogue can be shown and selected from; positions are always there."""
    columns = columns_of(TOPICS[name])
    assert columns["partition"] == columns["offset"] == "number"
    assert "symbol_code" not in columns
    assert "timeframe_s" not in columns


def test_bars_can_be_selected_by_timeframe_and_time() -> None:
    """Kinds of columns as people write their values."""
    columns = columns_of(TOPICS["bars"])
    assert (columns["timeframe"], columns["open_time_us"], columns["close"], columns["symbol"]) == ("text", "time", "number", "text")


@pytest.mark.parametrize(
    ("name", "value", "kind", "expected"),
    [
        ("open_time_us", 1_723_161_253_000_000, "time", "2024-08-08T23:54:13.000000Z"),
        ("price", 60000.0, "number", "60000"),
        ("price", 0.00000123, "number", "0.00000123"),
        ("x", None, "number", ""),
    ],
)
def test_cells_are_readable(name: str, value: object, kind: str, expected: str) -> None:
    """Times in ISO 8601, numbers without trailing zeros, nothing for nothing."""
    assert shown(name, value, kind) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "text"), [(None, ""), (True, "yes"), (1234567, "1,234,567"), (1.50, "1.5"), (1e20, "1e+20"), ("a", "a")])
def test_cell_text(value: object, text: str) -> None:
    """Cells of tables."""
    assert cell_text(value) == text


def test_progress_without_a_terminal_is_json_lines_on_stderr_and_few() -> None:
    """A log gets the first line of each stage and then at most one a second."""
    err, out = io.StringIO(), io.StringIO()
    with Progress(Output(as_json=False, out=out, err=err), "file.csv") as progress:
        for done in range(1000):
            progress.update("publishing", done, 1000, rows=done, rows_per_s=10.0)
        progress.update("storing", 0, 5, rows=1000, rows_per_s=0.0, missing={"worker": 5})
    lines = [json.loads(line)["progress"] for line in err.getvalue().splitlines()]
    assert [line["stage"] for line in lines] == ["publishing", "storing"]
    assert lines[1]["missing"] == {"worker": 5}
    assert out.getvalue() == ""


def test_benchmarks_are_found_by_name(tmp_path: Path) -> None:
    """``bench_<name>.py`` of the folder, sorted; a misspelt one names the nearest."""
    for name in ("bench_engine.py", "bench_bars.py", "stack.py"):
        (tmp_path / name).write_text("")
    known = bench.available(tmp_path)
    assert known == ["bars", "engine"]
    assert bench.chosen([], known) == known
    assert bench.chosen(["engine", "engine"], known) == ["engine"]
    with pytest.raises(SettingsError, match="did you mean engine"):
        bench.chosen(["engin"], known)
    with pytest.raises(MarketstreamError, match="no benchmarks"):
        bench.chosen([], [])


def test_answer_of_a_benchmark_has_name_figures_and_ratios() -> None:
    """The documented shape, whatever the benchmark leaves out."""
    assert bench.as_result("bars", {"figures": {"a": 1}}) == {"name": "bars", "figures": {"a": 1}, "ratios": {}}


def test_figures_may_be_numbers_medians_or_nested() -> None:
    """Each becomes one line."""
    values = {"a": 1.5, "b": {"median": 2, "spread": [1, 3], "unit": "ns"}, "c": {"d": 4}}
    assert bench.rows(values) == [("a", 1.5, "", None), ("b", 2, "ns", [1, 3]), ("c.d", 4, "", None)]


def test_machine_is_named() -> None:
    """Figures without their machine mean nothing."""
    assert "Python 3." in bench.machine()
