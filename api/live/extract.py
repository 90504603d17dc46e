"""Rows of wanted series out of a frame: a frame in, per series its rows in frame order out. Costs per frame, then per wanted row only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from api.live.series import Series
from api.rows import FIELDS
from schemas.frames import Frame
from schemas.timeframes import TIMEFRAMES

Rows = list[tuple[int, tuple[Any, ...]]]
"""(row index in the frame, values in the order of ``api.rows.FIELDS``)."""

_ONE_SYMBOL: Final = 1


def rows_of(frame: Frame, channel: str, wanted: Mapping[str, Mapping[int, Series]]) -> list[tuple[Series, Rows]]:
    """Rows of every wanted series in ``frame``.

    Args:
        frame: of topic ``channel``.
        channel: ``bars`` or ``trades``.
        wanted: instrument key -> timeframe in seconds (0 for trades) -> series.
    """
    hits = {code: wanted[key] for code, key in enumerate(frame.symbols) if key in wanted}
    if not hits or not frame.row_count:
        return []
    codes = frame.columns["symbol_code"]
    if len(hits) == _ONE_SYMBOL:
        mask = codes == next(iter(hits))
    else:
        table = np.zeros(len(frame.symbols), np.bool_)
        table[list(hits)] = True
        mask = table[codes]
    if channel == "bars":
        followed = {timeframe_s for by_timeframe in hits.values() for timeframe_s in by_timeframe}
        if len(followed) < len(TIMEFRAMES):
            mask &= np.isin(frame.columns["timeframe_s"], list(followed))
    index = np.flatnonzero(mask)
    if not len(index):
        return []
    values = zip(*(frame.columns[name][index].tolist() for name in FIELDS[channel]), strict=True)
    found: dict[int, tuple[Series, Rows]] = {}
    timeframes = frame.columns["timeframe_s"][index].tolist() if channel == "bars" else [0] * len(index)
    for place, code, timeframe_s, row in zip(index.tolist(), codes[index].tolist(), timeframes, values, strict=True):
        series = hits[code].get(timeframe_s)
        if series is None:
            continue
        entry = found.get(id(series))
        if entry is None:
            entry = found[id(series)] = (series, [])
        entry[1].append((place, row))
    return list(found.values())
