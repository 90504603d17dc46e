"""State of time bars as arrays: their layout from the settings, growth by doubling, and a compact, checked form as bytes.

Comes in: :class:`BarConfig`, snapshot bytes. Goes out: the arrays that ``_bars_kernel.step`` changes, snapshot bytes.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from processors import _bars_kernel as k
from processors.errors import BarConfigError, SnapshotConfigError, SnapshotError
from schemas.timeframes import MAX_TIME_US, MIN_TIME_US, TIMEFRAMES, US_PER_SECOND, timeframe_seconds

PENDING_BARS: Final = 16
"""Bars of the smallest timeframe, besides those of the revision window, that may wait for a watermark that lags behind the trades."""
_MAGIC: Final = b"MSBAR\x00"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<6sHII")
"""Magic, version, crc32 of what follows, length of the JSON head."""
_MAX_HEAD_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class BarConfig:
    """Settings of time bars; part of the state: a snapshot continues only under the settings it was made with."""

    timeframes: tuple[str, ...] = TIMEFRAMES
    """Any of ``1s 1m 5m 15m 30m 1h 4h 1d``; each must divide the next larger one."""
    revision_window_us: int = 30 * US_PER_SECOND
    """A late trade revises its bars when it is at most this much older than the newest closed bar of the smallest timeframe."""
    live_interval_us: int = 250_000
    """A symbol's open bars are published at most this often, on the clock of receive times. 0: never."""
    max_symbols: int = 16_384
    """Symbols (and older stretches being filled in or parked) of one partition; trades of further ones are rejected."""
    max_sources: int = 1024
    """Sources remembered; beyond it the one that has been silent longest is treated as ended."""
    max_flat_bars: int = 86_400
    """Flat bars in a row, per symbol and timeframe; the bar after a longer silence is marked incomplete."""
    max_flat_rows_per_frame: int = 1_000_000
    """Flat bars that one frame may cause; silence that would need more is left out in the same way."""
    max_future_us: int = 86_400 * US_PER_SECOND
    """A trade this far ahead of its source's watermark, or of its own receive time, is rejected."""
    id_intervals: int = 192
    """Intervals of trade ids remembered per symbol, i.e. holes in its ids; beyond it the oldest quarter of the holes is forgotten."""
    max_bytes_per_symbol: int = 32 * 1024
    """Refuse settings that need more memory than this for each symbol."""

    def __post_init__(self) -> None:
        if not self.timeframes:
            raise BarConfigError(f"No timeframe is given: name at least one of {', '.join(TIMEFRAMES)}.")
        ordered = sorted((timeframe_seconds(name), name) for name in set(self.timeframes))
        object.__setattr__(self, "timeframes", tuple(name for _, name in ordered))
        for (small, small_name), (large, large_name) in zip(ordered, ordered[1:], strict=False):
            if large % small:
                raise BarConfigError(f"{large_name} is no multiple of {small_name}: leave one of them out.")
        for name in ("max_symbols", "max_sources", "max_flat_rows_per_frame", "max_future_us"):
            if getattr(self, name) < 1:
                raise BarConfigError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if self.max_symbols >= k.NEWCOMER:
            raise BarConfigError(f"max_symbols is {self.max_symbols}: it must be below {k.NEWCOMER}.")
        if self.id_intervals < 4:
            raise BarConfigError(f"id_intervals is {self.id_intervals}: it must be at least 4.")
        for name in ("revision_window_us", "live_interval_us", "max_flat_bars"):
            if getattr(self, name) < 0:
                raise BarConfigError(f"{name} is {getattr(self, name)}: it must not be negative.")
        if self.bytes_per_symbol > self.max_bytes_per_symbol:
            raise BarConfigError(
                f"A revision window of {self.revision_window_us / US_PER_SECOND:g} s at {self.timeframes[0]} bars and {self.id_intervals} id "
                f"intervals need {self.bytes_per_symbol:,} bytes a symbol, max_bytes_per_symbol is {self.max_bytes_per_symbol:,}: shorten the window."
            )

    @property
    def timeframe_us(self) -> tuple[int, ...]:
        """Lengths of the timeframes, ascending, microseconds."""
        return tuple(timeframe_seconds(name) * US_PER_SECOND for name in self.timeframes)

    @property
    def ring_sizes(self) -> tuple[int, ...]:
        """Sealed bars kept per symbol, for each timeframe."""
        base = self.timeframe_us[0]
        smallest = -(-self.revision_window_us // base) + 1 + PENDING_BARS
        return (smallest, *(-(-(smallest - 1) * base // length) + 1 for length in self.timeframe_us[1:]))

    @property
    def rows_per_symbol(self) -> int:
        """Bars of a symbol outside the hot arrays."""
        return len(self.timeframes) + sum(self.ring_sizes)

    @property
    def bytes_per_symbol(self) -> int:
        """Memory of a symbol, bytes, without its name."""
        levels = len(self.timeframes)
        bars = self.rows_per_symbol * k.BAR_WORDS
        return 8 * (k.HOT_WORDS + bars + k.SLOT_INTS + 4 * levels + 4 * self.id_intervals) + 16


def make_state(config: BarConfig, capacity: int) -> k.State:
    """Arrays for ``capacity`` slots, all free. Pages are touched only when a slot is used."""
    levels, rows = len(config.timeframes), config.rows_per_symbol
    rings = np.array(config.ring_sizes, np.int64)
    par = np.zeros(k.PARAMS, np.int64)
    par[k.P_BASE] = config.timeframe_us[0]
    par[k.P_WINDOW] = config.revision_window_us
    par[k.P_MAX_FLAT] = config.max_flat_bars
    par[k.P_LIVE] = config.live_interval_us
    par[k.P_ROWS] = rows
    par[k.P_LEVELS] = levels
    par[k.P_IDS] = config.id_intervals
    par[k.P_FUTURE] = config.max_future_us
    par[k.P_MIN_T], par[k.P_MAX_T] = MIN_TIME_US, MAX_TIME_US
    par[k.P_REVISABLE] = int(rings.sum())
    hot = _cache_aligned(capacity, k.HOT_WORDS)
    bars = _cache_aligned(capacity * rows, k.BAR_WORDS)
    return k.State(
        hot_i=hot,
        hot_f=hot.view(np.float64),
        bar_i=bars,
        bar_f=bars.view(np.float64),
        slot_i=np.zeros((capacity, k.SLOT_INTS + 3 * levels), np.int64),
        slot_f=np.zeros((capacity, levels), np.float64),
        ids=np.zeros((capacity, config.id_intervals, 4), np.int64),
        wheel=np.full(k.WHEEL, -1, np.int64),
        timeframe=np.array(config.timeframe_us, np.int64),
        ring=rings,
        ring_at=levels + np.concatenate((np.zeros(1, np.int64), np.cumsum(rings)[:-1])),
        par=par,
    )


def _cache_aligned(rows: int, words: int) -> npt.NDArray[np.int64]:
    """Zeros that begin at a cache line, so that a row of ``hot`` lies in three lines and not in four."""
    memory = np.zeros(rows * words + 7, np.int64)
    skip = -(memory.ctypes.data // 8) % 8
    return memory[skip : skip + rows * words].reshape(rows, words)


def grow(config: BarConfig, state: k.State, capacity: int) -> k.State:
    """The same state with room for ``capacity`` slots."""
    grown = make_state(config, capacity)
    for name in ("hot_i", "bar_i", "slot_i", "slot_f", "ids"):
        old = getattr(state, name)
        getattr(grown, name)[: len(old)] = old
    grown.wheel[:] = state.wheel
    return grown


def init_slot(config: BarConfig, state: k.State, slot: int, *, kind: int, owner: int, covered_from_us: int) -> None:
    """Make ``slot`` an empty one of that kind."""
    rows = config.rows_per_symbol
    state.hot_i[slot] = 0
    state.hot_i[slot, k.PUB] = -1
    state.hot_i[slot, k.EXT_HI] = -2
    state.hot_i[slot, k.EXT_LIMIT] = -1
    state.hot_i[slot, k.LIVE_AT] = -k.MAX64
    state.hot_i[slot, k.LIVE_STATE] = k.NEVER if kind == k.LANE else k.CLEAN
    state.bar_i[slot * rows : (slot + 1) * rows] = 0
    row = state.slot_i[slot]
    row[:] = 0
    row[k.KIND] = kind
    row[k.OWNER] = owner
    row[k.EXT_AT] = -1
    row[k.FORGOTTEN] = -1
    row[k.COVERED_FROM] = covered_from_us
    row[k.GAP_FROM] = row[k.GAP_TO] = row[k.REV_FROM] = k.MAX64
    row[k.LANE_HI] = k.MAX64
    row[k.WHEEL_NEXT] = -1
    state.slot_f[slot] = 0.0


def _config_id(config: BarConfig) -> str:
    return json.dumps(asdict(config), sort_keys=True)


_UNSET: Final = [word for word in range(k.BAR_WORDS) if word not in (k.OPEN, k.COUNT, k.META, k.PUB)]
"""Words of a bar that mean nothing while it has no trade."""


def _live_rows(config: BarConfig, state: k.State, slots: int) -> npt.NDArray[np.int64]:
    """Indices of the bars that still matter: open ones with trades or revisions, sealed ones that a late trade can reach."""
    levels, rows = len(config.timeframes), config.rows_per_symbol
    opens = state.bar_i[: slots * rows, k.OPEN].reshape(slots, rows)
    keep = np.zeros((slots, rows), np.bool_)
    keep[:, 1:levels] = True
    for level, (length, ring) in enumerate(zip(config.timeframe_us, config.ring_sizes, strict=True)):
        current = state.hot_i[:slots, k.OPEN] if level == 0 else opens[:, level]
        at = int(state.ring_at[level])
        mine = opens[:, at : at + ring]
        used = (mine > 0) & (mine > (current - ring * length)[:, None])
        # a bar that a late trade can no longer reach matters only while it waits to be published
        reach = np.minimum(state.slot_i[:slots, k.SLOT_INTS] - config.revision_window_us, state.slot_i[:slots, k.SLOT_INTS + level])
        keep[:, at : at + ring] = used & (mine + length > reach[:, None])
    keep &= (state.slot_i[:slots, k.KIND] != k.FREE)[:, None]
    return np.flatnonzero(keep.ravel()).astype(np.int64)


def _rows(bars: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows of bars without what those before them in their places left behind: an empty one has an open time and its revision only."""
    empty = bars[:, k.COUNT] == 0
    bars[np.ix_(empty, _UNSET)] = 0
    return bars


def pack(config: BarConfig, state: k.State, slots: int, head: dict[str, Any]) -> bytes:
    """The first ``slots`` slots and ``head`` (JSON) as bytes; the same state gives the same bytes.

    Layout: header, JSON head, then little-endian arrays whose sizes the head states. Only used intervals and bars are written.
    """
    slot_i = state.slot_i[:slots].copy()
    hot_i = state.hot_i[:slots]
    count = slot_i[:, k.ID_COUNT]
    ids = state.ids[:slots]
    growing = np.flatnonzero(slot_i[:, k.EXT_AT] >= 0)
    ids[growing, slot_i[growing, k.EXT_AT], k.ID_HI] = hot_i[growing, k.EXT_HI]
    ids[growing, slot_i[growing, k.EXT_AT], k.ID_HI_T] = hot_i[growing, k.EXT_T]
    used = np.arange(config.id_intervals) < count[:, None]
    bars = _live_rows(config, state, slots)
    arrays = [
        hot_i,
        slot_i,
        state.slot_f[:slots],
        ids[used],
        bars,
        _rows(state.bar_i[bars]),
        state.wheel,
    ]
    text = json.dumps(
        {"config": _config_id(config), "slots": slots, "intervals": int(count.sum()), "bars": len(bars), **head},
        sort_keys=True,
        separators=(",", ":"),
    ).encode()
    body = b"".join([text, *(np.ascontiguousarray(array).tobytes() for array in arrays)])
    return _HEADER.pack(_MAGIC, _VERSION, zlib.crc32(body), len(text)) + body


def _head(config: BarConfig, data: bytes) -> tuple[dict[str, Any], int]:
    """The checked JSON head and where the arrays begin."""
    if len(data) < _HEADER.size:
        raise SnapshotError(f"A bar state of {len(data)} bytes is cut off.")
    magic, version, checksum, length = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise SnapshotError("These bytes are no bar state.")
    if version != _VERSION:
        raise SnapshotError(f"This bar state has version {version}, this program reads version {_VERSION}.")
    start = _HEADER.size + length
    if length > _MAX_HEAD_BYTES or start > len(data) or zlib.crc32(memoryview(data)[_HEADER.size :]) != checksum:
        raise SnapshotError(f"This bar state of {len(data)} bytes is damaged or cut off.")
    try:
        head = json.loads(data[_HEADER.size : start])
    except (ValueError, RecursionError) as exc:
        raise SnapshotError("The head of this bar state cannot be read.") from exc
    if not isinstance(head, dict) or not isinstance(head.get("config"), str):
        raise SnapshotError("The head of this bar state is not complete.")
    if head["config"] != _config_id(config):
        raise SnapshotConfigError("This bar state was made with other settings: restore them, or start empty and replay the topic.")
    for name in ("slots", "intervals", "bars"):
        if not isinstance(head.get(name), int) or head[name] < 0:
            raise SnapshotError(f"The head of this bar state has no usable '{name}'.")
    return head, start


def unpack(config: BarConfig, data: bytes) -> tuple[k.State, dict[str, Any]]:
    """State and head of :func:`pack`. Raises SnapshotError; allocates no more than the bytes given and ``max_symbols`` justify."""
    head, at = _head(config, data)
    slots, intervals, bars = head["slots"], head["intervals"], head["bars"]
    levels, rows = len(config.timeframes), config.rows_per_symbol
    if slots > config.max_symbols:
        raise SnapshotError(f"This bar state holds {slots:,} symbols, max_symbols is {config.max_symbols:,}.")
    shapes: list[tuple[tuple[int, ...], type]] = [
        ((slots, k.HOT_WORDS), np.int64),
        ((slots, k.SLOT_INTS + 3 * levels), np.int64),
        ((slots, levels), np.float64),
        ((intervals, 4), np.int64),
        ((bars,), np.int64),
        ((bars, k.BAR_WORDS), np.int64),
        ((k.WHEEL,), np.int64),
    ]
    expected = sum(8 * int(np.prod(shape, dtype=object)) for shape, _ in shapes)
    if expected != len(data) - at:
        raise SnapshotError(f"This bar state should have {expected:,} bytes of arrays and has {len(data) - at:,}.")
    arrays: list[npt.NDArray[Any]] = []
    for shape, dtype in shapes:
        size = int(np.prod(shape))
        arrays.append(np.frombuffer(data, dtype, size, at).reshape(shape))
        at += 8 * size
    hot_i, slot_i, slot_f, ids, bar_at, bar_i, wheel = arrays
    _check(config, slots, hot_i, slot_i, intervals, bar_at, bar_i, wheel)
    state = make_state(config, capacity_for(config, slots))
    state.hot_i[:slots], state.slot_i[:slots], state.slot_f[:slots] = hot_i, slot_i, slot_f
    used = np.arange(config.id_intervals) < slot_i[:, k.ID_COUNT][:, None]
    state.ids[:slots][used] = ids
    state.bar_i[: slots * rows][bar_at] = bar_i
    state.wheel[:] = wheel
    return state, head


def capacity_for(config: BarConfig, slots: int) -> int:
    """Slots to make room for: a power of two that holds ``slots``, at most ``max_symbols``."""
    return min(max(16, 1 << (max(slots, 1) - 1).bit_length()), config.max_symbols)


def _check(
    config: BarConfig,
    slots: int,
    hot_i: npt.NDArray[np.int64],
    slot_i: npt.NDArray[np.int64],
    intervals: int,
    bar_at: npt.NDArray[np.int64],
    bar_i: npt.NDArray[np.int64],
    wheel: npt.NDArray[np.int64],
) -> None:
    """Refuse whatever the kernel would use as an index or count on with no check of its own."""

    def within(values: npt.NDArray[np.int64], low: int, high: int) -> bool:
        return values.size == 0 or bool((values >= low).all() and (values < high).all())

    levels, rows = len(config.timeframes), config.rows_per_symbol
    kind, owner, count = slot_i[:, k.KIND], slot_i[:, k.OWNER], slot_i[:, k.ID_COUNT]
    never = int(k.MAX64) + 1
    times = MAX_TIME_US + 2 * config.timeframe_us[-1] + config.max_future_us
    lengths = np.array(config.timeframe_us, np.int64)
    nexts = slot_i[:, k.SLOT_INTS : k.SLOT_INTS + levels]
    opens = hot_i[:, k.OPEN]
    fine = (
        within(kind, 0, 3)
        and within(owner, 0, max(slots, 1))
        and bool((kind[owner[kind == k.LANE]] == k.MAIN).all())
        and bool((owner[kind == k.MAIN] == np.flatnonzero(kind == k.MAIN)).all())
        and within(count, 0, config.id_intervals + 1)
        and int(count.sum()) == intervals
        and bool((slot_i[:, k.EXT_AT] >= -1).all() and (slot_i[:, k.EXT_AT] < np.maximum(count, 1)).all())
        and within(opens, 0, times)
        and bool((opens % lengths[0] == 0).all())
        and within(nexts, 0, times)
        and bool((nexts % lengths == 0).all())
        and within(slot_i[:, k.SLOT_INTS + levels : k.SLOT_INTS + 2 * levels], 0, config.max_flat_bars + 2)
        and within(slot_i[:, k.SLOT_INTS + 2 * levels :], 0, never)
        and within(slot_i[:, [k.COVERED_FROM, k.GAP_FROM, k.GAP_TO, k.REV_FROM, k.LANE_LO, k.LANE_HI]], 0, never)
        and within(slot_i[:, k.REV_LISTED], 0, 1)
        and within(slot_i[:, k.WHEEL_NEXT], -1, max(slots, 1))
        and within(hot_i[:, k.LIVE_STATE], 0, 5)
        and within(hot_i[:, k.LIVE_AT], -never, never)
        and within(wheel, -1, max(slots, 1))
        and within(bar_at, 0, max(slots * rows, 1))
        and bool((np.diff(bar_at) > 0).all())
        and within(bar_i[:, k.OPEN], 0, times)
    )
    if not fine or not _places_match(config, hot_i, bar_at, bar_i) or not _wheel_ends(slot_i, wheel):
        raise SnapshotError("This bar state contradicts itself.")


def _places_match(config: BarConfig, hot_i: npt.NDArray[np.int64], bar_at: npt.NDArray[np.int64], bar_i: npt.NDArray[np.int64]) -> bool:
    """Whether each sealed bar lies where its open time puts it, and open bars of all levels lie around the same time."""
    levels, rows = len(config.timeframes), config.rows_per_symbol
    slot, place = np.divmod(bar_at, rows)
    at = levels
    for level, (length, ring) in enumerate(zip(config.timeframe_us, config.ring_sizes, strict=True)):
        mine = (place >= at) & (place < at + ring)
        opens = bar_i[mine, k.OPEN]
        if not bool(((opens % length == 0) & (opens // length % ring == place[mine] - at)).all()):
            return False
        at += ring
        mine = place == level
        current = hot_i[slot[mine], k.OPEN]
        if level and not bool((bar_i[mine, k.OPEN] == current - current % length).all()):
            return False
    return not bool((place == 0).any())


def _wheel_ends(slot_i: npt.NDArray[np.int64], wheel: npt.NDArray[np.int64]) -> bool:
    """Whether the lists of the wheel are disjoint and end."""
    seen: set[int] = set()
    following = slot_i[:, k.WHEEL_NEXT]
    for first in wheel.tolist():
        slot = first
        while slot >= 0:
            if slot in seen:
                return False
            seen.add(slot)
            slot = int(following[slot])
    return True
