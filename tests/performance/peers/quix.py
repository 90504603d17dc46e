"""Peer: Quix Streams, one trade a record, its own state store off. ``python -m ... BOOTSTRAP TOPIC OUT COUNT``."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

from quixstreams import Application

from tests.performance.peers.rows import DictBars, decode_row


def main(bootstrap: str, topic_name: str, out_name: str, count: int) -> None:
    """Process ``count`` records, print seconds from the first to the last."""
    app = Application(
        broker_address=bootstrap,
        consumer_group=f"quix-{time.time_ns()}",
        auto_offset_reset="earliest",
        auto_create_topics=False,
        state_dir=tempfile.mkdtemp(),
        loglevel="ERROR",
    )
    topic = app.topic(topic_name, key_deserializer="bytes", value_deserializer="bytes")
    out = app.topic(out_name, key_serializer="bytes", value_serializer="bytes")
    bars, progress = DictBars(), {"done": 0, "started": 0.0, "ended": 0.0}

    def build(value: bytes) -> list[dict[str, Any]]:
        if not progress["started"]:
            progress["started"] = time.perf_counter()
        progress["done"] += 1
        progress["ended"] = time.perf_counter()
        return [{"bar": bar} for bar in bars.add(decode_row(value))]

    frame = app.dataframe(topic).apply(build, expand=True)
    frame = frame.apply(lambda value: json.dumps(value["bar"]).encode()).to_topic(out)
    app.run(frame, count=count, timeout=30)
    print(json.dumps({"rows": progress["done"], "seconds": progress["ended"] - progress["started"]}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
