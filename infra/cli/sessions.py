"""`marketstream replay --as-of` and `marketstream sessions`: make, list and stop sessions of the time machine."""

from __future__ import annotations

import asyncio
from pathlib import Path

from api.sessions import describe
from infra.cli.context import settings_of
from infra.cli.output import Output
from infra.errors import SettingsError
from infra.sessions import create_session, list_sessions, stop_session
from schemas.timeframes import format_time_us, parse_time_us


def create(output: Output, *, data_dir: Path | None, as_of: str, until: str | None, speed: str, clock: str) -> None:
    """Make a session and print its id alone on stdout. Raises SettingsError, NotStoredError, UnreachableError."""
    as_of_us, until_us = _time("--as-of", as_of), None if until is None else _time("--until", until)
    work = create_session(settings_of(data_dir), as_of_us=as_of_us, until_us=until_us, speed=speed, clock_name=clock)
    session = asyncio.run(work)
    if output.as_json:
        output.emit(session.fields)
        return
    output.note(f"{describe(session)}; give session={session.id} to REST, the stream, export or tail")
    output.line(session.id)


def listed(output: Output, *, data_dir: Path | None) -> None:
    """List the sessions of a stack. Raises UnreachableError."""
    found = asyncio.run(list_sessions(settings_of(data_dir)))
    if output.as_json:
        output.emit({"sessions": [entry.value() for entry in found]})
        return
    if not found:
        output.note("there is no session: `marketstream replay --as-of TIME` makes one")
        return
    rows = [
        (
            entry.session.id,
            entry.state,
            entry.session.clock,
            f"{entry.session.speed:g}x" if entry.session.speed else "max",
            format_time_us(entry.session.as_of_us)[:19],
            format_time_us(entry.now_us)[:19],
            format_time_us(entry.session.until_us)[:19],
        )
        for entry in found
    ]
    output.table(("session", "state", "clock", "speed", "as of", "virtual now", "until"), rows)


def stop(output: Output, *, data_dir: Path | None, name: str) -> None:
    """Stop a session. Raises SettingsError, UnreachableError."""
    asyncio.run(stop_session(settings_of(data_dir), name))
    if output.as_json:
        output.emit({"session": name, "state": "stopped"})
    else:
        output.line(f"{name} is stopped")


def _time(option: str, text: str) -> int:
    try:
        return parse_time_us(text)
    except ValueError as exc:
        raise SettingsError(f"{option}: {exc}") from None
