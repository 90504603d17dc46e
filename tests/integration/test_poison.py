"""A poison record never stops a partition: of any topic, for any consumer, of any kind; what follows is processed, and a letter says what it was."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from confluent_kafka import Producer

from infra.cli.main import main
from infra.clickhouse.client import connect
from infra.kafka import committed_offsets, end_offsets, producer_config
from infra.newest_bars import newest_worker_bars
from infra.progress import SINK_GROUP, worker_offsets
from infra.provision import provision
from infra.registry_client import RegistryClient
from infra.repair_triggers import GROUP as REPAIR_GROUP
from infra.settings import Settings
from infra.stack.kafka import free_ports
from infra.stack.registry_log import SchemaLog
from infra.stack.registry_store import Store
from infra.worker import KafkaStateLog
from schemas.codec import MAX_RECORD_BYTES, FrameCodec, RowCodec, schema_text
from schemas.frames import HISTORY, Frame, GapNotice
from schemas.topics import TOPICS, subject
from streams.state_store import load, save
from tests.integration.conftest import RunningStack

ROOT = Path(__file__).resolve().parents[2]
START_US = 1_723_161_600_000_000
KEY = "binance:GOOD-USDT"
PREFIX = "poison."
COLUMN = '{"name":"later_column","type":{"type":"bytes","logicalType":"int64-le"},"default":"","fill":0}'
FIELD = '{"name":"later_field","type":"string","default":""}'
NAMES = [name for name, topic in TOPICS.items() if topic.kind != "raw" and not name.endswith(".rows")]
LARGE = ("trades", "gaps", "deadletter")
"""Topics that get records of 8 MiB, one for each kind of consumer."""
BIGGEST = np.iinfo(np.int64).max


@dataclass
class Pipeline:
    """The processes of a stack."""

    settings: Settings
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """Run ``python -m infra.NAME``."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith("MARKETSTREAM_")} | self.settings.as_environ()
        with (self.settings.data_dir / f"test-{PREFIX}{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen([sys.executable, "-m", f"infra.{name}"], env=environ, cwd=ROOT, stdout=log, stderr=log)

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """End a process."""
        process = self.processes.pop(name)
        process.send_signal(number)
        process.wait(20)


@pytest.fixture(scope="module")
def pipeline(stack: RunningStack) -> Iterator[Pipeline]:
    """Worker, sink, repair and API on topics and a database of their own."""
    ports = dict(zip(("WORKER", "SINK", "API", "REPAIR"), free_ports(4), strict=True))
    running = Pipeline(
        stack.with_prefix(
            PREFIX,
            MARKETSTREAM_CLICKHOUSE_DATABASE="poison",
            MARKETSTREAM_WORKER_SNAPSHOT_INTERVAL_S="0.2",
            **{f"MARKETSTREAM_PORT_{name}": str(port) for name, port in ports.items()},
        )
    )
    provision(running.settings)
    try:
        for name in ("worker", "sink", "repair", "api"):
            running.start(name)
        yield running
    finally:
        for name in list(running.processes):
            running.stop(name)


class Sender:
    """Publishes bytes and good records; counts what must come out."""

    def __init__(self, settings: Settings, registry: RegistryClient) -> None:
        self._registry = registry
        self._prefix = settings.kafka.topic_prefix
        self._producer = Producer(producer_config(settings.kafka))
        self._serial = 0
        self.good: dict[str, int] = {}
        self.poison: set[tuple[str, int, int]] = set()

    def send(self, topic: str, value: bytes | None, *, partition: int = 0, key: bytes | None = None) -> int:
        """The record's offset."""
        done: list[Any] = []
        self._producer.produce(
            self._prefix + topic, value, key, partition, on_delivery=lambda error, message: done.append((error, message))
        )
        self._producer.flush(20)
        assert done[0][0] is None
        return int(done[0][1].offset())

    def send_poison(self, topic: str, value: bytes | None) -> None:
        """A record nobody can read."""
        self.poison.add((topic, 0, self.send(topic, value)))

    def send_good(self, topic: str, codec: FrameCodec | RowCodec) -> None:
        """A record everybody can read, of one row."""
        self._serial += 1
        self.good[topic] = self.good.get(topic, 0) + 1
        self.send(topic, codec.encode(self.frame(codec) if isinstance(codec, FrameCodec) else self.row(codec)))  # type: ignore[arg-type]

    def codec(self, topic: str) -> FrameCodec | RowCodec:
        """Today's codec."""
        return self._registry.frame_codec(topic) if TOPICS[topic].kind == "frame" else self._registry.row_codec(topic)

    def newer_codec(self, topic: str) -> FrameCodec | RowCodec:
        """A codec of the next release: one more column or field, registered."""
        name, is_frame = TOPICS[topic].schema, TOPICS[topic].kind == "frame"
        text = f"{schema_text(name)[:-2]},{COLUMN if is_frame else FIELD}]}}"
        answer = self._registry._request("POST", f"/subjects/{subject(name, self._prefix)}/versions", {"schema": text})
        return (FrameCodec if is_frame else RowCodec)(name, int(answer["id"]), text)

    def frame(self, codec: FrameCodec) -> Frame:
        """One row; what it says is plausible."""
        columns = {name: np.ones(1, dtype) for name, dtype in codec.dtypes.items()} | {"symbol_code": np.zeros(1, np.int32)}
        columns |= {name: np.array([START_US + self._serial]) for name in columns if name.endswith("_time_us")}
        columns |= {name: np.array([self._serial]) for name in columns if name in ("trade_id", "gap_id")}
        columns |= {"state": np.zeros(1, np.int8)} if codec.name == "gaps" else {}
        return Frame(source="test", watermark_us=START_US, symbols=(KEY,), columns=columns)

    def row(self, codec: RowCodec) -> dict[str, Any]:
        """Text "good" everywhere."""
        values = {"string": "good", "int": -1, "long": START_US, "double": 1.0, "bytes": b"good"}
        found = {
            entry["name"]: values.get(entry["type"] if isinstance(entry["type"], str) else "") for entry in json.loads(codec.text)["fields"]
        }
        return found | ({"offset": -1, "origin": -1} if codec.name == "deadletter" else {})


def poisons(topic: str, good: bytes) -> dict[str, bytes | None]:
    """Records that cannot be read, by what is wrong with them."""
    found: dict[str, bytes | None] = {
        "garbage": b"\xde\xad\xbe\xef" * 9,
        "no value": None,
        "empty": b"",
        "header only": good[:5],
        "unknown schema id": b"\0\x7f\xff\xff\xf0" + good[5:],
        "schema of another topic": None,  # put in below
        "cut in the middle": good[: len(good) // 2],
        "one byte short": good[:-1],
        "one byte long": good + b"\0",
        "huge lengths": good[:5] + b"\xff" * 9 + b"\x7f" + good[6:],
        "text": b'{"symbol": "BTC-USDT"}',
    }
    if topic in LARGE:
        found |= {"8 MiB": good[:5] + b"\xff" * (MAX_RECORD_BYTES - 5), "more than 8 MiB": b"\0" * (MAX_RECORD_BYTES + 32_768)}
    return found


def until(check: Callable[[], Any], what: Callable[[], Any], seconds: float = 120) -> None:
    """Until ``check()`` holds; ``what()`` is said where it does not."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, what()
        time.sleep(0.1)


def settled(settings: Settings) -> dict[str, Any]:
    """What each consumer still has to read; {} when it is nothing."""
    ends = end_offsets(settings.kafka, NAMES)
    left: dict[str, Any] = {}
    for group, names in ((SINK_GROUP, NAMES), (REPAIR_GROUP, ["gaps", "deadletter", "quarantine"])):
        done = committed_offsets(settings.kafka, group, names)
        left |= {
            f"{group} {name}[{place}]": (done[name][place], end)
            for name in names
            for place, end in ends[name].items()
            if max(done[name][place], 0) < end
        }
    worker = worker_offsets(settings)
    return left | {f"worker [{place}]": (worker[place][0], end) for place, end in ends["trades"].items() if worker[place][0] < end - 1}


def query(settings: Settings, sql: str) -> list[tuple[Any, ...]]:
    """Rows of ClickHouse."""
    client = connect(settings.clickhouse)
    try:
        return [tuple(row) for row in client.query(sql).result_rows]
    finally:
        client.close()


def api_tail(settings: Settings, name: str) -> dict[tuple[str, int], int]:
    """A gauge of the API's live tails."""
    text = httpx.get(f"http://127.0.0.1:{settings.api.port}/metrics", timeout=5).text
    found = re.findall(name + r'\{partition="(\d+)",topic="(\w+)"\} ([\d.e+]+)', text)
    found += [(place, topic, value) for topic, place, value in re.findall(name + r'\{topic="(\w+)",partition="(\d+)"\} ([\d.e+]+)', text)]
    return {(topic, int(place)): int(float(value)) for place, topic, value in found}


def test_what_follows_a_poison_record_is_processed_by_every_consumer(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every topic gets every kind of poison, a good record after each, and records of a newer release; all good ones are stored.

    Each poison record has one letter with its bytes and place; worker, sink, repair and the API's live tail come to the end of each
    partition. Then all are started anew, with damaged snapshots and damaged bars at the end of the topics, and go on.
    """
    settings = pipeline.settings
    with RegistryClient.from_settings(settings) as registry:
        sender = Sender(settings, registry)
        for topic in NAMES:
            codec, newer = sender.codec(topic), sender.newer_codec(topic)
            sender.send_good(topic, codec)
            good = codec.encode(sender.frame(codec) if isinstance(codec, FrameCodec) else sender.row(codec))  # type: ignore[arg-type]
            other = sender.codec("onchain" if topic != "onchain" else "trades")
            for kind, value in poisons(topic, good).items():
                if kind == "schema of another topic":
                    value = other.schema_id.to_bytes(5, "big") + b"\x02a" * 30
                sender.send_poison(topic, value)
                sender.send_good(topic, codec)
            sender.send_good(topic, newer)
        until(lambda: not settled(settings), lambda: settled(settings))
        assert not [name for name, process in pipeline.processes.items() if process.poll() is not None]
        _check_stored(settings, sender)
        _check_api(settings, sender)

        # Everything anew, on top of what is damaged.
        for name in ("worker", "repair", "api", "sink"):
            pipeline.stop(name, signal.SIGKILL)
        for key, value in (
            (b"manifest", b"garbage"),
            (b"manifest", json.dumps({"chunks": [[-5, 1, 1], [BIGGEST, 1, 1]]}).encode()),
            (None, None),
        ):
            sender.send("bars.state", value, key=key)
        sender.send_poison("bars", b"the newest record of the partition")
        for name in ("worker", "repair", "api", "sink"):
            pipeline.start(name)
        for topic in NAMES:
            sender.send_good(topic, sender.codec(topic))
        until(lambda: not settled(settings), lambda: settled(settings))
        _check_stored(settings, sender)
    for name, value in settings.as_environ().items():
        monkeypatch.setenv(name, value)
    for topic in ("trades", "bars", "deadletter"):
        assert main(["tail", topic, "--from", "earliest", "--no-follow", "--json"]) == 0
        assert capsys.readouterr().out.count("\n") >= sender.good[topic]


def _check_stored(settings: Settings, sender: Sender) -> None:
    """Every good record is stored once, and every poison record has one letter."""
    stored = {}
    for topic in NAMES:
        where = {"bars": "input_offset = -1", "deadletter": "reason = 'good'", "onchain": "1"}.get(topic, "symbol = 'GOOD-USDT'")
        column = "input_offset" if topic in ("quality", "quarantine") else ""
        where += f" AND {column} = -1" if column else ""
        stored[topic] = query(settings, f"SELECT count() FROM `{topic}` WHERE {where}")[0][0]
    assert stored == sender.good
    letters = query(
        settings,
        "SELECT topic, partition, offset, count(), any(component) FROM deadletter WHERE reason = 'undecodable_frame' GROUP BY 1, 2, 3",
    )
    assert {tuple(row[:3]) for row in letters} == sender.poison
    assert {row[3] for row in letters} == {1}
    assert {(row[0] == "trades", row[4]) for row in letters} == {(True, "worker"), (False, "sink")}


def _check_api(settings: Settings, sender: Sender) -> None:
    """The live tail stands at the end of both topics, with the unreadable records counted."""
    ends = {(name, place): end for name, of in end_offsets(settings.kafka, ["trades", "bars"]).items() for place, end in of.items() if end}
    until(
        lambda: {place: api_tail(settings, "api_hub_next_offset").get(place) for place in ends} == ends,
        lambda: (api_tail(settings, "api_hub_next_offset"), ends),
    )


HOSTILE: dict[str, dict[str, Any]] = {
    "no key": {"symbols": ("nocolon",)},
    "empty key": {"symbols": ("",), "columns": {"price": np.array([np.nan])}},
    "only a colon": {"symbols": (":",), "columns": {"price": np.array([-1.0])}},
    "unknown venue": {"symbols": ("moon:BTC-USDT",)},
    "a million letters": {"symbols": ("binance:" + "A" * 1_000_000,)},
    "no letters at all": {"symbols": ("binance:\0\n\u2028'`",)},
    "time before all time": {"columns": {"exchange_time_us": np.array([-BIGGEST - 1]), "receive_time_us": np.array([-BIGGEST - 1])}},
    "time after all time": {"columns": {"exchange_time_us": np.array([BIGGEST]), "receive_time_us": np.array([BIGGEST])}},
    "the year 2300": {"columns": {"exchange_time_us": np.array([10_413_792_000_000_000])}},
    "1970": {"columns": {"exchange_time_us": np.array([0])}},
    "1960": {"columns": {"exchange_time_us": np.array([-315_619_200_000_000])}},
    "no number": {"columns": {"price": np.array([np.nan]), "size": np.array([np.inf])}},
    "smallest id": {"columns": {"trade_id": np.array([-BIGGEST - 1])}},
    "largest id": {"columns": {"trade_id": np.array([BIGGEST])}},
    "watermark at the end of time": {"watermark_us": BIGGEST, "source": "other", "symbols": ("binance:ENDED-USDT",)},
    "every flag": {"flags": 2**31 - 1},
    "no flag there is": {"flags": -1},
    "the past, of no key": {"flags": HISTORY, "symbols": ("nocolon",)},
    "gaps that cannot be": {"gaps": (GapNotice(0, BIGGEST, BIGGEST, -BIGGEST - 1, 1), GapNotice(0, -1, 0, 0, 99))},
}


def test_frames_that_say_what_cannot_be_stop_nobody(pipeline: Pipeline) -> None:
    """Well-formed frames with impossible keys, times, numbers and flags pass worker, sink, repair and API; what follows is stored."""
    settings = pipeline.settings
    with RegistryClient.from_settings(settings) as registry:
        sender = Sender(settings, registry)
        sender._serial = 10_000
        for topic in ("trades", "quotes", "gaps", "quarantine", "quality"):
            codec = sender.codec(topic)
            assert isinstance(codec, FrameCodec)
            for change in HOSTILE.values():
                sender._serial += 1
                frame = sender.frame(codec)
                known = {name: value for name, value in change.get("columns", {}).items() if name in codec.dtypes}
                fields = {name: getattr(frame, name) for name in ("source", "watermark_us", "symbols", "input_offset", "flags")}
                sender.send(topic, codec.encode(Frame(**fields | change | {"columns": {**frame.columns, **known}})))
            sender.send_good(topic, codec)
        until(lambda: not settled(settings), lambda: settled(settings))
    assert not [name for name, process in pipeline.processes.items() if process.poll() is not None]
    newest = query(settings, "SELECT max(trade_id) FROM trades WHERE symbol = 'GOOD-USDT' AND trade_id < 1000000")
    assert newest[0][0] == 10_000 + len(HOSTILE) + 1
    _check_api(settings, sender)


def test_the_registry_reads_on_past_damaged_schema_records(stack: RunningStack) -> None:
    """Records of the schema topic that are no JSON, no object or lack a field are skipped; those around them are known after a start."""
    settings = stack.with_prefix("poison-registry.")
    log = SchemaLog(settings.kafka.client_config(), "poison-registry._schemas", 1)
    log.ensure_topic()

    def record(name: str, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        value = {"subject": name, "version": 1, "id": number, "schema": '"string"', "deleted": False}
        return {"keytype": "SCHEMA", "subject": name, "version": 1, "magic": 1}, value

    log.write([record("before", 1)])
    producer = Producer(producer_config(settings.kafka))
    key = json.dumps(record("broken", 2)[0]).encode()
    damaged: list[tuple[bytes | None, bytes | None]] = [
        (b"garbage", b"garbage"), (None, None), (b"", b""), (key, b"garbage"), (key, b"[]"), (key, b"{}"), (key, b'{"id": "x"}'), (key, b"[" * 100_000),
        (b'{"keytype": "SCHEMA"}', b"{}"), (b'{"keytype": "SCHEMA", "subject": "s"}', b"{}"), (b'{"keytype": "CONFIG", "subject": []}', b"{}"),
        (b'{"keytype": "DELETE_SUBJECT", "subject": "before"}', b"{}"), (key, json.dumps({"id": 3, "schema": 5}).encode()), (b"\xff\xfe", b"\xff"),
    ]  # fmt: skip
    for one, value in damaged:
        producer.produce("poison-registry._schemas", value, one)
    producer.flush(10)
    log.write([record("after", 9)])
    store = Store("FULL_TRANSITIVE")
    for one_key, one_value in log.read_all():
        store.apply(one_key, one_value)
    assert {"before", "after"} <= set(store.subjects())


def test_a_snapshot_is_found_behind_damaged_state_records(pipeline: Pipeline) -> None:
    """The newest whole snapshot wins, whatever lies between and after; a new one is found again."""
    settings = pipeline.settings
    producer = Producer(producer_config(settings.kafka))
    partition = 3

    def damage() -> None:
        for key, value in (
            (b"manifest", b""), (b"manifest", b"[]"), (b"manifest", b'{"chunks": [["a", 1, 1]]}'), (b"manifest", b'{"chunks": []}'), (b"manifest", None),
            (b"manifest", b'{"chunks": [[-1, 1, 1]]}'), (b"manifest", b'{"chunks": [[0, 1, 1], [9223372036854775807, 1, 1]]}'), (b"chunk", b""), (None, None),
            (b"manifest", b"\xff" * 1000), (b"manifest", b'{"chunks": [[1e400, 1, 1]]}'), (b"manifest", b"[" * 100_000),
        ):  # fmt: skip
            producer.produce(f"{PREFIX}bars.state", value, key, partition)
        producer.flush(10)

    log = KafkaStateLog(settings, partition, producer)
    for state in (b"first" * 1000, b"second" * 1000):
        damage()
        save(log, state, 7)
        damage()
        assert load(log) == state


def test_a_damaged_bars_record_hides_no_progress(pipeline: Pipeline) -> None:
    """What was made last is found behind records that cannot be read: `status`, replay and a starting worker ask for it."""
    settings = pipeline.settings
    with RegistryClient.from_settings(settings) as registry:
        codec = registry.frame_codec("bars")
        before = newest_worker_bars(settings.kafka, registry, codec, 0)
        sender = Sender(settings, registry)
        for _ in range(3):
            sender.send("bars", b"damaged")
        assert newest_worker_bars(settings.kafka, registry, codec, 0) == before is not None


async def test_letters_of_a_record_that_is_processed_again_are_stored_once(pipeline: Pipeline) -> None:
    """A worker that crashed writes the letters of the records behind its snapshot again; the table keeps one of each."""
    settings = pipeline.settings
    await asyncio.to_thread(until, lambda: not settled(settings), lambda: settled(settings))
    with RegistryClient.from_settings(settings) as registry:
        codec = registry.row_codec("deadletter")
        sender = Sender(settings, registry)
        row = {
            "reason": "twice",
            "detail": "d",
            "component": "worker",
            "topic": "trades",
            "partition": 1,
            "time_us": START_US,
            "raw_size": 1,
            "raw": b"x",
        }
        for _ in range(2):
            for offset in (5, 6, 7):
                for place in ("row 1", "row 2"):
                    sender.send("deadletter", codec.encode({**row, "offset": offset, "place": place}))
            await asyncio.to_thread(until, lambda: not settled(settings), lambda: settled(settings))
        sender.send(
            "deadletter", codec.encode({**row, "offset": 5, "place": "row 1", "origin": 3})
        )  # a retry that failed is another letter
        sender.send("deadletter", codec.encode({**row, "offset": -1, "topic": "", "place": "a file:3"}))
        sender.send("deadletter", codec.encode({**row, "offset": -1, "topic": "", "place": "a file:3"}))
        await asyncio.to_thread(until, lambda: not settled(settings), lambda: settled(settings))
    assert query(settings, "SELECT count(), countIf(origin = 3), countIf(offset = -1) FROM deadletter WHERE reason = 'twice'") == [
        (9, 1, 2)
    ]
