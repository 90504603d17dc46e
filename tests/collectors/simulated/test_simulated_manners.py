"""Limits, faults, control messages and HTTP syntax of the simulated exchange, without sockets."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.simulated.blocks import TradeBlock
from collectors.simulated.config import ServerConfig
from collectors.simulated.errors import HttpSyntaxError, SimulationConfigError, UnknownFaultError
from collectors.simulated.faults import FaultPlan, parse_fault
from collectors.simulated.http import MAX_BODY, MAX_LINE, Response, take_request, websocket_reply
from collectors.simulated.limits import ON_ITS_WAY_MS, REFUSALS_BEFORE_BAN, WeightLimit
from collectors.simulated.market import Market
from collectors.simulated.regimes import MarketConfig
from collectors.simulated.rest import weight_of
from collectors.simulated.subscriptions import MAX_STREAMS, Subscriptions, TooManyStreamsError
from collectors.simulated.wire import Wire

START_MS = 1_723_161_240_000  # a whole minute


# Limits.


def test_weight_counts_by_the_minute_then_429_then_418() -> None:
    """Beyond the limit 429 until the minute ends; whoever goes on is banned, longer each time."""
    limit = WeightLimit(100)
    assert limit.admit(60, START_MS).used == 60
    refused = limit.admit(60, START_MS + 10_000)
    assert (refused.status, refused.used, refused.retry_after_s) == (429, 60, 50)
    assert limit.admit(40, START_MS + 20_000).status == 200
    assert limit.admit(100, START_MS + 60_000).status == 200
    verdicts = [limit.admit(1, START_MS + 60_001).status for _ in range(REFUSALS_BEFORE_BAN + 1)]
    assert verdicts == [429] * REFUSALS_BEFORE_BAN + [418]
    banned = limit.admit(1, START_MS + 120_000)
    assert (banned.status, banned.banned_until_ms) == (418, START_MS + 180_001)
    assert limit.admit(1, START_MS + 180_001).status == 200


def test_forced_refusal_ends_by_itself() -> None:
    """A scripted 429 lasts as long as it says."""
    limit = WeightLimit(100)
    limit.force(429, START_MS + 2_500)
    assert limit.admit(1, START_MS).retry_after_s == 3
    assert limit.admit(1, START_MS + 2_500).status == 200


@pytest.mark.parametrize("status", [429, 418])
def test_requests_before_retry_after_ended_are_counted(status: int) -> None:
    """What was under way when the refusal was told is none of them, and neither is who waited."""
    limit = WeightLimit(100)
    limit.force(status, START_MS + 2_500)
    limit.admit(1, START_MS)
    limit.admit(1, START_MS + ON_ITS_WAY_MS)
    assert (limit.refused, limit.too_early) == (2, 0)
    limit.admit(1, START_MS + 1_000)
    assert limit.admit(1, START_MS + 2_600).status == 200  # let in, but 3 s were told at first, and again at 0.25 s
    assert (limit.refused, limit.too_early) == (3, 2)
    assert limit.admit(1, START_MS + 3_250).status == 200
    assert (limit.refused, limit.too_early) == (3, 2)


@pytest.mark.parametrize(
    ("spot", "route", "params", "weight"),
    [
        (True, "trades", {"symbol": "BTCUSDT"}, 25),
        (True, "ticker/24hr", {"symbol": "BTCUSDT"}, 2),
        (True, "ticker/24hr", {}, 80),
        (True, "depth", {"limit": "5000"}, 250),
        (True, "depth", {}, 5),
        (False, "klines", {"limit": "99"}, 1),
        (False, "klines", {"limit": "1500"}, 10),
        (False, "depth", {}, 10),
        (False, "historicalTrades", {}, 20),
    ],
)
def test_weights_are_the_documented_ones(spot: bool, route: str, params: dict[str, str], weight: int) -> None:
    """A sample of Binance's table."""
    assert weight_of(spot=spot, route=route, params=params) == weight


# Faults.


def busy_block(market: Market, code: int = 0, least: int = 6) -> TradeBlock:
    """A step in which a symbol traded at least so often."""
    while True:
        block = market.step()
        if (block.code == code).sum() >= least:
            return block


@pytest.fixture
def market() -> Market:
    """A busy market of three symbols."""
    return Market(MarketConfig(symbols=3, rate=3_000), start_ms=START_MS)


def ids(block: TradeBlock, code: int = 0) -> list[int]:
    """Trade ids of a symbol in the order they are sent."""
    return block.trade_id[block.code == code].tolist()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("drop", lambda made: made[3:]),
        ("duplicate", lambda made: [made[0], made[0], made[1], made[1], made[2], made[2], *made[3:]]),
        ("reorder", lambda made: [made[2], made[1], made[0], *made[3:]]),
    ],
)
def test_fault_touches_the_next_trades_of_its_symbol_only(market: Market, fault: str, expected: Any) -> None:
    """The first three trades are dropped, doubled or reversed; others and other symbols are sent as made."""
    plan = FaultPlan()
    request = parse_fault({"fault": fault, "symbol": "btcusdt", "count": 3})
    plan.add(request, 0)
    block = busy_block(market)
    sent = plan.apply(block)
    assert ids(sent) == expected(ids(block))
    assert list(request.touched) == ids(block)[:3]
    for other in (1, 2):
        assert ids(sent, other) == ids(block, other)
    following = busy_block(market)
    assert plan.apply(following) is following


def test_reorder_holds_trades_over_steps(market: Market) -> None:
    """What one step cannot fill is held until the count is reached, then sent newest first before what came later."""
    plan = FaultPlan()
    plan.add(parse_fault({"fault": "reorder", "symbol": "BTCUSDT", "count": 40}), 0)
    made: list[int] = []
    sent: list[int] = []
    while len(made) < 60:
        block = busy_block(market, least=2)
        made += ids(block)
        sent += ids(plan.apply(block))
        if len(made) < 40:
            assert not sent
    assert sent == made[:40][::-1] + made[40:]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["drop", "duplicate", "reorder"]), st.integers(1, 30)), min_size=1, max_size=4))
def test_faults_in_a_row_lose_and_double_exactly_what_they_say(wanted: list[tuple[str, int]]) -> None:
    """Over any sequence of faults: sent = made - dropped + doubled, by id."""
    market = Market(MarketConfig(symbols=2, rate=3_000), start_ms=START_MS)
    plan = FaultPlan()
    requests = [parse_fault({"fault": name, "symbol": "BTCUSDT", "count": count}) for name, count in wanted]
    for request in requests:
        plan.add(request, 0)
    made: list[int] = []
    sent: list[int] = []
    while any(request.remaining for request in requests):
        block = market.step()
        made += ids(block)
        sent += ids(plan.apply(block))
    dropped = [entry for request in requests if request.fault == "drop" for entry in request.touched]
    doubled = [entry for request in requests if request.fault == "duplicate" for entry in request.touched]
    assert sorted(sent) == sorted([*(set(made) - set(dropped)), *doubled])


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (None, "send an object"),
        ({"fault": "explode"}, "explode"),
        ({"fault": "drop"}, "symbol is missing"),
        ({"fault": "drop", "symbol": "BTCUSDT", "count": 0}, "count=0"),
        ({"fault": "drop", "symbol": "BTCUSDT", "count": "3"}, "count='3'"),
        ({"fault": "drop", "symbol": "BTCUSDT", "cuont": 3}, "cuont"),
        ({"fault": "skew", "milliseconds": 300_001}, "milliseconds=300001"),
        ({"fault": "rate_limit", "status": 420}, "status=420"),
        ({"fault": "pause", "symbol": "BTCUSDT", "market": "moon"}, "moon"),
    ],
)
def test_misspelt_fault_is_refused_by_name(body: Any, named: str) -> None:
    """The sentence names what cannot be understood."""
    with pytest.raises(UnknownFaultError, match=named):
        parse_fault(body)


# Control messages.


@pytest.fixture
def subscriptions() -> Subscriptions:
    """No streams yet, on twenty symbols."""
    wire = Wire(Market(MarketConfig(symbols=20), start_ms=START_MS).universe)
    return Subscriptions(wire, {name: code for code, name in enumerate(wire.lower)})


def test_subscribe_list_and_unsubscribe(subscriptions: Subscriptions) -> None:
    """Acknowledged with the id; listed in order; masks follow."""
    answer = subscriptions.control('{"method":"SUBSCRIBE","params":["btcusdt@trade","ethusdt@aggTrade","btcusdt@kline_1m"],"id":1}')
    assert answer == '{"result":null,"id":1}'
    assert (subscriptions.trades.count, subscriptions.aggregates.count, subscriptions.klines) == (1, 1, {(0, "1m")})
    listed = subscriptions.control('{"method":"LIST_SUBSCRIPTIONS","id":"x"}')
    assert listed == '{"result":["btcusdt@trade","ethusdt@aggTrade","btcusdt@kline_1m"],"id":"x"}'
    subscriptions.control('{"method":"UNSUBSCRIBE","params":["btcusdt@trade","nosuch@trade","btcusdt@kline_1m"],"id":2}')
    assert subscriptions.names == ["ethusdt@aggTrade"]
    assert (subscriptions.trades.count, subscriptions.klines) == (0, set())


def test_unknown_streams_are_accepted_and_silent(subscriptions: Subscriptions) -> None:
    """As at Binance, a misspelt symbol is acknowledged and never heard of again."""
    assert json.loads(subscriptions.control('{"method":"SUBSCRIBE","params":["BTCUSDT@trade","nix@trade"],"id":3}'))["result"] is None
    assert subscriptions.trades.count == 0
    assert len(subscriptions.names) == 2


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", 3),
        ("[1]", 2),
        ('{"method":"SUBSCRIB","params":[],"id":1}', 2),
        ('{"params":[],"id":1}', 2),
        ('{"method":"SUBSCRIBE","id":1}', 2),
        ('{"method":"SUBSCRIBE","params":["btcusdt"],"id":1}', 2),
        ('{"method":"SUBSCRIBE","params":[5],"id":1}', 2),
        ('{"method":"SUBSCRIBE","params":[],"id":1.5}', 2),
        ("[" * 50_000, 3),
    ],
)
def test_broken_control_messages_get_an_error(subscriptions: Subscriptions, text: str, code: int) -> None:
    """Code 3 for what is no JSON, 2 for what is no request; nothing is subscribed."""
    assert json.loads(subscriptions.control(text))["error"]["code"] == code
    assert subscriptions.names == []


def test_1024_streams_are_the_most(subscriptions: Subscriptions) -> None:
    """The 1,025th is refused and changes nothing; asking again for the same ones is fine."""
    names = [f"s{number}@trade" for number in range(MAX_STREAMS)]
    subscriptions.add(names)
    subscriptions.add(names)
    with pytest.raises(TooManyStreamsError):
        subscriptions.add(["btcusdt@trade"])
    assert subscriptions.trades.count == 0
    subscriptions.remove(names[:1])
    subscriptions.add(["btcusdt@trade"])
    assert subscriptions.trades.count == 1


# HTTP.


def test_requests_are_read_whole_whatever_the_pieces() -> None:
    """Byte by byte, two requests in a row come out as they were sent."""
    raw = b"GET /api/v3/time?a=1&b=%20x HTTP/1.1\r\nHost: h\r\n\r\nPOST /sim/faults HTTP/1.1\r\nContent-Length: 4\r\n\r\nbodyGET"
    buffer, seen = bytearray(), []
    for byte in raw:
        buffer.append(byte)
        request = take_request(buffer)
        if request:
            seen.append(request)
    assert [(entry.method, entry.path, entry.body) for entry in seen] == [("GET", "/api/v3/time", b""), ("POST", "/sim/faults", b"body")]
    assert seen[0].params == {"a": "1", "b": " x"}
    assert buffer == b"GET"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x16\x03\x01 hello\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET /" + b"x" * MAX_LINE, 414),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 10_000, 431),
        (b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY + 1), 413),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    ],
)
def test_hostile_requests_are_refused_with_a_status(raw: bytes, status: int) -> None:
    """What can never become a request is refused at once, whatever it is."""
    with pytest.raises(HttpSyntaxError) as caught:
        take_request(bytearray(raw))
    assert caught.value.status == status


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_never_break_the_parser(data: bytes) -> None:
    """Either more is awaited, a request is found, or the syntax error says no."""
    try:
        take_request(bytearray(data))
    except HttpSyntaxError as error:
        assert error.status in (400, 413, 414, 431)


def test_websocket_handshake_answers_the_key() -> None:
    """The accept value is RFC 6455's own example; a handshake without a key is refused."""
    head = b"GET /ws HTTP/1.1\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    request = take_request(bytearray(head + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"))
    assert request is not None
    reply = websocket_reply(request)
    assert isinstance(reply, bytes)
    assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in reply
    keyless = take_request(bytearray(head + b"\r\n"))
    assert keyless is not None
    refusal = websocket_reply(keyless)
    assert isinstance(refusal, Response)
    assert refusal.status == 400


@pytest.mark.parametrize("changes", [{"host": "0.0.0.0"}, {"host": "example.org"}, {"port": 70_000}, {"max_buffer_bytes": 0}])
def test_server_refuses_settings_that_cannot_work(changes: dict[str, Any]) -> None:
    """Only loopback, a real port, positive bounds; the sentence names the setting."""
    with pytest.raises(SimulationConfigError, match=next(iter(changes))):
        ServerConfig(**changes)
