"""The ledger read from the real table: the same gap looks the same whichever range is asked for."""

from __future__ import annotations

import pytest

from api.coverage import CoverageQuery
from infra.coverage import LedgerReader
from processors.coverage import LedgerRow
from schemas.frames import GAP_COMPLETE, GAP_OPEN, GAP_UNFILLABLE
from tests.tables import Tables, empty_tables

HOUR = 3_600_000_000
T0_US = 1_723_161_600_000_000


def publish(tables: Tables, offset: int, *rows: LedgerRow) -> None:
    """Store a record of ``gaps`` that was published at its offset."""
    base = {"exchange": "binance", "symbol": "BTC-USDT", "channel": 1, "kafka_offset": offset, "known_at_us": offset}
    tables.insert("gaps", (base | row._asdict() for row in rows))


async def intervals(tables: Tables, hours: int, known_at_us: int | None = None) -> list[tuple[float, float, str]]:
    """The timeline of so many hours."""
    asked = CoverageQuery(exchange="binance", symbol="BTC-USDT", start_us=T0_US, end_us=T0_US + hours * HOUR, known_at_us=known_at_us)
    (feed,) = await LedgerReader(tables).read(asked)  # type: ignore[arg-type]
    return [((one["start_us"] - T0_US) / HOUR, (one["end_us"] - T0_US) / HOUR, one["state"]) for one in feed["intervals"]]


@pytest.mark.parametrize("state", [GAP_OPEN, GAP_UNFILLABLE])
async def test_a_gap_that_is_left_behind_the_range_is_not_in_it(state: int) -> None:
    """Its earlier row, which reached into the range, is not valid any more; it was, before that."""
    tables = empty_tables()
    gap = LedgerRow(7, T0_US + HOUR // 2, T0_US + 3 * HOUR, state, 3)
    publish(tables, 1, gap)
    publish(tables, 2, gap._replace(start_time_us=T0_US + 2 * HOUR), LedgerRow(8, T0_US, T0_US + 2 * HOUR, GAP_COMPLETE, 7))
    name = "open" if state == GAP_OPEN else "unfillable"
    assert await intervals(tables, 1) == [(0, 1, "complete")]
    assert await intervals(tables, 3) == [(0, 2, "complete"), (2, 3, name)]
    assert await intervals(tables, 1, known_at_us=1) == [(0, 0.5, "unknown"), (0.5, 1, name)]
