"""How far each backfill is: one row in PostgreSQL a range. What lies before ``next_id`` is acknowledged by the broker."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from infra.backfill_ledger import Lacking
from infra.errors import MarketstreamError
from infra.repair_jobs import RepairJobs

_LOCK: Final = 7_203_883
"""Advisory lock, with the row's id: a range is fetched by one process at a time."""
_COLUMNS: Final = "id, state, first_id, next_id, last_id, first_us, last_us, rows, lacking, job_id"


class BackfillRunsError(MarketstreamError):
    """Another process works on the same range."""


@dataclass(kw_only=True, slots=True)
class BackfillState:
    """One row of table ``backfills``."""

    id: int
    state: str
    first_id: int = -1
    next_id: int = -1
    last_id: int = -1
    first_us: int = 0
    last_us: int = 0
    rows: int = 0
    lacking: list[Lacking] = field(default_factory=list)
    job_id: int | None = None


class BackfillStates:
    """The table, over the connection of the jobs."""

    def __init__(self, jobs: RepairJobs, prefix: str) -> None:
        self._jobs = jobs
        self._prefix = prefix

    async def take(self, exchange: str, symbol: str, start_us: int, end_us: int) -> tuple[BackfillState, bool]:
        """(the row of this range, whether an earlier run left it unfinished); one that was done begins anew.

        Raises BackfillRunsError when another process has it, UnreachableError.
        """
        sql = """
            INSERT INTO backfills AS b (topic_prefix, exchange, symbol, start_us, end_us) VALUES ($1, $2, $3, $4, $5)
            ON CONFLICT (topic_prefix, exchange, symbol, start_us, end_us) DO UPDATE SET updated_at = b.updated_at RETURNING id
        """
        number = int(await self._jobs.run("fetchval", sql, self._prefix, exchange, symbol, start_us, end_us))
        if not await self._jobs.run("fetchval", "SELECT pg_try_advisory_lock($1, $2)", _LOCK, number % 2**31):
            raise BackfillRunsError(f"Another process fetches this range of {exchange} {symbol} already: wait for it, or end it.")
        state = await self._read(number)
        if state.state == "done":
            state = BackfillState(id=number, state="fetching")
            await self.save(state)
            return state, False
        return state, state.next_id >= 0

    async def save(self, state: BackfillState) -> None:
        """Write it. Raises UnreachableError."""
        sql = """
            UPDATE backfills SET state = $2, first_id = $3, next_id = $4, last_id = $5, first_us = $6, last_us = $7, rows = $8, lacking = $9,
                job_id = $10, updated_at = now() WHERE id = $1
        """
        values: dict[str, Any] = asdict(state)
        values["lacking"] = json.dumps([list(one) for one in state.lacking])
        names = ("id", "state", "first_id", "next_id", "last_id", "first_us", "last_us", "rows", "lacking", "job_id")
        await self._jobs.run("execute", sql, *(values[name] for name in names))

    async def _read(self, number: int) -> BackfillState:
        row = dict(await self._jobs.run("fetchrow", f"SELECT {_COLUMNS} FROM backfills WHERE id = $1", number))
        row["lacking"] = [Lacking(*one) for one in json.loads(row["lacking"])]
        return BackfillState(**row)
