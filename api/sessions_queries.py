"""SQL of sessions: rows of one series in the order in which they appear in a session. No I/O."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from api.cursors import NOTHING_DUE, LiveCursor
from api.live.series import SeriesKey
from api.queries import JSON_SETTINGS, Query, series_where
from api.rows import COLUMNS, KEY, SELECT, TIME
from api.sessions import KNOWN, Session

_DAY_US: Final = 86_400_000_000
"""Trades are never accepted further ahead of the time they were received than this (``BarConfig.max_future_us``)."""
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
    channel = key.channel
    where, parameters = series_where(key)
    name, time = KEY[channel], TIME[channel]
    parameters |= {"from": place.appear_us, "tie": place.tie, "stop": stop_us, "limit": limit, "known": session.pinned_us}
    where += " AND known_at_us <= {known:Int64}"
    if session.clock == KNOWN:
        appear, tie = _known_time(channel), "kafka_offset"
        where += f" AND (known_at_us >= {{early:Int64}} OR known_at_us = 0) AND known_at_us < {{stop:Int64}} AND {time} < {{stop:Int64}}"
        parameters["early"] = place.appear_us - _DAY_US
        distinct = ""
    else:
        width_us = key.timeframe_s * _US
        appear, tie = ("close_time_us" if width_us else time), "0"
        where += f" AND {time} >= {{first:Int64}} AND {time} < {{last:Int64}}"
        parameters |= {"first": place.appear_us - width_us, "last": stop_us - width_us}
        distinct = f"ORDER BY {name}, revision DESC LIMIT 1 BY {name}" if width_us else ""
    revision = "revision" if key.timeframe_s else "0"
    inner = f"SELECT {appear} AS a, toInt64({tie}) AS t, {revision} AS r, {COLUMNS[channel]} FROM {channel} WHERE {where} {distinct}"
    order = f"WHERE a < {{stop:Int64}} AND (a > {{from:Int64}} OR (a = {{from:Int64}} AND t >= {{tie:Int64}})) ORDER BY a, t, {name}"
    return f"SELECT a, t, r, {SELECT[channel]} FROM ({inner}) {order} LIMIT {{limit:UInt64}} SETTINGS {JSON_SETTINGS}", parameters


def traded_until(session: Session, now_us: int) -> Query:
    """Per instrument: first and last trade time and count of what a session sees of its trades at a virtual now."""
    parameters: dict[str, Any] = {"known": session.known_at_us(now_us), "now": now_us}
    return (
        "SELECT exchange, symbol, min(exchange_time_us) AS first_trade_time_us, max(exchange_time_us) AS last_trade_time_us,"
        " count() AS trade_count FROM trades WHERE known_at_us <= {known:Int64} AND exchange_time_us <= {now:Int64}"
        f" GROUP BY exchange, symbol ORDER BY exchange, symbol SETTINGS {JSON_SETTINGS}",
        parameters,
    )


def _known_time(channel: str) -> str:
    """When a row appears in a session of the ``known`` clock; rows of a release that did not note it appear when they were complete."""
    if channel == "bars":
        return "if(known_at_us > 0, greatest(known_at_us, open_time_us), close_time_us)"
    return "greatest(known_at_us, exchange_time_us)"
