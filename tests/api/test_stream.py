"""The WebSocket stream over a real socket: requests, errors, bounds, slow clients, restarts; nobody's fault is another's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed

from api.deps import StreamLimits
from api.live.requests import Refused, parse_request, request_id, series_of
from tests.api.serving import Served, ask, hear, served
from tests.api.support import bars_frame, trades_frame

KEY = "binance:BTC-USDT"
BARS = {"channel": "bars", "exchange": "binance", "symbol": "BTC-USDT", "timeframe": "1m"}
TRADES = {"channel": "trades", "exchange": "binance", "symbol": "BTC-USDT"}


async def test_subscribe_acknowledges_then_snapshot_then_live_with_rising_numbers() -> None:
    """The whole conversation of a first-time client."""
    async with served(KEY) as run:
        run.kafka.append("bars", bars_frame(KEY, [(0, 0, 1), (1, 0, 0)]))
        run.kafka.hand("bars")
        async with run.socket() as client:
            await ask(client, op="subscribe", id="a", **BARS)
            assert await hear(client) == {"type": "ack", "id": "a", "data": {"op": "subscribe", **BARS}}
            snapshot = await hear(client)
            assert {name: snapshot[name] for name in ("channel", "exchange", "symbol", "timeframe", "seq", "type")} == {
                **BARS,
                "seq": 1,
                "type": "snapshot",
            }
            assert [bar["is_final"] for bar in snapshot["data"]] == [True, False]
            run.kafka.append("bars", bars_frame(KEY, [(1, 0, 1)]))
            run.kafka.hand("bars")
            update = await hear(client)
            assert (update["seq"], update["type"], update["data"][0]["trade_count"]) == (2, "update", 1)
            await ask(client, op="list", id=2)
            listed = (await hear(client, "ack"))["data"]["subscriptions"]
            assert listed == [{**BARS, "id": "a", "seq": 2}]
            await ask(client, op="unsubscribe", id=3, **BARS)
            assert (await hear(client, "ack"))["data"]["op"] == "unsubscribe"
            run.kafka.append("bars", bars_frame(KEY, [(2, 0, 1)]))
            run.kafka.hand("bars")
            await ask(client, op="ping", id=4)
            assert (await hear(client))["data"]["op"] == "ping"


async def test_any_asgi_server_will_do() -> None:
    """Without our writer messages go out through ASGI's ``send``, in order."""
    async with served(KEY, plain=True) as run, run.socket() as client:
        await ask(client, op="subscribe", id=1, **TRADES)
        await hear(client, "snapshot")
        for first in range(0, 500, 5):
            run.kafka.append("trades", trades_frame(KEY, range(first, first + 5)))
            run.kafka.hand("trades")
            if first % 50 == 0:
                await asyncio.sleep(0)
        seen: list[int] = []
        while len(seen) < 500:
            message = await hear(client, "update")
            seen += [row["trade_id"] for row in message["data"]]
        assert seen == list(range(500))
        assert message["seq"] == 101


@pytest.mark.parametrize(
    ("request_", "code", "word"),
    [
        ({"op": "subscribe", "id": 1, **BARS, "symbol": "BTC-USDC"}, "unknown_symbol", "BTC-USDT"),
        ({"op": "subscribe", "id": 1, **BARS, "exchange": "binanse"}, "unknown_exchange", "binance"),
        ({"op": "subscribe", "id": 1, **BARS, "timeframe": "1M"}, "unknown_timeframe", "1m"),
        ({"op": "subscribe", "id": 1, **BARS, "channel": "bar"}, "unknown_channel", "bars"),
        ({"op": "subscribe", "id": 1, "channel": "bars", "exchange": "binance", "symbol": "BTC-USDT"}, "missing_parameter", "timeframe"),
        ({"op": "subscribe", "id": 1, **BARS, "from": "nonsense"}, "invalid_cursor", "nonsense"),
        ({"op": "subscribe", "id": 1, **BARS, "limit": 100_000}, "invalid_limit", "200"),
        ({"op": "subscribe", "id": 1, **BARS, "form": 1}, "invalid_request", "form"),
        ({"op": "subscribe", "id": 1, **BARS, "symbol": 7}, "invalid_request", "symbol"),
        ({"op": "unsubscribe", "id": 1, **BARS}, "not_subscribed", "BTC-USDT"),
        ({"op": "subscibe", "id": 1}, "unknown_op", "subscribe"),
        ({"id": 1}, "invalid_request", "op"),
    ],
)
async def test_a_wrong_request_gets_its_code_its_id_and_a_sentence(request_: dict[str, Any], code: str, word: str) -> None:
    """Each error names the culprit and, where there is one, the nearest known word; the connection goes on."""
    async with served(KEY) as run, run.socket() as client:
        await client.send(json.dumps(request_))
        error = await hear(client, "error")
        assert (error["id"], error["data"]["code"]) == (1, code)
        assert word in error["data"]["detail"]
        await ask(client, op="subscribe", id=2, **BARS)
        assert (await hear(client, "ack"))["id"] == 2


HOSTILE = [
    "",
    "not json",
    "[" * 50_000,
    '{"op":' * 2_000,
    '{"op":"subscribe","id":' + "9" * 4_000 + "}",
    '{"op":"ping","id":1e999}',
    '{"op":"ping","id":{}}',
    '{"op":null}',
    "null",
    '"\\ud800"',
    b"\xff\xfe\x00",
    b"\x00" * 1000,
    '{"op":"subscribe","channel":"bars","exchange":"' + "x" * 5_000 + '","symbol":"A","timeframe":"1m"}',
]


async def test_hostile_messages_end_nothing_but_at_worst_their_own_connection() -> None:
    """Garbage of every kind is answered or closed; a well-behaved client beside it does not notice."""
    async with served(KEY) as run, run.socket() as good:
        await ask(good, op="subscribe", id=1, **TRADES)
        await hear(good, "snapshot")
        for message in [*HOSTILE, "x" * 30_000, "x" * 200_000]:
            async with run.socket() as bad:
                try:
                    await bad.send(message)
                    assert (await hear(bad))["type"] == "error"
                except ConnectionClosed as exc:
                    assert exc.rcvd is not None
                    assert exc.rcvd.code in (1009, 1007)
                    assert len(message) > 16_000
        for first in range(0, 50, 5):
            run.kafka.append("trades", trades_frame(KEY, range(first, first + 5)))
        run.kafka.hand("trades")
        seen = []
        while len(seen) < 50:
            seen += [row["trade_id"] for row in (await hear(good, "update"))["data"]]
        assert seen == list(range(50))


@settings(max_examples=100, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=200), st.binary(max_size=200), st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps)
    )
)
def test_no_text_makes_the_request_parser_raise_anything_but_refused(text: str | bytes) -> None:
    """Whatever comes in, the answer is a request or a refusal."""
    request_id(text)
    try:
        series_of(parse_request(text))
    except Refused as exc:
        assert exc.code


async def test_too_many_requests_a_second_close_with_a_code_that_says_so() -> None:
    """A client that floods is cut off, with 4429."""
    async with served(KEY, stream=StreamLimits(max_requests_per_s=20)) as run, run.socket() as client:
        with pytest.raises(ConnectionClosed) as closed:
            for number in range(200):
                await ask(client, op="ping", id=number)
            while True:
                await asyncio.wait_for(client.recv(), 5)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4429


async def test_subscriptions_and_clients_are_limited() -> None:
    """Beyond the bounds: an error for one subscription more, 1013 for one client more."""
    async with served(KEY, "binance:ETH-USDT", stream=StreamLimits(max_subscriptions=1, max_clients=1)) as run, run.socket() as client:
        await ask(client, op="subscribe", id=1, **BARS)
        await hear(client, "snapshot")
        await ask(client, op="subscribe", id=2, **BARS)
        assert (await hear(client, "error"))["data"]["code"] == "already_subscribed"
        await ask(client, op="subscribe", id=3, **{**BARS, "symbol": "ETH-USDT"})
        assert (await hear(client, "error"))["data"]["code"] == "too_many_subscriptions"
        async with run.socket() as second:
            with pytest.raises(ConnectionClosed) as closed:
                await second.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1013


async def _flood(run: Served, first: int, records: int) -> None:
    for place in range(first, first + records):
        run.kafka.append("trades", trades_frame(KEY, range(place * 100, place * 100 + 100)))
        run.kafka.hand("trades")
        await asyncio.sleep(0)


async def test_a_slow_client_is_closed_with_4408_and_resumes_without_a_gap_while_others_get_everything() -> None:
    """Who does not read is cut off at its bound, not fed from others' memory; from its last cursor it gets the rest."""
    total = 150_000
    async with served(KEY, stream=StreamLimits(queue_bytes=1_000_000)) as run, run.socket(max_queue=1) as slow, run.socket() as quick:
        for client in (slow, quick):
            await ask(client, op="subscribe", id=1, **TRADES)
            await hear(client, "snapshot")
        got: list[int] = []

        async def read_quick() -> None:
            while len(got) < total:
                got.extend(row["trade_id"] for row in (await hear(quick, "update"))["data"])

        reading = asyncio.ensure_future(read_quick())
        for first in range(0, total // 100, 20):
            await _flood(run, first, 20)
            while len(got) < first * 100 and not reading.done():  # 20 MB through one event loop: in step with its own reader
                await asyncio.sleep(0.001)
        await asyncio.wait_for(reading, 20)
        assert got == list(range(total))
        kept: list[int] = []
        cursor = ""
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                message = await hear(slow, "update")
                cursor = message["cursor"]
                kept += [row["trade_id"] for row in message["data"]]
        assert closed.value.rcvd is None or closed.value.rcvd.code == 4408
        assert cursor
        run.store.catch_up("trades")
        async with run.socket() as again:
            await ask(again, op="subscribe", id=1, **TRADES, **{"from": cursor})
            while len(kept) < total:
                kept += [row["trade_id"] for row in (await hear(again, "update"))["data"]]
        assert kept == list(range(total))


async def test_updates_of_an_open_bar_are_conflated_for_a_client_that_lags_and_final_bars_are_not() -> None:
    """Of a thousand updates in one step a client gets the newest; every final bar arrives."""
    async with served(KEY) as run, run.socket() as client:
        await ask(client, op="subscribe", id=1, **BARS)
        await hear(client, "snapshot")
        for number in range(20):
            for _ in range(50):
                run.kafka.append("bars", bars_frame(KEY, [(number, 0, 0)], input_offset=len(run.kafka.log("bars"))))
            run.kafka.append("bars", bars_frame(KEY, [(number, 0, 1), (number + 1, 0, 0)], input_offset=len(run.kafka.log("bars"))))
        run.kafka.hand("bars")
        rows: list[dict[str, Any]] = []
        while not (rows and not rows[-1]["is_final"] and rows[-1]["trade_count"] == 20):
            rows += (await hear(client, "update"))["data"]
        assert [row["trade_count"] for row in rows if row["is_final"]] == list(range(20))
        assert len(rows) < 100


async def test_shutdown_tells_every_client_where_to_resume_and_closes_with_1012() -> None:
    """SIGTERM: the last message carries a cursor per subscription, then 1012."""
    async with served(KEY) as run:
        client = await run.socket()
        await ask(client, op="subscribe", id=1, **BARS)
        await hear(client, "snapshot")
        run.kafka.append("bars", bars_frame(KEY, [(0, 0, 1)]))
        run.kafka.hand("bars")
        last = await hear(client, "update")
        run.server.should_exit = True
        notice = await hear(client, "error")
        assert notice["data"]["code"] == "restart"
        assert notice["data"]["resume"] == [{**BARS, "cursor": last["cursor"]}]
        with pytest.raises(ConnectionClosed) as closed:
            await client.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012


async def test_a_lost_cursor_gets_reset_and_a_snapshot() -> None:
    """What the topic cannot continue any more is said, and the client starts anew on the same connection."""
    async with served(KEY) as run, run.socket() as client:
        for number in range(5):
            run.kafka.append("bars", bars_frame(KEY, [(number, 0, 1)]))
        run.kafka.hand("bars")
        await ask(client, op="subscribe", id=1, **BARS)
        cursor = (await hear(client, "snapshot"))["cursor"]
        await ask(client, op="unsubscribe", id=2, **BARS)
        run.kafka.epoch_value = 1
        await ask(client, op="subscribe", id=3, **BARS, **{"from": cursor})
        reset = await hear(client, "reset")
        assert "cannot be continued" in reset["data"]["reason"]
        assert [bar["trade_count"] for bar in (await hear(client, "snapshot"))["data"]] == [0, 1, 2, 3, 4]


async def test_a_store_that_is_away_refuses_the_subscription_with_its_name() -> None:
    """Without ClickHouse there is no snapshot: an error that says so, and the connection stays usable."""
    async with served(KEY) as run, run.socket() as client:
        run.store.reachable = False
        await ask(client, op="subscribe", id=1, **BARS)
        assert (await hear(client, "error"))["data"]["code"] == "clickhouse_unavailable"
        run.store.reachable = True
        await ask(client, op="subscribe", id=2, **BARS)
        assert (await hear(client, "snapshot"))["seq"] == 1
