"""From raw messages of one connection shard to frames on their way out. Pure: time is an argument, nothing is sent from here.

messages -> mapper -> plausible times -> sequencer (duplicates, gaps) -> batcher -> frames with the shard's watermark

The shell calls :meth:`Pipeline.receive` for every chunk, :meth:`Pipeline.take` once a linger, and sends what comes back.
Bounded by ``max_staged_bytes`` (raw messages that wait for the next round) and the batcher's ``max_pending_rows``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from collectors.batcher import Batcher
from collectors.dedupe import STATE_FILLED, STATE_UNFILLABLE, Gap, Sequencer
from collectors.stale import StaleDetector
from collectors.stats import FeedStats
from collectors.watermark import Watermark
from collectors.wire import MAX_DEADLETTER_BYTES, Array, DeadLetters, Mapper, Reply
from schemas.frames import Frame
from schemas.partitions import partition_of

logger = logging.getLogger(__name__)

MAX_REJECTED_A_ROUND: Final = 1_000
"""Dead letters of one round at most; the rest is counted. A venue that changed its format would otherwise flood the topic."""


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
        self._on_gap = on_gap
        self._config = config or PipelineConfig()
        self._streams: dict[int, str] = {}  # code -> stream
        self._messages: list[bytes] = []
        self._chunks: list[tuple[int, int]] = []  # (messages, receive time us)
        self.staged_bytes = 0

    def add_symbol(self, key: str, stream: str, mono_us: int, *, last_id: int = -1, last_time_us: int = 0) -> int:
        """Code of an instrument whose rows arrive on ``stream``; ``last_id`` continues what was stored before a restart."""
        code = self.batcher.code_of(key)
        self.mapper.bind(stream, code)
        self._streams[code] = stream
        self.sequencer.forget(code)  # a symbol that was removed and comes back starts anew
        self.sequencer.add(code, last_id, last_time_us)
        self.stale.watch(code, mono_us)
        return code

    def stream_of(self, code: int) -> str:
        """The stream whose rows carry ``code``; empty when there is none."""
        return self._streams.get(code, "")

    def remove_symbol(self, key: str) -> None:
        """No more rows are expected; those under way still pass."""
        code = self.batcher.code_of(key)
        self.sequencer.forget(code)
        self.stale.forget(code)

    def receive(self, messages: list[bytes], receive_time_us: int) -> None:
        """Stage the messages of one chunk."""
        self._messages += messages
        self._chunks.append((len(messages), receive_time_us))
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
        self, mono_us: int, previous_mono_us: int, *, sink_behind: bool = False, all_partitions: bool = False
    ) -> list[tuple[str, int, Frame]]:
        """Process what is staged; everything that can go out now, as (topic, partition, frame).

        Args:
            mono_us: now.
            previous_mono_us: time of the round before: everything the socket held then has been received since.
            sink_behind: the frames of the round before waited for the sink.
            all_partitions: a heartbeat to every partition, due or not.
        """
        self._process(mono_us)
        watermark_us = self.watermark.read(previous_mono_us)
        frames = self.batcher.take(mono_us, watermark_us, sink_behind=sink_behind, all_partitions=all_partitions)
        self.stats.frames += len(frames)
        return [("trades", partition, frame) for partition, frame in frames]

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
        keep = self._plausible(columns["exchange_time_us"], mono_us)
        if keep is not None:
            detail = "The trade's time lies more than a minute ahead of the venue's clock."
            wild = parsed.message_index[~keep].tolist()
            self._reject_all([(index, "implausible_time", detail) for index in wild], messages, times)
            columns = {name: column[keep] for name, column in columns.items()}
            receive_us = receive_us[keep]
        if len(receive_us):
            self.stale.observe(np.flatnonzero(np.bincount(columns["symbol_code"])), mono_us)
            self.stats.last_exchange_time_us = max(self.stats.last_exchange_time_us, int(columns["exchange_time_us"].max()))
            self.stats.last_receive_time_us = int(receive_us[-1])
        self._add_rows(columns, receive_us, mono_us)

    def _plausible(self, exchange_us: Array, mono_us: int) -> Array | None:
        """None: all rows are; otherwise the mask of those that are."""
        if self.watermark.observe(int(exchange_us.max()), mono_us):
            return None
        limit = self.watermark.limit_us(mono_us)
        keep: Array = exchange_us <= (limit if limit is not None else exchange_us)
        if keep.any():
            # sane rows beside a wild one: the wild time is no sign of a machine that slept
            self.watermark.observe(int(exchange_us[keep].max()), mono_us)
        return keep

    def _add_rows(self, columns: dict[str, Array], receive_us: Array, mono_us: int) -> int:
        codes = columns["symbol_code"]
        if len(codes) == 0:
            return 0
        duplicates = self.sequencer.duplicates
        keep, opened = self.sequencer.process(codes, columns["trade_id"], columns["exchange_time_us"])
        self.stats.duplicates += self.sequencer.duplicates - duplicates
        if keep is not None and not keep.all():
            columns = {name: column[keep] for name, column in columns.items()}
            receive_us = receive_us[keep]
            codes = columns["symbol_code"]
        for gap in opened:
            self._gap_opened(gap, mono_us)
        if self.sequencer.abandoned:  # whoever fetches them reports them; what is fetched of them is dropped
            self.stats.error("gap_abandoned", len(self.sequencer.abandoned))
            self.sequencer.abandoned.clear()
        if len(codes):
            self.stats.trades += len(codes)
            self.batcher.add({**columns, "receive_time_us": receive_us})
        return len(codes)

    def venue_is_at(self, code: int, last_id: int, mono_us: int) -> None:
        """The venue says that its newest trade of a symbol is ``last_id``: what we do not have up to there is a gap."""
        gap = self.sequencer.open_until(code, last_id, self.stats.last_exchange_time_us)
        if gap is not None:
            self._gap_opened(gap, mono_us)

    def _gap_opened(self, gap: Gap, mono_us: int) -> None:
        self.stats.gaps_opened += 1
        if gap.missing_ids <= self._config.hold_gap_ids:
            self.watermark.hold(gap_hold(gap), mono_us)
        self._on_gap(gap)

    def backfill(self, columns: dict[str, Array], receive_time_us: int, mono_us: int) -> int:
        """Add rows that came over REST for open gaps; those that arrived meanwhile are dropped. Returns how many were new."""
        receive_us = np.full(len(columns["symbol_code"]), receive_time_us, np.int64)
        added = self._add_rows(columns, receive_us, mono_us)
        self.stats.backfilled += added
        return added

    def gap_done(self, gap: Gap, receive_time_us: int, *, complete: bool) -> tuple[str, int, Frame]:
        """Close a gap: release the watermark and say what became of it, as a frame of topic ``gaps``.

        ``complete``: everything the venue has was delivered; otherwise what is still missing is lost.
        """
        self.sequencer.close(gap)
        self.watermark.release(gap_hold(gap))
        filled = complete or not gap.missing
        if filled:
            self.stats.gaps_filled += 1
        else:
            self.stats.gaps_unfillable += 1
        intervals = [(gap.first_id, gap.last_id)] if filled else gap.missing
        return self._gap_frame(gap, intervals, STATE_FILLED if filled else STATE_UNFILLABLE, receive_time_us)

    def _gap_frame(self, gap: Gap, intervals: Sequence[tuple[int, int]], state: int, receive_time_us: int) -> tuple[str, int, Frame]:
        key = self.batcher.key_of(gap.code)
        rows = len(intervals)
        columns: dict[str, np.ndarray[Any, Any]] = {
            "symbol_code": np.zeros(rows, np.int32),
            "first_missing_id": np.array([first for first, _ in intervals], np.int64),
            "last_missing_id": np.array([last for _, last in intervals], np.int64),
            "start_time_us": np.full(rows, gap.start_time_us, np.int64),
            "end_time_us": np.full(rows, gap.end_time_us, np.int64),
            "evidence": np.full(rows, gap.evidence, np.int8),
            "state": np.full(rows, state, np.int8),
            "exchange_time_us": np.full(rows, gap.end_time_us, np.int64),
            "receive_time_us": np.full(rows, receive_time_us, np.int64),
        }
        frame = Frame(source=self.batcher.source, watermark_us=gap.start_time_us, symbols=(key,), columns=columns)
        return "gaps", partition_of(key, self.batcher.config.partitions), frame

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


def gap_hold(gap: Gap) -> str:
    """Name under which a gap holds the watermark."""
    return f"gap {gap.code} {gap.first_id}"
