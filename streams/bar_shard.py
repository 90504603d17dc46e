"""The bar processor of one Kafka partition: ``(offset, record bytes) -> records to send``, no Kafka and no clock in sight.

Comes in: records of ``trades``. Goes out: one ``bars`` frame for each input record (empty when it closed and changed nothing, so that its
watermark and its ``input_offset`` travel on), a ``bars.rows`` record for each final bar, a ``deadletter`` for each row or record refused.
Bars that touch a gap which the collectors tell of (``Frame.gaps``) are published with ``complete`` 0. Frames flagged HISTORY make no bars here:
the repair makes those of the past anew. Suspect trades are held back before the bars (``processors.quality``) and told of in ``quarantine``;
``quality`` gets a score per symbol and source every ten seconds of event time.

The Faust agent (``streams.app``) and the plain loop (``streams.plain_loop``) both run this; a test compares their bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from processors.bars import BarBatches, BarConfig, BarEngine
from processors.gap_book import GapBook
from processors.held_book import HeldBook
from processors.quality import QualityGate, Verdict
from processors.quality_config import QualityConfig
from schemas.codec import FrameCodec, RowCodec, decode_learning
from schemas.errors import DecodeError
from schemas.frames import HISTORY, Frame
from schemas.timeframes import US_PER_SECOND
from streams.deadletters import dead_letter
from streams.errors import StateError
from streams.quality_records import QualityCodecs, quality_record, quarantine_record
from streams.records import OutRecord
from streams.refused_trades import refused_trades
from streams.row_twin import RowTwin
from streams.shard_state import pack_state, unpack_state

Rows = npt.NDArray[np.int64]
COMPONENT: Final = "worker"
_PENDING_US: Final = 60 * US_PER_SECOND
"""Bars may wait this much longer than their length and the revision window for their last publication (the rings of the bar engine)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BarCodecs:
    """Codecs of the topics the processor touches, and how to learn a schema it has not seen.

    ``fetch_schema(schema_id) -> text`` raises KeyError when the registry has none; it may block, which happens once a new schema. Without
    ``quality`` trades are not checked: every one that the bar engine takes is in the bars.
    """

    trades: FrameCodec
    bars: FrameCodec
    rows: RowCodec
    deadletter: RowCodec
    fetch_schema: Callable[[int], str]
    quality: QualityCodecs | None = None


class BarShard:
    """State and processing of one partition.

    Args:
        partition: Kafka partition of ``trades``; outputs go to the same one.
        applied_offset: offset of the last record the state covers, -1 for none.
        emitted_offset: ``input_offset`` of the newest ``bars`` record already in the topic: after a crash the records behind the state
            are processed again and give the same frames; those already sent are not sent twice. Rows of the twin are: it is compacted by key.
    """

    def __init__(
        self,
        partition: int,
        config: BarConfig,
        codecs: BarCodecs,
        *,
        engine: BarEngine | None = None,
        gaps: GapBook | None = None,
        gate: QualityGate | None = None,
        held: HeldBook | None = None,
        applied_offset: int = -1,
        emitted_offset: int = -1,
    ) -> None:
        self.partition = partition
        self.applied_offset = applied_offset
        self.emitted_offset = emitted_offset
        self.trade_count = 0
        """Rows accepted since this shard was made, for metrics."""
        self.held_count = 0
        """Rows held back since this shard was made, for metrics."""
        self._codecs = codecs
        self._twin = RowTwin(codecs.rows)
        self._live_interval_us = config.live_interval_us
        self._engine = engine if engine is not None else BarEngine(config)
        self._gaps = gaps if gaps is not None else GapBook(_reach_us(config))
        self._held = held if held is not None else HeldBook(_reach_us(config))
        self._gate = gate if gate is not None else _gate(config, codecs)

    @property
    def watermark_us(self) -> int:
        """The largest watermark of any source so far, 0 before the first."""
        return self._engine.watermark_us

    def process(self, offset: int, value: bytes) -> list[OutRecord]:
        """Records that follow from the record at ``offset``; [] when the state already covers it.

        Never raises for bad input: what cannot be decoded or used becomes a dead letter and the partition goes on.
        """
        if offset <= self.applied_offset:
            return []
        try:
            frame = decode_learning(self._codecs.trades, value, self._codecs.fetch_schema)
        except DecodeError as exc:
            records = [self._undecodable(offset, value, exc)]
            batches, backlog = None, False
        else:
            records, batches = self._trades(offset, frame)
            backlog = self._is_backlog(frame)
        self.applied_offset = offset
        records += self._bars(offset, batches, backlog=backlog)
        return records

    def _trades(self, offset: int, frame: Frame) -> tuple[list[OutRecord], BarBatches | None]:
        """What follows from a frame but its bars, and its bars; None for trades of the past, whose bars the repair makes."""
        if frame.gaps:
            self._gaps.apply(frame)
        frame, origin = self._without_held(frame)
        verdict = self._gate.check(frame) if self._gate is not None else None
        records: list[OutRecord] = []
        batches = None
        if not frame.flags & HISTORY:
            given = frame if verdict is None else replace(frame, columns=verdict.columns)
            batches = self._engine.process(given)
            self.trade_count += batches.accepted
            if verdict is not None:
                self._note(verdict)
            batches.bars["complete"] = self._gaps.complete(batches.symbols, batches.bars)
            counts = self._held.counts(batches.symbols, batches.bars)
            if counts is not None:
                batches.bars["held_count"] = counts
            if len(batches.rejected["row"]):
                codec, place = self._codecs.deadletter, partial(_place, verdict, origin)
                records = refused_trades(codec, COMPONENT, self.partition, offset, given, batches, place)
        if self._gate is not None:
            records += self._quality(offset, frame, batches, verdict)
        return records, batches

    def _without_held(self, frame: Frame) -> tuple[Frame, Rows | None]:
        """The frame without trades that are held already, and the rows that are left (None: all).

        They come again by a reconnect or a second replay. They are no witnesses of themselves, and another source must not bring them into
        the bars. Trades of the past are not among those that are held here, and are told of each time they are fetched.
        """
        known = self._held.known(frame.symbols, frame.columns)
        if known is None:
            return frame, None
        origin = np.flatnonzero(~known)
        return replace(frame, columns={name: column[origin] for name, column in frame.columns.items()}), origin

    def _note(self, verdict: Verdict) -> None:
        """Remember what is held back from the bars; those of the past are counted by the repair, which makes their bars."""
        for suspect in verdict.held:
            self._held.hold(suspect.key, suspect.trade_id, suspect.exchange_time_us)
        for suspect in verdict.confirmed:
            self._held.release(suspect.key, suspect.trade_id)
        self.held_count += len(verdict.held)

    def _quality(self, offset: int, frame: Frame, batches: BarBatches | None, verdict: Verdict | None) -> list[OutRecord]:
        """Records of ``quarantine`` and ``quality`` that follow from a frame. They are sent again after a crash; the sink knows them."""
        gate, codecs = self._gate, self._codecs.quality
        assert gate is not None and codecs is not None
        records = []
        if verdict is not None and (verdict.held or verdict.confirmed):
            records.append(quarantine_record(codecs.quarantine, self.partition, offset, frame, verdict))
        if batches is not None and len(batches.rejected["row"]):
            gate.refused(frame, batches.rejected, verdict)
        scores = gate.scores(frame)
        if scores is not None:
            records.append(quality_record(codecs.quality, self.partition, offset, frame, *scores))
        return records

    def _is_backlog(self, frame: Frame) -> bool:
        """Whether the frame covers more time than lies between two updates of an open bar.

        Live frames span their linger, 5 to 20 ms. A longer one is a replay or a backlog, where nobody waits for open bars of the past; they
        were 90 % of what a worker sent in catch-up. A function of the frame alone, so a replay gives the same bytes.
        """
        received = frame.columns["receive_time_us"]
        return len(received) > 0 and int(received.max()) - int(received.min()) > self._live_interval_us

    def snapshot(self) -> bytes:
        """The whole state as bytes; the same state gives the same bytes."""
        sections = {"engine": self._engine.snapshot()}
        if len(self._gaps):
            sections["gaps"] = json.dumps(self._gaps.to_state(), separators=(",", ":")).encode()
        if self._gate is not None:
            sections["quality"] = self._gate.snapshot()
        if len(self._held):
            sections["held"] = json.dumps(self._held.to_state(), separators=(",", ":")).encode()
        return pack_state(self.partition, self.applied_offset, sections)

    @classmethod
    def restore(cls, partition: int, config: BarConfig, codecs: BarCodecs, data: bytes, *, emitted_offset: int = -1) -> BarShard:
        """The shard that :meth:`snapshot` was taken of, also by release 0.1. Raises StateError for bytes that are no state of this partition."""
        state = unpack_state(partition, data)
        try:
            engine = BarEngine.restore(config, state.sections.get("engine", b""))
            gaps = GapBook.from_state(_reach_us(config), json.loads(state.sections.get("gaps", b"[]")))
            held = HeldBook.from_state(_reach_us(config), json.loads(state.sections.get("held", b"[]")))
            gate = _gate(config, codecs, state.sections.get("quality", b""))
        except (ValueError, TypeError) as exc:
            raise StateError(f"The bar state of partition {partition} cannot be used: {exc}") from exc
        return cls(
            partition,
            config,
            codecs,
            engine=engine,
            gaps=gaps,
            gate=gate,
            held=held,
            applied_offset=state.applied_offset,
            emitted_offset=emitted_offset,
        )

    def _bars(self, offset: int, batches: BarBatches | None, *, backlog: bool) -> list[OutRecord]:
        records: list[OutRecord] = []
        if batches is not None:
            # Sent again after a crash, same keys and bytes: the broker may have taken the bars of this offset and not yet the twin, as
            # records of two topics overtake each other on their way.
            records = self._twin.records(self.partition, offset, batches.symbols, batches.bars)
        if offset <= self.emitted_offset:
            return records
        if batches is None:
            frame = Frame(source=COMPONENT, watermark_us=self.watermark_us, input_offset=offset)
        else:
            columns = _final_rows(batches.bars) if backlog else batches.bars
            frame = Frame(
                source=COMPONENT, watermark_us=batches.watermark_us, symbols=batches.symbols, columns=columns, input_offset=offset
            )
        records.append(OutRecord("bars", self.partition, None, self._codecs.bars.encode(frame)))
        return records

    def _undecodable(self, offset: int, value: bytes, exc: DecodeError) -> OutRecord:
        row = dead_letter(
            reason="undecodable_frame",
            detail=str(exc),
            component=COMPONENT,
            raw=value,
            time_us=self.watermark_us,
            topic="trades",
            partition=self.partition,
            offset=offset,
        )
        return OutRecord("deadletter", 0, None, self._codecs.deadletter.encode(row))


def _reach_us(config: BarConfig) -> int:
    """How far behind the watermark the oldest bar may open that can still be published."""
    return config.timeframe_us[-1] + config.revision_window_us + _PENDING_US


def _place(verdict: Verdict | None, origin: Rows | None, row: int) -> str:
    """Where a row that the engine was given stands in its record."""
    row = row if verdict is None else int(verdict.rows[row])
    if row < 0:
        return "held in an earlier record"
    return f"row {row if origin is None else origin[row]}"


def _gate(config: BarConfig, codecs: BarCodecs, state: bytes = b"") -> QualityGate | None:
    """The checks, as of ``state``; None when they are switched off."""
    if codecs.quality is None:
        return None
    return QualityGate.restore(state, QualityConfig(max_future_us=config.max_future_us))


def _final_rows(bars: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    final = bars["is_final"] == 1
    return {name: column[final] for name, column in bars.items()}
