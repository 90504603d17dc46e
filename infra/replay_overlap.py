"""A replayed file beside data that is already there: its span in, a job of the repair where bars of both meet out.

The worker makes the bars of a file by themselves; where trades of before lie in the same bars, or beside them so that a bar the file cut off
is whole now, the bars are made anew from all trades stored.
"""

from __future__ import annotations

import asyncio
from typing import Final

from clickhouse_connect.driver.exceptions import ClickHouseError

from infra.clickhouse.client import connect, unreachable
from infra.repair_jobs import RepairJobs, Wanted, wait_reconciled
from infra.settings import Settings
from infra.symbol_reader import SymbolReader
from schemas.seam import Clock
from schemas.symbols import Instrument
from schemas.timeframes import US_PER_SECOND

_DAY_US: Final = 86_400 * US_PER_SECOND
"""The longest bar."""


async def heal(settings: Settings, instrument: Instrument, first_us: int, last_us: int, before_offset: int, clock: Clock) -> list[int]:
    """Order the repair where the trades of a replay (``[first_us, last_us]``) meet older ones; ids of its jobs, done when this returns.

    Where no repair process runs the jobs wait for one, and this returns at once.

    Args:
        before_offset: of the partition of ``trades``: what was there before the replay.

    Raises:
        UnreachableError: PostgreSQL or ClickHouse does not answer.
        RepairAwayError: the repair process does not get on.
    """
    spans = await asyncio.to_thread(_meetings, settings, instrument, first_us, last_us, before_offset)
    if not spans:
        return []
    trigger = f"replay/{clock.now_us()}"
    async with RepairJobs(settings) as jobs:
        wanted = [
            Wanted(
                exchange=instrument.exchange,
                symbol=instrument.symbol,
                start_us=start_us,
                end_us=end_us,
                reason="replay",
                trigger=f"{trigger}/{place}",
            )
            for place, (start_us, end_us) in enumerate(spans)
        ]
        ids = await jobs.add(wanted)
        if await jobs.is_led():
            for job_id in ids:
                await wait_reconciled(jobs, job_id, clock, lambda job: None)
    return ids


def _meetings(settings: Settings, instrument: Instrument, first_us: int, last_us: int, before_offset: int) -> list[tuple[int, int]]:
    """Stretches ``[start, end)`` whose bars have trades of the file and older ones, or end where the other begins."""
    client = connect(settings.clickhouse)
    try:
        found = client.query(
            "SELECT count() FROM trades WHERE exchange = {e:String} AND symbol = {s:String} AND kafka_offset < {o:UInt64}"
            " AND exchange_time_us BETWEEN {f:Int64} AND {l:Int64}",
            parameters={"e": instrument.exchange, "s": instrument.symbol, "o": before_offset, "f": first_us, "l": last_us},
        )
        reader = SymbolReader(client, *instrument)
        before, after = reader.before(first_us), reader.after(last_us + 1)
    except (ClickHouseError, OSError) as exc:
        raise unreachable(settings.clickhouse, exc) from exc
    finally:
        client.close()
    # the bar of the neighbour is one that an older file may have cut off; beyond the longest bar nothing is shared
    start_us = before.time_us if before is not None and before.time_us >= first_us - _DAY_US else first_us
    end_us = after.time_us + 1 if after is not None and after.time_us < last_us + _DAY_US else last_us + 1
    if found.result_rows[0][0]:
        return [(start_us, end_us)]
    return [span for span, meets in (((start_us, first_us + 1), start_us < first_us), ((last_us, end_us), end_us > last_us + 1)) if meets]
