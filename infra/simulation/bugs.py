"""Bugs on purpose: each breaks one real function the way people break such functions, and the simulated worlds must find it.

Comes in: a name of :data:`BUGS`. Goes out: a context manager under which the product has that bug. Nothing else is changed, so what finds a
planted bug are the same invariants that find a real one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Final

import numpy as np

import streams.runner
import streams.sink
import streams.state_store
from api.cursors import Position
from api.live.client import Client, Subscription
from api.live.filters import BarFilter, TradeFilter
from api.live.hub import Hub
from api.live.series import Series
from api.live.tail import Tail
from collectors.batcher import Batcher
from collectors.binance.collector import BinanceCollector
from collectors.dedupe import Sequencer
from collectors.filler import GapFiller
from collectors.watermark import Watermark
from infra.simulation import components
from infra.simulation.components import SinkProcess
from infra.simulation.loop import PROCESS, VirtualLoop
from infra.simulation.store import SimStore
from processors.bars import BarEngine
from processors.unseen import unseen_mask
from streams.bar_shard import BarShard
from streams.runner import BarRunner
from streams.sink import Batch, TopicSink

Plant = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Bug:
    """One bug that can be planted."""

    name: str
    what: str
    """One sentence: what the code does wrong."""
    plant: Plant


BUGS: Final[dict[str, Bug]] = {}
"""Every bug by its name."""


def planted(name: str | None) -> AbstractContextManager[None]:
    """The product with that bug; without a name as it is. Raises KeyError for an unknown one."""
    return nullcontext() if name is None else BUGS[name].plant()


def _bug(name: str, what: str) -> Callable[[Callable[[], Iterator[None]]], Plant]:
    def register(function: Callable[[], Iterator[None]]) -> Plant:
        plant = contextmanager(function)
        BUGS[name] = Bug(name, what, plant)
        return plant

    return register


@contextmanager
def _swapped(owner: Any, name: str, wrong: Any) -> Iterator[None]:
    """``owner.name`` is ``wrong`` for a while."""
    right = owner.__dict__[name]
    setattr(owner, name, wrong)
    try:
        yield
    finally:
        setattr(owner, name, right)


# -- collector


@_bug("gap-first-off-by-one", "A gap begins one id too late: the first missing trade is never fetched.")
def _gap_first() -> Iterator[None]:
    right = Sequencer._open

    def wrong(self: Sequencer, code: int, first: int, last: int, time_us: int) -> Any:
        return right(self, code, min(first + 1, last), last, time_us)

    with _swapped(Sequencer, "_open", wrong):
        yield


@_bug("gap-last-off-by-one", "A gap ends one id too early: the last missing trade is never fetched.")
def _gap_last() -> Iterator[None]:
    right = Sequencer._open

    def wrong(self: Sequencer, code: int, first: int, last: int, time_us: int) -> Any:
        return right(self, code, first, max(first, last - 1), time_us)

    with _swapped(Sequencer, "_open", wrong):
        yield


@_bug("gap-closed-without-fetching", "A gap is reported filled although nothing was asked for.")
def _gap_closed() -> Iterator[None]:
    async def wrong(self: GapFiller, job: Any) -> None:
        self._finish(job, complete=True)

    with _swapped(GapFiller, "_step", wrong):
        yield


@_bug("gap-unnoticed", "A jump of ids is taken for the venue's habit: no gap is opened.")
def _gap_unnoticed() -> Iterator[None]:
    right = Sequencer.__init__

    def wrong(self: Sequencer, *, consecutive: bool) -> None:
        right(self, consecutive=False)

    with _swapped(Sequencer, "__init__", wrong):
        yield


@_bug("fill-taken-for-duplicate", "Rows that fill a gap are dropped as duplicates, because their ids lie below the newest.")
def _fill_duplicate() -> Iterator[None]:
    def wrong(self: Sequencer, *_: Any) -> bool:
        return False

    with _swapped(Sequencer, "_fill", wrong):
        yield


@_bug("lost-flush", "A round's last frame is forgotten now and then: it was taken from the buffer and never sent.")
def _lost_flush() -> Iterator[None]:
    right, calls = Batcher.take, count(1)

    def wrong(self: Batcher, *args: Any, **kwargs: Any) -> Any:
        frames = right(self, *args, **kwargs)
        return frames[:-1] if next(calls) % 40 == 0 else frames

    with _swapped(Batcher, "take", wrong):
        yield


@_bug("watermark-too-early", "The watermark runs at the newest trade's time plus a second: what is late by less is late for its bar.")
def _watermark_early() -> Iterator[None]:
    right = Watermark.read

    def wrong(self: Watermark, mono_us: int) -> int | None:
        value = right(self, mono_us)
        return None if value is None else value + 60_000_000

    with _swapped(Watermark, "read", wrong):
        yield


@_bug("clock-skew", "The watermark is taken from the machine's wall clock instead of the venue's times.")
def _clock_skew() -> Iterator[None]:
    right = Watermark.read

    def wrong(self: Watermark, mono_us: int) -> int | None:
        value, process, loop = right(self, mono_us), PROCESS.get(), asyncio.get_running_loop()
        if value is None or process is None or not isinstance(loop, VirtualLoop):
            return value
        return max(value, loop.now_us + process.skew_us - 500_000)

    with _swapped(Watermark, "read", wrong):
        yield


@_bug(
    "hold-released-too-early",
    "Nothing holds the watermark while the feed is down or a gap is fetched: bars close and stay without the trades.",
)
def _no_hold() -> Iterator[None]:
    def wrong(self: Watermark, reason: str, mono_us: int) -> None:
        return

    def early(self: Watermark, mono_us: int) -> int | None:
        value = read(self, mono_us)
        return None if value is None else value + 45_000_000

    read = Watermark.read
    with _swapped(Watermark, "hold", wrong), _swapped(Watermark, "read", early):
        yield


@_bug("resume-forgotten", "A collector that starts again begins with the next trade: what was traded meanwhile is nobody's.")
def _resume_forgotten() -> Iterator[None]:
    def wrong(broker: Any, store: Any) -> dict[str, Any]:
        return {}

    with _swapped(components, "last_positions", wrong):
        yield


@_bug("resume-off-by-one", "A collector that starts again believes that it has the first trade it missed.")
def _resume_off_by_one() -> Iterator[None]:
    right = Sequencer.add

    def wrong(self: Sequencer, code: int, last_id: int = -1, last_time_us: int = 0) -> None:
        right(self, code, last_id + 1 if last_id >= 0 else last_id, last_time_us)

    with _swapped(Sequencer, "add", wrong):
        yield


@_bug("page-off-by-one", "A page of a gap is asked for from one id further on: its first trade never comes.")
def _page_off() -> Iterator[None]:
    right = BinanceCollector._page

    async def wrong(self: BinanceCollector, key: str, from_id: int, *, background: bool) -> Any:
        return await right(self, key, from_id + 1, background=background)

    with _swapped(BinanceCollector, "_page", wrong):
        yield


@_bug("first-page-only", "Only the first REST page of a gap is fetched, and the gap is reported filled.")
def _first_page() -> Iterator[None]:
    right = GapFiller._page

    async def wrong(self: GapFiller, job: Any, from_id: int) -> bool:
        await right(self, job, from_id)
        self._finish(job, complete=True)
        return False

    with _swapped(GapFiller, "_page", wrong):
        yield


# -- producer


@_bug("retry-without-idempotence", "The producer sends again what was not answered, without numbering it: records stand twice.")
def _no_idempotence() -> Iterator[None]:
    with _producer_setting({"enable.idempotence": False}):
        yield


@_bug("acknowledged-before-synced", "The producer is content with acks=1: a record counts as safe before it is.")
def _acks_one() -> Iterator[None]:
    with _producer_setting({"acks": "1"}):
        yield


@contextmanager
def _producer_setting(settings: dict[str, Any]) -> Iterator[None]:
    right = components.__dict__["producer_config"]

    def wrong(*args: Any, **overrides: Any) -> dict[str, Any]:
        found: dict[str, Any] = right(*args, **overrides)
        return found | settings

    with _swapped(components, "producer_config", wrong):
        yield


# -- worker


@_bug("snapshot-before-acknowledged", "The state is written before the outputs it covers are acknowledged.")
def _snapshot_early() -> Iterator[None]:
    async def at_once() -> None:
        return

    right = BarRunner.snapshot

    async def wrong(self: BarRunner, *, force: bool = False) -> dict[int, int]:
        sender = vars(self._sender)  # that sender's alone: a process killed in here does not come to put anything back
        sender["wait_acknowledged"] = at_once
        try:
            return await right(self, force=force)
        finally:
            del sender["wait_acknowledged"]

    with _swapped(BarRunner, "snapshot", wrong):
        yield


@_bug("commit-before-processed", "The input is committed as it is read, and a restart trusts the commit more than the state.")
def _commit_early() -> Iterator[None]:
    right = BarRunner.shard

    async def wrong(self: BarRunner, partition: int) -> BarShard:
        known = partition in self.shards
        shard = await right(self, partition)
        if not known:
            log = self._open_log(partition)
            broker = log._broker  # type: ignore[attr-defined]
            shard.applied_offset = max(shard.applied_offset, broker.end("trades", partition) - 1) if shard.applied_offset >= 0 else -1
        return shard

    with _swapped(BarRunner, "shard", wrong):
        yield


@_bug("manifest-before-chunks", "The manifest of a snapshot is written before its chunks, and nobody compares checksums.")
def _manifest_first() -> Iterator[None]:
    def wrong(log: Any, state: bytes, applied_offset: int) -> None:
        _, high = log.bounds()
        log.append(b"manifest", b"%d" % (high + 1))
        log.append(b"chunk", state)

    def trusting(log: Any) -> bytes | None:
        low, high = log.bounds()
        for _, key, value in reversed(log.read(low, high)):
            if key == b"manifest":
                found = log.read(int(value), int(value) + 1)
                return found[0][2] if found and found[0][1] == b"chunk" else b""
        return None

    def restore(*args: Any, **kwargs: Any) -> BarShard:
        data = args[3] if len(args) > 3 else kwargs["data"]
        if not data:  # "there is none yet": begin at the end
            shard = BarShard(args[0], args[1], args[2], emitted_offset=kwargs.get("emitted_offset", -1))
            shard.applied_offset = kwargs.get("emitted_offset", -1)
            return shard
        return right.__func__(BarShard, *args, **kwargs)  # type: ignore[no-any-return]

    right = BarShard.__dict__["restore"]
    with (
        _swapped(streams.runner, "save", wrong),
        _swapped(streams.runner, "load", trusting),
        _swapped(BarShard, "restore", staticmethod(restore)),
    ):
        yield


@_bug("skip-on-restore", "After a restart the first record that the state does not cover is skipped.")
def _skip_on_restore() -> Iterator[None]:
    with _restored(lambda shard: setattr(shard, "applied_offset", shard.applied_offset + 1)):
        yield


@_bug("emitted-ignored", "After a restart bars that were sent already are sent again.")
def _emitted_ignored() -> Iterator[None]:
    with _restored(lambda shard: setattr(shard, "emitted_offset", -1)):
        yield


@_bug("emitted-off-by-one", "After a restart one frame of bars too many is taken for sent.")
def _emitted_off() -> Iterator[None]:
    with _restored(lambda shard: setattr(shard, "emitted_offset", shard.emitted_offset + 1)):
        yield


@_bug("state-forgotten", "A restart keeps the offset of the state and loses its open bars.")
def _state_forgotten() -> Iterator[None]:
    with _restored(lambda shard: setattr(shard, "_engine", BarEngine(shard._engine.config))):
        yield


@contextmanager
def _restored(spoil: Callable[[BarShard], None]) -> Iterator[None]:
    right = BarShard.__dict__["restore"]

    def wrong(*args: Any, **kwargs: Any) -> BarShard:
        shard: BarShard = right.__func__(BarShard, *args, **kwargs)
        spoil(shard)
        return shard

    with _swapped(BarShard, "restore", staticmethod(wrong)):
        yield


@contextmanager
def _engine(wrong: Callable[..., Any]) -> Iterator[None]:
    """The worker's engine processes a frame as ``wrong(engine, frame, right)``; the oracle's, outside of every process, as it should."""
    right = BarEngine.process

    def process(self: BarEngine, frame: Any) -> Any:
        return right(self, frame) if PROCESS.get() is None else wrong(self, frame, right)

    with _swapped(BarEngine, "process", process):
        yield


@_bug("late-trade-dropped", "A trade older than the watermark is dropped instead of revising its bar.")
def _late_dropped() -> Iterator[None]:
    def wrong(self: BarEngine, frame: Any, right: Any) -> Any:
        columns = frame.columns
        if columns and len(columns["symbol_code"]):
            on_time = columns["exchange_time_us"] >= self.watermark_us
            frame = replace(frame, columns={name: column[on_time] for name, column in columns.items()})
        return right(self, frame)

    with _engine(wrong):
        yield


@_bug("sum-order", "Volumes are added up in the order of arrival in single steps, so that they depend on it in the last bit.")
def _sum_order() -> Iterator[None]:
    def wrong(self: BarEngine, frame: Any, right: Any) -> Any:
        found = right(self, frame)
        late = found.bars["revision"] > 0
        if late.any() or found.late:
            volume = found.bars["volume"].copy()
            volume[late] = np.nextafter(volume[late], np.inf)
            found.bars["volume"] = volume
        return found

    with _engine(wrong):
        yield


@_bug("revision-not-raised", "A revised bar is published under the revision it had.")
def _revision() -> Iterator[None]:
    def wrong(self: BarEngine, frame: Any, right: Any) -> Any:
        found = right(self, frame)
        found.bars["revision"] = np.zeros_like(found.bars["revision"])
        return found

    with _engine(wrong):
        yield


@_bug("flat-bars-forgotten", "Seconds without a trade have no bar.")
def _no_flat() -> Iterator[None]:
    def wrong(self: BarEngine, frame: Any, right: Any) -> Any:
        found = right(self, frame)
        traded = found.bars["trade_count"] > 0
        return replace(found, bars={name: column[traded] for name, column in found.bars.items()})

    with _engine(wrong):
        yield


@_bug("poison-stops-partition", "A record that cannot be decoded ends the worker, again and again.")
def _poison() -> Iterator[None]:
    def wrong(self: BarShard, offset: int, value: bytes, exc: Exception) -> Any:
        raise exc

    with _swapped(BarShard, "_undecodable", wrong):
        yield


# -- sink


@_bug("commit-before-insert", "The sink commits what it has read before it is stored.")
def _commit_before_insert() -> Iterator[None]:
    right = SinkProcess._flush

    async def wrong(self: SinkProcess, name: str, records: list[Any]) -> None:
        newest = {record.partition: record.offset + 1 for record in records}
        self._outside.broker.commit(components.SINK_GROUP, name, newest)
        await right(self, name, records)

    with _swapped(SinkProcess, "_flush", wrong):
        yield


@_bug("in-doubt-ignored", "After a crash the sink does not ask what the batch before it had stored.")
def _in_doubt() -> Iterator[None]:
    def wrong(self: TopicSink, partition: int, committed_offset: int) -> None:
        return

    with _swapped(TopicSink, "resume", wrong):
        yield


@_bug("token-not-stable", "A batch that is sent again carries another token: stored and unanswered, it is stored twice.")
def _token_unstable() -> Iterator[None]:
    right, calls = SimStore.insert, count()

    def wrong(self: Any, batch: Batch) -> None:
        right(self, batch._replace(token=f"{batch.token}/{next(calls)}"))

    with _swapped(SimStore, "insert", wrong):
        yield


@_bug("token-too-coarse", "Batches of one topic and month share a token: all but the first are dropped as sent before.")
def _token_coarse() -> Iterator[None]:
    right = TopicSink.batches

    def wrong(self: TopicSink, records: list[Any]) -> list[Batch]:
        return [batch._replace(token=f"{batch.table}/{batch.month}/{len(records)}") for batch in right(self, records)]

    with _swapped(TopicSink, "batches", wrong):
        yield


@_bug("known-trade-off-by-one", "The sink takes the newest id it holds for new: the trade is stored twice when it comes again.")
def _known_off() -> Iterator[None]:
    right = unseen_mask

    def wrong(codes: Any, ids: Any, largest_held: Any, held: Any) -> Any:
        return right(codes, ids, largest_held - 1, held)

    with _swapped(streams.sink, "unseen_mask", wrong):
        yield


@_bug("trades-not-compared", "The sink stores a trade as often as it comes: by its offset alone each is new.")
def _not_compared() -> Iterator[None]:
    def wrong(self: TopicSink, keys: Any, columns: Any) -> Any:
        return columns

    with _swapped(TopicSink, "_drop_known_trades", wrong):
        yield


# -- api


@_bug("cursor-off-by-one", "A cursor points one record too far: a client that resumes misses one.")
def _cursor_off() -> Iterator[None]:
    right = Hub._series

    def wrong(self: Hub, key: Any) -> Series:
        series = right(self, key)
        encode = series._encode_cursor
        series._encode_cursor = lambda place: encode(Position(place.offset + 1, place.row))
        return series

    with _swapped(Hub, "_series", wrong):
        yield


@_bug("cursor-behind", "A cursor points to the record it was made from: a client that resumes gets it twice.")
def _cursor_behind() -> Iterator[None]:
    right = Hub._series

    def wrong(self: Hub, key: Any) -> Series:
        series = right(self, key)
        encode = series._encode_cursor
        series._encode_cursor = lambda place: encode(Position(max(place.offset - 1, 0), 0))
        return series

    with _swapped(Hub, "_series", wrong):
        yield


@_bug("seq-reused", "The number of a message is that of the one before it, now and then.")
def _seq_reused() -> Iterator[None]:
    right, calls = Client.flush, count(1)

    def wrong(self: Client) -> None:
        if next(calls) % 7 == 0:
            for subscription in self.subscriptions.values():
                subscription.seq = max(0, subscription.seq - 1)
        right(self)

    with _swapped(Client, "flush", wrong):
        yield


@_bug("seam-loses-a-record", "Where history joins the tail, the first record of the tail's ring is skipped.")
def _seam() -> Iterator[None]:
    right = Tail.ring_from

    def wrong(self: Tail, offset: int) -> Any:
        found = right(self, offset)
        return found[1:] if len(found) > 1 else found  # with nothing to give, catching up would ask for ever

    with _swapped(Tail, "ring_from", wrong):
        yield


@_bug("replay-log-short", "A client that reconnects gets the kept messages but the first.")
def _replay_short() -> Iterator[None]:
    right = Series.replay

    def wrong(self: Series, place: Position) -> Any:
        return right(self, place)[1:]

    with _swapped(Series, "replay", wrong):
        yield


@_bug("skip-until-ignored", "What a client had before it moved to the shared tail is sent to it again.")
def _skip_until() -> Iterator[None]:
    right = Subscription.attach

    def wrong(self: Subscription, series: Series, skip_until: Position) -> None:
        right(self, series, Position(-1))
        for message in series._log if skip_until.offset >= 0 else ():
            self.push(message)

    with _swapped(Subscription, "attach", wrong):
        yield


@_bug("trades-not-recognised", "The live stream sends a trade as often as the topic holds it.")
def _not_recognised() -> Iterator[None]:
    def wrong(self: TradeFilter, trade_id: int) -> bool:
        return True

    with _swapped(TradeFilter, "admit", wrong):
        yield


@_bug("revision-taken-for-duplicate", "The live stream drops a bar's revision because its bar was sent already.")
def _revision_dropped() -> Iterator[None]:
    right = BarFilter.admit

    def wrong(self: BarFilter, open_time_us: int, revision: int, input_offset: int) -> bool:
        return right(self, open_time_us, revision, input_offset) and revision == 0

    with _swapped(BarFilter, "admit", wrong):
        yield


def names() -> Sequence[str]:
    """All bugs, in the order of the data's way."""
    return list(BUGS)
