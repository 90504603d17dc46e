"""One part of a running stack is killed, stopped, cut off, given a wrong clock or fed garbage: afterwards every trade is stored once, by itself.

Each cell begins whole and must be whole again: see :class:`tests.integration.fault_rig.Rig`. What a cell promises besides is asserted while
the fault lasts, or by the check that it gives back, once everything is whole. ``PROVE_CELLS=all`` runs every cell; by default a few that nothing
else covers.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from infra.kafka import end_offsets, partition_count, producer_config
from infra.stack.kafka import free_ports
from schemas.topics import TOPICS
from tests.integration.fault_chain import figure
from tests.integration.fault_checks import (
    Check,
    Place,
    assert_bars_in_the_end,
    assert_known_as_published,
    assert_letters,
    held_partitions,
    marks,
    registered,
)
from tests.integration.fault_rig import Rig, rig, wait_for
from tests.integration.tcp_proxy import TcpProxy

ALL = os.environ.get("PROVE_CELLS", "") == "all"
PAUSE_S = 4.0
CUT_S = 12.0 if ALL else 4.0
"""Without the broker; twice the session of a worker in the full form."""
SLOW_S = 1.0
"""What every piece of bytes to and from ClickHouse takes: an insert takes two of them."""


@pytest.fixture(scope="module")
def broker_port() -> int:
    """Where the broker listens besides."""
    return free_ports(1)[0]


@pytest.fixture(scope="module")
def link(broker_port: int) -> Iterator[TcpProxy]:
    """A way to the broker that can be cut; whoever begins at it is sent back to it, as the broker's second listener says."""
    with TcpProxy(broker_port) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def running(broker_port: int, link: TcpProxy) -> Iterator[Rig]:
    """A whole stack under live trades."""
    second = {"MARKETSTREAM_KAFKA_SECOND_PORT": str(broker_port), "MARKETSTREAM_KAFKA_SECOND_ADDRESS": f"127.0.0.1:{link.port}"}
    with rig(**second) as made:
        yield made


Fault = Callable[[Rig], Check | None]


# What is done in each cell; every function ends with the fault over.


def _pause_ours(name: str) -> Fault:
    def act(running: Rig) -> None:
        running.chain.signal(name, signal.SIGSTOP)
        time.sleep(PAUSE_S)
        running.chain.signal(name, signal.SIGCONT)

    return act


def _pause_worker(running: Rig) -> Check:
    every = set(range(running.settings.kafka.partitions))
    assert held_partitions(running) == every
    running.chain.signal("worker", signal.SIGSTOP)
    try:
        wait_for(lambda: not held_partitions(running), 20, "the broker takes no partition from a worker that is stopped")
    finally:
        running.chain.signal("worker", signal.SIGCONT)
    return lambda: _has_partitions(running, every)


def _has_partitions(running: Rig, every: set[int]) -> None:
    wait_for(lambda: held_partitions(running) == every, 30, "the worker does not get its partitions back")


def _pause_server(name: str) -> Fault:
    def act(running: Rig) -> None:
        running.server(name, signal.SIGSTOP)
        time.sleep(PAUSE_S)
        running.server(name, signal.SIGCONT)

    return act


def _kill_ours(name: str) -> Fault:
    def act(running: Rig) -> None:
        running.chain.kill(name)
        running.start(name)
        _ready(running, name)

    return act


def _kill_server(name: str) -> Fault:
    return lambda running: running.server(name, signal.SIGKILL)


def _kill_registry(running: Rig) -> Check:
    before = registered(running)
    assert before
    running.server("registry", signal.SIGKILL)

    def check() -> None:
        def comes_back() -> bool:
            try:
                return registered(running) == before
            except OSError:
                return False

        wait_for(comes_back, 30, "the registry does not come back with everything registered")

    return check


def _cut(name: str) -> Fault:
    def act(running: Rig) -> None:
        proxy = getattr(running, name)
        proxy.cut()
        time.sleep(PAUSE_S)
        proxy.mend()

    return act


def _slow_clickhouse(running: Rig) -> None:
    taken = {name: running.chain.metric("sink", f"db_query_duration_seconds_{name}") for name in ("sum", "count")}
    running.clickhouse.slow(SLOW_S)
    try:
        running.whole(90)
        inserts = running.chain.metric("sink", "db_query_duration_seconds_count") - taken["count"]
        seconds = running.chain.metric("sink", "db_query_duration_seconds_sum") - taken["sum"]
        assert inserts >= 2 and seconds / inserts >= 2 * SLOW_S, f"{inserts:.0f} inserts took {seconds:.1f} s"
    finally:
        running.clickhouse.slow(0.0)


def _with_its_bars(fault: Fault, skew_us: int = 0) -> Fault:
    """The same fault; in the end the bars of all trades made from its beginning until four seconds after it are those of a batch."""

    def act(running: Rig) -> Check:
        since = marks(running)
        fault(running)
        time.sleep(PAUSE_S)
        until = marks(running)
        return lambda: assert_bars_in_the_end(running, since, until, skew_us)

    return act


def _skew(milliseconds: int) -> Fault:
    def act(running: Rig) -> None:
        running.fault(fault="skew", milliseconds=milliseconds)
        time.sleep(PAUSE_S)
        running.fault(fault="skew", milliseconds=0)

    return _with_its_bars(act, milliseconds * 1_000)


def _shifted(name: str, seconds: int, also: Callable[[Rig], None] | None = None) -> Fault:
    """Run a process with a clock that is wrong by ``seconds`` for a while; ``also`` is asserted meanwhile."""

    def act(running: Rig) -> None:
        running.chain.stop(name)
        running.start(name, prefix=("tests.integration.shifted", str(seconds)))
        try:
            _ready(running, name)
            running.whole()
            if also is not None:
                also(running)
        finally:
            running.chain.stop(name)
            running.start(name)
            _ready(running, name)

    return _with_its_bars(act)


def _ready(running: Rig, name: str) -> None:
    wait_for(lambda: running.chain.ask(name, "/readyz")[0] == 200, 60, f"{name} is not ready")


def _garbage(topic: str, component: str) -> Fault:
    """Records that nobody can read in every partition; ``component`` tells of each of them, once."""

    def act(running: Rig) -> Check:
        from confluent_kafka import Producer

        producer = Producer(producer_config(running.settings.kafka))
        name = TOPICS[topic].full_name(running.settings.kafka.topic_prefix)
        places: set[Place] = set()
        for partition in range(partition_count(running.settings.kafka, TOPICS[topic])):
            for value in (b"", b"\x00", b"no avro", b"\x00\x00\x00\x00\x63" + bytes(40), b"\x00\xff\xff\xff\xff" + bytes(10)):
                producer.produce(
                    name, value, None, partition, on_delivery=lambda _, message: places.add((topic, message.partition(), message.offset()))
                )
        assert producer.flush(10) == 0 and len(places) >= 5
        return lambda: assert_letters(running, places, component)

    return act


def _exchange_restarts(running: Rig) -> None:
    running.fault(fault="restart", seconds=2, reset_ids=False)
    time.sleep(2)


CELLS: dict[str, Fault] = {
    "collector-kill": _kill_ours("collector"),
    "collector-pause": _pause_ours("collector"),
    "collector-partition-venue": _cut("venue"),
    "collector-partition-postgres": _cut("postgres"),
    "collector-clock-ahead": _shifted("collector", 300),
    "collector-clock-behind": _shifted("collector", -300),
    "exchange-restart": _exchange_restarts,
    "worker-kill": _kill_ours("worker"),
    "worker-pause": _pause_worker,
    "worker-clock-ahead": _shifted("worker", 300),
    "worker-poison": _garbage("trades", "worker"),
    "sink-kill": _kill_ours("sink"),
    "sink-pause": _pause_ours("sink"),
    "sink-partition-clickhouse": _cut("clickhouse"),
    "sink-clock-behind": _shifted("sink", -300, assert_known_as_published),
    "sink-poison": _garbage("bars", "sink"),
    "gaps-poison": _garbage("gaps", "sink"),
    "kafka-kill": _kill_server("kafka"),
    "kafka-pause": _pause_server("kafka"),
    "clickhouse-kill": _kill_server("clickhouse"),
    "clickhouse-pause": _pause_server("clickhouse"),
    "clickhouse-slow": _slow_clickhouse,
    "postgres-kill": _kill_server("postgres"),
    "postgres-pause": _pause_server("postgres"),
    "registry-kill": _kill_registry,
    "registry-pause": _pause_server("registry"),
    "api-kill": _kill_ours("api"),
    "api-pause": _pause_ours("api"),
    # Last: what they leave behind are bars that only the repair can mend.
    "exchange-clock-behind": _skew(-300_000),
    "exchange-clock-ahead": _skew(300_000),
}
SHORT = ("collector-pause", "sink-partition-clickhouse", "clickhouse-kill")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cell", CELLS if ALL else SHORT)
def test_a_fault_of_one_part_is_survived_without_a_hand(running: Rig, cell: str) -> None:
    """After the fault every trade of every symbol is stored once, bars go on, and what else the cell promises holds."""
    running.whole()
    begun = time.monotonic()
    check = CELLS[cell](running)
    acted = time.monotonic()
    running.whole()
    whole = time.monotonic()
    if check is not None:
        check()
    figure("matrix", cell=cell, fault_s=acted - begun, whole_again_s=whole - acted, checked_s=time.monotonic() - whole)


def _trades_published(running: Rig) -> int:
    return sum(end_offsets(running.settings.kafka, ["trades"])["trades"].values())


def _bars_published(running: Rig) -> int:
    return sum(end_offsets(running.settings.kafka, ["bars"])["bars"].values())


def _trades_stored(running: Rig) -> int:
    return sum(rows for rows, *_ in running.counts().values())


PROGRESS: dict[str, Callable[[Rig], int]] = {"collector": _trades_published, "worker": _bars_published, "sink": _trades_stored}
"""What grows while a process works and reaches the broker."""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["collector", "worker", "sink"] if ALL else ["sink"])
def test_a_process_that_the_network_cuts_off_from_the_broker_goes_on_where_it_was(running: Rig, link: TcpProxy, name: str) -> None:
    """For longer than a session not a byte gets through, though the broker lives: it makes nothing meanwhile, a worker loses its partitions; whole."""
    running.whole()
    progress = PROGRESS[name]
    running.chain.stop(name)
    running.chain.start(name, MARKETSTREAM_KAFKA_BOOTSTRAP=f"127.0.0.1:{link.port}")
    try:
        _ready(running, name)
        running.whole()
        link.cut()
        begun = time.monotonic()
        time.sleep(2)  # what was on its way
        before = progress(running)
        time.sleep(CUT_S - (time.monotonic() - begun))
        assert progress(running) == before, f"the {name} still reaches the broker"
        if name == "worker":
            assert not held_partitions(running), "its session goes on"
        link.mend()
        mended = time.monotonic()
        took = running.whole(90)
        if name == "worker":
            _has_partitions(running, set(range(running.settings.kafka.partitions)))
        figure("matrix", cell=f"{name}-partition-kafka", fault_s=mended - begun, whole_again_s=took)
    finally:
        link.mend()
        running.chain.stop(name)
        running.start(name)
        _ready(running, name)
