"""Rejected bytes parsed once more, the normal way: a venue's message through its mapper, a line through the layout of its file; trades out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from collectors.binance.feed import VENUES, stream_name, venue_of
from collectors.binance.mapper import BinanceMapper
from collectors.replay.capture import venue_symbols
from collectors.replay.detect import Reader
from collectors.replay.errors import ReplayError
from collectors.wire import Mapper
from schemas.symbols import Instrument

MAX_FUTURE_US: Final = 60_000_000
"""A trade further ahead than this is still not plausible (the collector's own bound is a minute)."""


class RefusedError(Exception):
    """Trying again is impossible; one sentence says why. Nothing was done."""


class StillBadError(Exception):
    """The bytes were parsed and are still wrong."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Trades of some instruments: columns of topic ``trades``, ``symbol_code`` indexes ``keys``."""

    keys: tuple[str, ...]
    columns: dict[str, np.ndarray[Any, Any]]

    @property
    def count(self) -> int:
        """Number of trades."""
        return len(self.columns["symbol_code"])


def rows_of_message(exchange: str, raw: bytes, symbols: Collection[str], receive_time_us: int, now_us: int) -> Rows:
    """Trades in a message of a venue.

    Args:
        exchange: whose message.
        raw: all of it.
        symbols: canonical symbols that rows may be of.
        receive_time_us: when it was received.
        now_us: a trade far beyond it is none.

    Raises:
        RefusedError: there is no mapper of that venue.
        StillBadError: it still gives no trade and should.
    """
    make = _MAPPERS.get(exchange)
    if make is None:
        raise RefusedError(f"There is no mapper of '{exchange}' here, so its message cannot be parsed again: drop the letter.")
    names = sorted(symbols)
    parsed = make(exchange, names).parse([raw])
    if parsed.rejected:
        raise StillBadError(parsed.rejected[0].reason, parsed.rejected[0].detail)
    times = parsed.columns["exchange_time_us"]
    if len(times) and int(times.max()) > now_us + MAX_FUTURE_US:
        raise StillBadError("implausible_time", "The trade's time lies more than a minute ahead of the clock.")
    columns = {**parsed.columns, "receive_time_us": np.full(len(times), receive_time_us, np.int64)}
    return Rows(keys=tuple(f"{exchange}:{name}" for name in names), columns=columns)


def rows_of_line(instrument: Instrument, place: str, raw: bytes) -> Rows:
    """Trades in a line of a replayed file, read by the layout of that file.

    Args:
        instrument: what was replayed.
        place: ``path:line`` as the replay wrote it.
        raw: the line.

    Raises:
        RefusedError: the file is not there or has no lines.
        StillBadError: the line is still no trade.
    """
    name, _, number = place.rpartition(":")
    path = Path(name)
    if not number.isdigit() or not path.is_file():
        raise RefusedError(f"'{name or place}' is not there any more, so the layout of its line is not known: replay a corrected file.")
    try:
        block = Reader(path, instrument).read_line(raw, int(number))
    except ReplayError as exc:
        raise RefusedError(str(exc)) from exc
    if block.rejected:
        raise StillBadError(block.rejected[0].reason, block.rejected[0].detail)
    count = len(block.columns["trade_id"])
    return Rows(keys=(instrument.key,), columns={**block.columns, "symbol_code": np.zeros(count, np.int32)})


def _binance(exchange: str, symbols: Sequence[str]) -> Mapper:
    venue = venue_of(exchange)
    mapper = BinanceMapper(venue.kind, has_execution_type=venue.has_execution_type)
    for code, symbol in enumerate(symbols):
        for spelled in venue_symbols(Instrument(exchange, symbol)):
            mapper.bind(stream_name(spelled, venue.kind), code)
    return mapper


_MAPPERS: Final[dict[str, Callable[[str, Sequence[str]], Mapper]]] = dict.fromkeys(VENUES, _binance)
