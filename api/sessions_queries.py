"""SQL of sessions: rows of one series in the order in which they appear in a session. No I/O."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from api.cursors import NOTHING_DUE, LiveCursor
from api.live.series import SeriesKey
from api.queries import JSON_SETTINGS, Query, series_where
from api.rows import COLUMNS, KEY, SELECT, TIME
from api.sessions import KNOWN, Session

_US: Final = 1_000_000


class Place(NamedTuple):
    """How far a reader of a session is: everything before was read."""

    appear_us: int
    """Virtual time of the next rows, at the earliest."""
    tie: int = 0
    """Among rows of that time: the offset of their record (``known``), 0 (``market``)."""
    row: int = 0
    """Rows read already of those with both."""


def session_cursor(session: Session, key: SeriesKey, partition: int, place: Place) -> str:
    """The text of a place: a stream cursor whose epoch is the session's."""
    return LiveCursor(
        topic=key.channel,
        partition=partition,
        offset=place.tie,
        row=place.row,
        epoch=session.epoch,
        floor_key=NOTHING_DUE,
        until_us=place.appear_us,
    ).encode()


def place_of(session: Session, cursor: LiveCursor) -> Place | None:
    """The place a cursor names; None when it is of another session or of the live stream."""
    return Place(cursor.until_us, cursor.offset, cursor.row) if cursor.epoch == session.epoch else None


def rows_after(session: Session, key: SeriesKey, place: Place, stop_us: int, limit: int) -> Query:
    """Rows that appear from ``place`` on and before ``stop_us``, in order; each begins with the fields ``a`` (virtual time), ``t`` and ``r``.

    ``place.row`` rows of the first place are among them. Of the ``market`` clock each bar is there once, in its newest revision.
    """
    parameters: dict[str, Any] = {"from": place.appear_us, "tie": place.tie, "stop": stop_us, "limit": limit, "known": session.pinned_us}
    inner, more = (_known if session.clock == KNOWN else _market)(key, place.appear_us, stop_us)
    parameters |= more
    order = "WHERE a < {stop:Int64} AND (a > {from:Int64} OR (a = {from:Int64} AND t >= {tie:Int64})) "
    order += f"ORDER BY a, t, {KEY[key.channel]} LIMIT {{limit:UInt64}} SETTINGS {JSON_SETTINGS}"
    return f"SELECT a, t, r, {SELECT[key.channel]} FROM ({inner}) {order}", parameters


def _known(key: SeriesKey, from_us: int, stop_us: int) -> Query:
    """Rows that may appear in a window by when they were known: two disjoint reads, each cut short by an index of its own.

    Rows known in the window, whatever their time; and rows known before it whose own time lies in it: a venue's clock that is ahead, or a
    release that did not note when it published. One condition for both would read half the series: 1,056 granules instead of 2.
    """
    channel, time = key.channel, TIME[key.channel]
    appear = f"greatest(known_at_us, {time})"
    if key.timeframe_s:  # such a release published a bar no sooner than it closed
        appear = f"if(known_at_us > 0, {appear}, close_time_us)"
    where, parameters = series_where(key)
    where += f" AND known_at_us <= {{known:Int64}} AND {time} < {{stop:Int64}}"
    select = f"SELECT {appear} AS a, toInt64(kafka_offset) AS t, {_revision(key)} AS r, {COLUMNS[channel]} FROM {channel} WHERE {where}"
    known = f"{select} AND known_at_us >= {{from:Int64}} AND known_at_us < {{stop:Int64}}"
    ahead = f"{select} AND known_at_us < {{from:Int64}} AND {time} >= {{first:Int64}}"
    return f"{known} UNION ALL {ahead}", parameters | {"first": from_us - key.timeframe_s * _US}


def _market(key: SeriesKey, from_us: int, stop_us: int) -> Query:
    """Rows that happened in a window, bars by their close, each in its newest revision."""
    channel, name, time = key.channel, KEY[key.channel], TIME[key.channel]
    width_us = key.timeframe_s * _US
    where, parameters = series_where(key)
    where += f" AND known_at_us <= {{known:Int64}} AND {time} >= {{first:Int64}} AND {time} < {{last:Int64}}"
    appear = "close_time_us" if width_us else time
    distinct = f"ORDER BY {name}, revision DESC, kafka_offset DESC LIMIT 1 BY {name}" if width_us else ""  # as api.queries pages
    sql = f"SELECT {appear} AS a, toInt64(0) AS t, {_revision(key)} AS r, {COLUMNS[channel]} FROM {channel} WHERE {where} {distinct}"
    return sql, parameters | {"first": from_us - width_us, "last": stop_us - width_us}


def _revision(key: SeriesKey) -> str:
    return "revision" if key.timeframe_s else "0"


def traded_until(session: Session, now_us: int) -> Query:
    """Per instrument: first and last trade time and count of what a session sees of its trades at a virtual now."""
    parameters: dict[str, Any] = {"known": session.known_at_us(now_us), "now": now_us}
    return (
        "SELECT exchange, symbol, min(exchange_time_us) AS first_trade_time_us, max(exchange_time_us) AS last_trade_time_us,"
        " count() AS trade_count FROM trades WHERE known_at_us <= {known:Int64} AND exchange_time_us <= {now:Int64}"
        f" GROUP BY exchange, symbol ORDER BY exchange, symbol SETTINGS {JSON_SETTINGS}",
        parameters,
    )
