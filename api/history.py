"""Answers from ClickHouse: a page of bars or trades in, bytes and cursors out; and what the live tail asks of history.

JSON rows are written by ClickHouse itself and passed on, so a row costs nothing here. A page says where the next page begins and from where
the live stream continues it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import msgspec

from api import queries
from api.deps import ApiLimits, HistoryStore
from api.errors import Problem, StoreUnavailableError
from api.live.filters import Shown
from api.live.series import Seed, SeriesKey
from api.queries import Page, Query
from api.rows import KEY
from schemas.partitions import partition_of
from schemas.seam import Clock

_T = TypeVar("_T")
_US: Final = 1_000_000
_DENSITY: Final = 4
"""A window of four times the bars asked for holds them, unless the market stood still; then the whole range is read."""


class _Key(msgspec.Struct):
    open_time_us: int = 0
    trade_id: int = 0
    revision: int = 0


_keys: Final = msgspec.json.Decoder(_Key)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """One page of JSON rows."""

    body: bytes
    """Rows joined by commas."""
    count: int
    edge: int | None
    """Key of the outermost row in reading direction; None on an empty page."""
    more: bool
    """Whether another page follows."""


class History:
    """ClickHouse as the routes and the live tail see it: bounded in queries at a time, each with a deadline.

    Args:
        store: ClickHouse.
        clock: for the age of cached positions.
        partitions: of each topic.
        limits: bounds.
    """

    def __init__(self, store: HistoryStore, clock: Clock, partitions: int, limits: ApiLimits) -> None:
        self.store = store
        self._clock = clock
        self._partitions = partitions
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.max_concurrent_queries)
        self._waiting = 0
        self._applied: dict[tuple[str, int], tuple[int, int]] = {}
        self._newest: dict[tuple[str, int], int] = {}
        self._asking: dict[tuple[str, int], asyncio.Future[int]] = {}

    async def fetch(self, query: Query, fmt: str) -> bytes:
        """The answer of ``query``.

        Raises StoreUnavailableError; Problem ``timeout`` when it takes too long, ``too_many_requests`` when too many wait already.
        """
        if self._waiting >= self._limits.max_waiting_queries:
            raise Problem("too_many_requests", f"{self._waiting} queries wait for ClickHouse already: try again later.", retry_after_s=1)
        self._waiting += 1
        try:
            async with asyncio.timeout(self._limits.request_timeout_s), self._slots:
                return await self.store.fetch(query[0], query[1], fmt)
        except TimeoutError:
            raise Problem(
                "timeout", f"ClickHouse took longer than {self._limits.request_timeout_s:g} s: ask for a shorter range."
            ) from None
        finally:
            self._waiting -= 1

    # -- pages

    async def before(self, key: SeriesKey) -> int:
        """Offset before which every record of the series' partition is stored; positions are read at most every ``cache_ttl_s``."""
        place = (key.channel, partition_of(key.instrument, self._partitions))
        cached = self._applied.get(place)
        if cached is not None and self._clock.monotonic_us() - cached[1] <= self._limits.cache_ttl_s * _US:
            return cached[0]
        asking = self._asking.get(place)
        if asking is None:  # a thousand subscriptions at once ask once, and share its failure too
            asking = self._asking[place] = asyncio.ensure_future(self._stored(*place))
            asking.add_done_callback(lambda done: (self._asking.pop(place, None), done.cancelled() or done.exception()))
        return await asyncio.shield(asking)

    async def _stored(self, channel: str, partition: int) -> int:
        """Offset after the newest record stored."""
        last = self._newest.get((channel, partition), 0)
        text = await self.fetch(queries.applied(channel, partition, last), "TSV")
        if not text.strip() and last:  # the table was emptied
            text = await self.fetch(queries.applied(channel, partition, 0), "TSV")
        newest = int(text) if text.strip() else -1
        self._newest[(channel, partition)] = max(newest, 0)
        self._applied[(channel, partition)] = (newest + 1, self._clock.monotonic_us())
        return newest + 1

    async def json_rows(self, page: Page) -> Rows:
        """The page's rows as JSON."""
        window = self._window(page)
        body = await self.fetch(queries.page_rows(window), "JSONEachRow")
        if window is not page and body.count(b"\n") <= page.limit:
            body = await self.fetch(queries.page_rows(page), "JSONEachRow")
        lines = body.count(b"\n")
        more = lines > page.limit
        if more and page.backward:
            body = body[body.index(b"\n") + 1 :]
        elif more:
            body = body[: body.rindex(b"\n", 0, -1) + 1]
        if not body:
            return Rows(body=b"", count=0, edge=None, more=False)
        outer = body[: body.index(b"\n")] if page.backward else body[body.rfind(b"\n", 0, -1) + 1 :]
        edge = int(getattr(_keys.decode(outer), KEY[page.key.channel]))
        return Rows(body=body[:-1].replace(b"\n", b","), count=lines - more, edge=edge, more=more)

    async def edge(self, page: Page) -> tuple[int, int | None, bool]:
        """(rows, key of the outermost row, whether another page follows) of a page that is streamed."""
        key, rows, seen = (int(part) for part in (await self.fetch(queries.page_edge(page), "TSV")).split())
        return rows, key if rows else None, seen > page.limit

    def _window(self, page: Page) -> Page:
        """The part of the range where the page's bars stand, as bars have no holes; the page itself for trades and short ranges."""
        if not page.key.timeframe_s:
            return page
        span = _DENSITY * (page.limit + 1) * page.key.timeframe_s * _US
        if page.end_us - page.start_us <= 2 * span:
            return page
        if page.backward:
            newest = min(page.end_us, self._clock.now_us() + page.key.timeframe_s * _US, page.beyond or page.end_us)
            return replace(page, start_us=max(page.start_us, newest - span))
        oldest = max(page.start_us, page.beyond or page.start_us)
        return replace(page, end_us=min(page.end_us, oldest + span))

    # -- for the live tail (api.live.knowledge.Knowledge)

    async def seed(self, key: SeriesKey, before: int | None, rows: int) -> Seed:
        """See Knowledge.seed."""
        stored = await self._translated(self.before(key))  # an older position only means that a few more records are read from the topic
        offset = stored if before is None else min(before, stored)
        page = Page(key=key, start_us=-(2**62), end_us=2**62, before=offset, backward=True, beyond=None, limit=rows)
        found = await self._translated(self.json_rows(page))
        listed: list[tuple[int, int, str]] = []
        for line in _split(found.body):
            row = _keys.decode(line)
            listed.append((row.open_time_us or row.trade_id, row.revision, line.decode()))
        return Seed(offset, listed, not found.more)

    async def known(self, key: SeriesKey, keys: Sequence[int], before: int) -> dict[int, Shown]:
        """See Knowledge.known."""
        answer = await self._translated(self.fetch(queries.known_keys(key, keys, before), "TSV"))
        found = ([int(part) for part in line.split(b"\t")] for line in answer.splitlines())
        return {one: Shown(revision, input_offset, bool(repaired)) for one, revision, input_offset, repaired in found}

    async def after(self, key: SeriesKey, floor_key: int, until_us: int, before: int, limit: int) -> list[tuple[int, str]]:
        """See Knowledge.after."""
        body = await self._translated(self.fetch(queries.due_rows(key, floor_key, until_us, before, limit), "JSONEachRow"))
        found = []
        for line in body.splitlines():
            row = _keys.decode(line)
            found.append((row.open_time_us or row.trade_id, line.decode()))
        return found

    async def _translated(self, work: Awaitable[_T]) -> _T:
        """The tail knows one way to fail."""
        try:
            return await work
        except Problem as exc:
            raise StoreUnavailableError("clickhouse", exc.detail) from exc


def _split(body: bytes) -> list[bytes]:
    """The objects of rows joined by commas."""
    return [b"{" + part.lstrip(b"{").rstrip(b"}") + b"}" for part in body.split(b"},{")] if body else []
