"""Jobs of the repair in PostgreSQL: who asks for a stretch to be reconciled puts one in, the repair process takes what is due.

A job says which bars to compare: those that touch ``[start_us, end_us)``. It is done when all of them are closed, compared and, where they
differed, published and acknowledged. The same trigger makes one job, so a record that is read twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from infra.database import Database
from infra.errors import MarketstreamError
from infra.settings import Settings
from schemas.seam import Clock

REASONS: Final = ("gap_filled", "gap_unfillable", "too_late", "quarantine", "backfill", "replay", "request")
CHANNEL: Final = "marketstream_repairs"
_LOCK: Final = 7_203_882
"""Advisory lock, with the prefix: one process works on the jobs of a stack, another one waits to take over."""
_KEEP_DAYS: Final = 90
_NOBODY_S: Final = 20.0
"""A job nobody looks at for this long: the repair does not run."""
_POLL_S: Final = 0.25
_US: Final = 1_000_000
_COLUMNS: Final = "id, exchange, symbol, start_us, end_us, reason, trigger, state, due_us, until_us, checked, revised, attempts, note, created_at, updated_at"


class RepairAwayError(MarketstreamError):
    """The trades are stored and nobody makes their bars."""

    exit_code = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A job to be."""

    exchange: str
    symbol: str
    start_us: int
    end_us: int
    reason: str
    """One of ``REASONS``."""
    trigger: str
    """Names what asked for it; the same again changes nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job as it stands. Its columns are described in the migration."""

    id: int
    exchange: str
    symbol: str
    start_us: int
    end_us: int
    reason: str
    trigger: str
    state: str
    due_us: int
    until_us: int
    checked: int
    revised: int
    attempts: int
    note: str
    created_us: int
    updated_us: int

    @property
    def key(self) -> str:
        """``exchange:symbol``."""
        return f"{self.exchange}:{self.symbol}"


class RepairJobs(Database):
    """The jobs of one stack over one connection; see Database."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.postgres)
        self._prefix = settings.kafka.topic_prefix

    async def add(self, wanted: Sequence[Wanted]) -> list[int]:
        """Store jobs; their ids in order. A trigger that has a job widens it where it asks for more, and that is a new job under its id."""
        wider = "excluded.start_us < r.start_us OR excluded.end_us > r.end_us"
        sql = f"""
            INSERT INTO repairs AS r (topic_prefix, exchange, symbol, start_us, end_us, reason, trigger) VALUES ($1, $2, $3, $4, $5, $6, $7)
            ON CONFLICT (topic_prefix, exchange, symbol, trigger) DO UPDATE SET
                start_us = least(r.start_us, excluded.start_us), end_us = greatest(r.end_us, excluded.end_us), updated_at = now(),
                state = CASE WHEN {wider} THEN 'pending' ELSE r.state END,
                until_us = CASE WHEN {wider} THEN 0 ELSE r.until_us END,
                due_us = CASE WHEN {wider} THEN 0 ELSE r.due_us END,
                created_at = CASE WHEN {wider} THEN now() ELSE r.created_at END
            RETURNING id
        """
        ids = []
        async with self.transaction():
            for one in wanted:
                fields = (one.exchange, one.symbol, one.start_us, one.end_us, one.reason, one.trigger)
                ids.append(int(await self.run("fetchval", sql, self._prefix, *fields)))
        return ids

    async def due(self, now_us: int, limit: int = 64) -> list[Job]:
        """Jobs of the one symbol that has waited longest, oldest first; [] when none is due."""
        sql = f"""
            SELECT {_COLUMNS} FROM repairs AS r WHERE topic_prefix = $1 AND state <> 'done' AND due_us <= $2 AND (exchange, symbol) = (
                SELECT exchange, symbol FROM repairs WHERE topic_prefix = $1 AND state <> 'done' AND due_us <= $2 ORDER BY due_us, id LIMIT 1
            ) ORDER BY id LIMIT $3
        """
        return [_job(row) for row in await self.run("fetch", sql, self._prefix, now_us, limit)]

    async def next_due_us(self) -> int | None:
        """When the next job is due; None when there is none."""
        sql = "SELECT min(due_us) FROM repairs WHERE topic_prefix = $1 AND state <> 'done'"
        found = await self.run("fetchval", sql, self._prefix)
        return None if found is None else int(found)

    async def save(
        self,
        jobs: Sequence[Job],
        *,
        state: str,
        due_us: int = 0,
        until_us: int | None = None,
        checked: int = 0,
        revised: int = 0,
        note: str = "",
        failed: bool = False,
    ) -> None:
        """Write how far jobs are. ``checked`` and ``revised`` are added; ``failed`` counts one more failure in a row, else it is none.

        A job that was widened since it was read is due from its start on whatever is said of it: what was done is not all of it.
        """
        same = "(r.start_us, r.end_us) = (was.start_us, was.end_us)"
        sql = f"""
            UPDATE repairs AS r SET state = CASE WHEN {same} THEN $4 ELSE 'pending' END, due_us = CASE WHEN {same} THEN $5::bigint ELSE 0 END,
                until_us = CASE WHEN {same} THEN coalesce($6::bigint, r.until_us) ELSE 0 END, checked = checked + $7, revised = revised + $8,
                note = $9, attempts = CASE WHEN $10 THEN attempts + 1 ELSE 0 END, updated_at = now()
            FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS was (id, start_us, end_us) WHERE r.id = was.id
        """
        read = [job.id for job in jobs], [job.start_us for job in jobs], [job.end_us for job in jobs]
        await self.run("execute", sql, *read, state, due_us, until_us, checked, revised, note, failed)

    async def get(self, job_id: int) -> Job | None:
        """One job of this stack."""
        row = await self.run("fetchrow", f"SELECT {_COLUMNS} FROM repairs WHERE topic_prefix = $1 AND id = $2", self._prefix, job_id)
        return None if row is None else _job(row)

    async def newest(self, limit: int, *, state: str | None = None) -> list[Job]:
        """The newest jobs, newest first."""
        sql = f"SELECT {_COLUMNS} FROM repairs WHERE topic_prefix = $1 AND ($2::text IS NULL OR state = $2) ORDER BY id DESC LIMIT $3"
        return [_job(row) for row in await self.run("fetch", sql, self._prefix, state, limit)]

    async def count(self) -> dict[str, int]:
        """Jobs by state."""
        rows = await self.run("fetch", "SELECT state, count(*) AS n FROM repairs WHERE topic_prefix = $1 GROUP BY state", self._prefix)
        return {row["state"]: row["n"] for row in rows}

    async def forget_old(self) -> None:
        """Drop jobs that were done long ago."""
        sql = "DELETE FROM repairs WHERE topic_prefix = $1 AND state = 'done' AND updated_at < now() - make_interval(days => $2)"
        await self.run("execute", sql, self._prefix, _KEEP_DAYS)

    async def try_lead(self) -> bool:
        """Whether this connection is the one that works on the jobs of this stack; it stays so until it is closed."""
        return bool(await self.run("fetchval", "SELECT pg_try_advisory_lock($1, hashtext($2))", _LOCK, self._prefix))

    async def is_led(self) -> bool:
        """Whether a process works on the jobs of this stack now."""
        sql = """
            SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = $1::bigint::oid
                AND objid = (hashtext($2)::bigint & 4294967295)::oid AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))
        """
        return bool(await self.run("fetchval", sql, _LOCK, self._prefix))

    async def listen(self) -> None:
        """Be told of new jobs, for :meth:`wait`."""
        await self.listen_to(CHANNEL, self._notified)

    def _notified(self, _: object, __: object, ___: object, prefix: str) -> None:
        if prefix == self._prefix:
            self.wake()


async def wait_reconciled(jobs: RepairJobs, job_id: int, clock: Clock, tell: Callable[[Job], None]) -> Job:
    """The job once every bar that ends in its range is reconciled; those that reach beyond it may be open for long.

    Raises RepairAwayError when nobody works on it, UnreachableError.
    """
    seen, moved_us = -1, clock.monotonic_us()
    while True:
        job = await jobs.get(job_id)
        if job is None:
            raise MarketstreamError(f"Job {job_id} of the repair is gone: order it again.")
        tell(job)
        if job.state == "done" or job.until_us >= job.end_us:
            return job
        if job.updated_us != seen or job.due_us > clock.now_us():
            seen, moved_us = job.updated_us, clock.monotonic_us()
        if clock.monotonic_us() - moved_us > _NOBODY_S * _US:
            hint = job.note or "start the stack with `marketstream up`, or look at `marketstream status`."
            raise RepairAwayError(f"The trades are stored, but nobody works on job {job_id} of the repair: {hint}")
        await clock.sleep(_POLL_S)


def _job(row: Any) -> Job:
    values = dict(row)
    created, updated = values.pop("created_at"), values.pop("updated_at")
    return Job(**values, created_us=round(created.timestamp() * 1e6), updated_us=round(updated.timestamp() * 1e6))
