"""The API on the real stack: history, live and the seam between them, exactly once and in order; and what it says when a store is away."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx
import pyarrow as pa
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from infra.clickhouse.client import connect as clickhouse
from infra.kafka import FrameProducer, committed_offsets, end_offsets
from infra.progress import SINK_GROUP
from infra.provision import provision
from infra.registry_client import RegistryClient
from infra.settings import Settings
from infra.stack.kafka import free_ports
from schemas.frames import Frame
from schemas.partitions import partition_of
from schemas.topics import TOPICS
from tests.api.support import bar_open_us, bars_frame, trades_frame
from tests.integration.conftest import RunningStack

SYMBOL = "binance/BTC-USDT"


@dataclass
class RunningApi:
    """The API process and its neighbours."""

    settings: Settings
    processes: dict[str, subprocess.Popen[bytes]]

    @property
    def url(self) -> str:
        """Base of REST."""
        return f"http://127.0.0.1:{self.settings.api.port}"

    @property
    def stream(self) -> str:
        """Address of the stream."""
        return f"ws://127.0.0.1:{self.settings.api.port}/api/v1/stream"

    def start(self, name: str) -> None:
        """Run ``python -m infra.NAME``."""
        environ = self.settings.as_environ() | {"PATH": "/usr/bin:/bin"}
        self.processes[name] = subprocess.Popen([sys.executable, "-m", f"infra.{name}"], env=environ)

    def wait_ready(self, timeout_s: float = 30) -> None:
        """Return when ``/readyz`` says so."""
        until = time.monotonic() + timeout_s
        while True:
            try:
                answer = httpx.get(self.url + "/readyz", timeout=5)
                if answer.status_code == 200:
                    return
                text = answer.text
            except httpx.HTTPError as exc:
                text = repr(exc)
            assert time.monotonic() < until, text
            time.sleep(0.1)

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """End a process."""
        process = self.processes.pop(name)
        os.kill(process.pid, number)
        process.wait(30)


@pytest.fixture(scope="module")
def api(stack: RunningStack) -> Iterator[RunningApi]:
    """Sink and API with topics and a database of their own."""
    sink, port = free_ports(2)
    settings = stack.with_prefix(
        "api.",
        MARKETSTREAM_CLICKHOUSE_DATABASE="api",
        MARKETSTREAM_PORT_SINK=str(sink),
        MARKETSTREAM_PORT_API=str(port),
    )
    provision(settings)
    running = RunningApi(settings, {})
    try:
        for name in ("sink", "api"):
            running.start(name)
        running.wait_ready()
        yield running
    finally:
        for name in list(running.processes):
            running.stop(name)


class Market:
    """Makes trades and 1 s bars of a symbol and sends them as collectors and workers do: often twice, sometimes late."""

    def __init__(self, settings: Settings, symbol: str, seed: int) -> None:
        self.key = f"binance:{symbol}"
        self.next_id = 1
        self.bar = 0
        self._random = Random(seed)
        self._registry = RegistryClient.from_settings(settings)
        self._producer = FrameProducer(settings.kafka, self._registry)
        self._partition = partition_of(self.key, settings.kafka.partitions)
        self._sent: list[tuple[str, Frame]] = []

    async def produce(self, records: int, pause_s: float = 0.0) -> None:
        """Send about ``records`` records."""
        for place in range(records):
            dice = self._random.random()
            if dice < 0.15 and self._sent:
                await self._send(*self._random.choice(self._sent[-50:]), note=False)
            elif dice < 0.2 and self.bar > 3:
                late = self._random.randrange(max(0, self.bar - 30), self.bar)
                await self._send("bars", self._bars([(late, self._random.randint(1, 4), 1)]))
            elif dice < 0.6:
                count = self._random.randint(1, 20)
                await self._send("trades", trades_frame(self.key, range(self.next_id, self.next_id + count)))
                self.next_id += count
            else:
                count = self._random.randint(1, 2)
                await self._send("bars", self._bars([(self.bar + n, 0, 1) for n in range(count)] + [(self.bar + count, 0, 0)]))
                self.bar += count
            if pause_s and place % 4 == 0:
                await asyncio.sleep(pause_s)
        await asyncio.to_thread(self._producer._producer.flush, 20)

    async def wait_stored(self, settings: Settings) -> None:
        """Return when the sink has stored everything."""
        ends = end_offsets(settings.kafka, ("bars", "trades"))
        until = time.monotonic() + 30
        while True:
            stored = committed_offsets(settings.kafka, SINK_GROUP, ("bars", "trades"))
            if all(stored[name].get(part, -1) >= end for name, parts in ends.items() for part, end in parts.items() if end):
                return
            assert time.monotonic() < until, (ends, stored)
            await asyncio.sleep(0.1)

    def close(self) -> None:
        """Close the registry's connection."""
        self._registry.close()

    def _bars(self, bars: list[tuple[int, int, int]]) -> Frame:
        return bars_frame(self.key, bars, timeframe_s=1, input_offset=len(self._sent))

    async def _send(self, topic: str, frame: Frame, *, note: bool = True) -> None:
        await self._producer.send(topic, self._partition, frame)
        if note:
            self._sent.append((topic, frame))


@dataclass
class Follower:
    """A client that reads history once, then follows the stream through any number of disconnects."""

    api: RunningApi
    path: str
    request: dict[str, Any]
    random: Random
    history: list[dict[str, Any]] = field(default_factory=list)
    received: list[dict[str, Any]] = field(default_factory=list)
    cursor: str = ""
    connects: int = 0
    last: int = -1
    """Key of the last row there will be."""

    async def run(self, done: asyncio.Event) -> None:
        """Follow until ``done`` is set, ``last`` has come and nothing came for two seconds."""
        await self._read_history()
        while True:
            try:
                async with connect(self.api.stream, max_size=None) as socket:
                    self.connects += 1
                    await socket.send(json.dumps({"op": "subscribe", "id": 1, "from": self.cursor, **self.request}))
                    if await self._listen(socket, done):
                        return
            except (OSError, ConnectionClosed):
                await asyncio.sleep(0.05)

    async def _read_history(self) -> None:
        async with httpx.AsyncClient(base_url=self.api.url, timeout=20) as http:
            query: dict[str, Any] = {"start": "2020-01-01", "limit": 500} | {
                name: self.request[name] for name in ("timeframe",) if name in self.request
            }
            pages = self.random.randint(1, 4)
            while True:
                answer = await http.get(f"/api/v1/{self.path}", params=query)
                assert answer.status_code == 200, answer.text
                page = answer.json()
                self.history += page[self.request["channel"]]
                self.cursor = page["live"]
                assert answer.headers["x-live-cursor"] == self.cursor
                pages -= 1
                if page["next"] is None or pages == 0:
                    return
                query = {name: query[name] for name in ("timeframe",) if name in query} | {"limit": 300, "cursor": page["next"]}

    async def _listen(self, socket: ClientConnection, done: asyncio.Event) -> bool:
        """Read for a while; True when there is nothing more to come."""
        leave_after = self.random.randint(1, 40)
        while leave_after:
            try:
                message = json.loads(await asyncio.wait_for(socket.recv(), 2))
            except TimeoutError:
                if done.is_set() and any(row.get("trade_id", row.get("open_time_us")) == self.last for row in self.received):
                    return True
                continue
            if message["type"] == "error":
                assert message["data"]["code"] == "restart", message  # the server says so where it still can; the connection closes next
                return False
            if message["type"] == "ack":
                continue
            assert message["type"] not in ("reset", "snapshot"), message
            self.cursor = message["cursor"]
            if message["type"] != "heartbeat":
                self.received += [row for row in message["data"] if row.get("is_final", True)]
                leave_after -= 0 if done.is_set() else 1
        return False


def _stored(settings: Settings, sql: str) -> list[tuple[Any, ...]]:
    client = clickhouse(settings.clickhouse)
    try:
        return list(client.query(sql).result_rows)
    finally:
        client.close()


async def test_history_and_stream_join_exactly_once_through_disconnects_and_restarts(api: RunningApi) -> None:
    """Clients read history, follow, leave and resume while rows flow and the API is killed: their rows are the store's, each once."""
    settings = api.settings
    market = Market(settings, "BTC-USDT", 1)
    await market.produce(1500)
    await market.wait_stored(settings)
    done = asyncio.Event()
    bars = {"channel": "bars", "exchange": "binance", "symbol": "BTC-USDT", "timeframe": "1s"}
    trades = {"channel": "trades", "exchange": "binance", "symbol": "BTC-USDT"}
    followers = [
        *(Follower(api, f"bars/{SYMBOL}", bars, Random(seed)) for seed in range(4)),
        *(Follower(api, f"trades/{SYMBOL}", trades, Random(seed)) for seed in range(20, 24)),
    ]
    tasks = [asyncio.ensure_future(follower.run(done)) for follower in followers]
    for number in (signal.SIGKILL, signal.SIGTERM, None):
        await market.produce(1500, 0.01)
        if number is not None:
            api.stop("api", number)
            api.start("api")
        await market.produce(300, 0.01)
    for follower in followers:
        follower.last = market.next_id - 1 if follower.request["channel"] == "trades" else bar_open_us(market.bar - 1, 1)
    done.set()
    async with asyncio.timeout(90):
        await asyncio.gather(*tasks)
    await market.wait_stored(settings)
    market.close()
    ids = [row[0] for row in _stored(settings, "SELECT trade_id FROM trades WHERE symbol = 'BTC-USDT' ORDER BY trade_id")]
    assert ids == list(range(1, market.next_id))
    stored = _stored(settings, "SELECT open_time_us, revision FROM bars WHERE symbol = 'BTC-USDT' ORDER BY open_time_us, revision")
    newest = dict(stored)
    for follower in followers:
        assert follower.connects > 2
        rows = follower.history + follower.received
        if follower.request["channel"] == "trades":
            assert [row["trade_id"] for row in rows] == ids
            continue
        seen = [(row["open_time_us"], row["revision"]) for row in rows]
        assert len(set(seen)) == len(seen)
        assert dict(seen) == newest
        assert set(seen) <= set(stored)
        assert {pair for pair in set(stored) - set(seen) if pair[1] == newest[pair[0]]} == set()


async def test_formats_agree_and_pages_join(api: RunningApi) -> None:
    """JSON, Arrow and CSV hold the same rows; pages forward and backward give the whole range once."""
    market = Market(api.settings, "ETH-USDT", 2)
    await market.produce(600)
    await market.wait_stored(api.settings)
    market.close()
    async with httpx.AsyncClient(base_url=api.url, timeout=20) as http:
        path = "/api/v1/bars/binance/ETH-USDT?timeframe=1s&start=2020-01-01&limit=1000"
        whole = (await http.get(path)).json()["bars"]
        assert len(whole) == market.bar
        answer = await http.get(path, headers={"accept": "application/vnd.apache.arrow.stream"})
        table = pa.ipc.open_stream(answer.content).read_all()
        assert table.column("open_time_us").to_pylist() == [bar["open_time_us"] for bar in whole]
        assert table.column("revision").to_pylist() == [bar["revision"] for bar in whole]
        rows = list(csv.DictReader(io.StringIO((await http.get(path + "&format=csv")).text)))
        assert [int(row["trade_count"]) for row in rows] == [bar["trade_count"] for bar in whole]
        assert list(rows[0]) == list(whole[0])
        for format_ in ("json", "csv"):
            for start in ("&start=2020-01-01", ""):
                url: str | None = f"/api/v1/bars/binance/ETH-USDT?timeframe=1s&limit=37&format={format_}{start}"
                pages = []
                while url:
                    answer = await http.get(url)
                    text = answer.text
                    bars = json.loads(text)["bars"] if format_ == "json" else list(csv.DictReader(io.StringIO(text)))
                    pages.append([int(bar["open_time_us"]) for bar in bars])
                    url = answer.links.get("next", {}).get("url")
                if not start:
                    pages.reverse()
                assert [bar for page in pages for bar in page] == [bar["open_time_us"] for bar in whole]
        trades = (await http.get("/api/v1/trades/binance/ETH-USDT?limit=5")).json()["trades"]
        assert [row["trade_id"] for row in trades] == list(range(market.next_id - 5, market.next_id))
        assert set(trades[0]) == {"trade_id", "price", "size", "side", "exchange_time_us", "receive_time_us"}
        symbols = {row["symbol"]: row for row in (await http.get("/api/v1/symbols")).json()["symbols"]}
        assert symbols["ETH-USDT"]["trade_count"] == market.next_id - 1
        assert symbols["ETH-USDT"]["first_trade_time_us"] < symbols["ETH-USDT"]["last_trade_time_us"]
        assert (await http.get("/api/v1/bars/binance/ETH-USDT?timeframe=1d")).json()["bars"] == []


async def test_a_cursor_the_topic_no_longer_holds_gets_reset_then_a_snapshot(api: RunningApi) -> None:
    """After retention deleted what a cursor needs, the stream says so and starts anew on the same subscription."""
    market = Market(api.settings, "SOL-USDT", 3)
    await market.produce(200)
    await market.wait_stored(api.settings)
    request = {"op": "subscribe", "channel": "bars", "exchange": "binance", "symbol": "SOL-USDT", "timeframe": "1s"}
    async with connect(api.stream) as socket:
        await socket.send(json.dumps({**request, "id": 1}))
        old = await _hear(socket, "snapshot")
    await market.produce(1500)
    await market.wait_stored(api.settings)
    market.close()
    partition = partition_of("binance:SOL-USDT", api.settings.kafka.partitions)
    topic = TOPICS["bars"].full_name(api.settings.kafka.topic_prefix)
    ends = end_offsets(api.settings.kafka, ("bars",))["bars"]
    admin = AdminClient(api.settings.kafka.client_config())
    for future in admin.delete_records([TopicPartition(topic, partition, ends[partition])]).values():
        future.result(20)
    api.stop("api")  # otherwise the log kept in memory would serve it
    api.start("api")
    api.wait_ready()
    async with connect(api.stream) as socket:
        await socket.send(json.dumps({**request, "id": 2, "from": old["cursor"]}))
        reset = await _hear(socket, "reset")
        assert "no longer holds" in reset["data"]["reason"]
        snapshot = await _hear(socket, "snapshot")
        assert [row["trade_count"] for row in snapshot["data"] if row["is_final"]][-1] == market.bar - 1


async def test_the_stream_goes_on_by_itself_after_kill_9_of_the_broker(api: RunningApi, stack: RunningStack) -> None:
    """The broker dies and comes back: connected clients miss and repeat nothing, and readiness tells the story."""
    market = Market(api.settings, "XRP-USDT", 4)
    await market.produce(100)
    await market.wait_stored(api.settings)
    async with connect(api.stream) as socket:
        await socket.send(json.dumps({"op": "subscribe", "id": 1, "channel": "trades", "exchange": "binance", "symbol": "XRP-USDT"}))
        seen = [row["trade_id"] for row in (await _hear(socket, "snapshot"))["data"]]
        (pid,) = [status.pid for status in stack.supervisor.status() if status.name == "kafka"]
        os.kill(pid, signal.SIGKILL)
        async with httpx.AsyncClient(base_url=api.url, timeout=10) as http:
            assert (await http.get("/api/v1/trades/binance/XRP-USDT")).status_code == 200
            until = time.monotonic() + 60
            while (answer := await http.get("/readyz")).status_code != 200:
                assert not answer.json()["checks"]["kafka"]["ok"]
                assert time.monotonic() < until, answer.text
                await asyncio.sleep(0.2)
        await market.produce(300)
        market.close()
        while not seen or seen[-1] != market.next_id - 1:
            seen += [row["trade_id"] for row in (await _hear(socket, "update"))["data"]]
    assert seen == list(range(seen[0], market.next_id))


async def _hear(socket: ClientConnection, kind: str) -> dict[str, Any]:
    while True:
        message: dict[str, Any] = json.loads(await asyncio.wait_for(socket.recv(), 30))
        assert message["type"] != "error", message
        if message["type"] == kind:
            return message
