"""A bad print on the real stack: held back from the bars, told of, counted, listed, released and discarded by command, the bars made anew."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import pytest
from confluent_kafka import Producer
from polars.testing import assert_frame_equal

from api.quality import Quality, SuspectFilter
from infra.api_stores import ClickHouseHistory
from infra.kafka import committed_offsets, end_offsets, producer_config
from infra.newest_bars import newest_worker_bars
from infra.progress import SINK_GROUP, worker_offsets
from infra.registry_client import RegistryClient
from infra.worker import KafkaStateLog
from schemas.frames import END_OF_SOURCE
from schemas.partitions import partition_of
from streams.state_store import save
from tests.integration.conftest import RunningStack
from tests.integration.repair_chain import Chain, Feed, eventually, market, no_fault, running, values

KEYS = ["timeframe_s", "open_time_us"]
SYMBOL = "PRINT-USDT"


@pytest.fixture(scope="module")
def chain(stack: RunningStack) -> Iterator[Chain]:
    """Worker, sink and repair."""
    with running(stack, "quality.", "worker", "sink", "repair") as made:
        yield made


def command(chain: Chain, *arguments: str) -> Any:
    """What a command of the console script answers in JSON."""
    environ = chain.settings.as_environ() | {"PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-m", "infra.cli.main", *arguments, "--json"], env=environ, capture_output=True, timeout=60)
    return json.loads(done.stdout or done.stderr)


async def test_a_bad_print_is_held_listed_released_and_discarded(chain: Chain) -> None:
    """The bars are those of the other trades and count it; released they are those of all trades, discarded again those of the others."""
    trades = market(120)
    row = 300
    trades = trades.with_columns(price=pl.when(pl.int_range(pl.len()) == row).then(pl.col.price * 0.7).otherwise(pl.col.price).round(2))
    suspect = trades.row(row, named=True)
    feed = Feed(chain, SYMBOL)
    await feed.send(trades, flags=END_OF_SOURCE, rows=7)
    feed.close()

    end_us = int(trades["exchange_time_us"][-1])
    others = trades.filter(pl.col.trade_id != suspect["trade_id"])
    touched = (pl.col.open_time_us <= suspect["exchange_time_us"]) & (pl.col.close_time_us > suspect["exchange_time_us"])
    closed = (pl.col.close_time_us <= end_us // 1_000_000 * 1_000_000) & (pl.col.timeframe_s <= 60)

    def expect(bars: pl.DataFrame, of: pl.DataFrame) -> None:
        truth = no_fault(of, end_us)
        mine = bars.filter(closed)
        assert_frame_equal(values(mine), values(truth.join(mine.select(KEYS), on=KEYS, how="semi")), check_exact=True)

    first = chain.newest(SYMBOL)
    expect(first, others)
    assert first.filter(touched)["held_count"].to_list() == [1] * first.filter(touched).height
    assert first.filter(~touched)["held_count"].sum() == 0

    def told() -> pl.DataFrame:
        return chain.query(
            "SELECT trade_id, price, reason, state, source, input_offset >= 0 AS mine FROM quarantine WHERE symbol = {s:String} ORDER BY kafka_offset",
            s=SYMBOL,
        )

    await eventually(lambda: told().height == 1)
    assert told().row(0) == (suspect["trade_id"], suspect["price"], 1, 1, "binance/ws/0", 1)
    (listed,) = command(chain, "quarantine", "list", "--symbol", SYMBOL, "--state", "held")["suspects"]
    assert (listed["trade_id"], listed["state"], listed["reason"]) == (suspect["trade_id"], "held", "price")
    assert listed["band_low"] > suspect["price"]

    released = command(chain, "quarantine", "release", str(suspect["trade_id"]), "--symbol", SYMBOL)
    assert released["released"] == 1
    await chain.until_done(SYMBOL, 1)
    whole = chain.newest(SYMBOL)
    expect(whole, trades)
    assert whole.filter(touched & closed)["held_count"].sum() == 0
    assert set(whole.filter(touched & closed)["revision"]) == {1}
    assert command(chain, "quarantine", "release", str(suspect["trade_id"]))["results"][0]["state"] == "released"  # nothing new

    # what the repair wrote does not stand in the way of those who ask how far the worker is
    partition = feed.partition
    with RegistryClient.from_settings(chain.settings) as registry:
        newest = newest_worker_bars(chain.settings.kafka, registry, registry.frame_codec("bars"), partition)
    assert newest is not None
    assert worker_offsets(chain.settings)[partition] == (newest.input_offset, newest.offset + 1)

    await eventually(lambda: told().height == 2)  # the command asks the table what is decided
    discarded = command(chain, "quarantine", "discard", str(suspect["trade_id"]), "--exchange", "binance")
    assert discarded["discarded"] == 1
    await chain.until_done(SYMBOL, 2)
    expect(chain.newest(SYMBOL), others)
    await eventually(lambda: told()["state"].to_list() == [1, 3, 4])

    wrong = command(chain, "quarantine", "release", "1", "--symbol", SYMBOL)["error"]
    assert "Trade 1 of PRINT-USDT was never held" in wrong["message"]


async def test_scores_are_stored_once_and_answered(chain: Chain) -> None:
    """A feed with wild prints has a lower score than a clean one, its anomalies are counted, and its band lies around the price."""
    feed, clean = Feed(chain, "WILD-USDT"), Feed(chain, "CLEAN-USDT")
    trades = market(60)
    wild = pl.int_range(pl.len()) % 40 == 39
    rng = np.random.default_rng(1)
    factor = pl.Series(rng.uniform(0.2, 0.8, trades.height))
    await feed.send(trades.with_columns(price=pl.when(wild).then(pl.col.price * factor).otherwise(pl.col.price)), rows=10)
    await clean.send(trades, rows=10)
    feed.close()
    clean.close()
    store = ClickHouseHistory(chain.settings.clickhouse)
    quality = Quality(store)
    try:
        async with asyncio.timeout(30):
            while sum(len(found["history"]) for found in await quality.feeds(exchange="binance") if found["symbol"] != SYMBOL) < 10:
                await asyncio.sleep(0.2)
        (bad,) = await quality.feeds("WILD-USDT", source="binance/ws/0")
        (good,) = await quality.feeds("CLEAN-USDT")
        assert good["score"] == 1.0
        assert 0.9 < bad["score"] < 1.0
        assert bad["anomalies"]["held"] == bad["checks_failed"] > 4
        assert bad["band_low"] < trades["price"][-1] < bad["band_high"]
        times = [row["time_us"] for row in bad["history"]]
        assert times == sorted(set(times), reverse=True)
        assert len((await quality.feeds("WILD-USDT", limit=2))[0]["history"]) == 2
        held = await quality.suspects(SuspectFilter(symbol="WILD-USDT", state="held", reason="price"), limit=100)
        assert len(held) == (await quality.held_now("WILD-USDT"))["binance"] >= bad["anomalies"]["held"]
        found = command(chain, "quality", "WILD-USDT")
        assert found["feeds"] == [bad]
        assert found["held_now"] == {"binance": len(held)}
    finally:
        await store.close()


async def test_suspects_the_worker_tells_of_twice_are_stored_once(chain: Chain) -> None:
    """Its state is lost, it makes everything anew: rows of quarantine and quality come again, and the sink knows them."""
    partition = partition_of("binance:WILD-USDT", chain.settings.kafka.partitions)
    symbols = (f"AFTER{number}-USDT" for number in range(100))
    after = next(symbol for symbol in symbols if partition_of(f"binance:{symbol}", chain.settings.kafka.partitions) == partition)

    def told(table: str) -> list[tuple[Any, ...]]:
        """Rows made of the trades that came before."""
        sql = f"SELECT symbol, input_offset, exchange_time_us, source FROM {table} WHERE symbol != {{s:String}} AND kafka_partition = {{p:UInt16}}"
        return sorted(chain.query(sql, s=after, p=partition).rows())

    await eventually(lambda: _stored(chain))
    before = told("quarantine"), told("quality")
    chain.stop("worker")
    await asyncio.to_thread(_forget_states, chain)
    chain.start("worker")
    feed = Feed(chain, after)
    await feed.send(market(30), flags=END_OF_SOURCE, source="binance/ws/1")  # the end of the other source would score what it has left
    feed.close()
    await eventually(lambda: _stored(chain) and chain.query("SELECT count() FROM quality WHERE symbol = {s:String}", s=after).item() > 0)
    assert (told("quarantine"), told("quality")) == before
    ends = end_offsets(chain.settings.kafka, ["quarantine"])["quarantine"][partition]
    assert ends > len({row[1] for row in before[0]})  # they did come again


def _stored(chain: Chain) -> bool:
    """Whether the sink has stored all scores and suspects."""
    names = ("quality", "quarantine")
    ends, stored = end_offsets(chain.settings.kafka, names), committed_offsets(chain.settings.kafka, SINK_GROUP, names)
    return all(stored[name][place] >= end for name in names for place, end in ends[name].items() if end)


def _forget_states(chain: Chain) -> None:
    """Write states that cannot be read: the worker begins with the first record."""
    producer = Producer(producer_config(chain.settings.kafka))
    for partition in range(chain.settings.kafka.partitions):
        save(KafkaStateLog(chain.settings, partition, producer), b"no state", 0)
