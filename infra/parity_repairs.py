"""Why the repair published a row, and what of it is still to be done: its jobs in PostgreSQL in; the reason of a row, or None, out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from infra.database import connected
from infra.parity_rows import RowKey
from infra.settings import Settings

_US: Final = 1_000_000
_DAY_US: Final = 86_400 * _US
"""Flat bars behind a job's end belong to it no longer than this (``infra.repair_run``)."""
_ALL_US: Final = 2**62


class Job(NamedTuple):
    """One job of the repair: what it was to reconcile and why."""

    instrument: str
    start_us: int
    end_us: int
    reason: str
    created_us: int = 0
    """When it was ordered: what was known then is in the bars it is done with."""
    until_us: int = _ALL_US
    """It is done with bars that end at or before this."""


class Answer(NamedTuple):
    """How far the jobs are with a bar."""

    ordered_us: int
    """When the newest job was ordered that is done with it; 0: none is."""
    is_open: bool
    """A job is not done with it."""


Answers = Callable[[str, int, int, bool], Answer]
"""(instrument, open, close, whether it is flat) of a bar -> how far the jobs are with it."""


async def load_jobs(settings: Settings) -> list[Job]:
    """Every job of a stack. Raises UnreachableError."""
    async with connected(settings.postgres) as connection:
        sql = "SELECT exchange, symbol, start_us, end_us, reason, state, until_us, created_at FROM repairs WHERE topic_prefix = $1"
        rows = await connection.fetch(sql, settings.kafka.topic_prefix)
    return [
        Job(
            f"{row['exchange']}:{row['symbol']}",
            row["start_us"],
            row["end_us"],
            row["reason"],
            created_us=round(row["created_at"].timestamp() * _US),
            until_us=_ALL_US if row["state"] == "done" else row["until_us"],
        )
        for row in rows
    ]


def explain(jobs: Iterable[Job]) -> Callable[[RowKey], str | None]:
    """A function that names the job whose interval a row's bar touches; None for a row no job touches."""
    by_instrument = _by_instrument(jobs)

    def reason(key: RowKey) -> str | None:
        close_us = key.open_time_us + key.timeframe_s * _US
        for job in by_instrument.get(key.instrument, ()):
            if job.start_us < close_us and key.open_time_us < job.end_us:
                return f"repair: {job.reason}"
        return None

    return reason


def answers(jobs: Iterable[Job]) -> Answers:
    """A function that tells how far the jobs are with a bar."""
    by_instrument = _by_instrument(jobs)

    def answered(instrument: str, open_us: int, close_us: int, flat: bool) -> Answer:
        ordered_us, is_open = 0, False
        for job in by_instrument.get(instrument, ()):
            if job.start_us < close_us and open_us < job.end_us + (_DAY_US if flat else 0):
                if job.until_us >= close_us:
                    ordered_us = max(ordered_us, job.created_us)
                else:
                    is_open = True
        return Answer(ordered_us, is_open)

    return answered


def _by_instrument(jobs: Iterable[Job]) -> dict[str, list[Job]]:
    found: dict[str, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.instrument, []).append(job)
    return found
