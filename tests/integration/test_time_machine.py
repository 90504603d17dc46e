"""The time machine on the real stack: runs replay to the same bytes whatever was killed, and sessions show what was known, when it was known."""

from __future__ import annotations

import asyncio
import csv
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.asyncio.client import connect

from infra import parity, sessions
from infra.clickhouse.client import connect as clickhouse
from infra.database import connected
from infra.errors import SettingsError
from infra.kafka import FrameProducer
from infra.parity_findings import Findings
from infra.progress import worker_offsets
from infra.provision import provision
from infra.registry_client import RegistryClient
from infra.repair_publish import BarPublisher
from infra.repair_reader import RepairReader
from infra.repair_run import Outcome
from infra.replay import replay_file
from infra.runs import Run, begin_run, end_run, find_run, list_runs
from infra.seam import SystemClock
from infra.settings import Settings
from infra.stack.kafka import free_ports
from schemas.codec import FrameCodec
from schemas.frames import Frame
from schemas.partitions import partition_of
from schemas.timeframes import parse_time_us
from tests.integration.conftest import RunningStack
from tests.integration.test_worker import messages

CAPTURE = Path(__file__).parents[3] / "shared" / "data" / "ws" / "binance" / "spot_btcusdt_20240808.ws.gz"
KEY = "binance:BTC-USDT"
CLOCK = SystemClock()
US = 1_000_000


@dataclass
class Machine:
    """Worker, sink and API on topics and a database of their own."""

    settings: Settings
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    began_us: int = 0
    """Just before anything was published."""
    stored_us: int = 0
    """When everything of the capture was stored."""

    @property
    def url(self) -> str:
        """Base of REST."""
        return f"http://127.0.0.1:{self.settings.api.port}"

    def start(self, name: str) -> None:
        """Run ``python -m infra.NAME``."""
        environ = self.settings.as_environ() | {"PATH": "/usr/bin:/bin"}
        self.processes[name] = subprocess.Popen([sys.executable, "-m", f"infra.{name}"], env=environ)

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """End a process."""
        process = self.processes.pop(name)
        process.send_signal(number)
        process.wait(30)

    def get(self, path: str, **parameters: object) -> dict[str, Any]:
        """The JSON of a GET."""
        answer: dict[str, Any] = httpx.get(
            f"{self.url}/api/v1/{path}", params={name: str(value) for name, value in parameters.items()}
        ).json()
        return answer

    def bars(self, **parameters: object) -> list[dict[str, Any]]:
        """Bars of the capture's symbol."""
        found: list[dict[str, Any]] = self.get("bars/binance/BTC-USDT", **{"limit": 5_000, **parameters})["bars"]
        return found

    async def session(self, as_of_us: int, **options: Any) -> sessions.Session:
        """A new session."""
        return await sessions.create_session(self.settings, as_of_us=as_of_us, **options)


@pytest.fixture(scope="module")
def machine(stack: RunningStack) -> Iterator[Machine]:
    """A recorded run: a capture replayed at 60x, its worker killed -9 in the middle."""
    if not CAPTURE.exists():
        pytest.skip(f"recorded market data is not here: {CAPTURE.name}")
    worker, sink, port = free_ports(3)
    settings = stack.with_prefix(
        "machine.",
        MARKETSTREAM_CLICKHOUSE_DATABASE="machine",
        MARKETSTREAM_PORT_WORKER=str(worker),
        MARKETSTREAM_PORT_SINK=str(sink),
        MARKETSTREAM_PORT_API=str(port),
    )
    provision(settings)
    running = Machine(settings)
    try:
        for name in ("worker", "sink", "api"):
            running.start(name)
        asyncio.run(record(running))
        yield running
    finally:
        for name in list(running.processes):
            running.stop(name)


async def record(machine: Machine) -> None:
    """Replay the capture; kill the worker once it has published a quarter of its bars."""
    async with asyncio.timeout(120):
        while not await asyncio.to_thread(ready, f"http://127.0.0.1:{machine.settings.worker.health_port}/readyz"):
            await asyncio.sleep(0.1)
    machine.began_us = CLOCK.now_us()
    await begin_run(machine.settings, "none", machine.began_us)
    work = asyncio.create_task(replay_file(machine.settings, CAPTURE, exchange="binance", symbol="BTC-USDT", speed=60))
    while (await asyncio.to_thread(worker_offsets, machine.settings))[partition_of(KEY, 4)][0] < 70:
        await asyncio.sleep(0.1)
    machine.stop("worker", signal.SIGKILL)
    machine.start("worker")
    await work
    machine.stored_us = CLOCK.now_us()


def ready(url: str) -> bool:
    """Whether a process says that it is ready."""
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


async def check(machine: Machine, run: Run | None = None) -> parity.Report:
    """The parity of a run, by default the newest."""
    return await parity.check(machine.settings, run or await find_run(machine.settings, "last"))


def found_in(report: parity.Report) -> Findings:
    """The findings of the capture's partition."""
    return report.findings[partition_of(KEY, 4)]


async def publish_bars(machine: Machine, frame: Frame) -> None:
    """Send a frame into ``bars``."""
    with RegistryClient.from_settings(machine.settings) as registry:
        producer = FrameProducer(machine.settings.kafka, registry)
        await producer.send("bars", partition_of(KEY, 4), frame)
        await producer.flush()


def some_bars(machine: Machine) -> Frame:
    """A worker's frame with final bars, as it stands in the topic."""
    with RegistryClient.from_settings(machine.settings) as registry:
        codec = registry.frame_codec("bars")
    for message in messages(machine.settings, "bars"):
        frame = codec.decode(message.value())
        if frame.row_count and (frame.columns["is_final"] == 1).any() and (frame.columns["timeframe_s"] == 1).any():
            return frame
    raise AssertionError("no final bars in the topic")


class Reader:
    """One subscription of the stream, its messages kept."""

    def __init__(self, machine: Machine, **request: object) -> None:
        self.address = f"ws://127.0.0.1:{machine.settings.api.port}/api/v1/stream"
        wanted = {"op": "subscribe", "id": 1, "channel": "bars", "exchange": "binance", "symbol": "BTC-USDT", "timeframe": "1s"}
        self.request = {name: value for name, value in (wanted | request).items() if value is not None}
        self.messages: list[dict[str, Any]] = []
        self.received_us: list[int] = []

    async def run(self, until: str = "end", most: int | None = None) -> Reader:
        """Read until a message of that type, or ``most`` messages."""
        async with connect(self.address, max_queue=None) as socket, asyncio.timeout(60):
            await socket.send(json.dumps(self.request))
            while True:
                message = json.loads(await socket.recv())
                self.messages.append(message)
                self.received_us.append(CLOCK.now_us())
                if message["type"] in (until, "error") or (most is not None and len(self.messages) >= most):
                    return self

    def rows(self, *types: str) -> list[dict[str, Any]]:
        """Rows of messages of these types."""
        return [row for message in self.messages if message["type"] in types for row in message["data"]]

    def sent(self) -> list[tuple[Any, ...]]:
        """What a client can tell apart, without heartbeats, which depend on its own time."""
        kept = [message for message in self.messages if message["type"] not in ("ack", "heartbeat")]
        return [(message["seq"], message["type"], message["cursor"], json.dumps(message["data"])) for message in kept]


# Runs and parity


async def test_a_run_killed_in_the_middle_replays_to_the_same_bytes(machine: Machine) -> None:
    """Every record byte for byte, every stored row, nothing unexplained."""
    report = await check(machine)
    found = found_in(report)
    assert report.unexplained == 0
    assert found.rows == found.equal >= 367
    assert found.identical_records == found.records > 100
    assert found.trades == 9_757
    stored = report.store[found.partition]
    assert stored.rows == stored.equal == 367
    assert sum(part.pending for part in [*report.findings, *report.store]) == 0
    outputs = {part.topic: part for part in report.outputs}
    assert outputs["quality"].records == outputs["quality"].equal > 0
    assert set(outputs) >= {"quality", "quarantine", "deadletter"}
    assert outputs["bars.rows"].records == outputs["bars.rows"].equal == 8  # a day ends in the capture: every timeframe


async def test_a_planted_last_word_of_the_row_twin_is_found_and_named(machine: Machine) -> None:
    """The newest record of a series with another close; sent again as it was, all is well."""
    with RegistryClient.from_settings(machine.settings) as registry:
        codec = registry.row_codec("bars.rows")
        last = next(message for message in reversed(messages(machine.settings, "bars.rows")) if message.key() == f"{KEY}:1s".encode())
        row = codec.decode(last.value())
        producer = FrameProducer(machine.settings.kafka, registry)
        for close in (row["close"] + 0.01, row["close"]):
            value = codec.encode({**row, "close": close})
            await producer.send_raw("bars.rows", partition_of(KEY, 4), last.key(), value)
            await producer.flush()
            found = next(part for part in (await check(machine)).outputs if part.topic == "bars.rows")
            assert [item.columns for item in found.differences] == ([] if close == row["close"] else [{"close": (close, row["close"])}])
            assert found.unexplained == len(found.differences)


async def test_a_running_run_is_listed_with_its_stretch(machine: Machine) -> None:
    """Start and end offsets per partition; one whose supervisor is gone was killed, and its end is found in the topics."""
    runs = await list_runs(machine.settings)
    assert (runs[-1].state, runs[-1].ended_us) == ("running", None)
    assert runs[-1].records("trades") == runs[-1].records("bars") > 100
    async with connected(machine.settings.postgres) as connection:
        await connection.execute("UPDATE runs SET supervisor_ticks = supervisor_ticks + 1")
    runs = await list_runs(machine.settings)
    assert runs[-1].state == "killed"
    assert machine.began_us < (runs[-1].ended_us or 0) < machine.stored_us
    with pytest.raises(SettingsError, match="There is no run"):
        await find_run(machine.settings, "no-such-run-00")


async def test_a_planted_difference_is_found_and_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar altered in the topic under the same input offset, and a row altered in ClickHouse."""
    monkeypatch.setattr(parity, "_STILL_S", 0.5)  # the planted record makes the worker look as if it were behind
    frame = some_bars(machine)
    columns = {name: column.copy() for name, column in frame.columns.items()}
    columns["close"][0] += 0.01
    await publish_bars(machine, replace(frame, columns=columns))
    report = await check(machine)
    [difference] = found_in(report).differences
    assert report.unexplained == 1
    assert difference.what == f"came again for trades at {frame.input_offset}, with other bytes"
    client = clickhouse(machine.settings.clickhouse)
    try:
        where = "WHERE timeframe_s = 60 AND symbol = 'BTC-USDT' AND revision = 0 ORDER BY open_time_us LIMIT 1"
        place = client.query(f"SELECT open_time_us, kafka_offset FROM bars {where}").result_rows[0]
        client.command(f"INSERT INTO bars SELECT * REPLACE (volume + 1 AS volume) FROM bars {where}")
        report = await check(machine)
        client.command(f"ALTER TABLE bars DELETE WHERE open_time_us = {place[0]} AND timeframe_s = 60 SETTINGS mutations_sync = 1")
        missing = await check(machine)
    finally:
        client.close()
    [difference] = report.store[partition_of(KEY, 4)].differences
    assert difference.key is not None
    assert (difference.what, difference.key.open_time_us, difference.bars_offset) == ("2 times in ClickHouse", place[0], place[1])
    assert [item.what for item in missing.store[partition_of(KEY, 4)].differences] == ["not in ClickHouse"]


async def test_the_next_run_begins_where_this_one_ends(machine: Machine) -> None:
    """A new run closes the old one; `down` ends it in a person's name; what came before is none of its business."""
    name = await begin_run(machine.settings, "none", CLOCK.now_us())
    assert await end_run(machine.settings)
    runs = await list_runs(machine.settings)
    old, new = runs[-2:]
    assert (new.id, new.state) == (name, "ended")
    assert old.end == new.start
    report = await check(machine, new)
    assert (report.unexplained, found_in(report).rows) == (0, 0)


async def test_runs_and_parity_from_the_command_line(machine: Machine, tmp_path: Path) -> None:
    """The list, a certificate that checks out, and exit code 1 with the difference named."""
    runs = json.loads(await command(machine, "runs", "--json"))["runs"]
    assert [run["state"] for run in runs] == ["killed", "ended"]
    file = tmp_path / "certificate.html"
    text = await command(machine, "parity", "last", "--html", str(file))
    assert "PARITY: 0 unexplained rows" in text
    assert "trades/s" in text
    assert "its data are as they were written" in await command(machine, "parity", str(file))
    text = await command(machine, "parity", runs[0]["id"], code=1)  # with the row removed from ClickHouse above
    assert "DIFFERENCE" in text
    assert "not in ClickHouse" in text


# Sessions


async def test_a_session_is_made_listed_and_stopped_from_the_command_line(machine: Machine) -> None:
    """`replay --as-of` prints the id and nothing else on stdout."""
    name = (await command(machine, "replay", "--as-of", str(machine.began_us), "--speed", "60")).strip()
    listed = {entry["session"]: entry for entry in json.loads(await command(machine, "sessions", "list", "--json"))["sessions"]}
    assert (listed[name]["clock"], listed[name]["speed"], listed[name]["as_of_us"]) == ("known", 60, machine.began_us)
    await command(machine, "sessions", "stop", name)
    assert machine.get("symbols", session=name)["code"] == "session_ended"
    await command(machine, "replay", "--as-of", "yesterday", code=2)
    await command(machine, "replay", code=2)


@pytest.mark.parametrize(("clock", "speed"), [("known", 2), ("market", 60)])
async def test_a_session_streams_the_bars_that_history_holds(machine: Machine, clock: str, speed: int) -> None:
    """Every row comes once, at its virtual time and not before, and two clients see the same rows under the same cursors."""
    known = clock == "known"
    as_of_us = machine.began_us if known else parse_time_us("2024-08-08T23:54:15Z")
    until_us = machine.stored_us if known else parse_time_us("2024-08-09T00:00:03Z")
    session = await machine.session(as_of_us, until_us=until_us, speed=speed, clock_name=clock)
    first, second = await asyncio.gather(*(Reader(machine, session=session.id).run() for _ in range(2)))
    held = machine.bars(timeframe="1s", known_at=machine.stored_us)
    assert first.rows("snapshot", "update", "corrected") == held
    assert len(first.rows("update", "corrected")) > 100
    assert second.rows("snapshot", "update", "corrected") == held
    assert session.now_us(CLOCK.now_us()) == until_us
    for at_us, message in zip(first.received_us, first.messages, strict=True):
        if message["type"] == "update" and not known:
            assert message["data"][-1]["close_time_us"] <= session.now_us(at_us)


async def test_a_session_without_a_pace_gives_everything_from_its_beginning_in_order(machine: Machine) -> None:
    """At max two clients get the same messages, numbers and cursors; trades too."""
    session = await machine.session(machine.began_us, until_us=machine.stored_us, speed="max", clock_name="known")
    first, second = [await Reader(machine, session=session.id).run() for _ in range(2)]
    assert first.sent() == second.sent()
    assert first.messages[1]["type"] == "snapshot"
    assert first.messages[1]["data"] == []
    trades = await Reader(machine, session=session.id, channel="trades", timeframe=None).run()
    ids = [row["trade_id"] for row in trades.rows("update")]
    assert len(ids) == 9_757
    assert ids == sorted(ids)


async def test_a_reader_that_comes_back_with_its_cursor_goes_on_without_a_seam(machine: Machine) -> None:
    """Cut anywhere, the rest is the rest; a cursor of the live stream or of another session is refused."""
    session = await machine.session(machine.began_us, until_us=machine.stored_us, speed="max", clock_name="known")
    whole = await Reader(machine, session=session.id).run()
    for most in (2, 9, 60):
        begun = await Reader(machine, session=session.id).run(most=most)
        rest = await Reader(machine, session=session.id, **{"from": begun.messages[-1]["cursor"]}).run()
        assert [entry[1:] for entry in begun.sent() + rest.sent()] == [entry[1:] for entry in whole.sent()]
    other = await machine.session(machine.began_us, speed="max", clock_name="known")
    refused = await Reader(machine, session=other.id, **{"from": whole.messages[-2]["cursor"]}).run()
    assert refused.messages[-1]["data"]["code"] == "cursor_mismatch"


async def test_a_page_of_a_session_is_continued_by_its_stream(machine: Machine) -> None:
    """REST shows what was known at the virtual now; from its cursor the stream sends exactly the rest."""
    session = await machine.session(machine.began_us, until_us=machine.stored_us, speed="4", clock_name="known")
    await asyncio.sleep((machine.stored_us - machine.began_us) / US / 4 / 2)
    page = machine.get("bars/binance/BTC-USDT", timeframe="1s", session=session.id, limit=5000)
    rest = await Reader(machine, session=session.id, **{"from": page["live"]}).run()
    assert page["now_us"] <= machine.stored_us
    assert 0 < page["count"] < 367
    assert page["bars"] + rest.rows("update", "corrected") == machine.bars(timeframe="1s", known_at=machine.stored_us)


async def test_before_and_after_a_revision_a_session_gives_the_old_and_the_new_bar(machine: Machine) -> None:
    """A bar revised by the repair: history as it was known; the stream tells of the correction when it was published."""
    frame = some_bars(machine)
    row = next(
        place for place, final in enumerate(frame.columns["is_final"].tolist()) if final and frame.columns["timeframe_s"][place] == 1
    )
    columns = {name: column[row : row + 1].copy() for name, column in frame.columns.items()}
    columns["revision"] += 1
    columns["volume"] *= 2
    open_us = int(columns["open_time_us"][0])
    before_us = CLOCK.now_us()
    await asyncio.sleep(0.05)
    await publish_bars(machine, Frame(source="repair", watermark_us=0, symbols=frame.symbols, columns=columns, input_offset=-1))
    await asyncio.sleep(0.05)
    after_us = CLOCK.now_us()
    old = await machine.session(before_us, until_us=before_us, clock_name="known")
    new = await machine.session(after_us, until_us=after_us, clock_name="known")
    where = {"timeframe": "1s", "start": open_us, "end": open_us + US}
    [was], [now] = machine.bars(session=old.id, **where), machine.bars(session=new.id, **where)
    assert (was["revision"], now["revision"]) == (0, 1)
    assert now["volume"] == 2 * was["volume"]
    assert [was] == machine.bars(known_at=before_us, **where)
    across = await machine.session(before_us, until_us=after_us, speed="max", clock_name="known")
    told = await Reader(machine, session=across.id).run()
    assert told.rows("corrected") == [now]
    market = await machine.session(open_us, until_us=open_us + 2 * US, speed="max", clock_name="market")
    assert now in (await Reader(machine, session=market.id).run()).rows("update")


async def test_a_repaired_bar_must_be_the_bar_of_its_trades(machine: Machine) -> None:
    """A job is no excuse: the doubled volume is named. The right bar one revision up, published as the repair does it, is fine."""
    client = clickhouse(machine.settings.clickhouse)
    try:
        reader = RepairReader(client, "binance", "BTC-USDT", 1_000)
        newest = reader.newest_bar(1)
        names = ", ".join(name for name in FrameCodec("bars", 1).dtypes if name != "symbol_code")
        found = client.query(f"SELECT {names} FROM bars WHERE symbol = 'BTC-USDT' AND input_offset < 0")
    finally:
        client.close()
    [row] = found.result_rows
    wrong = dict(zip(found.column_names, row, strict=True))
    open_us = wrong["open_time_us"]
    async with connected(machine.settings.postgres) as connection:
        sql = "INSERT INTO repairs (topic_prefix, exchange, symbol, start_us, end_us, reason, trigger) VALUES ($1, 'binance', 'BTC-USDT', $2, $3, 'request', 'test')"
        await connection.execute(sql, machine.settings.kafka.topic_prefix, open_us, open_us + 1)
    run = (await list_runs(machine.settings))[-1]
    report = await check(machine, run)
    assert found_in(report).explained == {"repair: request": 1}
    assert (report.repaired.bars, report.repaired.unexplained) == (1, 1)
    [difference] = report.repaired.differences
    assert difference.key is not None
    assert (difference.key.open_time_us, difference.key.revision) == (open_us, 1)
    assert difference.columns == {"volume": (wrong["volume"], wrong["volume"] / 2)}
    assert [item.what for part in report.outputs for item in part.differences] == ["has no record in bars.rows"]

    right = wrong | {"revision": 2, "volume": wrong["volume"] / 2}
    rows = {name: np.array([right[name]], dtype) for name, dtype in FrameCodec("bars", 1).dtypes.items() if name != "symbol_code"}
    with RegistryClient.from_settings(machine.settings) as registry:
        publisher = BarPublisher(FrameProducer(machine.settings.kafka, registry), registry)
        await publisher.publish(KEY, partition_of(KEY, 4), Outcome(rows=rows, newest=[newest], checked=1, waits_us=None))
    for known, count in ((run, 1), ((await list_runs(machine.settings))[-1], 2)):  # published behind the end of the run, and in it
        report = await check(machine, known)
        assert found_in(report).explained == {"repair: request": count}
        assert (report.repaired.bars, report.repaired.equal, report.unexplained) == (1, 1, 0)


async def test_a_session_by_market_time_closes_bars_as_they_closed(machine: Machine) -> None:
    """A recording stored years later: at a virtual now every bar that had closed is there, and none that had not."""
    as_of_us = parse_time_us("2024-08-08T23:56:30Z")
    session = await machine.session(as_of_us, until_us=as_of_us + 60 * US, speed="20")
    assert session.clock == "market"
    reader = asyncio.create_task(Reader(machine, session=session.id, limit=3).run())
    await asyncio.sleep(1)
    page = machine.get("bars/binance/BTC-USDT", timeframe="1s", session=session.id, limit=5000)
    assert max(bar["close_time_us"] for bar in page["bars"]) in range(page["now_us"] - US, page["now_us"] + 1)
    trades = machine.get("trades/binance/BTC-USDT", session=session.id, limit=1)
    assert trades["trades"][0]["exchange_time_us"] <= trades["now_us"]
    told = await reader
    assert len(told.messages[1]["data"]) == 3
    times = [bar["close_time_us"] for bar in told.rows("snapshot", "update")]
    assert times == list(range(times[0], as_of_us + 60 * US + 1, US))
    listed = machine.get("symbols", session=session.id)["symbols"]
    assert listed[0]["last_trade_time_us"] <= as_of_us + 60 * US
    assert 0 < listed[0]["trade_count"] < 9_757


async def test_quality_and_coverage_are_as_the_session_knows_them(machine: Machine) -> None:
    """No score of a later time; the ledger up to the virtual now, asked as it was known."""
    early = await machine.session(machine.began_us, until_us=machine.began_us, clock_name="known")
    late = await machine.session(machine.began_us, until_us=machine.stored_us, speed="max", clock_name="known")
    feeds = [machine.get("quality/BTC-USDT", session=one.id)["feeds"] for one in (early, late)]
    assert (len(feeds[0]), len(feeds[1])) == (0, 1)
    covered = machine.get("coverage", session=early.id)
    assert (covered["end_us"], covered["count"]) == (machine.began_us, 0)
    assert machine.get("coverage", session="s-no-one-00")["code"] == "unknown_session"


async def test_unknown_and_stopped_sessions_are_refused_in_one_sentence(machine: Machine) -> None:
    """404 on REST, an error on the stream, also for one that is being read."""
    session = await machine.session(machine.began_us, speed="1", clock_name="known")
    assert machine.get("symbols", session=session.id)["count"] >= 0
    reader = asyncio.create_task(Reader(machine, session=session.id).run())
    await asyncio.sleep(0.2)
    await sessions.stop_session(machine.settings, session.id)
    ended = await reader
    assert ended.messages[-1]["data"]["code"] == "session_ended"
    answer = httpx.get(f"{machine.url}/api/v1/bars/binance/BTC-USDT", params={"session": session.id})
    assert (answer.status_code, answer.json()["code"]) == (404, "session_ended")
    unknown = await Reader(machine, session="s-no-one-00").run()
    assert unknown.messages[-1]["data"]["code"] == "unknown_session"
    with pytest.raises(SettingsError, match="was stopped"):
        await sessions.find_session(machine.settings, session.id)
    with pytest.raises(SettingsError, match="not in the past"):
        await machine.session(CLOCK.now_us() + 60 * US)


@pytest.mark.parametrize("clock", ["known", "market"])
async def test_tail_and_export_show_what_a_session_sees(machine: Machine, clock: str, tmp_path: Path) -> None:
    """From the command line: every bar of the session once and in order, and the same bars in a file."""
    begin_us, end_us = (machine.began_us, machine.stored_us) if clock == "known" else (1_723_161_250 * US, 1_723_161_650 * US)
    session = await machine.session(begin_us, until_us=end_us, speed="max", clock_name=clock)
    held = [bar for bar in machine.bars(timeframe="1s", known_at=machine.stored_us) if bar["close_time_us"] <= end_us]
    where = "timeframe=1s and symbol=BTC-USDT"
    shown = await command(machine, "tail", "bars", "--session", session.id, "--where", where, "--json")
    rows = [json.loads(line) for line in shown.splitlines()]
    assert [(row["open_time_us"], row["close"]) for row in rows] == [(bar["open_time_us"], bar["close"]) for bar in held]
    file = tmp_path / "bars.csv"
    target = ("--exchange", "binance", "--symbol", "BTC-USDT", "--timeframe", "1s", "-o", str(file))
    await command(machine, "export", "bars", "--session", session.id, *target)
    with file.open(newline="") as stream:
        assert [int(row["open_time_us"]) for row in csv.DictReader(stream)] == [bar["open_time_us"] for bar in held]


async def command(machine: Machine, *arguments: str, code: int = 0) -> str:
    """What `marketstream ARGUMENTS` prints, ending with that exit code."""
    environ = machine.settings.as_environ() | {"PATH": "/usr/bin:/bin"}
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(sys.executable, "-m", "infra.cli.main", *arguments, env=environ, stdout=pipe, stderr=pipe)
    out, err = await asyncio.wait_for(child.communicate(), 60)
    assert child.returncode == code, err.decode()
    return out.decode()
