"""`marketstream tail trades|bars --session`: rows of every symbol as a session sees them appear, read from ClickHouse at the session's pace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from api.sessions import KNOWN, Session
from infra.cli.context import settings_of
from infra.cli.output import Output
from infra.cli.rows import Row, columns_of
from infra.cli.tail import Printer
from infra.cli.where import compile_where
from infra.clickhouse.client import connect
from infra.errors import SettingsError, UnreachableError
from infra.seam import SystemClock
from infra.sessions import find_session
from infra.settings import Settings
from schemas.seam import Clock
from schemas.symbols import SIDE_NAMES
from schemas.timeframes import NAME_BY_SECONDS
from schemas.topics import topic as topic_of

TOPICS: Final = ("trades", "bars")
_POLL_S: Final = 0.25
_LOOK_US: Final = 2_000_000
"""It is asked so often whether the session was stopped."""
_READ_ROWS: Final = 20_000
_DAY_US: Final = 86_400_000_000
"""Length of the longest bars: so long before it appears a bar may open."""
_Place = tuple[int, int, str, str, int, int]
"""Virtual time, tie, exchange, symbol, key and timeframe of the row before."""


def tail(output: Output, *, data_dir: Path | None, topic: str, session: str, where: str | None, limit: int | None, follow: bool) -> None:
    """Show rows from the virtual now on (at speed max: from the session's beginning), until its end, ``limit`` or Ctrl-C.

    Without ``follow`` it stops at the virtual now: then it shows what appeared since the session's beginning.
    Raises SettingsError for another topic, an unknown session and one that is stopped meanwhile; UnreachableError.
    """
    if topic not in TOPICS:
        raise SettingsError(f"A session shows {' and '.join(TOPICS)}, not '{topic}': leave --session out.")
    columns = columns_of(topic_of(topic))
    test = compile_where(where, columns) if where else None
    asyncio.run(_show(output, settings_of(data_dir), topic, session, Printer(output, columns), test, limit, follow))


async def _show(
    output: Output, settings: Settings, topic: str, name: str, shell: Printer, test: Any, limit: int | None, follow: bool
) -> None:
    count = 0
    session = await find_session(settings, name)
    async for row in _rows(settings, topic, session, SystemClock(), follow):
        if test is None or test(row):
            shell.show(row)
            count += 1
            if count == limit:
                break
    shell.end(count)


async def _rows(settings: Settings, topic: str, session: Session, clock: Clock, follow: bool) -> AsyncIterator[Row]:
    """Rows in the order in which they appear, each when the virtual now has come to it."""
    client = connect(settings.clickhouse)
    asked_us = clock.monotonic_us()
    place: _Place = (session.begin_us(clock.now_us()) if follow else session.as_of_us, 0, "", "", 0, 0)
    try:
        while True:
            if clock.monotonic_us() - asked_us > _LOOK_US:
                asked_us = clock.monotonic_us()
                with suppress(UnreachableError):  # it is asked again
                    await find_session(settings, session.id)
            now_us = session.now_us(clock.now_us())
            rows = await asyncio.to_thread(_read, client, topic, session, place, now_us)
            for row in rows:
                place = (row.pop("a_us"), row.pop("t_at"), row["exchange"], row["symbol"], row.pop("k_id"), row.pop("f_s"))
                yield row
            if len(rows) == _READ_ROWS:
                continue
            if now_us >= session.until_us or not follow:
                return
            await clock.sleep(_POLL_S)
    finally:
        client.close()


def _read(client: Any, topic: str, session: Session, after: _Place, now_us: int) -> list[Row]:
    """Rows that appear after a place and until ``now_us``, of all symbols."""
    is_bars = topic == "bars"
    time, key, frame = ("open_time_us", "open_time_us", "timeframe_s") if is_bars else ("exchange_time_us", "trade_id", "toInt32(0)")
    parameters: dict[str, Any] = dict(zip("ateskf", after, strict=True)) | {"now": now_us, "known": session.known_at_us(now_us)}
    names = [name for name in columns_of(topic_of(topic)) if name not in ("partition", "offset", "timeframe")]
    listed = ", ".join([*names, "timeframe_s"] if is_bars else names)
    tie = "toInt64(kafka_offset)" if session.clock == KNOWN else "toInt64(0)"
    appear = f"greatest(known_at_us, {time})" if session.clock == KNOWN else "close_time_us" if is_bars else time
    if is_bars and session.clock == KNOWN:  # a release that did not note the time published a bar no sooner than it closed
        appear = f"if(known_at_us > 0, {appear}, close_time_us)"
    select = f"SELECT {appear} AS a_us, {tie} AS t_at, {key} AS k_id, {frame} AS f_s, {listed}, kafka_partition, kafka_offset FROM {topic}"
    select += " WHERE known_at_us <= {known:Int64}"
    if session.clock == KNOWN:
        # two disjoint reads, each cut short by an index of its own, as in api.sessions_queries
        first = f"{{a:Int64}} - {_DAY_US if is_bars else 0}"
        inner = f"{select} AND known_at_us >= {{a:Int64}} UNION ALL {select} AND known_at_us < {{a:Int64}} AND {time} >= {first}"
    elif is_bars:
        reach = f"{select} AND open_time_us >= {{a:Int64}} - {_DAY_US}"
        inner = f"{reach} ORDER BY revision DESC, kafka_offset DESC LIMIT 1 BY exchange, symbol, timeframe_s, open_time_us"
    else:
        inner = f"{select} AND exchange_time_us >= {{a:Int64}}"
    sql = (
        f"SELECT * FROM ({inner}) WHERE a_us <= {{now:Int64}}"
        " AND (a_us, t_at, exchange, symbol, k_id, f_s) > ({a:Int64}, {t:Int64}, {e:String}, {s:String}, {k:Int64}, {f:Int32})"
        f" ORDER BY a_us, t_at, exchange, symbol, k_id, f_s LIMIT {_READ_ROWS}"
    )
    return [_shown(row) for row in client.query(sql, parameters=parameters).named_results()]


def _shown(row: Row) -> Row:
    """A stored row as ``tail`` shows a row of the topic."""
    found = dict(row)
    if "side" in found:
        found["side"] = SIDE_NAMES.get(found["side"], str(found["side"]))
    if "timeframe_s" in found:
        seconds = found.pop("timeframe_s")
        found["timeframe"] = NAME_BY_SECONDS.get(seconds, f"{seconds}s")
    found["partition"], found["offset"] = found.pop("kafka_partition"), found.pop("kafka_offset")
    return found
