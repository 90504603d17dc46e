"""The live table's figures from frames of bars, on a clock that the test holds."""

import numpy as np

from infra.cli.live import MAX_SYMBOLS, WINDOW_US, LiveStats
from schemas.frames import Frame

SECOND = 1_000_000
NOW = 1_700_000_000 * SECOND


def frame(rows: list[tuple[int, int, int, int, int]], symbols: tuple[str, ...] = ("binance:BTC-USDT",), source: str = "test") -> Frame:
    """A frame of bars from ``(symbol_code, timeframe_s, is_final, trade_count, last_receive_time_us)``."""
    data = np.array(rows, dtype=np.int64).reshape(-1, 5)
    count = len(data)
    floats = {name: np.full(count, 1.5) for name in ("open", "high", "low", "close", "volume")}
    columns = {
        "symbol_code": data[:, 0].astype(np.int32),
        "timeframe_s": data[:, 1].astype(np.int32),
        "is_final": data[:, 2].astype(np.int8),
        "trade_count": data[:, 3],
        "last_receive_time_us": data[:, 4],
        "open_time_us": np.full(count, NOW),
        "revision": np.zeros(count, np.int32),
        **floats,
    }
    return Frame(source=source, watermark_us=NOW, symbols=symbols, columns=columns)


def test_trades_are_counted_once_from_final_one_second_bars() -> None:
    """Open bars and larger timeframes repeat trades and are not counted."""
    stats = LiveStats()
    for second in range(10):
        rows = [(0, 1, 1, 50, NOW), (0, 1, 0, 7, NOW), (0, 60, 0, 500, NOW)]
        stats.add(frame(rows), NOW + second * SECOND)
    assert stats.snapshot(NOW + 10 * SECOND).trades_per_s == 50.0


def test_rate_falls_to_zero_when_nothing_comes() -> None:
    """Figures are those of the last ten seconds."""
    stats = LiveStats()
    stats.add(frame([(0, 1, 1, 50, NOW)]), NOW)
    assert stats.snapshot(NOW + WINDOW_US + 2).trades_per_s == 0.0
    assert stats.snapshot(NOW + WINDOW_US + 2).latency_p50_ms is None


def test_latency_is_that_of_the_newest_trade_and_only_once() -> None:
    """A bar closed by the watermark repeats an old trade and says nothing about latency."""
    stats = LiveStats()
    stats.add(frame([(0, 1, 0, 1, NOW)]), NOW + 5_000)
    stats.add(frame([(0, 1, 1, 1, NOW)]), NOW + 900_000)
    found = stats.snapshot(NOW + SECOND)
    assert (found.latency_p50_ms, found.latency_p99_ms) == (5.0, 5.0)


def test_replayed_recordings_have_no_latency() -> None:
    """Trades received years ago would show years."""
    stats = LiveStats()
    stats.add(frame([(0, 1, 1, 1, NOW - 3600 * SECOND)]), NOW)
    assert stats.snapshot(NOW).latency_p50_ms is None


def test_busiest_symbols_come_first_and_memory_is_bounded() -> None:
    """However many symbols there are, a bounded number is kept and the busiest are shown."""
    stats = LiveStats()
    symbols = tuple(f"binance:S{index}-USDT" for index in range(MAX_SYMBOLS + 50))
    stats.add(frame([(index, 60, 0, index, NOW) for index in range(len(symbols))], symbols), NOW)
    shown = stats.snapshot(NOW, symbols=3).bars
    assert [bar.trade_count for bar in shown] == [MAX_SYMBOLS - 1, MAX_SYMBOLS - 2, MAX_SYMBOLS - 3]


def test_empty_frames_are_heartbeats() -> None:
    """An empty frame changes nothing and breaks nothing."""
    stats = LiveStats()
    stats.add(Frame(source="test", watermark_us=NOW), NOW)
    assert stats.snapshot(NOW).bars == ()
