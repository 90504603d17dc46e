"""Dead letters of trades that the bar engine refused: a frame, what was refused of it and where that stood in; one letter a trade out."""

from __future__ import annotations

import json
from collections.abc import Callable

from processors.bars import REJECT_REASONS, BarBatches
from schemas.codec import RowCodec
from schemas.frames import Frame
from schemas.symbols import SIDE_NAMES, Instrument
from streams.deadletters import dead_letter
from streams.records import OutRecord


def refused_trades(
    codec: RowCodec, component: str, partition: int, offset: int, frame: Frame, batches: BarBatches, place: Callable[[int], str]
) -> list[OutRecord]:
    """A letter for each row of ``frame`` that is in ``batches.rejected``; ``place(row)`` says where the row stood in its record."""
    records = []
    columns = frame.columns
    for row, reason in zip(batches.rejected["row"].tolist(), batches.rejected["reason"].tolist(), strict=True):
        instrument = _instrument(frame.symbols[columns["symbol_code"][row]])
        trade = {name: column[row].item() for name, column in columns.items() if name != "symbol_code"}
        trade["side"] = SIDE_NAMES.get(trade["side"], trade["side"])
        code, detail = REJECT_REASONS[reason]
        letter = dead_letter(
            reason=code,
            detail=f"{detail} The trade is stored; it is missing in the bars of {instrument.key}.",
            component=component,
            raw=json.dumps({"source": frame.source, "key": instrument.key, **trade}).encode(),
            time_us=trade["receive_time_us"],
            exchange=instrument.exchange,
            symbol=instrument.symbol,
            topic="trades",
            partition=partition,
            offset=offset,
            place=place(row),
        )
        records.append(OutRecord("deadletter", 0, instrument.key.encode(), codec.encode(letter)))
    return records


def _instrument(key: str) -> Instrument:
    """The market of a key as far as it names one: a frame with a key that is none must not stop the partition."""
    exchange, _, symbol = key.partition(":")
    return Instrument(exchange, symbol)
