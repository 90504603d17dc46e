"""A running stack keeps every trade while a server is away, ends within 5 s when asked to, and heals what hangs.

``PROVE_OUTAGE_S`` is how long servers are away (default 8: a silent broker is named after 6; 600 for the full proof), ``PROVE_OUTAGE_RATE`` trades a second
(default 5,000). With ``-s`` the figures are printed: memory of every process before, at most during and after, spool, recovery.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest
from confluent_kafka import Consumer, TopicPartition

from infra.cli.processes import source_overrides, specs
from infra.clickhouse.client import connect
from infra.kafka import committed_offsets, consumer_config, end_offsets
from infra.progress import SINK_GROUP
from infra.registry_client import RegistryClient
from infra.settings import Settings, load_settings
from infra.stack.state import ProcessStatus
from infra.stack.supervisor import Stack
from schemas.codec import decode_learning
from schemas.frames import HISTORY
from tests.integration.conftest import process_environ
from tests.integration.fault_chain import stored_trades, table
from tests.integration.fault_tables import BAR_KEY, closed_bars, difference, undisturbed

pytestmark = pytest.mark.timeout(3600)

OUTAGE_S = float(os.environ.get("PROVE_OUTAGE_S", "8"))
RATE = int(os.environ.get("PROVE_OUTAGE_RATE", "5000"))
DRAIN_LIMIT_S = 5.0
MEMORY_LIMIT_BYTES = 96 * 1024 * 1024
"""A process may grow by this much in an outage: its bounded queues and allocator slack. A minute of 5,000 trades/s is 17 MB of frames."""
CATCH_UP_LIMIT_BYTES = 192 * 1024 * 1024
"""And by this much until it has caught up: the sink held 141 MB more after ten minutes without ClickHouse, the API 84 after ten without Kafka
(docs/supervision.md); their queues are bounded, so a longer outage costs no more."""
OURS = ("collector", "worker-0", "sink", "api")
DRAINED = (*OURS, "repair")


class World:
    """A whole stack on a simulated exchange."""

    def __init__(self, settings: Settings, stack: Stack) -> None:
        self.settings, self.stack = settings, stack

    def status(self, name: str) -> ProcessStatus:
        """One process."""
        return next(status for status in self.stack.status(check=False) if status.name == name)

    def statuses(self) -> dict[str, ProcessStatus]:
        """Every process."""
        return {status.name: status for status in self.stack.status(check=False)}

    def port(self, name: str) -> int:
        """Where a process of ours answers."""
        settings = self.settings
        return {
            "collector": settings.collector.health_port,
            "worker-0": settings.worker.health_port,
            "sink": settings.sink.health_port,
            "api": settings.api.port,
            "repair": settings.repair.health_port,
        }[name]

    def reasons(self, name: str) -> str:
        """What ``/readyz`` says; empty when ready."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port(name)}/readyz", timeout=5):
                return ""
        except urllib.error.HTTPError as exc:
            with exc:
                body = json.loads(exc.read())
            return json.dumps(body.get("reasons") or {name: check for name, check in body["checks"].items() if not check["ok"]})
        except OSError as exc:
            return repr(exc)

    def metric(self, name: str, metric: str) -> float:
        """One value of ``/metrics``."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port(name)}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(metric + "{"))

    def memory(self) -> dict[str, int]:
        """Resident bytes of every process that runs."""
        found = {}
        for name, status in self.statuses().items():
            try:
                found[name] = psutil.Process(status.pid).memory_info().rss
            except (psutil.NoSuchProcess, ValueError):
                continue
        return found


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Servers are not healed while a test holds them: the watchers wait an hour for them, and 6 s for ours."""
    with tempfile.TemporaryDirectory(prefix="marketstream-supervision-", ignore_cleanup_errors=True) as folder:
        base = load_settings(
            {
                **process_environ(Path(folder) / "data"),
                "MARKETSTREAM_SIM_TRADES_PER_S": str(RATE),
                "MARKETSTREAM_SIM_SYMBOLS": "40",
                "MARKETSTREAM_WATCHDOG_SERVER_SILENT_S": "3600",
                "MARKETSTREAM_WATCHDOG_SILENT_S": "6",
            }
        )
        settings = load_settings(base.as_environ(), overrides=source_overrides(base, "sim"))
        stack = Stack(settings, specs(settings, "sim"))
        stack.up()
        try:
            yield World(settings, stack)
        finally:
            stack.down()


def eventually(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Waits until the condition holds; how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.1)
    return time.monotonic() - began


@contextmanager
def away(world: World, name: str) -> Iterator[None]:
    """A server that is stopped: its port is open and nobody answers."""
    main = psutil.Process(world.status(name).pid)
    stopped = [main, *main.children(recursive=True)]
    for process in stopped:
        process.suspend()
    try:
        yield
    finally:
        for process in stopped:
            process.resume()


def all_ready(world: World) -> bool:
    """Nobody has a reason not to be."""
    return not any(world.reasons(name) for name in OURS)


def published(world: World) -> tuple[dict[str, list[int]], dict[str, list[int]], dict[int, int]]:
    """Ids of every symbol in the order of the topic, live and of the past, and the end offsets up to which that holds."""
    kafka = world.settings.kafka
    ends = end_offsets(kafka, ["trades"])["trades"]
    live: dict[str, list[int]] = {}
    past: dict[str, list[int]] = {}
    consumer = Consumer(consumer_config(kafka, "supervision"))
    with RegistryClient.from_settings(world.settings) as registry:
        codec = registry.frame_codec("trades")
        for partition, end in ends.items():
            consumer.assign([TopicPartition(f"{kafka.topic_prefix}trades", partition, 0)])
            position = 0
            while position < end:
                for message in consumer.consume(min(500, end - position), timeout=10):
                    assert message.error() is None
                    position = message.offset() + 1
                    frame = decode_learning(codec, message.value(), registry.schema)
                    if not frame.row_count:
                        continue
                    into = past if frame.flags & HISTORY else live
                    codes, ids = frame.columns["symbol_code"], frame.columns["trade_id"]
                    for code in np.unique(codes).tolist():
                        into.setdefault(frame.symbols[code], []).extend(ids[codes == code].tolist())
    consumer.close()
    return live, past, ends


def missing(live: dict[str, list[int]], past: dict[str, list[int]]) -> dict[str, int]:
    """How many ids between a symbol's first and last are not there."""
    every = {key: set(ids) | set(past.get(key, [])) for key, ids in live.items()}
    return {key: holes for key, ids in every.items() if (holes := max(ids) - min(ids) + 1 - len(ids))}


def check_everything_arrived(world: World, *, fetched: bool = False) -> int:
    """Every id from the first to the last is in the topic, and in ClickHouse exactly once; how many trades that are.

    ``fetched``: some come over REST, which takes its time and changes their order.
    """
    live, past, ends = published(world)
    until = time.monotonic() + 60
    while fetched and missing(live, past) and time.monotonic() < until:
        time.sleep(1.0)
        live, past, ends = published(world)
    assert len(live) >= 30
    assert missing(live, past) == {}
    for key, ids in live.items() if not fetched else ():
        assert all(after > before for before, after in zip(ids, ids[1:], strict=False)), f"{key} is out of order, or doubled"

    def stored() -> bool:
        committed = committed_offsets(world.settings.kafka, SINK_GROUP, ["trades"])["trades"]
        return all(committed.get(partition, -1) >= end for partition, end in ends.items())

    eventually(stored, 60, "storing what was published")
    client = connect(world.settings.clickhouse)
    try:
        rows = client.query(
            "SELECT concat(exchange, ':', symbol), count(), uniqExact(trade_id), min(trade_id), max(trade_id) FROM trades GROUP BY 1"
        ).result_rows
    finally:
        client.close()
    total = 0
    for key, count, distinct, first, last in rows:
        assert count == distinct == last - first + 1, f"{key}: {count} rows, {distinct} ids, from {first} to {last}"
        assert first == min(live[key]) and last >= max(live[key])
        total += count
    return total


def caught_up(world: World, ends: dict[str, dict[int, int]]) -> bool:
    """The sink has stored these records."""
    stored = committed_offsets(world.settings.kafka, SINK_GROUP, list(ends))
    return all(stored[name].get(partition, -1) >= end for name, places in ends.items() for partition, end in places.items() if end)


class Memory:
    """The most resident bytes of every process, phase by phase."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.before = world.memory()
        self.most: dict[str, dict[str, int]] = {}

    def look(self, phase: str) -> None:
        """Note what is used now."""
        most = self.most.setdefault(phase, dict(self.before))
        for process, used in self._world.memory().items():
            most[process] = max(most.get(process, 0), used)

    def while_waiting(self, phase: str, condition: Callable[[], bool]) -> Callable[[], bool]:
        """The condition, with a look at each time it is asked."""

        def check() -> bool:
            self.look(phase)
            return condition()

        return check

    def grew(self, phase: str, process: str) -> int:
        """By how much a process grew at most."""
        return self.most[phase][process] - self.before[process]


def hold(world: World, name: str, seconds: float, expected: dict[str, str]) -> None:
    """Keep a server away; check what is said meanwhile, that nobody is restarted, and that memory stays bounded, also while catching up."""
    memory, restarts = Memory(world), {name: status.restarts for name, status in world.statuses().items()}
    with away(world, name):
        until = time.monotonic() + seconds
        told: dict[str, str] = {}
        while time.monotonic() < until:
            time.sleep(min(1.0, seconds / 4))
            memory.look("away")
            told = {process: world.reasons(process) for process in OURS}
        spooled = world.metric("collector", "collector_spool_bytes")
        for process in OURS:
            assert expected.get(process, "") in told[process] and bool(told[process]) == (process in expected), (process, told[process])
    took = eventually(memory.while_waiting("catching up", lambda: all_ready(world)), 60 + seconds / 4, f"being ready after {name} was away")
    sent = memory.while_waiting("catching up", lambda: world.metric("collector", "collector_spool_bytes") == 0)
    eventually(sent, 60 + seconds, "sending the spool")
    ends = end_offsets(world.settings.kafka, ["trades", "bars"])
    stored = took + eventually(memory.while_waiting("catching up", lambda: caught_up(world, ends)), 60 + seconds, "storing what waited")
    after = world.memory()
    print(f"\n{name} away for {seconds:.0f} s: ready {took:.1f} s after, all stored {stored:.1f}; the spool held {spooled / 1e6:.1f} MB")
    for process, used in sorted(memory.before.items()):
        away_mb, most_mb = (memory.most[phase][process] / 1e6 for phase in ("away", "catching up"))
        now_mb = after.get(process, 0) / 1e6
        print(f"  {process:12} {used / 1e6:6.0f} MB before, {away_mb:6.0f} at most, {most_mb:6.0f} while catching up, {now_mb:6.0f} after")
    assert {name: status.restarts for name, status in world.statuses().items()} == restarts
    for process in DRAINED:
        assert memory.grew("away", process) < MEMORY_LIMIT_BYTES, process
        assert memory.grew("catching up", process) < CATCH_UP_LIMIT_BYTES, process


def check_bars(world: World, timeout_s: float = 90.0) -> int:
    """Bars of all timeframes and symbols that closed by now equal, to the bit, those of the stored trades, and are complete; how many."""
    settings = world.settings
    with urllib.request.urlopen(f"http://127.0.0.1:{settings.ports.sim}/sim/status", timeout=10) as answer:
        until_us = int(json.loads(answer.read())["time_ms"]) * 1_000
    waiting = table(settings, "SELECT DISTINCT symbol FROM trades ORDER BY symbol")["symbol"].to_list()
    compared, problem, began = 0, "", time.monotonic()
    while waiting:
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s:.0f} s: {len(waiting)} symbols differ; {problem}"
        for symbol in list(waiting):
            trades = stored_trades(settings, symbol).filter(pl.col("exchange_time_us") < until_us)
            wanted = undisturbed(trades, symbol, until_us)
            text = difference(closed_bars(settings, symbol, until_us, trades), wanted, BAR_KEY)
            if text:
                problem = f"{symbol}: {text}"
                continue
            waiting.remove(symbol)
            compared += len(wanted)
        time.sleep(0.5)
    return compared


def test_a_broker_that_is_away_costs_no_trade(world: World) -> None:
    """Collectors go on into the spool, everybody names the broker, nobody is restarted, and all of it arrives in order after."""
    hold(world, "kafka", OUTAGE_S, dict.fromkeys(OURS, "afka"))
    total = check_everything_arrived(world)
    print(f"  {total:,} trades, none lost, doubled or out of order")


def test_a_clickhouse_that_is_away_costs_no_row(world: World) -> None:
    """Topics hold what the sink cannot store; the sink and the API name it, the others go on."""
    hold(world, "clickhouse", OUTAGE_S, {"sink": "ClickHouse", "api": "clickhouse"})
    total = check_everything_arrived(world)
    print(f"  {total:,} trades, none lost, doubled or out of order")


def test_sigterm_ends_each_process_within_five_seconds_and_loses_nothing(world: World) -> None:
    """Under load, exit code 0; the supervisor starts it again. No trade is missing, and no bar differs from the one of an undisturbed run."""
    for name in DRAINED:
        before = world.status(name)
        began = time.monotonic()
        os.kill(before.pid, signal.SIGTERM)
        eventually(lambda before=before: not before.lives(), 10, f"the end of {before.name}")
        took = time.monotonic() - began
        eventually(lambda name=name, before=before: world.status(name).restarts == before.restarts + 1, 5, "the restart")
        print(f"\n{name} ended {took:.1f} s after SIGTERM")
        assert took <= DRAIN_LIMIT_S
        assert world.status(name).reason.startswith("ended with code 0")
    eventually(lambda: all_ready(world) and not world.reasons("repair"), 60, "being ready after SIGTERM")
    check_everything_arrived(world, fetched=True)
    print(f"{check_bars(world):,} bars equal those of an undisturbed run")


def test_a_worker_that_is_stopped_is_found_and_started_again(world: World) -> None:
    """SIGSTOP: found by its silence; bars go on where the snapshot was."""
    before = world.status("worker-0")
    os.kill(before.pid, signal.SIGSTOP)
    took = eventually(
        lambda: world.status("worker-0").pid not in (0, before.pid) and world.status("worker-0").state == "ready", 60, "healing the worker"
    )
    status = world.status("worker-0")
    print(f"\nthe worker was ready again {took:.1f} s after SIGSTOP; {status.reason}")
    assert status.restarts == before.restarts + 1 and "did not answer for" in status.reason


def test_ends_while_the_broker_is_away_lose_nothing(world: World) -> None:
    """Kill -9 of the collector: its spool is sent first, what nobody listened to is fetched. SIGTERM of the others: 5 s, exit code 0."""
    with away(world, "kafka"):
        eventually(lambda: world.metric("collector", "collector_spool_bytes") > 100_000, 20, "spooling")
        before = world.statuses()
        asked = [before[name] for name in DRAINED if name != "collector"]
        told = (world.settings.data_dir / "logs" / "supervisor.log").read_text()
        ended = {status.name: told.count(f"{status.name} ended with code 0") for status in asked}
        os.kill(before["collector"].pid, signal.SIGKILL)
        began = time.monotonic()
        for status in asked:
            os.kill(status.pid, signal.SIGTERM)
        eventually(lambda: not any(status.lives() for status in asked), 10, "their end")
        took = time.monotonic() - began
    print(f"\nworker, sink, API and repair ended {took:.1f} s after SIGTERM with the broker away")
    assert took <= DRAIN_LIMIT_S
    eventually(lambda: all(world.status(name).restarts > before[name].restarts for name in DRAINED), 30, "their return")
    told = (world.settings.data_dir / "logs" / "supervisor.log").read_text()
    assert {status.name: told.count(f"{status.name} ended with code 0") - ended[status.name] for status in asked} == {
        status.name: 1 for status in asked
    }, "\n".join(line for line in told.splitlines() if " ended with code " in line)
    eventually(lambda: all_ready(world), 60, "being ready")
    check_everything_arrived(world, fetched=True)
    print(f"{check_bars(world):,} bars equal those of an undisturbed run")
    log = (world.settings.data_dir / "logs" / "collector.log").read_text()
    assert "of an earlier process, which are sent first" in log
