"""Replays a recorded file into a running stack: file in, topic ``trades`` out; returns when ClickHouse holds its trades and bars.

Everything that reads and cuts is in ``collectors.replay``; here are Kafka, the waiting and the sentence for the operator.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from collectors.replay.errors import ReplayError
from collectors.replay.feed import Replay, ReplayStats
from collectors.replay.pacing import parse_speed
from collectors.replay.rows import Rejected
from infra.clickhouse.client import connect, unreachable
from infra.errors import InputFileError, MarketstreamError, SettingsError
from infra.kafka import FrameProducer, end_offsets
from infra.kafka import unreachable as kafka_unreachable
from infra.progress import NotStoredError, wait_stored, worker_offsets
from infra.registry_client import RegistryClient
from infra.replay_overlap import heal
from infra.seam import SystemClock
from infra.settings import Settings
from schemas.errors import SchemaError
from schemas.partitions import partition_of
from schemas.seam import Clock
from schemas.symbols import Instrument, check_exchange, check_symbol
from streams.deadletters import dead_letter

_PROGRESS_US: Final = 200_000
_CHECK_FRAMES: Final = 4_000
"""Frames between two looks at how far the worker is: 16 M trades, a few seconds."""
_MAX_BACKLOG_FRAMES: Final = 12_000
"""48 M trades, 2 GB in the topic: well inside its retention of 8 GiB a partition, so nothing is deleted before the worker has read it."""
_STALL_S: Final = 120.0
"""Without any progress of worker and sink for this long the replay gives up waiting; what it published stays in Kafka."""


_END_TIMEOUT_S: Final = 5.0
_KNOCK_S: Final = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayProgress:
    """Where a replay is, five times a second."""

    stage: str
    """``publishing`` or ``storing``."""
    rows: int
    """Rows read."""
    published: int
    position_bytes: int
    """Of the file on disk."""
    size_bytes: int
    rows_per_s: float
    missing: Mapping[str, int] = field(default_factory=dict)
    """While storing: records each stage still has to process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplaySummary:
    """What became of a file: ``rows == published + duplicates + deadlettered``."""

    path: str
    format: str
    source: str
    rows: int
    published: int
    duplicates: int
    deadlettered: int
    reasons: Mapping[str, int]
    """Dead-lettered rows by reason."""
    skipped: int
    """Trades of other symbols of a capture."""
    late: int
    """Published rows that came after a watermark beyond their time."""
    first_id: int
    last_id: int
    first_time_us: int
    last_time_us: int
    bars: int
    """Bars of all timeframes that these trades made or changed, in ClickHouse."""
    seconds: float
    """From the first byte read to everything stored."""
    rows_per_s: float
    """Rows read a second, to the last acknowledged frame."""


class TruncatedFileError(InputFileError):
    """The file ends early; what could be read is published and stored, ``summary`` says what."""

    def __init__(self, message: str, summary: ReplaySummary) -> None:
        super().__init__(message)
        self.summary = summary


class LostRowsError(MarketstreamError):
    """Rows read and rows accounted for differ: a bug, never the file's fault."""


async def replay_file(
    settings: Settings,
    path: Path,
    *,
    exchange: str,
    symbol: str,
    format: str = "auto",
    speed: str | float | None = "max",
    strict: bool = False,
    progress: Callable[[ReplayProgress], None] | None = None,
    clock: Clock | None = None,
) -> ReplaySummary:
    """Publish the trades of ``path`` and wait until they and their bars are stored.

    Args:
        settings: where the stack is.
        path: a dump, capture or export; see ``collectors.replay.detect.FORMATS``.
        exchange: whose trades they are.
        symbol: canonical symbol; of a capture of many it selects.
        format: ``auto`` or one of ``FORMATS``.
        speed: ``max`` (or None), or exchange seconds a second.
        strict: refuse a file with bad rows, before anything is published, instead of dead-lettering them.
        progress: called five times a second.
        clock: time and sleep.

    Raises:
        SettingsError: unknown exchange, symbol, format or speed.
        InputFileError: not a file that can be replayed, nothing was published; as TruncatedFileError: it ends early and what came
            before the end is published and stored.
        UnreachableError: Kafka, the registry or ClickHouse does not answer.
        NotStoredError: worker or sink made no progress for two minutes; what was published is safe in Kafka.
    """
    run = _Run(settings, clock or SystemClock(), progress)
    try:
        instrument = Instrument(check_exchange(exchange), check_symbol(symbol))
        rate = parse_speed(speed)
        replay = await asyncio.to_thread(
            Replay, path, instrument, format_name=format, speed=rate, clock=run.clock, on_rejected=run.dead_letters
        )
        if strict:
            await asyncio.to_thread(replay.refuse_bad_rows)
        return await run.run(replay)
    except ReplayError as exc:
        raise InputFileError(str(exc)) from exc
    except (SchemaError, ValueError) as exc:
        raise SettingsError(str(exc)) from exc


class _Run:
    """One replay: its producer, its clock and how it tells where it is."""

    def __init__(self, settings: Settings, clock: Clock, progress: Callable[[ReplayProgress], None] | None) -> None:
        self.clock = clock
        self._settings = settings
        self._progress = progress
        self._told_us = 0
        self._started_us = 0
        self._replay: Replay
        self._producer: FrameProducer

    async def run(self, replay: Replay) -> ReplaySummary:
        """Publish, wait, count."""
        self._replay = replay
        await _knock(self._settings)
        before = (await asyncio.to_thread(end_offsets, self._settings.kafka, ["trades"]))["trades"]
        partition = partition_of(replay.instrument.key, self._settings.kafka.partitions)
        self._started_us = self.clock.monotonic_us()
        with RegistryClient.from_settings(self._settings) as registry:
            self._producer = FrameProducer(self._settings.kafka, registry)
            try:
                await self._publish(partition, before[partition])
            except BaseException:  # Ctrl-C too: a source that never ends would hold back its symbol's bars
                await self._producer.send("trades", partition, replay.end_frame())
                await self._producer.flush(_END_TIMEOUT_S)
                raise
            offsets = await self._producer.flush()
            del self._producer  # closes it: an idle one would go on talking to the broker
        published_us = self.clock.monotonic_us()
        stats = replay.stats
        if stats.rows != stats.published + stats.duplicates + stats.rejected:
            raise LostRowsError(f"{replay.reader.path}: {stats} does not add up; please report this file.")
        await self._wait(offsets)
        if stats.published:
            await heal(self._settings, replay.instrument, stats.first_time_us, stats.last_time_us, before[partition], self.clock)
        bars = await asyncio.to_thread(_count_bars, self._settings, replay.instrument, before[partition])
        summary = _summary(replay, bars, published_us - self._started_us, self.clock.monotonic_us() - self._started_us)
        if stats.problem is not None:
            raise TruncatedFileError(str(stats.problem), summary)
        return summary

    async def dead_letters(self, rejected: Sequence[Rejected]) -> None:
        """Publish rejected rows with their reason and place."""
        replay = self._replay
        for item in rejected:
            letter = dead_letter(
                reason=item.reason,
                detail=item.detail,
                component="replay",
                raw=item.raw,
                time_us=item.time_us or self.clock.now_us(),
                exchange=replay.instrument.exchange,
                symbol=replay.instrument.symbol,
                place=f"{replay.reader.path}:{item.line}",
            )
            await self._producer.send_row("deadletter", replay.instrument.key, letter)
            self._tell("publishing")

    async def _publish(self, partition: int, first_offset: int) -> None:
        sent = 0
        async for frame in self._replay.frames():
            await self._producer.send("trades", partition, frame)
            sent += 1
            self._tell("publishing")
            if sent % _CHECK_FRAMES == 0:
                await self._hold_back(partition, first_offset + sent)

    async def _hold_back(self, partition: int, sent_offset: int) -> None:
        """Wait while the worker is too far behind for the topic's retention."""
        while True:
            done, _ = (await asyncio.to_thread(worker_offsets, self._settings))[partition]
            if sent_offset - done <= _MAX_BACKLOG_FRAMES:
                return
            self._tell("publishing", {"worker": sent_offset - done})
            await self.clock.sleep(0.5)

    async def _wait(self, offsets: Mapping[str, Mapping[int, int]]) -> None:
        missing: dict[str, int] = {}

        def on_lag(found: dict[str, int]) -> None:
            missing.update(found)
            self._tell("storing", found)

        left = -1
        while True:
            try:
                return await wait_stored(self._settings, offsets, deadline_s=_STALL_S, on_lag=on_lag)
            except NotStoredError:
                # a long file takes longer than that; no progress is what is wrong
                if 0 <= left <= sum(missing.values()):
                    raise
                left = sum(missing.values())

    def _tell(self, stage: str, missing: Mapping[str, int] | None = None) -> None:
        now = self.clock.monotonic_us()
        if self._progress is None or (now - self._told_us < _PROGRESS_US and stage == "publishing"):
            return
        self._told_us = now
        stats: ReplayStats = self._replay.stats
        reader = self._replay.reader
        self._progress(
            ReplayProgress(
                stage=stage,
                rows=stats.rows,
                published=stats.published,
                position_bytes=reader.position_bytes,
                size_bytes=reader.size_bytes,
                rows_per_s=stats.rows / max((now - self._started_us) / 1e6, 1e-6),
                missing=missing or {},
            )
        )


async def _knock(settings: Settings) -> None:
    """Raises UnreachableError at once when nothing listens at any bootstrap address.

    Asked first: a producer never gives up on a broker that is away, and a consumer fills the terminal for ten seconds before it does.
    """
    refused: OSError = OSError("no address is given")
    for address in settings.kafka.bootstrap.split(","):
        host, _, port = address.strip().rpartition(":")
        try:
            async with asyncio.timeout(_KNOCK_S):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.close()
            return
        except ValueError as exc:
            raise SettingsError(f"MARKETSTREAM_KAFKA_BOOTSTRAP holds '{address}', which is not host:port.") from exc
        except OSError as exc:  # TimeoutError is one
            refused = exc
    raise kafka_unreachable(settings.kafka, OSError(refused.strerror or "no answer"))


def _count_bars(settings: Settings, instrument: Instrument, since_offset: int) -> int:
    client = connect(settings.clickhouse)
    try:
        found = client.query(
            "SELECT uniqExact(timeframe_s, open_time_us) FROM bars"
            " WHERE exchange = {e:String} AND symbol = {s:String} AND input_offset >= {o:Int64}",
            parameters={"e": instrument.exchange, "s": instrument.symbol, "o": since_offset},
        )
    except OSError as exc:
        raise unreachable(settings.clickhouse, exc) from exc
    finally:
        client.close()
    return int(found.result_rows[0][0])


def _summary(replay: Replay, bars: int, publish_us: int, total_us: int) -> ReplaySummary:
    stats = replay.stats
    return ReplaySummary(
        path=str(replay.reader.path),
        format=replay.format,
        source=replay.source,
        rows=stats.rows,
        published=stats.published,
        duplicates=stats.duplicates,
        deadlettered=stats.rejected,
        reasons=dict(stats.reasons),
        skipped=stats.skipped,
        late=stats.late,
        first_id=stats.first_id,
        last_id=stats.last_id,
        first_time_us=stats.first_time_us,
        last_time_us=stats.last_time_us,
        bars=bars,
        seconds=total_us / 1e6,
        rows_per_s=stats.rows / max(publish_us / 1e6, 1e-6),
    )
