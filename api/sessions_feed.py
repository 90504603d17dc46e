"""The stream of a session: stored rows out of ClickHouse, one series for one client, each at its virtual time.

A feed sends a snapshot as of the virtual now, then every row as it appears, in the envelope of the live stream, each record of the topic as
one message (two where it holds both first publications and revisions), and ``end`` when nothing more will come. It reads ahead at most
``_READ_ROWS`` rows: they are fixed, so reading them early changes nothing. All of it follows from the session alone: two feeds send the same
messages with the same cursors.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import groupby
from typing import Final, NamedTuple

from api.cursors import LiveCursor, Position
from api.deps import StreamLimits
from api.history import History
from api.live.client import Subscription
from api.live.requests import Refused
from api.live.series import Message, SeriesKey
from api.queries import Page
from api.sessions import KNOWN, Session, Sessions
from api.sessions_queries import Place, place_of, rows_after, session_cursor

_READ_ROWS: Final = 5_000
"""Rows of one read: 1.5 MB of bars; a read of so many takes 20 ms."""
_FIRST_WINDOW_US: Final = 60_000_000
_LOOK_S: Final = 2.0
"""A feed that waits looks this often whether its session was stopped."""
_LEAST_WAIT_S: Final = 0.001
"""Nothing is sent before its time; sleeping for less than this takes longer."""
_EVERYTHING: Final = 2**62


class AppearingRow(NamedTuple):
    """One stored row and when it appears."""

    appear_us: int
    tie: int
    revision: int
    text: bytes
    """Its JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    """What a subscription of a session begins with."""

    session: Session
    place: Place
    snapshot: bool


class SessionFeeds:
    """Makes feeds; one per process.

    Args:
        sessions: of the time machine, with the clock that paces them.
        history: ClickHouse.
        partition: of a series.
        limits: bounds of the stream.
    """

    def __init__(self, sessions: Sessions, history: History, partition: Callable[[SeriesKey], int], limits: StreamLimits) -> None:
        self._sessions = sessions
        self._history = history
        self._partition = partition
        self._limits = limits

    async def open(self, name: str, key: SeriesKey, cursor: LiveCursor | None) -> _Opened:
        """Check the session and the cursor. Raises Problem, Refused ``cursor_mismatch``, StoreUnavailableError."""
        session = await self._sessions.find(name)
        if cursor is None:
            return _Opened(session=session, place=Place(session.begin_us(self._sessions.clock.now_us()) + 1), snapshot=True)
        place = place_of(session, cursor)
        if place is None:
            raise Refused("cursor_mismatch", f"The cursor is none of session '{name}': subscribe without a cursor.")
        return _Opened(session=session, place=place, snapshot=False)

    async def run(self, opened: _Opened, subscription: Subscription) -> None:
        """Send to ``subscription`` until the session has nothing more; then say so and return. Raises Problem, StoreUnavailableError."""
        session, place, key = opened.session, opened.place, subscription.key
        if opened.snapshot:
            await self._snapshot(session, place, subscription)
        async with aclosing(self._groups(session, key, place)) as groups:
            async for group in groups:
                if not await self._until(session, group[0].appear_us, subscription, place):
                    return
                for kind, rows in groupby(group[_done(place, group[0]) :], key=_kind(session)):
                    place = await self._send(session, subscription, kind, list(rows), group, place)
        if await self._until(session, session.until_us, subscription, place):
            self._push(session, subscription, "end", b'{"time_us":%d}' % session.until_us, Place(session.until_us + 1))

    # -- reading

    async def _snapshot(self, session: Session, place: Place, subscription: Subscription) -> None:
        key, now_us = subscription.key, place.appear_us - 1
        body = b""
        if subscription.limit:
            page = Page(
                key=key,
                start_us=-_EVERYTHING,
                end_us=session.end_us(key, now_us),
                before=_EVERYTHING,
                backward=True,
                beyond=None,
                limit=subscription.limit,
                known_at_us=session.known_at_us(now_us),
            )
            body = (await self._history.json_rows(page)).body
        self._push(session, subscription, "snapshot", b"[%b]" % body, place)

    async def _groups(self, session: Session, key: SeriesKey, place: Place) -> AsyncGenerator[Sequence[AppearingRow], None]:
        """Rows of one place each, in order, from ``place`` on, to the end of the session."""
        window_us, limit = _FIRST_WINDOW_US, _READ_ROWS
        while place.appear_us <= session.until_us:
            stop_us = min(place.appear_us + window_us, session.until_us + 1)
            rows = await self._read(session, key, place, stop_us, limit)
            whole = len(rows) < limit
            groups = [list(group) for _, group in groupby(rows, key=_place_key)]
            if not whole:
                groups.pop()  # its rest was cut off
                if not groups:
                    limit *= 4
                    continue
                window_us = max(window_us // 2, 1_000)
            limit = _READ_ROWS
            for group in groups:
                yield group
                place = Place(group[0].appear_us, group[0].tie + 1)
            if whole:
                place = Place(stop_us)
                if len(rows) < _READ_ROWS // 4:
                    window_us *= 4

    async def _read(self, session: Session, key: SeriesKey, place: Place, stop_us: int, limit: int) -> list[AppearingRow]:
        body = await self._history.fetch(rows_after(session, key, place._replace(row=0), stop_us, limit), "JSONEachRow")
        return [_row(line) for line in body.splitlines()]

    # -- sending

    async def _until(self, session: Session, due_us: int, subscription: Subscription, place: Place) -> bool:
        """Return when the virtual now is ``due_us``; False when the subscription ended. Tells a silent client that all is well."""
        clock = self._sessions.clock
        silent_s = 0.0
        while not subscription.closed:
            await self._sessions.find(session.id)  # also where nothing is waited for: a session that was stopped has nothing more to say
            wait_s = session.wait_s(due_us, clock.now_us())
            if not wait_s:
                return True
            nap_s = min(max(wait_s, _LEAST_WAIT_S), _LOOK_S)
            await clock.sleep(nap_s)
            silent_s += nap_s
            if silent_s >= self._limits.heartbeat_s:
                silent_s = 0.0
                now_us = session.now_us(clock.now_us())
                self._push(session, subscription, "heartbeat", b'{"time_us":%d}' % now_us, place)
        return False

    async def _send(
        self, session: Session, subscription: Subscription, kind: str, rows: list[AppearingRow], group: Sequence[AppearingRow], place: Place
    ) -> Place:
        first = group[0]
        done = _done(place, first) + len(rows)
        place = Place(first.appear_us, first.tie, done) if done < len(group) else Place(first.appear_us, first.tie + 1)
        self._push(session, subscription, kind, b"[%b]" % b",".join(row.text for row in rows), place)
        await subscription.client.drained()
        return place

    def _push(self, session: Session, subscription: Subscription, kind: str, data: bytes, place: Place) -> None:
        cursor = session_cursor(session, subscription.key, self._partition(subscription.key), place)
        tail = b',"cursor":"%b","type":"%b","data":%b}' % (cursor.encode(), kind.encode(), data)
        position = Position(place.tie, place.row)
        subscription.push(Message(position, position, tail, cursor, kind))


def _done(place: Place, first: AppearingRow) -> int:
    """Rows of the group that begins with ``first`` that were sent already."""
    return place.row if (place.appear_us, place.tie) == (first.appear_us, first.tie) else 0


def _place_key(row: AppearingRow) -> tuple[int, int]:
    return row.appear_us, row.tie


def _kind(session: Session) -> Callable[[AppearingRow], str]:
    """What a row is to its reader; a session of the ``market`` clock sees each bar once, so nothing is a correction."""
    if session.clock == KNOWN:
        return lambda row: "corrected" if row.revision else "update"
    return lambda row: "update"


def _row(line: bytes) -> AppearingRow:
    """A row of ``rows_after``: the three numbers before the fields clients see are cut off."""
    appear, tie, revision, rest = line.split(b",", 3)
    return AppearingRow(_number(appear), _number(tie), _number(revision), b"{" + rest)


def _number(field: bytes) -> int:
    return int(field.partition(b":")[2])
