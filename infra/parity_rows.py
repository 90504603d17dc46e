"""Two frames of bars, row by row: what a run published and what its replay made in; the rows that differ, and in which columns, out. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from schemas.frames import Frame
from schemas.timeframes import NAME_BY_SECONDS, format_time_us

_KEY_COLUMNS = ("timeframe_s", "open_time_us", "revision", "is_final")


class RowKey(NamedTuple):
    """Names one published row of a bar."""

    instrument: str
    """``exchange:symbol``."""
    timeframe_s: int
    open_time_us: int
    revision: int
    is_final: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One thing that is not as it should be."""

    what: str
    """``differs``, ``not in the run``, ``not in the replay``, ``not in ClickHouse``, ``only in ClickHouse``, or a sentence about a record."""
    partition: int
    bars_offset: int
    """Place of the record in ``bars``, -1 where there is none."""
    input_offset: int
    """Place of the trades it came from, -1 for none."""
    key: RowKey | None = None
    columns: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Column -> (as the run published it, as the replay made it)."""

    def value(self) -> dict[str, Any]:
        """For JSON and the certificate."""
        found = asdict(self) | {"key": None}
        if self.key is not None:
            name = NAME_BY_SECONDS.get(self.key.timeframe_s, f"{self.key.timeframe_s}s")
            found["key"] = self.key._asdict() | {"timeframe": name, "open_time": format_time_us(self.key.open_time_us)}
        found["columns"] = {column: list(pair) for column, pair in self.columns.items()}
        return found

    def text(self) -> str:
        """One line for a person."""
        place = f"bars[{self.partition}]@{self.bars_offset}" if self.bars_offset >= 0 else f"trades[{self.partition}]@{self.input_offset}"
        if self.key is None:
            return f"{place}: {self.what}"
        name = NAME_BY_SECONDS.get(self.key.timeframe_s, f"{self.key.timeframe_s}s")
        bar = f"{self.key.instrument} {name} {format_time_us(self.key.open_time_us)[:19]}Z revision {self.key.revision}"
        columns = "; ".join(f"{column}: {live!r} in the run, {again!r} in the replay" for column, (live, again) in self.columns.items())
        return f"{place}: {bar} {self.what}" + (f" ({columns})" if columns else "")


def row_keys(frame: Frame) -> Iterator[RowKey]:
    """The key of every row, in order."""
    if not frame.row_count:
        return
    codes = frame.columns["symbol_code"].tolist()
    for code, *rest in zip(codes, *(frame.columns[name].tolist() for name in _KEY_COLUMNS), strict=True):
        yield RowKey(frame.symbols[code], *rest)


def compare_rows(live: Frame, again: Frame) -> list[tuple[RowKey, str, dict[str, tuple[Any, Any]]]]:
    """Every row that is not the same in both, bit for bit: (key, ``differs | not in the run | not in the replay``, differing columns).

    Rows whose key stands once in each frame and whose bytes are equal are equal; where only their order differs nothing is returned.
    """
    held = {key: row for row, key in enumerate(row_keys(again))}
    found: list[tuple[RowKey, str, dict[str, tuple[Any, Any]]]] = []
    for row, key in enumerate(row_keys(live)):
        other = held.pop(key, None)
        if other is None:
            found.append((key, "not in the replay", {}))
            continue
        columns = {
            name: (column[row].item(), again.columns[name][other].item())
            for name, column in live.columns.items()
            if name != "symbol_code" and column[row].tobytes() != again.columns[name][other].tobytes()
        }
        if columns:
            found.append((key, "differs", columns))
    found += [(key, "not in the run", {}) for key in held]
    return found


def head_difference(live: Frame, again: Frame) -> dict[str, tuple[Any, Any]]:
    """What differs in the heads of two frames: field -> (run, replay)."""
    names = ("source", "watermark_us", "flags", "input_offset")
    return {name: (getattr(live, name), getattr(again, name)) for name in names if getattr(live, name) != getattr(again, name)}
