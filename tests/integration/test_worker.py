"""The Faust worker on a real broker: the same bytes as the plain loop, whatever joins, leaves, is lost or is poisoned."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition

from infra.kafka import FrameProducer, committed_offsets, consumer_config, end_offsets
from infra.kafka_lag import KafkaLag
from infra.progress import worker_offsets
from infra.provision import provision
from infra.registry_client import RegistryClient
from infra.seam import SystemClock
from infra.settings import Settings
from infra.stack.kafka import free_ports
from infra.worker import BarWork, bar_codecs, bar_config, build_runner
from schemas.codec import RowCodec
from streams import plain_loop
from streams.records import OutRecord
from streams.runner import BarRunner
from tests.integration.conftest import RunningStack
from tests.performance import market
from tests.streams.test_state_store import MemoryLog

ROOT = Path(__file__).resolve().parents[2]
OUTPUTS = ("bars", "bars.rows")


@pytest.fixture
def settings(stack: RunningStack, topic_prefix: str) -> Settings:
    """Topics, schemas and consumer groups of this test alone."""
    found = stack.with_prefix(
        topic_prefix,
        MARKETSTREAM_CLICKHOUSE_DATABASE="worker_test",
        MARKETSTREAM_WORKER_SNAPSHOT_INTERVAL_S="0.2",
    )
    provision(found)
    return found


@contextmanager
def worker(settings: Settings, index: int = 0, module: str = "infra.worker") -> Iterator[subprocess.Popen[bytes]]:
    """A worker process, stopped with SIGTERM at the end."""
    log = settings.data_dir / f"test-{settings.kafka.topic_prefix}{index}.log"
    with log.open("ab") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", module, "--index", str(index)],
            env={**os.environ, **settings.as_environ(), "MARKETSTREAM_PORT_WORKER": str(free_ports(1)[0] - index)},
            cwd=ROOT,
            stdout=out,
            stderr=out,
        )
        try:
            yield child
        finally:
            child.terminate()
            child.wait(20)


async def publish(settings: Settings, frames: list[tuple[int, bytes]]) -> None:
    """Send encoded records to ``trades``."""
    with RegistryClient.from_settings(settings) as registry:
        producer = FrameProducer(settings.kafka, registry)
        for partition, value in frames:
            await producer.send_raw("trades", partition, None, value)
        await producer.flush()


async def wait_done(settings: Settings, timeout_s: float = 60) -> None:
    """Return when every trades record has its bars record."""
    ends = end_offsets(settings.kafka, ["trades"])["trades"]
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        done = await asyncio.to_thread(worker_offsets, settings)
        if all(done[partition][0] >= end - 1 for partition, end in ends.items()):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"the worker is at {done}, trades ends at {ends}")


def messages(settings: Settings, topic: str) -> list[Any]:
    """Every consumed message of a topic, by partition and offset."""
    found = []
    consumer = Consumer(consumer_config(settings.kafka, "test-reader", **{"enable.partition.eof": True}))
    try:
        for partition, end in end_offsets(settings.kafka, [topic])[topic].items():
            consumer.assign([TopicPartition(settings.kafka.topic_prefix + topic, partition, 0)])
            while end:
                message = consumer.poll(10)
                assert message is not None
                if message.error():
                    break
                found.append(message)
                if message.offset() == end - 1:
                    break
    finally:
        consumer.close()
    return found


def records(settings: Settings, topic: str) -> list[OutRecord]:
    """Everything a topic holds, by partition and offset."""
    return [OutRecord(topic, message.partition(), message.key(), message.value()) for message in messages(settings, topic)]


class Recorder:
    """Takes what a runner sends, in order."""

    def __init__(self) -> None:
        self.sent: list[OutRecord] = []

    async def send_raw(self, topic_name: str, partition: int, key: bytes | None, value: bytes) -> None:
        """Keep the record."""
        self.sent.append(OutRecord(topic_name, partition, key, value))

    async def wait_acknowledged(self) -> None:
        """Everything kept is acknowledged."""

    def poll(self) -> None:
        """Nothing is under way."""


async def expected(settings: Settings) -> dict[str, list[OutRecord]]:
    """What the plain confluent-kafka loop makes of the same topic."""
    recorder = Recorder()
    with RegistryClient.from_settings(settings) as registry:
        runner = BarRunner(
            config=bar_config(settings),
            codecs=bar_codecs(registry),
            sender=recorder,
            open_log=lambda _: MemoryLog(),
            emitted_offset=lambda _: -1,
            clock=SystemClock(),
        )
        await plain_loop.run(runner, messages(settings, "trades"))
    result: dict[str, list[OutRecord]] = {name: [] for name in (*OUTPUTS, "quality", "quarantine", "deadletter")}
    for record in recorder.sent:
        result.setdefault(record.topic, []).append(record)
    return result


def encoded(settings: Settings, count: int = 20_000, rows_per_frame: int = 200) -> list[tuple[int, bytes]]:
    """Trades of 50 symbols as encoded frames."""
    keys, columns = market.trades(count, 50, per_second=500)
    with RegistryClient.from_settings(settings) as registry:
        codec = registry.frame_codec("trades")
    return [
        (partition, codec.encode(frame))
        for partition, frame in market.frames(keys, columns, partitions=settings.kafka.partitions, rows_per_frame=rows_per_frame)
    ]


async def check_outputs(settings: Settings) -> None:
    """The topics hold exactly the expected records, each once and in order."""
    wanted = await expected(settings)
    assert records(settings, "bars") == wanted["bars"]
    # a twin may be sent again after a crash; it is compacted by key, so what counts is the last of each key and that none is foreign
    rows = records(settings, "bars.rows")
    assert {record.key: record.value for record in rows} == {record.key: record.value for record in wanted["bars.rows"]}
    assert set(rows) == set(wanted["bars.rows"])
    # scores and suspects may be told again after a crash, each with the offset it came from; by that the sink knows them
    for topic in ("quality", "quarantine"):
        assert list(dict.fromkeys(records(settings, topic))) == wanted[topic]
    assert wanted["quality"]


async def test_faust_and_the_plain_loop_give_the_same_bytes(settings: Settings) -> None:
    """Bars, rows and their order are equal byte for byte."""
    frames = encoded(settings)
    await publish(settings, frames)
    with worker(settings):
        await wait_done(settings)
    await check_outputs(settings)


async def test_a_worker_stopped_and_started_goes_on_where_it_was(settings: Settings) -> None:
    """SIGTERM takes a last snapshot within 5 s; the next worker processes nothing twice."""
    frames = encoded(settings)
    half = len(frames) // 2
    await publish(settings, frames[:half])
    with worker(settings) as first:
        await wait_done(settings)
        started = time.monotonic()
        first.terminate()
        assert first.wait(10) == 0
        assert time.monotonic() - started < 5
    await publish(settings, frames[half:])
    with worker(settings):
        await wait_done(settings)
    await check_outputs(settings)


async def test_workers_that_join_and_leave_change_no_byte(settings: Settings) -> None:
    """One, then two, then one worker, with rebalances in the middle of the stream (pitfalls 14, 15, 16)."""
    frames = encoded(settings)
    third = len(frames) // 3
    with worker(settings, 0) as first:
        await publish(settings, frames[:third])
        await wait_done(settings)
        with worker(settings, 1):
            for start in range(third, 2 * third, 20):
                await publish(settings, frames[start : min(start + 20, 2 * third)])
                await asyncio.sleep(0.1)
            await wait_done(settings)
            first.terminate()
            first.wait(20)
            await publish(settings, frames[2 * third :])
            await wait_done(settings)
    await check_outputs(settings)


async def test_a_poison_record_is_dead_lettered_and_stops_nothing(settings: Settings) -> None:
    """Garbage, a foreign schema id and a bad row each become a letter with place and reason (pitfall 2)."""
    frames = encoded(settings, 2_000)
    poison = [(0, b"garbage"), (0, b"\0\0\0\xff\xff" + frames[0][1][5:]), (0, b"")]
    mixed = frames[:10] + poison + frames[10:]
    await publish(settings, mixed)
    with worker(settings):
        await wait_done(settings)
    await check_outputs(settings)
    with RegistryClient.from_settings(settings) as registry:
        codec: RowCodec = registry.row_codec("deadletter")
    letters = [codec.decode(record.value) for record in records(settings, "deadletter")]
    assert [letter["raw"] for letter in letters] == [value for _, value in poison]
    assert {(letter["reason"], letter["topic"], letter["partition"]) for letter in letters} == {("undecodable_frame", "trades", 0)}
    assert "65535" in letters[1]["detail"]


async def test_offsets_committed_ahead_of_the_state_lose_nothing(settings: Settings) -> None:
    """When the group's committed offsets are beyond the snapshot, the worker goes back to its state (pitfalls 3, 4, 5)."""
    frames = encoded(settings, 5_000)
    await publish(settings, frames)
    consumer = Consumer(consumer_config(settings.kafka, "marketstream-bars"))
    ends = end_offsets(settings.kafka, ["trades"])["trades"]
    consumer.commit(
        offsets=[TopicPartition(f"{settings.kafka.topic_prefix}trades", partition, end - 3) for partition, end in ends.items()],
        asynchronous=False,
    )
    consumer.close()
    with worker(settings):
        await wait_done(settings)
    await check_outputs(settings)


async def test_input_is_committed_only_behind_a_snapshot(settings: Settings) -> None:
    """The committed offset never passes what the newest snapshot covers, and reaches it when the stream is quiet."""
    frames = encoded(settings, 5_000)
    await publish(settings, frames)
    ends = end_offsets(settings.kafka, ["trades"])["trades"]
    with worker(settings):
        await wait_done(settings)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            committed = committed_offsets(settings.kafka, "marketstream-bars", ["trades"])["trades"]
            if committed == ends:
                break
            await asyncio.sleep(0.2)
    assert committed == ends


async def test_records_wait_for_a_worker_that_never_joins_its_group(settings: Settings) -> None:
    """So its watchdog ends it; one that joined and was given nothing is idle."""
    with RegistryClient.from_settings(settings) as registry:
        work = BarWork(build_runner(settings, registry), KafkaLag(settings.kafka), settings.kafka.partitions)
    assert (await asyncio.to_thread(work.waiting)).count == 0
    frames = encoded(settings, count=2_000)
    await publish(settings, frames)
    assert (await asyncio.to_thread(work.waiting)).count == len(frames)
    work.partitions = frozenset()
    assert (await asyncio.to_thread(work.waiting)).count == 0
