"""Rows of the coverage ledger on their way into frames."""

from __future__ import annotations

import numpy as np

from collectors.batcher import Batcher, BatcherConfig
from collectors.coverage import block, ledger_frames
from collectors.wire import TRADE_DTYPES
from schemas.frames import GAP_FILLED, GAP_OPEN, GAP_UNFILLABLE


def test_of_several_rows_of_a_gap_only_the_last_goes_out() -> None:
    """Progress and the last word in one round: in one record nobody could tell which of them is the newer."""
    batcher = Batcher("binance/ws/0", TRADE_DTYPES, BatcherConfig())
    codes = [np.array([batcher.code_of("binance:BTC-USDT")]), np.array([batcher.code_of("binance:ETH-USDT")])]
    rows = [
        block(codes[0], start_time_us=1, end_time_us=2, evidence=1, state=GAP_OPEN, gap_id=7),
        block(codes[1], start_time_us=1, end_time_us=2, evidence=1, state=GAP_OPEN, gap_id=7),
        block(codes[0], start_time_us=1, end_time_us=2, evidence=1, state=GAP_FILLED, gap_id=8),
        block(codes[0], start_time_us=1, end_time_us=2, evidence=1, state=GAP_UNFILLABLE, gap_id=7),
    ]
    found = set()
    for _, _, frame in ledger_frames(batcher, rows, 9):
        columns = frame.columns
        for code, gap_id, state in zip(columns["symbol_code"].tolist(), columns["gap_id"].tolist(), columns["state"].tolist(), strict=True):
            found.add((frame.symbols[code], gap_id, state))
    assert found == {
        ("binance:ETH-USDT", 7, GAP_OPEN),
        ("binance:BTC-USDT", 8, GAP_FILLED),
        ("binance:BTC-USDT", 7, GAP_UNFILLABLE),
    }
