"""``GET /api/v1/bars/{exchange}/{symbol}`` and ``/api/v1/trades/...``: a range of history, with the cursors that continue it.

A page is read from one state of the store. ``next`` leads to the next page of the same state, ``live`` continues the page on the stream.
With ``known_at`` a page shows what was known then; the stream continues the present, so such a page has no ``live``. With ``session`` it shows
what the session may see at its virtual now, and ``live`` continues it on the stream of that session.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, Final
from urllib.parse import quote

import msgspec

from api import queries
from api.catalogue import Catalogue
from api.cursors import LEAST, NOTHING_DUE, LiveCursor, PageCursor, series_code
from api.deps import ApiLimits
from api.errors import StoreUnavailableError
from api.history import History
from api.http import Answer, Header, Scope, StreamedAnswer, header
from api.live.series import SeriesKey
from api.params import MEDIA_TYPES, Range, parse_range
from api.queries import Page
from api.sessions import Session, Sessions
from api.sessions_queries import Place, session_cursor
from schemas.timeframes import timeframe_name

_FORMATS: Final = {"arrow": "ArrowStream", "csv": "CSVWithNames"}
_BEFORE_ALL: Final = -(2**63)


class HistoryRoute:
    """Answers one of the two history resources.

    Args:
        channel: ``bars`` or ``trades``.
        history: ClickHouse.
        catalogue: known instruments.
        epoch: incarnation of a topic; raises StoreUnavailableError while Kafka has not been reached.
        partition: of a series.
        sessions: of the time machine.
        limits: bounds.
    """

    def __init__(
        self,
        channel: str,
        history: History,
        catalogue: Catalogue,
        epoch: Callable[[str], int],
        partition: Callable[[SeriesKey], int],
        sessions: Sessions,
        limits: ApiLimits,
    ) -> None:
        self._channel = channel
        self._history = history
        self._catalogue = catalogue
        self._epoch = epoch
        self._partition = partition
        self._sessions = sessions
        self._limits = limits

    async def __call__(self, scope: Scope) -> Answer | StreamedAnswer:
        """The page a request asks for. Raises Problem, StoreUnavailableError."""
        names = scope["path_params"]
        exchange, symbol = names["exchange"], names["symbol"]
        asked = parse_range(self._channel, exchange, symbol, scope["query_string"], header(scope, b"accept"), self._limits)
        await self._catalogue.check(exchange, symbol)
        session: Session | None = None
        if asked.session is not None:
            session = await self._sessions.find(asked.session)
            asked = session.narrow(asked, self._sessions.clock.now_us())
        page = await self._page(asked)
        if asked.format == "json":
            return await self._json(asked, page, session)
        return await self._bulk(asked, page, session)

    async def _page(self, asked: Range) -> Page:
        if asked.cursor is not None:
            before, backward, beyond = asked.cursor.snapshot_offset, asked.cursor.backward, asked.cursor.last
        else:
            before, backward, beyond = await self._history.before(asked.key), asked.open_start, None
        return Page(
            key=asked.key,
            start_us=asked.start_us,
            end_us=asked.end_us,
            before=before,
            backward=backward,
            beyond=beyond,
            limit=asked.limit,
            known_at_us=asked.known_at_us,
        )

    async def _json(self, asked: Range, page: Page, session: Session | None) -> Answer:
        rows = await self._history.json_rows(page)
        following, live = self._cursors(asked, page, rows.edge, rows.more, session)
        head: dict[str, Any] = {"exchange": asked.key.exchange, "symbol": asked.key.symbol}
        if asked.key.timeframe_s:
            head["timeframe"] = timeframe_name(asked.key.timeframe_s)
        if asked.known_at_us is not None:
            head["known_at_us"] = asked.known_at_us
        if session is not None:
            head["session"] = session.id
            if asked.cursor is None and asked.open_end:
                head["now_us"] = session.seen_until_us(asked)
        head |= {"count": rows.count, "next": following, "live": live}
        start = msgspec.json.encode(head)[:-1]
        body = b'%s,"%s":[%s]}' % (start, self._channel.encode(), rows.body)
        return Answer(body, MEDIA_TYPES["json"], 200, self._headers(asked, following, live))

    async def _bulk(self, asked: Range, page: Page, session: Session | None) -> StreamedAnswer:
        """Arrow or CSV straight from ClickHouse; one small query before says where the page ends."""
        count, edge, more = await self._history.edge(page)
        following, live = self._cursors(asked, page, edge, more, session)
        query = queries.page_rows(replace(page, limit=max(count, 1)), json=False, extra=0)
        store, fmt = self._history.store, _FORMATS[asked.format]

        async def pieces() -> AsyncIterator[bytes]:
            async with store.stream(query[0], query[1], fmt) as found:
                async for piece in found:
                    yield piece

        return StreamedAnswer(pieces, MEDIA_TYPES[asked.format], self._headers(asked, following, live))

    def _cursors(self, asked: Range, page: Page, edge: int | None, more: bool, session: Session | None) -> tuple[str | None, str | None]:
        """(cursor of the next page, cursor of the stream); either None where there is none."""
        key = asked.key
        following = None
        if more and edge is not None:
            following = PageCursor(
                topic=key.channel,
                series=series_code(key.channel, key.exchange, key.symbol, key.timeframe_s),
                backward=page.backward,
                start_us=asked.start_us,
                end_us=asked.end_us,
                snapshot_offset=page.before,
                last=edge,
                known_at_us=asked.known_at_us,
                open_end=session is not None and asked.open_end,
            ).encode()
        if session is not None and asked.open_end and (page.backward or not more):
            # the page runs to the session's virtual now: its stream goes on behind it
            return following, session_cursor(session, key, self._partition(key), Place(session.seen_until_us(asked) + 1))
        if asked.known_at_us is not None:
            return following, None
        try:
            epoch = self._epoch(key.channel)
        except StoreUnavailableError:
            return following, None  # history is worth having without Kafka
        live = LiveCursor(topic=key.channel, partition=self._partition(key), offset=page.before, epoch=epoch)
        if more and edge is not None and not page.backward:
            live = replace(live, floor_key=edge, until_us=LEAST)
        elif not asked.open_end:
            live = replace(live, floor_key=_BEFORE_ALL, until_us=asked.end_us)
        assert live.floor_key <= NOTHING_DUE
        return following, live.encode()

    def _headers(self, asked: Range, following: str | None, live: str | None) -> tuple[Header, ...]:
        found: list[Header] = []
        if live is not None:
            found.append((b"x-live-cursor", live.encode()))
        if following is not None:
            path = f"/api/v1/{self._channel}/{quote(asked.key.exchange)}/{quote(asked.key.symbol)}"
            timeframe = f"timeframe={timeframe_name(asked.key.timeframe_s)}&" if asked.key.timeframe_s else ""
            link = f'<{path}?{timeframe}limit={asked.limit}&format={asked.format}&cursor={following}>; rel="next"'
            found += [(b"link", link.encode()), (b"x-next-cursor", following.encode())]
        return tuple(found)
