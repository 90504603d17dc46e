"""Fetches the trades of a time range over a venue's REST and sees to it that the bars are made: ``marketstream backfill``.

Trades go into topic ``trades`` as history (flag ``HISTORY``, source ``<exchange>/backfill/<symbol>``): the sink stores those it does not hold,
the worker leaves them alone, and a job of the repair makes the bars. The position stands in PostgreSQL once the broker has acknowledged what
lies before it, so a run that was killed is gone on with by the next one. What the venue does not have is said in the coverage ledger.

Which ids: aggregate trades are asked for by time, which names the first id; single trades are then paged by id (see
``BinanceRest.first_since``). The trade before the first is asked for too: when the venue no longer has it, the start of the range is lacking.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import httpx
import numpy as np
from clickhouse_connect.driver.exceptions import ClickHouseError

from collectors.binance.feed import VENUES, venue_of
from collectors.binance.rest import BinanceRest
from collectors.breaker import Breaker
from collectors.dedupe import base_of
from collectors.errors import BannedError, BreakerOpenError, RateLimitedError, RefusedError, UnavailableError, VenueError
from infra.backfill_ledger import Lacking, ledger_columns, ledger_rows
from infra.backfill_state import BackfillState, BackfillStates
from infra.clickhouse.client import connect, unreachable
from infra.errors import SettingsError, UnreachableError
from infra.kafka import FrameProducer
from infra.progress import wait_stored
from infra.registry_client import RegistryClient
from infra.repair_jobs import Job, RepairJobs, Wanted, wait_reconciled
from infra.seam import SystemClock
from infra.settings import Settings
from infra.symbol_reader import SymbolReader
from schemas.errors import SchemaError, nearest
from schemas.frames import HISTORY, Frame
from schemas.partitions import partition_of
from schemas.seam import Clock
from schemas.symbols import Instrument, check_exchange, check_symbol
from schemas.timeframes import format_time_us

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_SAVE_EVERY_US: Final = 1_000_000
"""Between two positions in PostgreSQL; what was fetched since is fetched again after a kill."""
_PATIENCE_S: Final = 180.0
"""A venue that does not answer or asks to wait for longer than this ends the run; the next one goes on."""
_TELL_EVERY_US: Final = 200_000
_TRIES: Final = 3
_REST_LAG_US: Final = 2_000_000
"""REST lags the market: only what is older than this is all there."""
_FIRST_IDS: Final = 1
"""A market's first trade has id 0 or 1: nothing is missing before it."""
_LAG_S: Final = 1.0
_STORE_S: Final = 600.0
_US: Final = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class BackfillProgress:
    """Where a backfill is, five times a second."""

    stage: str
    """``searching``, ``fetching``, ``storing`` or ``repairing``."""
    done: int
    """Of ``total``: ids while fetching, microseconds of the range while repairing."""
    total: int
    rows: int
    rows_per_s: float
    waits_s: float = 0.0
    """The venue asked to wait this long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackfillSummary:
    """What became of a range."""

    exchange: str
    symbol: str
    start_us: int
    end_us: int
    rows: int
    """Trades of the range the venue has; those already stored are stored once."""
    resumed: bool
    """An earlier run had begun it."""
    first_id: int
    """-1 without trades."""
    last_id: int
    first_time_us: int
    last_time_us: int
    lacking: list[Mapping[str, int]] = field(default_factory=list)
    """What the venue does not have: first and last id (-1 unknown), times around it."""
    job: int
    """The repair's job."""
    bars_checked: int
    bars_revised: int
    pending: str
    """Why bars that reach beyond the range are still to come; empty when all are done."""
    seconds: float


async def backfill(
    settings: Settings,
    *,
    exchange: str,
    symbol: str,
    start_us: int,
    end_us: int,
    progress: Callable[[BackfillProgress], None] | None = None,
    clock: Clock | None = None,
) -> BackfillSummary:
    """Fetch ``[start_us, end_us)`` and return when its trades are stored and its closed bars reconciled.

    Raises:
        SettingsError: a venue that cannot be asked, a symbol it does not list, a range that is empty or reaches into the future.
        UnreachableError: the venue or a server of ours does not answer; the next run goes on.
        BackfillRunsError: another process works on the same range.
        RepairAwayError: the trades are stored, but no repair process makes their bars.
    """
    clock = clock or SystemClock()
    try:
        instrument = Instrument(check_exchange(exchange), check_symbol(symbol))
    except SchemaError as exc:
        raise SettingsError(str(exc)) from exc
    _check_range(start_us, end_us, clock.now_us())
    if exchange not in VENUES:
        raise SettingsError(f"History of '{exchange}' cannot be fetched; it can of {' and '.join(VENUES)}. Replay a file instead.")
    async with RepairJobs(settings) as jobs, _venue(settings, exchange, clock) as rest:
        run = _Run(settings, instrument, start_us, end_us, rest, jobs, clock, progress)
        return await run.run()


def _check_range(start_us: int, end_us: int, now_us: int) -> None:
    if start_us >= end_us:
        raise SettingsError(f"The start {format_time_us(start_us)} is not before the end {format_time_us(end_us)}: swap them.")
    if end_us > now_us:
        raise SettingsError(f"The end {format_time_us(end_us)} lies in the future: it is {format_time_us(now_us)} now.")


@asynccontextmanager
async def _venue(settings: Settings, exchange: str, clock: Clock) -> AsyncIterator[BinanceRest]:
    rest_url = settings.collector.rest_url if settings.collector.exchange == exchange else ""
    # an HTTP client of its own: the proxy of a person's shell is not the stack's business when the address is on loopback
    async with httpx.AsyncClient(timeout=httpx.Timeout(10.0), trust_env=not rest_url) as http:
        yield BinanceRest(venue_of(exchange, rest_url=rest_url), http, clock, Breaker("backfill"))


class _Run:
    """One backfill."""

    def __init__(
        self,
        settings: Settings,
        instrument: Instrument,
        start_us: int,
        end_us: int,
        rest: BinanceRest,
        jobs: RepairJobs,
        clock: Clock,
        progress: Callable[[BackfillProgress], None] | None,
    ) -> None:
        self._settings, self._instrument = settings, instrument
        self._start_us, self._end_us = start_us, end_us
        self._rest, self._jobs, self._clock, self._progress = rest, jobs, clock, progress
        self._states = BackfillStates(jobs, settings.kafka.topic_prefix)
        self._partition = partition_of(instrument.key, settings.kafka.partitions)
        self._begun_us = clock.monotonic_us()
        self._begun_rows = 0
        self._told_us = 0
        self._fetch_begun_us = 0
        self._raw = ""
        self._numbering = 0
        self._state = BackfillState(id=0, state="fetching")

    async def run(self) -> BackfillSummary:
        """See :func:`backfill`."""
        self._raw = await self._raw_symbol()
        self._numbering = await asyncio.to_thread(self._present_numbering)
        await self._clock.sleep(max(self._end_us + _REST_LAG_US - self._clock.now_us(), 0) / _US)
        self._state, resumed = await self._states.take(*self._instrument, self._start_us, self._end_us)
        state = self._state
        self._begun_rows = state.rows
        with RegistryClient.from_settings(self._settings) as registry:
            producer = FrameProducer(self._settings.kafka, registry)
            if state.state == "fetching":
                if state.next_id < 0:
                    self._tell("searching", 0, 0)
                    await self._find_ends()
                await self._fetch(producer)
                await self._states.save(state)
            offsets = await producer.flush()
            if offsets:
                self._tell("storing", 0, 0)
                await wait_stored(self._settings, offsets, deadline_s=_STORE_S)
            if state.job_id is None:
                await self._say(producer)
                await self._order()
        job = await self._reconciled()
        state.state = "done"
        await self._states.save(state)
        return self._summary(job, resumed)

    def _present_numbering(self) -> int:
        """What the collector adds to the venue's ids of this symbol: the venue may have started them anew."""
        client = connect(self._settings.clickhouse)
        try:
            return base_of(max(SymbolReader(client, *self._instrument).largest_id(), 0))
        except (ClickHouseError, OSError) as exc:
            raise unreachable(self._settings.clickhouse, exc) from exc
        finally:
            client.close()

    # -- the venue

    async def _raw_symbol(self) -> str:
        listed = await self._asked(self._rest.symbols)
        entry = listed.get(self._instrument.symbol)
        if entry is None:
            near = nearest(self._instrument.symbol, listed)
            hint = f"did you mean '{near}'?" if near else "see its list of markets."
            raise SettingsError(f"{self._instrument.exchange} lists no market '{self._instrument.symbol}': {hint}")
        return entry.raw

    async def _find_ends(self) -> None:
        """First id and the id after the last; and whether the venue still has the start of the range."""
        rest, raw, state = self._rest, self._raw, self._state
        first = await self._asked(lambda: rest.first_since(raw, self._start_us))
        if first is None or first[1] >= self._end_us:
            state.first_id = state.next_id = 0
            state.last_id = -1
        else:
            last = await self._asked(lambda: rest.first_since(raw, self._end_us))
            state.first_id = state.next_id = first[0]
            # without a trade since the end the newest is the last: asked for by id when it comes to it
            state.last_id = last[0] - 1 if last is not None else 2**62
        if first is not None and first[0] > _FIRST_IDS and rest.venue.consecutive_ids:
            number = first[0] - 1
            before = await self._asked(lambda: rest.at_or_after(raw, number))
            if before is not None and before[0] > number:
                # the venue's history begins after the start of the range
                state.lacking.append(Lacking(-1, number, self._start_us, min(first[1], self._end_us - 1)))
        await self._states.save(state)

    async def _fetch(self, producer: FrameProducer) -> None:
        state = self._state
        saved_us = self._fetch_begun_us = self._clock.monotonic_us()
        tries, page = 0, None
        while state.next_id <= state.last_id:
            page = await self._asked(self._page)
            if page is None and state.last_id < 2**62 and tries < _TRIES:  # a page was short; what lags is there in a moment
                tries += 1
                await self._clock.sleep(_LAG_S)
                continue
            if page is None:
                break
            tries = 0
            inside = page["exchange_time_us"] < self._end_us
            whole = state.last_id < 2**62 or bool(inside.all())
            if not whole:  # there was no trade since the end when it was asked for; by now there is
                page = {name: column[inside] for name, column in page.items()}
            if len(page["trade_id"]):
                self._note_holes(page)
                await producer.send("trades", self._partition, self._frame(page))
                state.rows += len(page["trade_id"])
                state.first_us = state.first_us or int(page["exchange_time_us"][0])
                state.last_us = int(page["exchange_time_us"][-1])
                state.next_id = int(page["trade_id"][-1]) + 1
            if not whole:
                break
            if self._clock.monotonic_us() - saved_us >= _SAVE_EVERY_US:
                await producer.flush()
                await self._states.save(state)
                saved_us = self._clock.monotonic_us()
            total = state.last_id - state.first_id + 1 if state.last_id < 2**62 else 0
            self._tell("fetching", state.next_id - state.first_id, total)
        if page is None and state.next_id <= state.last_id < 2**62 and self._rest.venue.consecutive_ids:
            state.lacking.append(Lacking(state.next_id, state.last_id, state.last_us or self._start_us, self._end_us - 1))
        await producer.flush()
        state.state = "storing"

    async def _page(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """The next page, up to its first hole: asking for the missing id itself tells whether the venue has it."""
        state = self._state
        async for page in self._rest.trades(self._raw, state.next_id, state.last_id, max_rows=1):
            holes = np.flatnonzero(np.diff(page["trade_id"]) != 1) if self._rest.venue.consecutive_ids else np.empty(0, np.int64)
            return page if not len(holes) else {name: column[: int(holes[0]) + 1] for name, column in page.items()}
        return None

    def _note_holes(self, page: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Ids the venue left out, where its ids leave out nothing."""
        if not self._rest.venue.consecutive_ids:
            return
        state = self._state
        first = int(page["trade_id"][0])
        if first > state.next_id:
            state.lacking.append(Lacking(state.next_id, first - 1, state.last_us or self._start_us, int(page["exchange_time_us"][0])))

    def _frame(self, page: Mapping[str, np.ndarray[Any, Any]]) -> Frame:
        count = len(page["trade_id"])
        columns = {
            "symbol_code": np.zeros(count, np.int32),
            **page,
            "trade_id": page["trade_id"] + self._numbering,
            "receive_time_us": np.full(count, self._clock.now_us(), np.int64),
        }
        source = f"{self._instrument.exchange}/backfill/{self._instrument.symbol}"
        return Frame(source=source, watermark_us=0, symbols=(self._instrument.key,), columns=columns, flags=HISTORY)

    async def _asked(self, ask: Callable[[], Awaitable[_T]]) -> _T:
        """The venue's answer, waiting as long as it asks for within reason. Raises UnreachableError, SettingsError."""
        waited_s, why = 0.0, ""
        while True:
            try:
                return await ask()
            except RefusedError as exc:
                raise SettingsError(str(exc)) from exc
            except (RateLimitedError, BannedError, UnavailableError, BreakerOpenError) as exc:
                wait_s = min(max(float(getattr(exc, "retry_after_s", 0.0)), 1.0), _PATIENCE_S)
                waited_s += wait_s
                why = why if why and isinstance(exc, BreakerOpenError) else str(exc)  # not that we ask less often, but why
                if waited_s > _PATIENCE_S:
                    raise UnreachableError(f"{why.rstrip('.')}. The next run goes on where this one ends.") from exc
                self._tell("fetching", 0, 0, waits_s=wait_s)
                await self._clock.sleep(wait_s)
            except VenueError as exc:
                raise UnreachableError(str(exc)) from exc

    # -- the ledger and the repair

    async def _say(self, producer: FrameProducer) -> None:
        """Publish what the ledger is to know."""
        held = await asyncio.to_thread(self._held)
        rows = ledger_rows(held, self._start_us, self._end_us, self._state.lacking, self._state.rows, self._clock.now_us())
        source = f"{self._instrument.exchange}/backfill/{self._instrument.symbol}"
        frame = Frame(source=source, watermark_us=0, symbols=(self._instrument.key,), columns=ledger_columns(rows))
        await producer.send("gaps", self._partition, frame)
        await producer.flush()

    def _held(self) -> list[Any]:
        client = connect(self._settings.clickhouse)
        try:
            return SymbolReader(client, *self._instrument).ledger(self._start_us, self._end_us)
        finally:
            client.close()

    async def _order(self) -> None:
        trigger = f"backfill/{self._state.id}/{self._clock.now_us()}"
        wanted = Wanted(
            exchange=self._instrument.exchange,
            symbol=self._instrument.symbol,
            start_us=self._start_us,
            end_us=self._end_us,
            reason="backfill",
            trigger=trigger,
        )
        (self._state.job_id,) = await self._jobs.add([wanted])
        await self._states.save(self._state)

    async def _reconciled(self) -> Job:
        """The job once every bar that ends in the range is reconciled."""
        assert self._state.job_id is not None
        return await wait_reconciled(
            self._jobs,
            self._state.job_id,
            self._clock,
            lambda job: self._tell("repairing", job.until_us - job.start_us, job.end_us - job.start_us),
        )

    # -- telling

    def _tell(self, stage: str, done: int, total: int, *, waits_s: float = 0.0) -> None:
        now_us = self._clock.monotonic_us()
        if self._progress is None or (stage == "fetching" and not waits_s and now_us - self._told_us < _TELL_EVERY_US):
            return
        self._told_us = now_us
        elapsed = max(now_us - (self._fetch_begun_us or now_us), 1) / _US
        rate = (self._state.rows - self._begun_rows) / elapsed if stage == "fetching" and self._fetch_begun_us else 0.0
        rows = self._state.rows
        self._progress(BackfillProgress(stage=stage, done=max(done, 0), total=max(total, 0), rows=rows, rows_per_s=rate, waits_s=waits_s))

    def _summary(self, job: Job, resumed: bool) -> BackfillSummary:
        state = self._state
        return BackfillSummary(
            exchange=self._instrument.exchange,
            symbol=self._instrument.symbol,
            start_us=self._start_us,
            end_us=self._end_us,
            rows=state.rows,
            resumed=resumed,
            first_id=state.first_id if state.rows else -1,
            last_id=state.next_id - 1 if state.rows else -1,
            first_time_us=state.first_us,
            last_time_us=state.last_us,
            lacking=[one._asdict() for one in state.lacking],
            job=job.id,
            bars_checked=job.checked,
            bars_revised=job.revised,
            pending="" if job.state == "done" else job.note,
            seconds=(self._clock.monotonic_us() - self._begun_us) / _US,
        )
