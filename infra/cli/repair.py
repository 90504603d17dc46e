"""`marketstream repair`: what the repair has done and has to do, and an order to compare the bars of a range with its trades."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infra.cli.context import settings_of
from infra.cli.output import Output
from infra.errors import SettingsError
from infra.repair_jobs import Job, RepairJobs, Wanted, wait_reconciled
from infra.seam import SystemClock
from infra.settings import Settings
from schemas.errors import SchemaError, VocabularyError
from schemas.symbols import check_exchange, check_symbol
from schemas.timeframes import format_time_us, parse_time_us

STATES = ("pending", "running", "done")


def list_jobs(output: Output, *, data_dir: Path | None, state: str | None, limit: int) -> None:
    """The newest jobs, newest first. Raises SettingsError for an unknown state, UnreachableError."""
    if state is not None and state not in STATES:
        raise SettingsError(str(VocabularyError("state of a job", state, STATES)))
    found = asyncio.run(_newest(settings_of(data_dir), state, limit))
    if output.as_json:
        output.emit({"jobs": [asdict(job) for job in found]})
        return
    if not found:
        output.note("no job is known" if state is None else f"no job is {state}")
        return
    rows = [
        (
            job.id,
            job.state,
            job.exchange,
            job.symbol,
            format_time_us(job.start_us),
            format_time_us(job.end_us),
            job.reason,
            job.revised,
            job.note,
        )
        for job in found
    ]
    output.table(("job", "state", "exchange", "symbol", "from", "to", "reason", "bars revised", "note"), rows)


def show(output: Output, *, data_dir: Path | None, job: int) -> None:
    """One job with everything known of it. Raises SettingsError for an unknown one, UnreachableError."""
    found = asyncio.run(_get(settings_of(data_dir), job))
    if found is None:
        raise SettingsError(f"There is no job {job}: `marketstream repair list` names those there are.")
    if output.as_json:
        output.emit(asdict(found))
        return
    output.table(("field", "value"), [(name, _shown(name, value)) for name, value in asdict(found).items()])


def order(output: Output, *, data_dir: Path | None, exchange: str, symbol: str, start: str, end: str) -> None:
    """Have the bars of a range compared with its trades; return when those that end in it are. Raises SettingsError, UnreachableError."""
    settings = settings_of(data_dir)
    start_us, end_us = time_of("--start", start), time_of("--end", end)
    if start_us >= end_us:
        raise SettingsError(f"The start {format_time_us(start_us)} is not before the end {format_time_us(end_us)}: swap them.")
    try:
        check_exchange(exchange)
        check_symbol(symbol)
    except SchemaError as exc:
        raise SettingsError(str(exc)) from exc

    async def work() -> Job:
        clock = SystemClock()
        wanted = Wanted(
            exchange=exchange, symbol=symbol, start_us=start_us, end_us=end_us, reason="request", trigger=f"request/{clock.now_us()}"
        )
        async with RepairJobs(settings) as jobs:
            (job_id,) = await jobs.add([wanted])
            return await wait_reconciled(jobs, job_id, clock, lambda job: None)

    job = asyncio.run(work())
    if output.as_json:
        output.emit(asdict(job))
        return
    output.line(f"job {job.id}: {job.revised:,} of {job.checked:,} bars revised")
    if job.state != "done":
        output.note(f"Bars that reach beyond the range follow: see `marketstream repair show {job.id}`.")


def time_of(name: str, text: str) -> int:
    """Microseconds of an option's time. Raises SettingsError that names the option."""
    try:
        return parse_time_us(text)
    except ValueError as exc:
        raise SettingsError(f"{name}: {exc}") from None


async def _newest(settings: Settings, state: str | None, limit: int) -> list[Job]:
    async with RepairJobs(settings) as jobs:
        return await jobs.newest(limit, state=state)


async def _get(settings: Settings, job: int) -> Job | None:
    async with RepairJobs(settings) as jobs:
        return await jobs.get(job)


def _shown(name: str, value: Any) -> Any:
    return format_time_us(value) if name.endswith("_us") and value > 10**15 else value
