"""Settings and state of tick, volume, dollar and imbalance bars: arrays and symbols in, bytes out, and back.

Bytes that are damaged, of another version, made with other settings, or that no input could have led to are refused.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from processors import _alternative_kernel as k
from processors.errors import BarConfigError, SnapshotConfigError, SnapshotError
from schemas.errors import VocabularyError
from schemas.timeframes import MAX_TIME_US, MIN_TIME_US

Kind = Literal["tick", "volume", "dollar", "tick_imbalance", "volume_imbalance", "dollar_imbalance"]
KINDS: Final[tuple[Kind, ...]] = ("tick", "volume", "dollar", "tick_imbalance", "volume_imbalance", "dollar_imbalance")
SIGNS: Final = ("side", "tick_rule")
_HEADER: Final = struct.Struct("<6sHII")
_MAGIC: Final = b"MSALT\x00"
_VERSION: Final = 2

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class AlternativeBarConfig:
    """Settings of one kind of bars; part of the state."""

    kind: Kind
    threshold: float = 0.0
    """Trades, base units or quote units of a bar; not used by imbalance bars. 0: only symbols in ``thresholds`` have bars."""
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
        object.__setattr__(self, "thresholds", {str(key): float(value) for key, value in self.thresholds.items()})
        if self.kind not in KINDS:
            raise VocabularyError("kind of bars", self.kind, KINDS)
        if self.sign not in SIGNS:
            raise VocabularyError("sign of trades", self.sign, SIGNS)
        if not 1 <= self.min_ticks <= self.initial_ticks <= self.max_ticks:
            raise BarConfigError(
                f"min_ticks {self.min_ticks}, initial_ticks {self.initial_ticks} and max_ticks {self.max_ticks} must be in this order, from 1 on."
            )
        self._check_thresholds()
        if self.span < 1 or not 0.0 <= self.min_imbalance <= 1.0 or self.max_symbols < 1:
            raise BarConfigError("span and max_symbols must be at least 1, min_imbalance between 0 and 1.")

    def _check_thresholds(self) -> None:
        if self.is_imbalance:
            for key, value in self.thresholds.items():
                if not self.min_ticks <= value <= self.max_ticks:
                    raise BarConfigError(f"The initial_ticks of {key} are {value}: they must lie between min_ticks and max_ticks.")
            return
        if not self.thresholds or self.threshold != 0.0:
            _check_threshold(self.kind, "threshold", self.threshold)
        for key, value in self.thresholds.items():
            _check_threshold(self.kind, key, value)

    @property
    def is_imbalance(self) -> bool:
        """Whether these are imbalance bars."""
        return self.kind.endswith("imbalance")

    def threshold_of(self, key: str) -> float:
        """Threshold (or initial trades) of a symbol; 0 where there is none."""
        return float(self.thresholds.get(key, self.initial_ticks if self.is_imbalance else self.threshold))


def _check_threshold(kind: str, name: str, value: float) -> None:
    if not 0.0 < value < float("inf"):
        raise BarConfigError(f"The threshold of {kind} bars ({name}) is {value}: it must be above 0 and finite.")


def _config_id(config: AlternativeBarConfig) -> str:
    """The settings as text; equal settings give equal text, 7 and 7.0 too."""
    values = {each.name: getattr(config, each.name) for each in fields(config)}
    return json.dumps({name: float(value) if isinstance(value, int | float) else value for name, value in values.items()}, sort_keys=True)


def pack(config: AlternativeBarConfig, symbols: list[str], ints: Ints, floats: Floats) -> bytes:
    """The state of ``symbols``, one row of ``ints`` and ``floats`` each, as bytes: header, JSON, both arrays."""
    head = json.dumps({"config": _config_id(config), "symbols": symbols}, sort_keys=True).encode()
    body = head + ints.tobytes() + floats.tobytes()
    return _HEADER.pack(_MAGIC, _VERSION, zlib.crc32(body), len(head)) + body


def unpack(config: AlternativeBarConfig, data: bytes) -> tuple[list[str], Ints, Floats]:
    """Symbols, integers and floats that :func:`pack` was given. Raises SnapshotError, and SnapshotConfigError for other settings."""
    if len(data) < _HEADER.size:
        raise SnapshotError(f"A bar state of {len(data)} bytes is cut off.")
    magic, version, checksum, length = _HEADER.unpack_from(data)
    body = memoryview(data)[_HEADER.size :]
    if magic != _MAGIC or version != _VERSION or zlib.crc32(body) != checksum or length > len(body):
        raise SnapshotError(f"These {len(data)} bytes are no whole state of alternative bars of version {_VERSION}.")
    symbols = _head(config, bytes(body[:length]))
    count = len(symbols)
    if count > config.max_symbols or len(set(symbols)) != count or len(body) - length != 8 * count * (k.STATE_INTS + k.STATE_FLOATS):
        raise SnapshotError("The symbols of this state do not fit its arrays or its settings.")
    ints = np.frombuffer(body, np.int64, count * k.STATE_INTS, length).reshape(count, k.STATE_INTS)
    floats = np.frombuffer(body, np.float64, count * k.STATE_FLOATS, length + ints.nbytes).reshape(count, k.STATE_FLOATS)
    wanted = np.array([config.threshold_of(key) for key in symbols], np.float64)
    fine = _possible_ints(ints) & np.isfinite(floats).all(axis=1)
    if fine.all():
        with np.errstate(over="ignore"):  # damaged numbers may be huge; infinite is impossible too
            fine &= _possible_prices(floats) & _possible_progress(config, ints, floats, wanted)
    if not fine.all():
        raise SnapshotError(f"The state of {symbols[int(np.argmin(fine))]} contradicts itself: start empty and replay the topic.")
    return symbols, ints, floats


def _head(config: AlternativeBarConfig, data: bytes) -> list[str]:
    try:
        head = json.loads(data)
        symbols, of_config = head["symbols"], head["config"]
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise SnapshotError("The head of this state cannot be read.") from exc
    if of_config != _config_id(config):
        raise SnapshotConfigError("This state was made with other settings: restore them, or start empty and replay the topic.")
    if not isinstance(symbols, list) or not all(isinstance(key, str) for key in symbols):
        raise SnapshotError("The head of this state cannot be read.")
    return symbols


def _possible_ints(ints: Ints) -> Bools:
    """Which rows the kernel could have written. Every symbol in a state has had a trade."""
    last, known, number, count = (ints[:, at] for at in (k.LAST_SEEN, k.KNOWN_FROM, k.NUMBER, k.COUNT))
    fine = (last < int(k.MAX64)) & (known >= 0) & (known <= last) & (ints[:, k.FIRST_ID] >= 0) & (ints[:, k.FIRST_ID] <= last)
    fine &= (number >= 0) & (number <= last) & (count >= 0) & (count <= last - ints[:, k.FIRST_ID] + 1) & (number + count > 0)
    for at, low in ((k.OPEN_T, MIN_TIME_US), (k.CLOSE_T, MIN_TIME_US), (k.RECV, 0)):
        fine &= (ints[:, at] >= low) & (ints[:, at] < MAX_TIME_US)
    fine &= (abs(ints[:, k.SIGN]) == 1) & (ints[:, k.SOURCE] >= 0)
    for at in (k.ENDED, k.GAP):
        fine &= (ints[:, at] == 0) | ((ints[:, at] == 1) & (count > 0))
    holes = ints[:, k.HOLES]
    fine &= (holes >= 0) & (holes <= k.MAX_HOLES)
    before: Ints = known - 1
    for hole in range(k.MAX_HOLES):
        first, until = ints[:, k.HOLE + 2 * hole], ints[:, k.HOLE + 2 * hole + 1]
        fine &= np.where(holes > hole, (first > before + 1) & (first <= until) & (until < last), (first == 0) & (until == 0))
        before = until
    return fine


def _possible_prices(floats: Floats) -> Bools:
    opened, high, low, close = (floats[:, at] for at in (k.OPEN, k.HIGH, k.LOW, k.CLOSE))
    fine: Bools = (low > 0.0) & (high < k.MAX_VALUE) & (low <= np.minimum(opened, close)) & (np.maximum(opened, close) <= high)
    fine &= (floats[:, [k.VH, k.QH, k.BH, k.ABS, k.E_ABS]] >= 0.0).all(axis=1)
    return fine


def _possible_progress(config: AlternativeBarConfig, ints: Ints, floats: Floats, wanted: Floats) -> Bools:
    """Which rows have the threshold that their settings or expectations give, and an open bar that has not reached it."""
    count, threshold = ints[:, k.COUNT], floats[:, k.THRESHOLD]
    if not config.is_imbalance:
        progress = floats[:, k.AH] + floats[:, k.AL]
        fine: Bools = (threshold == wanted) & (threshold > 0.0) & (progress >= 0.0) & (progress < threshold)
        return fine
    ticks, flow, absolute = floats[:, k.E_TICKS], floats[:, k.E_FLOW], floats[:, k.E_ABS]
    fine = (ticks >= config.min_ticks) & (ticks <= config.max_ticks) & (count < config.max_ticks)
    first = (ticks == wanted) & (threshold == 0.0) & (count < wanted)
    fine &= np.where(ints[:, k.NUMBER] == 0, first, threshold == ticks * np.maximum(abs(flow), config.min_imbalance * absolute))
    return fine
