"""Peer: Faust as its documentation has it, one trade a record, agent and topics, no frames. ``python -m ... BOOTSTRAP TOPIC OUT COUNT``."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import faust

from tests.performance.peers.rows import DictBars, decode_row


def main(bootstrap: str, topic_name: str, out_name: str, count: int) -> None:
    """Process ``count`` records, print seconds from the first to the last and leave."""
    app = faust.App(
        f"stock-{time.time_ns()}",
        broker=f"kafka://{bootstrap}",
        store="memory://",
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        consumer_auto_offset_reset="earliest",
    )
    topic = app.topic(topic_name, key_serializer="raw", value_serializer="raw")
    out = app.topic(out_name, key_serializer="raw", value_serializer="raw")
    bars, progress = DictBars(), {"done": 0, "started": 0.0}

    @app.agent(topic)
    async def build(stream: Any) -> None:
        async for value in stream:
            if not progress["started"]:
                progress["started"] = time.perf_counter()
            for bar in bars.add(decode_row(value)):
                await out.send(key=bar[0].encode(), value=json.dumps(bar).encode())
            progress["done"] += 1
            if progress["done"] == count:
                print(json.dumps({"rows": count, "seconds": time.perf_counter() - progress["started"]}), flush=True)
                os._exit(0)

    faust.Worker(app, loglevel="ERROR", redirect_stdouts=False, quiet=True).execute_from_commandline()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
