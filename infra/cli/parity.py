"""`marketstream runs` and `marketstream parity`: what ran here, and whether replaying it gives the same bars."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

from infra.cli.context import settings_of
from infra.cli.output import Output
from infra.cli.progress import Progress
from infra.runs import find_run, list_runs
from schemas.timeframes import NAME_BY_SECONDS, format_time_us

if TYPE_CHECKING:
    from infra.parity import Report

_TWIN = "bars.rows"
_SHOWN = 10
"""Differences a person gets to see; --json and the certificate have more."""


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


def parity(output: Output, *, data_dir: Path | None, run: str, html: Path | None) -> int:
    """Replay a run and compare its bars; 0 when every row is equal or explained, else 1. A certificate instead of a run is checked.

    Raises SettingsError for an unknown run, OutputFileError for a certificate that cannot be written, UnreachableError.
    """
    if Path(run).suffix == ".html":
        return _verify(output, Path(run))
    from infra.parity import check

    settings = settings_of(data_dir)
    found = asyncio.run(find_run(settings, run))
    started = time.monotonic()
    with Progress(output, found.id) as progress:

        def tell(done: int, total: int, trades: int) -> None:
            progress.update("replaying", done, total, rows=trades, rows_per_s=trades / max(time.monotonic() - started, 1e-3))

        report = asyncio.run(check(settings, found, tell=tell))
    if html is not None:
        from infra.parity_html import write

        write(html, report)
    if output.as_json:
        output.emit(report.value())
    else:
        _show(output, report)
        if html is not None:
            output.line(f"certificate: {html}")
    return 0 if report.unexplained == 0 else 1


def _verify(output: Output, path: Path) -> int:
    from infra.parity_html import read_certificate

    value, checksum = read_certificate(path)
    if output.as_json:
        output.emit({"run": value["run"]["id"], "verdict": value["verdict"], "unexplained": value["unexplained"], "sha256": checksum})
    else:
        output.line(
            f"{path}: run {value['run']['id']}, {value['verdict']}, {value['unexplained']:,} unexplained; its data are as they were written"
        )
    return 0 if value["unexplained"] == 0 else 1


def _show(output: Output, report: Report) -> None:
    value = report.value()
    bars, stored = value["bars"], value["clickhouse"]
    rows = [
        (NAME_BY_SECONDS.get(seconds, f"{seconds}s"), counts.get("equal", 0), counts.get("explained", 0), counts.get("unexplained", 0))
        for seconds, counts in bars["by_timeframe"].items()
    ]
    output.table(("timeframe", "equal", "explained", "unexplained"), rows, title=f"run {report.run.id} ({report.run.state})")
    identical = f"{bars['identical_records']:,} of {bars['records']:,} records byte for byte"
    output.line(f"{bars['rows']:,} rows of bars compared: {bars['equal']:,} equal; {identical}")
    output.line(f"ClickHouse: {stored['equal']:,} of {stored['rows']:,} final rows equal, {stored['pending']:,} not stored yet")
    repaired = report.repaired
    if repaired.bars or repaired.pending:
        rest = f"{repaired.equal:,} of {repaired.bars:,} bars equal to those of their trades, {repaired.pending:,} not done or stored yet"
        output.line(f"repair: {rest}")
    for part in report.outputs:
        what = "series end with the same bar" if part.topic == _TWIN else "records equal"
        output.line(f"{part.topic}: {part.equal:,} of {part.records:,} {what}")
    for reason, count in bars["explained"].items():
        output.line(f"explained: {count:,} rows: {reason}")
    for part in report.outputs:
        for reason, count in part.explained.items():
            output.line(f"explained: {count:,} of {part.topic}: {reason}")
    for reason, count in repaired.explained.items():
        output.line(f"explained: {count:,} repaired bars: {reason}")
    if bars["pending"]:
        output.line(f"not compared: {bars['pending']:,} trades records that the run had not yet turned into bars")
    if report.not_retained:
        output.line(f"not compared: {report.not_retained:,} trades records that the topics no longer hold")
    output.line(f"{bars['trades']:,} trades replayed in {report.seconds:.1f} s: {report.trades_per_s:,.0f} trades/s")
    differences = report.differences
    for item in differences[:_SHOWN]:
        output.line(f"unexplained: {item.text()}")
    if report.unexplained:
        output.line(f"DIFFERENCE: {report.unexplained:,} unexplained")
    else:
        output.line("PARITY: 0 unexplained rows")


def _time(time_us: int | None) -> str:
    return "" if time_us is None else format_time_us(time_us)[:19] + "Z"
