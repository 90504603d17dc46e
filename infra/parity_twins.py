"""The row twin of ``bars`` beside ``bars``: a partition's frames in, then its records of ``bars.rows``; series whose last word is another, out.

The topic is compacted by series, so a reader is promised one thing: the newest record of a series is the newest row of ``bars``, byte for byte.
For a series the repair published of, that is the newest bar, whatever older ones were made anew. Pure: no Kafka; memory is 500 bytes a series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, NamedTuple

from infra.parity_compare import LiveRecord, Record
from infra.parity_outputs import OutputFindings
from infra.parity_rows import Difference, RowKey
from schemas.timeframes import TIMEFRAME_SECONDS
from streams.row_twin import TOPIC, RowTwin

LATER: Final = "a newer record came after the run, or of trades it had not yet turned into bars"
SENT_AGAIN: Final = "the worker sent its own last word again, after the repair's: it had been restarted"
OVERTAKEN: Final = "the repair told the newest bar again, and a newer one of the worker came in between"
BEFORE: Final = "the repair told the newest bar again, and that is one of before the run"
OTHER_SCHEMA: Final = "same rows, written with the schema of another release"
_REMEMBERED: Final = 3
"""Newest bars before the newest: the sink, from which the repair learns of it, is a second or two behind."""
Decode = Callable[[bytes], dict[str, Any] | None]
"""A record of ``bars.rows`` as a row; None for one that nobody can read."""


@dataclass(slots=True)
class _Series:
    """What ``bars`` has of one series."""

    newest: bytes
    """The newest revision of the newest bar, as its twin writes it."""
    place: tuple[int, int]
    """Its (open, revision)."""
    worker: bytes = b""
    """The row the worker published last."""
    input_offset: int = -1
    """Of that one."""
    ended_by_worker: bool = True
    """The row published last is the worker's."""
    repaired: bool = False
    overtaken: tuple[bytes, ...] = ()
    """Hashes of the newest before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What a comparison has to know of the run."""

    first: int
    """Its trades that it has turned into bars: offsets ``[first, stop)``."""
    stop: int
    until_us: int
    """Records that were published later are no part of the run, unless they are equal."""
    killed: bool
    """It ended without notice: its last records may never have been sent."""
    decode: Decode
    stored: Callable[[bytes], bytes | None]
    """The twin of the newest bar of a series that is stored now; None without one."""


class _Told(NamedTuple):
    """What the topic has of one series."""

    record: Record
    """Its newest."""
    newest: bool
    """The newest bar is among its records."""


class TwinBook:
    """One partition's series.

    Args:
        partition: of both topics.
        twin: writes the twins of rows; one of its own.
        bars_stop: offset after the run's last record of ``bars``.
    """

    def __init__(self, partition: int, twin: RowTwin, bars_stop: int) -> None:
        self.partition = partition
        self._twin = twin
        self._bars_stop = bars_stop
        self._series: dict[bytes, _Series] = {}
        self._newest_input = -1

    def take(self, live: LiveRecord) -> None:
        """One record of ``bars``, in order."""
        frame = live.frame
        if live.offset >= self._bars_stop or 0 <= frame.input_offset <= self._newest_input:
            return  # of another run, or sent twice
        self._newest_input = max(self._newest_input, frame.input_offset)
        if not frame.row_count:
            return
        columns = frame.columns
        final = columns["is_final"] == 1
        if not final.any():
            return
        records = self._twin.records(self.partition, frame.input_offset, frame.symbols, dict(columns))
        places = zip(columns["open_time_us"][final].tolist(), columns["revision"][final].tolist(), strict=True)
        for record, place in zip(records, places, strict=True):
            self._note(record.key or b"", record.value, place, frame.input_offset)

    def _note(self, key: bytes, value: bytes, place: tuple[int, int], input_offset: int) -> None:
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series(value, place)
        elif place >= series.place:
            series.overtaken = (*series.overtaken, _digest(series.newest))[-_REMEMBERED:]
            series.newest, series.place = value, place
        series.ended_by_worker = input_offset >= 0
        if series.ended_by_worker:
            series.worker, series.input_offset = value, input_offset
        else:
            series.repaired = True

    def check(self, records: Iterable[Record], terms: Terms, found: OutputFindings) -> None:
        """Compare the partition's records of ``bars.rows``, from the run's start to now; what is found is added to ``found``."""
        told: dict[bytes, _Told] = {}
        for record in records:
            series = self._series.get(record.key)
            before = told.get(record.key)
            newest = (before is not None and before.newest) or (series is not None and record.value == series.newest)
            told[record.key] = _Told(record, newest)
        found.records += len(self._series)
        for key, series in self._series.items():
            self._judge(key, series, told.pop(key, None), terms, found)
        for key, last in told.items():
            row = terms.decode(last.record.value)
            if row is None:
                self._differ(found, key, last.record, "cannot be read")
                continue
            place = int(row["input_offset"])
            mine = terms.first <= place < terms.stop or (place < 0 and last.record.timestamp_ms * 1000 <= terms.until_us)
            if mine and terms.stored(key) != last.record.value:
                self._differ(found, key, last.record, f"is told of in {TOPIC}, and bars has no such series", row)

    def _judge(self, key: bytes, series: _Series, told: _Told | None, terms: Terms, found: OutputFindings) -> None:
        right = [series.worker] if series.ended_by_worker else []
        right += [series.newest] if series.repaired else []
        if told is None:
            if terms.killed:
                found.pending += 1
            else:
                self._differ(found, key, None, f"has no record in {TOPIC}", terms.decode(series.newest))
            return
        value = told.record.value
        if value in right:
            found.equal += 1
            return
        row = terms.decode(value)
        if row is None:
            self._differ(found, key, told.record, "cannot be read")
            return
        reason = ""
        if row["input_offset"] >= terms.stop or told.record.timestamp_ms * 1000 > terms.until_us:
            reason = LATER
        elif row in [terms.decode(one) for one in right]:
            reason = OTHER_SCHEMA
        elif series.repaired and told.newest and value == series.worker:
            reason = SENT_AGAIN
        elif series.repaired and told.newest and _digest(value) in series.overtaken:
            reason = OVERTAKEN
        elif series.repaired and value == terms.stored(key):
            reason = BEFORE
        if reason:
            found.explained[reason] += 1
        elif terms.killed and 0 <= row["input_offset"] < series.input_offset:
            found.pending += 1
        else:
            self._differ(found, key, told.record, f"has another last word in {TOPIC} than in bars", terms.decode(series.newest), row)

    def _differ(
        self,
        found: OutputFindings,
        key: bytes,
        record: Record | None,
        what: str,
        bar: dict[str, Any] | None = None,
        other: dict[str, Any] | None = None,
    ) -> None:
        """``bar``: the row the difference is about; ``other``: what the topic has instead."""
        row_key, columns = None, {}
        if bar is not None:
            instrument = f"{bar['exchange']}:{bar['symbol']}"
            row_key = RowKey(instrument, TIMEFRAME_SECONDS[bar["timeframe"]], bar["open_time_us"], bar["revision"], 1)
            columns = {name: (other[name], held) for name, held in bar.items() if other is not None and other[name] != held}
        place = "" if record is None else f" ({TOPIC}[{self.partition}]@{record.offset})"
        text = what if row_key is not None else f"the series {key.decode(errors='replace')} {what}"
        found.differ(Difference(what=text + place, partition=self.partition, bars_offset=-1, input_offset=-1, key=row_key, columns=columns))


def _digest(value: bytes) -> bytes:
    return blake2b(value, digest_size=16).digest()
