"""The bar processor of one Kafka partition: ``(offset, record bytes) -> records to send``, no Kafka and no clock in sight.

Comes in: records of ``trades``. Goes out: one ``bars`` frame for each input record (empty when it closed and changed nothing, so that its
watermark and its ``input_offset`` travel on), a ``bars.rows`` record for each final bar, a ``deadletter`` for each row or record refused.
Bars that touch a gap which the collectors tell of (``Frame.gaps``) are published with ``complete`` 0. Frames flagged HISTORY make no bars here:
the repair makes those of the past anew.

The Faust agent (``streams.app``) and the plain loop (``streams.plain_loop``) both run this; a test compares their bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy.typing as npt

from processors.bars import REJECT_REASONS, BarBatches, BarConfig, BarEngine
from processors.gap_book import GapBook
from schemas.codec import FrameCodec, RowCodec, decode_learning
from schemas.errors import DecodeError
from schemas.frames import HISTORY, Frame
from schemas.symbols import SIDE_NAMES, parse_key
from schemas.timeframes import US_PER_SECOND
from streams.deadletters import dead_letter
from streams.errors import StateError
from streams.records import OutRecord
from streams.row_twin import RowTwin
from streams.shard_state import pack_state, unpack_state

COMPONENT: Final = "worker"
_PENDING_US: Final = 60 * US_PER_SECOND
"""Bars may wait this much longer than their length and the revision window for their last publication (the rings of the bar engine)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BarCodecs:
    """Codecs of the four topics the processor touches, and how to learn a schema it has not seen.

    ``fetch_schema(schema_id) -> text`` raises KeyError when the registry has none; it may block, which happens once a new schema.
    """

    trades: FrameCodec
    bars: FrameCodec
    rows: RowCodec
    deadletter: RowCodec
    fetch_schema: Callable[[int], str]


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
        applied_offset: int = -1,
        emitted_offset: int = -1,
    ) -> None:
        self.partition = partition
        self.applied_offset = applied_offset
        self.emitted_offset = emitted_offset
        self.trade_count = 0
        """Rows accepted since this shard was made, for metrics."""
        self._codecs = codecs
        self._twin = RowTwin(codecs.rows)
        self._live_interval_us = config.live_interval_us
        self._engine = engine if engine is not None else BarEngine(config)
        self._gaps = gaps if gaps is not None else GapBook(_reach_us(config))

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
        if frame.flags & HISTORY:
            return [], None
        batches = self._engine.process(frame)
        self.trade_count += batches.accepted
        batches.bars["complete"] = self._gaps.complete(batches.symbols, batches.bars)
        return self._rejected(offset, frame, batches) if len(batches.rejected["row"]) else [], batches

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
        return pack_state(self.partition, self.applied_offset, sections)

    @classmethod
    def restore(cls, partition: int, config: BarConfig, codecs: BarCodecs, data: bytes, *, emitted_offset: int = -1) -> BarShard:
        """The shard that :meth:`snapshot` was taken of, also by release 0.1. Raises StateError for bytes that are no state of this partition."""
        state = unpack_state(partition, data)
        try:
            engine = BarEngine.restore(config, state.sections.get("engine", b""))
            gaps = GapBook.from_state(_reach_us(config), json.loads(state.sections.get("gaps", b"[]")))
        except (ValueError, TypeError) as exc:
            raise StateError(f"The bar state of partition {partition} cannot be used: {exc}") from exc
        return cls(partition, config, codecs, engine=engine, gaps=gaps, applied_offset=state.applied_offset, emitted_offset=emitted_offset)

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

    def _rejected(self, offset: int, frame: Frame, batches: BarBatches) -> list[OutRecord]:
        records = []
        columns = frame.columns
        for row, reason in zip(batches.rejected["row"].tolist(), batches.rejected["reason"].tolist(), strict=True):
            instrument = parse_key(frame.symbols[columns["symbol_code"][row]])
            trade = {name: column[row].item() for name, column in columns.items() if name != "symbol_code"}
            trade["side"] = SIDE_NAMES.get(trade["side"], trade["side"])
            code, detail = REJECT_REASONS[reason]
            letter = dead_letter(
                reason=code,
                detail=f"{detail} The trade is stored; it is missing in the bars of {instrument.key}.",
                component=COMPONENT,
                raw=json.dumps({"source": frame.source, "key": instrument.key, **trade}).encode(),
                time_us=trade["receive_time_us"],
                exchange=instrument.exchange,
                symbol=instrument.symbol,
                topic="trades",
                partition=self.partition,
                offset=offset,
                place=f"row {row}",
            )
            records.append(OutRecord("deadletter", 0, instrument.key.encode(), self._codecs.deadletter.encode(letter)))
        return records


def _reach_us(config: BarConfig) -> int:
    """How far behind the watermark the oldest bar may open that can still be published."""
    return config.timeframe_us[-1] + config.revision_window_us + _PENDING_US


def _final_rows(bars: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    final = bars["is_final"] == 1
    return {name: column[final] for name, column in bars.items()}
