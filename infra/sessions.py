"""Sessions of the time machine in PostgreSQL: a moment and a pace in; an id that REST, the stream, ``export`` and ``tail`` take, out.

What a session means stands in ``api.sessions``; later consumers read it with :func:`find_session` and ask it for its virtual now.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from api.sessions import CLOCKS, KNOWN, MARKET, Session
from collectors.replay.pacing import parse_speed
from infra.api_stores import PostgresSymbols
from infra.clickhouse.client import connect
from infra.database import connected
from infra.errors import SettingsError
from infra.kafka import committed_offsets, end_offsets
from infra.names import speakable
from infra.progress import SINK_GROUP, NotStoredError
from infra.runs import TOPICS_OF_A_RUN
from infra.seam import SystemClock
from infra.settings import Settings
from schemas.errors import VocabularyError, nearest
from schemas.seam import Clock
from schemas.timeframes import format_time_us

_COLUMNS: Final = "id, clock, as_of_us, until_us, started_us, pinned_us, speed, stopped_at"
_STORE_WAIT_S: Final = 30.0
_POLL_S: Final = 0.1
_HOUR_US: Final = 3_600_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """A session with what a list shows of it."""

    session: Session
    created_us: int
    now_us: int
    """Its virtual now."""

    @property
    def state(self) -> str:
        """``running``, ``finished`` (its virtual now has come to its end; it still answers) or ``stopped``."""
        if self.session.stopped:
            return "stopped"
        return "finished" if self.now_us >= self.session.until_us else "running"

    def value(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.session.fields, "created_us": self.created_us, "now_us": self.now_us, "state": self.state}


class PostgresSessions:
    """`api.sessions.SessionStore` over the API's own connections to PostgreSQL.

    Args:
        symbols: whose connections are used.
        topic_prefix: of this stack; another stack's sessions are none of ours.
    """

    def __init__(self, symbols: PostgresSymbols, topic_prefix: str) -> None:
        self._symbols = symbols
        self._prefix = topic_prefix

    async def session(self, name: str) -> Session | None:
        """See SessionStore.session."""
        rows = await self._symbols.fetch(f"SELECT {_COLUMNS} FROM sessions WHERE id = $1 AND topic_prefix = $2", name, self._prefix)
        return _session(rows[0]) if rows else None


async def create_session(
    settings: Settings,
    *,
    as_of_us: int,
    until_us: int | None = None,
    speed: str | float | None = 1.0,
    clock_name: str = "auto",
    clock: Clock | None = None,
) -> Session:
    """Make a session.

    Returns when everything that was published before it is stored, so that it is the same for everybody from its first moment on.

    Args:
        settings: of the stack.
        as_of_us: where it begins, microseconds UTC; before now.
        until_us: where it ends; None: now (``known``), the newest row (``market``).
        speed: virtual seconds a second, or ``max``.
        clock_name: ``known``, ``market``, or ``auto``: ``known`` unless all that is stored of ``as_of_us`` was recorded long before it was stored.
        clock: wall clock, sleep and randomness.

    Raises:
        SettingsError: a moment, pace or clock that makes no sense.
        NotStoredError: the sink does not keep up, so nobody could say what the session holds.
        UnreachableError: a server does not answer.
    """
    clock = clock or SystemClock()
    pinned_us = clock.now_us()
    try:
        pace = parse_speed(speed) or 0.0
        if clock_name not in (*CLOCKS, "auto"):
            raise VocabularyError("clock", clock_name, (*CLOCKS, "auto"))
    except ValueError as exc:
        raise SettingsError(str(exc)) from exc
    if as_of_us >= pinned_us:
        raise SettingsError(f"--as-of {format_time_us(as_of_us)} is not in the past: a session replays what was.")
    await _stored(settings, clock)
    first_known_us, last_us = await asyncio.to_thread(_extent, settings)
    name = clock_name if clock_name != "auto" else _fitting_clock(as_of_us, first_known_us, last_us)
    latest_us = pinned_us if name == KNOWN else min(pinned_us, max(last_us, as_of_us))
    end_us = latest_us if until_us is None else min(until_us, latest_us)
    if end_us < as_of_us:
        raise SettingsError(f"--until {format_time_us(end_us)} is before --as-of {format_time_us(as_of_us)}: exchange the two.")
    async with connected(settings.postgres) as connection:
        for _ in range(100):
            session = Session(
                id=f"s-{speakable(clock.random)}",
                clock=name,
                as_of_us=as_of_us,
                until_us=end_us,
                started_us=clock.now_us(),
                pinned_us=pinned_us,
                speed=pace,
            )
            sql = """
                INSERT INTO sessions (id, topic_prefix, clock, as_of_us, until_us, started_us, pinned_us, speed)
                VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING
            """
            values = (session.id, settings.kafka.topic_prefix, name, as_of_us, end_us, session.started_us, pinned_us, pace)
            if await connection.execute(sql, *values) == "INSERT 0 1":
                return session
    raise SettingsError("No free id was found for this session in 100 tries: delete old rows of the table sessions.")


def _fitting_clock(as_of_us: int, first_known_us: int, last_us: int) -> str:
    """``market`` for a moment long before anything was known, of which there are trades all the same: a recording that was stored later."""
    return MARKET if as_of_us < min(first_known_us - _HOUR_US, last_us) else KNOWN


async def find_session(settings: Settings, name: str) -> Session:
    """The session with that id. Raises SettingsError naming the nearest when there is none or it was stopped, UnreachableError."""
    found = {entry.session.id: entry.session for entry in await list_sessions(settings)}
    session = found.get(name)
    if session is None:
        guess = nearest(name, found)
        hint = f"did you mean {guess}?" if guess else "`marketstream sessions list` shows those there are."
        raise SettingsError(f"There is no session '{name}': {hint}")
    if session.stopped:
        raise SettingsError(f"Session '{name}' was stopped: make another one with `marketstream replay --as-of`.")
    return session


async def list_sessions(settings: Settings, clock: Clock | None = None) -> list[Listed]:
    """Every session of this stack, oldest first."""
    now_us = (clock or SystemClock()).now_us()
    async with connected(settings.postgres) as connection:
        sql = f"SELECT {_COLUMNS}, created_at FROM sessions WHERE topic_prefix = $1 ORDER BY created_at"
        rows = await connection.fetch(sql, settings.kafka.topic_prefix)
    found = []
    for row in rows:
        session = _session(row)
        until_us = _us(row["stopped_at"]) if session.stopped else now_us
        found.append(Listed(session=session, created_us=_us(row["created_at"]), now_us=session.now_us(until_us)))
    return found


async def stop_session(settings: Settings, name: str) -> None:
    """Stop a session: nobody gets an answer from it any more, within a second. Raises SettingsError when there is none."""
    await find_session(settings, name)
    async with connected(settings.postgres) as connection:
        await connection.execute("UPDATE sessions SET stopped_at = now() WHERE id = $1", name)


async def _stored(settings: Settings, clock: Clock) -> None:
    """Return when the sink has stored what the topics hold now."""
    ends = await asyncio.to_thread(end_offsets, settings.kafka, TOPICS_OF_A_RUN)
    until_us = clock.monotonic_us() + int(_STORE_WAIT_S * 1e6)
    while True:
        done = await asyncio.to_thread(committed_offsets, settings.kafka, SINK_GROUP, TOPICS_OF_A_RUN)
        behind = sum(max(end - max(done[topic][partition], 0), 0) for topic, held in ends.items() for partition, end in held.items())
        if not behind:
            return
        if clock.monotonic_us() > until_us:
            raise NotStoredError(f"The sink is {behind:,} records behind, so a session would lack them: look at `marketstream status`.")
        await clock.sleep(_POLL_S)


def _extent(settings: Settings) -> tuple[int, int]:
    """(when the first row was known whose time was noted, 0 for none; time of the newest trade or end of the newest bar)."""
    client = connect(settings.clickhouse)
    try:
        known = "SELECT min(known_at_us) FROM {} WHERE known_at_us > 0"
        first = [int(client.query(known.format(table)).result_rows[0][0]) for table in TOPICS_OF_A_RUN]
        newest = [
            int(client.query("SELECT max(exchange_time_us) FROM trades").result_rows[0][0]),
            int(client.query("SELECT max(close_time_us) FROM bars").result_rows[0][0]),
        ]
    finally:
        client.close()
    return min((time_us for time_us in first if time_us), default=0), max(newest)


def _session(row: Any) -> Session:
    return Session(
        id=row["id"],
        clock=row["clock"],
        as_of_us=row["as_of_us"],
        until_us=row["until_us"],
        started_us=row["started_us"],
        pinned_us=row["pinned_us"],
        speed=row["speed"],
        stopped=row["stopped_at"] is not None,
    )


def _us(moment: datetime) -> int:
    return round(moment.timestamp() * 1_000_000)
