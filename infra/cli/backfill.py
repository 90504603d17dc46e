"""`marketstream backfill`: the trades of a time range from the venue's REST interface, and their bars."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path

from infra.cli.context import settings_of
from infra.cli.output import Output
from infra.cli.progress import Progress
from infra.cli.repair import time_of
from schemas.timeframes import format_time_us


def backfill(output: Output, *, data_dir: Path | None, exchange: str, symbol: str, start: str, end: str) -> None:
    """Fetch a range and return when its trades are stored and its bars reconciled. Raises as ``infra.backfill.backfill`` does."""
    from infra.backfill import BackfillProgress
    from infra.backfill import backfill as run

    settings = settings_of(data_dir)
    start_us, end_us = time_of("--start", start), time_of("--end", end)
    with Progress(output, f"{exchange} {symbol}") as progress:

        def on_progress(now: BackfillProgress) -> None:
            more = {"waits_s": round(now.waits_s, 1)} if now.waits_s else {}
            progress.update(now.stage, now.done, now.total, rows=now.rows, rows_per_s=now.rows_per_s, **more)

        summary = asyncio.run(run(settings, exchange=exchange, symbol=symbol, start_us=start_us, end_us=end_us, progress=on_progress))
    if output.as_json:
        output.emit(asdict(summary))
        return
    text = f"{exchange} {symbol}: {summary.rows:,} trades"
    if summary.rows:
        text += (
            f" ({summary.first_id} to {summary.last_id}, {format_time_us(summary.first_time_us)} to {format_time_us(summary.last_time_us)})"
        )
    resumed = ", gone on with where an earlier run ended" if summary.resumed else ""
    output.line(f"{text}{resumed}; {summary.bars_revised:,} of {summary.bars_checked:,} bars revised; {summary.seconds:.1f} s")
    for one in summary.lacking:
        ids = f"trades {one['first_id']} to {one['last_id']}" if one["first_id"] >= 0 else f"everything before trade {one['last_id'] + 1}"
        output.note(
            f"The venue does not have {ids}, {format_time_us(one['start_us'])} to {format_time_us(one['end_us'])}: no bar of it is complete."
        )
    if summary.pending:
        output.note(f"Bars that reach beyond the range follow: see `marketstream repair show {summary.job}`.")
