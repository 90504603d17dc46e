"""Entry point of the bar worker: ``python -m infra.worker [--index I]``. Puts the Faust app on its broker, state log and health server."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from typing import Any, Final

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from prometheus_client import Counter, Gauge

from infra.ending import end_within
from infra.errors import MarketstreamError
from infra.health import HealthServer
from infra.kafka import FrameProducer, consumer_config, producer_config, unreachable
from infra.kafka_lag import KafkaLag
from infra.logs import setup_logging
from infra.newest_bars import newest_worker_bars
from infra.registry_client import RegistryClient
from infra.seam import SYSTEM, SystemClock
from infra.settings import Settings, load_settings
from infra.watchdog import Monitor, Waiting
from processors.bars import BarConfig
from schemas.topics import TOPICS
from streams.bar_shard import BarCodecs
from streams.quality_records import QualityCodecs
from streams.runner import BarRunner

logger = logging.getLogger(__name__)

_TIMEOUT_S: Final = 10.0
_STUCK_AFTER_S: Final = 30.0
_SWITCH_S: Final = 0.0005

TRADES = Counter("worker_trades_total", "Trades turned into bars")
HELD = Counter("worker_held_trades_total", "Suspect trades held back from the bars")
APPLIED = Gauge("worker_applied_offset", "Offset of the newest trades record in the state", ["partition"])
WATERMARK = Gauge("worker_watermark_seconds", "Watermark of the partition, seconds since the epoch", ["partition"])


class KafkaStateLog:
    """`streams.state_store.StateLog` on one partition of ``bars.state``. Blocking; used from worker threads."""

    def __init__(self, settings: Settings, partition: int, producer: Producer) -> None:
        self._settings = settings.kafka
        self._topic = TOPICS["bars.state"].full_name(settings.kafka.topic_prefix)
        self._partition = partition
        self._producer = producer

    def append(self, key: bytes, value: bytes) -> int:
        """Send and wait for the acknowledgement."""
        done: list[Any] = []
        self._producer.produce(self._topic, value, key, self._partition, on_delivery=lambda error, message: done.append((error, message)))
        while not done:
            self._producer.poll(0.05)
        error, message = done[0]
        if error is not None:
            raise unreachable(self._settings, KafkaException(error))
        return int(message.offset())

    def bounds(self) -> tuple[int, int]:
        """Oldest offset and the one after the newest."""
        consumer = Consumer(consumer_config(self._settings, "state"))
        try:
            low, high = consumer.get_watermark_offsets(TopicPartition(self._topic, self._partition), timeout=_TIMEOUT_S, cached=False)
        except KafkaException as exc:
            raise unreachable(self._settings, exc) from exc
        finally:
            consumer.close()
        return low, high

    def read(self, start: int, stop: int) -> list[tuple[int, bytes, bytes]]:
        """Records in ``[start, stop)`` that are still there."""
        consumer = Consumer(consumer_config(self._settings, "state", **{"enable.partition.eof": True}))
        found: list[tuple[int, bytes, bytes]] = []
        try:
            consumer.assign([TopicPartition(self._topic, self._partition, start)])
            while True:
                message = consumer.poll(_TIMEOUT_S)
                if message is None:
                    raise unreachable(self._settings, TimeoutError(f"no answer reading {self._topic}[{self._partition}] at {start}"))
                if message.error() or message.offset() >= stop:
                    break
                found.append((message.offset(), message.key() or b"", message.value() or b""))
                if message.offset() == stop - 1:
                    break
        except KafkaException as exc:
            raise unreachable(self._settings, exc) from exc
        finally:
            consumer.close()
        return found


def bar_codecs(registry: RegistryClient) -> BarCodecs:
    """The codecs a bar shard needs, with the ids of this registry."""
    return BarCodecs(
        trades=registry.frame_codec("trades"),
        bars=registry.frame_codec("bars"),
        rows=registry.row_codec("bars.rows"),
        deadletter=registry.row_codec("deadletter"),
        fetch_schema=registry.schema,
        quality=QualityCodecs(quality=registry.frame_codec("quality"), quarantine=registry.frame_codec("quarantine")),
    )


def bar_config(settings: Settings) -> BarConfig:
    """The bar settings of this stack."""
    return BarConfig(timeframes=settings.worker.timeframes, live_interval_us=settings.worker.live_update_ms * 1000)


def build_runner(settings: Settings, registry: RegistryClient) -> BarRunner:
    """The runner over this stack's broker. Call it on the event loop that will run it."""
    codecs = bar_codecs(registry)
    state_producer = Producer(producer_config(settings.kafka))

    def emitted_offset(partition: int) -> int:
        newest = newest_worker_bars(settings.kafka, registry, codecs.bars, partition)
        return -1 if newest is None else newest.input_offset

    return BarRunner(
        config=bar_config(settings),
        codecs=codecs,
        sender=FrameProducer(settings.kafka, registry),
        open_log=lambda partition: KafkaStateLog(settings, partition, state_producer),
        emitted_offset=emitted_offset,
        clock=SystemClock(),
    )


class BarWork:
    """`infra.watchdog.Work` of a worker: the applied offsets of its partitions against the ends of ``trades``."""

    verb = "applied"

    def __init__(self, runner: BarRunner, lag: KafkaLag, partitions: int) -> None:
        self._runner, self._lag = runner, lag
        self.partitions: frozenset[int] = frozenset(range(partitions))
        """What the group gave it; until it has, any may wait for this worker: one that never joins must not wait for ever."""

    def done(self) -> int:
        """See Work.done."""
        return sum(shard.applied_offset + 1 for shard in list(self._runner.shards.values()))

    def waiting(self) -> Waiting:
        """See Work.waiting."""
        applied = {partition: shard.applied_offset + 1 for partition, shard in list(self._runner.shards.items())}
        return self._lag.waiting({("trades", partition): applied.get(partition) for partition in self.partitions | applied.keys()})


def _reasons(runner: BarRunner, progress: dict[str, float]) -> dict[str, str]:
    if not progress["assigned"]:
        return {"kafka": "The worker has no partitions yet: it waits for its consumer group."}
    if SYSTEM.monotonic_s() - progress["beat"] > _STUCK_AFTER_S:
        return {"loop": f"The worker's event loop has not run for {_STUCK_AFTER_S:.0f} s."}
    for partition, shard in list(runner.shards.items()):
        APPLIED.labels(partition).set(shard.applied_offset)
        WATERMARK.labels(partition).set(shard.watermark_us / 1e6)
    return {}


def run(settings: Settings, index: int) -> int:
    """Run the worker until SIGTERM; its exit code."""
    import faust  # here, not at the top: it costs 0.6 s, and a settings error should not wait for it

    from streams.app import AppConfig, create_app
    from streams.group_client import wait_for_metadata

    wait_for_metadata()
    registry = RegistryClient.from_settings(settings)
    # Faust's consumer runs in a thread of its own; at the default of 5 ms a frame waits that long for the interpreter at every hand-over
    sys.setswitchinterval(_SWITCH_S)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    runner = build_runner(settings, registry)
    config = AppConfig(
        bootstrap=settings.kafka.bootstrap,
        topic_prefix=settings.kafka.topic_prefix,
        instance_id=f"{settings.kafka.topic_prefix}bars-{index}",
        session_timeout_s=settings.worker.session_timeout_s,
        snapshot_interval_s=settings.worker.snapshot_interval_s,
        folder=str(settings.data_dir / "faust"),
    )
    app = create_app(config, runner)
    progress = {"assigned": 0.0, "beat": SYSTEM.monotonic_s()}
    counted = {"trades": 0, "held": 0}
    work = BarWork(runner, KafkaLag(settings.kafka), settings.kafka.partitions)

    @app.on_partitions_assigned.connect
    async def assigned(_: Any, partitions: Any, **__: Any) -> None:
        progress["assigned"] = SYSTEM.monotonic_s()
        work.partitions = frozenset(place.partition for place in partitions)

    @app.timer(interval=1.0, name="beat")
    async def beat() -> None:
        progress["beat"] = SYSTEM.monotonic_s()
        total = sum(shard.trade_count for shard in runner.shards.values())
        TRADES.inc(max(total - counted["trades"], 0))
        counted["trades"] = total
        held = sum(shard.held_count for shard in runner.shards.values())
        HELD.inc(max(held - counted["held"], 0))
        counted["held"] = held

    monitor = Monitor(work, settings.watchdog.stuck_s, SystemClock())
    health = HealthServer(settings.worker.health_port + index, lambda: _reasons(runner, progress), monitor=monitor).start()

    class Worker(faust.Worker):  # type: ignore[misc]  # Faust has no types
        """Ends in time although Faust waits for a broker that is away: outputs not acknowledged are in no snapshot, and made again."""

        def _schedule_shutdown(self, signal: Any) -> None:
            if not self._signal_stop_time:
                end_within()
            super()._schedule_shutdown(signal)

    worker = Worker(app, loop=loop, loglevel=settings.log_level, redirect_stdouts=False, quiet=True, override_logging=False)
    try:
        worker.execute_from_commandline()
    except SystemExit as exc:
        return int(exc.code or 0)
    finally:
        health.stop()
        registry.close()
    return 0


def main() -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(description="Marketstream bar worker")
    parser.add_argument("--index", type=int, default=0, help="number of this worker; its health port and static member id follow from it")
    arguments = parser.parse_args()
    try:
        settings = load_settings()
        setup_logging(settings.log_level, as_json=settings.log_json)
        return run(settings, arguments.index)
    except MarketstreamError as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code


if __name__ == "__main__":
    sys.exit(main())
