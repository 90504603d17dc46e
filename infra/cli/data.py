"""`marketstream replay` and `marketstream export`: files into the stack and out of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infra.cli.context import settings_of
from infra.cli.output import Output
from infra.cli.progress import Progress
from infra.errors import SettingsError
from infra.settings import Settings
from schemas.timeframes import format_time_us, parse_time_us, timeframe_seconds


def replay(output: Output, *, data_dir: Path | None, file: Path, exchange: str, symbol: str, file_format: str, speed: str) -> None:
    """Publish a recorded file and return when its trades and bars are stored. Raises as ``infra.replay.replay_file`` does."""
    from infra.replay import ReplayProgress, replay_file

    settings = settings_of(data_dir)
    with Progress(output, file.name) as progress:
        most_missing = 0

        def on_progress(now: ReplayProgress) -> None:
            nonlocal most_missing
            if now.stage == "publishing":
                progress.update(now.stage, now.position_bytes, now.size_bytes, rows=now.rows, rows_per_s=now.rows_per_s)
                return
            missing = sum(now.missing.values())
            most_missing = max(most_missing, missing)
            progress.update(now.stage, most_missing - missing, most_missing, rows=now.published, rows_per_s=0.0, missing=dict(now.missing))

        work = replay_file(settings, file, exchange=exchange, symbol=symbol, format=file_format, speed=speed, progress=on_progress)
        summary = asyncio.run(work)
    value = asdict(summary)
    if output.as_json:
        output.emit(value)
        return
    output.line(_replayed(file, value))
    if summary.deadlettered:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in summary.reasons.items())
        output.note(
            f"{summary.deadlettered:,} rows went to the deadletter topic ({reasons}): see `marketstream deadletter list --component replay`."
        )


def _replayed(file: Path, value: dict[str, Any]) -> str:
    text = f"{file}: {value['published']:,} trades published"
    if value["duplicates"]:
        text += f", {value['duplicates']:,} repeated ids left out"
    if value["published"]:
        text += f"; {format_time_us(value['first_time_us'])} to {format_time_us(value['last_time_us'])}"
    return f"{text}; {value['bars']:,} bars; everything stored after {value['seconds']:.1f} s ({value['rows_per_s']:,.0f} rows/s)"


def export(
    output: Output,
    *,
    data_dir: Path | None,
    what: str,
    exchange: str,
    symbol: str,
    timeframe: str | None,
    start: str | None,
    end: str | None,
    known_at: str | None,
    session: str | None,
    file_format: str,
    file: Path,
) -> None:
    """Write stored rows into ``file``. Raises as ``infra.export.export`` does."""
    from infra.export import export as run

    settings = settings_of(data_dir)
    start_us, end_us, known_at_us = _time("--start", start), _time("--end", end), _time("--known-at", known_at)
    if session is not None:
        if known_at_us is not None:
            raise SettingsError("--known-at is given beside --session, which says itself what was known: leave one of them out.")
        end_us, known_at_us = _bounds(settings, session, what, timeframe, start_us, end_us)
    started = time.monotonic()
    with Progress(output, file.name) as progress:

        def on_progress(rows: int, total: int) -> None:
            progress.update("exporting", rows, total, rows=rows, rows_per_s=rows / max(time.monotonic() - started, 1e-3))

        summary = run(
            settings,
            what,
            exchange=exchange,
            symbol=symbol,
            output=file,
            timeframe=timeframe or "1m",
            start_us=start_us,
            end_us=end_us,
            known_at_us=known_at_us,
            file_format=file_format,
            progress=on_progress,
        )
    if output.as_json:
        output.emit(asdict(summary))
    else:
        output.line(f"{summary.path}: {summary.rows:,} {what}, {summary.size_bytes:,} bytes")


def _bounds(settings: Settings, name: str, what: str, timeframe: str | None, start_us: int | None, end_us: int | None) -> tuple[int, int]:
    """(end of the range, time until which rows were known) of what a session sees now."""
    from api.live.series import SeriesKey
    from infra.seam import SystemClock
    from infra.sessions import find_session

    session = asyncio.run(find_session(settings, name))
    now_us = session.now_us(SystemClock().now_us())
    seen_us = session.end_us(SeriesKey(what, "", "", timeframe_seconds(timeframe) if timeframe else 0), now_us)
    if start_us is not None and start_us >= seen_us:
        raise SettingsError(f"--start lies after the virtual now of session {name}, which is {format_time_us(now_us)}: move it.")
    return (seen_us if end_us is None else min(end_us, seen_us)), session.known_at_us(now_us)


def _time(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_time_us(text)
    except ValueError as exc:
        raise SettingsError(f"{name}: {exc}") from None
