"""Topic -> bars of six timeframes -> topic with durable state, on one core, beside row-at-a-time peers and a bare consume.

All read the same trades of 1,000 symbols from the same broker, pinned to one core; the broker has the other. Ours is the real worker process
(Faust, snapshots every second); its time is that between the first and the last ``bars`` record it produced, by the broker's log.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections import defaultdict
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition

from infra.cli.bench import PEER_PYTHON
from infra.kafka import FrameProducer, consumer_config, end_offsets, ensure_topics
from infra.progress import worker_offsets
from infra.registry_client import RegistryClient
from infra.settings import Settings
from schemas.partitions import partition_of
from tests.performance import market
from tests.performance.peers.rows import encode_rows
from tests.performance.stack import answer_of, process, servers, with_variables
from tests.performance.statistics import ratio, summary

ROUNDS = int(os.environ.get("MARKETSTREAM_BENCH_ROUNDS", "5"))
TRADES = 4_000_000
SYMBOLS = 1_000
PEER_TRADES = {"stock_faust": 40_000, "row_loop": 120_000, "quix": 40_000}
ROWS_PER_FRAME = 2_000
ENGINE_CORE = 1
SIX = "1m,5m,15m,1h,4h,1d"


async def _publish(settings: Settings, keys: tuple[str, ...], columns: dict[str, Any]) -> int:
    with RegistryClient.from_settings(settings) as registry:
        registry.register_all()
        producer = FrameProducer(settings.kafka, registry)
        count = 0
        for partition, frame in market.frames(keys, columns, partitions=settings.kafka.partitions, rows_per_frame=ROWS_PER_FRAME):
            await producer.send("trades", partition, frame)
            count += 1
        await producer.flush(120)
    return count


def _publish_rows(settings: Settings, topic: str, keys: tuple[str, ...], columns: dict[str, Any], count: int) -> None:
    producer = Producer(
        {
            "bootstrap.servers": settings.kafka.bootstrap,
            "compression.type": "lz4",
            "linger.ms": 20,
            "queue.buffering.max.messages": 1_000_000,
        }
    )
    for key, value in encode_rows(keys, {name: column[:count] for name, column in columns.items()}):
        producer.produce(topic, value, key.encode(), partition_of(key, settings.kafka.partitions))
        producer.poll(0)
    producer.flush()


def _span_s(settings: Settings) -> float:
    """Seconds between the first and the last record of ``bars``, by the times the producer gave them."""
    consumer = Consumer(consumer_config(settings.kafka, "bench"))
    times = []
    for partition, end in end_offsets(settings.kafka, ["bars"])["bars"].items():
        for offset in (0, end - 1):
            consumer.assign([TopicPartition(f"{settings.kafka.topic_prefix}bars", partition, offset)])
            message = consumer.poll(10)
            times.append(message.timestamp()[1])
    consumer.close()
    return (max(times) - min(times)) / 1000


async def _engine_round(base: Settings, number: int, keys: tuple[str, ...], columns: dict[str, Any]) -> tuple[float, float]:
    """(trades/s of the worker, trades/s of a bare consume of the same records)."""
    settings = with_variables(base, MARKETSTREAM_TOPIC_PREFIX=f"e{number}.", MARKETSTREAM_WORKER_TIMEFRAMES=SIX)
    ensure_topics(settings.kafka)
    records = await _publish(settings, keys, columns)
    bare = json.loads(
        answer_of(
            settings,
            ["-m", "tests.performance.peers.bare_consume", settings.kafka.bootstrap, f"e{number}.trades", str(records)],
            core=ENGINE_CORE,
        )
    )
    ends = end_offsets(settings.kafka, ["trades"])["trades"]
    with process(settings, ["-m", "infra.worker"], core=ENGINE_CORE):
        for _ in range(1200):
            await asyncio.sleep(0.1)
            done = await asyncio.to_thread(worker_offsets, settings)
            if all(done[partition][0] >= end - 1 for partition, end in ends.items()):
                break
        else:
            raise RuntimeError(f"the worker did not finish: {done} of {ends}")
    return TRADES / _span_s(settings), TRADES / bare["seconds"]


def _last_json(text: str) -> dict[str, Any]:
    """The last JSON object in ``text``: some peers write terminal control codes around it."""
    found = re.findall(r"\{.*\}", text)
    if not found:
        raise RuntimeError(f"the peer gave no figures: {text[-500:]!r}")
    answer: dict[str, Any] = json.loads(found[-1])
    return answer


def run(rounds: int = ROUNDS) -> dict[str, Any]:
    """Figures in trades/s and their ratios."""
    keys, columns = market.trades(TRADES, SYMBOLS)
    peers = [name for name in PEER_TRADES if name != "quix" or PEER_PYTHON.is_file()]
    notes = [] if "quix" in peers else ["Quix Streams is not installed (make bench installs it): its round is left out"]
    rates: dict[str, list[float]] = defaultdict(list)
    with servers() as settings:
        from confluent_kafka.admin import AdminClient, NewTopic

        admin = AdminClient({"bootstrap.servers": settings.kafka.bootstrap})
        names = [f"rows.{peer}" for peer in peers] + ["rows.out"]
        for future in admin.create_topics([NewTopic(name, settings.kafka.partitions, 1) for name in names]).values():
            future.result()
        for peer in peers:
            _publish_rows(settings, f"rows.{peer}", keys, columns, PEER_TRADES[peer])
        for number in range(rounds):
            ours, bare = asyncio.run(_engine_round(settings, number, keys, columns))
            rates["marketstream"].append(ours)
            rates["bare_consume"].append(bare)
            print(f"round {number + 1}: ours {ours:,.0f}/s, bare {bare:,.0f}/s", file=sys.stderr)
            for peer in peers:
                argv = [
                    "-m",
                    f"tests.performance.peers.{peer}",
                    settings.kafka.bootstrap,
                    f"rows.{peer}",
                    "rows.out",
                    str(PEER_TRADES[peer]),
                ]
                answer = _last_json(
                    answer_of(settings, argv, core=ENGINE_CORE, python=str(PEER_PYTHON) if peer == "quix" else sys.executable)
                )
                rates[peer].append(answer["rows"] / answer["seconds"])
            print(
                f"round {number + 1}/{rounds}: " + ", ".join(f"{name} {values[-1]:,.0f}/s" for name, values in rates.items()),
                file=sys.stderr,
            )
    ratios = {f"marketstream / {peer}": ratio(rates["marketstream"], rates[peer]) for peer in peers}
    ratios["bare_consume / marketstream"] = ratio(rates["bare_consume"], rates["marketstream"])
    return {"name": "engine", "figures": summary(rates, "trades/s"), "ratios": ratios, "notes": notes}


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
