"""The comparison of one partition: its trades and its bars in, in order; equal, explained and unexplained rows out.

The trades run through the very ``streams.bar_shard.BarShard`` the worker runs; each bars record it makes is held against the record the live
run published for the same input offset, byte for byte, and row by row where the bytes differ. Pure: no Kafka, no clock; memory is that of
the shard and of a few thousand hashes, whatever the length of the run.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from infra.parity_findings import MOST_DIFFERENCES, STRIP_CELLS, Findings
from infra.parity_rows import Difference, RowKey, compare_rows, head_difference, row_keys
from schemas.codec import decode_learning
from schemas.errors import DecodeError
from schemas.frames import Frame
from streams.bar_shard import BarCodecs, BarShard
from streams.records import OutRecord

NOT_RETAINED: Final = "not retained: the bar or its symbol began before the first trade the topic still holds"
RHYTHM: Final = "not retained: when open bars are updated follows from trades the topic no longer holds"
SENT_TWICE: Final = "sent twice: the same bytes for the same trades, after a lost acknowledgement"
OTHER_SCHEMA: Final = "same rows, written with the schema of another release"
_US: Final = 1_000_000
_REMEMBERED: Final = 8_192
"""Records whose hash is kept to recognise one that was sent twice: a producer has at most a few thousand under way."""


class Record(NamedTuple):
    """One Kafka record."""

    offset: int
    timestamp_ms: int
    value: bytes
    key: bytes = b""


class LiveRecord(NamedTuple):
    """One record of ``bars``, decoded."""

    offset: int
    timestamp_ms: int
    value: bytes
    frame: Frame


class Comparison:
    """Holds a partition's replay against its live run.

    Args:
        shard: a fresh one; its state comes from the trades alone.
        codecs: the shard's own.
        live: records of ``bars`` from the run's first one on, in order.
        first, stop: offsets of the run's trades, ``[first, stop)``.
        whole: the topic still holds the partition's first trade, so the state is that of the run.
        bars_stop: offset after the run's last bars record; repairs published later are no part of it.
        explain_repair: the reason of a row the repair published, None when nothing explains it.
        on_live: told every live record once, in order, but those that cannot be read.
        on_made: told (offset of the trades, record) of everything the replay makes of the run's trades.
    """

    def __init__(
        self,
        shard: BarShard,
        codecs: BarCodecs,
        live: Iterator[Record],
        *,
        first: int,
        stop: int,
        whole: bool,
        bars_stop: int,
        explain_repair: Callable[[RowKey], str | None],
        on_live: Callable[[LiveRecord], None] = lambda _: None,
        on_made: Callable[[int, OutRecord], None] = lambda *_: None,
    ) -> None:
        self.findings = Findings(partition=shard.partition)
        self._shard = shard
        self._codecs = codecs
        self._live = live
        self._first, self._stop = first, stop
        self._whole = whole
        self._bars_stop = bars_stop
        self._explain_repair = explain_repair
        self._on_live = on_live
        self._on_made = on_made
        self._next: LiveRecord | None = None
        self._ended = False
        self._began_us: dict[str, int] = {}
        self._carried: dict[tuple[str, int], tuple[int, str]] = {}
        self._sent: OrderedDict[int, bytes] = OrderedDict()
        self._inputs, self._run, self._replay = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()

    def take(self, record: Record) -> bool:
        """Replay one trades record and compare what follows; False when the run published nothing for it or for later ones."""
        found = self.findings
        self._inputs.update(record.value)
        if not self._whole:
            self._note_beginnings(record.value)
        made = self._shard.process(record.offset, record.value)
        found.trades_records += 1
        found.trades = self._shard.trade_count
        if record.offset < self._first:
            return True
        value = next(out.value for out in made if out.topic == "bars")
        for out in made:
            self._on_made(record.offset, out)
        self._skip_to(record.offset)
        live = self._next
        if live is None:
            found.pending += 1
            return False
        if live.frame.input_offset > record.offset:
            self._missing(record.offset, value)
            return True
        self._compare(live, value)
        self._advance()
        return True

    def finish(self, pending: int = 0) -> Findings:
        """Take what the run published behind its last trades (repairs) and close the account; ``pending`` trades records were not taken."""
        self._skip_to(self._stop)
        self.findings.pending += pending
        self.findings.inputs_sha256 = self._inputs.hexdigest()
        self.findings.run_sha256 = self._run.hexdigest()
        self.findings.replay_sha256 = self._replay.hexdigest()
        return self.findings

    # -- the run's records

    def _skip_to(self, input_offset: int) -> None:
        """Take live records until one that belongs to ``input_offset`` or later trades is next."""
        if self._next is None and not self._ended:
            self._advance()
        while self._next is not None and self._next.frame.input_offset < input_offset:
            live = self._next
            if live.frame.input_offset < 0:
                if live.offset < self._bars_stop:
                    self._repaired(live)
            elif live.frame.input_offset >= self._first:
                self._again(live)
            self._advance()

    def _advance(self) -> None:
        self._next = None
        for record in self._live:
            try:
                frame = decode_learning(self._codecs.bars, record.value, self._codecs.fetch_schema)
            except DecodeError as exc:
                self._differ(
                    Difference(what=f"cannot be read: {exc}", partition=self._partition, bars_offset=record.offset, input_offset=-1)
                )
                continue
            self._next = LiveRecord(record.offset, record.timestamp_ms, record.value, frame)
            self._on_live(self._next)
            return
        self._ended = True

    def _repaired(self, live: LiveRecord) -> None:
        for row, key in enumerate(row_keys(live.frame)):
            if not key.is_final:
                self._unexplained_repair(live, key, "is an open bar of the repair, which publishes closed ones alone")
                continue
            reason = self._explain_repair(key) or self._carried_reason(key, int(live.frame.columns["trade_count"][row]))
            if reason is not None:
                self._carried[key.instrument, key.timeframe_s] = (key.open_time_us + key.timeframe_s * _US, reason)
                self._count(reason, key.timeframe_s)
                continue
            self._unexplained_repair(live, key, "was published by the repair, and no repair or gap of the ledger explains it")

    def _unexplained_repair(self, live: LiveRecord, key: RowKey, what: str) -> None:
        self._count("", key.timeframe_s)
        self._keep(Difference(what=what, partition=self._partition, bars_offset=live.offset, input_offset=-1, key=key))

    def _carried_reason(self, key: RowKey, trade_count: int) -> str | None:
        """The reason of a bar without trades right behind a repaired one: it carries that one's price on, beyond the end of the job."""
        end_us, reason = self._carried.get((key.instrument, key.timeframe_s), (-1, ""))
        return reason if trade_count == 0 and end_us == key.open_time_us else None

    def _again(self, live: LiveRecord) -> None:
        known = self._sent.get(live.frame.input_offset)
        if known is None:
            what = f"came again for trades at {live.frame.input_offset}, long after its time"
        elif known == hashlib.sha256(live.value).digest():
            for key in row_keys(live.frame):
                self._count(SENT_TWICE, key.timeframe_s)
            return
        else:
            what = f"came again for trades at {live.frame.input_offset}, with other bytes"
        place = live.frame.input_offset
        self._differ(Difference(what=what, partition=self._partition, bars_offset=live.offset, input_offset=place))

    # -- against the replay's

    def _compare(self, live: LiveRecord, value: bytes) -> None:
        found, place = self.findings, live.frame.input_offset
        found.records += 1
        self._run.update(live.value)
        self._replay.update(value)
        self._sent[place] = hashlib.sha256(live.value).digest()
        if len(self._sent) > _REMEMBERED:
            self._sent.popitem(last=False)
        if live.value == value:
            found.identical_records += 1
            self._count_equal(live.frame, place)
            return
        again = decode_learning(self._codecs.bars, value, self._codecs.fetch_schema)
        unequal = compare_rows(live.frame, again)
        head = head_difference(live.frame, again)
        if not unequal and not head and live.value[:5] != value[:5]:
            for key in row_keys(live.frame):
                self._count(OTHER_SCHEMA, key.timeframe_s, place)
            return
        wrong = {key for key, _, _ in unequal}
        for key in row_keys(live.frame):
            if key not in wrong:
                self._count("equal", key.timeframe_s, place)
        for key, what, columns in unequal:
            reason = "" if self._whole else NOT_RETAINED if self._began_before(key) else "" if key.is_final else RHYTHM
            if reason:
                self._count(reason, key.timeframe_s, place)
                continue
            self._count("", key.timeframe_s, place)
            self._keep(
                Difference(what=what, partition=self._partition, bars_offset=live.offset, input_offset=place, key=key, columns=columns)
            )
        if self._whole and not unequal:
            what = f"the same rows in another order or with another head ({head})" if head else "the same rows in another order"
            self._differ(Difference(what=what, partition=self._partition, bars_offset=live.offset, input_offset=place))

    def _missing(self, input_offset: int, value: bytes) -> None:
        """The run went on without publishing anything for these trades."""
        again = decode_learning(self._codecs.bars, value, self._codecs.fetch_schema)
        keys = list(row_keys(again))
        for key in keys:
            self._count("", key.timeframe_s, input_offset)
            self._keep(Difference(what="not in the run", partition=self._partition, bars_offset=-1, input_offset=input_offset, key=key))
        if not keys:
            what = "the run published no record for these trades"
            self._differ(Difference(what=what, partition=self._partition, bars_offset=-1, input_offset=input_offset))

    # -- the account

    @property
    def _partition(self) -> int:
        return self._shard.partition

    def _count_equal(self, frame: Frame, place: int) -> None:
        if not frame.row_count:
            return
        self.findings.rows += frame.row_count
        self.findings.equal += frame.row_count
        for timeframe_s, count in Counter(frame.columns["timeframe_s"].tolist()).items():  # of ten rows: half the time numpy takes
            self.findings.by_timeframe.setdefault(timeframe_s, Counter())["equal"] += count
        self._cell(place)[0] += frame.row_count

    def _count(self, reason: str, timeframe_s: int, place: int = -1) -> None:
        """One row: ``equal``, a reason, or '' for an unexplained one."""
        found = self.findings
        found.rows += 1
        word = "equal" if reason == "equal" else "explained" if reason else "unexplained"
        found.by_timeframe.setdefault(timeframe_s, Counter())[word] += 1
        if place >= 0:
            self._cell(place)[("equal", "explained", "unexplained").index(word)] += 1
        if word == "equal":
            found.equal += 1
        elif word == "explained":
            found.explained[reason] += 1
        else:
            found.unexplained += 1

    def _cell(self, place: int) -> list[int]:
        return self.findings.strip[min((place - self._first) * STRIP_CELLS // max(self._stop - self._first, 1), STRIP_CELLS - 1)]

    def _differ(self, difference: Difference) -> None:
        """Something about a whole record, which is no row of its own."""
        self.findings.unexplained += 1
        if difference.input_offset >= self._first:
            self._cell(difference.input_offset)[2] += 1
        self._keep(difference)

    def _keep(self, difference: Difference) -> None:
        if len(self.findings.differences) < MOST_DIFFERENCES:
            self.findings.differences.append(difference)

    # -- what the topic no longer tells

    def _note_beginnings(self, value: bytes) -> None:
        try:
            frame = decode_learning(self._codecs.trades, value, self._codecs.fetch_schema)
        except DecodeError:
            return  # the shard dead-letters it
        for code, instrument in enumerate(frame.symbols):
            if instrument not in self._began_us:
                times = frame.columns["exchange_time_us"][frame.columns["symbol_code"] == code]
                if len(times):
                    self._began_us[instrument] = int(times.min())

    def _began_before(self, key: RowKey) -> bool:
        began_us = self._began_us.get(key.instrument)
        width_us = key.timeframe_s * 1_000_000
        return began_us is None or key.open_time_us < -(-began_us // width_us) * width_us
