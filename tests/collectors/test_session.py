"""The end of a shard: what arrives until the connection is closed goes out, and the last word on its intervals with it."""

from __future__ import annotations

import asyncio

import pytest

from collectors.backoff import Backoff, BackoffConfig
from collectors.breaker import Breaker
from collectors.session import HOLD_DOWN, Shard
from infra.seam import SystemClock
from tests.collectors.fakes import RecordingSink
from tests.collectors.test_pipeline import T_MS, Bench, trade


class ClosingConnection:
    """A connection on which trades arrive while the closing handshake is under way."""

    opened_us = 0

    def __init__(self) -> None:
        self.closed = asyncio.get_running_loop().create_future()
        self.shard: Shard | None = None

    async def close(self) -> None:
        """Half a round trip until the venue has seen that we close, and half one back."""
        await asyncio.sleep(0.03)
        assert self.shard is not None
        self.shard._received([trade(103, ms=T_MS + 3_100), trade(104, ms=T_MS + 3_200)])
        await asyncio.sleep(0.03)
        self.closed.set_result("closed")

    def cut(self) -> None:
        """Nothing to cut."""


class OneLink:
    """A link that is subscribed to everything."""

    def __init__(self, connection: ClosingConnection) -> None:
        self.connection = connection
        self.subscribed: set[str] = set()


@pytest.mark.parametrize("staged", [False, True])
async def test_what_arrives_while_the_connection_closes_is_sent_before_the_end(staged: bool) -> None:
    """Also with messages waiting at that moment; the interval's last row goes out either way."""
    made, sink, clock = Bench(), RecordingSink(), SystemClock()
    shard = Shard(
        feed=None,  # type: ignore[arg-type]
        pipeline=made.pipeline,
        sink=sink,
        clock=clock,
        backoff=Backoff(BackoffConfig(), clock.random),
        breaker=Breaker("binance/ws/0"),
    )
    connection = ClosingConnection()
    connection.shard = shard
    shard._links = [OneLink(connection)]  # type: ignore[list-item]

    async def keep() -> None:
        await asyncio.sleep(60)

    shard._keep = keep  # type: ignore[method-assign]
    made.pipeline.receive([trade(100), trade(101)], T_MS * 1_000)
    running = asyncio.create_task(shard.run())
    await asyncio.sleep(0.1)
    made.pipeline.watermark.release(HOLD_DOWN)
    made.pipeline.receive([trade(102, ms=T_MS + 3_000)], T_MS * 1_000)
    if not staged:
        await asyncio.sleep(0.1)
    await shard.stop()
    await running
    sent = [trade_id for _, frame in sink.trades if frame.row_count for trade_id in frame.columns["trade_id"].tolist()]
    assert sent == [100, 101, 102, 103, 104]
    assert made.pipeline.staged_bytes == 0
    assert sum(frame.row_count for frame in sink.gaps) == 1
