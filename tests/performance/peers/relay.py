"""The bare chain that latency is measured beside: produce -> consume -> produce -> consume, nothing done with the bytes.

``python -m tests.performance.peers.relay send|forward|receive BOOTSTRAP TOPIC [TOPIC] ...``: three processes, as collector, worker and API are
three. ``send`` writes records of a size at a rate, each with the time it was made; ``forward`` writes one of another size for each it reads;
``receive`` says how long they took. The clients have the settings of ours, so only what is between them differs.
"""

from __future__ import annotations

import argparse
import json
import signal
import struct
import sys
import time
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition

from infra.kafka import consumer_config, producer_config
from infra.settings import KafkaSettings
from tests.performance.stream_client import percentiles

_STAMP = struct.Struct("<q")
_running = True


def _stop(*_: object) -> None:
    global _running
    _running = False


def _assigned(settings: KafkaSettings, topic: str) -> Consumer:
    """A consumer at the end of every partition."""
    consumer = Consumer(consumer_config(settings, "relay"))
    places = []
    for partition in range(settings.partitions):
        high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10, cached=False)[1]
        places.append(TopicPartition(topic, partition, high))
    consumer.assign(places)
    return consumer


def send(settings: KafkaSettings, topic: str, *, size: int, per_s: float, seconds: float) -> None:
    """Records of ``size`` bytes to all partitions in turn, ``per_s`` together."""
    producer = Producer(producer_config(settings))
    filler = bytes(i * 37 % 251 for i in range(max(size - _STAMP.size, 0)))
    for partition in range(settings.partitions):  # connect first: what is queued meanwhile would count as slow
        producer.produce(topic, _STAMP.pack(0), partition=partition)
    producer.flush(10)
    began, sent = time.monotonic(), 0
    while _running and (now := time.monotonic()) < began + seconds:
        while sent < (now - began) * per_s:
            producer.produce(topic, _STAMP.pack(time.time_ns()) + filler, partition=sent % settings.partitions)
            sent += 1
        producer.poll(0.001)
    producer.flush(10)


def forward(settings: KafkaSettings, source: str, target: str, *, size: int) -> None:
    """One record of ``size`` bytes for each that comes."""
    consumer, producer = _assigned(settings, source), Producer(producer_config(settings))
    filler = bytes(i * 37 % 251 for i in range(max(size - _STAMP.size, 0)))
    _say(event="live")
    while _running:
        message = consumer.poll(0.1)
        if message is not None and not message.error():
            producer.produce(target, message.value()[: _STAMP.size] + filler, partition=message.partition())
            producer.poll(0)
    consumer.close()
    producer.flush(5)


def receive(settings: KafkaSettings, topic: str) -> None:
    """Count how long records took; says it when it is told to stop."""
    consumer = _assigned(settings, topic)
    took_us = []
    _say(event="live")
    while _running:
        message = consumer.poll(0.1)
        if message is not None and not message.error():
            made_ns = _STAMP.unpack_from(message.value())[0]
            if made_ns:
                took_us.append((time.time_ns() - made_ns) // 1000)
    consumer.close()
    _say(event="done", **percentiles(took_us))


def _say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["send", "forward", "receive"])
    parser.add_argument("bootstrap")
    parser.add_argument("topics", nargs="+")
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--size", type=int, default=1000)
    parser.add_argument("--per-s", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    settings = KafkaSettings(bootstrap=arguments.bootstrap, partitions=arguments.partitions)
    if arguments.role == "send":
        send(settings, arguments.topics[0], size=arguments.size, per_s=arguments.per_s, seconds=arguments.seconds)
    elif arguments.role == "forward":
        forward(settings, *arguments.topics, size=arguments.size)
    else:
        receive(settings, arguments.topics[0])


if __name__ == "__main__":
    main()
