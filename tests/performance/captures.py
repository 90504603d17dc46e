"""Recorded Binance trade frames, multiplied over many symbols: captures in; a pool of raw JSON messages that can be played for ever, out.

Every symbol gets a stretch of a capture as it was recorded, with its own name, ids that count on from the stretch's first, and times moved
to a common start. A round of the pool lasts ``span_us`` of market time; the n-th round is the same bytes, its ids and times n rounds later
(added after parsing, so that each message is parsed as it came).
"""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from collectors.binance.mapper import BinanceMapper
from collectors.wire import Array, Parsed

FOLDER = Path(os.environ.get("MARKETSTREAM_RECORDED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "ws" / "binance"
FILES = (("spot_btcusdt_20240808.ws.gz", "spot_btcusdt_20240809.ws.gz"), ("spot_ethusdt_20240808.ws.gz", "spot_ethusdt_20240809.ws.gz"))
"""Captures that go on from one another, by market."""
START_MS = 1_723_161_600_000
_TRADE = re.compile(
    rb'\{"stream":"[a-z]+@trade","data":\{"e":"trade","E":(\d+),"s":"[A-Z]+","t":(\d+),(.*?),"T":(\d+),("m":(?:true|false),"M":true\}\})'
)


class NoCapturesError(Exception):
    """The recorded captures are not on this machine."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One trade frame taken apart."""

    event_ms: int
    trade_id: int
    middle: bytes
    """Price and size as they were sent."""
    time_ms: int
    tail: bytes


@dataclass(frozen=True, kw_only=True)
class Pool:
    """One round of messages, in time order."""

    symbols: tuple[str, ...]
    """Canonical names; the code of a symbol is its place here."""
    streams: tuple[str, ...]
    messages: list[bytes]
    first_id: Array
    """int64, by code: id of its first message."""
    count: Array
    """int64, by code: messages of a round."""
    span_us: int


def read_market(files: Sequence[str], folder: Path = FOLDER) -> list[Recorded]:
    """Every trade frame of captures that follow each other. Raises NoCapturesError."""
    found = []
    for name in files:
        path = folder / name
        if not path.is_file():
            raise NoCapturesError(f"{path} is not there; set MARKETSTREAM_RECORDED_DATA to the folder of the recorded data")
        with gzip.open(path, "rb") as stream:
            for line in stream:
                match = _TRADE.search(line)
                if match:
                    event, trade_id, middle, time, tail = match.groups()
                    found.append(Recorded(int(event), int(trade_id), middle, int(time), tail))
    return found


def make_pool(symbols: int, *, span_s: int, seed: int = 1, folder: Path = FOLDER) -> Pool:
    """A pool of ``symbols`` markets over ``span_s`` seconds of market time. Raises NoCapturesError."""
    rng = np.random.default_rng(seed)
    markets = [read_market(files, folder) for files in FILES]
    times = [np.array([entry.time_ms for entry in market]) for market in markets]
    rows: list[tuple[int, int, bytes]] = []
    names, streams, first_ids, counts = [], [], [], []
    for code in range(symbols):
        market, when = markets[code % len(markets)], times[code % len(markets)]
        start_ms = int(rng.integers(when[0], when[-1] - span_s * 1000))
        first, stop = np.searchsorted(when, [start_ms, start_ms + span_s * 1000]).tolist()
        stop = max(stop, first + 1)
        venue = f"S{code:04d}USDT"
        names.append(f"S{code:04d}-USDT")
        streams.append(f"{venue.lower()}@trade")
        first_ids.append(market[first].trade_id)
        counts.append(stop - first)
        moved = START_MS - start_ms
        for place, entry in enumerate(market[first:stop]):
            rows.append(
                (
                    entry.time_ms + moved,
                    code,
                    b'{"stream":"%b","data":{"e":"trade","E":%d,"s":"%b","t":%d,%b,"T":%d,%b'
                    % (
                        streams[-1].encode(),
                        entry.event_ms + moved,
                        venue.encode(),
                        first_ids[-1] + place,
                        entry.middle,
                        entry.time_ms + moved,
                        entry.tail,
                    ),
                )
            )
    rows.sort(key=lambda row: row[0])  # stable: a symbol's own order stays
    return Pool(
        symbols=tuple(names),
        streams=tuple(streams),
        messages=[message for _, _, message in rows],
        first_id=np.array(first_ids, np.int64),
        count=np.array(counts, np.int64),
        span_us=span_s * 1_000_000,
    )


class RoundMapper:
    """The real mapper, and what makes the n-th round of a pool follow the one before: ids and times move on."""

    def __init__(self, pool: Pool) -> None:
        self.round = 0
        self._pool = pool
        self._mapper = BinanceMapper("trade")

    def bind(self, stream: str, code: int) -> None:
        """See Mapper.bind."""
        self._mapper.bind(stream, code)

    def parse(self, messages: Sequence[bytes]) -> Parsed:
        """See Mapper.parse; all of ``messages`` belong to the same round."""
        parsed = self._mapper.parse(messages)
        if self.round:
            columns = parsed.columns
            columns["trade_id"] = columns["trade_id"] + self.round * self._pool.count[columns["symbol_code"]]
            columns["exchange_time_us"] = columns["exchange_time_us"] + self.round * self._pool.span_us
        return parsed
