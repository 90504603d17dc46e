"""Peer: confluent-kafka consumer, fastavro, a dictionary of bars, confluent-kafka producer. ``python -m ... BOOTSTRAP TOPIC OUT COUNT``."""

from __future__ import annotations

import json
import sys
import time

from confluent_kafka import Consumer, Producer, TopicPartition

from tests.performance.peers.rows import DictBars, decode_row


def main(bootstrap: str, topic: str, out: str, count: int) -> None:
    """Process ``count`` records, print seconds from the first to the last."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": f"row-loop-{time.time_ns()}", "auto.offset.reset": "earliest"})
    producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True})
    partitions = consumer.list_topics(topic, 10).topics[topic].partitions
    consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
    bars, done, started = DictBars(), 0, 0.0
    while done < count:
        messages = consumer.consume(1000, 1.0)
        if messages and not started:
            started = time.perf_counter()
        for message in messages:
            done += 1
            for bar in bars.add(decode_row(message.value())):
                producer.produce(out, json.dumps(bar).encode(), bar[0].encode())
        producer.poll(0)
    producer.flush()
    print(json.dumps({"rows": done, "seconds": time.perf_counter() - started}))
    consumer.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
