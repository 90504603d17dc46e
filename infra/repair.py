"""Entry point of the repair: ``python -m infra.repair``. Keeps the promise that the bars stored are the bars of the trades stored.

Everything that changes the past asks for it here: gaps that were filled or given up, trades too late for their bars, suspects released or
discarded, backfills, replayed files that overlap. A job reads the trades of the bars it touches from ClickHouse, makes the bars anew with the
kernel that made them live, and publishes those that differ from the newest stored revision, one revision up, to ``bars`` and ``bars.rows``.
Killed anywhere it goes on: what it published is stored before it looks again, and then nothing differs.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import Counter, Gauge

from infra.ending import on_request_to_end_loop
from infra.errors import MarketstreamError, UnreachableError
from infra.health import HealthServer
from infra.kafka import FrameProducer
from infra.logs import setup_logging
from infra.registry_client import RegistryClient
from infra.repair_jobs import Job, RepairJobs
from infra.repair_settle import Settler
from infra.repair_triggers import Triggers
from infra.seam import SystemClock
from infra.settings import Settings, load_settings
from infra.watchdog import Monitor, Waiting
from schemas.partitions import partition_of
from schemas.seam import Clock

if TYPE_CHECKING:
    from infra.repair_publish import BarPublisher
    from infra.repair_run import Outcome, SymbolRun

logger = logging.getLogger(__name__)

_POLL_S: Final = 1.0
_WATCH_S: Final = 5.0
"""A job whose notification was lost is seen after this."""
_LOOK_AGAIN_US: Final = 2_000_000
_VOUCHER_US: Final = 5_000_000
_LONGEST_US: Final = 600_000_000
_STILL_US: Final = 60_000_000
_BACKOFF_US: Final = (1_000_000, 5_000_000, 30_000_000, 300_000_000)
_RETRY_S: Final = 1.0
_US: Final = 1_000_000

PENDING = Gauge("repair_jobs_pending", "Jobs that are not done, those that wait for open bars included")
JOBS = Counter("repair_jobs_done_total", "Jobs done", ["reason"])
FAILED = Counter("repair_failures_total", "Looks at a job that failed and are tried again")
CHECKED = Counter("repair_bars_checked_total", "Bars compared")
REVISED = Counter("repair_bars_published_total", "Bars published because they differed")
TRIGGERS = Counter("repair_triggers_total", "Stretches asked for by records of topics", ["reason"])


class RepairProcess:
    """The process: one task turns records into jobs, one works on jobs.

    Args:
        settings: of the stack.
        registry: its schema registry.
        clock: time and sleep.
    """

    def __init__(self, settings: Settings, registry: RegistryClient, clock: Clock) -> None:
        self._settings = settings
        self._registry = registry
        self._clock = clock
        self._jobs = RepairJobs(settings)
        self._stopped = asyncio.Event()
        self._leads = asyncio.Event()
        self._trouble: dict[str, str] = {"start": "The repair is starting."}
        self._client: Any = None
        self._publisher: BarPublisher | None = None
        self._settler = Settler(settings.kafka, registry, clock)
        self._published_us: dict[str, int] = {}  # instrument key -> when it published last
        self._done = 0
        self._due = 0

    def stop(self) -> None:
        """End after what is in hand."""
        self._stopped.set()
        self._jobs.wake()

    def reasons(self) -> dict[str, str]:
        """Why it is not ready."""
        return dict(self._trouble)

    # infra.watchdog.Work

    verb = "compared"

    def done(self) -> int:
        """See Work.done: looks at jobs and pieces of them."""
        return self._done

    def waiting(self) -> Waiting:
        """See Work.waiting: jobs that are due."""
        return Waiting(count=self._due, blocked=dict(self._trouble))

    async def run(self) -> None:
        """Work until :meth:`stop`."""
        tasks = [asyncio.create_task(self._ever("postgres", self._work)), asyncio.create_task(self._ever("triggers", self._listen))]
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            done, _ = await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (*tasks, stopped):
                task.cancel()
            await asyncio.gather(*tasks, stopped, return_exceptions=True)
            await self._jobs.close()

    async def _ever(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """``work`` again and again while a server is away."""
        while not self._stopped.is_set():
            try:
                await work()
            except UnreachableError as exc:
                if self._trouble.get(name) != str(exc):
                    logger.warning("%s", exc)
                self._trouble[name] = str(exc)
                await self._clock.sleep(_RETRY_S)

    # -- records to jobs

    async def _listen(self) -> None:
        await self._leads.wait()
        triggers = await asyncio.to_thread(Triggers, self._settings.kafka, self._registry)
        try:
            await asyncio.to_thread(triggers.open)
            async with RepairJobs(self._settings) as jobs:
                self._trouble.pop("triggers", None)
                while self._leads.is_set():
                    wanted = await asyncio.to_thread(triggers.read, _POLL_S)
                    if wanted:
                        await jobs.add(wanted)
                        for one in wanted:
                            TRIGGERS.labels(one.reason).inc()
                    await asyncio.to_thread(triggers.commit)
        finally:
            await asyncio.to_thread(triggers.close)

    # -- jobs to bars

    async def _work(self) -> None:
        jobs = self._jobs
        await jobs.open()
        self._trouble.pop("start", None)
        self._leads.clear()
        while not await jobs.try_lead():  # another process works on them; this one takes over when it ends
            self._trouble.pop("postgres", None)
            await self._clock.sleep(_RETRY_S)
        self._leads.set()
        await jobs.forget_old()
        await jobs.listen()
        self._trouble.pop("postgres", None)
        while not self._stopped.is_set():
            now_us = self._clock.now_us()
            due = await jobs.due(now_us)
            self._due = len(due)
            self._done += 1
            counts = await jobs.count()
            PENDING.set(counts.get("pending", 0) + counts.get("running", 0))
            if due:
                await self._look(due)
                continue
            following = await jobs.next_due_us()
            wait_s = _WATCH_S if following is None else min(max((following - now_us) / _US, 0.02), _WATCH_S)
            await jobs.wait(wait_s)

    async def _look(self, due: Sequence[Job]) -> None:
        """Look at the due jobs of one symbol; what fails is noted and tried again, later each time."""
        await self._jobs.save(due, state="running")
        try:
            await self._reconcile(due)
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            unreachable = self._as_unreachable(exc)
            if unreachable is None:
                logger.exception("Repair of %s failed", due[0].key)
            elif self._trouble.get("repair") != str(unreachable):
                logger.warning("%s", unreachable)
                self._trouble["repair"] = str(unreachable)
            note = (
                str(unreachable)
                if unreachable is not None
                else f"{type(exc).__name__}: {str(exc).splitlines()[0][:300] if str(exc) else ''}"
            )
            FAILED.inc()
            wait_us = _BACKOFF_US[min(max(job.attempts for job in due), len(_BACKOFF_US) - 1)]
            await self._jobs.save(due, state="pending", due_us=self._clock.now_us() + wait_us, note=note, failed=True)
        else:
            self._trouble.pop("repair", None)

    async def _reconcile(self, due: Sequence[Job]) -> None:
        key = due[0].key
        partition = partition_of(key, self._settings.kafka.partitions)
        since_us = max(max(job.created_us for job in due) + _US, self._published_us.get(key, 0))
        behind = "" if self._settler.covers(partition, since_us) else await self._settler.settle(partition)
        if behind:
            await self._jobs.save(due, state="pending", due_us=self._clock.now_us() + _LOOK_AGAIN_US, note=behind)
            return
        run = await asyncio.to_thread(self._run_of, due[0])
        plan = await asyncio.to_thread(run.plan, due)
        checked, revised, waits_us = 0, 0, None
        for piece in await asyncio.to_thread(lambda: list(run.pieces(plan))):
            outcome: Outcome = await asyncio.to_thread(run.work, piece, patient=plan.moving)
            revised += await self._publish(key, partition, outcome)
            checked += outcome.checked
            self._done += 1
            waits_us = outcome.waits_us
            done_us = piece.done_us if waits_us is None else waits_us - 1
            for job in due:
                until_us = max(done_us, job.until_us)
                await self._jobs.save([job], state="running", until_us=until_us, checked=outcome.checked, revised=len(outcome.rows["open"]))
            if waits_us is not None or self._stopped.is_set():
                break
        CHECKED.inc(checked)
        if self._stopped.is_set():
            return
        until_us = plan.limit_us if waits_us is None else waits_us - 1
        for job in due:
            await self._end_look(job, run.left(job, plan, max(until_us, job.until_us)), max(until_us, job.until_us), plan.moving, waits_us)
        if revised:
            logger.info("%s: %d of %d bars revised for %s", key, revised, checked, ", ".join(sorted({job.reason for job in due})))

    async def _end_look(self, job: Job, left_us: int | None, until_us: int, moving: bool, waits_us: int | None) -> None:
        if left_us is None:
            await self._jobs.save([job], state="done", until_us=until_us)
            JOBS.labels(job.reason).inc()
            return
        from infra.repair_run import SETTLE_US

        now_us = self._clock.now_us()
        if waits_us is not None:
            note, due_us = "A bar waits for word on whether all of its trades are here.", now_us + _VOUCHER_US
        elif moving:
            # a live symbol's bars end by the wall clock; a replay's sooner, so it is looked at now and then
            note, due_us = "Bars that are still open.", min(max(left_us + SETTLE_US, now_us + _US), now_us + _LONGEST_US)
        else:
            note, due_us = "Bars that are still open; nothing moves.", min(max(left_us + SETTLE_US, now_us + _US), now_us + _STILL_US)
        await self._jobs.save([job], state="pending", due_us=due_us, until_us=until_us, note=note)

    def _run_of(self, job: Job) -> SymbolRun:
        # here, not at the top: Arrow, the ClickHouse client and the kernel are 120 MB that a stack without repairs does not need
        from infra.clickhouse.client import connect
        from infra.repair_reader import RepairReader
        from infra.repair_run import SymbolRun

        if self._client is None:
            self._client = connect(self._settings.clickhouse)
        reader = RepairReader(self._client, job.exchange, job.symbol, self._settings.repair.page_rows)
        return SymbolRun(reader, self._settings.worker.timeframes, self._clock.now_us())

    async def _publish(self, key: str, partition: int, outcome: Outcome) -> int:
        """Publish what differs; how many bars it was."""
        count = len(outcome.rows["open"])
        if not count:
            return 0
        if self._publisher is None:
            from infra.repair_publish import BarPublisher

            self._publisher = BarPublisher(FrameProducer(self._settings.kafka, self._registry), self._registry)
        await self._publisher.publish(key, partition, outcome)
        self._published_us[key] = self._clock.now_us()
        REVISED.inc(count)
        return count

    def _as_unreachable(self, exc: Exception) -> UnreachableError | None:
        """What a server that is away raised, as one sentence; None for anything else."""
        if isinstance(exc, UnreachableError):
            return exc
        if type(exc).__module__.startswith("clickhouse_connect") or isinstance(exc, OSError):
            from infra.clickhouse.client import unreachable

            self._client = None
            return unreachable(self._settings.clickhouse, exc)
        return None


async def repair(settings: Settings) -> None:
    """Run the repair until SIGTERM or SIGINT. Raises MarketstreamError."""
    with RegistryClient.from_settings(settings) as registry:
        process = RepairProcess(settings, registry, SystemClock())
        monitor = Monitor(process, settings.watchdog.stuck_s, SystemClock())
        health = HealthServer(settings.repair.health_port, process.reasons, monitor=monitor).start()
        on_request_to_end_loop(asyncio.get_running_loop(), process.stop)
        try:
            await process.run()
        finally:
            health.stop()


def main() -> int:
    """Entry point; the exit code."""
    try:
        settings = load_settings()
        setup_logging(settings.log_level, as_json=settings.log_json)
        asyncio.run(repair(settings))
    except MarketstreamError as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
