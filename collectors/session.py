"""One connection shard's life: connect, subscribe, deliver, notice silence, renew, reconnect; and the pump that empties it.

Comes in: the streams that are wanted. Goes out: frames to a sink. The venue's own manners come from a :class:`Feed`; decisions are made
by the pure parts (back-off, breaker, stale detector, watermark, sequencer), this shell only carries them out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final

from collectors.backoff import Backoff
from collectors.breaker import Breaker
from collectors.connection import ConnectionConfig, is_retryable, open_connection
from collectors.dedupe import EVIDENCE_HEARTBEAT, EVIDENCE_RESTART, EVIDENCE_SILENCE
from collectors.errors import BreakerOpenError, WireError
from collectors.link import Answers, Feed, Link
from collectors.pipeline import Pipeline
from collectors.wire import FrameSink, Reply
from schemas.frames import Frame
from schemas.seam import Clock

logger = logging.getLogger(__name__)

HOLD_DOWN: Final = "connection down"
HOLD_RENEWAL: Final = "renewal"
HOLD_BACKPRESSURE: Final = "backpressure"
HOLD_RECOVERY: Final = "recovery"
CHECK_S: Final = 0.25
"""Between two looks at silence and age; an active feed is found dead within its 2 s floor plus this."""
PROVEN_US: Final = 5_000_000
"""A connection that held this long is a success of its own."""
PROBE_SILENCE_US: Final = 250_000
"""A feed silent for this long is asked whether it lives; its watermark can then go on. Active feeds are never asked."""
PROBE_DEAD_US: Final = 2_500_000
"""A ping that is not answered for this long means a dead connection, however seldom the feed's symbols trade."""
LEDGER_S: Final = 0.1
"""Between two looks for ledger rows that wait for their trades to be safe."""
RESUMED_ROUNDS: Final = 3
"""Rounds after a pause of reading until what waited in the socket has been read."""
BEHIND_US: Final = 10_000
"""A sink that needs longer than this for a round's frames is behind: frames grow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """Times of one shard."""

    ack_timeout_s: float = 10.0
    """A subscription the venue does not acknowledge in this time ends the connection."""
    overlap_s: float = 2.0
    """At a renewal the old connection stays this long beside the new one; twice the worst delivery delay worth waiting for."""
    renewal_retry_s: float = 60.0
    """After a failed renewal the old connection is kept and the next attempt waits this long."""
    connection: ConnectionConfig = field(default_factory=ConnectionConfig)


class Shard:
    """One logical feed over a succession of connections.

    Args:
        feed: the venue's manners.
        pipeline: staging, parsing, batching.
        sink: takes frames; may make us wait.
        clock, backoff, breaker, config: as named.
        on_connected: awaited in a task after every (re)connect that left a hole; until it returns the watermark is held.
        on_silence: awaited in a task with the codes of symbols that went silent beyond their own law.
    """

    def __init__(
        self,
        *,
        feed: Feed,
        pipeline: Pipeline,
        sink: FrameSink,
        clock: Clock,
        backoff: Backoff,
        breaker: Breaker,
        config: SessionConfig | None = None,
        on_connected: Callable[[Shard], Awaitable[None]] | None = None,
        on_silence: Callable[[Shard, list[int]], Awaitable[None]] | None = None,
    ) -> None:
        self.name = pipeline.batcher.source
        self.pipeline = pipeline
        self.breaker = breaker
        self.trouble = "The feed is not connected yet."
        """Why the shard is not live; empty when it is."""
        self._feed, self._sink, self._clock, self._backoff = feed, sink, clock, backoff
        self._config = config or SessionConfig()
        self._on_connected = on_connected
        self._on_silence = on_silence
        self._evidence = EVIDENCE_RESTART  # how the loss of the last connection was noticed
        self._wanted: set[str] = set()
        self._changed = asyncio.Event()
        self._links: list[Link] = []
        self._answers = Answers()
        self._tasks: set[asyncio.Task[None]] = set()
        self._paused = False
        self._rounds_since_resume = RESUMED_ROUNDS
        self._round_us = clock.monotonic_us()
        self._stopping = False
        self._drained = asyncio.Event()
        self._ledger_lock = asyncio.Lock()
        self._pump_task: asyncio.Task[None] | None = None

    # What others ask.

    @property
    def streams(self) -> frozenset[str]:
        """Streams that are wanted."""
        return frozenset(self._wanted)

    @property
    def is_live(self) -> bool:
        """Connected, and everything wanted is subscribed."""
        return any(self._wanted <= link.subscribed for link in self._links)

    def want(self, streams: set[str]) -> None:
        """Collect exactly these streams from now on."""
        if streams != self._wanted:
            self._wanted = set(streams)
            self.pipeline.subscribed = False  # until the next look: the venue has not acknowledged what is new
            self._changed.set()

    def reply(self, reply: Reply) -> None:
        """The venue answered one of our requests."""
        if not self._answers.arrived(reply) and reply.error:
            self.pipeline.stats.error("request_refused")
            logger.warning("%s: the venue refuses a request: %s", self.name, reply.error)

    async def run(self) -> None:
        """Work until :meth:`stop`. Raises what no retry can help (a blocked region, a wrong address)."""
        # an earlier process may have promised something: it stands until what was missed since is known
        self.pipeline.watermark.hold(HOLD_DOWN, self._clock.monotonic_us())
        self._pump_task = asyncio.create_task(self._pump(), name=f"pump {self.name}")
        self._spawn(self._write_ledger())
        keeper = asyncio.create_task(self._keep(), name=f"keep {self.name}")
        try:
            await asyncio.wait({self._pump_task, keeper}, return_when=asyncio.FIRST_COMPLETED)
            if self._stopping:  # the keeper ends at once, the pump when everything received is sent
                await asyncio.wait({self._pump_task})
                await self._send_ledger()
                self._drained.set()
            for task in (self._pump_task, keeper):
                if task.done() and not task.cancelled():
                    task.result()
        finally:
            for task in (keeper, *self._tasks):
                task.cancel()
            await asyncio.gather(keeper, *self._tasks, return_exceptions=True)
            for link in self._links:
                link.connection.cut()
            self._pump_task.cancel()
            await asyncio.gather(self._pump_task, return_exceptions=True)
            self._drained.set()

    async def stop(self) -> None:
        """Stop reading and send everything that was received. The sink's own flush is the caller's."""
        self._stopping = True
        if self._pump_task is None:
            return
        for link in list(self._links):
            await self._close(link)
        self._round_us = self._clock.monotonic_us()
        await asyncio.wait([self._pump_task])
        await self._drained.wait()

    # Connecting.

    async def _keep(self) -> None:
        while not self._stopping:
            if not self._wanted:
                self.trouble = "No symbol is collected on this feed."
                await self._wait_for_change()
                continue
            try:
                self.breaker.check(self._clock.monotonic_us())
                link = await self._open()
            except BreakerOpenError as exc:
                await self._clock.sleep(min(exc.retry_after_s, 5.0))
                continue
            except asyncio.CancelledError:
                self.breaker.abandoned()
                raise
            except Exception as exc:
                now = self._clock.monotonic_us()
                self.breaker.failed(now)
                self.pipeline.connection_lost(EVIDENCE_RESTART, now)  # it may have delivered something before it failed
                self.trouble = str(exc)
                self.pipeline.stats.error("connect_failed")
                if not is_retryable(exc):
                    raise
                wait_s = self._backoff.failed(now)
                logger.warning("%s: %s Trying again in %.1f s.", self.name, exc, wait_s)
                await self._clock.sleep(wait_s)
                continue
            await self._live(link)

    async def _live(self, link: Link) -> None:
        """A fresh link after none: announce it, watch it and its successors until the feed is down again."""
        now = self._clock.monotonic_us()
        pipeline = self.pipeline
        self.breaker.succeeded(now)
        self._backoff.connected(now)
        self.trouble = ""
        pipeline.stale.connected(now)
        pipeline.subscribed = self.is_live
        self._evidence = EVIDENCE_RESTART
        logger.info("%s: connected to %s with %d streams.", self.name, self._feed.url, len(link.subscribed))
        if self._on_connected is not None:
            hold = f"{HOLD_RECOVERY} {pipeline.ledger.losses}"
            pipeline.watermark.hold(hold, now)
            self._spawn(self._recover(hold))
        pipeline.watermark.release(HOLD_DOWN)
        reason = await self._watch(link)
        if self._stopping:
            return
        now = self._clock.monotonic_us()
        pipeline.watermark.hold(HOLD_DOWN, now)
        pipeline.connection_lost(self._evidence, now)
        pipeline.stats.reconnections += 1
        self.trouble = f"The connection was lost: {reason}."
        wait_s = self._backoff.failed(now)
        logger.warning("%s: %s Reconnecting in %.2f s.", self.name, self.trouble, wait_s)
        await self._clock.sleep(wait_s)

    async def _recover(self, hold: str) -> None:
        assert self._on_connected is not None
        try:
            await self._on_connected(self)
        finally:
            self.pipeline.watermark.release(hold)  # its own: the feed may have been lost and be recovered once more meanwhile

    async def _open(self) -> Link:
        """A connection with everything wanted subscribed. Raises WireError and what :func:`open_connection` raises."""
        connection = await open_connection(
            self._feed.url,
            clock=self._clock,
            on_messages=self._received,
            on_oversized=self._oversized,
            config=self._config.connection,
        )
        link = Link(self.name, connection, self._feed, self._answers, self._clock, ack_timeout_s=self._config.ack_timeout_s)
        self._links.append(link)
        if self._paused:
            connection.pause()
        try:
            await link.subscribe(lambda: self._wanted)
        except BaseException:
            self._drop(link)
            raise
        self._spawn(self._follow(link))
        return link

    async def _follow(self, link: Link) -> None:
        """Apply changes of what is wanted to a live link; a failure ends the link, and the keeper reconnects."""
        try:
            while not link.connection.closed.done():
                await self._wait_for_change(link.connection.closed)
                await link.subscribe(lambda: self._wanted)
        except WireError as exc:
            logger.warning("%s", exc)
            link.connection.cut()

    async def _wait_for_change(self, closed: asyncio.Future[str] | None = None) -> None:
        """Until something else is wanted, or ``closed``."""
        changed = self._changed
        waiting: asyncio.Future[Any] = asyncio.ensure_future(changed.wait())
        either: set[asyncio.Future[Any]] = {waiting} if closed is None else {waiting, closed}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if changed.is_set() and self._changed is changed:
            self._changed = asyncio.Event()

    # Watching.

    async def _watch(self, link: Link) -> str:
        """Until the feed is down; returns why. Renewals happen inside: ``link`` is then replaced by its successor."""
        while True:
            await self._sleep_or_closed(link)
            if link.connection.closed.done():
                self._drop(link)
                reason = link.connection.closed.result()
                if "ping timeout" in reason:  # the library's own heartbeat
                    self._evidence = EVIDENCE_HEARTBEAT
                return reason
            if self._stopping or not self._wanted:
                await self._close(link)
                return "nothing is wanted any more"
            now = self._clock.monotonic_us()
            if self.pipeline.stale.feed_is_stale(self._round_us):
                silence_s = self.pipeline.stale.feed_silence_us(self._round_us) / 1e6
                self.pipeline.stats.stale_reconnects += 1
                self.pipeline.stale.silence_was_quiet(now)
                self._evidence = EVIDENCE_HEARTBEAT if link.unanswered_us(now) > PROBE_SILENCE_US else EVIDENCE_SILENCE
                self._drop(link)
                return f"nothing arrived for {silence_s:.1f} s, which its rate does not explain"
            if link.unanswered_us(self._round_us) > PROBE_DEAD_US and not self._paused and self._rounds_since_resume >= RESUMED_ROUNDS:
                self.pipeline.stats.stale_reconnects += 1
                self._evidence = EVIDENCE_HEARTBEAT
                self._drop(link)
                return f"a ping was not answered for {link.unanswered_us(now) / 1e6:.1f} s"
            self.pipeline.subscribed = self.is_live
            if not link.proven and now - link.connection.opened_us > PROVEN_US:
                link.proven = True
                self.breaker.succeeded(now)
            self._look_at_symbols(link)
            if link.may_probe(now) and self.pipeline.stale.feed_silence_us(now) > PROBE_SILENCE_US:
                self._spawn(self._probe(link))
            if link.renewal.is_due(link.connection.opened_us, now):
                link = await self._renew(link)

    async def _probe(self, link: Link) -> None:
        sent_us = await link.probe()
        if sent_us is not None:  # otherwise the watch sees the connection's end itself
            self.pipeline.watermark.heard(sent_us)

    async def _sleep_or_closed(self, link: Link) -> None:
        nap: asyncio.Future[Any] = asyncio.ensure_future(self._clock.sleep(CHECK_S))
        either: set[asyncio.Future[Any]] = {nap, link.connection.closed}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            nap.cancel()

    def _look_at_symbols(self, link: Link) -> None:
        """Subscribe again to streams that are silent beyond their own law, unless it is us who do not read."""
        if self._paused or self._rounds_since_resume < RESUMED_ROUNDS:
            return
        stale = self.pipeline.stale
        codes = stale.newly_stale(self._round_us)
        self.pipeline.stats.stale_symbols = stale.stale_symbols()
        if codes:
            streams = {stream for stream in map(self.pipeline.stream_of, codes) if stream in self._wanted}
            logger.warning("%s: %d streams went silent, subscribing again: %s", self.name, len(streams), ", ".join(sorted(streams)[:10]))
            link.again |= streams
            self._changed.set()
            self.pipeline.ledger.went_silent(codes)
            if self._on_silence is not None:
                self._spawn(self._ask(codes))

    async def _ask(self, codes: list[int]) -> None:
        assert self._on_silence is not None
        await self._on_silence(self, codes)

    async def _renew(self, old: Link) -> Link:
        """Replace ``old`` by a new connection without a hole; on failure it is kept and tried again later."""
        pipeline = self.pipeline
        # the newer connection may be ahead of the older: until both said the same, the older's rows must not be late
        pipeline.watermark.hold(HOLD_RENEWAL, self._clock.monotonic_us())
        try:
            new = await self._open()
        except Exception as exc:
            pipeline.watermark.release(HOLD_RENEWAL)
            if not is_retryable(exc):
                raise
            pipeline.stats.error("renewal_failed")
            old.renewal.not_before_us = self._clock.monotonic_us() + int(self._config.renewal_retry_s * 1e6)
            logger.warning("%s: renewing the connection failed, the old one goes on: %s", self.name, exc)
            return old
        pipeline.watermark.release(HOLD_RENEWAL)  # subscribing a thousand streams takes seconds; a hold lasts ten
        pipeline.watermark.hold(HOLD_RENEWAL, self._clock.monotonic_us())
        await self._clock.sleep(self._config.overlap_s)
        await self._close(old)
        await self._clock.sleep(2 * pipeline.batcher.config.linger_max_ms / 1e3)
        pipeline.watermark.release(HOLD_RENEWAL)
        pipeline.stats.renewals += 1
        logger.info("%s: connection renewed.", self.name)
        return new

    async def _close(self, link: Link) -> None:
        try:
            await link.connection.close()
        finally:  # what arrives during the closing handshake is received like everything before
            self._links = [other for other in self._links if other is not link]

    def _drop(self, link: Link) -> None:
        """Forget a link that is dead or believed so."""
        self._links = [other for other in self._links if other is not link]
        link.connection.cut()

    # Receiving and sending.

    def _received(self, messages: list[bytes]) -> None:
        pipeline = self.pipeline
        pipeline.receive(messages, self._clock.now_us())
        if pipeline.is_full and not self._paused:
            self._paused = True
            pipeline.stats.pauses += 1
            pipeline.watermark.hold(HOLD_BACKPRESSURE, self._clock.monotonic_us())
            for link in self._links:
                link.connection.pause()

    def _oversized(self, head: bytes, size: int) -> None:
        detail = f"The message has {size:,} bytes or more; the limit is {self._config.connection.max_message_bytes:,}."
        self.pipeline.reject("message_too_large", detail, head, size=size, time_us=self._clock.now_us(), place=self.name)

    async def _pump(self) -> None:
        """Every linger: process what came, send what is due."""
        previous_us = self._clock.monotonic_us()
        behind = False
        while True:
            if self._links or not self._stopping:
                await self._clock.sleep(self.pipeline.batcher.linger_us / 1e6)
            last = self._stopping and not self._links and not self.pipeline.staged_bytes
            now = self._clock.monotonic_us()
            frames = self._take(now, previous_us, behind=behind, last=last)
            previous_us = self._round_us = now
            for topic_name, partition, frame in frames:
                await self._sink.send(topic_name, partition, frame)
            self.pipeline.ledger.sent()
            behind = self._clock.monotonic_us() - now > BEHIND_US
            self._after_round()
            if last:
                return
            if self._stopping:
                await self._clock.sleep(0)

    def _take(self, now: int, previous_us: int, *, behind: bool, last: bool) -> list[tuple[str, int, Frame]]:
        pipeline, wall_us = self.pipeline, self._clock.now_us()
        if last:
            pipeline.ledger.finish()
        return pipeline.take(now, previous_us, sink_behind=behind, all_partitions=last, wall_us=wall_us)

    async def _write_ledger(self) -> None:
        """Say what became of gaps, once the trades it is about are safe."""
        while True:
            await self._clock.sleep(LEDGER_S)
            await self._send_ledger()

    async def _send_ledger(self) -> None:
        ledger = self.pipeline.ledger
        async with self._ledger_lock:  # in order, and not cut off half-way at the end
            if ledger.waits:
                frames = ledger.take_ready()
                await self._sink.wait_acknowledged()
                for topic_name, partition, frame in frames:
                    await self._sink.send(topic_name, partition, frame)

    def _after_round(self) -> None:
        if self._paused and self.pipeline.has_room:
            self._paused = False
            self._rounds_since_resume = 0
            for link in self._links:
                link.connection.resume()
        elif not self._paused and self._rounds_since_resume < RESUMED_ROUNDS:
            self._rounds_since_resume += 1
            if self._rounds_since_resume == RESUMED_ROUNDS:  # two whole rounds of reading: the newest time seen is the feed's own again
                self.pipeline.watermark.release(HOLD_BACKPRESSURE)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.pipeline.stats.error("internal")
            logger.error("%s: a task of the feed failed", self.name, exc_info=task.exception())
