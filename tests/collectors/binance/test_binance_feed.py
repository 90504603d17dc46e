"""Where Binance is and how streams are subscribed."""

import json

import pytest

from collectors.binance.feed import MAX_REQUEST_BYTES, BinanceFeed, stream_name, venue_of
from schemas.errors import VocabularyError


def test_addresses_are_the_venues_own_unless_given() -> None:
    """The same code runs against the simulated exchange."""
    spot, usdm = venue_of("binance"), venue_of("binance-usdm")
    assert spot.ws_url == "wss://stream.binance.com:9443/stream"
    assert usdm.ws_url == "wss://fstream.binance.com/market/stream"
    assert venue_of("binance", ws_url="ws://127.0.0.1:1").ws_url == "ws://127.0.0.1:1/stream"
    assert venue_of("binance", ws_url="ws://127.0.0.1:1/stream").ws_url == "ws://127.0.0.1:1/stream"
    assert venue_of("binance-usdm", ws_url="ws://127.0.0.1:1").ws_url == "ws://127.0.0.1:1/market/stream"
    assert venue_of("binance-usdm", ws_url="ws://127.0.0.1:1/usdm").ws_url == "ws://127.0.0.1:1/usdm/stream"
    assert venue_of("binance", rest_url="http://127.0.0.1:1/").rest_url == "http://127.0.0.1:1"


def test_ids_are_consecutive_except_for_single_trades_of_usdm() -> None:
    """There the counter also numbers what is not published."""
    assert venue_of("binance").consecutive_ids
    assert venue_of("binance", kind="aggTrade").consecutive_ids
    assert venue_of("binance-usdm").consecutive_ids
    assert not venue_of("binance-usdm", kind="trade").consecutive_ids


def test_an_unknown_exchange_names_the_nearest() -> None:
    """Misspelt settings."""
    with pytest.raises(VocabularyError, match="did you mean 'binance-usdm'"):
        venue_of("binance-usdt")


def test_a_thousand_streams_are_asked_for_in_requests_the_venue_takes() -> None:
    """None longer than 4 KiB, each stream once, ids never twice."""
    streams = [stream_name(f"SYM{number:04d}USDT", "trade") for number in range(1_024)]
    feed = BinanceFeed(venue_of("binance"))
    requests = feed.requests(streams, subscribe=True) + feed.requests(streams[:1], subscribe=False)
    assert all(len(text.encode()) <= MAX_REQUEST_BYTES for _, _, text in requests)
    assert [stream for batch, _, _ in requests[:-1] for stream in batch] == streams
    assert len(requests) < 10
    ids = [number for _, number, _ in requests]
    assert len(set(ids)) == len(ids)
    for batch, number, text in requests[:-1]:
        assert json.loads(text) == {"method": "SUBSCRIBE", "params": batch, "id": number}
    assert json.loads(requests[-1][2])["method"] == "UNSUBSCRIBE"
    assert feed.requests([], subscribe=True) == []
