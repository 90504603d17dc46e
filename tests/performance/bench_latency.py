"""From a trade at the collector's socket to the bar update at a WebSocket client, 10,000 trades/s over 1,000 symbols.

simulated exchange (5 ms steps) -> collector -> Kafka -> worker -> Kafka -> API -> client. The latency of an update is when the client has it less
``last_receive_time_us`` of the newest trade in it (one machine, one clock). An open bar is published at most every 250 ms a symbol; ``immediate``
are updates that did not have to wait for that, ``all`` includes those that did. Beside it, in turn on the same broker: a bare
produce -> consume -> produce -> consume chain with records of the same sizes at the same rate, in as many processes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import defaultdict
from typing import Any

import httpx
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from infra.kafka import consumer_config, end_offsets
from infra.registry_client import RegistryClient
from tests.performance.bench_box import SYMBOLS, busiest, pids_of
from tests.performance.box import Box, Side, box, side
from tests.performance.statistics import ratio, summary
from tests.performance.stream_client import percentiles
from tests.performance.usage import Meter, load_average

ROUNDS = int(os.environ.get("MARKETSTREAM_BENCH_ROUNDS", "5"))
WINDOW_S = float(os.environ.get("MARKETSTREAM_BENCH_WINDOW_S", "8"))
RATE = 10_000
QUIET_RATE = 20
"""While the bare chain runs; a market that falls silent would be taken for a dead connection."""
WARM_S = 15.0
"""At the full rate before the first round: the broker's Java compiles what is hot."""
WATCHED = 200
MOST_P50_MS, MOST_P99_MS = 15.0, 50.0
SAMPLE = 100
STAGE_RECORDS = 800


def _rate(url: str, rate: float) -> None:
    httpx.post(f"{url}/sim/rate", json={"rate": rate, "market": "spot"}).raise_for_status()


def _window(client: Side, seconds: float, windows: int) -> dict[str, Any]:
    """Latencies of the next ``seconds``; ``windows`` were said before."""
    client.process.send_signal(signal.SIGUSR1)
    time.sleep(seconds)
    client.process.send_signal(signal.SIGUSR2)
    until = time.monotonic() + 10
    while time.monotonic() < until:
        said = [line for line in client.lines() if line["event"] == "latency"]
        if len(said) > windows:
            return said[windows]
        time.sleep(0.05)
    raise RuntimeError("the client did not say its latencies")


def _shape(here: Box, before: dict[str, dict[int, int]], seconds: float) -> dict[str, tuple[float, int]]:
    """Topic -> (records/s since ``before``, mean bytes of the newest records)."""
    kafka = here.settings.kafka
    ends = end_offsets(kafka, ["trades", "bars"])
    found = {}
    consumer = Consumer(consumer_config(kafka, "bench"))
    for topic, parts in ends.items():
        sizes: list[int] = []
        for partition, end in parts.items():
            consumer.assign([TopicPartition(topic, partition, max(end - SAMPLE // len(parts), 0))])
            sizes += [len(message.value()) for message in consumer.consume(SAMPLE // len(parts), 5) if not message.error()]
        count = sum(end - before[topic][partition] for partition, end in parts.items())
        found[topic] = (count / seconds, round(sum(sizes) / max(len(sizes), 1)))
    consumer.close()
    return found


def _stages(here: Box, before: dict[str, dict[int, int]]) -> dict[str, list[float]]:
    """Where the time goes, from the records of one partition: milliseconds from the newest trade of a frame to its record, from there to its bars.

    Records carry the time their producer made them, in milliseconds.
    """
    kafka = here.settings.kafka
    found: dict[str, list[float]] = {"socket to trades record": [], "trades record to bars record": []}
    with RegistryClient.from_settings(here.settings) as registry:
        trades, bars = registry.frame_codec("trades"), registry.frame_codec("bars")
    consumer = Consumer(consumer_config(kafka, "bench"))
    made: dict[int, int] = {}
    consumer.assign([TopicPartition("trades", 0, before["trades"][0])])
    for message in consumer.consume(STAGE_RECORDS, 10):
        frame = trades.decode(message.value())
        if frame.row_count:
            made[message.offset()] = message.timestamp()[1]
            found["socket to trades record"].append(message.timestamp()[1] - int(frame.columns["receive_time_us"].max()) / 1000)
    consumer.assign([TopicPartition("bars", 0, before["bars"][0])])
    for message in consumer.consume(STAGE_RECORDS, 10):
        source = bars.decode(message.value()).input_offset
        if source in made:
            found["trades record to bars record"].append(message.timestamp()[1] - made[source])
    consumer.close()
    return found


def _chain(here: Box, number: int, shape: dict[str, tuple[float, int]], seconds: float) -> dict[str, Any]:
    """Latencies of the bare chain."""
    kafka = here.settings.kafka
    relay, partitions = "tests.performance.peers.relay", ["--partitions", str(kafka.partitions)]
    per_s, sent_bytes = shape["trades"]
    out_bytes = shape["bars"][1]
    argv = [relay, "forward", kafka.bootstrap, "relay.in", "relay.out", *partitions, "--size", str(out_bytes)]
    with (
        side(here, f"receive{number}", [relay, "receive", kafka.bootstrap, "relay.out", *partitions]) as receiver,
        side(here, f"forward{number}", argv) as forwarder,
    ):
        receiver.wait_said("live", 30)
        forwarder.wait_said("live", 30)
        argv = [
            relay,
            "send",
            kafka.bootstrap,
            "relay.in",
            *partitions,
            "--size",
            str(sent_bytes),
            "--per-s",
            str(per_s),
            "--seconds",
            str(seconds),
        ]
        with side(here, f"send{number}", argv) as sender:
            sender.process.wait(seconds + 30)
        time.sleep(0.3)
        receiver.process.terminate()
        return receiver.finish(15)


def run(rounds: int = ROUNDS) -> dict[str, Any]:
    """Milliseconds, and how many times the bare chain's they are."""
    found: dict[str, list[float]] = defaultdict(list)
    stages: dict[str, list[float]] = defaultdict(list)
    arguments = ["--step-ms", "5", "--warmup-s", "0", "--history", "100000"]
    variables = {"MARKETSTREAM_SIM_SYMBOLS": str(SYMBOLS), "MARKETSTREAM_SIM_TRADES_PER_S": "500"}
    with box("sim", sim_arguments=arguments, **variables) as here:
        url = f"http://127.0.0.1:{here.settings.sim.port}"
        topics = [NewTopic(name, here.settings.kafka.partitions, 1) for name in ("relay.in", "relay.out")]
        admin = AdminClient({"bootstrap.servers": here.settings.kafka.bootstrap})
        for future in admin.create_topics(topics).values():
            future.result()
        argv = ["tests.performance.stream_client", here.stream_url, "--symbols", ",".join(busiest(here, WATCHED)), "--timeframes", "1s"]
        shape: dict[str, tuple[float, int]] = {}
        with side(here, "client", argv) as client:
            client.wait_said("live", 60)
            _rate(url, RATE)
            time.sleep(WARM_S)
            for number in range(rounds):
                before = end_offsets(here.settings.kafka, ["trades", "bars"])
                with Meter(lambda: pids_of(here, client)) as meter:
                    ours = _window(client, WINDOW_S, number)
                shape = _shape(here, before, meter.seconds)
                _rate(url, QUIET_RATE)
                time.sleep(1)
                for name, took in _stages(here, before).items():
                    stages[name] += took
                bare = _chain(here, number, shape, WINDOW_S)
                _rate(url, RATE)
                time.sleep(2)
                for name, values in (("immediate", ours["immediate"]), ("all", ours["all"]), ("bare_chain", bare)):
                    for part in ("p50", "p99"):
                        found[f"{name}_{part}"].append(values[part])
                print(f"round {number + 1}/{rounds}: {ours}, bare {bare}, load {load_average()}", file=sys.stderr)
            cpu = meter.cpu_percent()
    figures: dict[str, Any] = summary(found, "ms")
    figures["stages"] = {name: percentiles([int(value * 1000) for value in took]) for name, took in stages.items()}
    figures["cpu_percent"] = cpu | {"sum": round(sum(cpu.values()), 1)}
    figures["records"] = {topic: {"per_s": round(per_s), "bytes": size} for topic, (per_s, size) in shape.items()}
    figures["load_average"] = load_average()
    ratios = {f"{part} / bare chain": ratio(found[f"immediate_{part}"], found[f"bare_chain_{part}"]) for part in ("p50", "p99")}
    ratios |= {
        "p50 / allowed": round(figures["immediate_p50"]["median"] / MOST_P50_MS, 2),
        "p99 / allowed": round(figures["immediate_p99"]["median"] / MOST_P99_MS, 2),
    }
    return {"name": "latency", "figures": figures, "ratios": ratios, "notes": []}


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
