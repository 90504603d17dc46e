"""The simulated broker: what it promises survives every crash, what it does not promise gets lost often enough."""

import asyncio
from collections.abc import Coroutine
from random import Random
from typing import Any

import pytest

from infra.kafka import producer_config
from infra.settings import KafkaSettings
from infra.simulation.broker import SimBroker, SimConsumer, SimProducer
from infra.simulation.loop import VirtualLoop
from infra.simulation.trace import Trace

PLACE = ("trades", 0)


class Room:
    """A loop with a broker."""

    def __init__(self, seed: int = 1) -> None:
        self.loop = VirtualLoop(seed, 1_767_225_600_000_000)
        self.broker = SimBroker(self.loop, Random(seed), Trace(self.loop), 1)

    def producer(self, **settings: object) -> SimProducer:
        """A producer with the product's settings and these."""
        return SimProducer(self.broker, {}, producer_config(KafkaSettings(bootstrap="b:1")) | settings)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run to the end, once."""
        try:
            self.loop.run(work)
        finally:
            self.loop.close()

    def values(self) -> list[bytes]:
        """What consumers can see."""
        return self.broker.values(*PLACE)


async def send_through_crashes(room: Room, producer: SimProducer, count: int) -> None:
    """Send ``count`` records while the broker crashes again and again and loses answers."""
    room.broker.lost_answers = 0.3
    for number in range(count):
        await producer.send_raw("trades", 0, None, b"%d" % number)
        await asyncio.sleep(0.002)
        if number % 10 == 9:
            room.broker.crash()
            await asyncio.sleep(0.1)
            room.broker.restart()
    room.broker.lost_answers = 0.0
    await producer.wait_acknowledged()


@pytest.mark.parametrize("seed", range(5))
def test_idempotent_producer_stands_once_and_in_order(seed: int) -> None:
    """With the product's settings crashes and lost answers neither lose, double nor reorder a record."""
    room = Room(seed)
    room.run(send_through_crashes(room, room.producer(), 100))
    assert room.values() == [b"%d" % number for number in range(100)]


def test_producer_without_idempotence_doubles() -> None:
    """The setting is what keeps records from standing twice."""
    room = Room()
    room.run(send_through_crashes(room, room.producer(**{"enable.idempotence": False}), 100))
    assert len(room.values()) > 100


def test_acks_one_loses_what_was_acknowledged() -> None:
    """The setting is what makes an acknowledged record safe."""
    room = Room()
    room.run(send_through_crashes(room, room.producer(acks="1"), 100))
    assert len(set(room.values())) < 100


def test_consumer_sees_only_what_is_synced() -> None:
    """A record that a crash may take back is shown to nobody."""
    room = Room()
    room.broker.sync_us = 50_000

    async def work() -> None:
        producer = room.producer()
        consumer = SimConsumer(room.broker, {PLACE: 0})
        await producer.send_raw("trades", 0, None, b"x")
        assert await consumer.poll(0.01) == []
        assert [record.value for _, _, record in await consumer.poll(1.0)] == [b"x"]
        assert consumer.positions == {PLACE: 1}

    room.run(work())


def test_unsynced_commit_is_lost_in_a_crash() -> None:
    """A commit is durable at the next sync, not before."""
    room = Room()

    async def work() -> None:
        room.broker.commit("g", "trades", {0: 5})
        await asyncio.sleep(0.1)
        room.broker.commit("g", "trades", {0: 9})
        room.broker.crash()
        room.broker.restart()
        assert room.broker.committed[("g", "trades", 0)] == 5

    room.run(work())
