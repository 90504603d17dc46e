"""The whole box for benchmarks: every process of the stack under its own supervisor, how far behind each is, and what was stored."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from infra.cli.processes import Choice, source_overrides, specs
from infra.clickhouse.client import connect
from infra.kafka import consumer_config
from infra.progress import SINK_GROUP
from infra.settings import Settings, load_settings
from infra.stack.spec import ProcessSpec
from infra.stack.supervisor import Stack, read_state
from tests.integration.conftest import process_environ
from tests.performance.stack import ROOT, child_environ

FOLLOWED = ("trades", "bars")
IDS_A_QUERY = 6_000_000
"""Ids that are counted exactly in one query; more would need more memory than the engine may use."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """A running stack."""

    settings: Settings
    folder: Path
    """For logs and answers of what is started beside it."""

    def pids(self) -> dict[str, int]:
        """Pid by process name, the supervisor's among them."""
        found = read_state(self.settings.data_dir)
        if found is None:
            return {}
        return {"supervisor": found.pid} | {status.name: status.pid for status in found.processes if status.pid}

    @property
    def stream_url(self) -> str:
        """Address of the WebSocket stream."""
        return f"ws://127.0.0.1:{self.settings.api.port}/api/v1/stream"


@contextlib.contextmanager
def box(choice: Choice = "none", *, sim_arguments: Sequence[str] = (), **variables: str) -> Iterator[Box]:
    """Everything ``up`` starts, ready; stopped at the end. ``sim_arguments`` are added to the simulated exchange's."""
    with tempfile.TemporaryDirectory(prefix="marketstream-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        settings = load_settings({**process_environ(folder / "data"), **variables})
        settings = load_settings(settings.as_environ(), overrides=source_overrides(settings, choice))
        processes = [_with_arguments(spec, sim_arguments) if spec.name == "sim" else spec for spec in specs(settings, choice)]
        stack = Stack(settings, processes=processes)
        stack.up()
        try:
            yield Box(settings=settings, folder=folder)
        finally:
            stack.down()


def _with_arguments(spec: ProcessSpec, arguments: Sequence[str]) -> ProcessSpec:
    return ProcessSpec.from_json({**spec.as_json(), "argv": [*spec.argv, *arguments]})


class Side:
    """A process of the benchmark itself (feeder, client): its answer is one JSON object on the last line of its output."""

    def __init__(self, here: Box, name: str, argv: Sequence[str]) -> None:
        self.name = name
        self._out = here.folder / f"{name}.out"
        self._err = here.folder / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *argv], env=child_environ(here.settings), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )

    def lines(self) -> list[dict[str, Any]]:
        """What it said so far."""
        return [
            json.loads(line) for line in self._out.read_text().splitlines(keepends=True) if line.startswith("{") and line.endswith("\n")
        ]

    def wait_said(self, event: str, timeout_s: float) -> dict[str, Any]:
        """The first line with that ``event``. Raises RuntimeError when the process ends or takes longer."""
        until = time.monotonic() + timeout_s
        while True:
            for line in self.lines():
                if line.get("event") == event:
                    return line
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{self.name} did not say '{event}' (exit code {self.process.poll()}): {self._err.read_text()[-2000:]}")
            time.sleep(0.05)

    def finish(self, timeout_s: float) -> dict[str, Any]:
        """Its last line once it has ended. Raises RuntimeError with its errors when it failed."""
        code = self.process.wait(timeout_s)
        lines = self.lines()
        if code or not lines:
            raise RuntimeError(f"{self.name} ended with {code}: {self._err.read_text()[-2000:]}")
        return lines[-1]


@contextlib.contextmanager
def side(here: Box, name: str, argv: Sequence[str]) -> Iterator[Side]:
    """``python -m ARGV`` beside the box; ended by its pid at the end when it still runs."""
    running = Side(here, name, argv)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.terminate()
            try:
                running.process.wait(10)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()


class Lag:
    """How far worker and sink are behind what was published; keeps its connections and asks twice a look."""

    def __init__(self, settings: Settings) -> None:
        kafka = settings.kafka
        self._prefix = kafka.topic_prefix
        self._consumer = Consumer(consumer_config(kafka, SINK_GROUP))
        self._admin = AdminClient({**kafka.client_config(), "log.connection.close": False})
        self._places = [
            TopicPartition(f"{kafka.topic_prefix}{topic}", partition) for topic in FOLLOWED for partition in range(kafka.partitions)
        ]

    def offsets(self) -> tuple[dict[tuple[str, int], int], dict[tuple[str, int], int]]:
        """(next offset to be written, next offset to be stored), each by topic and partition."""
        asked = self._admin.list_offsets({place: OffsetSpec.latest() for place in self._places}, request_timeout=10)
        ends = {self._key(place): int(answer.result().offset) for place, answer in asked.items()}
        stored = {self._key(place): max(int(place.offset), 0) for place in self._consumer.committed(self._places, timeout=10)}
        return ends, stored

    def read(self) -> dict[str, int]:
        """Records to go: ``worker`` (it writes a record of bars for each it reads), ``sink_trades``, ``sink_bars``."""
        ends, stored = self.offsets()
        return {
            "worker": sum(max(end - ends["bars", partition], 0) for (topic, partition), end in ends.items() if topic == "trades"),
            "sink_trades": sum(max(end - stored[place], 0) for place, end in ends.items() if place[0] == "trades"),
            "sink_bars": sum(max(end - stored[place], 0) for place, end in ends.items() if place[0] == "bars"),
        }

    def wait_none(self, timeout_s: float) -> None:
        """Return when nothing is left to do. Raises TimeoutError."""
        until = time.monotonic() + timeout_s
        while any((left := self.read()).values()):
            if time.monotonic() > until:
                raise TimeoutError(f"after {timeout_s:.0f} s there is still work: {left}")
            time.sleep(0.1)

    def close(self) -> None:
        """Close the connections."""
        self._consumer.close()

    def _key(self, place: TopicPartition) -> tuple[str, int]:
        return place.topic.removeprefix(self._prefix), place.partition


def stored_ids(settings: Settings, symbols: Sequence[str] | None = None) -> dict[str, tuple[int, int, int, int]]:
    """Symbol -> (rows, distinct ids, least id, greatest id) of table ``trades``."""
    client = connect(settings.clickhouse)
    try:
        counts = client.query("SELECT symbol, count() FROM trades GROUP BY symbol").result_rows
        names = symbols or [row[0] for row in counts]
        found: dict[str, tuple[int, int, int, int]] = {}
        together = max(1, IDS_A_QUERY // max((int(row[1]) for row in counts), default=1))
        for first in range(0, len(names), together):
            rows = client.query(
                "SELECT symbol, count(), uniqExact(trade_id), min(trade_id), max(trade_id) FROM trades"
                " WHERE symbol IN {names:Array(String)} GROUP BY symbol",
                parameters={"names": list(names[first : first + together])},
            ).result_rows
            found |= {str(name): (int(count), int(unique), int(low), int(high)) for name, count, unique, low, high in rows}
        return found
    finally:
        client.close()


def faults(stored: Mapping[str, tuple[int, int, int, int]], truth: Mapping[str, Sequence[int]]) -> list[str]:
    """What differs between the store and ``truth``: symbol -> (first id, last id), all ids between them. Empty: nothing lost or doubled."""
    found = []
    for symbol, (first, last) in truth.items():
        wanted = (last - first + 1, last - first + 1, first, last)
        if stored.get(symbol) != wanted:
            found.append(f"{symbol}: stored {stored.get(symbol)}, published {wanted}")
    return found + [f"{symbol}: never published" for symbol in stored.keys() - truth.keys()]


def row_count(settings: Settings, table: str) -> int:
    """Rows of a table."""
    client = connect(settings.clickhouse)
    try:
        return int(client.query(f"SELECT count() FROM `{table}`").result_rows[0][0])
    finally:
        client.close()
