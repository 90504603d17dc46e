"""Compiles what numba compiles, before anybody waits for it: ``python -m infra.warm``, run once by set-up.

The bar kernel takes about a minute to compile and 0.2 s to load from its cache, which lies beside the code (or in ``NUMBA_CACHE_DIR``).
Left to the first trade, that minute would stop the worker's event loop past its session with the broker.
"""

from __future__ import annotations

import sys

import numpy as np

from infra.seam import SYSTEM
from processors.bars import BarConfig
from schemas.codec import FrameCodec, RowCodec
from schemas.frames import END_OF_SOURCE, Frame
from schemas.timeframes import MIN_TIME_US, US_PER_SECOND
from streams.bar_shard import BarCodecs, BarShard
from streams.quality_records import QualityCodecs

_KEY = "binance:BTC-USDT"


def warm(config: BarConfig | None = None) -> float:
    """Send one frame of one trade, its source's last, through a shard of bars and forget it. Returns the seconds it took.

    It goes through the codec because decoded columns are read-only arrays, for which numba compiles code of its own.
    """
    started = SYSTEM.monotonic_s()
    trades = FrameCodec("trades", 1)
    codecs = BarCodecs(
        trades=trades,
        bars=FrameCodec("bars", 2),
        rows=RowCodec("bars_row", 3),
        deadletter=RowCodec("deadletter", 4),
        fetch_schema=str,
        quality=QualityCodecs(quality=FrameCodec("quality", 5), quarantine=FrameCodec("quarantine", 6)),
    )
    columns = {name: np.ones(1, dtype) for name, dtype in trades.dtypes.items()}
    columns["symbol_code"] = np.zeros(1, np.int32)
    columns["exchange_time_us"] = columns["receive_time_us"] = np.full(1, MIN_TIME_US + US_PER_SECOND, np.int64)
    frame = Frame(source="warm", watermark_us=MIN_TIME_US, symbols=(_KEY,), columns=columns, flags=END_OF_SOURCE)
    BarShard(0, config or BarConfig(), codecs).process(0, trades.encode(frame))
    return SYSTEM.monotonic_s() - started


if __name__ == "__main__":
    print(f"kernels are ready after {warm():.1f} s", file=sys.stderr)
