"""Tick, volume, dollar and imbalance bars: bars that close by what was traded, not by the clock.

Comes in: trades of one partition (:class:`~processors.bars.TradeBatch`), or a DataFrame of trades. Goes out: closed bars, and at the end of
a source its open ones.

* **tick**: closes after ``threshold`` trades. **volume**: after ``threshold`` base units. **dollar**: after ``threshold`` quote units.
* **imbalance** (Lopez de Prado, *Advances in Financial Machine Learning*, 2018, chapter 2.3.2): closes when the signed flow of the bar,
  ``|sum(b * v)|``, reaches ``E[trades a bar] * |E[b * v]|``. ``b`` is the taker's side, or the sign of the last price change (tick rule);
  ``v`` is 1, the size or the quote value. Both expectations are exponentially weighted means over closed bars (``span``). Left alone they
  run away or collapse, so they are bounded: expected trades stay within ``min_ticks .. max_ticks``, the expected imbalance is at least
  ``min_imbalance`` of the mean absolute flow, and no bar has fewer than ``min_ticks`` or more than ``max_ticks`` trades. The first bar of
  a symbol closes after ``initial_ticks`` trades and sets the first expectations.

A trade is never split: it belongs to the bar that it closes. With ``carry_over`` the part beyond the threshold (less than one threshold)
counts towards the next bar, so that bars have ``threshold`` on average; without, each bar starts from zero, as in the book.

Which trade closes a bar depends on the order of trades, so a closed bar is never revised: trades must come in order of their ids.

* **Duplicates** by trade id are dropped. **Late trades** are refused as ``too_late``, never dropped as duplicates: each symbol remembers its
  last 8 stretches of ids not taken, and an id from before those, which may be either, is refused too.
* **The end of a source** writes the open bars whose newest trade is of that source, with ``complete`` = 0. If the symbol goes on with the next
  id, so does the bar: it comes again under its ``bar_number`` when it closes, complete. If ids are missing in between it is not complete.
* **Imbalance** is on every bar, ``sum(b * v)`` with ``v`` in the unit of the kind: 1, base or quote units.

State and input determine every byte of output and snapshot; any batch sizes give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from processors import _alternative_kernel as k
from processors._alternative_state import KINDS, AlternativeBarConfig, Kind, pack, unpack
from processors.bars import REJECT_REASONS as TIME_BAR_REASONS
from processors.bars import TradeFrame, input_rows
from processors.errors import BarConfigError
from schemas.errors import VocabularyError
from schemas.frames import END_OF_SOURCE
from schemas.timeframes import MAX_TIME_US, MIN_TIME_US

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "REJECT_REASONS",
    "AlternativeBarConfig",
    "AlternativeBarEngine",
    "AlternativeBatches",
    "Kind",
    "build_dollar",
    "build_imbalance",
    "build_tick",
    "build_volume",
]

_INTS: Final = (
    "symbol_code",
    "bar_number",
    "open_time_us",
    "close_time_us",
    "first_trade_id",
    "last_trade_id",
    "trade_count",
    "last_receive_time_us",
    "complete",
)
_FLOATS: Final = ("open", "high", "low", "close", "volume", "quote_volume", "buy_volume", "vwap", "imbalance", "progress", "threshold")

REJECT_REASONS: Final[dict[int, tuple[str, str]]] = {
    **TIME_BAR_REASONS,
    k.R_TOO_LATE: ("too_late", "The trade came after one with a larger id, or its id lies where it is no longer known what was taken."),
    k.NO_THRESHOLD: ("no_threshold", "The settings give this symbol no threshold."),
}
"""Reason code -> (short name, one sentence)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlternativeBatches:
    """Bars that one batch of trades closed."""

    symbols: tuple[str, ...]
    """Instrument keys that ``symbol_code`` indexes: those of the input and, at the end of a source, further ones with an open bar."""
    bars: dict[str, npt.NDArray[Any]]
    """Closed bars in the order they closed, then at the end of a source its open ones. symbol_code (int32), bar_number (int64, from 0 for each
    symbol), open_time_us and close_time_us (first and last trade), first_trade_id, last_trade_id, trade_count, last_receive_time_us (int64),
    complete (int8; 0: still open, or ids are missing where a source ended), open, high, low, close, volume, quote_volume, buy_volume, vwap,
    imbalance (signed flow in the unit of the kind), progress (what was reached) and threshold (float64)."""
    rejected: dict[str, npt.NDArray[Any]]
    """``row`` (int64) and ``reason`` (int8, see ``REJECT_REASONS``)."""
    accepted: int
    duplicates: int


class AlternativeBarEngine:
    """Bars of one kind for all symbols of one partition. Not thread-safe."""

    def __init__(self, config: AlternativeBarConfig) -> None:
        self.config = config
        self._slot_of: dict[str, int] = {}
        self._symbols: tuple[str, ...] | None = None
        self._slots = np.zeros(0, np.int32)
        self._ints = np.zeros((16, k.STATE_INTS), np.int64)
        self._floats = np.zeros((16, k.STATE_FLOATS), np.float64)
        self._par = np.array(
            [
                KINDS.index(config.kind),
                config.carry_over,
                config.sign == "side",
                2.0 / (config.span + 1),
                config.min_ticks,
                config.max_ticks,
                config.min_imbalance,
                MIN_TIME_US,
                MAX_TIME_US,
            ],
            np.float64,
        )

    def process(self, frame: TradeFrame) -> AlternativeBatches:
        """Add a frame's trades and return the bars they close. Raises TradeInputError for columns that do not fit each other."""
        rows = input_rows(frame.columns)
        count = len(rows.code)
        if self._symbols is not frame.symbols:
            self._symbols, self._slots = frame.symbols, self._map(frame.symbols)
        ending = bool(frame.flags & END_OF_SOURCE)
        room = count + (len(self._slot_of) + len(frame.symbols) if ending else 0)
        out_i, out_f = np.empty((len(_INTS), room), np.int64), np.empty((len(_FLOATS), room), np.float64)
        rejected_row, rejected_reason = np.empty(count, np.int64), np.empty(count, np.int8)
        counts = np.zeros(k.COUNTS, np.int64)
        counts[k.N_SOURCE] = _source_id(frame.source)
        while k.step(self._par, self._ints, self._floats, rows, self._slots, out_i, out_f, rejected_row, rejected_reason, counts) != k.DONE:
            code = int(rows.code[counts[k.N_POS]])
            self._slots[code] = self._slot(frame.symbols[code])
        symbols = self._end(int(counts[k.N_SOURCE]), frame.symbols, out_i, out_f, counts) if ending else frame.symbols
        n, rejected = int(counts[k.N_ROWS]), int(counts[k.N_REJECTED])
        bars: dict[str, npt.NDArray[Any]] = dict(zip(_INTS, out_i[:, :n].copy(), strict=True))
        bars["symbol_code"] = bars["symbol_code"].astype(np.int32)
        bars["complete"] = bars["complete"].astype(np.int8)
        bars.update(zip(_FLOATS, out_f[:, :n].copy(), strict=True))
        return AlternativeBatches(
            symbols=symbols,
            bars=bars,
            rejected={"row": rejected_row[:rejected].copy(), "reason": rejected_reason[:rejected].copy()},
            accepted=int(counts[k.N_ACCEPTED]),
            duplicates=int(counts[k.N_DUPLICATES]),
        )

    def _end(
        self, source: int, symbols: tuple[str, ...], out_i: npt.NDArray[Any], out_f: npt.NDArray[Any], counts: npt.NDArray[Any]
    ) -> tuple[str, ...]:
        """Write the open bars whose newest trade is of this source, as incomplete rows; returns the keys that all rows' codes index."""
        used = self._ints[: len(self._slot_of)]
        of_source = used[:, k.SOURCE] == source
        slots = np.flatnonzero(of_source & (used[:, k.COUNT] > 0))
        used[of_source, k.SOURCE] = 0
        keys = list(self._slot_of)
        code_of = {key: code for code, key in enumerate(symbols)}
        further = tuple(keys[slot] for slot in slots.tolist() if keys[slot] not in code_of)
        code_of.update({key: code for code, key in enumerate(further, len(symbols))})
        codes = np.array([code_of[keys[slot]] for slot in slots.tolist()], np.int64)
        k.write_open(self._par, self._ints, self._floats, slots, codes, out_i, out_f, counts[k.N_ROWS])
        counts[k.N_ROWS] += len(slots)
        return symbols + further

    def _map(self, symbols: tuple[str, ...]) -> npt.NDArray[np.int32]:
        """Slot of each code. Symbols without one get it at their first trade, those that can never have one are refused right here."""
        slots = np.fromiter(map(self._slot_of.get, symbols, repeat(k.UNMAPPED)), np.int32, len(symbols))
        for code in np.flatnonzero(slots < 0).tolist():
            slots[code] = self._outlook(symbols[code])
        return slots

    def _outlook(self, key: str) -> int:
        """What stands for the slot of a symbol that has none."""
        if not self.config.threshold_of(key) > 0.0:
            return k.WITHOUT_THRESHOLD
        return k.UNMAPPED if len(self._slot_of) < self.config.max_symbols else k.NO_ROOM

    def _slot(self, key: str) -> int:
        """Slot of a symbol, a new one if it has none: a key may stand twice in a dictionary."""
        slot = self._slot_of.get(key)
        if slot is not None:
            return slot
        if len(self._slot_of) >= self.config.max_symbols:
            return k.NO_ROOM
        slot = len(self._slot_of)
        if slot == len(self._ints):
            self._ints = np.concatenate((self._ints, np.zeros_like(self._ints)))
            self._floats = np.concatenate((self._floats, np.zeros_like(self._floats)))
        self._slot_of[key] = slot
        self._ints[slot, k.LAST_SEEN] = -1
        self._ints[slot, k.SIGN] = 1
        column = k.E_TICKS if self.config.is_imbalance else k.THRESHOLD
        self._floats[slot, column] = self.config.threshold_of(key)
        return slot

    def snapshot(self) -> bytes:
        """The whole state; the same state gives the same bytes."""
        count = len(self._slot_of)
        return pack(self.config, list(self._slot_of), self._ints[:count], self._floats[:count])

    @classmethod
    def restore(cls, config: AlternativeBarConfig, data: bytes) -> AlternativeBarEngine:
        """The engine that :meth:`snapshot` was taken of.

        Raises SnapshotError for bytes that are damaged, of another version or contradict themselves, SnapshotConfigError for those made
        with other settings.
        """
        symbols, ints, floats = unpack(config, data)
        engine = cls(config)
        count = len(symbols)
        capacity = max(16, 1 << max(count - 1, 0).bit_length())
        engine._ints, engine._floats = np.zeros((capacity, k.STATE_INTS), np.int64), np.zeros((capacity, k.STATE_FLOATS))
        engine._ints[:count], engine._floats[:count] = ints, floats
        engine._slot_of = {key: slot for slot, key in enumerate(symbols)}
        return engine


def _source_id(name: str) -> int:
    """A number above 0 for the name of a source: the state keeps one a symbol, and no table of names that grows with every replay."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") >> 2 | 1


def build_tick(trades: pl.DataFrame, ticks: int) -> pl.DataFrame:
    """Bars of ``ticks`` trades each, ordered by exchange, symbol and ``bar_number``.

    The last, open bar of each symbol comes with ``complete`` = false, all others with true.

    Args:
        trades: as of :func:`processors.bars.build`, rows in any order. Rows that repeat a trade are dropped.
        ticks: trades of a bar.

    Raises:
        TradeInputError: as of :func:`processors.bars.build`; also where ids do not rise with exchange time within a symbol, or one id has
            two meanings: the message names the row and the id.
        BarConfigError: ``ticks`` is not above 0.
    """
    return _build(trades, AlternativeBarConfig(kind="tick", threshold=ticks))


def build_volume(trades: pl.DataFrame, volume: float, *, carry_over: bool = False) -> pl.DataFrame:
    """Bars of at least ``volume`` base units; otherwise as :func:`build_tick`."""
    return _build(trades, AlternativeBarConfig(kind="volume", threshold=volume, carry_over=carry_over))


def build_dollar(trades: pl.DataFrame, quote_volume: float, *, carry_over: bool = False) -> pl.DataFrame:
    """Bars of at least ``quote_volume`` quote units; otherwise as :func:`build_tick`."""
    return _build(trades, AlternativeBarConfig(kind="dollar", threshold=quote_volume, carry_over=carry_over))


def build_imbalance(
    trades: pl.DataFrame, kind: Literal["tick", "volume", "dollar"] = "tick", *, config: AlternativeBarConfig | None = None
) -> pl.DataFrame:
    """Imbalance bars of signed trades, base or quote units; ``config`` overrides the default settings. As :func:`build_tick`."""
    if config is None:
        named: dict[str, Kind] = {"tick": "tick_imbalance", "volume": "volume_imbalance", "dollar": "dollar_imbalance"}
        if kind not in named:
            raise VocabularyError("kind of imbalance", kind, named)
        config = AlternativeBarConfig(kind=named[kind])
    elif not config.is_imbalance:
        raise BarConfigError(f"The settings are of {config.kind} bars: imbalance bars need one of {', '.join(KINDS[3:])}.")
    return _build(trades, config)


def _build(trades: pl.DataFrame, config: AlternativeBarConfig) -> pl.DataFrame:
    from processors.alternative_batch import build  # not at the top: workers that stream never need polars

    return build(trades, config)
