"""Time bars: trades in, bars of all timeframes out, incremental, exact, and the same bits however the trades are cut into batches.

Comes in: :class:`TradeBatch` (or any object with its attributes, such as ``schemas.frames.Frame``): trades of one Kafka partition.
Goes out: :class:`BarBatches`: final, revised and live bars, and the rows that were refused.

What holds:

* **Sums** are kept as error-free pairs and rounded once: as long as a sum is below 2**50 times its smallest addend a row holds the correctly
  rounded exact sum, the same in any order of arrival, any batch sizes and with any choice of timeframes.
* **Open and close** are the trades that are first and last by (exchange time, id), whatever order they arrived in.
* **Closing.** A bar ``[open, close)`` is published as final when the largest watermark among the sources of its symbol reaches its end.
  Trades may be ahead of the watermark by ``revision window + 16`` bars of the smallest timeframe; of a symbol further ahead the oldest bars
  are published early (in order, so only the certainty that nothing late follows is missing).
* **Flat bars** fill intervals without trades: the previous close in all prices and vwap, 0 in all sums, ids -1, no receive time (0). After
  ``max_flat_bars`` in a row they stop until the symbol trades again; the bar that ends such a silence is not complete.
* **Duplicates** by trade id are dropped. Ids are kept as intervals, exactly, for any number of ids and any age, as long as a symbol has no
  more than ``id_intervals`` separate stretches of ids. Beyond that the lowest quarter of the holes is forgotten; a trade whose id lies
  there may be either, so it is refused as too late, not dropped in silence. Bars are right either way.
* **Late trades** not older than the revision window (measured from the newest closed bar of the smallest timeframe) revise every closed bar
  they touch, and the flat bars after it: one row a bar and frame with ``revision`` + 1. Older ones are refused as ``too_late``.
* **Older stretches.** A source new to a symbol whose trades lie in a hole of its ids and in a time without its trades (yesterday's file after
  today's) fills that hole in bars of its own, until it ends. Bars at the hole's edges get its trades while they are still held; of edge bars
  no longer held the earlier, incomplete row stands. An older stretch that has ended and shares no bar with its neighbours is *parked* (the
  newest two of a symbol): a source that goes on with its next id (the next day's file) goes on with its open bars. One that ends in a bar
  of the largest timeframe that newer trades lie in too is not parked.
* **End of a source.** Everything before the open bar is final; the open bar is published as final, not complete. If the symbol goes on with
  the next id, the bar goes on too and is complete when it closes; if ids are missing, bars that touch the gap are not complete.
* **Complete** means covered from open to close: by the source's watermark before the symbol's first trade, or by that trade; and no gap.

No clock, no randomness, no I/O: state and input determine every byte of the output and of the snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from processors import _bars_kernel as k
from processors._bars_state import BarConfig, capacity_for, grow, init_slot, make_state, pack, unpack
from processors.errors import SnapshotError, TradeInputError
from schemas.frames import END_OF_SOURCE
from schemas.timeframes import MAX_TIME_US

if TYPE_CHECKING:
    import polars as pl

__all__ = ["REJECT_REASONS", "BarBatches", "BarConfig", "BarEngine", "TradeBatch", "build"]

Array = npt.NDArray[Any]

TRADE_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "symbol_code": np.dtype("<i4"),
    "trade_id": np.dtype("<i8"),
    "price": np.dtype("<f8"),
    "size": np.dtype("<f8"),
    "side": np.dtype("i1"),
    "exchange_time_us": np.dtype("<i8"),
    "receive_time_us": np.dtype("<i8"),
}
"""Columns of a trades frame."""

REJECT_REASONS: Final[dict[int, tuple[str, str]]] = {
    k.R_BAD_SYMBOL: ("bad_symbol_code", "The row's symbol code is not in its frame's dictionary."),
    k.R_NOT_FINITE: ("not_finite", "Price or size is not a finite number."),
    k.R_PRICE: ("bad_price", "The price is zero, negative or 1e18 and more."),
    k.R_SIZE: ("bad_size", "The size is negative or 1e18 and more."),
    k.R_TIME: ("time_out_of_range", "A time is before 2009, after 2100 or further ahead than max_future_us allows."),
    k.R_ID: ("bad_trade_id", "The trade id is negative or above 2**62."),
    k.R_TOO_LATE: ("too_late", "The trade is older than the revision window allows, or its id lies where holes were forgotten."),
    k.R_FULL: ("too_many_symbols", "The partition already holds max_symbols symbols."),
}
"""Reason code -> (short name, one sentence)."""

_BAR_I8: Final = ("open_time_us", "close_time_us", "trade_count", "first_trade_id", "last_trade_id", "last_receive_time_us")
_BAR_I4: Final = ("symbol_code", "timeframe_s", "revision")
_BAR_I1: Final = ("is_final", "complete")
_BAR_F8: Final = ("open", "high", "low", "close", "volume", "quote_volume", "buy_volume", "vwap")
BAR_COLUMNS: Final = (
    "symbol_code",
    "timeframe_s",
    "open_time_us",
    "close_time_us",
    "open",
    "high",
    "low",
    "close",
    "volume",
    "quote_volume",
    "buy_volume",
    "trade_count",
    "vwap",
    "first_trade_id",
    "last_trade_id",
    "revision",
    "is_final",
    "complete",
    "last_receive_time_us",
)
"""Columns of a bars frame, in order."""

_NO_BARS: Final[dict[str, Array]] = {
    name: np.zeros(0, np.int64 if name in _BAR_I8 else np.int32 if name in _BAR_I4 else np.int8 if name in _BAR_I1 else np.float64)
    for name in BAR_COLUMNS
}
_NO_REJECTED: Final[dict[str, Array]] = {"row": np.zeros(0, np.int64), "reason": np.zeros(0, np.int8)}
_MIN_OUT_ROWS: Final = 4096
_PAD_ROWS: Final = 72
"""Keeps the columns of a buffer from lying a power of two apart, where all 19 would fall into the same few sets of the cache."""
_KEEP_OUT_ROWS: Final = 262_144
"""Output buffers above this (34 MB) are given back after the call that needed them."""
_NO_SLOTS: Final = np.zeros(0, np.int32)
_PARKED_LANES: Final = 2
"""Ended older stretches of a symbol that can go on: two, so that two replays of consecutive files may run side by side."""


class TradeFrame(Protocol):
    """What :meth:`BarEngine.process` reads of a frame of trades."""

    @property
    def source(self) -> str: ...  # noqa: D102
    @property
    def watermark_us(self) -> int: ...  # noqa: D102
    @property
    def symbols(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def columns(self) -> Mapping[str, Array]: ...  # noqa: D102
    @property
    def flags(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True, slots=True)
class TradeBatch:
    """Trades of one source and one partition."""

    source: str
    """Who made the rows; watermarks are per source."""
    watermark_us: int
    """No row of this source older than this will follow."""
    symbols: tuple[str, ...] = ()
    """Instrument keys that ``symbol_code`` indexes. Passing the same tuple object again saves looking its keys up."""
    columns: Mapping[str, Array] = field(default_factory=dict)
    """See ``TRADE_DTYPES``; all of one length. Empty: a heartbeat."""
    flags: int = 0
    """Bits: END_OF_SOURCE."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BarBatches:
    """What one batch of trades caused."""

    symbols: tuple[str, ...]
    """Instrument keys that ``bars["symbol_code"]`` indexes."""
    bars: dict[str, Array]
    """Columns ``BAR_COLUMNS``: what late trades changed, then bars closed, then live rows; the order follows from state and input."""
    rejected: dict[str, Array]
    """``row`` (int64, index into the input) and ``reason`` (int8, see ``REJECT_REASONS``)."""
    watermark_us: int
    """The largest watermark of any source so far."""
    accepted: int
    """Rows that went into bars."""
    duplicates: int
    """Rows dropped because their trade had been seen."""
    late: int
    """Accepted rows that came after their bar had been published."""


class _Source:
    """A source of trades: its watermark and the slots it feeds."""

    __slots__ = ("clock_us", "code_map", "first_clock_us", "frame_number", "members", "newcomers", "skew_us", "slot_of", "slots", "symbols")

    def __init__(self) -> None:
        self.clock_us = 0
        self.first_clock_us = 0
        # receive clock minus watermark when it last brought rows; None before
        self.skew_us: int | None = None
        self.frame_number = 0
        self.slot_of: dict[str, int] = {}
        self.members: list[int] = []
        self.slots: npt.NDArray[np.int32] | None = None
        # the dictionary of the last frame, by identity, and what it maps to
        self.symbols: tuple[str, ...] | None = None
        self.code_map: npt.NDArray[np.int32] = _NO_SLOTS
        self.newcomers: list[int] = []

    def member_slots(self) -> npt.NDArray[np.int32]:
        """Slots as an array, in the order they joined."""
        if self.slots is None:
            self.slots = np.array(self.members, np.int32)
        return self.slots

    def join(self, slot: int) -> None:
        """Add a slot."""
        self.members.append(slot)
        self.slots = None


class BarEngine:
    """Bars of all symbols of ONE partition.

    Not thread-safe. The compiled part releases the GIL, so engines of several partitions run side by side in threads.
    """

    def __init__(self, config: BarConfig) -> None:
        self.config = config
        self._base_us = config.timeframe_us[0]
        self._state = make_state(config, capacity_for(config, 0))
        self._names: list[str] = []
        self._main: dict[str, int] = {}
        self._free: list[int] = []
        # ended lanes whose open bars can go on and the time of their last trade, in the order they ended
        self._parked: dict[int, int] = {}
        self._parked_of: dict[int, list[int]] = {}
        self._sources: dict[str, _Source] = {}
        self._watermark_us = 0
        self._frames = 0
        self._ctl = np.zeros(k.CONTROLS, np.int64)
        self._make_scratch(_MIN_OUT_ROWS)
        self._fresh: list[int] = []

    @property
    def symbol_count(self) -> int:
        """Symbols known."""
        return len(self._main)

    @property
    def watermark_us(self) -> int:
        """The largest watermark of any source so far."""
        return self._watermark_us

    # --- one frame --------------------------------------------------------------------------------------------------------------------

    def process(self, frame: TradeFrame) -> BarBatches:
        """Add a frame's trades, advance its source's watermark, and return the bars that follow.

        Bad rows are in ``rejected``; a frame whose columns do not fit each other raises TradeInputError and changes nothing.
        """
        rows = input_rows(frame.columns)
        self._frames += 1
        source, known = self._source(frame.source)
        source.frame_number = self._frames
        count = len(rows.code)
        ctl = self._ctl
        before_us = source.clock_us
        watermark_us = max(before_us, self._usable_watermark(frame.watermark_us, rows))
        if not count and source.skew_us is not None:
            ctl[k.C_CLOCK] = max(int(ctl[k.C_CLOCK]), watermark_us + source.skew_us)
        ending = bool(frame.flags & END_OF_SOURCE)
        if ending:
            del self._sources[frame.source]
        source.clock_us = watermark_us
        if not source.first_clock_us:
            source.first_clock_us = watermark_us
        self._begin(watermark_us)
        self._fresh = []
        code_map = self._map_codes(source, frame.symbols)
        crossed = watermark_us // self._base_us > before_us // self._base_us
        self._run(source, rows, frame.symbols, code_map, crossed, ending, before_us if known else 0)
        if count:
            source.skew_us = int(ctl[k.C_CLOCK]) - watermark_us if watermark_us and ctl[k.C_CLOCK] else None
            for code in source.newcomers:
                source.slot_of[frame.symbols[code]] = int(code_map[code])
        self._watermark_us = max(self._watermark_us, watermark_us)
        return self._collect()

    def _begin(self, watermark_us: int) -> None:
        ctl = self._ctl
        clock, wheel_at = ctl[k.C_CLOCK], ctl[k.C_WHEEL_AT]
        ctl[:] = 0
        ctl[k.C_CLOCK], ctl[k.C_WHEEL_AT] = clock, wheel_at
        ctl[k.C_WATERMARK] = watermark_us
        ctl[k.C_MAX_T] = min(MAX_TIME_US - 1, watermark_us + self.config.max_future_us) if watermark_us else MAX_TIME_US - 1
        ctl[k.C_FLAT_BUDGET] = self.config.max_flat_rows_per_frame

    def _usable_watermark(self, watermark_us: int, rows: k.Rows) -> int:
        """The frame's watermark, or 0 where it is no time or lies far ahead of everything received."""
        watermark_us = int(watermark_us)
        if not 0 < watermark_us < MAX_TIME_US:
            return 0
        clock = int(self._ctl[k.C_CLOCK])
        if watermark_us > clock + self.config.max_future_us:
            received = rows.receive[rows.receive < MAX_TIME_US]
            clock = max(clock, int(received.max(initial=0)))
            if clock and watermark_us > clock + self.config.max_future_us:
                return 0
        return watermark_us

    def _run(
        self,
        source: _Source,
        rows: k.Rows,
        symbols: tuple[str, ...],
        code_map: npt.NDArray[np.int32],
        crossed: bool,
        ending: bool,
        covered_from_us: int,
    ) -> None:
        """Run the kernel to the end of the frame, giving it the slots, lanes and buffers it asks for."""
        ctl = self._ctl
        self._room_for_rejects(len(rows.code))
        members = source.member_slots() if crossed else _NO_SLOTS
        ended = _NO_SLOTS
        if ending:
            ended = self._release(source)
        while True:
            status = k.step(self._state, self._out, rows, code_map, members, ended, ctl)
            if status == k.DONE:
                break
            if status == k.NEED_OUT:
                self._more_out(int(ctl[k.C_OUT] + ctl[k.C_NEED]))
                continue
            code = int(rows.code[ctl[k.C_POS]])
            if status == k.NEED_SLOT:
                self._assign_slot(source, symbols[code], code, code_map, covered_from_us)
            else:
                self._assign_lane(source, symbols[code], code, code_map, int(rows.trade_id[ctl[k.C_POS]]))
            members = source.member_slots() if crossed else np.array(self._fresh, np.int32)
            if ending:
                ended = self._release(source)
        if ending:
            self._leave(source, park=True)

    def _release(self, source: _Source) -> npt.NDArray[np.int32]:
        """Slots that no source feeds once this one has ended: its lanes, then its symbols."""
        slots = source.member_slots()
        kind, refs = self._state.slot_i[slots, k.KIND], self._state.slot_i[slots, k.REFS]
        return np.concatenate((slots[kind == k.LANE], slots[(kind == k.MAIN) & (refs == 1)]))

    def _leave(self, source: _Source, *, park: bool) -> None:
        """Take a source from its slots; its lanes are parked where that is wanted and possible, and given up otherwise."""
        slots = source.member_slots()
        slot_i = self._state.slot_i
        slot_i[slots, k.REFS] -= 1
        for slot in slots[slot_i[slots, k.KIND] == k.LANE].tolist()[::-1]:
            last_us = self._last_open_us(slot) if park else 0
            if last_us:
                self._park(slot, last_us)
            else:
                self._free_lane(slot)

    def _free_lane(self, slot: int) -> None:
        self._state.slot_i[slot, k.KIND] = k.FREE
        self._state.slot_i[slot, k.STARTED] = 0
        self._free.append(slot)

    def _last_open_us(self, slot: int) -> int:
        """Time of the last trade in the open bars of a lane that has ended; 0 if there is none, or if an open bar lies at the lane's edge."""
        hot, row = self._state.hot_i[slot], self._state.slot_i[slot]
        top_us = self.config.timeframe_us[-1]
        open_us = hot[k.OPEN] - hot[k.OPEN] % top_us
        if not row[k.STARTED] or open_us <= row[k.LANE_LO] or open_us + top_us > row[k.LANE_HI]:
            return 0
        first = slot * self.config.rows_per_symbol
        bars = self._state.bar_i[first + 1 : first + len(self.config.timeframes)]
        return int(max([*bars[bars[:, k.COUNT] > 0, k.LAST_T], hot[k.LAST_T] if hot[k.COUNT] else 0]))

    def _park(self, slot: int, last_us: int) -> None:
        """Keep an ended lane; the oldest of its symbol goes when there are too many."""
        mine = self._parked_of.setdefault(int(self._state.slot_i[slot, k.OWNER]), [])
        if len(mine) >= _PARKED_LANES:
            self._free_lane(self._take_parked(mine[0]))
        mine.append(slot)
        self._parked[slot] = last_us

    def _take_parked(self, slot: int) -> int:
        """The lane, parked no more."""
        del self._parked[slot]
        self._parked_of[int(self._state.slot_i[slot, k.OWNER])].remove(slot)
        return slot

    def _unpark(self, main: int, trade_id: int) -> int | None:
        """The parked lane that this trade goes on with: its last trade is the one before the hole, and its id the one before this."""
        lo, hi = int(self._ctl[k.C_LANE_LO]), int(self._ctl[k.C_LANE_HI])
        slot_i = self._state.slot_i
        slot = next((slot for slot in self._parked_of.get(main, ()) if self._parked[slot] == lo), None)
        if slot is None or not (self._state.ids[main, : slot_i[main, k.ID_COUNT], k.ID_HI] == trade_id - 1).any():
            return None
        slot_i[slot, k.LANE_HI] = hi
        return self._take_parked(slot)

    def _collect(self) -> BarBatches:
        """Copy the rows out of the buffers."""
        out, ctl = self._out, self._ctl
        n, codes, rejected = int(ctl[k.C_OUT]), int(ctl[k.C_CODES]), int(ctl[k.C_REJECTED])
        symbols: tuple[str, ...] = ()
        if codes:
            slots = out.code_list[:codes]
            out.code_of[slots] = -1
            symbols = tuple([self._names[slot] for slot in slots.tolist()])
        bars = dict(_NO_BARS)
        if n:
            for names, matrix in ((_BAR_I8, out.i8), (_BAR_I4, out.i4), (_BAR_I1, out.i1), (_BAR_F8, out.f8)):
                bars.update(zip(names, matrix[:, :n].copy(), strict=True))
        if out.i8.shape[1] > _KEEP_OUT_ROWS:
            self._make_scratch(_MIN_OUT_ROWS)
        return BarBatches(
            symbols=symbols,
            bars=bars,
            rejected={"row": out.rejected_row[:rejected].copy(), "reason": out.rejected_reason[:rejected].copy()}
            if rejected
            else dict(_NO_REJECTED),
            watermark_us=self._watermark_us,
            accepted=int(ctl[k.C_ACCEPTED]),
            duplicates=int(ctl[k.C_DUPLICATES]),
            late=int(ctl[k.C_LATE]),
        )

    # --- sources, slots, buffers ------------------------------------------------------------------------------------------------------

    def _source(self, name: str) -> tuple[_Source, bool]:
        """The source of that name and whether it was known."""
        source = self._sources.get(name)
        if source is not None:
            return source, True
        if len(self._sources) >= self.config.max_sources:
            silent = min(self._sources, key=lambda other: self._sources[other].frame_number)
            self._forget(self._sources.pop(silent))
        source = self._sources[name] = _Source()
        return source, False

    def _forget(self, source: _Source) -> None:
        """Drop a source that never said it ended: its symbols keep their open bars, its lanes are given up."""
        self._leave(source, park=False)

    def _map_codes(self, source: _Source, symbols: tuple[str, ...]) -> npt.NDArray[np.int32]:
        """Slot of each symbol code of this frame."""
        if source.symbols is not symbols:
            source.symbols = symbols
            source.code_map = np.fromiter(map(source.slot_of.get, symbols, repeat(k.UNMAPPED)), np.int32, len(symbols))
            source.newcomers = np.flatnonzero(source.code_map >= k.NEWCOMER).tolist()
        return source.code_map

    def _new_slot(self, key: str) -> int | None:
        """Index of an unused slot, or else of the lane parked longest, or None when there are ``max_symbols``."""
        if not self._free and self._parked and len(self._names) >= self.config.max_symbols:
            self._free_lane(self._take_parked(next(iter(self._parked))))
        if self._free:
            slot = self._free.pop()
            self._names[slot] = key
            return slot
        slot = len(self._names)
        capacity = len(self._state.hot_i)
        if slot == capacity:
            if capacity >= self.config.max_symbols:
                return None
            capacity = min(2 * capacity, self.config.max_symbols)
            self._state = grow(self.config, self._state, capacity)
            self._more_slots(capacity)
        self._names.append(key)
        return slot

    def _assign_slot(self, source: _Source, key: str, code: int, code_map: npt.NDArray[np.int32], covered_from_us: int) -> None:
        """First trade that this source brings of a symbol."""
        value = source.slot_of.get(key)
        if value is None:
            slot = self._main.get(key)
            value = -1 if slot is None else slot | k.NEWCOMER
            if slot is None:
                slot = self._new_slot(key)
                if slot is None:
                    code_map[code] = k.REFUSED
                    return
                self._main[key] = value = slot
                init_slot(self.config, self._state, slot, kind=k.MAIN, owner=slot, covered_from_us=covered_from_us or int(k.MAX64))
            self._state.slot_i[slot, k.REFS] += 1
            source.join(slot)
            self._fresh.append(slot)
            source.slot_of[key] = value
        if value >= k.NEWCOMER:
            source.newcomers.append(code)
        code_map[code] = value

    def _assign_lane(self, source: _Source, key: str, code: int, code_map: npt.NDArray[np.int32], trade_id: int) -> None:
        """This source fills in an older stretch of a symbol: bars of its own for it, or those of the stretch that it goes on with."""
        main = self._main[key]
        slot = self._unpark(main, trade_id)
        if slot is None:
            slot = self._new_slot(key)
            if slot is None:
                code_map[code] = main  # no newcomer any more: its old trades are too late
                return
            init_slot(self.config, self._state, slot, kind=k.LANE, owner=main, covered_from_us=int(k.MAX64))
            row = self._state.slot_i[slot]
            row[k.LANE_LO], row[k.LANE_HI] = self._ctl[k.C_LANE_LO], self._ctl[k.C_LANE_HI]
        self._state.slot_i[slot, k.REFS] = 1
        source.join(slot)
        self._fresh.append(slot)
        code_map[code] = slot
        source.slot_of[key] = slot

    def _make_scratch(self, rows: int) -> None:
        capacity = len(self._state.hot_i)
        self._out = k.Out(
            i8=np.empty((len(_BAR_I8), rows + _PAD_ROWS), np.int64),
            i4=np.empty((len(_BAR_I4), rows + _PAD_ROWS), np.int32),
            i1=np.empty((len(_BAR_I1), rows + _PAD_ROWS), np.int8),
            f8=np.empty((len(_BAR_F8), rows + _PAD_ROWS), np.float64),
            code_of=np.full(capacity, -1, np.int32),
            code_list=np.empty(capacity, np.int32),
            rejected_row=np.empty(1024, np.int64),
            rejected_reason=np.empty(1024, np.int8),
            touched=np.empty(capacity, np.int32),
            revised=np.empty(capacity, np.int32),
            floors=np.zeros(len(self.config.timeframes), np.int64),
        )

    def _room_for_rejects(self, rows: int) -> None:
        if len(self._out.rejected_row) < rows:
            size = 1 << (rows - 1).bit_length()
            self._out = self._out._replace(rejected_row=np.empty(size, np.int64), rejected_reason=np.empty(size, np.int8))

    def _more_out(self, rows: int) -> None:
        """Output buffers of at least ``rows`` rows, with what they hold."""
        out, used = self._out, int(self._ctl[k.C_OUT])
        size = (1 << (rows - 1).bit_length()) + _PAD_ROWS
        grown = {}
        for name in ("i8", "i4", "i1", "f8"):
            old = getattr(out, name)
            grown[name] = np.empty((len(old), size), old.dtype)
            grown[name][:, :used] = old[:, :used]
        self._out = out._replace(**grown)

    def _more_slots(self, capacity: int) -> None:
        """Per-slot buffers for ``capacity`` slots, with what they hold."""
        out = self._out
        grown = {}
        for name in ("code_of", "code_list", "touched", "revised"):
            old = getattr(out, name)
            grown[name] = np.full(capacity, -1, np.int32)
            grown[name][: len(old)] = old
        self._out = out._replace(**grown)

    # --- snapshot ---------------------------------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """The whole state; the same state gives the same bytes."""
        sources = [
            [name, s.clock_us, s.first_clock_us, s.skew_us, s.frame_number, s.members, list(s.slot_of.items())]
            for name, s in self._sources.items()
        ]
        head = {
            "names": self._names,
            "free": self._free,
            "parked": list(self._parked.items()),
            "sources": sources,
            "watermark_us": self._watermark_us,
            "frames": self._frames,
            "clock_us": int(self._ctl[k.C_CLOCK]),
            "wheel_at": int(self._ctl[k.C_WHEEL_AT]),
        }
        return pack(self.config, self._state, len(self._names), head)

    @classmethod
    def restore(cls, config: BarConfig, data: bytes) -> BarEngine:
        """The engine that :meth:`snapshot` was taken of.

        Raises SnapshotError for bytes that are damaged, of another version or contradict themselves, SnapshotConfigError for those made
        with other settings.
        """
        state, head = unpack(config, data)
        engine = cls(config)
        engine._state = state
        engine._make_scratch(_MIN_OUT_ROWS)
        try:
            engine._restore_head(head)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as exc:
            raise SnapshotError("The head of this bar state contradicts its arrays.") from exc
        return engine

    def _restore_head(self, head: dict[str, Any]) -> None:
        slots = head["slots"]
        kind = self._state.slot_i[:slots, k.KIND]
        self._names = [_text(name) for name in head["names"]]
        self._free = [_index(slot, slots) for slot in head["free"]]
        if len(self._names) != slots or sorted(self._free) != np.flatnonzero(kind == k.FREE).tolist():
            raise ValueError("names or free slots")
        self._main = {self._names[slot]: slot for slot in np.flatnonzero(kind == k.MAIN).tolist()}
        for name, clock_us, first_clock_us, skew_us, frame_number, members, slot_of in head["sources"]:
            source = self._sources[_text(name)] = _Source()
            source.clock_us, source.first_clock_us = _index(clock_us, MAX_TIME_US), _index(first_clock_us, MAX_TIME_US)
            source.skew_us = None if skew_us is None else _index(skew_us, MAX_TIME_US, -MAX_TIME_US)
            source.frame_number = int(frame_number)
            source.members = [_index(slot, slots) for slot in members]
            source.slot_of = {_text(key): value for key, value in slot_of}
            for key, value in source.slot_of.items():
                if self._names[_index(value & k.SLOT_MASK, slots)] != key or value >= 2 * k.NEWCOMER:
                    raise ValueError("source")
        if len(self._sources) > self.config.max_sources:
            raise ValueError("sources")
        # states written before lanes were parked have none
        self._parked = {_index(slot, slots): _index(last_us, MAX_TIME_US) for slot, last_us in head.get("parked", [])}
        fed = {slot for source in self._sources.values() for slot in source.members}
        for slot in self._parked:
            if kind[slot] != k.LANE or slot in fed:
                raise ValueError("parked")
            self._parked_of.setdefault(int(self._state.slot_i[slot, k.OWNER]), []).append(slot)
        self._watermark_us = _index(head["watermark_us"], MAX_TIME_US)
        self._frames = int(head["frames"])
        self._ctl[k.C_CLOCK] = _index(head["clock_us"], 2 * MAX_TIME_US)
        self._ctl[k.C_WHEEL_AT] = _index(head["wheel_at"], 2 * MAX_TIME_US)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not text")
    return value


def _index(value: object, end: int, start: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not start <= value < end:
        raise ValueError("out of range")
    return value


def input_rows(columns: Mapping[str, Array]) -> k.Rows:
    """The columns as read-only arrays of the exact dtypes, so that the kernel has one specialisation."""
    if not columns:
        return NO_ROWS
    arrays = []
    length = -1
    for name, dtype in TRADE_DTYPES.items():
        array = columns.get(name)
        if array is None:
            raise TradeInputError(f"The frame of trades lacks the column '{name}'.")
        if array.dtype != dtype or array.ndim != 1:
            raise TradeInputError(f"Column '{name}' is {array.ndim}-dimensional {array.dtype}: it must be one-dimensional {dtype}.")
        if length not in (-1, len(array)):
            raise TradeInputError(f"Column '{name}' has {len(array):,} rows, the columns before it have {length:,}.")
        length = len(array)
        flags = array.flags
        if not (flags.c_contiguous and flags.aligned):
            array = np.array(array, dtype)
        if array.flags.writeable:
            array = array.view()
            array.flags.writeable = False
        arrays.append(array)
    return k.Rows(*arrays)


NO_ROWS: Final = input_rows({name: np.zeros(0, dtype) for name, dtype in TRADE_DTYPES.items()})


def build(
    trades: pl.DataFrame,
    timeframes: Sequence[str] | Iterable[str],
    *,
    max_flat_bars: int = 86_400,
) -> pl.DataFrame:
    """Bars of a whole history of trades, by the kernel that makes them live. See ``processors.bars_batch``."""
    from processors.bars_batch import build as build_bars  # not at the top: importing polars takes longer than everything else here

    return build_bars(trades, timeframes, max_flat_bars=max_flat_bars)
