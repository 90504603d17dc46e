"""The hub: one tail a partition feeds every subscription of the process, and history joins the tail without a seam.

How the seam closes: ClickHouse says what it holds up to an offset; records from that offset on are read from the topic (or from the tail's
ring) until the reader stands where the tail stands. From there on it is fed with the tail, in the same step of the event loop, so nothing
can fall between. What was seen before is recognised by key, so re-sent rows do not appear twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, Final

import msgspec

from api.cursors import NOTHING_DUE, TOPIC_CODES, LiveCursor, Position, encode_place
from api.deps import FrameSource, Record, StreamLimits
from api.errors import PositionLostError, StoreUnavailableError
from api.live.catchup import CatchUp
from api.live.client import Subscription
from api.live.knowledge import Knowledge
from api.live.series import Series, SeriesKey
from api.live.tail import Tail
from schemas.partitions import partition_of
from schemas.seam import Clock

logger = logging.getLogger(__name__)

CHANNELS: Final = ("bars", "trades")
_RETRY_S: Final = 1.0
_US: Final = 1_000_000


class Hub:
    """Live tails of all partitions and the series that follow them. One per process, on one event loop.

    Args:
        source: Kafka.
        knowledge: ClickHouse, as far as the tail needs it.
        clock: time and sleep.
        partitions: of each topic.
        limits: bounds.
    """

    def __init__(self, source: FrameSource, knowledge: Knowledge, clock: Clock, partitions: int, limits: StreamLimits) -> None:
        self._source = source
        self._knowledge = knowledge
        self._clock = clock
        self._partitions = partitions
        self._limits = limits
        self._tails = {
            (topic, partition): Tail(topic, partition, source.decode, limits.ring_bytes, self._stuck)
            for topic in CHANNELS
            for partition in range(partitions)
        }
        self._catch_up = CatchUp(source, knowledge, limits)
        self._starting: dict[SeriesKey, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscriptions: set[Subscription] = set()

    async def start(self) -> None:
        """Begin to follow the topics."""
        await self._source.start(self._deliver, self._moved)
        self._spawn(self._tick())

    async def stop(self) -> None:
        """End everything the hub runs."""
        await self._source.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- what readers may ask

    def partition(self, key: SeriesKey) -> int:
        """The partition of a series."""
        return partition_of(key.instrument, self._partitions)

    def epoch(self, channel: str) -> int:
        """The topic's incarnation. Raises StoreUnavailableError while the broker has not been reached."""
        epoch = self._source.epoch(channel)
        if epoch is None:
            raise StoreUnavailableError(
                "kafka", f"Kafka has not answered since start, so nothing is known of topic '{channel}': try again."
            )
        return epoch

    async def ready(self, key: SeriesKey) -> None:
        """Return when the tail of the series' partition has begun. Raises StoreUnavailableError when that takes too long."""
        await self._catch_up.began(self._tails[(key.channel, self.partition(key))])

    def lag(self) -> dict[tuple[str, int], float]:
        """Seconds since the newest record of each partition was written, as far as any was read."""
        now_ms = self._clock.now_us() // 1000
        return {place: max(0.0, (now_ms - tail.newest_ms) / 1000) for place, tail in self._tails.items() if tail.newest_ms >= 0}

    def tails(self) -> list[Tail]:
        """Every partition's tail, for metrics."""
        return list(self._tails.values())

    async def subscribe(self, subscription: Subscription, cursor: LiveCursor | None, limit: int) -> None:
        """Deliver to ``subscription`` from now on: first a snapshot of ``limit`` rows or what follows ``cursor``, then live.

        Raises PositionLostError when the topic cannot continue the cursor (subscribe again without one), StoreUnavailableError.
        """
        self._subscriptions.add(subscription)
        if cursor is None:
            await self._subscribe_snapshot(subscription, limit)
        else:
            await self._resume(subscription, cursor)

    def unsubscribe(self, subscription: Subscription) -> None:
        """Deliver to it no longer."""
        subscription.closed = True
        self._subscriptions.discard(subscription)
        series = subscription.series
        if series is not None:
            series.subscribers.discard(subscription)
            series.idle_since_us = self._clock.monotonic_us()

    # -- from Kafka

    def _deliver(self, records: Sequence[Record]) -> None:
        for record in records:
            tail = self._tails.get((record.topic, record.partition))
            if tail is not None and record.offset >= tail.next_offset >= 0:
                tail.take(record)

    def _moved(self, topic: str, partition: int, offset: int) -> None:
        tail = self._tails.get((topic, partition))
        if tail is None:
            return
        first = tail.next_offset < 0
        tail.begin(offset)
        if not first:
            for series in tail.followers():
                tail.unfollow(series)
                self._reset(series, f"the topic went on at offset {offset}")

    # -- subscribing

    async def _subscribe_snapshot(self, subscription: Subscription, limit: int) -> None:
        key = subscription.key
        tail = self._tails[(key.channel, self.partition(key))]
        while (series := tail.follower(key.instrument, key.timeframe_s)) is None:
            await self._start_series(key)
        if subscription.closed:
            return
        series.advance(tail.next_offset)
        subscription.attach(series, Position(-1))
        subscription.push(series.snapshot(limit))

    async def _start_series(self, key: SeriesKey) -> None:
        """A live series for ``key``; callers of the same key wait for the same one."""
        task = self._starting.get(key)
        if task is None:
            task = self._starting[key] = self._spawn(self._open_series(key))
            # asking for the exception says that it was seen, also when everybody who waited has left
            task.add_done_callback(lambda done: (self._starting.pop(key, None), done.cancelled() or done.exception()))
        await asyncio.shield(task)

    async def _open_series(self, key: SeriesKey) -> None:
        series = self._series(key)
        tail = self._tails[(key.channel, self.partition(key))]
        await self._catch_up.began(tail)
        seed = await self._knowledge.seed(key, None, self._limits.snapshot_rows(key.channel))
        behind = tail.ring_start - seed.offset
        if behind > self._limits.max_resume_records:
            raise StoreUnavailableError("clickhouse", f"ClickHouse is {behind:,} records behind topic '{tail.topic}': look at the sink.")
        series.deliver_from = Position(seed.offset)
        series.seed(seed)
        series.idle_since_us = self._clock.monotonic_us()
        try:
            await self._catch_up.run(series, tail)
        except PositionLostError as exc:
            raise StoreUnavailableError("clickhouse", f"ClickHouse lacks rows that Kafka has deleted: {exc}") from exc
        self._join(series)

    async def _resume(self, subscription: Subscription, cursor: LiveCursor) -> None:
        key, place = subscription.key, cursor.position
        if cursor.epoch != self.epoch(key.channel):
            raise PositionLostError(key.channel, cursor.partition, cursor.offset)
        tail = self._tails[(key.channel, cursor.partition)]
        shared = tail.follower(key.instrument, key.timeframe_s)
        if shared is not None and cursor.floor_key == NOTHING_DUE and shared.holds(place):
            shared.advance(tail.next_offset)
            subscription.attach(shared, place)
            for message in shared.replay(place):
                subscription.push(message)
            return
        series = self._series(key)
        seed = await self._knowledge.seed(key, cursor.offset, self._limits.snapshot_rows(key.channel))
        series.deliver_from = place
        series.seed(seed)
        await self._catch_up.began(tail)
        if tail.ring_start - seed.offset > self._limits.max_resume_records:
            raise PositionLostError(key.channel, cursor.partition, cursor.offset)
        if cursor.floor_key != NOTHING_DUE:
            await self._catch_up.page(series, subscription, cursor)
        subscription.attach(series, Position(-1))
        await self._catch_up.run(series, tail, subscription)
        self._join(series)

    def _join(self, series: Series) -> None:
        """``series`` stands where its tail stands: follow it, or hand its subscribers to the series that does."""
        tail = self._tails[(series.key.channel, self.partition(series.key))]
        shared = tail.follower(series.key.instrument, series.key.timeframe_s)
        if shared is None:
            tail.complete(series)
            tail.follow(series)
            return
        if shared is series:
            return
        for subscription in self._of(series):
            subscription.attach(shared, series.position)

    # -- when things go wrong

    def _stuck(self, series: Series) -> None:
        """A live series met rows only ClickHouse can judge: it catches up by itself and joins again."""
        self._spawn(self._rejoin(series))

    async def _rejoin(self, series: Series) -> None:
        tail = self._tails[(series.key.channel, self.partition(series.key))]
        while True:
            try:
                await self._catch_up.run(series, tail)
            except StoreUnavailableError as exc:
                logger.warning("%s stands still at offset %d: %s", series.key, series.position.offset, exc.reason)
                await self._clock.sleep(_RETRY_S)
            except PositionLostError as exc:
                self._reset(series, str(exc))
                return
            else:
                self._join(series)
                return

    def _reset(self, series: Series, reason: str) -> None:
        for subscription in self._of(series):
            self._spawn(self.restart(subscription, reason))

    async def restart(self, subscription: Subscription, reason: str) -> None:
        """Tell a subscription that its stream is broken off (``reset``) and begin again with a snapshot, as soon as that can be had."""
        old = subscription.series
        if old is not None:
            old.subscribers.discard(subscription)
        series = self._series(subscription.key) if old is None else old
        subscription.skip_until = Position(-1)
        subscription.push(series.announce("reset", msgspec.json.encode({"reason": reason})))
        while not subscription.closed:
            try:
                subscription.epoch = self.epoch(subscription.key.channel)
                await self._subscribe_snapshot(subscription, subscription.limit)
            except (StoreUnavailableError, PositionLostError) as exc:
                logger.warning("%s cannot begin again yet: %s", subscription.key, exc)
                await self._clock.sleep(_RETRY_S)
            else:
                return

    # -- housekeeping

    async def _tick(self) -> None:
        """Heartbeats for silent subscriptions; series nobody reads are forgotten."""
        while True:
            await self._clock.sleep(self._limits.heartbeat_s)
            self._heartbeat()
            self._forget_idle(self._clock.monotonic_us())

    def _heartbeat(self) -> None:
        for subscription in list(self._subscriptions):
            series = subscription.series
            if series is None or not subscription.quiet:
                subscription.quiet = True
                continue
            tail = self._tails[(series.key.channel, self.partition(series.key))]
            if tail.follower(series.key.instrument, series.key.timeframe_s) is series:
                series.advance(tail.next_offset)
                subscription.push(series.announce("heartbeat", b'{"time_us":%d}' % self._clock.now_us()))
                subscription.quiet = True

    def _forget_idle(self, now_us: int) -> None:
        idle = [
            (series.idle_since_us, tail, series) for tail in self._tails.values() for series in tail.followers() if not series.subscribers
        ]
        idle.sort(key=lambda entry: entry[0])
        surplus = len(idle) - self._limits.max_idle_series
        for place, (since_us, tail, series) in enumerate(idle):
            if place < surplus or now_us - since_us > self._limits.linger_s * _US:
                tail.unfollow(series)

    def _of(self, series: Series) -> list[Subscription]:
        return [entry for entry in series.subscribers if isinstance(entry, Subscription)]

    def _series(self, key: SeriesKey) -> Series:
        partition, epoch, channel = self.partition(key), self.epoch(key.channel), key.channel
        topic_code = TOPIC_CODES[channel]

        def cursor_of(place: Position) -> str:
            return encode_place(topic_code, partition, max(place.offset, 0), place.row, epoch)

        limits = self._limits
        return Series(
            key, cursor_of, snapshot_rows=limits.snapshot_rows(channel), log_messages=limits.log_messages, log_bytes=limits.log_bytes
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
