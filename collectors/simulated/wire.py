"""How the market reads on the wire: trades, aggregates, quotes and candles as Binance's JSON, WebSocket frames around them.

Comes in: columns of :mod:`collectors.simulated.market` and ``history``. Goes out: bytes. Pure; field names, their order and the number of
decimals are those of the recorded frames (spot pads prices and sizes to eight decimals, USD-M uses the symbol's own precision).

Every message of a symbol differs from the next in eight numbers only, so each symbol has a template and a message is one ``%`` of a tuple:
0.6 us for a frame of 170 bytes, against 2.6 us for building a dict and ``msgspec.json.encode``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from collectors.simulated.blocks import BoolArray, IntArray, TradeBlock
from collectors.simulated.history import Candles, Trades
from collectors.simulated.universe import Universe

JSON_BOOL: Final = (b"false", b"true")

TEXT: Final = 0x81
"""First byte of an unfragmented text frame."""


def frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """One unmasked WebSocket frame, as a server sends it."""
    size = len(payload)
    if size < 126:
        return bytes((opcode, size)) + payload
    if size < 65_536:
        return struct.pack("!BBH", opcode, 126, size) + payload
    return struct.pack("!BBQ", opcode, 127, size) + payload


_HEADERS: Final = tuple(frame(b"x" * size)[:-size] if size else frame(b"") for size in range(1_024))
"""Header of a text frame by payload length; market messages are 110 to 420 bytes."""


def decimal(value: int, decimals: int, places: int) -> str:
    """``value * 10**-decimals`` with ``places`` digits after the point, exactly."""
    whole, part = divmod(value, 10**decimals)
    digits = f"{part:0{decimals}d}" if decimals else ""
    padded = digits.ljust(places, "0")
    return f"{whole}.{padded}" if padded else str(whole)


def product(value: int, decimals: int, places: int) -> str:
    """As :func:`decimal`, truncated where there are more digits than places (sums of price x size)."""
    if decimals > places:
        value //= 10 ** (decimals - places)
        decimals = places
    return decimal(value, decimals, places)


class Wire:
    """Encoders for one market's symbols.

    Args:
        universe: what is listed.
    """

    def __init__(self, universe: Universe) -> None:
        self.universe = universe
        self.spot = universe.kind == "spot"
        self._price_divisor: IntArray = 10**universe.price_decimals
        self._size_divisor: IntArray = 10**universe.size_decimals
        self.lower = tuple(symbol.lower() for symbol in universe.symbols)
        self.price_places = [8 if self.spot else int(places) for places in universe.price_decimals]
        self.size_places = [8 if self.spot else int(places) for places in universe.size_decimals]
        self._trade = self._templates("trade")
        self._aggregate = self._templates("aggTrade")

    # Numbers as text.

    def price(self, code: int, units: int) -> str:
        """A price of a symbol."""
        return decimal(units, int(self.universe.price_decimals[code]), self.price_places[code])

    def size(self, code: int, lots: int) -> str:
        """A size of a symbol."""
        return decimal(lots, int(self.universe.size_decimals[code]), self.size_places[code])

    def quote(self, code: int, value: int) -> str:
        """A sum of price units x lots of a symbol, in quote units."""
        decimals = int(self.universe.price_decimals[code] + self.universe.size_decimals[code])
        return product(value, decimals, 8 if self.spot else min(decimals, 8))

    # WebSocket messages.

    def trades(self, block: TradeBlock, *, combined: bool, skew_ms: int = 0) -> list[bytes]:
        """One text frame per row, in row order: ``<symbol>@trade``.

        Args:
            block: rows to send; ``end_ms`` becomes the event time ``E``.
            combined: wrapped as ``{"stream": ..., "data": ...}``; bare otherwise.
            skew_ms: how wrong the exchange's clock is.
        """
        return self._frames(self._trade[combined], block, (block.trade_id,), skew_ms)

    def aggregates(self, block: TradeBlock, *, combined: bool, skew_ms: int = 0) -> tuple[IntArray, list[bytes]]:
        """One text frame per aggregate trade whose rows are in ``block``, and the symbol code of each: ``<symbol>@aggTrade``."""
        if not len(block):
            return block.code, []
        order = np.lexsort((block.agg_id, block.code))
        code, agg_id = block.code[order], block.agg_id[order]
        start = np.flatnonzero(np.append(True, (agg_id[1:] != agg_id[:-1]) | (code[1:] != code[:-1])))
        last = np.append(start[1:], len(order)) - 1
        sizes = np.add.reduceat(block.size[order], start)
        in_time = np.argsort(order[start], kind="stable")
        rows = block.take(order[start[in_time]])
        rows.size = sizes[in_time]
        last_id = block.trade_id[order[last[in_time]]]
        return rows.code, self._frames(self._aggregate[combined], rows, (rows.agg_id, rows.trade_id, last_id), skew_ms)

    def _frames(self, templates: list[bytes], rows: TradeBlock, ids: tuple[IntArray, ...], skew_ms: int) -> list[bytes]:
        codes = rows.code
        whole, part = np.divmod(rows.price, self._price_divisor[codes])
        lots, lot_part = np.divmod(rows.size, self._size_divisor[codes])
        time_ms = (rows.time_ms + skew_ms).tolist()
        event_ms = [rows.end_ms + skew_ms] * len(codes)
        maker = [JSON_BOOL[flag] for flag in rows.buyer_is_maker.tolist()]
        number = (whole.tolist(), part.tolist(), lots.tolist(), lot_part.tolist())
        id_lists = [column.tolist() for column in ids]
        columns: tuple[list[Any], ...]
        if len(ids) == 3:
            columns = (event_ms, id_lists[0], *number, id_lists[1], id_lists[2], time_ms, maker)
        elif self.spot:
            columns = (event_ms, id_lists[0], *number, time_ms, maker)
        else:
            columns = (event_ms, time_ms, id_lists[0], *number, maker)
        headers = _HEADERS
        messages = [templates[code] % values for code, values in zip(codes.tolist(), zip(*columns, strict=True), strict=True)]
        return [headers[len(message)] + message for message in messages]

    def book_tickers(self, codes: list[int], bid: IntArray, ask: IntArray, *, update_id: int, event_ms: int, combined: bool) -> list[bytes]:
        """One text frame per symbol in ``codes``: ``<symbol>@bookTicker``. ``bid``, ``ask``: price units of all symbols."""
        frames = []
        for position, code in enumerate(codes):
            best_bid, best_ask = int(bid[code]), int(ask[code])
            body = (
                f'"u":{update_id + position},"s":"{self.universe.symbols[code]}","b":"{self.price(code, best_bid)}",'
                f'"B":"{self.size(code, self.depth_lots(code, best_bid))}","a":"{self.price(code, best_ask)}",'
                f'"A":"{self.size(code, self.depth_lots(code, best_ask))}"'
            )
            if not self.spot:
                body = f'"e":"bookTicker",{body},"T":{event_ms},"E":{event_ms}'
            frames.append(self._wrap(f"{self.lower[code]}@bookTicker", "{" + body + "}", combined))
        return frames

    def kline(self, code: int, interval: str, interval_ms: int, candles: Candles, *, event_ms: int, closed: bool, combined: bool) -> bytes:
        """The text frame of the last of ``candles``: ``<symbol>@kline_<interval>``."""
        open_ms = int(candles.open_ms[-1])
        body = (
            f'{{"e":"kline","E":{event_ms},"s":"{self.universe.symbols[code]}","k":{{"t":{open_ms},"T":{open_ms + interval_ms - 1},'
            f'"s":"{self.universe.symbols[code]}","i":"{interval}","f":{int(candles.first_id[-1])},"L":{int(candles.last_id[-1])},'
            f'"o":"{self.price(code, int(candles.open[-1]))}","c":"{self.price(code, int(candles.close[-1]))}",'
            f'"h":"{self.price(code, int(candles.high[-1]))}","l":"{self.price(code, int(candles.low[-1]))}",'
            f'"v":"{self.size(code, int(candles.volume[-1]))}","n":{int(candles.count[-1])},"x":{"true" if closed else "false"},'
            f'"q":"{self.quote(code, int(candles.quote[-1]))}","V":"{self.size(code, int(candles.buy_volume[-1]))}",'
            f'"Q":"{self.quote(code, int(candles.buy_quote[-1]))}","B":"0"}}}}'
        )
        return self._wrap(f"{self.lower[code]}@kline_{interval}", body, combined)

    @staticmethod
    def _wrap(stream: str, body: str, combined: bool) -> bytes:
        text = f'{{"stream":"{stream}","data":{body}}}' if combined else body
        return frame(text.encode())

    # REST rows, as JSON text.

    def rest_trades(self, code: int, trades: Trades, *, skew_ms: int = 0) -> str:
        """The body of ``trades`` and ``historicalTrades``."""
        best_match = ',"isBestMatch":true' if self.spot else ""
        rows = zip(*(column.tolist() for column in trades.columns()), strict=True)
        return _array(
            f'{{"id":{trade_id},"price":"{self.price(code, price)}","qty":"{self.size(code, size)}",'
            f'"quoteQty":"{self._trade_quote(code, price * size)}","time":{time_ms + skew_ms},'
            f'"isBuyerMaker":{"true" if maker else "false"}{best_match}}}'
            for trade_id, price, size, time_ms, maker, _ in rows
        )

    def _trade_quote(self, code: int, value: int) -> str:
        # Recorded USD-M replies cut quoteQty to the price's precision ("60.22"), spot keeps eight decimals.
        decimals = int(self.universe.price_decimals[code] + self.universe.size_decimals[code])
        return product(value, decimals, 8 if self.spot else self.price_places[code])

    def rest_aggregates(self, code: int, trades: Trades, *, skew_ms: int = 0) -> str:
        """The body of ``aggTrades``; ``trades`` must hold whole aggregates."""
        best_match = ',"M":true' if self.spot else ""
        if not len(trades):
            return "[]"
        start = aggregate_starts(trades)
        last = np.append(start[1:], len(trades)) - 1
        sizes = np.add.reduceat(trades.size, start).tolist()
        rows = zip(
            trades.agg_id[start].tolist(),
            trades.price[start].tolist(),
            sizes,
            trades.trade_id[start].tolist(),
            trades.trade_id[last].tolist(),
            trades.time_ms[start].tolist(),
            trades.buyer_is_maker[start].tolist(),
            strict=True,
        )
        return _array(
            f'{{"a":{agg_id},"p":"{self.price(code, price)}","q":"{self.size(code, size)}","f":{first},"l":{final},'
            f'"T":{time_ms + skew_ms},"m":{"true" if maker else "false"}{best_match}}}'
            for agg_id, price, size, first, final, time_ms, maker in rows
        )

    def rest_klines(self, code: int, candles: Candles, interval_ms: int) -> str:
        """The body of ``klines``."""
        columns = (
            candles.open_ms, candles.open, candles.high, candles.low, candles.close, candles.volume, candles.quote, candles.count,
            candles.buy_volume, candles.buy_quote,
        )  # fmt: skip
        return _array(
            f'[{open_ms},"{self.price(code, first)}","{self.price(code, high)}","{self.price(code, low)}","{self.price(code, close)}",'
            f'"{self.size(code, volume)}",{open_ms + interval_ms - 1},"{self.quote(code, quote)}",{count},'
            f'"{self.size(code, buy_volume)}","{self.quote(code, buy_quote)}","0"]'
            for open_ms, first, high, low, close, volume, quote, count, buy_volume, buy_quote in zip(
                *(column.tolist() for column in columns), strict=True
            )
        )

    def depth_lots(self, code: int, price: int) -> int:
        """Lots resting at a price: a fixed scramble of the price, so that a book needs no state and no randomness."""
        scale = max(1, round(2_000.0 / float(self.universe.price0[code]) * 10.0 ** int(self.universe.size_decimals[code])))
        return 1 + (price * 2_654_435_761 % 4_093) * scale // 1_000

    def _templates(self, kind: str) -> tuple[list[bytes], list[bytes]]:
        """``%`` templates by symbol code: bare ones, then those wrapped for combined streams."""
        bare, wrapped = [], []
        for code, symbol in enumerate(self.universe.symbols):
            number = (
                f'"p":"{_number_template(int(self.universe.price_decimals[code]), self.price_places[code])}",'
                f'"q":"{_number_template(int(self.universe.size_decimals[code]), self.size_places[code])}"'
            )
            best_match = ',"M":true' if self.spot else ""
            if kind == "aggTrade":
                body = f'"e":"aggTrade","E":%d,"a":%d,"s":"{symbol}",{number},"f":%d,"l":%d,"T":%d,"m":%b{best_match}'
                if self.spot:
                    body = f'"e":"aggTrade","E":%d,"s":"{symbol}","a":%d,{number},"f":%d,"l":%d,"T":%d,"m":%b{best_match}'
            elif self.spot:
                body = f'"e":"trade","E":%d,"s":"{symbol}","t":%d,{number},"T":%d,"m":%b,"M":true'
            else:
                body = f'"e":"trade","E":%d,"T":%d,"s":"{symbol}","t":%d,{number},"X":"MARKET","m":%b'
            bare.append(f"{{{body}}}".encode())
            wrapped.append(f'{{"stream":"{self.lower[code]}@{kind}","data":{{{body}}}}}'.encode())
        return bare, wrapped


def aggregate_starts(trades: Trades) -> IntArray:
    """Where each aggregate begins in ``trades`` (at least one)."""
    changed: BoolArray = np.append(True, trades.agg_id[1:] != trades.agg_id[:-1])
    return np.flatnonzero(changed)


def _number_template(decimals: int, places: int) -> str:
    """A template that takes (whole, part) of a number with ``decimals`` digits and shows ``places``."""
    if decimals:
        return f"%d.%0{decimals}d" + "0" * (places - decimals)
    # No digits of its own: spot shows .00000000 (the part is 0 and gives the first), USD-M nothing (a precision of 0 swallows the part).
    return "%d.%d" + "0" * (places - 1) if places else "%d%.0a"


def _array(rows: Iterable[str]) -> str:
    return "[" + ",".join(rows) + "]"
