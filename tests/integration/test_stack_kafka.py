"""The local broker: what it acknowledged it keeps, what we send fits, and what it says no to."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaConnectionError
from confluent_kafka import OFFSET_BEGINNING, TIMESTAMP_LOG_APPEND_TIME, Consumer, KafkaError, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from infra.kafka import SOON, ensure_topics
from infra.settings import KafkaSettings
from infra.stack import kafka
from schemas.topics import TOPICS
from streams.group_client import wait_for_metadata
from tests.integration.conftest import RunningStack


def test_a_second_listener_sends_clients_where_they_are_told() -> None:
    """Off by default; clients of it are sent to its own port, or to another address, and those of the first never are."""
    made = {}
    for name, settings in (
        ("none", KafkaSettings()),
        ("own", KafkaSettings(second_port=3)),
        ("other", KafkaSettings(second_port=3, second_address="broker.example:4")),
    ):
        lines = kafka.properties(settings, port=1, controller_port=2, logs=Path("/logs")).splitlines()
        made[name] = dict(line.split("=", 1) for line in lines)
    assert made["none"]["listeners"] == "PLAINTEXT://127.0.0.1:1,CONTROLLER://127.0.0.1:2"
    assert made["own"]["listeners"] == made["other"]["listeners"] == made["none"]["listeners"] + ",SECOND://127.0.0.1:3"
    assert [found["advertised.listeners"].split(",") for found in made.values()] == [
        ["PLAINTEXT://127.0.0.1:1"],
        ["PLAINTEXT://127.0.0.1:1", "SECOND://127.0.0.1:3"],
        ["PLAINTEXT://127.0.0.1:1", "SECOND://broker.example:4"],
    ]


def _make_topic(stack: RunningStack, name: str) -> None:
    admin = AdminClient(stack.settings.kafka.client_config())
    admin.create_topics([NewTopic(name, num_partitions=1, replication_factor=1)])[name].result(10)


def _read(stack: RunningStack, topic: str) -> list[bytes]:
    consumer = Consumer({**stack.settings.kafka.client_config(), "group.id": topic, "enable.partition.eof": True, "fetch.max.bytes": 2**25})
    consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
    values: list[bytes] = []
    try:
        while True:
            message = consumer.poll(10)
            assert message is not None, "the broker sent nothing for 10 s"
            error = message.error()
            if error is not None:
                if error.code() == KafkaError._PARTITION_EOF:
                    return values
                continue
            values.append(message.value() or b"")
    finally:
        consumer.close()


def test_acknowledged_records_survive_kill_9_of_the_broker(stack: RunningStack, topic_prefix: str) -> None:
    """Every record acknowledged before, during and after three kills is there once, in order."""
    topic = topic_prefix + "kills"
    _make_topic(stack, topic)
    acknowledged: list[bytes] = []
    producer = Producer({**stack.settings.kafka.client_config(), **SOON, "enable.idempotence": True, "linger.ms": 1, "log_level": 0})
    number = 0
    for _ in range(3):
        (pid,) = [status.pid for status in stack.supervisor.status() if status.name == "kafka"]
        killed = False
        until = time.monotonic() + 20
        while time.monotonic() < until:
            number += 1
            producer.produce(topic, b"%d" % number, on_delivery=lambda error, message: error or acknowledged.append(message.value()))
            producer.poll(0.002)
            if not killed and len(acknowledged) > 50:
                os.kill(pid, signal.SIGKILL)
                killed, before = True, len(acknowledged)
            elif killed and len(acknowledged) > before + 200:
                break
        assert producer.flush(30) == 0
    stored = _read(stack, topic)
    assert stored == [b"%d" % each for each in range(1, number + 1)]
    assert set(acknowledged) <= set(stored)


def test_a_state_chunk_of_16_mb_fits_and_100_mb_are_refused(stack: RunningStack, topic_prefix: str) -> None:
    """The broker takes the largest record we send; one of 100 MB is refused with a sentence and the broker lives on."""
    topic = topic_prefix + "large"
    _make_topic(stack, topic)
    producer = Producer({**stack.settings.kafka.client_config(), "message.max.bytes": 200_000_000, "queue.buffering.max.kbytes": 400_000})
    errors: list[KafkaError | None] = []
    producer.produce(topic, os.urandom(16 * 1024 * 1024), on_delivery=lambda error, _: errors.append(error))
    producer.flush(30)
    assert errors == [None]
    with_100 = Producer(
        {**stack.settings.kafka.client_config(), "message.max.bytes": 200_000_000, "message.timeout.ms": 5000, "log_level": 0}
    )
    with_100.produce(topic, bytes(100_000_000), on_delivery=lambda error, _: errors.append(error))
    with_100.flush(30)
    assert errors[1] is not None
    assert [len(value) for value in _read(stack, topic)] == [16 * 1024 * 1024]


def test_a_record_says_when_the_broker_took_it(stack: RunningStack, topic_prefix: str) -> None:
    """Not when its producer queued it, be that an hour ago; also in a topic that an earlier release made."""
    settings = replace(stack.settings.kafka, topic_prefix=topic_prefix)
    _make_topic(stack, topic_prefix + "deadletter")
    wanted = [TOPICS["deadletter"], TOPICS["gaps"]]
    assert ensure_topics(settings, wanted) == [topic_prefix + "gaps"]
    assert ensure_topics(settings, wanted) == []
    producer = Producer(settings.client_config())
    found: list[tuple[int, int]] = []
    now_ms = time.time_ns() // 1_000_000
    for entry in wanted:
        name, taken = entry.full_name(topic_prefix), lambda _, message: found.append(message.timestamp())
        producer.produce(name, b"x", timestamp=now_ms - 3_600_000, on_delivery=taken)
    producer.flush(10)
    assert [kind for kind, _ in found] == [TIMESTAMP_LOG_APPEND_TIME] * 2
    assert all(now_ms - 1_000 < when_ms < now_ms + 60_000 for _, when_ms in found)


def test_a_misspelt_topic_is_an_error_not_a_new_topic(stack: RunningStack, topic_prefix: str) -> None:
    """Topics are only made on purpose."""
    producer = Producer({**stack.settings.kafka.client_config(), "topic.metadata.propagation.max.ms": 100, "message.timeout.ms": 2000})
    errors: list[KafkaError | None] = []
    producer.produce(topic_prefix + "tradse", b"x", on_delivery=lambda error, _: errors.append(error))
    producer.flush(10)
    assert errors[0] is not None
    assert topic_prefix + "tradse" not in AdminClient(stack.settings.kafka.client_config()).list_topics(timeout=5).topics


def test_the_probe_tells_a_broker_from_anything_else(stack: RunningStack) -> None:
    """Ready means it speaks Kafka, not that a port is open."""
    assert kafka.probe(stack.settings.ports.kafka) is None
    assert kafka.probe(stack.settings.ports.clickhouse) is not None
    (free,) = kafka.free_ports(1)
    assert "does not answer" in (kafka.probe(free) or "")


@pytest.mark.parametrize("name", ["kafka", "clickhouse", "postgres", "registry"])
def test_each_server_is_ready_and_says_where(stack: RunningStack, name: str) -> None:
    """The status names every server with its ports and log."""
    (status,) = [status for status in stack.supervisor.status() if status.name == name]
    assert status.state == "ready" and status.lives() and status.ports and status.log.endswith(f"{name}.log")


@pytest.fixture
def late(tmp_path: Path) -> Iterator[KafkaSettings]:
    """A broker that is late with every heartbeat, as a loaded one may be with one: 0.7 s of every 1.5 it lists no node and holds no topic."""
    port, controller_port = kafka.free_ports(2)
    settings = KafkaSettings(bootstrap=f"127.0.0.1:{port}")
    command = kafka.prepare(tmp_path / "kafka", settings, port=port, controller_port=controller_port)
    with Path(command[-1]).open("a") as config:
        config.write("broker.heartbeat.interval.ms=1500\n")
    with (tmp_path / "out").open("wb") as out:
        broker = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 60
        while kafka.probe(port) is not None and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(1.0)
        yield settings
    finally:
        broker.kill()
        broker.wait()


def test_topics_are_made_while_the_broker_is_fenced_for_a_moment(late: KafkaSettings) -> None:
    """Whenever it is asked for them."""
    for number in range(3):
        wanted = replace(late, topic_prefix=f"{number}.")
        assert ensure_topics(wanted, [TOPICS["gaps"]]) == [f"{number}.gaps"]
        time.sleep(0.5)


def test_a_consumer_that_begins_before_the_broker_lists_a_node_waits_for_one(late: KafkaSettings) -> None:
    """As a worker does that is started with its broker. Ten begin 0.2 s apart, so that some meet it without a node."""
    ensure_topics(late, [TOPICS["gaps"]])
    wait_for_metadata()

    async def joined(number: int) -> int:
        await asyncio.sleep(0.2 * number)
        consumer = AIOKafkaConsumer(bootstrap_servers=late.bootstrap, group_id=f"group-{number}", session_timeout_ms=30_000)
        for _ in range(20):  # a start without a coordinator is refused, and Faust begins anew
            try:
                await consumer.start()
                break
            except KafkaConnectionError:
                await asyncio.sleep(0.1)
        try:
            consumer.subscribe([TOPICS["gaps"].full_name("")])
            async with asyncio.timeout(20):
                while not consumer.assignment():
                    await asyncio.sleep(0.05)
            return len(consumer.assignment())
        finally:
            await consumer.stop()

    async def all_joined() -> list[int]:
        return await asyncio.gather(*(joined(number) for number in range(10)))

    assert asyncio.run(all_joined()) == [late.partitions] * 10


def test_what_the_broker_warns_of_is_in_its_log_with_the_time(stack: RunningStack) -> None:
    """And what it does all day is not: a line for every start, which elects the controller."""
    lines = (stack.settings.data_dir / "logs" / "kafka.log").read_text().splitlines()
    assert any(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARN .*QuorumController", line) for line in lines)
    assert not any(" INFO " in line for line in lines)
