"""Parity: a recorded run in, its trades replayed from the topic through the worker's own code, and every bar compared, out.

Partition by partition the trades stream through a fresh ``BarShard`` (from the first record the topic still holds, so that the state is
right) beside the ``bars`` the live run published; the stored rows are compared with the topic on the way. What the repair published is compared
with bars made anew from the stored trades. Nothing is written to any topic.
"""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Callable, Mapping, Set
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from infra import offsets
from infra.clickhouse.client import connect
from infra.kafka import committed_offsets
from infra.parity_compare import Comparison, LiveRecord
from infra.parity_findings import Findings, merge
from infra.parity_outputs import OutputFindings, Outputs
from infra.parity_reader import Stretch
from infra.parity_repaired import RepairedFindings, total
from infra.parity_repaired_store import MOST_DIFFERENCES, Day, Look, RepairedDays, RepairedReader, check_days
from infra.parity_repairs import Job, answers, explain, load_jobs
from infra.parity_rows import Difference, RowKey
from infra.parity_store import StoreComparison, StoreFindings
from infra.parity_topics import check_outputs, check_twins
from infra.parity_twins import TwinBook
from infra.progress import SINK_GROUP, worker_offsets
from infra.registry_client import RegistryClient
from infra.runs import TOPICS_OF_A_RUN, Run
from infra.seam import SystemClock
from infra.settings import Settings, load_settings
from infra.worker import bar_codecs, bar_config
from schemas.codec import decode_learning
from schemas.seam import Clock
from schemas.symbols import parse_key
from streams.bar_shard import BarShard
from streams.row_twin import RowTwin

_TELL_RECORDS: Final = 500
_WAIT_S: Final = 15.0
"""How long a run that still goes is waited for, until worker and sink are where its topics stood when we looked."""
_STILL_S: Final = 2.0
"""Worker and sink that have not moved for so long are not waited for: nothing runs, or nothing is left to do."""
_POLL_S: Final = 0.2
_LOOK_AGAIN_S: Final = 5.0
"""Repaired bars that differ are looked at twice: what came too late a moment ago has its job within 2 s."""
_US: Final = 1_000_000
_DAY_US: Final = 86_400 * _US
Tell = Callable[[int, int, int], None]
"""Called with (trades records done, to do, trades done)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a parity came to."""

    run: Run
    findings: list[Findings]
    store: list[StoreFindings]
    outputs: list[OutputFindings]
    """What the worker publishes beside bars, by topic."""
    settings: Mapping[str, str]
    """What decides which bars a worker makes, as the run had it."""
    replayed: Mapping[int, tuple[int, int, int]]
    """Partition -> (first trades record replayed, first of the run, end of the run)."""
    not_retained: int
    """Trades records of the run that the topics no longer hold; their bars cannot be compared."""
    seconds: float
    finished_us: int
    repaired: RepairedFindings = field(default_factory=RepairedFindings)
    """The bars that the repair published, beside those of the trades stored."""

    @property
    def unexplained(self) -> int:
        """Rows and records that nothing explains, in the topics and in ClickHouse: 0 is the promise."""
        return sum(part.unexplained for part in self._parts)

    @property
    def differences(self) -> list[Difference]:
        """Those that are kept to be shown."""
        return [item for part in self._parts for item in part.differences]

    @property
    def _parts(self) -> list[Findings | StoreFindings | RepairedFindings | OutputFindings]:
        return [*self.findings, *self.store, self.repaired, *self.outputs]

    @property
    def trades_per_s(self) -> float:
        """Replayed and compared."""
        return sum(part.trades for part in self.findings) / max(self.seconds, 1e-6)

    def value(self) -> dict[str, Any]:
        """For JSON and the certificate."""
        sums = merge(self.findings)
        partitions = []
        for part in self.findings:
            entry = asdict(part) | {"explained": dict(part.explained), "differences": [item.value() for item in part.differences]}
            entry["by_timeframe"] = {seconds: dict(counts) for seconds, counts in sorted(part.by_timeframe.items())}
            entry["replayed_from"], entry["first"], entry["stop"] = self.replayed[part.partition]
            partitions.append(entry)
        store = [asdict(part) | {"differences": [item.value() for item in part.differences]} for part in self.store]
        return {
            "run": self.run.value() | {"settings": dict(self.settings)},
            "verdict": "parity" if self.unexplained == 0 else "difference",
            "unexplained": self.unexplained,
            "bars": sums,
            "not_retained_records": self.not_retained,
            "clickhouse": {name: sum(getattr(part, name) for part in self.store) for name in ("rows", "equal", "pending", "unexplained")},
            "repaired": self.repaired.value(),
            "outputs": [part.value() for part in self.outputs],
            "partitions": partitions,
            "clickhouse_partitions": store,
            "seconds": round(self.seconds, 3),
            "trades_per_s": round(self.trades_per_s),
            "finished_us": self.finished_us,
            "machine": {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()},
        }


async def check(settings: Settings, run: Run, *, tell: Tell = lambda *_: None, clock: Clock | None = None) -> Report:
    """Replay ``run`` and compare. Raises UnreachableError when a server does not answer."""
    clock = clock or SystemClock()
    run, until_us = await _settled(settings, run, clock)
    jobs = await load_jobs(settings)
    report, touched = await asyncio.to_thread(_check, settings, run, until_us, explain(jobs), tell, clock)
    repaired = await _repaired(settings, touched, clock)
    return replace(report, repaired=repaired, finished_us=clock.now_us())


async def _repaired(settings: Settings, touched: RepairedDays, clock: Clock) -> RepairedFindings:
    """What the repair published beside the bars of the trades."""
    found = await asyncio.to_thread(_check_days, settings, touched, touched.days, await load_jobs(settings), clock)
    wrong = {day for day, part in found.items() if part.unexplained}
    if wrong:
        await clock.sleep(_LOOK_AGAIN_S)
        found |= await asyncio.to_thread(_check_days, settings, touched, wrong, await load_jobs(settings), clock)
    return total([RepairedFindings(pending=touched.unstored), *found.values()], MOST_DIFFERENCES)


def _check_days(settings: Settings, touched: RepairedDays, days: Set[Day], jobs: list[Job], clock: Clock) -> dict[Day, RepairedFindings]:
    if not days:
        return {}
    ttl_us = settings.clickhouse.trades_ttl_days * _DAY_US
    with closing(connect(settings.clickhouse)) as client:

        def reader(day: Day, known_at_us: int | None) -> RepairedReader:
            pair = parse_key(day.instrument)
            return RepairedReader(client, pair.exchange, pair.symbol, settings.repair.page_rows, known_at_us)

        look = Look(
            reader=reader,
            answers=answers(jobs),
            stretches=touched.stretches,
            kept_from_us=clock.now_us() - ttl_us + _DAY_US if ttl_us else 0,  # a day: bars at the edge have lost part of their trades
        )
        return check_days(look, days)


async def _settled(settings: Settings, run: Run, clock: Clock) -> tuple[Run, int]:
    """The run once worker and sink have come to its end, or stand still, and a time before which all it published is in it.

    What is missing then counts as pending.
    """
    began_us = moved_us = clock.monotonic_us()
    before: Any = None
    while clock.monotonic_us() < min(began_us + int(_WAIT_S * _US), moved_us + int(_STILL_S * _US)):
        done = await asyncio.to_thread(worker_offsets, settings)
        stored = (await asyncio.to_thread(committed_offsets, settings.kafka, SINK_GROUP, ["bars"]))["bars"]
        behind = any(done[place][0] + 1 < end and run.start["trades"][place] < end for place, end in run.end["trades"].items())
        newest = {place: done[place][1] if run.state == "running" else 0 for place in stored}
        unstored = any(max(stored[place], 0) < max(end, newest[place]) for place, end in run.end["bars"].items())
        if not behind and not unstored:
            break
        if (done, stored) != before:
            before, moved_us = (done, stored), clock.monotonic_us()
        await clock.sleep(_POLL_S)
    now_us = clock.now_us()
    if run.state != "running":
        return run, now_us
    # the bars of its last trades came after we looked
    _, high = await asyncio.to_thread(offsets.bounds, settings.kafka, ["bars"])
    return replace(run, end={**run.end, "bars": high["bars"]}), now_us


def _check(
    settings: Settings, run: Run, until_us: int, reason: Callable[[RowKey], str | None], tell: Tell, clock: Clock
) -> tuple[Report, RepairedDays]:
    started_us = clock.monotonic_us()
    with RegistryClient.from_settings(settings) as registry, closing(connect(settings.clickhouse)) as client:
        work = _Replay(settings, run, registry, client, reason, tell)
        for partition in sorted(run.end["trades"]):
            work.partition(partition)
        outputs = [] if work.outputs.full else check_outputs(settings, run, registry, work.outputs, work.covered)
        outputs.append(check_twins(settings, run, registry, client, work.twins, work.turned, until_us))
    report = Report(
        run=run,
        findings=work.findings,
        store=work.stores,
        outputs=outputs,
        settings=run.worker_settings(),
        replayed=work.replayed,
        not_retained=work.lost,
        seconds=(clock.monotonic_us() - started_us) / 1e6,
        finished_us=clock.now_us(),
    )
    return report, work.repaired


class _Replay:
    """Replays the partitions of a run, one after the other."""

    def __init__(
        self,
        settings: Settings,
        run: Run,
        registry: RegistryClient,
        client: Any,
        reason: Callable[[RowKey], str | None],
        tell: Tell,
    ) -> None:
        self.findings: list[Findings] = []
        self.stores: list[StoreFindings] = []
        self.outputs = Outputs()
        self.repaired = RepairedDays()
        self.twins: list[TwinBook] = []
        self.replayed: dict[int, tuple[int, int, int]] = {}
        self.covered: dict[int, tuple[int, int]] = {}
        """Partition -> trades whose outputs beside bars can be compared."""
        self.turned: dict[int, tuple[int, int]] = {}
        """Partition -> trades of the run that it has turned into bars."""
        self.lost = 0
        self._settings, self._run, self._registry, self._client = settings, run, registry, client
        self._reason, self._tell = reason, tell
        self._low, self._high = offsets.bounds(settings.kafka, TOPICS_OF_A_RUN)
        self._stored = committed_offsets(settings.kafka, SINK_GROUP, ["bars"])["bars"]
        self._config = bar_config(load_settings({}, overrides=run.worker_settings()))
        self._codecs = bar_codecs(registry)
        self._done = self._trades = 0
        self._total = sum(max(end - self._low["trades"][place], 0) for place, end in run.end["trades"].items())

    def partition(self, partition: int) -> None:
        """Replay and compare one partition."""
        run, low, stop = self._run, self._low["trades"][partition], self._run.end["trades"][partition]
        begin = max(self._low["bars"][partition], run.start["bars"][partition])
        first = max(low, run.start["trades"][partition])
        if begin > run.start["bars"][partition]:
            first = max(first, _first_input(self._settings, self._registry, partition, begin, self._high["bars"][partition]))
        first = min(first, stop)
        self.lost += max(first - run.start["trades"][partition], 0)
        self.replayed[partition] = (low, first, stop)
        store = StoreComparison(self._client, partition, self._stored[partition], run.end["bars"][partition])
        note = self.repaired.begin(partition, begin, run.end["bars"][partition], self._stored[partition])

        twins = TwinBook(partition, RowTwin(self._codecs.rows), run.end["bars"][partition])
        self.twins.append(twins)

        def on_live(live: LiveRecord) -> None:
            store.take(live)
            note(live)
            twins.take(live)

        with Stretch(self._settings, "bars", partition, begin, self._high["bars"][partition]) as live:
            comparison = Comparison(
                BarShard(partition, self._config, self._codecs),
                self._codecs,
                iter(live),
                first=first,
                stop=stop,
                whole=low == 0,
                bars_stop=run.end["bars"][partition],
                explain_repair=self._reason,
                on_live=on_live,
                on_made=lambda input_offset, out: self.outputs.take(input_offset, out, partition),
            )
            taken = self._feed(comparison, partition, low, stop)
            found = comparison.finish(pending=max(stop - max(taken, first), 0))
        self.findings.append(found)
        self.stores.append(store.flush())
        self._trades += found.trades
        self.turned[partition] = (first, stop - found.pending)
        if low == 0:  # without the first trades the scores are other ones
            self.covered[partition] = self.turned[partition]

    def _feed(self, comparison: Comparison, partition: int, low: int, stop: int) -> int:
        """Replay the trades ``[low, stop)``, as far as the run came; offset after the last one taken."""
        taken = low
        with Stretch(self._settings, "trades", partition, low, stop) as trades:
            for record in trades:
                taken = record.offset + 1
                self._done += 1
                if not comparison.take(record):
                    break
                if self._done % _TELL_RECORDS == 0:
                    self._tell(self._done, self._total, self._trades + comparison.findings.trades)
        return taken


def _first_input(settings: Settings, registry: RegistryClient, partition: int, begin: int, stop: int) -> int:
    """Offset of the trades that the first worker record from ``begin`` on was made of."""
    codec = registry.frame_codec("bars")
    with Stretch(settings, "bars", partition, begin, stop) as records:
        for record in records:
            input_offset = decode_learning(codec, record.value, registry.schema).input_offset
            if input_offset >= 0:
                return input_offset
    return 0
