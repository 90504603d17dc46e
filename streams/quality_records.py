"""Records of the data quality topics: a verdict or scores in, one ``quarantine`` or ``quality`` record out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from processors.quality import CONFIRMED, HELD, Suspect, Verdict
from schemas.codec import FrameCodec
from schemas.frames import Frame
from streams.records import OutRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityCodecs:
    """Codecs of the topics that the checks write to."""

    quality: FrameCodec
    quarantine: FrameCodec


def suspects_frame(
    codec: FrameCodec, rows: Sequence[tuple[Suspect, int]], *, source: str, watermark_us: int = 0, input_offset: int = -1
) -> Frame:
    """A ``quarantine`` frame of (suspect, state), in their order. All of one partition."""
    code_of: dict[str, int] = {}
    codes = [code_of.setdefault(suspect.key, len(code_of)) for suspect, _ in rows]
    columns: dict[str, npt.NDArray[Any]] = {"symbol_code": np.array(codes, np.int32)}
    for name, dtype in codec.dtypes.items():
        if name == "state":
            columns[name] = np.array([state for _, state in rows], dtype)
        elif name != "symbol_code":
            columns[name] = np.array([getattr(suspect, name) for suspect, _ in rows], dtype)
    return Frame(source=source, watermark_us=watermark_us, symbols=tuple(code_of), columns=columns, input_offset=input_offset)


def quarantine_record(codec: FrameCodec, partition: int, offset: int, frame: Frame, verdict: Verdict) -> OutRecord:
    """What became of suspects with the ``trades`` frame at ``offset``: those held in it, then those released in it."""
    rows = [(suspect, HELD) for suspect in verdict.held] + [(suspect, CONFIRMED) for suspect in verdict.confirmed]
    told = suspects_frame(codec, rows, source=frame.source, watermark_us=frame.watermark_us, input_offset=offset)
    return OutRecord("quarantine", partition, None, codec.encode(told))


def quality_record(
    codec: FrameCodec, partition: int, offset: int, frame: Frame, symbols: tuple[str, ...], columns: dict[str, npt.NDArray[Any]]
) -> OutRecord:
    """Scores of the symbols of the source of the ``trades`` frame at ``offset``."""
    told = Frame(source=frame.source, watermark_us=frame.watermark_us, symbols=symbols, columns=columns, input_offset=offset)
    return OutRecord("quality", partition, None, codec.encode(told))
