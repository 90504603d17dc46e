"""Gaps are fetched from the venue: page by page, live ones first, for as long as it takes.

Comes in: gaps and a way to ask for a page of a symbol's trades from an id on. Goes out: rows to the gap's pipeline, and what became of it.

A gap that holds the watermark (a live one) is served before the long gaps of an absence, and those leave half of the venue's budget
unspent for the next live one. A venue that cannot be reached does not lose a gap: it stays open and is asked for again, less and less often.
Only the venue's own answer ends a gap: everything is there, or page after page it does not have what is missing. A page answers for every
gap of its symbol whose ids it spans: a feed that lost every second trade costs as many requests as one that lost them in a row.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Awaitable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final, Protocol

from collectors.dedupe import Gap
from collectors.errors import BannedError, BreakerOpenError, CollectorError, RateLimitedError, RefusedError, UnavailableError, VenueError
from collectors.pipeline import Pipeline
from collectors.wire import Array
from schemas.seam import Clock

logger = logging.getLogger(__name__)

ROOM_RESERVE: Final = 170_000
"""Rows of the batcher's room that are left to the feed: what 16 MiB of messages that wait for a blocked sink may hold, at 100 bytes each."""
ROOM_WAIT_S: Final = 0.01
"""Wait for room in the batcher; frames are taken every linger."""
_ALL_IDS: Final = 2**63


@dataclass(frozen=True, kw_only=True, slots=True)
class FillerConfig:
    """How often the venue is asked."""

    grace_s: float = 0.5
    """Wait before REST is asked for a gap: what is merely out of order, or comes by the other connection, needs no request."""
    tries: int = 4
    """REST lags the stream: a gap whose end REST does not have is asked for again so often before it is called unfillable."""
    retry_s: float = 1.0
    """Between these."""
    workers: int = 5
    """Pages fetched at the same time, at least 2; one of them is of live gaps only."""
    away_first_s: float = 1.0
    """Wait after the venue did not answer; doubles."""
    away_most_s: float = 60.0
    """At most so long: an hour's outage of the venue costs a minute more."""
    progress_us: int = 1_000_000
    """Between two rows that tell how far a long gap is; what came since the last is fetched again after a crash, and dropped by id."""


class FetchPage(Protocol):
    """Asks the venue for one page."""

    def __call__(self, key: str, from_id: int, *, background: bool) -> Awaitable[tuple[dict[str, Array], bool]]:
        """Trades of an instrument from ``from_id`` on, ascending by id, and whether asking further is of no use.

        ``background``: only with budget nobody else needs soon. Raises CollectorError.
        """
        ...


@dataclass(slots=True, eq=False)
class _Job:
    pipeline: Pipeline
    gap: Gap
    position: int = 0
    """Ids before it were asked for in this pass."""
    shown_id: int = -1
    """The newest id the venue showed beyond what it was asked for: up to there it has nothing it did not show."""
    passes: int = 0
    failures: int = 0
    refusals: int = 0
    told_us: int = 0
    """Monotonic time of the last progress row."""

    def next_id(self) -> int:
        """The smallest missing id that was not asked for in this pass, -1 for none."""
        return next((max(piece.first, self.position) for piece in self.gap.missing if piece.last >= self.position), -1)


@dataclass(slots=True)
class _Queue:
    """Jobs that are due (live ones, then the others by age) and jobs that wait."""

    live: list[tuple[int, int, _Job]] = field(default_factory=list)
    long: list[tuple[int, int, _Job]] = field(default_factory=list)
    waiting: list[tuple[int, int, _Job]] = field(default_factory=list)


class GapFiller:
    """Fetches gaps of all shards of a venue.

    Args:
        fetch: asks for a page.
        clock: time and sleep.
        config: how often.
    """

    def __init__(self, fetch: FetchPage, clock: Clock, config: FillerConfig | None = None) -> None:
        self._fetch = fetch
        self._clock = clock
        self._config = config or FillerConfig()
        self._queue = _Queue()
        self._serial = count()
        self._jobs: dict[tuple[int, int], set[_Job]] = {}  # (pipeline, code) -> what is not done of a symbol
        self._changed = asyncio.Event()
        self._warned_us = -(10**12)

    @property
    def waiting(self) -> int:
        """Gaps that are not done."""
        queue = self._queue
        return len(queue.live) + len(queue.long) + len(queue.waiting)

    def add(self, pipeline: Pipeline, gap: Gap) -> None:
        """Fetch a gap. Returns at once."""
        job = _Job(pipeline, gap)
        self._jobs.setdefault(self._place(job), set()).add(job)
        self._later(job, self._config.grace_s)

    async def run(self) -> None:
        """Work until cancelled."""
        workers = [asyncio.create_task(self._work(live_only=number == 0)) for number in range(self._config.workers)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, *, live_only: bool) -> None:
        """Fetch what is due; one worker never waits for the budget of a long gap."""
        while True:
            job = self._next(live_only=live_only)
            if job is None:
                await self._wait()
            else:
                await self._step(job)

    def _next(self, *, live_only: bool) -> _Job | None:
        """The most urgent job that is due."""
        queue, now = self._queue, self._clock.monotonic_us()
        while queue.waiting and queue.waiting[0][0] <= now:
            self._due(heapq.heappop(queue.waiting)[2], now)
        for jobs in (queue.live,) if live_only else (queue.live, queue.long):
            if jobs:
                return heapq.heappop(jobs)[2]
        return None

    def _due(self, job: _Job, now_us: int) -> None:
        queue = self._queue.live if job.pipeline.ledger.holds(job.gap, now_us) else self._queue.long
        heapq.heappush(queue, (job.gap.gap_id, next(self._serial), job))

    def _later(self, job: _Job, seconds: float) -> None:
        heapq.heappush(self._queue.waiting, (self._clock.monotonic_us() + int(seconds * 1e6), next(self._serial), job))
        self._wake()

    def _again(self, job: _Job) -> None:
        self._due(job, self._clock.monotonic_us())
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _wait(self) -> None:
        """Until a job is due or a new one came."""
        changed = asyncio.ensure_future(self._changed.wait())
        waits: set[asyncio.Future[Any]] = {changed}
        if self._queue.waiting:
            due_us = self._queue.waiting[0][0] - self._clock.monotonic_us()
            waits.add(asyncio.ensure_future(self._clock.sleep(max(0, due_us) / 1e6)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()

    async def _step(self, job: _Job) -> None:
        """One page of a gap, or its end. Never raises for what the venue does."""
        gap = job.gap
        if gap.closed:
            self._forget(job)
            return
        if not gap.missing:
            self._finish(job, complete=True)
            return
        from_id = job.next_id()
        if from_id < 0:
            self._pass_ended(job)
            return
        try:
            ended = await self._page(job, from_id)
        except CollectorError as exc:
            self._failed(job, exc)
            return
        except KeyError:  # the venue does not list the market any more
            self._failed(job, RefusedError(f"{self._key(job)} is no longer listed."))
            return
        job.failures = job.refusals = 0
        if ended:
            self._pass_ended(job)
        else:
            self._tell_progress(job)
            self._again(job)

    async def _page(self, job: _Job, from_id: int) -> bool:
        """Fetch one page; whether the venue has nothing further."""
        gap, pipeline, clock = job.gap, job.pipeline, self._clock
        live = pipeline.ledger.holds(gap, clock.monotonic_us())
        page, exhausted = await self._fetch(self._key(job), from_id, background=not live)
        ids = page["trade_id"]
        if not len(ids):
            self._answered(job, from_id, _ALL_IDS, -1)
            return True
        while pipeline.batcher.room < len(ids) + ROOM_RESERVE:  # frames are taken every linger
            await clock.sleep(ROOM_WAIT_S)
        if not gap.closed:
            pipeline.backfill(gap, page, clock.now_us(), clock.monotonic_us())
        if exhausted and int(ids[0]) > from_id:
            return True  # only its newest trades are to be had: it showed nothing of what lies before them
        job.shown_id = int(ids[-1])
        job.position = max(job.shown_id, from_id) + 1
        self._answered(job, from_id, _ALL_IDS if exhausted else job.position, job.shown_id)
        return exhausted

    def _answered(self, job: _Job, from_id: int, until_id: int, shown_id: int) -> None:
        """The venue showed all it has of ids ``[from_id, until_id)``: other gaps of the symbol need not ask for them in this pass."""
        for other in self._jobs.get(self._place(job), ()):
            if other is not job and from_id <= other.next_id() < until_id:
                other.position = until_id
                other.shown_id = max(other.shown_id, shown_id)

    def _pass_ended(self, job: _Job) -> None:
        """The venue was asked for all that is missing, or has nothing further."""
        gap = job.gap
        if gap.closed:
            self._forget(job)
            return
        job.passes += 1
        # ids that may have holes: the venue went beyond the gap, so that what it did not show does not exist
        shown = (gap.anew or not job.pipeline.sequencer.consecutive) and job.shown_id >= gap.last_id
        if not gap.missing or shown or job.passes >= self._config.tries:
            self._finish(job, complete=not gap.missing or shown)
            return
        job.position = 0
        self._later(job, self._config.retry_s)

    def _failed(self, job: _Job, exc: CollectorError) -> None:
        """The venue did not answer, or refused: later, and a refusal not for ever."""
        stats, config = job.pipeline.stats, self._config
        stats.error(reason_of(exc))
        if isinstance(exc, RefusedError):
            job.refusals += 1
            if job.refusals >= config.tries:
                logger.warning("%s: %s", self._key(job), exc)
                self._finish(job, complete=False)
                return
        now = self._clock.monotonic_us()
        wait_s = min(config.away_most_s, config.away_first_s * 2.0 ** min(job.failures, 16)) * (0.5 + self._clock.random.random())
        wait_s = max(wait_s, exc.retry_after_s if isinstance(exc, VenueError | BreakerOpenError) else 0.0)
        job.failures += 1
        if now - self._warned_us > 10_000_000:
            self._warned_us = now
            logger.warning(
                "%d gaps wait for the venue, %s among them: %s Trying again in %.1f s.", self.waiting + 1, self._key(job), exc, wait_s
            )
        self._later(job, wait_s)

    def _tell_progress(self, job: _Job) -> None:
        now = self._clock.monotonic_us()
        if now - max(job.told_us, job.gap.opened_us) >= self._config.progress_us:
            job.told_us = now
            job.pipeline.ledger.progress(job.gap)

    def _finish(self, job: _Job, *, complete: bool) -> None:
        gap = job.gap
        if gap.missing and not complete:
            # after a long absence every symbol has a gap: a few lines say it, the topic and the metrics say it all
            level = logging.WARNING if self.waiting < 3 else logging.DEBUG
            lost = ", ".join(f"{piece.first}..{piece.last}" for piece in gap.missing[:5])
            logger.log(level, "%s lacks trades %s: the venue does not have them.", self._key(job), lost)
        self._forget(job)
        job.pipeline.ledger.done(gap, complete=complete)

    def _forget(self, job: _Job) -> None:
        jobs = self._jobs.get(self._place(job), set())
        jobs.discard(job)
        if not jobs:
            self._jobs.pop(self._place(job), None)

    def _place(self, job: _Job) -> tuple[int, int]:
        return id(job.pipeline), job.gap.code

    def _key(self, job: _Job) -> str:
        return job.pipeline.batcher.key_of(job.gap.code)


def reason_of(exc: CollectorError) -> str:
    """Stable name of why a page could not be had."""
    if isinstance(exc, RateLimitedError | BannedError):
        return "backfill_rate_limited"
    if isinstance(exc, UnavailableError | BreakerOpenError):
        return "backfill_unavailable"
    return "backfill_failed"
