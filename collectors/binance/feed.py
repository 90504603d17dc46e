"""Where Binance is and how its streams are subscribed. Pure.

Documents: "WebSocket Streams for Binance" (spot): 1,024 streams a connection, 5 incoming messages a second, a connection lives 24 hours,
the server pings every 20 s. "USD-M Futures: Websocket Market Streams": 10 messages a second, pings every 3 minutes; since April 2026
aggregate trades come from ``/market`` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Final
from urllib.parse import urlsplit

import msgspec

from collectors.binance.mapper import StreamKind
from collectors.dedupe import IdPromise
from schemas.errors import VocabularyError

MAX_REQUEST_BYTES: Final = 4_096
"""USD-M closes the connection on longer requests (code 3001); 4 KiB hold about 200 stream names."""
DAY_S: Final = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Venue:
    """One of Binance's exchanges."""

    exchange: str
    """Our name of it."""
    rest_url: str
    """Base of the REST routes, without path."""
    rest_path: str
    """Path of the market-data routes."""
    ws_url: str
    """Full address of the combined-stream endpoint."""
    kind: StreamKind
    """Which stream trades come from."""
    ids: IdPromise
    """What that stream's ids promise, by its documents."""
    has_execution_type: bool
    """Whether single trades say if they are of the market (``X``)."""
    weight_per_minute: float
    """REST budget of one address."""
    messages_per_s: float
    """Requests one connection may send."""
    page_rows: int
    """Rows of one REST page of trades."""
    max_streams: int = 1_024
    max_age_s: float = DAY_S - 3_600.0
    """Connections are replaced an hour before the venue cuts them."""

    @property
    def consecutive_ids(self) -> bool:
        """Whether a hole in that stream's ids is a loss."""
        return self.ids is IdPromise.CONSECUTIVE


_VENUES: Final = (
    Venue(
        exchange="binance",
        rest_url="https://api.binance.com",
        rest_path="/api/v3",
        ws_url="wss://stream.binance.com:9443/stream",
        kind="trade",
        ids=IdPromise.CONSECUTIVE,
        has_execution_type=False,
        weight_per_minute=6_000,
        messages_per_s=5,
        page_rows=1_000,
    ),
    # Aggregate trades are the documented stream; single trades (kind="trade") skip ids and are not documented.
    Venue(
        exchange="binance-usdm",
        rest_url="https://fapi.binance.com",
        rest_path="/fapi/v1",
        ws_url="wss://fstream.binance.com/market/stream",
        kind="aggTrade",
        ids=IdPromise.CONSECUTIVE,
        has_execution_type=True,
        weight_per_minute=2_400,
        messages_per_s=10,
        page_rows=500,
    ),
)
VENUES: Final = {venue.exchange: venue for venue in _VENUES}


def venue_of(exchange: str, *, rest_url: str = "", ws_url: str = "", kind: StreamKind | None = None) -> Venue:
    """The venue of that name, at other addresses where they are given.

    Args:
        exchange: ``binance`` or ``binance-usdm``.
        rest_url: base address, e.g. of the simulated exchange; empty: the venue's own.
        ws_url: base address of streams; ``/stream`` (USD-M without a path: ``/market/stream``) is added. Empty: the venue's own.
        kind: another stream than the venue's usual one.

    Raises:
        VocabularyError: no such venue here.
    """
    venue = VENUES.get(exchange)
    if venue is None:
        raise VocabularyError("Binance exchange", exchange, VENUES)
    if kind is not None:
        # aggregate trades are numbered without holes everywhere; single trades of USD-M share a counter with what is not published
        consecutive = kind == "aggTrade" or not venue.has_execution_type
        venue = replace(venue, kind=kind, ids=IdPromise.CONSECUTIVE if consecutive else IdPromise.INCREASING)
    if rest_url:
        venue = replace(venue, rest_url=rest_url.rstrip("/"))
    if ws_url:
        base = ws_url.rstrip("/").removesuffix("/stream")
        routed = not urlsplit(base).path and venue.has_execution_type
        venue = replace(venue, ws_url=f"{base}/market/stream" if routed else f"{base}/stream")
    return venue


class BinanceFeed:
    """Manners of one connection shard.

    Args:
        venue: which exchange.
        first_id: first request id; shards use ranges of their own so that answers cannot be mixed up.
    """

    def __init__(self, venue: Venue, *, first_id: int = 1) -> None:
        self.url = venue.ws_url
        self.max_age_s = venue.max_age_s
        self.messages_per_s = venue.messages_per_s
        self._ids = count(first_id)

    def requests(self, streams: Sequence[str], *, subscribe: bool) -> list[tuple[list[str], int, str]]:
        """SUBSCRIBE or UNSUBSCRIBE messages for ``streams``, none longer than the venue takes: (streams, id, text) each."""
        method = "SUBSCRIBE" if subscribe else "UNSUBSCRIBE"
        found: list[tuple[list[str], int, str]] = []
        batch: list[str] = []
        size = 100
        for stream in streams:
            cost = len(stream.encode()) + 3
            if batch and size + cost > MAX_REQUEST_BYTES:
                found.append(self._request(method, batch))
                batch, size = [], 100
            batch.append(stream)
            size += cost
        if batch:
            found.append(self._request(method, batch))
        return found

    def _request(self, method: str, streams: list[str]) -> tuple[list[str], int, str]:
        number = next(self._ids)
        return streams, number, msgspec.json.encode({"method": method, "params": streams, "id": number}).decode()


def stream_name(raw_symbol: str, kind: StreamKind) -> str:
    """Name of a symbol's stream, e.g. ``btcusdt@trade``."""
    return f"{raw_symbol.lower()}@{kind}"
