"""How far the components of a world have come: what the topics hold, whether everything is collected, who has caught up since when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from infra.simulation.broker import Place, SimBroker
from infra.simulation.components import EXCHANGE, SINK_GROUP, frame_codec
from schemas.errors import DecodeError
from schemas.frames import GAP_OPEN, Frame
from schemas.partitions import partition_of
from schemas.timeframes import timeframe_seconds

if TYPE_CHECKING:
    from infra.simulation.world import World


class GapRow(NamedTuple):
    """A row of the ledger, as far as it is looked at."""

    gap_id: int
    state: int
    first_missing_id: int
    last_missing_id: int
    start_time_us: int
    end_time_us: int
    evidence: int


class Frames:
    """The frames of all topics, each record decoded once."""

    def __init__(self, broker: SimBroker) -> None:
        self._broker = broker
        self._known: dict[Place, list[Frame | None]] = {}

    def of(self, topic: str, partition: int) -> list[Frame | None]:
        """Frames by offset; None for a record nobody can read."""
        log = self._broker.logs[(topic, partition)]
        known = self._known.setdefault((topic, partition), [])
        for record in log.records[len(known) : log.synced]:
            try:
                known.append(frame_codec(topic).decode(record.value))
            except DecodeError:
                known.append(None)
        return known


class Progress:
    """How far the topics have come, read record by record as they grow."""

    def __init__(self, broker: SimBroker, frames: Frames) -> None:
        self.watermark_us = [0] * broker.partitions
        self.emitted = [-1] * broker.partitions
        """``input_offset`` of the newest bars record made from a trades record."""
        self._broker, self._frames = broker, frames
        self._read: dict[Place, int] = {}
        self._newest: dict[str, int] = {}
        self._ids: dict[str, list[npt.NDArray[np.int64]]] = {}

    def newest_id(self, symbol: str) -> int:
        """Newest trade id of a symbol in the topic, -1 for none."""
        return self._newest.get(f"{EXCHANGE}:{symbol}", -1)

    def ids(self, symbol: str) -> npt.NDArray[np.int64]:
        """Every trade id of a symbol in the topic, as they came."""
        return np.concatenate([np.empty(0, np.int64), *self._ids.get(f"{EXCHANGE}:{symbol}", [])])

    def read(self) -> Progress:
        """Take in what is new; itself."""
        for partition in range(self._broker.partitions):
            for frame in self._new("trades", partition):
                self.watermark_us[partition] = max(self.watermark_us[partition], frame.watermark_us)
                for code, key in enumerate(frame.symbols):
                    ids = frame.columns["trade_id"][frame.columns["symbol_code"] == code]
                    if len(ids):
                        self._ids.setdefault(key, []).append(ids)
                        self._newest[key] = max(self._newest.get(key, -1), int(ids.max()))
            for frame in self._new("bars", partition):
                self.emitted[partition] = max(self.emitted[partition], frame.input_offset)
        return self

    def _new(self, topic: str, partition: int) -> Iterator[Frame]:
        frames, start = self._frames.of(topic, partition), self._read.get((topic, partition), 0)
        self._read[(topic, partition)] = len(frames)
        for frame in frames[start:]:
            if frame is not None:
                yield frame


def collected(world: World) -> Callable[[], bool]:
    """Whether everything the market traded is published, no gap is open, and the watermark lies beyond the last trade's bar."""
    newest = {symbol: int(max(world.truth(symbol)["trade_id"], default=-1)) for symbol in world.symbols()}
    end_us = world.end_us + 1_000_000 * timeframe_seconds(world.scenario.tuning.timeframes[0])

    def done() -> bool:
        collector = world.outside.hooks.get("collector")
        if collector is None or not world.processes["collector"].alive:
            return False
        if any(True for shard in collector.shards for _ in shard.pipeline.sequencer.open_gaps()):
            return False
        world.progress.read()
        if any(world.progress.newest_id(symbol) < trade_id for symbol, trade_id in newest.items()):
            return False
        return all(watermark_us >= end_us for watermark_us in world.progress.watermark_us)

    return done


def newest_gap_rows(world: World, symbol: str) -> dict[int, GapRow]:
    """The valid row of each gap of a symbol's ledger, by its id: the newest."""
    key = f"{EXCHANGE}:{symbol}"
    newest: dict[int, GapRow] = {}
    for frame in world.frames.of("gaps", partition_of(key, world.broker.partitions)):
        if frame is not None and key in frame.symbols:
            columns = frame.columns
            mine = columns["symbol_code"] == frame.symbols.index(key)
            rows = map(GapRow._make, zip(*(columns[name][mine].tolist() for name in GapRow._fields), strict=True))
            newest |= {row.gap_id: row for row in rows}
    return newest


def ledger_is_quiet(world: World) -> Callable[[], bool]:
    """Whether the ledger has the last word on every gap: it is written after the trades it is about are safe."""
    return lambda: all(row.state != GAP_OPEN for symbol in world.symbols() for row in newest_gap_rows(world, symbol).values())


def caught_up(world: World, name: str) -> Callable[[], bool]:
    """Whether a component has caught up with what there is at the time of this call."""
    broker = world.broker
    partitions = range(broker.partitions)
    if name == "worker":
        ends = [broker.end("trades", partition) for partition in partitions]
        return lambda: all(world.progress.read().emitted[partition] >= ends[partition] - 1 for partition in partitions)
    if name == "sink":
        wanted = {(topic, p): broker.end(topic, p) for topic in ("trades", "bars") for p in partitions}
        return lambda: all(broker.committed.get((SINK_GROUP, *place), 0) >= end for place, end in wanted.items())
    if name == "broker":
        ends = [broker.end("trades", partition) for partition in partitions]
        return lambda: all(broker.end("trades", partition) > ends[partition] for partition in partitions)
    if name == "api":
        return lambda: len(world.subscriber.confirmed) == len(world.subscriber.received)
    before = {symbol: int(max(world.truth(symbol)["trade_id"], default=-1)) for symbol in world.symbols()}
    return lambda: all(world.progress.read().newest_id(symbol) >= newest for symbol, newest in before.items())
