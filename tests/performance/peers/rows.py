"""What every row-at-a-time peer shares: the record of one trade and a plain dictionary of bars, as one writes it without a frame."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import fastavro

if TYPE_CHECKING:
    import numpy.typing as npt  # a peer's environment has no numpy

TIMEFRAMES_S = (60, 300, 900, 3600, 14_400, 86_400)

TRADE = fastavro.parse_schema(
    {
        "type": "record",
        "name": "Trade",
        "fields": [
            {"name": "key", "type": "string"},
            {"name": "trade_id", "type": "long"},
            {"name": "price", "type": "double"},
            {"name": "size", "type": "double"},
            {"name": "side", "type": "int"},
            {"name": "exchange_time_us", "type": "long"},
            {"name": "receive_time_us", "type": "long"},
        ],
    }
)


def encode_rows(keys: tuple[str, ...], columns: dict[str, npt.NDArray[Any]]) -> list[tuple[str, bytes]]:
    """(key, Avro bytes) of each trade."""
    names = [name for name in columns if name != "symbol_code"]
    lists = [columns[name].tolist() for name in names]
    records = []
    for code, *values in zip(columns["symbol_code"].tolist(), *lists, strict=True):
        out = io.BytesIO()
        fastavro.schemaless_writer(out, TRADE, {"key": keys[code], **dict(zip(names, values, strict=True))})
        records.append((keys[code], out.getvalue()))
    return records


def decode_row(data: bytes) -> dict[str, Any]:
    """One trade as a dict."""
    record = fastavro.schemaless_reader(io.BytesIO(data), TRADE, None)
    assert isinstance(record, dict)
    return record


class DictBars:
    """Six timeframes of bars as a dictionary by (key, timeframe)."""

    def __init__(self) -> None:
        self.open: dict[tuple[str, int], list[Any]] = {}

    def add(self, trade: dict[str, Any]) -> list[list[Any]]:
        """The bars that this trade closed."""
        closed = []
        key, price, size, time_us = trade["key"], trade["price"], trade["size"], trade["exchange_time_us"]
        bought = size if trade["side"] > 0 else 0.0
        for seconds in TIMEFRAMES_S:
            start = time_us - time_us % (seconds * 1_000_000)
            bar = self.open.get((key, seconds))
            if bar is None or bar[0] != start:
                if bar is not None:
                    closed.append([key, seconds, *bar])
                self.open[(key, seconds)] = [start, price, price, price, price, size, price * size, bought, 1, trade["trade_id"]]
                continue
            if price > bar[2]:
                bar[2] = price
            if price < bar[3]:
                bar[3] = price
            bar[4] = price
            bar[5] += size
            bar[6] += price * size
            bar[7] += bought
            bar[8] += 1
        return closed
