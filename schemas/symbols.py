"""Exchanges and symbols: ``binance``, ``BTC-USDT``, and the instrument key ``binance:BTC-USDT`` that rows are keyed by."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from schemas.errors import SchemaError, VocabularyError

EXCHANGES: Final = ("binance", "binance-usdm", "binance-coinm", "coinbase", "kraken", "mexc", "yahoo")
"""Every venue by name; those without a collector yet can still be replayed."""

SIDE_BUY: Final = 1
SIDE_SELL: Final = -1
SIDE_NAMES: Final = {SIDE_BUY: "buy", SIDE_SELL: "sell"}
"""The taker's side as int8 in frames and as a word elsewhere."""

_SYMBOL: Final = re.compile(r"[A-Z0-9][A-Z0-9.]{0,19}(-[A-Z0-9]{1,20}){0,3}")


class Instrument(NamedTuple):
    """One market of one exchange."""

    exchange: str
    symbol: str

    @property
    def key(self) -> str:
        """``exchange:symbol``, the Kafka key and the entry of a frame's ``symbols``."""
        return f"{self.exchange}:{self.symbol}"


def check_exchange(name: str) -> str:
    """``name`` itself when it is a known exchange. Raises VocabularyError with the nearest known one."""
    if name not in EXCHANGES:
        raise VocabularyError("exchange", name, EXCHANGES)
    return name


def check_symbol(symbol: str) -> str:
    """``symbol`` itself when it is canonical (``BTC-USDT``, ``BTC-USDT-PERP``, ``AAPL``). Raises SchemaError otherwise."""
    if _SYMBOL.fullmatch(symbol):
        return symbol
    upper = symbol.upper().replace("/", "-").replace("_", "-")
    hint = f": did you mean '{upper}'?" if _SYMBOL.fullmatch(upper) else "."
    raise SchemaError(f"'{symbol}' is not a canonical symbol (BTC-USDT, BTC-USDT-PERP, AAPL){hint}")


def parse_key(key: str) -> Instrument:
    """The instrument of ``exchange:symbol``. Raises SchemaError when there is no colon."""
    exchange, colon, symbol = key.partition(":")
    if not colon or not exchange or not symbol:
        raise SchemaError(f"'{key}' is not an instrument key; it reads exchange:symbol, as in binance:BTC-USDT.")
    return Instrument(exchange, symbol)
