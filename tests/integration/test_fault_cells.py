"""One part of a running stack is killed, stopped, cut off, given a wrong clock or fed garbage: afterwards every trade is stored once, by itself.

Each cell begins whole and must be whole again: see :class:`tests.integration.fault_rig.Rig`. ``PROVE_CELLS=all`` runs every cell; by default
a few that nothing else covers.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from infra.kafka import partition_count, producer_config
from schemas.topics import TOPICS
from tests.integration.fault_chain import figure
from tests.integration.fault_rig import Rig, rig, wait_for

ALL = os.environ.get("PROVE_CELLS", "") == "all"
PAUSE_S = 4.0


@pytest.fixture(scope="module")
def running() -> Iterator[Rig]:
    """A whole stack under live trades."""
    with rig() as made:
        yield made


# What is done in each cell; every function ends with the fault over.


def _pause_ours(name: str, seconds: float = PAUSE_S) -> Callable[[Rig], None]:
    def act(running: Rig) -> None:
        running.chain.signal(name, signal.SIGSTOP)
        time.sleep(seconds)
        running.chain.signal(name, signal.SIGCONT)

    return act


def _pause_server(name: str) -> Callable[[Rig], None]:
    def act(running: Rig) -> None:
        running.server(name, signal.SIGSTOP)
        time.sleep(PAUSE_S)
        running.server(name, signal.SIGCONT)

    return act


def _kill_ours(name: str) -> Callable[[Rig], None]:
    def act(running: Rig) -> None:
        running.chain.kill(name)
        running.start(name)
        _ready(running, name)

    return act


def _kill_server(name: str) -> Callable[[Rig], None]:
    return lambda running: running.server(name, signal.SIGKILL)


def _cut(name: str) -> Callable[[Rig], None]:
    def act(running: Rig) -> None:
        proxy = getattr(running, name)
        proxy.cut()
        time.sleep(PAUSE_S)
        proxy.mend()

    return act


def _skew(milliseconds: int) -> Callable[[Rig], None]:
    def act(running: Rig) -> None:
        running.fault(fault="skew", milliseconds=milliseconds)
        time.sleep(PAUSE_S)
        running.fault(fault="skew", milliseconds=0)

    return act


def _shifted(name: str, seconds: int) -> Callable[[Rig], None]:
    """Run a process with a clock that is wrong by ``seconds`` for a while."""

    def act(running: Rig) -> None:
        running.chain.stop(name)
        running.start(name, prefix=("tests.integration.shifted", str(seconds)))
        try:
            _ready(running, name)
            running.whole()
        finally:
            running.chain.stop(name)
            running.start(name)
            _ready(running, name)

    return act


def _ready(running: Rig, name: str) -> None:
    wait_for(lambda: running.chain.ask(name, "/readyz")[0] == 200, 60, f"{name} is not ready")


def _garbage(topic: str) -> Callable[[Rig], None]:
    def act(running: Rig) -> None:
        from confluent_kafka import Producer

        producer = Producer(producer_config(running.settings.kafka))
        name = TOPICS[topic].full_name(running.settings.kafka.topic_prefix)
        for partition in range(partition_count(running.settings.kafka, TOPICS[topic])):
            for value in (b"", b"\x00", b"no avro", b"\x00\x00\x00\x00\x63" + bytes(40), b"\x00\xff\xff\xff\xff" + bytes(10)):
                producer.produce(name, value, None, partition)
        assert producer.flush(10) == 0

    return act


def _exchange_restarts(running: Rig) -> None:
    running.fault(fault="restart", seconds=2, reset_ids=False)
    time.sleep(2)


CELLS: dict[str, Callable[[Rig], None]] = {
    "collector-kill": _kill_ours("collector"),
    "collector-pause": _pause_ours("collector"),
    "collector-partition-venue": _cut("venue"),
    "collector-partition-postgres": _cut("postgres"),
    "collector-clock-ahead": _shifted("collector", 300),
    "collector-clock-behind": _shifted("collector", -300),
    "exchange-restart": _exchange_restarts,
    "worker-kill": _kill_ours("worker"),
    "worker-pause": _pause_ours("worker", 8.0),
    "worker-clock-ahead": _shifted("worker", 300),
    "worker-poison": _garbage("trades"),
    "sink-kill": _kill_ours("sink"),
    "sink-pause": _pause_ours("sink"),
    "sink-partition-clickhouse": _cut("clickhouse"),
    "sink-clock-behind": _shifted("sink", -300),
    "sink-poison": _garbage("bars"),
    "gaps-poison": _garbage("gaps"),
    "kafka-kill": _kill_server("kafka"),
    "kafka-pause": _pause_server("kafka"),
    "clickhouse-kill": _kill_server("clickhouse"),
    "clickhouse-pause": _pause_server("clickhouse"),
    "postgres-kill": _kill_server("postgres"),
    "postgres-pause": _pause_server("postgres"),
    "registry-kill": _kill_server("registry"),
    "registry-pause": _pause_server("registry"),
    "api-kill": _kill_ours("api"),
    "api-pause": _pause_ours("api"),
    # Last: what they leave behind are bars that only the repair can mend.
    "exchange-clock-behind": _skew(-300_000),
    "exchange-clock-ahead": _skew(300_000),
}
SHORT = ("collector-pause", "sink-partition-clickhouse", "clickhouse-kill")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("cell", CELLS if ALL else SHORT)
def test_a_fault_of_one_part_is_survived_without_a_hand(running: Rig, cell: str) -> None:
    """After the fault every trade of every symbol is stored once, and bars go on."""
    running.whole()
    begun = time.monotonic()
    CELLS[cell](running)
    acted = time.monotonic()
    running.whole()
    figure("matrix", cell=cell, fault_s=acted - begun, whole_again_s=time.monotonic() - acted)
