"""The mapper: every recorded trade exactly, messages that must give nothing, hostile bytes."""

import gzip
import json
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.binance.mapper import BinanceMapper, StreamKind
from collectors.wire import Parsed
from tests.collectors.fakes import capture, recorded

SPOT = b'{"stream":"btcusdt@trade","data":{"e":"trade","E":1723161255343,"s":"BTCUSDT","t":3735683259,"p":"61837.63000000","q":"0.02000000","T":1723161255342,"m":true,"M":true}}'
USDM = b'{"stream":"btcusdt@trade","data":{"e":"trade","E":1723161256322,"T":1723161256322,"s":"BTCUSDT","t":5266583935,"p":"61800.30","q":"0.006","X":"MARKET","m":false}}'
AGG = b'{"stream":"zilusdt@aggTrade","data":{"e":"aggTrade","E":1617647603484,"s":"ZILUSDT","a":18938405,"p":"0.21448000","q":"2062.90000000","f":23806928,"l":23806928,"T":1617647603483,"m":false,"M":true}}'


def mapper(kind: StreamKind = "trade", *streams: str, usdm: bool = False) -> BinanceMapper:
    """A mapper whose streams have codes 0, 1, ..."""
    made = BinanceMapper(kind, has_execution_type=usdm)
    for code, stream in enumerate(streams or (f"btcusdt@{kind}",)):
        made.bind(stream, code)
    return made


def rows(parsed: Parsed) -> list[tuple[Any, ...]]:
    """(code, id, price, size, side, exchange time us) of every trade."""
    names = ("symbol_code", "trade_id", "price", "size", "side", "exchange_time_us")
    return list(zip(*(parsed.columns[name].tolist() for name in names), strict=True))


def test_the_documented_messages_become_exact_rows() -> None:
    """Spot, USD-M and aggregate trades; the taker sold where the buyer was the maker."""
    assert rows(mapper().parse([SPOT])) == [(0, 3735683259, 61837.63, 0.02, -1, 1723161255342000)]
    assert rows(mapper(usdm=True).parse([USDM])) == [(0, 5266583935, 61800.30, 0.006, 1, 1723161256322000)]
    assert rows(mapper("aggTrade", "zilusdt@aggTrade").parse([AGG])) == [(0, 18938405, 0.21448, 2062.9, 1, 1617647603483000)]


def test_an_old_spot_trade_with_order_ids_is_read() -> None:
    """Until 2023 trades also carried buyer and seller order ids, named b and a."""
    old = SPOT.replace(b'"T":', b'"b":88,"a":50,"T":')
    assert rows(mapper().parse([old])) == rows(mapper().parse([SPOT]))


@pytest.mark.parametrize(
    ("name", "count", "usdm"),
    [
        ("spot_btcusdt_20240808", 9_757, False),
        ("spot_btcusdt_20240809", 10_147, False),
        ("spot_ethusdt_20240808", 6_106, False),
        ("spot_ethusdt_20240809", 8_409, False),
        ("usdm_btcusdt_20240808", 21_313, True),
    ],
)
def test_every_recorded_trade_is_mapped_exactly(name: str, count: int, usdm: bool) -> None:
    """All lines of a connection, in batches of any size: each trade once, values as Python's own JSON and float give them."""
    messages = [message for _, message in capture(name)]
    expected = []
    for message in messages:
        found = json.loads(message)
        if found.get("stream", "").endswith("@trade"):
            data = found["data"]
            expected.append((0, data["t"], float(data["p"]), float(data["q"]), -1 if data["m"] else 1, data["T"] * 1000))
    made = mapper("trade", f"{name.split('_')[1]}@trade", usdm=usdm)
    random, position, got, others, rejected = Random(1), 0, [], 0, []
    while position < len(messages):
        size = random.choice((1, 7, 300, 5_000))
        parsed = made.parse(messages[position : position + size])
        got += rows(parsed)
        others += parsed.ignored
        rejected += parsed.rejected
        position += size
    assert len(got) == count
    assert got == expected
    assert others + len(rejected) == len(messages) - count
    assert {item.reason for item in rejected} <= {"unknown_message"}  # the one REST depth snapshot some files hold


def test_recorded_aggregate_trades_are_mapped_by_id() -> None:
    """1,240 aggregates of ten pairs, consecutive per symbol."""
    messages = []
    with gzip.open(recorded("cryptofeed/BINANCE-20210405.0.gz"), "rb") as stream:
        for line in stream:
            _, _, message = line.strip().partition(b": ")
            if message.startswith(b'{"stream"'):
                messages.append(message)
    streams = sorted({json.loads(m)["stream"] for m in messages if b"@aggTrade" in m})
    parsed = mapper("aggTrade", *streams).parse(messages)
    assert parsed.row_count == 1_240
    assert parsed.rejected == []
    for code in range(len(streams)):
        ids = parsed.columns["trade_id"][parsed.columns["symbol_code"] == code]
        assert (np.diff(ids) == 1).all()


def test_fills_that_are_not_of_the_market_are_ignored_not_rejected() -> None:
    """USD-M reports the insurance fund, auto-deleveraging and NA through the same stream, some at price 0."""
    messages = [USDM.replace(b"MARKET", kind) for kind in (b"INSURANCE_FUND", b"ADL", b"NA", b"MARKET")]
    messages[2] = messages[2].replace(b'"61800.30"', b'"0"').replace(b'"0.006"', b'"0"')
    parsed = mapper(usdm=True).parse(messages)
    assert parsed.row_count == 1
    assert parsed.message_index.tolist() == [3]
    assert parsed.ignored == 3
    assert parsed.rejected == []


def test_replies_are_told_apart_from_events() -> None:
    """Acknowledged, refused in the spot form, refused in the USD-M form."""
    messages = [
        b'{"result":null,"id":1}',
        SPOT,
        b'{"error":{"code":2,"msg":"Invalid request: unknown variant"},"id":2}',
        b'{"code":-1121,"msg":"Invalid symbol.","id":3}',
        b'{"id":"abc","result":["btcusdt@trade"]}',
    ]
    parsed = mapper().parse(messages)
    assert [(reply.request_id, reply.error) for reply in parsed.replies] == [
        (1, ""),
        (2, "2: Invalid request: unknown variant"),
        (3, "-1121: Invalid symbol."),
        ("abc", ""),
    ]
    assert parsed.message_index.tolist() == [1]
    assert parsed.rejected == []


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (SPOT[:90], "malformed_message"),  # cut
        (b"", "malformed_message"),
        (b"[1,2]", "malformed_message"),
        (SPOT + SPOT, "malformed_message"),
        (SPOT.replace(b'"61837.63000000"', b'"abc"'), "malformed_message"),
        (SPOT.replace(b'"t":3735683259', b'"t":null'), "malformed_message"),
        (SPOT.replace(b'"t":3735683259', b'"t":12.5'), "malformed_message"),
        (SPOT.replace(b'"T":1723161255342,', b""), "malformed_message"),
        (SPOT.replace(b"61837.63000000", b"0.00000000"), "impossible_value"),
        (SPOT.replace(b"61837.63000000", b"-1"), "impossible_value"),
        (SPOT.replace(b"61837.63000000", b"nan"), "impossible_value"),
        (SPOT.replace(b"61837.63000000", b"inf"), "impossible_value"),
        (SPOT.replace(b"61837.63000000", b"1e400"), "malformed_message"),  # beyond float64
        (SPOT.replace(b"0.02000000", b"0"), "impossible_value"),
        (SPOT.replace(b'"t":3735683259', b'"t":-1'), "impossible_value"),
        (SPOT.replace(b'"t":3735683259', b'"t":9223372036854775807'), "impossible_value"),
        (SPOT.replace(b'"t":3735683259', b'"t":99999999999999999999999'), "impossible_value"),
        (SPOT.replace(b'"T":1723161255342', b'"T":1723161255'), "impossible_value"),  # seconds
        (SPOT.replace(b'"T":1723161255342', b'"T":1723161255342000'), "impossible_value"),  # microseconds
        (SPOT.replace(b'"T":1723161255342', b'"T":18446744073709551616'), "impossible_value"),
        (SPOT.replace(b"btcusdt@trade", b"dogeusdt@trade"), "unknown_stream"),
        (SPOT.replace(b'"e":"trade"', b'"e":"novel"'), "unknown_message"),
        (b'{"hello":"world"}', "unknown_message"),
        (b'{"e":"trade","t":1}', "unknown_message"),  # raw stream: the connection is not in combined mode
        (b'{"stream":"btcusdt@trade","data":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "malformed_message"),
    ],
)
def test_what_is_wrong_is_rejected_with_its_reason_and_costs_no_neighbour(message: bytes, reason: str) -> None:
    """Between two good trades, one bad message."""
    parsed = mapper().parse([SPOT, message, SPOT])
    assert [(item.index, item.reason) for item in parsed.rejected] == [(1, reason)]
    assert parsed.rejected[0].detail
    assert parsed.message_index.tolist() == [0, 2]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=60), st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=3))), max_size=12))
def test_any_bytes_give_rows_replies_or_reasons(items: list[bytes | tuple[int, bytes]]) -> None:
    """Random bytes and trades with random bytes put in: every message is accounted for, batch and one by one alike."""
    messages = [item if isinstance(item, bytes) else SPOT[: item[0]] + item[1] + SPOT[item[0] + 1 :] for item in items]
    made = mapper()
    together = made.parse(messages)
    assert together.row_count + len(together.rejected) + len(together.replies) + together.ignored == len(messages)
    one_by_one = [made.parse([message]) for message in messages]
    assert rows(together) == [row for parsed in one_by_one for row in rows(parsed)]
    assert [item.reason for item in together.rejected] == [item.reason for parsed in one_by_one for item in parsed.rejected]
    good = (together.columns["price"] > 0) & np.isfinite(together.columns["price"]) & (together.columns["size"] > 0)
    assert good.all()


def test_prices_are_the_nearest_doubles() -> None:
    """Decimal text is read as Python reads it, at every length the venue may send."""
    random = Random(5)
    texts = [f"{random.randrange(10 ** random.randrange(1, 18))}.{random.randrange(10**8):08d}" for _ in range(2_000)]
    texts = [text for text in texts if float(text) > 0]
    messages = [
        msgspec.json.encode(
            {"stream": "btcusdt@trade", "data": {"e": "trade", "t": 1, "p": text, "q": text, "T": 1723161255342, "m": True}}
        )
        for text in texts
    ]
    parsed = mapper().parse(messages)
    assert parsed.columns["price"].tolist() == [float(text) for text in texts]
    assert parsed.columns["size"].tolist() == [float(text) for text in texts]


_TEXTS = st.sampled_from(
    [
        "0", "1", "00", "01", "1.", ".5", "0.5", "00.5", "1.50000000", "61837.63000000", "-1", "+1", "1e3", "1E-3", " 1", "1 ", "", "nan", "inf",
        "9007199254740993", "900719925474099.3", "123456789012345678", "1234567890123456789", "0.000000000000000001", "0.1234567890123456789",
        "1_0", "1.2.3", "\u0661", "true", "0x10", "18014398509481985", "0.30000000000000004",
    ]
)  # fmt: skip
_NUMBERS = st.sampled_from(
    ["0", "1", "-1", "01", "1.0", "1e3", "3735683259", "999999999999999999", "1000000000000000000", "9223372036854775807", "4611686018427387904",
     "18446744073709551616", "1723161255342", "1723161255", "1723161255342000", "1230767999999", "1230768000000", "4102444799999", "4102444800000",
     "true", "null", '"5"', '"x"', "[]", "{}", ""]
)  # fmt: skip
_OTHERS = st.sampled_from(
    ['"E":1', '"s":"BTCUSDT"', '"M":true', '"M":false', '"b":88', '"a":50', '"z":null', '"z":"a\\"b"', '"z":[1]', '"z":{"p":"1"}', '"z":1.5', '"z":-1',
     '"z":01', '"zz":1', '"":1', '"p":"7"', '"t":9', '"e":"trade"', '"e":"aggTrade"', '"X":"MARKET"', '"X":"NA"', '"X":5', '"z":"\u00e9"', '"z":tru', '1:2']
)  # fmt: skip


@st.composite
def almost_trades(draw: st.DrawFn) -> bytes:
    """Trade messages with odd values, keys, orders and spaces."""
    price = draw(_TEXTS)
    fields = [
        f'"t":{draw(st.one_of(st.just("12"), _NUMBERS))}',
        draw(st.sampled_from([f'"p":"{price}"', f'"p":{price}'])),
        f'"q":"{draw(st.one_of(st.just("0.02000000"), _TEXTS))}"',
        f'"T":{draw(st.one_of(st.just("1723161255342"), _NUMBERS))}',
        draw(st.sampled_from(['"m":true', '"m":true', '"m":false', '"m":1', '"m":null', '"m":tru'])),
        *draw(st.lists(_OTHERS, max_size=2)),
    ]
    if draw(st.integers(0, 3)) == 0:
        fields = draw(st.permutations(fields))
    if draw(st.integers(0, 9)) == 0:
        fields.pop()
    comma = draw(st.sampled_from([",", ",", ",", ", ", " ,", ",,"]))
    head = draw(
        st.sampled_from(['{"stream":"btcusdt@trade","data":{"e":"trade",'] * 6 + ['{ "stream":"btcusdt@trade","data":{"e":"trade",', "{"])
    )
    tail = draw(st.sampled_from(["}}"] * 6 + ["} }", "}", "}}}", "}} ", ',"x":1}}', '},"x":1}']))
    return (head + comma.join(fields) + tail).encode()


@settings(max_examples=200, deadline=None)
@given(st.lists(almost_trades(), min_size=1, max_size=6), st.booleans())
def test_the_compiled_reader_and_the_general_parser_agree(messages: list[bytes], usdm: bool) -> None:
    """Whatever the compiled reader takes, it takes as the general parser does, to the last bit."""
    made = mapper(usdm=usdm)
    fast, general = made.parse(messages), made._parse_slowly(messages)
    assert rows(fast) == rows(general)
    assert fast.message_index.tolist() == general.message_index.tolist()
    assert [(item.index, item.reason) for item in fast.rejected] == [(item.index, item.reason) for item in general.rejected]
    assert fast.ignored == general.ignored
    assert fast.replies == general.replies


def test_hundreds_of_streams_are_told_apart() -> None:
    """The table of streams grows with what is bound, also after messages were read."""
    made = BinanceMapper("trade")
    for code in range(700):
        made.bind(f"s{code}usdt@trade", code)
        if code % 100 == 0:
            message = SPOT.replace(b"btcusdt", f"s{code}usdt".encode())
            assert made.parse([message]).columns["symbol_code"].tolist() == [code]
    messages = [SPOT.replace(b"btcusdt", f"s{code}usdt".encode()) for code in range(700)]
    assert made.parse(messages).columns["symbol_code"].tolist() == list(range(700))
    assert made.parse([SPOT]).rejected[0].reason == "unknown_stream"
