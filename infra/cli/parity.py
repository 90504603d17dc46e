"""`marketstream runs` and `marketstream parity`: what ran here, and whether replaying it gives the same bars."""

from __future__ import annotations

import asyncio
from pathlib import Path

from infra.cli.context import settings_of
from infra.cli.output import Output
from infra.runs import list_runs
from schemas.timeframes import format_time_us


def runs(output: Output, *, data_dir: Path | None) -> None:
    """List the recorded runs of a stack, oldest first. Raises UnreachableError."""
    found = asyncio.run(list_runs(settings_of(data_dir)))
    if output.as_json:
        output.emit({"runs": [run.value() for run in found]})
        return
    if not found:
        output.note("no run is recorded yet: `marketstream up` records one")
        return
    rows = [
        (run.id, run.state, run.source, _time(run.started_us), _time(run.ended_us), run.records("trades"), run.records("bars"))
        for run in found
    ]
    output.table(("run", "state", "source", "started", "ended", "trades records", "bars records"), rows)


def _time(time_us: int | None) -> str:
    return "" if time_us is None else format_time_us(time_us)[:19] + "Z"
