"""Rows in, frames out: one open buffer per Kafka partition. Pure: time is an argument.

Comes in: columns of rows with ``symbol_code`` of this batcher's own dictionary. Goes out: ``(partition, Frame)``, each with the
source's watermark, and empty frames as heartbeats.

Notices of gaps go with the rows: that one opened in the first frame of its partition, so that it comes no later than the rows after the gap;
what became of it in the last, so that it comes no earlier than the rows that fill it. Rows of the past (``history``) go out first, as frames
of source ``<source>/fill`` that promise nothing.

A row waits at most one linger. The linger is short while things are quiet (latency) and grows with backlog (cost per row falls
with rows per frame: 0.6 / 1.3 / 2.1 M trades/s at 200 / 1,000 / 4,000 rows a frame in a first agent).
Bounded by ``max_pending_rows``; a caller that adds more gets BatcherFullError and must stop reading until it took frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from collectors.errors import BatcherFullError
from collectors.growable import grown
from schemas.frames import GAP_OPEN, HISTORY, Frame, GapNotice, concat_columns
from schemas.partitions import partition_of

Array = np.ndarray[Any, Any]

FILL: Final = "/fill"
"""What is added to a source's name for rows of the past."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatcherConfig:
    """Sizes and waits of frames."""

    partitions: int = 4
    """Partitions of the topic; ``partition_of`` says which one an instrument lives in."""
    linger_min_ms: float = 5.0
    """Wait while quiet."""
    linger_max_ms: float = 20.0
    """Wait under backlog."""
    target_rows: int = 1_000
    """Rows a round beyond which waiting longer makes frames cheaper without being felt."""
    max_rows: int = 4_096
    """Rows of one frame at most."""
    max_bytes: int = 1024 * 1024
    """Bytes of one frame's columns at most."""
    max_pending_rows: int = 262_144
    """Rows that wait in all buffers together at most (14 MB of trades)."""
    heartbeat_ms: float = 500.0
    """A partition that got no frame for this long gets an empty one; the contract asks for one a second."""


class Batcher:
    """Buffers of one source.

    Args:
        source: name of the source in every frame.
        dtypes: columns of the topic, ``symbol_code`` among them; rows must have exactly these.
        config: sizes and waits.
    """

    def __init__(self, source: str, dtypes: Mapping[str, np.dtype[Any]], config: BatcherConfig | None = None) -> None:
        self.source = source
        self.config = config or BatcherConfig()
        self._names = tuple(dtypes)
        row_bytes = sum(dtype.itemsize for dtype in dtypes.values())
        self._frame_rows = max(1, min(self.config.max_rows, self.config.max_bytes // row_bytes))
        self._keys: list[str] = []
        self._codes: dict[str, int] = {}
        self._partition = np.empty(0, np.int32)  # code -> partition
        self._remap = np.empty(0, np.int32)  # scratch: code -> index in the frame's own dictionary
        self._parts: list[list[dict[str, Array]]] = [[] for _ in range(self.config.partitions)]
        self._history: list[list[dict[str, Array]]] = [[] for _ in range(self.config.partitions)]
        self._notices: list[list[GapNotice]] = [[] for _ in range(self.config.partitions)]  # with codes of this batcher's dictionary
        self._sent_us = [0] * self.config.partitions  # partition -> monotonic us of its last frame
        self._promised: list[int | None] = [None] * self.config.partitions  # partition -> watermark of its last frame
        self._linger_us = self.config.linger_min_ms * 1e3
        self.pending_rows = 0

    def code_of(self, key: str) -> int:
        """Code of an instrument key in this batcher's dictionary; a new one for a new key."""
        code = self._codes.get(key)
        if code is None:
            code = self._codes[key] = len(self._keys)
            self._keys.append(key)
            self._partition = grown(self._partition, code + 1, 0)
            self._remap = grown(self._remap, code + 1, 0)
            self._partition[code] = partition_of(key, self.config.partitions)
        return code

    def key_of(self, code: int) -> str:
        """Instrument key of a code."""
        return self._keys[code]

    def partitions_of(self, codes: Array) -> Array:
        """Partition of each code, int32."""
        found: Array = self._partition[codes]
        return found

    @property
    def room(self) -> int:
        """Rows that may still be added."""
        return self.config.max_pending_rows - self.pending_rows

    @property
    def linger_us(self) -> int:
        """How long to wait until the next :meth:`take`, microseconds."""
        return int(self._linger_us)

    def notice(self, notice: GapNotice) -> None:
        """Tell of a gap in the next frame of its symbol's partition; ``symbol_code`` is of this batcher's dictionary."""
        self._notices[int(self._partition[notice.symbol_code])].append(notice)

    def add(self, columns: Mapping[str, Array], *, history: bool = False) -> None:
        """Add rows; order within a symbol is kept. Raises BatcherFullError when more than ``room`` come.

        ``history``: their bars were closed, so they go out as frames of the past.
        """
        parts = self._history if history else self._parts
        codes = columns["symbol_code"]
        rows = len(codes)
        if rows == 0:
            return
        if rows > self.room:
            raise BatcherFullError(self.pending_rows + rows, self.config.max_pending_rows)
        self.pending_rows += rows
        partitions = self._partition[codes]
        first = int(partitions[0])
        if rows == 1 or bool((partitions == first).all()):
            parts[first].append({name: columns[name] for name in self._names})
            return
        order = np.argsort(partitions, kind="stable")
        bounds = np.searchsorted(partitions[order], np.arange(self.config.partitions + 1))
        sorted_columns = {name: columns[name][order] for name in self._names}
        for partition in range(self.config.partitions):
            start, stop = int(bounds[partition]), int(bounds[partition + 1])
            if start < stop:
                parts[partition].append({name: column[start:stop] for name, column in sorted_columns.items()})

    def take(
        self, mono_us: int, watermark_us: int | None, *, sink_behind: bool = False, all_partitions: bool = False
    ) -> list[tuple[int, Frame]]:
        """All rows as frames, and heartbeats for partitions that are due (``all_partitions``: for every one).

        Args:
            mono_us: now.
            watermark_us: "no row older than this will be added"; None while unknown: rows go out with what was promised before.
            sink_behind: the frames taken before are not sent yet; makes the linger grow.
        """
        self._adapt(self.pending_rows, sink_behind)
        frames: list[tuple[int, Frame]] = []
        for partition, parts in enumerate(self._parts):
            if self._history[partition]:
                past, self._history[partition] = self._history[partition], []
                frames.extend((partition, frame) for frame in self._frames_of(concat_columns(past), self.source + FILL, HISTORY))
            if parts or self._notices[partition]:
                self._parts[partition] = []
                frames.extend((partition, frame) for frame in self._build(partition, parts, watermark_us))
                self._sent_us[partition] = mono_us
            elif watermark_us is not None and (all_partitions or mono_us - self._sent_us[partition] >= self.config.heartbeat_ms * 1e3):
                promised = self._promise(partition, watermark_us)
                frames.append((partition, Frame(source=self.source, watermark_us=promised)))
                self._sent_us[partition] = mono_us
        self.pending_rows = 0
        return frames

    def _build(self, partition: int, parts: list[dict[str, Array]], watermark_us: int | None) -> list[Frame]:
        """Frames of a partition's rows and notices, at least one."""
        before = self._promised[partition] or 0  # 0: nothing is promised yet
        # only the last frame may carry the new watermark: the rows of the later ones are still to come
        promised = before if watermark_us is None else self._promise(partition, watermark_us)
        if parts:
            frames = self._frames_of(concat_columns(parts), self.source, 0, before, promised)
        else:
            frames = [Frame(source=self.source, watermark_us=promised)]
        notices, self._notices[partition] = self._notices[partition], []
        if notices:
            frames[0] = self._with_notices(frames[0], [notice for notice in notices if notice.state == GAP_OPEN])
            frames[-1] = self._with_notices(frames[-1], [notice for notice in notices if notice.state != GAP_OPEN])
        return frames

    def _frames_of(self, columns: dict[str, Array], source: str, flags: int, watermark_us: int = 0, last_us: int = 0) -> list[Frame]:
        """Frames of one partition's rows, all with ``watermark_us`` but the last, which has ``last_us``."""
        rows = len(columns["symbol_code"])
        frames = []
        for start in range(0, rows, self._frame_rows):
            stop = min(start + self._frame_rows, rows)
            part = {name: column[start:stop] for name, column in columns.items()} if rows > self._frame_rows else columns
            present = np.flatnonzero(np.bincount(part["symbol_code"]))  # 3 us; np.unique sorts and costs 30
            self._remap[present] = np.arange(len(present), dtype=np.int32)
            part = {**part, "symbol_code": self._remap[part["symbol_code"]]}
            symbols = tuple([self._keys[code] for code in present.tolist()])
            mark_us = last_us if stop == rows else watermark_us
            frames.append(Frame(source=source, watermark_us=mark_us, symbols=symbols, columns=part, flags=flags))
        return frames

    def _with_notices(self, frame: Frame, notices: list[GapNotice]) -> Frame:
        """The frame with these notices after its own, and their symbols in its dictionary."""
        if not notices:
            return frame
        places = {key: place for place, key in enumerate(frame.symbols)}
        told = [notice._replace(symbol_code=places.setdefault(self._keys[notice.symbol_code], len(places))) for notice in notices]
        return replace(frame, symbols=tuple(places), gaps=(*frame.gaps, *told))

    def _promise(self, partition: int, watermark_us: int) -> int:
        before = self._promised[partition]
        promised = watermark_us if before is None else max(before, watermark_us)
        self._promised[partition] = promised
        return promised

    def _adapt(self, rows: int, sink_behind: bool) -> None:
        low, high = self.config.linger_min_ms * 1e3, self.config.linger_max_ms * 1e3
        if sink_behind or rows > self.config.target_rows:
            self._linger_us = min(high, self._linger_us * 1.5)
        else:
            self._linger_us = max(low, self._linger_us * 0.8)
