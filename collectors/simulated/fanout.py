"""Who gets which bytes: the trades, aggregates, quotes and candles of a step, as one write per connection.

Comes in: a block and the listeners of its market. Goes out: bytes handed to each listener's ``write``. A message is encoded once per form
(combined or raw) whoever wants it, and all messages of a step for one listener go out in one write: a frame a message, as the protocol
demands, but 1,000 frames a system call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Final, Protocol

import numpy as np

from collectors.simulated.blocks import BoolArray, IntArray, TradeBlock
from collectors.simulated.exchange import Venue
from collectors.simulated.history import INTERVAL_MS, Candles
from collectors.simulated.subscriptions import Selection, Subscriptions
from collectors.simulated.tickers import candles_of

KLINE_PUSH_MS: Final = 2_000
"""Open candles are pushed this often (Binance: every 2 s; one-second candles every second)."""


class Listener(Protocol):
    """A connection that messages are written to; ``combined``: whether messages name their stream."""

    combined: bool
    subscriptions: Subscriptions

    def write(self, data: bytes) -> None:
        """Send bytes; must not block and must not raise."""
        ...


class Fanout:
    """Publishes one market's steps to its listeners.

    Args:
        venue: the market.
    """

    def __init__(self, venue: Venue) -> None:
        self._venue = venue
        self._bid, self._ask = venue.market.quotes()
        self.sent_messages = 0

    def publish(self, block: TradeBlock, listeners: Sequence[Listener], *, skew_ms: int) -> None:
        """Send a step: trades, then aggregates, then changed quotes, then candles that are due.

        Args:
            block: the rows to show, faults applied.
            listeners: the market's connections.
            skew_ms: error of the exchange's clock.
        """
        if not listeners:
            return
        changed = self._changed_quotes()
        for combined in (True, False):
            audience = [listener for listener in listeners if listener.combined is combined]
            if audience:
                self._trades(block, audience, combined, skew_ms)
                self._aggregates(block, audience, combined, skew_ms)
                self._books(audience, combined, changed, block.end_ms, skew_ms)
                self._klines(audience, combined, block.end_ms, skew_ms)

    def _trades(self, block: TradeBlock, audience: list[Listener], combined: bool, skew_ms: int) -> None:
        wanted = _union([listener.subscriptions.trades for listener in audience])
        rows = _wanted_rows(block, wanted)
        if rows is not None:
            frames = self._venue.wire.trades(rows, combined=combined, skew_ms=skew_ms)
            self._deliver(frames, rows.code, [(listener, listener.subscriptions.trades) for listener in audience])

    def _aggregates(self, block: TradeBlock, audience: list[Listener], combined: bool, skew_ms: int) -> None:
        wanted = _union([listener.subscriptions.aggregates for listener in audience])
        rows = _wanted_rows(block, wanted)
        if rows is not None:
            codes, frames = self._venue.wire.aggregates(rows, combined=combined, skew_ms=skew_ms)
            self._deliver(frames, codes, [(listener, listener.subscriptions.aggregates) for listener in audience])

    def _changed_quotes(self) -> BoolArray:
        """Symbols whose best bid or ask is another than at the last step that had listeners."""
        bid, ask = self._venue.market.quotes()
        changed: BoolArray = (bid != self._bid) | (ask != self._ask)
        self._bid, self._ask = bid, ask
        return changed

    def _books(self, audience: list[Listener], combined: bool, changed: BoolArray, end_ms: int, skew_ms: int) -> None:
        wanted = _union([listener.subscriptions.books for listener in audience])
        if wanted is None:
            return
        codes = np.flatnonzero(changed & wanted)
        if len(codes):
            # Update ids grow with time: up to 1,000 symbols' updates fit between two milliseconds' ids.
            frames = self._venue.wire.book_tickers(
                codes.tolist(), self._bid, self._ask, update_id=end_ms * 1_000, event_ms=end_ms + skew_ms, combined=combined
            )
            self._deliver(frames, codes, [(listener, listener.subscriptions.books) for listener in audience])

    def _klines(self, audience: list[Listener], combined: bool, end_ms: int, skew_ms: int) -> None:
        step_ms = self._venue.market.config.step_ms
        if end_ms % 1_000 >= step_ms:
            return
        second_ms = end_ms - end_ms % 1_000
        cache: dict[tuple[int, str], bytes] = {}
        for listener in audience:
            parts = []
            for key in sorted(listener.subscriptions.klines):
                if key not in cache:
                    cache[key] = self._kline(*key, second_ms, skew_ms, combined)
                if cache[key]:
                    parts.append(cache[key])
            if parts:
                self.sent_messages += len(parts)
                listener.write(b"".join(parts))

    def _kline(self, code: int, interval: str, second_ms: int, skew_ms: int, combined: bool) -> bytes:
        """The message due at this second, empty where none is: the candle that just closed, else the open one every 2 s."""
        interval_ms = INTERVAL_MS[interval]
        closed = second_ms % interval_ms == 0
        if not closed and second_ms % KLINE_PUSH_MS:
            return b""
        candles = candles_of(self._venue, code, interval)
        open_ms = second_ms - interval_ms if closed else second_ms - second_ms % interval_ms
        last = int(candles.open_ms.searchsorted(open_ms, side="right"))
        if not last or int(candles.open_ms[last - 1]) != open_ms:
            return b""
        shown = Candles(*(getattr(candles, name)[:last] for name in Candles.__slots__))
        return self._venue.wire.kline(code, interval, interval_ms, shown, event_ms=second_ms + skew_ms, closed=closed, combined=combined)

    def _deliver(self, frames: list[bytes], codes: IntArray, audience: Iterable[tuple[Listener, Selection]]) -> None:
        """Write to each listener the frames whose symbol it selected; who wants all shares one joined buffer."""
        everything: bytes | None = None
        for listener, selection in audience:
            if not selection.count:
                continue
            chosen = selection.mask[codes]
            if chosen.all():
                if everything is None:
                    everything = b"".join(frames)
                data, count = everything, len(frames)
            else:
                data, count = b"".join(compress(frames, chosen.tolist())), int(np.count_nonzero(chosen))
            if data:
                self.sent_messages += count
                listener.write(data)


def _union(selections: list[Selection]) -> BoolArray | None:
    """Symbols anyone selected; None for nobody."""
    masks = [selection.mask for selection in selections if selection.count]
    if not masks:
        return None
    union: BoolArray = masks[0] if len(masks) == 1 else np.logical_or.reduce(masks)
    return union


def _wanted_rows(block: TradeBlock, wanted: BoolArray | None) -> TradeBlock | None:
    """The rows of wanted symbols, or None if there are none."""
    if wanted is None or not len(block):
        return None
    chosen = wanted[block.code]
    if chosen.all():
        return block
    rows = np.flatnonzero(chosen)
    return block.take(rows) if len(rows) else None
