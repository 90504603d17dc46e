"""The collector process on the real stack: simulated exchange -> sockets -> Kafka, PostgreSQL deciding the symbols."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition

from collectors.simulated.config import ServerConfig
from collectors.simulated.exchange import ExchangeConfig
from collectors.simulated.regimes import MarketConfig
from collectors.simulated.server import SimulatedExchange, serve
from infra.kafka import consumer_config, partition_count
from infra.provision import provision
from infra.registry_client import RegistryClient
from infra.seam import SystemClock
from infra.settings import Settings
from infra.stack.kafka import free_ports
from infra.symbol_store import SymbolStore
from schemas.frames import Frame
from schemas.topics import TOPICS
from tests.integration.conftest import RunningStack


@asynccontextmanager
async def exchange(symbols: int = 30, rate: float = 1_000.0) -> AsyncIterator[SimulatedExchange]:
    """A simulated spot exchange."""
    config = ServerConfig(exchange=ExchangeConfig(spot=MarketConfig(symbols=symbols, rate=rate, seed=7), warmup_s=2.0))
    async with serve(config, SystemClock()) as running:
        yield running


def settings_for(stack: RunningStack, prefix: str, running: SimulatedExchange, **more: str) -> Settings:
    """The stack's settings with the collector pointed at ``running``."""
    port = free_ports(1)[0]
    return stack.with_prefix(
        prefix,
        MARKETSTREAM_COLLECTOR_REST_URL=running.rest_url,
        MARKETSTREAM_COLLECTOR_WS_URL=running.ws_url,
        MARKETSTREAM_PORT_COLLECTOR=str(port),
        **more,
    )


@contextmanager
def collector(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """A collector process; killed at the end when it still runs."""
    environ = {**os.environ, **settings.as_environ()}
    process = subprocess.Popen([sys.executable, "-m", "infra.collector"], env=environ)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def ask(settings: Settings, path: str) -> tuple[int, str]:
    """Status and body of the collector's health server; (0, "") while it does not listen."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{settings.collector.health_port}{path}", timeout=2) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()
    except OSError:
        return 0, ""


async def eventually(check: Any, seconds: float = 20.0) -> None:
    """Until ``check()`` holds; fails with its last value."""
    until = time.monotonic() + seconds
    while not (found := await asyncio.to_thread(check)):
        assert time.monotonic() < until, f"still {found!r} after {seconds} s"
        await asyncio.sleep(0.1)


def published(settings: Settings, topic_name: str = "trades") -> list[tuple[int, Frame]]:
    """Every frame of a topic, with its partition."""
    consumer = Consumer(consumer_config(settings.kafka, "test-read"))
    found: list[tuple[int, Frame]] = []
    with RegistryClient.from_settings(settings) as registry:
        codec = registry.frame_codec(topic_name)
    topic = TOPICS[topic_name]
    full = topic.full_name(settings.kafka.topic_prefix)
    for partition in range(partition_count(settings.kafka, topic)):
        low, high = consumer.get_watermark_offsets(TopicPartition(full, partition), timeout=10, cached=False)
        consumer.assign([TopicPartition(full, partition, low)])
        position = low
        while position < high:
            for message in consumer.consume(min(500, high - position), timeout=10):
                found.append((partition, codec.decode(message.value())))
                position = message.offset() + 1
    consumer.close()
    return found


def ids_by_symbol(frames: list[tuple[int, Frame]]) -> dict[str, list[int]]:
    """Instrument key -> trade ids in the order published."""
    found: dict[str, list[int]] = {}
    for _, frame in frames:
        if frame.row_count:
            for code, trade_id in zip(frame.columns["symbol_code"].tolist(), frame.columns["trade_id"].tolist(), strict=True):
                found.setdefault(frame.symbols[code], []).append(trade_id)
    return found


def assert_whole(ids: dict[str, list[int]]) -> None:
    """Every symbol's ids run without a hole, each once."""
    for key, found in ids.items():
        assert sorted(found) == list(range(min(found), max(found) + 1)), key


async def test_symbols_of_the_table_reach_kafka_and_sigterm_loses_nothing(stack: RunningStack, topic_prefix: str) -> None:
    """An empty table is filled from the exchange; every trade of every symbol is published once; SIGTERM drains in 5 s."""
    async with exchange() as running:
        settings = settings_for(stack, topic_prefix, running)
        async with SymbolStore(settings.postgres) as store:
            await store.run("execute", "DELETE FROM symbols WHERE exchange = 'binance'")
        await asyncio.to_thread(provision, settings)
        with collector(settings) as process:
            await eventually(lambda: ask(settings, "/readyz")[0] == 200)
            await asyncio.sleep(3)
            assert ask(settings, "/livez")[0] == 200
            metrics = ask(settings, "/metrics")[1]
            begin = time.monotonic()
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait, 10)
            assert time.monotonic() - begin < 5.0
            assert process.returncode == 0
        assert 'trades_received_total{exchange="binance",shard="binance/ws/0"}' in metrics
        assert 'circuit_breaker_state{name="binance/ws/0"} 0.0' in metrics
        frames = await asyncio.to_thread(published, settings)
        ids = ids_by_symbol(frames)
        assert len(ids) >= 25
        assert_whole(ids)
        for key, found in ids.items():
            truth = running.truth(key.partition(":")[2].replace("-", ""))["trade_id"].tolist()
            assert set(found) <= set(truth), key
        assert {partition for partition, _ in frames} == {0, 1, 2, 3}


async def test_a_symbol_switched_off_and_on_is_followed_within_five_seconds(stack: RunningStack, topic_prefix: str) -> None:
    """Rows of the table decide at run time; an unknown symbol gets a state that says so and the others go on."""
    async with exchange() as running:
        settings = settings_for(stack, topic_prefix, running)
        await asyncio.to_thread(provision, settings)
        async with SymbolStore(settings.postgres) as store:
            await store.run("execute", "DELETE FROM symbols WHERE exchange = 'binance'")
            await store.put("binance", "BTC-USDT")
            await store.put("binance", "NOSUCH-USDT")
            with collector(settings):
                await eventually(lambda: ask(settings, "/readyz")[0] == 200)
                await wait_for_state(store, "NOSUCH-USDT", "unknown")
                await wait_for_state(store, "BTC-USDT", "collecting")
                await store.put("binance", "ETH-USDT")
                await store.put("binance", "BTC-USDT", active=False)
                await wait_for_state(store, "ETH-USDT", "collecting", seconds=5.0)
                await wait_for_state(store, "BTC-USDT", "inactive", seconds=5.0)
                await eventually(lambda: 'collector_symbols{exchange="binance",shard="binance/ws/0"} 1.0' in ask(settings, "/metrics")[1])
                await asyncio.sleep(2)
        assert "binance:ETH-USDT" in ids_by_symbol(await asyncio.to_thread(published, settings))


async def wait_for_state(store: SymbolStore, symbol: str, state: str, seconds: float = 10.0) -> None:
    """Until the row of ``symbol`` has ``state``."""
    async with asyncio.timeout(seconds):
        while (await store.states("binance")).get(symbol, ("", ""))[0] != state:
            await asyncio.sleep(0.1)


async def test_what_was_traded_while_the_collector_was_dead_is_fetched(stack: RunningStack, topic_prefix: str) -> None:
    """Kill -9, three seconds of trades without anybody listening, restart: no trade of any symbol is missing."""
    async with exchange(symbols=12, rate=300.0) as running:
        settings = settings_for(stack, topic_prefix, running, MARKETSTREAM_COLLECTOR_SYMBOLS="BTC-USDT,ETH-USDT,SOL-USDT")
        await asyncio.to_thread(provision, settings)
        with collector(settings) as process:
            await eventually(lambda: ask(settings, "/readyz")[0] == 200)
            await asyncio.sleep(3)
            process.kill()
        await asyncio.sleep(3)
        with collector(settings) as process:
            await eventually(lambda: ask(settings, "/readyz")[0] == 200)
            await asyncio.sleep(5)
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait, 10)
        ids = ids_by_symbol(await asyncio.to_thread(published, settings))
        assert set(ids) == {"binance:BTC-USDT", "binance:ETH-USDT", "binance:SOL-USDT"}
        assert_whole(ids)


@pytest.mark.parametrize(
    ("variable", "value", "code", "says"),
    [
        ("MARKETSTREAM_COLLECTOR_EXCHANGE", "binanse", 2, "did you mean"),
        ("MARKETSTREAM_COLLECTOR_SYMBOLS", "btc/usdt", 2, "did you mean 'BTC-USDT'"),
        ("MARKETSTREAM_KAFKA_BOOTSTRAP", "127.0.0.1:1", 6, "MARKETSTREAM_KAFKA_BOOTSTRAP"),
    ],
)
def test_a_wrong_setting_ends_with_one_sentence(
    stack: RunningStack, topic_prefix: str, variable: str, value: str, code: int, says: str
) -> None:
    """Exit code and one sentence naming the culprit."""
    port = str(free_ports(1)[0])
    settings = stack.with_prefix(topic_prefix, **{variable: value, "MARKETSTREAM_PORT_COLLECTOR": port})
    environ = {**os.environ, **settings.as_environ()}
    result = subprocess.run([sys.executable, "-m", "infra.collector"], env=environ, capture_output=True, text=True, timeout=60)
    assert result.returncode == code, result.stderr
    assert says in result.stderr.strip().splitlines()[-1], json.dumps(result.stderr)
