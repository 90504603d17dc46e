"""The rows clients see: which fields a bar and a trade have, in JSON, and how they are selected from ClickHouse.

A row looks the same whether it comes from history (ClickHouse writes the JSON) or live (written here from a frame's columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from schemas.symbols import SIDE_NAMES


class BarRow(msgspec.Struct, frozen=True, gc=False):
    """One bar ``[open_time, close_time)``, UTC. Prices in quote units, volumes in base units."""

    open_time_us: int
    close_time_us: int
    open: float
    high: float
    low: float
    close: float
    volume: float
    quote_volume: float
    buy_volume: float
    trade_count: int
    vwap: float
    first_trade_id: int
    last_trade_id: int
    revision: int
    is_final: bool
    complete: bool
    last_receive_time_us: int
    held_count: int
    """Suspect trades of its interval that were held back: they are not in it."""


class TradeRow(msgspec.Struct, frozen=True, gc=False):
    """One trade; ``side`` is the taker's, ``buy`` or ``sell``."""

    trade_id: int
    price: float
    size: float
    side: str
    exchange_time_us: int
    receive_time_us: int


BAR_FIELDS: Final = BarRow.__struct_fields__
TRADE_FIELDS: Final = TradeRow.__struct_fields__
FIELDS: Final[dict[str, tuple[str, ...]]] = {"bars": BAR_FIELDS, "trades": TRADE_FIELDS}

# Aliases equal to a column's name would replace the column everywhere in the query, so computed fields are named by an outer SELECT.
SELECT: Final[dict[str, str]] = {
    "bars": ", ".join(f"CAST({name}, 'Bool') AS {name}" if name in ("is_final", "complete") else name for name in BAR_FIELDS),
    "trades": ", ".join("if(side > 0, 'buy', 'sell') AS side" if name == "side" else name for name in TRADE_FIELDS),
}
"""Outer SELECT lists that give exactly the fields above."""
COLUMNS: Final[dict[str, str]] = {topic: ", ".join(names) for topic, names in FIELDS.items()}
"""Inner SELECT lists: the columns those read."""
KEY: Final = {"bars": "open_time_us", "trades": "trade_id"}
"""What orders the rows of a series and names one."""
TIME: Final = {"bars": "open_time_us", "trades": "exchange_time_us"}
"""What ``[start, end)`` is about."""

_encoder = msgspec.json.Encoder()


def bar_row(values: Sequence[Any]) -> BarRow:
    """A bar from a frame's values in the order of ``BAR_FIELDS`` (``is_final`` and ``complete`` as 0/1)."""
    start, final, complete, rest = values[:14], values[14] != 0, values[15] != 0, values[16:]
    return BarRow(*start, final, complete, *rest)  # type: ignore[call-arg]  # the slices have all fields but those two


def trade_row(values: Sequence[Any]) -> TradeRow:
    """A trade from a frame's values in the order of ``TRADE_FIELDS`` (side as 1/-1)."""
    return TradeRow(values[0], values[1], values[2], SIDE_NAMES.get(values[3], "sell"), values[4], values[5])


def rows_json(rows: Sequence[BarRow | TradeRow | msgspec.Raw]) -> bytes:
    """The JSON array of rows; NaN becomes null. Rows read from ClickHouse stay as it wrote them."""
    return _encoder.encode(rows)


def row_json(row: BarRow | TradeRow) -> str:
    """The JSON object of one row."""
    return _encoder.encode(row).decode()
