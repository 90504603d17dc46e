"""Tick, volume, dollar and imbalance bars: bars that close by what was traded, not by the clock.

Comes in: trades of one partition (:class:`~processors.bars.TradeBatch`), or a DataFrame of trades. Goes out: closed bars.

* **tick**: closes after ``threshold`` trades. **volume**: after ``threshold`` base units. **dollar**: after ``threshold`` quote units.
* **imbalance** (Lopez de Prado, *Advances in Financial Machine Learning*, 2018, chapter 2.3.2): closes when the signed flow of the bar,
  ``|sum(b * v)|``, reaches ``E[trades a bar] * |E[b * v]|``. ``b`` is the taker's side, or the sign of the last price change (tick rule);
  ``v`` is 1, the size or the quote value. Both expectations are exponentially weighted means over closed bars (``span``). Left alone they
  run away or collapse, so they are bounded: expected trades stay within ``min_ticks .. max_ticks``, the expected imbalance is at least
  ``min_imbalance`` of the mean absolute flow, and no bar has fewer than ``min_ticks`` or more than ``max_ticks`` trades. The first bar of
  a symbol closes after ``initial_ticks`` trades and sets the first expectations.

A trade is never split: it belongs to the bar that it closes. With ``carry_over`` the part beyond the threshold (less than one threshold)
counts towards the next bar, so that bars have ``threshold`` on average; without, each bar starts from zero, as in the book.

Which trade closes a bar depends on the order of trades, so a closed bar is never revised: trades must come in order of their ids. An id
between the first and the last one taken is a duplicate and dropped; one below the first is refused as ``too_late``. The end of a source
closes nothing: the open bar goes on with the next one. State and input determine every byte; any batch sizes give the same bits.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from processors import _alternative_kernel as k
from processors.bars import TradeFrame, input_rows
from processors.errors import BarConfigError, SnapshotConfigError, SnapshotError
from schemas.errors import VocabularyError
from schemas.timeframes import MAX_TIME_US, MIN_TIME_US

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "AlternativeBarConfig",
    "AlternativeBarEngine",
    "AlternativeBatches",
    "build_dollar",
    "build_imbalance",
    "build_tick",
    "build_volume",
]

Kind = Literal["tick", "volume", "dollar", "tick_imbalance", "volume_imbalance", "dollar_imbalance"]
KINDS: Final[tuple[Kind, ...]] = ("tick", "volume", "dollar", "tick_imbalance", "volume_imbalance", "dollar_imbalance")
_INTS: Final = (
    "symbol_code",
    "bar_number",
    "open_time_us",
    "close_time_us",
    "first_trade_id",
    "last_trade_id",
    "trade_count",
    "last_receive_time_us",
)
_FLOATS: Final = ("open", "high", "low", "close", "volume", "quote_volume", "buy_volume", "vwap", "progress", "threshold")
_HEADER: Final = struct.Struct("<6sHII")
_MAGIC: Final = b"MSALT\x00"
_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AlternativeBarConfig:
    """Settings of one kind of bars; part of the state."""

    kind: Kind
    threshold: float = 0.0
    """Trades, base units or quote units of a bar; not used by imbalance bars."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Instrument key -> its own threshold (for imbalance bars: its own ``initial_ticks``)."""
    carry_over: bool = False
    """Whether what a bar has beyond its threshold counts towards the next one; not used by imbalance bars."""
    sign: Literal["side", "tick_rule"] = "side"
    """Imbalance bars: where the sign of a trade comes from. A trade of unknown side (0) takes that of the tick rule."""
    span: int = 20
    """Imbalance bars: bars over which expectations are weighted, alpha = 2 / (span + 1)."""
    initial_ticks: int = 100
    """Imbalance bars: trades of a symbol's first bar, and the first expectation."""
    min_ticks: int = 10
    """Imbalance bars: fewest trades of a bar."""
    max_ticks: int = 10_000
    """Imbalance bars: most trades of a bar."""
    min_imbalance: float = 0.05
    """Imbalance bars: the expected imbalance is at least this share of the mean absolute flow a trade."""
    max_symbols: int = 16_384
    """Symbols of one partition; trades of further ones are rejected."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise VocabularyError("kind of bars", self.kind, KINDS)
        if not self.is_imbalance:
            for name, value in (("threshold", self.threshold), *self.thresholds.items()):
                if not (0.0 < value < float("inf")) and not (name == "threshold" and self.thresholds):
                    raise BarConfigError(f"The threshold of {self.kind} bars ({name}) is {value}: it must be above 0 and finite.")
        if not 1 <= self.min_ticks <= self.initial_ticks <= self.max_ticks:
            raise BarConfigError(
                f"min_ticks {self.min_ticks}, initial_ticks {self.initial_ticks} and max_ticks {self.max_ticks} must be in this order, from 1 on."
            )
        if self.span < 1 or not 0.0 <= self.min_imbalance <= 1.0 or self.max_symbols < 1:
            raise BarConfigError("span and max_symbols must be at least 1, min_imbalance between 0 and 1.")

    @property
    def is_imbalance(self) -> bool:
        """Whether these are imbalance bars."""
        return self.kind.endswith("imbalance")

    def threshold_of(self, key: str) -> float:
        """Threshold (or initial trades) of a symbol; 0 where there is none."""
        return float(self.thresholds.get(key, self.initial_ticks if self.is_imbalance else self.threshold))


@dataclass(frozen=True, kw_only=True, slots=True)
class AlternativeBatches:
    """Bars that one batch of trades closed."""

    symbols: tuple[str, ...]
    """Instrument keys that ``symbol_code`` indexes: those of the input."""
    bars: dict[str, npt.NDArray[Any]]
    """symbol_code (int32), bar_number (int64, from 0 for each symbol), open_time_us and close_time_us (first and last trade), first_trade_id,
    last_trade_id, trade_count, last_receive_time_us (int64), open, high, low, close, volume, quote_volume, buy_volume, vwap, progress (what was
    reached) and threshold (float64)."""
    rejected: dict[str, npt.NDArray[Any]]
    """``row`` (int64) and ``reason`` (int8, see ``processors.bars.REJECT_REASONS``)."""
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
        out_i, out_f = np.empty((len(_INTS), count), np.int64), np.empty((len(_FLOATS), count), np.float64)
        rejected_row, rejected_reason = np.empty(count, np.int64), np.empty(count, np.int8)
        counts = np.zeros(k.COUNTS, np.int64)
        while k.step(self._par, self._ints, self._floats, rows, self._slots, out_i, out_f, rejected_row, rejected_reason, counts) != k.DONE:
            code = int(rows.code[counts[k.N_POS]])
            self._slots[code] = self._slot(frame.symbols[code])
        n, rejected = int(counts[k.N_ROWS]), int(counts[k.N_REJECTED])
        bars: dict[str, npt.NDArray[Any]] = dict(zip(_INTS, out_i[:, :n].copy(), strict=True))
        bars["symbol_code"] = bars["symbol_code"].astype(np.int32)
        bars.update(zip(_FLOATS, out_f[:, :n].copy(), strict=True))
        return AlternativeBatches(
            symbols=frame.symbols,
            bars=bars,
            rejected={"row": rejected_row[:rejected].copy(), "reason": rejected_reason[:rejected].copy()},
            accepted=int(counts[k.N_ACCEPTED]),
            duplicates=int(counts[k.N_DUPLICATES]),
        )

    def _map(self, symbols: tuple[str, ...]) -> npt.NDArray[np.int32]:
        """Slot of each code. Symbols without one get it at their first trade, those that can never have one are refused right here."""
        slots = np.fromiter(map(self._slot_of.get, symbols, repeat(k.UNMAPPED)), np.int32, len(symbols))
        for code in np.flatnonzero(slots < 0).tolist():
            if not self._has_room(symbols[code]):
                slots[code] = k.REFUSED
        return slots

    def _has_room(self, key: str) -> bool:
        return len(self._slot_of) < self.config.max_symbols and self.config.threshold_of(key) > 0.0

    def _slot(self, key: str) -> int:
        """Slot of a symbol, a new one if it has none: a key may stand twice in a dictionary."""
        slot = self._slot_of.get(key)
        if slot is not None:
            return slot
        if not self._has_room(key):
            return k.REFUSED
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
        head = json.dumps({"config": _config_id(self.config), "symbols": list(self._slot_of)}, sort_keys=True).encode()
        body = head + self._ints[:count].tobytes() + self._floats[:count].tobytes()
        return _HEADER.pack(_MAGIC, _VERSION, zlib.crc32(body), len(head)) + body

    @classmethod
    def restore(cls, config: AlternativeBarConfig, data: bytes) -> AlternativeBarEngine:
        """The engine that :meth:`snapshot` was taken of. Raises SnapshotError."""
        if len(data) < _HEADER.size:
            raise SnapshotError(f"A bar state of {len(data)} bytes is cut off.")
        magic, version, checksum, length = _HEADER.unpack_from(data)
        body = memoryview(data)[_HEADER.size :]
        if magic != _MAGIC or version != _VERSION or zlib.crc32(body) != checksum or length > len(body):
            raise SnapshotError(f"These {len(data)} bytes are no whole state of alternative bars of version {_VERSION}.")
        try:
            head = json.loads(bytes(body[:length]))
            symbols, of_config = list(map(str, head["symbols"])), head["config"]
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise SnapshotError("The head of this state cannot be read.") from exc
        if of_config != _config_id(config):
            raise SnapshotConfigError("This state was made with other settings: restore them, or start empty and replay the topic.")
        count = len(symbols)
        if count > config.max_symbols or len(set(symbols)) != count or len(body) - length != 8 * count * (k.STATE_INTS + k.STATE_FLOATS):
            raise SnapshotError("This state contradicts itself.")
        engine = cls(config)
        capacity = max(16, 1 << max(count - 1, 0).bit_length())
        engine._ints, engine._floats = np.zeros((capacity, k.STATE_INTS), np.int64), np.zeros((capacity, k.STATE_FLOATS))
        ints = np.frombuffer(body, np.int64, count * k.STATE_INTS, length).reshape(count, k.STATE_INTS)
        floats = np.frombuffer(body, np.float64, count * k.STATE_FLOATS, length + ints.nbytes).reshape(count, k.STATE_FLOATS)
        wanted = [config.threshold_of(key) for key in symbols]
        fine = np.isfinite(floats).all() and (ints[:, [k.NUMBER, k.COUNT]] >= 0).all() and min(wanted, default=1.0) > 0.0
        if not fine or not (config.is_imbalance or floats[:, k.THRESHOLD].tolist() == wanted):
            raise SnapshotError("This state contradicts itself.")
        engine._ints[:count], engine._floats[:count] = ints, floats
        engine._slot_of = {key: slot for slot, key in enumerate(symbols)}
        return engine


def _config_id(config: AlternativeBarConfig) -> str:
    return json.dumps(asdict(config), sort_keys=True)


def build_tick(trades: pl.DataFrame, ticks: int) -> pl.DataFrame:
    """Bars of ``ticks`` trades each, ordered by exchange, symbol and ``bar_number``. Unfinished bars are left out.

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
    """Bars of at least ``volume`` base units. Unfinished bars are left out."""
    return _build(trades, AlternativeBarConfig(kind="volume", threshold=volume, carry_over=carry_over))


def build_dollar(trades: pl.DataFrame, quote_volume: float, *, carry_over: bool = False) -> pl.DataFrame:
    """Bars of at least ``quote_volume`` quote units. Unfinished bars are left out."""
    return _build(trades, AlternativeBarConfig(kind="dollar", threshold=quote_volume, carry_over=carry_over))


def build_imbalance(
    trades: pl.DataFrame, kind: Literal["tick", "volume", "dollar"] = "tick", *, config: AlternativeBarConfig | None = None
) -> pl.DataFrame:
    """Imbalance bars of signed trades, base or quote units; ``config`` overrides the default settings. Unfinished bars are left out."""
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
