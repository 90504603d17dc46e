"""A venue that does not behave: connections without acknowledgement, refusals, a blocked region, bytes from nowhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from collectors.backoff import BackoffConfig
from collectors.binance.collector import BinanceCollector, CollectorConfig
from collectors.binance.feed import venue_of
from collectors.binance.rest import BinanceRest
from collectors.breaker import Breaker, BreakerConfig, BreakerState
from collectors.connection import ConnectionConfig
from collectors.errors import BlockedError
from collectors.filler import FillerConfig
from collectors.session import SessionConfig
from infra.seam import SystemClock
from schemas.frames import GAP_UNFILLABLE
from tests.collectors.fakes import RecordingDeadLetters, RecordingSink, rows_of

QUICK = CollectorConfig(
    backoff=BackoffConfig(initial_s=0.05, maximum_s=0.1),
    session=SessionConfig(ack_timeout_s=0.3, connection=ConnectionConfig(open_timeout_s=1.0, close_timeout_s=0.2)),
    filler=FillerConfig(grace_s=0.05, retry_s=0.05),
)
LISTING = {"symbols": [{"symbol": "BTCUSDT", "status": "TRADING", "baseAsset": "BTC", "quoteAsset": "USDT"}]}


def trade(number: int) -> str:
    """A message."""
    data = {"e": "trade", "E": 1, "s": "BTCUSDT", "t": number, "p": "1.5", "q": "2", "T": 1_723_161_255_342 + number, "m": True, "M": True}
    return json.dumps({"stream": "btcusdt@trade", "data": data}, separators=(",", ":"))


async def acknowledge(server: ServerConnection) -> None:
    """Answer one subscription."""
    request = json.loads(await server.recv())
    await server.send(json.dumps({"result": None, "id": request["id"]}))


@asynccontextmanager
async def collecting(
    handler: Callable[[ServerConnection], Awaitable[None]],
    config: CollectorConfig = QUICK,
    process_request: Callable[[ServerConnection, Request], Response | None] | None = None,
) -> AsyncIterator[tuple[BinanceCollector, asyncio.Task[None], RecordingSink, RecordingDeadLetters]]:
    """A collector of BTC-USDT whose streams come from ``handler`` and whose REST knows no trades."""

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=LISTING if request.url.path.endswith("exchangeInfo") else [])

    async with (
        serve(handler, "127.0.0.1", 0, compression=None, process_request=process_request) as server,
        httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http,
    ):
        clock, sink, letters = SystemClock(), RecordingSink(), RecordingDeadLetters()
        venue = venue_of("binance", ws_url=f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        rest = BinanceRest(venue, http, clock, Breaker("rest"))
        collector = BinanceCollector(venue=venue, rest=rest, sink=sink, dead_letters=letters, clock=clock, config=config)
        run = asyncio.create_task(collector.run())
        try:
            await collector.want({"BTC-USDT"})
            yield collector, run, sink, letters
        finally:
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)


async def until(check: Callable[[], object], seconds: float = 5.0) -> None:
    """Until ``check()`` holds."""
    async with asyncio.timeout(seconds):
        while not check():
            await asyncio.sleep(0.01)


async def test_a_venue_that_never_acknowledges_opens_the_breaker() -> None:
    """Five connections without an answer; then none for a while, and the reason is on the readiness page."""
    attempts = 0

    async def mute(server: ServerConnection) -> None:
        nonlocal attempts
        attempts += 1
        await server.wait_closed()

    async with collecting(mute) as (collector, _, _, _):
        shard = collector.shards[0]
        await until(lambda: shard.breaker.state is BreakerState.OPEN)
        assert attempts == 5
        assert "did not acknowledge a subscription within 0.3 s" in collector.reasons()["binance/ws/0"]
        await asyncio.sleep(0.3)
        assert attempts == 5
        assert shard.pipeline.stats.errors == {"connect_failed": 5}


async def test_after_the_open_time_two_good_connections_close_the_breaker() -> None:
    """Half-open in between."""
    good = asyncio.Event()

    async def moody(server: ServerConnection) -> None:
        if good.is_set():
            await acknowledge(server)
            await asyncio.sleep(0.2)
            await server.close()
        await server.wait_closed()

    config = replace(QUICK, breaker=BreakerConfig(failures=2, open_s=0.5))
    async with collecting(moody, config) as (collector, _, _, _):
        breaker = collector.shards[0].breaker
        await until(lambda: breaker.state is BreakerState.OPEN)
        good.set()
        await until(lambda: breaker.state is BreakerState.HALF_OPEN)
        await until(lambda: breaker.state is BreakerState.CLOSED)


async def test_a_refused_subscription_says_what_the_venue_said() -> None:
    """And it is tried again."""

    async def refuse(server: ServerConnection) -> None:
        request = json.loads(await server.recv())
        await server.send(json.dumps({"error": {"code": 2, "msg": "Invalid request: wrong stream"}, "id": request["id"]}))
        await server.wait_closed()

    async with collecting(refuse) as (collector, _, _, _):
        await until(lambda: collector.shards[0].pipeline.stats.errors.get("connect_failed", 0) >= 2)
        assert "2: Invalid request: wrong stream" in collector.reasons()["binance/ws/0"]


async def test_a_blocked_region_ends_the_collector_with_the_remedy() -> None:
    """451 is no matter of trying again."""

    def blocked(server: ServerConnection, request: Request) -> Response:
        return server.respond(451, "restricted location\n")

    async with collecting(acknowledge, process_request=blocked) as (_, run, _, _):
        with pytest.raises(BlockedError, match="--source sim"):
            async with asyncio.timeout(5):
                await run


async def test_hostile_messages_among_good_ones_cost_only_themselves() -> None:
    """Garbage, unknown streams, impossible values, binary, one of 3 MB: each a dead letter with its bytes; every good trade comes out."""

    async def send(server: ServerConnection) -> None:
        await acknowledge(server)
        await server.send(trade(1))
        await server.send("garbage")
        await server.send(b"\x00\x01\x02")
        await server.send(trade(2).replace("btcusdt@trade", "xyzusdt@trade"))
        await server.send(trade(2).replace('"p":"1.5"', '"p":"-1"'))
        await server.send('{"id":99,"result":null}')
        await server.send("x" * 3_000_000)
        for number in range(2, 50):
            await server.send(trade(number))
        await server.wait_closed()

    async with collecting(send) as (collector, _, sink, letters):
        await until(lambda: len(rows_of(sink.trades).get("binance:BTC-USDT", [])) == 49)
        assert rows_of(sink.trades)["binance:BTC-USDT"] == list(range(1, 50))
        reasons = ["impossible_value", "malformed_message", "malformed_message", "message_too_large", "unknown_stream"]
        assert sorted(letters.reasons) == reasons
        too_large = next(letter for letter in letters.items if letter["reason"] == "message_too_large")
        assert too_large["raw_size"] == 3_000_000
        assert len(too_large["raw"]) <= 1024 * 1024
        assert collector.shards[0].pipeline.stats.reconnections == 0


async def test_ids_that_cannot_be_had_become_a_gap_with_its_times() -> None:
    """The venue's REST knows nothing: state 3, from the row before to the row after, and the watermark goes on."""

    async def send(server: ServerConnection) -> None:
        await acknowledge(server)
        for number in (1, 2, 10, 11):
            await server.send(trade(number))
        await server.wait_closed()

    async with collecting(send) as (collector, _, sink, _):
        await until(lambda: len(sink.gaps) >= 2)
        opened, columns = ({name: column.tolist() for name, column in frame.columns.items()} for frame in sink.gaps[:2])
        assert (opened["state"], opened["gap_id"]) == ([1], columns["gap_id"])
        assert (columns["first_missing_id"], columns["last_missing_id"], columns["state"]) == ([3], [9], [3])
        assert columns["start_time_us"] == [(1_723_161_255_342 + 2) * 1000]
        assert columns["end_time_us"] == [(1_723_161_255_342 + 10) * 1000]
        assert collector.shards[0].pipeline.watermark.holding(SystemClock().monotonic_us()) == []


async def test_a_feed_that_skips_every_second_id_piles_nothing_up() -> None:
    """Each hole is a gap that ends unfillable, few of them ask REST, and every trade that came is there."""

    async def send(server: ServerConnection) -> None:
        await acknowledge(server)
        for number in range(1, 1_001, 2):
            await server.send(trade(number))
        await server.wait_closed()

    async with collecting(send) as (collector, _, sink, _):
        await until(lambda: sum(int((frame.columns["state"] == GAP_UNFILLABLE).sum()) for frame in sink.gaps) == 499, 20.0)
        assert rows_of(sink.trades)["binance:BTC-USDT"] == list(range(1, 1_001, 2))
        assert collector.rest.limit.wait_s(4_000, SystemClock().monotonic_us()) == 0, "a few requests answered for all"


async def test_a_quiet_feed_still_sends_heartbeats_that_move_on() -> None:
    """One trade, then nothing but answered pings: every partition hears twice a second how far the feed is complete."""

    async def send(server: ServerConnection) -> None:
        await acknowledge(server)
        await server.send(trade(1))
        await server.wait_closed()

    async with collecting(send) as (_, _, sink, _):
        await until(lambda: sink.trades)
        await asyncio.sleep(2.5)
        for partition in range(4):
            marks = [frame.watermark_us for place, frame in sink.trades if place == partition]
            assert len(marks) >= 4
            assert marks == sorted(marks)
            assert marks[-1] > (1_723_161_255_342 + 1) * 1000 + 500_000
