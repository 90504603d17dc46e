"""Releases side by side on one broker: an upgrade rolls through workers, sink and API while old and new producers write; no row differs.

``PROVE_OLD_CODE=1``, as the full proof sets it, runs the old release's own code as the old worker, not only its schemas; it needs
a checkout with its history, and compiles that release's kernels first, half a minute.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.api_frames import KafkaFrames
from infra.api_stores import ClickHouseHistory
from infra.clickhouse.client import connect
from infra.kafka import committed_offsets, end_offsets, ensure_topics
from infra.progress import SINK_GROUP
from infra.provision import provision
from infra.registry_client import RegistryClient
from infra.schema_evolution import released
from infra.settings import Settings
from infra.stack.kafka import free_ports
from schemas.codec import decode_learning, frame_dtypes, schema_text
from schemas.frames import Frame
from schemas.topics import TOPICS
from tests.integration import released as old_release
from tests.integration.conftest import RunningStack
from tests.integration.test_worker import expected, messages, publish, records, wait_done
from tests.performance import market

ROOT = Path(__file__).resolve().parents[2]
COMMITS = {"0.1.0": "81318a4"}
OLD_CODE = os.environ.get("PROVE_OLD_CODE") == "1"
RELEASES = list(released())
TRADES, SYMBOLS = 8_000, 40


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    """An earlier release."""
    return str(request.param)


@pytest.fixture
def settings(stack: RunningStack, topic_prefix: str, release: str) -> Settings:
    """Topics and subjects as the old release made them, then provisioned by this one: the first step of an upgrade."""
    found = stack.with_prefix(
        topic_prefix,
        MARKETSTREAM_CLICKHOUSE_DATABASE="upgrade_" + topic_prefix.partition("-")[0],
        MARKETSTREAM_WORKER_SNAPSHOT_INTERVAL_S="0.2",
    )
    ensure_topics(found.kafka, [TOPICS[name] for name in TOPICS if TOPICS[name].schema in ("", *released()[release])])
    with old_release.of(release).from_settings(found) as registry:
        registry.register_all()
    old_tables(found, release)
    provision(found)
    return found


def old_tables(settings: Settings, release: str) -> None:
    """The database as the release made it."""
    client = connect(settings.clickhouse, database=None)
    for statement in old_release.statements(release, settings.clickhouse.database):
        client.command(statement)
    client.close()


@contextmanager
def process(settings: Settings, *command: str, cwd: Path = ROOT, index: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours; stopped with SIGTERM at the end when it still runs."""
    ports = dict(zip(("WORKER", "SINK", "API"), free_ports(3), strict=True))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MARKETSTREAM_")}
    environ |= known_to(cwd, settings.as_environ()) | {"PYTHONPATH": str(cwd)}
    environ |= {f"MARKETSTREAM_PORT_{name}": str(port - (index if name == "WORKER" else 0)) for name, port in ports.items()}
    log = settings.data_dir / f"test-{settings.kafka.topic_prefix}{command[-1]}{time.monotonic_ns()}.log"
    with log.open("wb") as out:
        child = subprocess.Popen([sys.executable, *command], env=environ, cwd=cwd, stdout=out, stderr=out)
        try:
            yield child
        finally:
            if child.poll() is None:
                child.terminate()
            child.wait(20)
            if child.returncode > 0:
                print(log.read_text("utf-8", "replace")[-4000:])


def known_to(folder: Path, environ: dict[str, str]) -> dict[str, str]:
    """The variables that the code in that folder knows: an unknown one is refused."""
    if folder == ROOT:
        return environ
    ask = "from infra.settings import options; print(*(item.env for item in options()))"
    found = subprocess.run(
        [sys.executable, "-c", ask], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, check=True
    )
    return {name: environ[name] for name in {*found.stdout.split(), "MARKETSTREAM_CONFIG"} & environ.keys()}


def worker_of(release: str, index: int, folder: Path) -> tuple[tuple[str, ...], Path]:
    """Command and folder of an old worker: this code with the old schemas, or the old code itself."""
    arguments = ("--index", str(index))
    if not OLD_CODE:
        return ("-m", "tests.integration.released", release, "infra.worker", *arguments), ROOT
    archive = subprocess.run(["git", "archive", COMMITS[release]], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"this checkout does not hold commit {COMMITS[release]} of release {release}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    subprocess.run(
        [sys.executable, "-c", "from infra.warm import warm; warm()"], cwd=folder, check=True, env={**os.environ, "PYTHONPATH": str(folder)}
    )
    return ("-m", "infra.worker", *arguments), folder


def mixed_frames(settings: Settings, release: str) -> list[tuple[int, bytes]]:
    """Trades as two producers write them, one of each release, in turn."""
    keys, columns = market.trades(TRADES, SYMBOLS, per_second=400)
    with RegistryClient.from_settings(settings) as registry, old_release.of(release).from_settings(settings) as earlier:
        codecs = (earlier.frame_codec("trades"), registry.frame_codec("trades"))
    assert codecs[0].schema_id != codecs[1].schema_id
    frames = market.frames(keys, columns, partitions=settings.kafka.partitions, rows_per_frame=50)
    return [(partition, codecs[number % 2].encode(frame)) for number, (partition, frame) in enumerate(frames)]


def decoded(settings: Settings, topic: str, values: list[tuple[int, bytes]]) -> list[tuple[int, Frame]]:
    """Frames with their partition, whoever wrote them."""
    with RegistryClient.from_settings(settings) as registry:
        codec = registry.frame_codec(topic)
        return [(partition, decode_learning(codec, value, registry.schema)) for partition, value in values]


def rows_decoded(settings: Settings, topic: str, values: list[bytes]) -> list[dict[str, Any]]:
    """Rows, whoever wrote them."""
    with RegistryClient.from_settings(settings) as registry:
        codec = registry.row_codec(topic)
        for schema_id in {int.from_bytes(value[1:5], "big") for value in values} - {codec.schema_id}:
            codec.add_writer(schema_id, registry.schema(schema_id))
        return [codec.decode(value) for value in values]


def assert_same_frames(found: list[tuple[int, Frame]], wanted: list[tuple[int, Frame]], names: Any) -> None:
    """Equal frames in equal order, on the columns both releases know."""
    assert [(partition, frame.input_offset) for partition, frame in found] == [
        (partition, frame.input_offset) for partition, frame in wanted
    ]
    for (_, one), (_, other) in zip(found, wanted, strict=True):
        assert (one.watermark_us, one.symbols) == (other.watermark_us, other.symbols)
        for name in names:
            assert np.array_equal(one.columns[name], other.columns[name]), (one.input_offset, name)


async def stored(settings: Settings, timeout_s: float = 60) -> None:
    """Return when the sink holds every record of trades and bars."""
    until = time.monotonic() + timeout_s
    while True:
        ends = end_offsets(settings.kafka, ["trades", "bars"])
        done = committed_offsets(settings.kafka, SINK_GROUP, ["trades", "bars"])
        if all(done[name][partition] >= end for name in ends for partition, end in ends[name].items() if end):
            return
        assert time.monotonic() < until, (done, ends)
        await asyncio.sleep(0.1)


async def test_an_upgrade_rolls_through_the_workers_while_two_releases_write(settings: Settings, release: str, tmp_path: Path) -> None:
    """Old and new worker share the partitions; the old one is killed in the middle and its successor is new: not one row differs."""
    frames = mixed_frames(settings, release)
    third = len(frames) // 3
    old_names = frame_dtypes(released()[release]["bars"]).keys()
    with ExitStack() as running:
        command, folder = worker_of(release, 0, tmp_path)
        old = running.enter_context(process(settings, *command, cwd=folder))
        await publish(settings, frames[:third])
        await wait_done(settings)
        running.enter_context(process(settings, "-m", "infra.worker", "--index", "1", index=1))
        for start in range(third, 2 * third, 10):
            await publish(settings, frames[start : min(start + 10, 2 * third)])
            await asyncio.sleep(0.1)
        await wait_done(settings)
        await publish(settings, frames[2 * third : -settings.kafka.partitions - 20])
        old.send_signal(signal.SIGKILL)
        old.wait(10)
        running.enter_context(process(settings, "-m", "infra.worker", "--index", "0"))
        await publish(settings, frames[-settings.kafka.partitions - 20 :])
        await wait_done(settings)

    wanted = await expected(settings)
    found = decoded(settings, "bars", [(record.partition, record.value) for record in records(settings, "bars")])
    assert_same_frames(found, decoded(settings, "bars", [(record.partition, record.value) for record in wanted["bars"]]), old_names)
    written_by = {int.from_bytes(record.value[1:5], "big") for record in records(settings, "bars")}
    assert len(written_by) == 2, "both releases made bars"

    rows, wanted_rows = records(settings, "bars.rows"), wanted["bars.rows"]
    newest = dict(zip([row.key for row in rows], rows_decoded(settings, "bars.rows", [row.value for row in rows]), strict=True))
    as_wanted = dict(
        zip([row.key for row in wanted_rows], rows_decoded(settings, "bars.rows", [row.value for row in wanted_rows]), strict=True)
    )
    assert newest == as_wanted
    assert messages(settings, "deadletter") == []


async def test_sink_and_api_read_both_releases(settings: Settings, release: str) -> None:
    """Sinks of both releases take turns over what both wrote, forth and back; history and live tail give every row once."""
    frames = mixed_frames(settings, release)
    third = len(frames) // 3
    old, new = ("-m", "tests.integration.released", release, "infra.sink"), ("-m", "infra.sink")
    with process(settings, "-m", "infra.worker", "--index", "0"):
        for sink, part in ((old, frames[:third]), (new, frames[third : 2 * third]), (old, frames[2 * third :])):
            await publish(settings, part)
            with process(settings, *sink):
                await wait_done(settings)
                await stored(settings)
    client = connect(settings.clickhouse)
    trades = client.query("SELECT count(), uniqExact(exchange, symbol, trade_id), max(known_at_us) > 0 FROM trades").result_rows[0]
    assert tuple(trades) == (TRADES, TRADES, True)
    bars = decoded(settings, "bars", [(record.partition, record.value) for record in records(settings, "bars")])
    final = sum(int((frame.columns["is_final"] == 1).sum()) for _, frame in bars)
    assert client.query("SELECT count(), max(held_count) FROM bars").result_rows[0] == (final, 0)
    assert client.query("SELECT count() FROM deadletter").result_rows[0][0] == 0
    client.close()
    await _api_reads(settings, {"trades": TRADES, "bars": sum(frame.row_count for _, frame in bars)})


async def _api_reads(settings: Settings, rows: dict[str, int]) -> None:
    """The API's own readers of topics decode every record."""
    frames, history = KafkaFrames(settings), ClickHouseHistory(settings.clickhouse)
    try:
        await frames.start(lambda _: None, lambda *_: None)
        async with asyncio.timeout(20):
            while frames.epoch("trades") is None:
                await asyncio.sleep(0.05)
        for topic, count in rows.items():
            found = 0
            for partition, end in end_offsets(settings.kafka, [topic])[topic].items():
                async for batch in frames.read(topic, partition, 0, end):
                    found += sum(frames.decode(record).row_count for record in batch)
            assert found == count
        assert int(await history.fetch("SELECT count() FROM trades", {}, "TSV")) == rows["trades"]
    finally:
        await frames.stop()
        await history.close()


async def test_rows_stored_before_the_upgrade_get_the_fill_of_new_columns(stack: RunningStack, topic_prefix: str, release: str) -> None:
    """A gap that the old release stored is one of trades after the upgrade, with no id, not of channel 0."""
    found = stack.with_prefix(topic_prefix, MARKETSTREAM_CLICKHOUSE_DATABASE="before_" + topic_prefix.partition("-")[0])
    old_tables(found, release)
    client = connect(found.clickhouse)
    columns = [
        name
        for name, _ in client.query(
            "SELECT name, type FROM system.columns WHERE database = currentDatabase() AND table = 'gaps'"
        ).result_rows
    ]
    assert "channel" not in columns
    names = ", ".join(columns)
    values = ", ".join("'binance'" if name == "exchange" else "'BTC-USDT'" if name == "symbol" else "5" for name in columns)
    client.command(f"INSERT INTO gaps ({names}) VALUES ({values})")
    provision(found)
    client.command(f"INSERT INTO gaps ({names}) VALUES ({values.replace('5', '6')})")  # by a sink that is not upgraded yet
    rows = client.query("SELECT gap_id, channel, recovered, known_at_us, state FROM gaps").result_rows
    client.close()
    assert sorted(tuple(row) for row in rows) == [(-1, 1, 0, 0, 5), (-1, 1, 0, 0, 6)]


def test_a_stack_of_this_release_registers_beside_the_released_subjects(settings: Settings, release: str) -> None:
    """The registry took both texts of each subject, checked as fully transitive: ids of the old records stay what they were."""
    with RegistryClient.from_settings(settings) as now, old_release.of(release).from_settings(settings) as then:
        for name, text in released()[release].items():
            assert then.schema(then.register(name)) != "" and now.schema(now.register(name)) != ""
            assert (then.register(name) == now.register(name)) == (_same(text, name)), name


def _same(text: str, name: str) -> bool:
    return bool(json.loads(text) == json.loads(schema_text(name)))
