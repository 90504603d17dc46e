"""Suspects read from the real table: which of a trade's rows is valid."""

from __future__ import annotations

import pytest

from api.quality import Quality, SuspectFilter
from tests.tables import empty_tables


@pytest.mark.parametrize(
    ("states", "valid"),
    [
        ((1,), 1),
        ((1, 2), 2),
        ((1, 3, 1), 3),  # fetched again after a person released it
        ((1, 4, 1, 2), 4),  # fetched again, and the market agrees again
        ((1, 2, 1), 2),
        ((1, 4, 3), 3),  # a person thought again
    ],
)
async def test_a_trade_that_is_fetched_again_keeps_what_was_decided_on_it(states: tuple[int, ...], valid: int) -> None:
    """In the list and in the count of what is held."""
    tables = empty_tables()
    row = {"exchange": "binance", "symbol": "BTC-USDT", "trade_id": 7}
    tables.insert("quarantine", (row | {"state": state, "kafka_offset": offset} for offset, state in enumerate(states)))
    quality = Quality(tables)  # type: ignore[arg-type]
    (found,) = await quality.suspects(SuspectFilter(symbol="BTC-USDT"), limit=5)
    assert found["state"] == valid
    assert await quality.held_now("BTC-USDT") == {"binance": int(valid == 1)}
