"""The spool and the watchdog's questions on a real broker."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from confluent_kafka import KafkaException

from infra.kafka import FrameProducer
from infra.kafka_lag import KafkaLag
from infra.provision import provision
from infra.registry_client import RegistryClient
from schemas.frames import Frame
from tests.integration.conftest import RunningStack
from tests.integration.test_collector_stack import (
    ask,
    assert_whole,
    collector,
    eventually,
    exchange,
    ids_by_symbol,
    published,
    settings_for,
)


@contextmanager
def broker_away(stack: RunningStack) -> Iterator[None]:
    """The broker is stopped: its port is open and nobody answers."""
    found = {status.name: status for status in stack.supervisor.status(check=False)}
    if "kafka" not in found:
        pytest.skip("the broker is not ours to stop")
    process = psutil.Process(found["kafka"].pid)
    process.suspend()
    try:
        yield
    finally:
        process.resume()


async def test_a_full_spool_stops_reading_and_what_was_missed_is_fetched(stack: RunningStack, topic_prefix: str) -> None:
    """A spool of 1 MB is full after seconds: readiness says so, memory stays, and in the end no id is missing."""
    async with exchange(symbols=12, rate=15_000.0) as running:
        settings = settings_for(stack, topic_prefix, running, MARKETSTREAM_COLLECTOR_SPOOL_MAX_MB="1")
        await asyncio.to_thread(provision, settings)
        with collector(settings) as process:
            await eventually(lambda: ask(settings, "/readyz")[0] == 200)
            await asyncio.sleep(1)
            with broker_away(stack):
                await eventually(lambda: "Nothing more is read" in ask(settings, "/readyz")[1], 30)
                memory = psutil.Process(process.pid).memory_info().rss
                await asyncio.sleep(2)
                assert psutil.Process(process.pid).memory_info().rss - memory < 32 * 1024 * 1024
                assert "collector_spool_full" in ask(settings, "/metrics")[1]
            await eventually(lambda: ask(settings, "/readyz")[0] == 200, 30)
            assert 'collector_spool_bytes{exchange="binance"} 0.0' in ask(settings, "/metrics")[1]

            def holes() -> int:
                try:
                    ids = ids_by_symbol(published(settings))
                except KafkaException:  # a broker that was silent for long leads no partition until it is registered anew
                    return -1
                return sum(max(found) - min(found) + 1 - len(set(found)) for found in ids.values())

            await eventually(lambda: holes() == 0, 40)
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 10) == 0
        assert_whole(ids_by_symbol(await asyncio.to_thread(published, settings)))


async def test_what_waits_is_counted_by_the_broker_and_one_that_is_away_is_named(stack: RunningStack, topic_prefix: str) -> None:
    """Positions behind the end wait; a partition nobody has read yet counts what comes; without an answer nobody is blamed."""
    settings = stack.with_prefix(topic_prefix)
    await asyncio.to_thread(provision, settings)
    lag = KafkaLag(settings.kafka)
    assert lag.waiting({("trades", 0): 0, ("trades", 1): None}).count == 0
    with RegistryClient.from_settings(settings) as registry:
        producer = FrameProducer(settings.kafka, registry)
        for partition in (0, 0, 0, 1, 1):
            await producer.send("trades", partition, Frame(source="test", watermark_us=1))
        await producer.flush()
    assert lag.waiting({("trades", 0): 1}).count == 2
    assert lag.waiting({("trades", 1): None}).count == 2
    assert lag.waiting({("trades", 0): 3, ("trades", 1): 2}).count == 0
    nobody = stack.with_prefix(topic_prefix, MARKETSTREAM_KAFKA_BOOTSTRAP="127.0.0.1:1")
    found = await asyncio.to_thread(KafkaLag(nobody.kafka).waiting, {("trades", 0): 0})
    assert found.count == 0 and "127.0.0.1:1 does not answer" in (found.blocked or {})["kafka"]
