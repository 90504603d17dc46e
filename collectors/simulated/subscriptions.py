"""What one WebSocket connection has subscribed to, and the control messages that change it. Pure: text in, text out.

Stream names nobody publishes (a misspelt symbol, ``@depth``) are accepted and stay silent, as Binance does.
"""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np

from collectors.simulated.blocks import BoolArray
from collectors.simulated.history import INTERVAL_MS
from collectors.simulated.wire import Wire

MAX_STREAMS: Final = 1_024
"""Streams one connection may listen to (Binance, spot and USD-M)."""


class TooManyStreamsError(Exception):
    """More than 1,024 streams on one connection: it is closed."""


class Selection:
    """Symbols of one kind of stream, as a mask over symbol codes."""

    __slots__ = ("count", "mask")

    def __init__(self, symbols: int) -> None:
        self.mask: BoolArray = np.zeros(symbols, dtype=np.bool_)
        self.count = 0

    def put(self, code: int, wanted: bool) -> None:
        """Select a symbol or not."""
        self.count += int(wanted) - int(self.mask[code])
        self.mask[code] = wanted


class Subscriptions:
    """The streams of one connection.

    Args:
        wire: the market's names.
        codes: symbol code by lower-case symbol.
    """

    def __init__(self, wire: Wire, codes: dict[str, int]) -> None:
        symbols = len(wire.universe)
        self._codes = codes
        self._names: dict[str, None] = {}
        self.trades = Selection(symbols)
        self.aggregates = Selection(symbols)
        self.books = Selection(symbols)
        self.klines: set[tuple[int, str]] = set()

    @property
    def names(self) -> list[str]:
        """All stream names, in the order they were asked for."""
        return list(self._names)

    def add(self, names: list[str]) -> None:
        """Subscribe.

        Raises:
            TooManyStreamsError: the connection would listen to more than 1,024; nothing was changed.
        """
        fresh = dict.fromkeys(name for name in names if name not in self._names)
        if len(self._names) + len(fresh) > MAX_STREAMS:
            raise TooManyStreamsError
        self._names |= fresh
        for name in fresh:
            self._put(name, True)

    def remove(self, names: list[str]) -> None:
        """Unsubscribe; names that are not subscribed are ignored."""
        for name in names:
            if name in self._names:
                del self._names[name]
                self._put(name, False)

    def _put(self, name: str, wanted: bool) -> None:
        symbol, _, kind = name.partition("@")
        code = self._codes.get(symbol)
        if code is None:
            return
        if kind == "trade":
            self.trades.put(code, wanted)
        elif kind == "aggTrade":
            self.aggregates.put(code, wanted)
        elif kind == "bookTicker":
            self.books.put(code, wanted)
        elif kind.startswith("kline_") and kind[6:] in INTERVAL_MS:
            entry = (code, kind[6:])
            if wanted:
                self.klines.add(entry)
            else:
                self.klines.discard(entry)

    def control(self, text: str) -> str:
        """Obey one control message and return the answer.

        Raises:
            TooManyStreamsError: as :meth:`add`.
        """
        try:
            message = json.loads(text)
        except (ValueError, RecursionError) as error:
            return _refuse(3, f"Invalid JSON: {error}", None)
        if not isinstance(message, dict):
            return _refuse(2, "Invalid request: property name must be a string", None)
        number = message.get("id")
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | str)):
            return _refuse(2, "Invalid request: request ID must be an unsigned integer", None)
        method = message.get("method")
        if method == "LIST_SUBSCRIPTIONS":
            return _reply(self.names, number)
        if method in ("SUBSCRIBE", "UNSUBSCRIBE"):
            params = message.get("params")
            if not isinstance(params, list) or not all(isinstance(name, str) for name in params):
                return _refuse(
                    2, "Invalid request: missing field `params`" if params is None else "Invalid request: invalid params", number
                )
            if not all("@" in name for name in params):
                return _refuse(2, "Invalid request: invalid stream", number)
            (self.add if method == "SUBSCRIBE" else self.remove)(params)
            return _reply(None, number)
        if method in ("SET_PROPERTY", "GET_PROPERTY"):
            return _reply(None if method == "SET_PROPERTY" else True, number)
        if method is None:
            return _refuse(2, "Invalid request: missing field `method`", number)
        known = "`SUBSCRIBE`, `UNSUBSCRIBE`, `LIST_SUBSCRIPTIONS`, `SET_PROPERTY`, `GET_PROPERTY`"
        return _refuse(2, f"Invalid request: unknown variant `{method}`, expected one of {known}", number)


def _reply(result: Any, number: int | str | None) -> str:
    return json.dumps({"result": result, "id": number}, separators=(",", ":"))


def _refuse(code: int, sentence: str, number: int | str | None) -> str:
    body: dict[str, Any] = {"error": {"code": code, "msg": sentence}}
    if number is not None:
        body["id"] = number
    return json.dumps(body, separators=(",", ":"))
