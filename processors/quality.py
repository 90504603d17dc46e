"""Data quality before bars: which trades of a frame are suspect, which suspects the market has confirmed, and how good each feed is.

Comes in: frames of trades of one partition, in the order of the topic. Goes out: :class:`Verdict` (the rows to make bars of, suspects held
back, suspects released) and, every ten seconds of event time, a score per symbol and source. No clock, no randomness, no I/O.

**The band.** A trade is suspect when its price is further from the last price than ``moves * typical move + share * price``: the rule
"k deviations plus a granularity" of Brownlees and Gallo (2006, "Financial econometric analysis at ultra-high frequency: data handling concerns",
Computational Statistics & Data Analysis 51, 2232-2245), in the recursive form that Gelper, Fried and Croux (2010, "Robust forecasting
with exponential and Holt-Winters smoothing", Journal of Forecasting 29, 285-300) give such rules: the typical move is an exponentially weighted mean
of absolute price changes in which each change counts at most ``clip`` times the mean so far. Changes of 0 are left out, so it never falls below a tick
or the bounce between bid and ask. With the time since the last trade the band widens by ``sqrt(1 + time / stretch)``.

**Nothing is locked out.** A suspect is held, not dropped. When ``witnesses`` suspects in time order agree on a level, not all of one instant, or
``run`` suspects follow each other without a trade inside the band between them, the market has moved: those the new level explains are released
and go into the bars before the trade that confirmed them, and the band goes on from there, twice as wide. A suspect that ``forget``
trades inside the band have followed stays held for good; a person may release it.

**Times.** A trade ``ahead`` beyond its source's watermark is suspect too: one print an hour ahead would close every bar before it. What the bar
engine refuses (``processors.bars.REJECT_REASONS``) is left to it and counted in the score from what it says.

Measured false holds are in ``tests/processors/test_quality.py``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from processors import _bars_kernel as bars_kernel
from processors import _quality_kernel as k
from processors.bars import REJECT_REASONS, input_rows
from processors.errors import SnapshotError
from processors.quality_config import QualityConfig
from schemas.frames import END_OF_SOURCE, HISTORY, Frame
from schemas.timeframes import MAX_TIME_US, MIN_TIME_US, US_PER_SECOND

Array = npt.NDArray[Any]

REASON_PRICE: Final = 1
REASON_TIME: Final = 2
REASON_NAMES: Final = {REASON_PRICE: "price", REASON_TIME: "time"}
"""Why a trade is held, as in topic ``quarantine``."""
HELD: Final = 1
CONFIRMED: Final = 2
RELEASED: Final = 3
DISCARDED: Final = 4
STATE_NAMES: Final = {HELD: "held", CONFIRMED: "confirmed", RELEASED: "released", DISCARDED: "discarded"}
"""What became of a suspect, as in topic ``quarantine``."""

SCORE_INTERVAL_US: Final = 10 * US_PER_SECOND
_UNMAPPED, _UNCHECKED = -1, -2
_BAD_TIMES: Final = frozenset({bars_kernel.R_TIME})
_BAD_VALUES: Final = frozenset({bars_kernel.R_NOT_FINITE, bars_kernel.R_PRICE, bars_kernel.R_SIZE, bars_kernel.R_ID})
assert set(REJECT_REASONS) >= _BAD_TIMES | _BAD_VALUES
_SCORE_COUNTS: Final = ("checks_passed", "checks_failed", "bad_values", "bad_times", "held", "confirmed", "volume_spikes")
_SUSPECT_COLUMNS: Final = ("trade_id", "price", "size", "side", "exchange_time_us", "receive_time_us")
_HEAD_SIZE: Final = struct.Struct("<I")
_MAX_WAITING: Final = 64
"""Suspects of a slot that may still be released; the oldest of more stay held."""


class Suspect(NamedTuple):
    """A trade held back, and why."""

    key: str
    trade_id: int
    price: float
    size: float
    side: int
    exchange_time_us: int
    receive_time_us: int
    reason: int
    """REASON_PRICE or REASON_TIME."""
    band_low: float
    band_high: float
    """What it was held against, quote units; -1 unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the checks changed about a frame."""

    columns: Mapping[str, Array]
    """The trades to make bars of: without those held, with those released before the trade that confirmed them."""
    rows: npt.NDArray[np.int64]
    """Row of each in the frame; -1 for one released that was held in an earlier frame."""
    held: tuple[Suspect, ...]
    """Held back in this frame and not released in it."""
    confirmed: tuple[Suspect, ...]
    """Released in this frame."""


class _Source:
    """A source of trades: its slots and when they were last scored."""

    __slots__ = ("frame_number", "members", "receive_us", "scored", "slot_of", "slots", "symbols", "watermark_us")

    def __init__(self) -> None:
        self.slot_of: dict[str, int] = {}
        self.members: npt.NDArray[np.int32] | None = None
        # the dictionary of the last frame, by identity, and what it maps to
        self.symbols: tuple[str, ...] | None = None
        self.slots: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self.watermark_us = 0
        self.receive_us = 0
        self.scored = -1
        self.frame_number = 0


class QualityGate:
    """Checks of all symbols and sources of ONE partition. Not thread-safe; the compiled part releases the GIL."""

    def __init__(self, config: QualityConfig | None = None) -> None:
        self.config = config or QualityConfig()
        self._par = self.config.parameters()
        self._limits = np.array([MIN_TIME_US, MAX_TIME_US - 1, MAX_TIME_US, self.config.max_future_us, k.MAX_ID], np.int64)
        self._sources: dict[str, _Source] = {}
        self._names: list[str] = []
        self._free: list[int] = []
        self._frames = 0
        self._qi: npt.NDArray[np.int64] = np.zeros((0, k.SLOT_WORDS), np.int64)
        self._qf: npt.NDArray[np.float64] = self._qi.view(np.float64)
        self._room(64)
        self._waiting: dict[int, list[Suspect]] = {}
        self._events = np.empty((1024, 4), np.int64)
        self._bands = np.empty((1024, 2), np.float64)

    # --- one frame --------------------------------------------------------------------------------------------------------------------

    def check(self, frame: Frame) -> Verdict | None:
        """Check a frame's rows; None when every row goes into the bars as it is.

        Call it once a frame, then :meth:`refused` with what the bar engine refused, then :meth:`scores`.
        """
        source = self._source(frame.source)
        watermark_us = frame.watermark_us
        if 0 < watermark_us < MAX_TIME_US and watermark_us > source.watermark_us:
            source.watermark_us = watermark_us
        columns = frame.columns
        if not columns or not len(columns["symbol_code"]):
            return None
        rows = input_rows(columns)
        count = len(rows.code)
        source.receive_us = int(rows.receive[-1])
        if len(self._events) < count:
            size = 1 << (count - 1).bit_length()
            self._events, self._bands = np.empty((size, 4), np.int64), np.empty((size, 2), np.float64)
        self._set_limits(source.watermark_us, history=bool(frame.flags & HISTORY))
        slots = source.slots
        if source.symbols is not frame.symbols:
            slots = np.fromiter(map(source.slot_of.get, frame.symbols, repeat(_UNMAPPED)), np.int32, len(frame.symbols))
            source.symbols, source.slots = frame.symbols, slots
        found = k.check_rows(self._qf, self._qi, rows, slots, self._limits, self._par, self._events, self._bands)
        if found < 0:
            self._assign(source, frame.symbols, slots)
            if len(slots) and int(slots.min()) == _UNCHECKED:
                source.symbols = None  # asked for again with the next frame, as by a gate that was restored
            found = k.check_rows(self._qf, self._qi, rows, slots, self._limits, self._par, self._events, self._bands)
        return self._verdict(frame, found) if found else None

    def refused(self, frame: Frame, rejected: Mapping[str, Array], verdict: Verdict | None) -> None:
        """Count in the score what the bar engine refused of the rows it was given: ``row`` and ``reason`` as in ``BarBatches.rejected``."""
        codes = (verdict.columns if verdict is not None else frame.columns)["symbol_code"]
        source = self._sources[frame.source]
        for row, reason in zip(rejected["row"].tolist(), rejected["reason"].tolist(), strict=True):
            word = k.BAD_VALUES if reason in _BAD_VALUES else k.BAD_TIMES if reason in _BAD_TIMES else -1
            code = int(codes[row])
            slot = source.slot_of.get(frame.symbols[code], -1) if 0 <= code < len(frame.symbols) else -1
            if word >= 0 and slot >= 0:
                self._qi[slot, word] += 1
                self._qi[slot, k.PASSED] -= 1

    def scores(self, frame: Frame) -> tuple[tuple[str, ...], dict[str, Array]] | None:
        """Symbols and columns of a ``quality`` frame, when the source's watermark has entered another ten seconds or the source ends."""
        source = self._sources[frame.source]
        interval = source.watermark_us // SCORE_INTERVAL_US
        ending = bool(frame.flags & END_OF_SOURCE)
        if interval == source.scored and not ending:
            return None
        first, source.scored = source.scored < 0, interval
        result = None if first and not ending else self._score(source, source.watermark_us if ending else interval * SCORE_INTERVAL_US)
        if ending:
            self._forget(self._sources.pop(frame.source))
        return result

    def _set_limits(self, watermark_us: int, *, history: bool) -> None:
        limits = self._limits
        limits[k.L_MAX_T], limits[k.L_SUSPECT_T] = MAX_TIME_US - 1, k.MAX_ID
        if watermark_us and not history:
            limits[k.L_MAX_T] = min(MAX_TIME_US - 1, watermark_us + self.config.max_future_us)
            limits[k.L_SUSPECT_T] = watermark_us + int(self.config.ahead_us)

    def _verdict(self, frame: Frame, count: int) -> Verdict | None:
        """Follow the events of a frame: what is held, what is released, and the rows that are left."""
        columns = frame.columns
        keep = np.ones(len(columns["symbol_code"]), np.bool_)
        held: dict[tuple[int, int], tuple[int, Suspect]] = {}  # (slot, trade id) -> row and suspect, of this frame
        confirmed: list[Suspect] = []
        inserted: list[tuple[int, Suspect]] = []
        for (row, kind, reason, slot), band in zip(self._events[:count].tolist(), self._bands[:count].tolist(), strict=True):
            waiting = self._waiting.get(slot, [])
            if kind == k.HOLD:
                keep[row] = False
                suspect = _suspect(frame, row, reason, band)
                if all(suspect.trade_id != other.trade_id for other in waiting):  # else the same trade once more
                    held[(slot, suspect.trade_id)] = (row, suspect)
                    self._waiting[slot] = [*waiting[-_MAX_WAITING + 1 :], suspect]
                continue
            self._waiting.pop(slot, None)
            if kind == k.CONFIRM:
                released = [suspect for suspect in waiting if suspect.reason == reason and band[0] <= suspect.price <= band[1]]
                self._qi[slot, k.CONFIRMED] += len(released)
                confirmed += released
                for suspect in released:
                    own = held.pop((slot, suspect.trade_id), None)
                    if own is None:
                        inserted.append((row, suspect))
                    else:
                        keep[own[0]] = True
        if keep.all() and not confirmed:
            return None
        kept = np.flatnonzero(keep)
        places = np.searchsorted(kept, np.array([row for row, _ in inserted], np.int64))
        codes = columns["symbol_code"]
        released_rows = [_row_of(suspect, int(codes[row])) for row, suspect in inserted]
        return Verdict(
            columns={name: np.insert(column[kept], places, [row[name] for row in released_rows]) for name, column in columns.items()},
            rows=np.insert(kept, places, -1),
            held=tuple(suspect for _, suspect in held.values()),
            confirmed=tuple(confirmed),
        )

    def _score(self, source: _Source, time_us: int) -> tuple[tuple[str, ...], dict[str, Array]] | None:
        if source.members is None:
            source.members = np.fromiter(source.slot_of.values(), np.int32, len(source.slot_of))
        members = source.members
        floats, integers = np.empty((len(members), 3), np.float64), np.empty((len(members), 8), np.int64)
        count = k.score_rows(self._qf, self._qi, members, self.config.score_memory, self._par, floats, integers)
        if not count:
            return None
        slots, *counts = np.ascontiguousarray(integers[:count].T)
        columns: dict[str, Array] = {"symbol_code": np.arange(count, dtype=np.int32), "score": floats[:count, 0].copy()}
        columns.update(zip(_SCORE_COUNTS, counts, strict=True))
        columns["exchange_time_us"] = np.full(count, time_us, np.int64)
        columns["receive_time_us"] = np.full(count, source.receive_us, np.int64)
        columns["band_low"], columns["band_high"] = floats[:count, 1].copy(), floats[:count, 2].copy()
        return tuple([self._names[slot] for slot in slots.tolist()]), columns

    # --- sources and slots ------------------------------------------------------------------------------------------------------------

    def _source(self, name: str) -> _Source:
        self._frames += 1
        source = self._sources.get(name)
        if source is None:
            if len(self._sources) >= self.config.max_sources:
                silent = min(self._sources, key=lambda other: self._sources[other].frame_number)
                self._forget(self._sources.pop(silent))
            source = self._sources[name] = _Source()
        source.frame_number = self._frames
        return source

    def _forget(self, source: _Source) -> None:
        """Give the slots of a source back; its suspects stay held."""
        for slot in source.slot_of.values():
            self._waiting.pop(slot, None)
            self._free.append(slot)

    def _assign(self, source: _Source, symbols: tuple[str, ...], slots: npt.NDArray[np.int32]) -> None:
        """Give the symbols of a frame that have none a slot, as long as there are any."""
        for code in np.flatnonzero(slots == _UNMAPPED).tolist():
            key = symbols[code]
            slot = source.slot_of.get(key)
            if slot is None:
                slot = self._new_slot(key)
                if slot != _UNCHECKED:
                    source.slot_of[key] = slot
                    source.members = None
            slots[code] = slot

    def _new_slot(self, key: str) -> int:
        if self._free:
            slot = self._free.pop()
            self._names[slot] = key
        elif len(self._names) < self.config.max_slots:
            slot = len(self._names)
            self._names.append(key)
            if slot == len(self._qi):
                self._room(min(2 * slot, self.config.max_slots))
        else:
            return _UNCHECKED
        self._qi[slot] = 0
        self._qf[slot, k.F_LOW], self._qf[slot, k.F_HIGH] = np.inf, -np.inf
        self._qf[slot, k.F_SCORE] = 1.0
        return slot

    def _room(self, slots: int) -> None:
        """Make room for ``slots`` slots, beginning at a cache line, so that a usual trade touches one."""
        words = np.zeros(slots * k.SLOT_WORDS + 7, np.int64)
        skip = -(words.ctypes.data // 8) % 8
        state = words[skip : skip + slots * k.SLOT_WORDS].reshape(slots, k.SLOT_WORDS)
        state[: len(self._qi)] = self._qi
        self._qi, self._qf = state, state.view(np.float64)

    # --- snapshot ---------------------------------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """The whole state; the same state gives the same bytes. Empty before the first frame."""
        if not self._frames:
            return b""
        head = {
            "names": self._names,
            "free": self._free,
            "frames": self._frames,
            "sources": [
                [name, s.watermark_us, s.receive_us, s.scored, s.frame_number, list(s.slot_of.items())] for name, s in self._sources.items()
            ],
            "waiting": [[slot, [list(suspect) for suspect in waiting]] for slot, waiting in sorted(self._waiting.items())],
        }
        text = json.dumps(head, separators=(",", ":")).encode()
        return _HEAD_SIZE.pack(len(text)) + text + self._qi[: len(self._names)].tobytes()

    @classmethod
    def restore(cls, data: bytes, config: QualityConfig | None = None) -> QualityGate:
        """The gate that :meth:`snapshot` was taken of. Raises SnapshotError for bytes that are none or contradict themselves."""
        gate = cls(config)
        if data:
            try:
                gate._restore(data)
            except (struct.error, KeyError, TypeError, ValueError, IndexError, OverflowError) as exc:
                raise SnapshotError(f"The quality checks of this state cannot be used: {exc}") from exc
        return gate

    def _restore(self, data: bytes) -> None:
        (length,) = _HEAD_SIZE.unpack_from(data)
        start = _HEAD_SIZE.size + length
        head = json.loads(data[_HEAD_SIZE.size : start])
        self._names, self._free, self._frames = (
            [str(name) for name in head["names"]],
            [int(slot) for slot in head["free"]],
            int(head["frames"]),
        )
        slots = len(self._names)
        if slots > self.config.max_slots:
            raise ValueError(f"{slots:,} symbols, max_slots is {self.config.max_slots:,}")
        state = np.frombuffer(data, np.int64, offset=start).reshape(slots, k.SLOT_WORDS)
        used = list(self._free)
        for name, watermark_us, receive_us, scored, frame_number, slot_of in head["sources"]:
            source = self._sources[str(name)] = _Source()
            source.watermark_us, source.receive_us = int(watermark_us), int(receive_us)
            source.scored, source.frame_number = int(scored), int(frame_number)
            source.slot_of = {str(key): int(slot) for key, slot in slot_of}
            if any(self._names[slot] != key for key, slot in source.slot_of.items()):
                raise ValueError("a symbol lies in another's place")
            used += source.slot_of.values()
        if sorted(used) != list(range(slots)):
            raise ValueError("places are used twice or not at all")
        if slots > len(self._qi):
            self._room(min(1 << (slots - 1).bit_length(), self.config.max_slots))
        self._qi[:slots] = state
        self._waiting = {int(slot): [Suspect._make(entry) for entry in waiting] for slot, waiting in head["waiting"]}


def _suspect(frame: Frame, row: int, reason: int, band: list[float]) -> Suspect:
    columns = frame.columns
    key = frame.symbols[int(columns["symbol_code"][row])]
    values = [columns[name][row].item() for name in _SUSPECT_COLUMNS]
    return Suspect._make([key, *values, reason, *band])


def _row_of(suspect: Suspect, code: int) -> dict[str, Any]:
    """The suspect as a row of trades."""
    return {"symbol_code": code, **{name: getattr(suspect, name) for name in _SUSPECT_COLUMNS}}
