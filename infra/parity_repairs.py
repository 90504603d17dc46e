"""Why the repair published a row: its jobs in PostgreSQL in; the reason of a row, or None, out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from infra.database import connected
from infra.parity_rows import RowKey
from infra.settings import Settings

_US = 1_000_000


class Job(NamedTuple):
    """One job of the repair: what it was to reconcile and why."""

    instrument: str
    start_us: int
    end_us: int
    reason: str


async def load_jobs(settings: Settings) -> list[Job]:
    """Every job of a stack. Raises UnreachableError."""
    async with connected(settings.postgres) as connection:
        sql = "SELECT exchange, symbol, start_us, end_us, reason FROM repairs WHERE topic_prefix = $1"
        rows = await connection.fetch(sql, settings.kafka.topic_prefix)
    return [Job(f"{row['exchange']}:{row['symbol']}", row["start_us"], row["end_us"], row["reason"]) for row in rows]


def explain(jobs: Iterable[Job]) -> Callable[[RowKey], str | None]:
    """A function that names the job whose interval a row's bar touches; None for a row no job touches."""
    by_instrument: dict[str, list[Job]] = {}
    for job in jobs:
        by_instrument.setdefault(job.instrument, []).append(job)

    def reason(key: RowKey) -> str | None:
        close_us = key.open_time_us + key.timeframe_s * _US
        for job in by_instrument.get(key.instrument, ()):
            if job.start_us < close_us and key.open_time_us < job.end_us:
                return f"repair: {job.reason}"
        return None

    return reason
