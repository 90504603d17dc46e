"""Runs of the stack: recorded by ``marketstream up`` in PostgreSQL, their ends by ``down``, or found in the topics when a stack was killed.

A run is a stretch of the topics: from where ``trades`` and ``bars`` stood when the stack was started to where they stood when the next one
was (or stand now). ``marketstream parity`` replays one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final

from infra import offsets
from infra.database import connected
from infra.errors import SettingsError
from infra.names import speakable
from infra.offsets import Offsets
from infra.seam import SystemClock
from infra.settings import Settings, options
from infra.stack import state
from schemas.errors import nearest
from schemas.seam import Clock

TOPICS_OF_A_RUN: Final = ("trades", "bars")
NEWEST: Final = "last"
"""Names the newest run where an id is wanted."""
_US: Final = 1_000_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_HASTE_S: Final = 3.0
"""A stack that stops waits no longer than this for PostgreSQL to note it: the end can be found in the topics too."""
_COLUMNS: Final = (
    "id, started_at, ended_at, end_reason, topic_prefix, source, supervisor_pid, supervisor_ticks, settings, start_offsets, end_offsets"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run of a stack."""

    id: str
    started_us: int
    ended_us: int | None
    """None while it runs."""
    state: str
    """``running``, ``ended`` (by `down` or Ctrl-C) or ``killed`` (its end was found in the topics)."""
    source: str
    topic_prefix: str
    settings: Mapping[str, str]
    """Dotted key -> text, without secrets."""
    start: Offsets
    end: Offsets
    """Offset after the last record; of a running one: where the topics stand now."""

    def records(self, topic: str) -> int:
        """Records it published into a topic."""
        return sum(end - self.start[topic].get(partition, 0) for partition, end in self.end[topic].items())

    def value(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"records": {topic: self.records(topic) for topic in TOPICS_OF_A_RUN}}

    def worker_settings(self) -> dict[str, str]:
        """What decides which bars its worker made, as overrides for ``load_settings``; settings that no longer exist are left out."""
        known = {item.key for item in options() if item.key.split(".")[0] in ("worker", "quality")}
        return {key: text for key, text in self.settings.items() if key in known}


async def begin_run(settings: Settings, source: str, started_us: int, clock: Clock | None = None) -> str:
    """Record that a stack was started at ``started_us`` (wall clock, before its first process); its new id.

    Runs of the same topics that have no end yet get theirs: where this one begins. Raises UnreachableError.
    """
    clock = clock or SystemClock()
    start = await asyncio.to_thread(offsets.since, settings.kafka, TOPICS_OF_A_RUN, started_us)
    found = state.read(settings.data_dir)
    pid, ticks = (found.pid, found.ticks) if found is not None and found.lives() else (0, 0)
    secret = {item.key for item in options() if item.secret}
    shown = {key: text for key, text, _ in settings.shown() if key not in secret}
    prefix = settings.kafka.topic_prefix
    async with connected(settings.postgres) as connection:
        for row in await connection.fetch(f"SELECT {_COLUMNS} FROM runs WHERE topic_prefix = $1 AND end_offsets IS NULL", prefix):
            await _close(connection, settings, row, start)
        for _ in range(100):
            name = speakable(clock.random)
            sql = """
                INSERT INTO runs (id, started_at, topic_prefix, source, supervisor_pid, supervisor_ticks, settings, start_offsets)
                VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING
            """
            done = await connection.execute(
                sql, name, _moment(started_us), prefix, source, pid, ticks, json.dumps(shown), json.dumps(start)
            )
            if done == "INSERT 0 1":
                return name
    raise SettingsError("No free id was found for this run in 100 tries: delete old rows of the table runs.")


async def end_run(settings: Settings, clock: Clock | None = None) -> bool:
    """Note that the newest run of this stack ends now, by a person's wish; whether there was one. Call it before the stores stop."""
    now = _moment((clock or SystemClock()).now_us())
    async with connected(settings.postgres, timeout_s=_HASTE_S) as connection:
        sql = """
            UPDATE runs SET ended_at = $2, end_reason = 'down'
            WHERE ended_at IS NULL AND id = (SELECT id FROM runs WHERE topic_prefix = $1 ORDER BY started_at DESC LIMIT 1)
        """
        return bool(await connection.execute(sql, settings.kafka.topic_prefix, now) != "UPDATE 0")


async def list_runs(settings: Settings) -> list[Run]:
    """Every run of these topics, oldest first; ends that nobody recorded are found in the topics. Raises UnreachableError."""
    async with connected(settings.postgres) as connection:
        rows = await connection.fetch(
            f"SELECT {_COLUMNS} FROM runs WHERE topic_prefix = $1 ORDER BY started_at", settings.kafka.topic_prefix
        )
    _, now = await asyncio.to_thread(offsets.bounds, settings.kafka, TOPICS_OF_A_RUN)
    return [await asyncio.to_thread(_run, settings, row, now) for row in rows]


async def find_run(settings: Settings, name: str) -> Run:
    """The run with that id, with an id that begins so, or the newest one for ``last``. Raises SettingsError naming the nearest."""
    runs = await list_runs(settings)
    if name == NEWEST and runs:
        return runs[-1]
    found = [run for run in runs if run.id == name] or [run for run in runs if run.id.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise SettingsError(f"'{name}' may be any of {', '.join(run.id for run in found)}: write more of it.")
    if not runs:
        raise SettingsError("No run of this stack is recorded: `marketstream up` records one.")
    guess = nearest(name, [run.id for run in runs])
    hint = f"did you mean {guess}?" if guess else "`marketstream runs` lists them."
    raise SettingsError(f"There is no run '{name}': {hint}")


async def _close(connection: Any, settings: Settings, row: Any, end: Offsets) -> None:
    """Give a run its end: the start of the one after it."""
    last_us = await asyncio.to_thread(offsets.published_us, settings.kafka, end)
    ended_at = row["ended_at"] or _moment(max(last_us, _us(row["started_at"])))
    sql = "UPDATE runs SET ended_at = $2, end_reason = $3, end_offsets = $4 WHERE id = $1"
    await connection.execute(sql, row["id"], ended_at, row["end_reason"] or "killed", json.dumps(end))


def _run(settings: Settings, row: Any, now: Offsets) -> Run:
    end = now if row["end_offsets"] is None else _offsets(row["end_offsets"])
    ended_us = None if row["ended_at"] is None else _us(row["ended_at"])
    word = {"down": "ended", "killed": "killed"}.get(row["end_reason"], "running")
    if word == "running" and not _lives(settings, row):
        word = "killed"
        ended_us = max(offsets.published_us(settings.kafka, end), _us(row["started_at"]))
    return Run(
        id=row["id"],
        started_us=_us(row["started_at"]),
        ended_us=ended_us,
        state=word,
        source=row["source"],
        topic_prefix=row["topic_prefix"],
        settings=json.loads(row["settings"]),
        start=_offsets(row["start_offsets"]),
        end=end,
    )


def _lives(settings: Settings, row: Any) -> bool:
    found = state.read(settings.data_dir)
    return found is not None and found.lives() and (found.pid, found.ticks) == (row["supervisor_pid"], row["supervisor_ticks"])


def _offsets(text: str) -> Offsets:
    return {topic: {int(partition): int(offset) for partition, offset in held.items()} for topic, held in json.loads(text).items()}


def _moment(time_us: int) -> datetime:
    return datetime.fromtimestamp(time_us // _US, UTC).replace(microsecond=time_us % _US)


def _us(moment: datetime) -> int:
    delta = moment - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * _US + delta.microseconds
