"""`marketstream deadletter list|show|retry|drop`: what could not be processed, and what is done about it."""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from api.letters import STATES, LetterFilter, shown
from infra.cli.context import settings_of
from infra.cli.output import Output
from infra.deadletters import NotRetriedError, Result, office
from infra.errors import SettingsError
from infra.seam import SystemClock
from infra.settings import Settings
from schemas.errors import nearest
from schemas.timeframes import format_time_us, parse_duration_us, parse_time_us

_DETAIL_CHARS: Final = 80
_SHOWN_BYTES: Final = 4_096


def list_letters(
    output: Output,
    *,
    data_dir: Path | None,
    reason: str | None,
    exchange: str | None,
    symbol: str | None,
    component: str | None,
    since: str | None,
    state: str | None,
    limit: int,
) -> None:
    """List letters, newest first. Raises SettingsError for a state or time that is none, UnreachableError."""
    clock = SystemClock()
    wanted = LetterFilter(
        reason=reason or "",
        exchange=exchange or "",
        symbol=symbol or "",
        component=component or "",
        since_us=_since(since, clock.now_us()),
        state=_state(state),
    )
    rows, following = asyncio.run(_page(settings_of(data_dir), wanted, limit))
    if output.as_json:
        output.emit({"letters": [shown(row) for row in rows], "next": following})
        return
    if not rows:
        output.line("No dead letters of that kind.")
        return
    output.table(
        ("id", "state", "reason", "component", "market", "from", "published", "detail"),
        [
            (str(row["id"]), row["state"], row["reason"], row["component"], _market(row), _from(row), _time(row), _short(row["detail"]))
            for row in rows
        ],
    )
    if following is not None:
        output.note(f"There are older ones: ask with --limit above {limit}, or for a reason, market or state.")


def show(output: Output, *, data_dir: Path | None, letter: int) -> None:
    """One letter with its bytes. Raises SettingsError when there is none."""
    found = asyncio.run(_one(settings_of(data_dir), letter))
    if output.as_json:
        output.emit(shown(found))
        return
    raw = base64.b64decode(found["raw_base64"])
    for name, value in shown(found).items():
        if name in ("raw_base64", "raw_text") or value in ("", None) or (value == -1 and name in ("partition", "offset", "origin")):
            continue
        output.line(f"{name:<12} {format_time_us(value) if name.endswith('_us') and value > 0 else value}")
    cut = f", the first {_SHOWN_BYTES:,}" if len(raw) > _SHOWN_BYTES else ""
    output.line(f"{'raw':<12} {found['raw_size']:,} bytes{cut}: {ascii(raw[:_SHOWN_BYTES])[1:]}")


def retry(output: Output, *, data_dir: Path | None, letters: Sequence[int], reason: str | None) -> int:
    """Try letters again. Returns 1 when any could not be retried or failed again; for one letter raises NotRetriedError instead."""
    return _decide(output, "retry", settings_of(data_dir), letters, reason)


def drop(output: Output, *, data_dir: Path | None, letters: Sequence[int], reason: str | None) -> int:
    """Decide that nothing more is done about letters. Raises SettingsError for one that is not there."""
    return _decide(output, "drop", settings_of(data_dir), letters, reason)


def _decide(output: Output, verb: str, settings: Settings, letters: Sequence[int], reason: str | None) -> int:
    if bool(letters) == bool(reason):
        both = "both" if letters else "neither"
        raise SettingsError(
            f"deadletter {verb} wants ids or --reason, and has {both}: `marketstream deadletter list` shows ids and reasons."
        )
    results = asyncio.run(_run(settings, verb, letters, reason))
    failed = [result for result in results if result.result in ("refused", "failed")]
    if output.as_json:
        counts = Counter(result.result for result in results)
        output.emit({"results": [asdict(result) for result in results], **counts})
        return 1 if failed else 0
    if len(letters) == 1 and failed:
        raise NotRetriedError(f"Letter {failed[0].id} was not retried. {failed[0].detail}")
    for result in results:
        output.line(f"{result.id}: {result.result}. {result.detail}")
    if not results:
        output.line(f"No open letters of reason '{reason}'.")
    return 1 if failed else 0


async def _run(settings: Settings, verb: str, letters: Sequence[int], reason: str | None) -> list[Result]:
    async with office(settings, SystemClock()) as letters_office:
        act = letters_office.retry if verb == "retry" else letters_office.drop
        if letters:
            return await act(letters)
        results: list[Result] = []
        async for ids in letters_office.ids_of(LetterFilter(reason=reason or "", state="open")):
            results += await act(ids)
        return results


async def _page(settings: Settings, wanted: LetterFilter, limit: int) -> tuple[list[dict[str, Any]], int | None]:
    async with office(settings, SystemClock()) as letters_office:
        return await letters_office.letters.page(wanted, limit=limit)


async def _one(settings: Settings, letter: int) -> dict[str, Any]:
    async with office(settings, SystemClock()) as letters_office:
        return (await letters_office.get([letter]))[0]


def _since(text: str | None, now_us: int) -> int:
    if text is None:
        return 0
    try:
        return now_us - parse_duration_us(text)
    except ValueError:
        pass
    try:
        return parse_time_us(text)
    except (ValueError, OverflowError):
        raise SettingsError(f"--since is '{text[:40]}'; write a time (2024-08-08T23:54:13Z) or how long ago, as in 10m.") from None


def _state(text: str | None) -> str:
    if text and text not in STATES:
        guess = nearest(text, STATES)
        raise SettingsError(f"--state is '{text[:40]}'; " + (f"did you mean {guess}?" if guess else f"it is one of {', '.join(STATES)}."))
    return text or ""


def _market(row: dict[str, Any]) -> str:
    return ":".join(part for part in (row["exchange"], row["symbol"]) if part)


def _from(row: dict[str, Any]) -> str:
    topic = f"{row['topic']}[{row['partition']}]@{row['offset']}" if row["topic"] else ""
    return " ".join(part for part in (topic, row["place"]) if part)


def _time(row: dict[str, Any]) -> str:
    time_us = row["known_at_us"] or row["time_us"]
    return format_time_us(time_us)[:19] if time_us > 0 else ""


def _short(text: str) -> str:
    return text if len(text) <= _DETAIL_CHARS else text[: _DETAIL_CHARS - 1] + "…"
