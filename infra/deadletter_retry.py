"""What trying a dead letter again means, by the kind it is of: a letter in; records to publish and stretches of bars to make anew, out.

- record of a topic that could not be decoded: read again with the schemas known now. Trades go out as trades of the past (flag HISTORY),
  as their bars were closed without them; bars are made anew; records of other topics are published again to their partition, without
  rows that newer ones have replaced
- message of a venue: through the venue's mapper, its trades go out as trades of the past, their ids in the numbering that the collector gave
  those of their time; the ledger is not touched
- trade that the worker refused as too late: it is stored, so only its bars are made anew
- line of a replayed file: through the layout of that file, its trade goes out as one of the past

Everything that changes the past ends in a job of the repair. Nothing here sends, so the same letter gives the same plan.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from collectors.dedupe import base_of
from infra.deadletter_sources import RefusedError, Rows, StillBadError, rows_of_line, rows_of_message
from infra.registry_client import RegistryClient
from infra.repair_jobs import Wanted
from schemas.codec import FrameCodec, RowCodec, decode_learning
from schemas.errors import DecodeError, SchemaError, UnknownSchemaError
from schemas.frames import GAP_FILLED, GAP_UNFILLABLE, HISTORY, Frame
from schemas.partitions import partition_of
from schemas.symbols import Instrument, check_exchange, check_symbol, parse_key
from schemas.timeframes import MAX_TIME_US, MIN_TIME_US
from schemas.topics import TOPICS

UNDECODABLE: Final = "undecodable_frame"
_REPAIRABLE: Final = frozenset({"too_late", "too_many_symbols"})
"""What the worker refuses although the trade is good: it is stored, and the repair puts it into its bars."""
SUPERSEDED_BY: Final[Mapping[str, tuple[str, ...]]] = {
    "gaps": ("exchange", "symbol", "channel", "gap_id"),
    "quarantine": ("exchange", "symbol", "trade_id"),
}
"""Topics of which one row of a key is valid, of equals the newest: publishing an old one again must not bring back what is over."""

ReadRecord = Callable[[str, int, int], bytes | None]
"""``(topic, partition, offset) -> value``; None when the topic does not hold it any more."""
NewerRows = Callable[[str, int, int, Frame], np.ndarray[Any, Any]]
"""``(topic, partition, offset, frame) -> bool per row``: which have a newer row of their key stored."""
StoredIds = Callable[[str, int], tuple[int, int]]
"""``(exchange:symbol, time) -> ids`` of the stored trades before and from that time on; -1 where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Send:
    """One record to publish."""

    topic: str
    partition: int
    value: bytes
    key: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a retry does."""

    records: tuple[Send, ...] = ()
    repairs: tuple[Wanted, ...] = ()
    what: str
    """One sentence for the record."""


@dataclass(kw_only=True, slots=True)
class Planner:
    """Makes plans. Blocking: asks the registry and, for long letters, the topic."""

    registry: RegistryClient
    partitions: int
    symbols: Mapping[str, Collection[str]]
    """Canonical symbols by exchange that a message may be of."""
    read_record: ReadRecord
    newer_rows: NewerRows
    stored_ids: StoredIds
    now_us: int
    _codecs: dict[str, FrameCodec | RowCodec] = field(default_factory=dict)

    def plan(self, letter: Mapping[str, Any]) -> Plan:
        """The plan for a letter with its bytes. Raises RefusedError, StillBadError; UnreachableError."""
        if letter["reason"] == UNDECODABLE and letter["topic"]:
            return self._record(letter, self._original(letter))
        if letter["component"] == "worker":
            return self._refused_trade(letter)
        if letter["topic"]:
            raise RefusedError(f"Letters of reason '{letter['reason']}' by '{letter['component']}' cannot be tried again: drop it.")
        raw = base64.b64decode(letter["raw_base64"])
        if len(raw) < letter["raw_size"]:
            raise RefusedError(
                f"The letter holds the first {len(raw):,} of {letter['raw_size']:,} bytes, and the rest is nowhere: drop it."
            )
        if letter["component"] == "replay":
            rows = rows_of_line(_instrument(letter["exchange"], letter["symbol"]), letter["place"], raw)
        else:
            known = self.symbols.get(letter["exchange"], ())
            rows = self._numbered(rows_of_message(letter["exchange"], raw, known, letter["time_us"], self.now_us))
        return self._history(letter, rows)

    # Kinds.

    def _record(self, letter: Mapping[str, Any], value: bytes) -> Plan:
        topic = letter["topic"]
        entry = TOPICS.get(topic)
        if entry is None or entry.kind == "raw":
            raise RefusedError(f"Topic '{topic}' holds no frames or rows, so its record cannot be read again: drop the letter.")
        try:
            if entry.kind == "row":
                self._row(topic, value)
                return Plan(records=(self._again(letter, value),), what=f"Published again to {topic}[{letter['partition']}].")
            frame = decode_learning(self._frame_codec(topic), value, self.registry.schema)
        except DecodeError as exc:
            raise StillBadError(UNDECODABLE, str(exc)) from exc
        if topic == "trades":
            return self._trades(letter, frame)
        if topic == "bars":
            wanted = _stretches(frame, frame.columns["open_time_us"], frame.columns["close_time_us"], letter) if frame.row_count else []
            return Plan(
                repairs=tuple(wanted), what=f"Its {frame.row_count} bars are compared with their trades and made anew where they lack."
            )
        return self._rows_that_count(letter, frame, value)

    def _rows_that_count(self, letter: Mapping[str, Any], frame: Frame, value: bytes) -> Plan:
        topic, partition = letter["topic"], letter["partition"]
        over = self.newer_rows(topic, partition, letter["offset"], frame) if topic in SUPERSEDED_BY else np.zeros(frame.row_count, bool)
        if not over.any():
            return Plan(records=(self._again(letter, value),), what=f"Published again to {topic}[{partition}], {frame.row_count} rows.")
        left = replace(frame, columns={name: column[~over] for name, column in frame.columns.items()})
        what = f"{int(over.sum())} of its {frame.row_count} rows have been replaced by newer ones"
        if not left.row_count:
            return Plan(what=f"{what}: nothing is published.")
        encoded = self._frame_codec(topic).encode(left)
        return Plan(records=(self._again(letter, encoded),), what=f"{what}, the others are published again to {topic}[{partition}].")

    def _trades(self, letter: Mapping[str, Any], frame: Frame) -> Plan:
        over = tuple(notice for notice in frame.gaps if notice.state in (GAP_FILLED, GAP_UNFILLABLE))
        if not frame.row_count and not over:
            return Plan(what="It held no trades: nothing is published.")
        times = frame.columns["exchange_time_us"]
        past = replace(frame, source=_source(frame.symbols), flags=HISTORY, gaps=over, input_offset=-1)
        wanted = _stretches(frame, times, times + 1, letter) if frame.row_count else []
        record = Send(topic="trades", partition=letter["partition"], value=self._frame_codec("trades").encode(past))
        return Plan(records=(record,), repairs=tuple(wanted), what=_published(frame.row_count, letter["partition"]))

    def _refused_trade(self, letter: Mapping[str, Any]) -> Plan:
        if letter["reason"] not in _REPAIRABLE:
            raise RefusedError(f"{letter['detail']} No other try makes it a trade that bars can hold: drop the letter.")
        instrument = _instrument(letter["exchange"], letter["symbol"])
        try:
            time_us = int(json.loads(base64.b64decode(letter["raw_base64"]))["exchange_time_us"])
        except (ValueError, KeyError, TypeError) as exc:
            raise RefusedError("The letter does not hold its trade as JSON, so its bars are not known: drop it.") from exc
        wanted = _wanted(letter, instrument, time_us, time_us + 1)
        return Plan(repairs=tuple(wanted), what=f"The trade is stored; the bars of {instrument.key} that it belongs to are made anew.")

    def _history(self, letter: Mapping[str, Any], rows: Rows) -> Plan:
        """Trades of a message or a line, a frame a partition."""
        if not rows.count:
            return Plan(what="It is understood now and holds no trade: nothing is published.")
        records, wanted = [], list[Wanted]()
        codes = rows.columns["symbol_code"]
        for code in np.unique(codes).tolist():
            mine = codes == code
            columns = {name: column[mine] for name, column in rows.columns.items()}
            columns["symbol_code"] = np.zeros(len(columns["trade_id"]), np.int32)
            key, times = rows.keys[code], columns["exchange_time_us"]
            frame = Frame(source=_source((key,)), watermark_us=int(times.min()), symbols=(key,), columns=columns, flags=HISTORY)
            place = partition_of(key, self.partitions)
            records.append(Send(topic="trades", partition=place, value=self._frame_codec("trades").encode(frame)))
            wanted += _stretches(frame, times, times + 1, letter)
        return Plan(records=tuple(records), repairs=tuple(wanted), what=_published(rows.count, records[0].partition))

    # Parts.

    def _numbered(self, rows: Rows) -> Rows:
        """The rows with ids as the collector publishes them, see ``collectors.dedupe.NUMBERING``."""
        ids, codes, times = rows.columns["trade_id"].copy(), rows.columns["symbol_code"], rows.columns["exchange_time_us"]
        for code in np.unique(codes).tolist():
            first = int(np.flatnonzero(codes == code)[0])
            before, after = self.stored_ids(rows.keys[code], int(times[first]))
            base, following = base_of(max(before, 0)), base_of(max(after, 0))
            if before < 0 or (int(ids[first]) + base < before and following > base):  # else ids ascend with time
                base = following
            ids[codes == code] += base
        return replace(rows, columns={**rows.columns, "trade_id": ids})

    def _original(self, letter: Mapping[str, Any]) -> bytes:
        raw = base64.b64decode(letter["raw_base64"])
        if len(raw) >= letter["raw_size"]:
            return raw
        whole = self.read_record(letter["topic"], letter["partition"], letter["offset"])
        if whole is None:
            where = f"{letter['topic']}[{letter['partition']}]@{letter['offset']}"
            raise RefusedError(
                f"The letter holds the first {len(raw):,} of {letter['raw_size']:,} bytes and {where} is not there any more: drop it."
            )
        return whole

    def _again(self, letter: Mapping[str, Any], value: bytes) -> Send:
        return Send(topic=letter["topic"], partition=letter["partition"], value=value)

    def _frame_codec(self, topic: str) -> FrameCodec:
        if topic not in self._codecs:
            self._codecs[topic] = self.registry.frame_codec(topic)
        codec = self._codecs[topic]
        assert isinstance(codec, FrameCodec)
        return codec

    def _row(self, topic: str, value: bytes) -> None:
        """Raises DecodeError when it still cannot be read."""
        if topic not in self._codecs:
            self._codecs[topic] = self.registry.row_codec(topic)
        codec = self._codecs[topic]
        try:
            codec.decode(value)
        except UnknownSchemaError as unknown:
            try:
                codec.add_writer(unknown.schema_id, self.registry.schema(unknown.schema_id))
            except KeyError:
                raise DecodeError(f"The schema registry has no schema with id {unknown.schema_id}.") from unknown
            codec.decode(value)


def _source(keys: Sequence[str]) -> str:
    """``binance/retry``: of no collector, so that none takes it for its own when it resumes."""
    return f"{keys[0].partition(':')[0]}/retry" if keys else "retry"


def _published(count: int, partition: int) -> str:
    return f"{count} trade{'s' * (count != 1)} published as of the past to trades[{partition}]; bars they belong to are made anew."


def _stretches(frame: Frame, starts: Any, ends: Any, letter: Mapping[str, Any]) -> list[Wanted]:
    """A job a symbol of the frame, over all its rows."""
    codes, found = frame.columns["symbol_code"], list[Wanted]()
    for code in np.unique(codes).tolist():
        mine = codes == code
        try:
            instrument = parse_key(frame.symbols[code])
            check_exchange(instrument.exchange)
            check_symbol(instrument.symbol)
        except SchemaError as exc:
            raise RefusedError(f"The record names a market that cannot be: {exc} Drop the letter.") from exc
        found += _wanted(letter, instrument, int(starts[mine].min()), int(ends[mine].max()))
    return found


def _wanted(letter: Mapping[str, Any], instrument: Instrument, start_us: int, end_us: int) -> list[Wanted]:
    if not MIN_TIME_US <= start_us < end_us <= MAX_TIME_US:
        raise RefusedError(f"Its time ({start_us} us) is none between 2009 and 2100, so it belongs to no bar: drop the letter.")
    reason = "too_late" if letter["reason"] == "too_late" else "request"
    trigger = f"deadletter/0/{letter['id']}/retry"
    return [
        Wanted(exchange=instrument.exchange, symbol=instrument.symbol, start_us=start_us, end_us=end_us, reason=reason, trigger=trigger)
    ]


def _instrument(exchange: str, symbol: str) -> Instrument:
    try:
        return Instrument(check_exchange(exchange), check_symbol(symbol))
    except SchemaError as exc:
        raise RefusedError(f"The letter names no market: {exc} Drop it.") from exc
