"""How a series that stands behind its tail gets there: from ClickHouse, from the topic, from the tail's ring, in small steps.

The last step ends where the tail stands, in the same step of the event loop: whoever called may join the tail at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Final

from api.cursors import NOTHING_DUE, LiveCursor
from api.deps import FrameSource, Record, StreamLimits
from api.errors import PositionLostError, StoreUnavailableError
from api.live.client import Subscription
from api.live.knowledge import Knowledge
from api.live.series import Series
from api.live.tail import Tail

_CHUNK_RECORDS: Final = 32
"""Records decoded in one step of the event loop while catching up: about 2 ms, so others wait no longer than that."""
_HISTORY_ROWS: Final = 500


class CatchUp:
    """Feeds series up to their tails.

    Args:
        source: Kafka, for what the ring does not hold.
        knowledge: ClickHouse, for rows only it can judge and for what a page left out.
        limits: bounds.
    """

    def __init__(self, source: FrameSource, knowledge: Knowledge, limits: StreamLimits) -> None:
        self._source = source
        self._knowledge = knowledge
        self._limits = limits

    async def page(self, series: Series, subscription: Subscription, cursor: LiveCursor) -> None:
        """Push what ClickHouse holds after the end of a page."""
        limit = self._limits.max_resume_rows
        rows = await self._knowledge.after(series.key, cursor.floor_key, cursor.until_us, cursor.offset, limit + 1)
        if len(rows) > limit:
            raise PositionLostError(series.key.channel, cursor.partition, cursor.offset)
        for first in range(0, len(rows), _HISTORY_ROWS):
            part = rows[first : first + _HISTORY_ROWS]
            done = first + _HISTORY_ROWS >= len(rows)
            subscription.push(series.history([text for _, text in part], replace(cursor, floor_key=NOTHING_DUE if done else part[-1][0])))
            await subscription.client.drained()

    async def run(self, series: Series, tail: Tail, subscription: Subscription | None = None) -> None:
        """Feed ``series`` until it stands where ``tail`` stands; in step with the reader of ``subscription``.

        Raises PositionLostError, StoreUnavailableError; then the series stands somewhere in between, whole.
        """
        await self.began(tail)
        wanted = {series.key.instrument: {series.key.timeframe_s: series}}
        while series.position.offset < tail.next_offset:
            if series.position.offset >= tail.ring_start:
                records: Sequence[Record] = tail.ring_from(series.position.offset)
                for first in range(0, len(records), _CHUNK_RECORDS):
                    await self._feed_chunk(tail, series, wanted, records[first : first + _CHUNK_RECORDS])
                    if first + _CHUNK_RECORDS < len(records):
                        await self._pause(subscription)
                continue
            before = series.position.offset
            async with aclosing(self._source.read(tail.topic, tail.partition, before, tail.ring_start)) as batches:
                async for batch in batches:
                    for first in range(0, len(batch), _CHUNK_RECORDS):
                        await self._feed_chunk(tail, series, wanted, batch[first : first + _CHUNK_RECORDS])
                        await self._pause(subscription)
            if series.position.offset == before:
                raise StoreUnavailableError("kafka", f"Kafka gave no record of topic '{tail.topic}' from offset {before} on.")

    async def _feed_chunk(self, tail: Tail, series: Series, wanted: dict[str, dict[int, Series]], records: Sequence[Record]) -> None:
        """Feed some records; waits only where ClickHouse must be asked about re-sent rows."""
        for record in records:
            stuck = tail.feed(record, wanted)
            if stuck:
                keys = stuck[0][1]
                series.learn(record.offset, keys, await self._knowledge.known(series.key, keys, record.offset))
                tail.feed(record, wanted)
            series.advance(record.offset + 1)

    async def _pause(self, subscription: Subscription | None) -> None:
        await asyncio.sleep(0)
        if subscription is not None:
            await subscription.client.drained()

    async def began(self, tail: Tail) -> None:
        """Return when ``tail`` has begun. Raises StoreUnavailableError when that takes too long."""
        if tail.next_offset >= 0:
            return
        try:
            async with asyncio.timeout(self._limits.begin_timeout_s):
                await tail.begun.wait()
        except TimeoutError:
            raise StoreUnavailableError("kafka", f"Kafka does not answer: the tail of topic '{tail.topic}' has not begun.") from None
