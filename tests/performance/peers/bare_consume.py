"""Ceiling: confluent-kafka reading the same frames and doing nothing with them. ``python -m ... BOOTSTRAP TOPIC RECORDS``."""

from __future__ import annotations

import json
import sys
import time

from confluent_kafka import Consumer, TopicPartition


def main(bootstrap: str, topic: str, count: int) -> None:
    """Read ``count`` records, print seconds from the first to the last."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"bare-{time.time_ns()}",
            "auto.offset.reset": "earliest",
            "fetch.message.max.bytes": 9_000_000,
            "queued.max.messages.kbytes": 32 * 1024,
            "fetch.queue.backoff.ms": 10,
        }
    )
    partitions = consumer.list_topics(topic, 10).topics[topic].partitions
    consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
    done, size, started = 0, 0, 0.0
    while done < count:
        messages = consumer.consume(200, 1.0)
        if messages and not started:
            started = time.perf_counter()
        for message in messages:
            done += 1
            size += len(message.value())
    print(json.dumps({"records": done, "bytes": size, "seconds": time.perf_counter() - started}))
    consumer.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
