"""From raw messages of one connection shard to frames on their way out. Pure: time is an argument, nothing is sent from here.

messages -> mapper -> plausible times -> sequencer (duplicates, gaps) -> batcher -> frames with the shard's watermark

The shell calls :meth:`Pipeline.receive` for every chunk, :meth:`Pipeline.take` once a linger, sends what comes back and says so
(:meth:`Ledger.sent`). What is missing is told twice: as notices in the frames of trades, in the order of the rows, and as rows of the
ledger (topic ``gaps``). That a gap opened is told at once; that it is filled only after its rows are safe (:meth:`Ledger.take_ready`):
a collector that dies in between goes on with the gap.
Bounded by ``max_staged_bytes`` (raw messages that wait for the next round) and the batcher's ``max_pending_rows``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from collectors.batcher import Batcher
from collectors.coverage import Coverage, Resume
from collectors.dedupe import Gap, Sequencer
from collectors.ledger import Ledger
from collectors.stale import StaleDetector
from collectors.stats import FeedStats
from collectors.watermark import Watermark
from collectors.wire import MAX_DEADLETTER_BYTES, Array, DeadLetters, Mapper, Reply
from schemas.frames import Frame

logger = logging.getLogger(__name__)

MAX_REJECTED_A_ROUND: Final = 1_000
"""Dead letters of one round at most; the rest is counted. A venue that changed its format would otherwise flood the topic."""
REVISION_US: Final = 20_000_000
"""Rows fetched for a gap that holds the watermark go out live when they are late by less: bars are revised for 30 s after they closed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """Bounds of one shard's staging area."""

    max_staged_bytes: int = 16 * 1024 * 1024
    """Raw messages that wait; above it the socket is not read (16 MiB are 100,000 trades, more than a second of the busiest feed)."""
    hold_gap_ids: int = 10_000
    """Longer gaps (the collector was away for long) do not hold the watermark: fetching them takes longer than any hold lasts."""
    resume_share: float = 0.25
    """Reading goes on when this share of the bound is left."""


class Pipeline:
    """One shard.

    Args:
        exchange: name of the venue in keys.
        mapper: wire bytes to rows.
        sequencer, watermark, batcher, stale: this shard's own.
        dead_letters: takes rejected bytes.
        stats: counters.
        on_reply: called with each answer of the venue to a request.
        on_gap: called with each gap that opens; the shell backfills it and calls :meth:`gap_done`.
        coverage: this shard's own; None: a fresh one.
    """

    def __init__(
        self,
        *,
        exchange: str,
        mapper: Mapper,
        sequencer: Sequencer,
        watermark: Watermark,
        batcher: Batcher,
        stale: StaleDetector,
        dead_letters: DeadLetters,
        stats: FeedStats,
        on_reply: Callable[[Reply], None],
        on_gap: Callable[[Gap], None],
        config: PipelineConfig | None = None,
        coverage: Coverage | None = None,
    ) -> None:
        self.exchange = exchange
        self.mapper = mapper
        self.sequencer = sequencer
        self.watermark = watermark
        self.batcher = batcher
        self.stale = stale
        self.stats = stats
        self._dead_letters = dead_letters
        self._on_reply = on_reply
        self._config = config or PipelineConfig()
        self._streams: dict[int, str] = {}  # code -> stream
        self._messages: list[bytes] = []
        self._chunks: list[tuple[int, int]] = []  # (messages, receive time us)
        self.staged_bytes = 0
        self.ledger = Ledger(
            sequencer=sequencer,
            watermark=watermark,
            batcher=batcher,
            coverage=coverage or Coverage(),
            stats=stats,
            on_gap=on_gap,
            hold_gap_ids=self._config.hold_gap_ids,
        )
        self.subscribed = False
        """Whether everything wanted is subscribed; kept by the shell."""
        self._newest_us = 0  # newest exchange time of the last round that had rows

    def add_symbol(self, key: str, stream: str, mono_us: int, *, resume: Resume | None = None, wall_us: int = 0) -> int:
        """Code of an instrument whose rows arrive on ``stream``.

        Args:
            key, stream: as named.
            mono_us: now.
            resume: what an earlier process left.
            wall_us: wall-clock time, from which gaps get their ids; 0: the newest heard of.
        """
        if wall_us:
            self.ledger.clock(wall_us)
        code = self.batcher.code_of(key)
        self.mapper.bind(stream, code)
        self._streams[code] = stream
        self.sequencer.forget(code)  # a symbol that was removed and comes back starts anew
        self.stale.watch(code, mono_us)
        if resume is None:
            self.ledger.add(code)
        else:
            self.ledger.resume(code, resume, mono_us)
        return code

    def stream_of(self, code: int) -> str:
        """The stream whose rows carry ``code``; empty when there is none."""
        return self._streams.get(code, "")

    def remove_symbol(self, key: str) -> None:
        """No more rows are expected; those under way still pass."""
        code = self.batcher.code_of(key)
        self.ledger.remove(code)
        self.stale.forget(code)

    def receive(self, messages: list[bytes], receive_time_us: int) -> None:
        """Stage the messages of one chunk."""
        self._messages += messages
        self._chunks.append((len(messages), receive_time_us))
        self.ledger.clock(receive_time_us)
        self.staged_bytes += sum(map(len, messages))

    @property
    def is_full(self) -> bool:
        """Stop reading: more waits than may."""
        return self.staged_bytes >= self._config.max_staged_bytes

    @property
    def has_room(self) -> bool:
        """Read again."""
        return self.staged_bytes <= self._config.max_staged_bytes * self._config.resume_share

    def reject(self, reason: str, detail: str, raw: bytes, *, size: int, time_us: int, place: str, symbol: str = "") -> None:
        """Dead-letter and count one message."""
        self.stats.error(reason)
        self._dead_letters.put(
            reason=reason,
            detail=detail,
            exchange=self.exchange,
            symbol=symbol,
            place=place,
            time_us=time_us,
            raw=raw[:MAX_DEADLETTER_BYTES],
            raw_size=size,
        )

    def take(
        self, mono_us: int, previous_mono_us: int, *, sink_behind: bool = False, all_partitions: bool = False, wall_us: int = 0
    ) -> list[tuple[str, int, Frame]]:
        """Process what is staged; everything that can go out now, as (topic, partition, frame). Call ``ledger.sent()`` when it went.

        Args:
            mono_us: now.
            previous_mono_us: time of the round before: everything the socket held then has been received since.
            sink_behind: the frames of the round before waited for the sink.
            all_partitions: a heartbeat to every partition, due or not.
            wall_us: wall-clock time; 0: that of the newest chunk.
        """
        if wall_us:
            self.ledger.clock(wall_us)
        self._process(mono_us)
        self.ledger.settle()
        watermark_us = self.watermark.read(previous_mono_us)
        self.ledger.tick(mono_us, watermark_us, subscribed=self.subscribed)
        frames = self.batcher.take(mono_us, watermark_us, sink_behind=sink_behind, all_partitions=all_partitions)
        self.stats.frames += len(frames)
        return self.ledger.take_urgent() + [("trades", partition, frame) for partition, frame in frames]

    def _process(self, mono_us: int) -> None:
        messages = self._messages
        if not messages:
            return
        chunks, self._messages, self._chunks, self.staged_bytes = self._chunks, [], [], 0
        self.stats.messages += len(messages)
        parsed = self.mapper.parse(messages)
        for reply in parsed.replies:
            self._on_reply(reply)
        self.stats.ignored += parsed.ignored
        times = np.repeat(np.array([time for _, time in chunks], np.int64), [count for count, _ in chunks])
        self._reject_all([(item.index, item.reason, item.detail) for item in parsed.rejected], messages, times)
        if parsed.row_count == 0:
            return
        columns = parsed.columns
        receive_us = times[parsed.message_index]
        keep = self._plausible(columns["exchange_time_us"], mono_us, int(times[-1]))
        if keep is not None:
            detail = (
                "The trade's time lies more than a minute ahead of the venue's clock, or, as the first of a feed, an hour ahead of ours."
            )
            wild = parsed.message_index[~keep].tolist()
            self._reject_all([(index, "implausible_time", detail) for index in wild], messages, times)
            columns = {name: column[keep] for name, column in columns.items()}
            receive_us = receive_us[keep]
        if len(receive_us):
            self._newest_us = int(columns["exchange_time_us"].max())
            self.stale.observe(np.flatnonzero(np.bincount(columns["symbol_code"])), mono_us)
            self.stats.last_exchange_time_us = max(self.stats.last_exchange_time_us, self._newest_us)
            self.stats.last_receive_time_us = int(receive_us[-1])
        self._add_rows(columns, receive_us, mono_us)

    def _plausible(self, exchange_us: Array, mono_us: int, wall_us: int) -> Array | None:
        """None: all rows are; otherwise the mask of those that are."""
        if self.watermark.observe(int(exchange_us.max()), mono_us, wall_us):
            return None
        limit = self.watermark.limit_us(mono_us, wall_us)
        keep: Array = exchange_us <= (limit if limit is not None else exchange_us)
        if keep.any():
            # sane rows beside a wild one: the wild time is no sign of a machine that slept
            self.watermark.observe(int(exchange_us[keep].max()), mono_us, wall_us)
        return keep

    def _add_rows(self, columns: dict[str, Array], receive_us: Array, mono_us: int) -> None:
        codes = columns["symbol_code"]
        if len(codes) == 0:
            return
        duplicates = self.sequencer.duplicates
        ids = self.sequencer.numbered(codes, columns["trade_id"])
        columns = {**columns, "trade_id": ids}
        keep, opened = self.sequencer.process(codes, ids, columns["exchange_time_us"])
        self.stats.duplicates += self.sequencer.duplicates - duplicates
        if keep is not None and not keep.all():
            columns = {name: column[keep] for name, column in columns.items()}
            receive_us = receive_us[keep]
            codes = columns["symbol_code"]
        if len(codes):
            self.ledger.coverage.began(codes, columns["exchange_time_us"])
            self.ledger.coverage.heard(codes)
        for gap in opened:
            self.ledger.opened(gap, mono_us)
        self.ledger.report_given_up()
        if len(codes):
            self.stats.trades += len(codes)
            self.batcher.add({**columns, "receive_time_us": receive_us})

    def connection_lost(self, evidence: int, mono_us: int) -> None:
        """The feed is down, or believed so: from where it was last heard of nobody knows, until a row or the venue settles it."""
        if len(self._messages) <= self.batcher.room:
            self._process(mono_us)  # what came before the loss proves nothing about the time after it
        self.subscribed = False
        # rows of other symbols came until then, and what is older than them by the lateness had come as well
        self.ledger.lost(evidence, self._newest_us - self.watermark.lateness_us)

    def backfill(self, gap: Gap, columns: dict[str, Array], receive_time_us: int, mono_us: int) -> int:
        """Add rows that were fetched for a gap; those that no open gap of its symbol misses are dropped. Returns how many were new.

        Args:
            gap: it decides whether late rows may still go out live.
            columns: trade_id, price, size, side, exchange_time_us.
        """
        self.ledger.clock(receive_time_us)
        keep = self.sequencer.fill(gap.code, columns["trade_id"], columns["exchange_time_us"])
        rows = int(np.count_nonzero(keep))
        if rows:
            found = {name: column[keep] for name, column in columns.items()}
            found["symbol_code"] = np.full(rows, gap.code, np.int32)
            found["receive_time_us"] = np.full(rows, receive_time_us, np.int64)
            promised_us = self.watermark.value
            least_us = 0 if promised_us is None else promised_us - (REVISION_US if self.ledger.holds(gap, mono_us) else 0)
            past = found["exchange_time_us"] < least_us
            for history, mask in ((True, past), (False, ~past)):
                if mask.any():
                    self.batcher.add({name: column[mask] for name, column in found.items()}, history=history)
            self.stats.trades += rows
            self.stats.backfilled += rows
        return rows

    def _reject_all(self, items: list[tuple[int, str, str]], messages: list[bytes], times: Array) -> None:
        for index, reason, detail in items[:MAX_REJECTED_A_ROUND]:
            raw = messages[index]
            self.reject(reason, detail, raw, size=len(raw), time_us=int(times[index]), place=self.batcher.source)
        if len(items) > MAX_REJECTED_A_ROUND:
            self.stats.error("rejected_not_kept", len(items) - MAX_REJECTED_A_ROUND)
            logger.error(
                "%s: %d messages of one round were rejected, the first %d are in the dead letters. First: %s",
                self.batcher.source,
                len(items),
                MAX_REJECTED_A_ROUND,
                items[0][2],
            )
