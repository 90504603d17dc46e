"""What must hold at the end of every simulated world, and how far each component has come on the way.

The truth is what the market traded. Violations are sentences that name the invariant, the instrument and the first difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from infra.simulation.broker import Place, SimBroker
from infra.simulation.components import EXCHANGE, SINK_GROUP, describe, frame_codec, row_codec
from processors.bars import build
from processors.quality import DISCARDED, HELD
from schemas.errors import DecodeError
from schemas.frames import GAP_OPEN, GAP_UNFILLABLE, HISTORY, Frame
from schemas.partitions import partition_of
from schemas.timeframes import timeframe_seconds

if TYPE_CHECKING:
    from infra.simulation.world import World

_OUT = (HELD, DISCARDED)
Columns = dict[str, npt.NDArray[Any]]
_TRADE: tuple[str, ...] = ("trade_id", "price", "size", "side", "exchange_time_us")
_BAR: tuple[str, ...] = (
    "open_time_us", "close_time_us", "open", "high", "low", "close", "volume", "quote_volume", "buy_volume", "trade_count", "vwap",
    "first_trade_id", "last_trade_id",
)  # fmt: skip


def violations(world: World) -> list[str]:
    """Every invariant that does not hold; [] when all do."""
    found: list[str] = []
    found += [f"process: {line}" for line in world.exits]
    found += [f"unhandled: {line}" for line in world.loop.failures]
    found += [f"not settled: {line}" for line in world.unsettled]
    found += world.live_violations
    for symbol in world.symbols():
        found += _trades(world, symbol)
        found += _bars(world, symbol)
    for partition in range(world.broker.partitions):
        found += _one_to_one(world, partition)
    found += _client(world)
    for symbol in world.symbols():
        found += _ledger(world, symbol)
        found += _complete(world, symbol)
    return found + _letters(world)


def _letters(world: World) -> list[str]:
    """A dead letter for each record that nobody could read (again after a crash, perhaps), and none for anything else."""
    letters = [row_codec("deadletter").decode(value) for value in world.broker.values("deadletter", 0)]
    found = [f"dead letter without reason: {describe(row)}" for row in letters if row["reason"] != "undecodable_frame"]
    told = {(row["partition"], row["offset"]) for row in letters if row["reason"] == "undecodable_frame" and row["topic"] == "trades"}
    spoilt = set()
    for partition in range(world.broker.partitions):
        values = world.broker.values("trades", partition)
        spoilt |= {(partition, offset) for offset, value in enumerate(values) if _decoded("trades", value) is None}
    if told != spoilt:
        found.append(f"dead letters: told of {sorted(told)}, unreadable are {sorted(spoilt)}")
    return found


def _decoded(topic: str, value: bytes) -> Frame | None:
    """The frame of a record, None for one nobody can read."""
    try:
        return frame_codec(topic).decode(value)
    except DecodeError:
        return None


def truth(world: World, symbol: str) -> Columns:
    """What the market traded of a symbol until the world was over; it trades on, so that watermarks do."""
    trades = world.exchange.truth(symbol.replace("-", ""))
    before = trades["exchange_time_us"] < world.end_us
    return {name: column[before] for name, column in trades.items()}


def _key(symbol: str) -> str:
    return f"{EXCHANGE}:{symbol}"


def stored_trades(world: World, symbol: str) -> Columns:
    """The stored trades of a symbol, by id."""
    rows = world.store.rows("trades", _key(symbol))
    order = np.argsort(rows["trade_id"], kind="stable")
    order = order[rows["exchange_time_us"][order] < world.end_us]
    return {name: rows[name][order] for name in _TRADE}


def _trades(world: World, symbol: str) -> list[str]:
    """Every trade of the truth is stored once, as it was."""
    wanted, stored = truth(world, symbol), stored_trades(world, symbol)
    ids, held = wanted["trade_id"], stored["trade_id"]
    doubled = np.unique(held[1:][held[1:] == held[:-1]])
    missing = np.setdiff1d(ids, held)
    invented = np.setdiff1d(held, ids)
    found = []
    for what, rows in (("doubled", doubled), ("lost", missing), ("invented", invented)):
        if len(rows):
            found.append(f"trades {what}: {symbol} {len(rows)} of {len(ids)}, first {rows[:3].tolist()}")
    if not found:
        found += [f"trades differ: {symbol} column {name}" for name in _TRADE if not np.array_equal(wanted[name], stored[name])]
    return found


def newest_bars(world: World, symbol: str, timeframe: str) -> Columns:
    """The newest revision of each stored bar, by open time."""
    rows = world.store.rows("bars", _key(symbol))
    mine = rows["timeframe_s"] == timeframe_seconds(timeframe)
    order = np.lexsort((rows["revision"][mine], rows["open_time_us"][mine]))
    bars = {name: column[mine][order] for name, column in rows.items()}
    opens = bars["open_time_us"]
    last = np.append(opens[1:] != opens[:-1], True) if len(opens) else np.empty(0, np.bool_)
    return {name: column[last] for name, column in bars.items()}


def live_bars(world: World) -> list[str]:
    """Before anything was repaired: every bar but those of trades that were fetched after their bars had closed is right already."""
    return [f"live {line}" for symbol in world.symbols() for line in _bars(world, symbol, past_us=_past_times(world, symbol))]


def held_back(world: World, symbol: str) -> npt.NDArray[np.int64]:
    """Ids of trades that the checks hold back from the bars: the newest word on them in the topic."""
    key = _key(symbol)
    states: dict[int, int] = {}
    for value in world.broker.values("quarantine", partition_of(key, world.broker.partitions)):
        frame = frame_codec("quarantine").decode(value)
        if key in frame.symbols:
            mine = frame.columns["symbol_code"] == frame.symbols.index(key)
            states |= dict(zip(frame.columns["trade_id"][mine].tolist(), frame.columns["state"][mine].tolist(), strict=True))
    return np.array(sorted(trade_id for trade_id, state in states.items() if state in _OUT), np.int64)


def _past_times(world: World, symbol: str) -> npt.NDArray[np.int64]:
    """Times of the trades of a symbol that came as trades of the past."""
    key = _key(symbol)
    found = [np.empty(0, np.int64)]
    for value in world.broker.values("trades", partition_of(key, world.broker.partitions)):
        frame = _decoded("trades", value)
        if frame is not None and frame.flags & HISTORY and key in frame.symbols:
            found.append(frame.columns["exchange_time_us"][frame.columns["symbol_code"] == frame.symbols.index(key)])
    return np.unique(np.concatenate(found))


def _right_without_repair(wanted: Columns, past_us: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Mask of bars that hold no trade of the past and no price of one: flat bars go on with the close before them."""
    if not len(past_us):
        return np.ones(len(wanted["open_time_us"]), np.bool_)
    count = np.searchsorted(past_us, wanted["close_time_us"]) - np.searchsorted(past_us, wanted["open_time_us"])
    touched = count > 0
    for place in range(1, len(touched)):
        touched[place] |= touched[place - 1] and wanted["trade_count"][place] == 0
    return ~touched


def _bars(world: World, symbol: str, past_us: npt.NDArray[np.int64] | None = None) -> list[str]:
    """Stored bars equal those built of the truth in one go, as far as the truth has closed them; ``past_us``: but for trades of these times."""
    trades = world.exchange.truth(symbol.replace("-", ""))
    held = held_back(world, symbol)
    if len(held):
        kept = ~np.isin(trades["trade_id"], held)
        trades = {name: column[kept] for name, column in trades.items()}
    if not len(trades["trade_id"]):
        return []
    frame = pl.DataFrame({"exchange": EXCHANGE, "symbol": symbol, **{name: trades[name] for name in _TRADE}})
    found = []
    timeframes = world.scenario.tuning.timeframes
    built = build(frame, list(timeframes))
    for timeframe in timeframes:
        wanted = _columns(built.filter(pl.col("timeframe") == timeframe))
        closed = wanted["close_time_us"] <= world.end_us
        if past_us is not None:
            closed &= _right_without_repair(wanted, past_us)
        wanted = {name: column[closed] for name, column in wanted.items()}
        have = newest_bars(world, symbol, timeframe)
        opens, held = wanted["open_time_us"], have["open_time_us"]
        rows = world.store.rows("bars", _key(symbol))
        pairs = np.stack([rows[name].astype(np.int64) for name in ("timeframe_s", "open_time_us", "revision")], axis=1)
        if len(np.unique(pairs, axis=0)) != len(pairs):
            found.append(f"bars doubled: {symbol} {timeframe}")
        missing = np.setdiff1d(opens, held)
        if len(missing):
            found.append(f"bars missing: {symbol} {timeframe} {len(missing)} of {len(opens)}, first {missing[:3].tolist()}")
            continue
        mine = np.isin(held, opens)
        for name in _BAR:
            if not np.array_equal(wanted[name], have[name][mine]):
                place = np.flatnonzero(wanted[name] != have[name][mine])[:1]
                found.append(f"bars differ: {symbol} {timeframe} column {name} at {opens[place].tolist()}")
                break
    return found


def _columns(built: pl.DataFrame) -> Columns:
    times = {f"{name}_us": built[name].dt.epoch("us").to_numpy() for name in ("open_time", "close_time")}
    return times | {name: built[name].to_numpy() for name in _BAR if name not in times}


def _one_to_one(world: World, partition: int) -> list[str]:
    """Every trades record has exactly one bars record, in order."""
    offsets = [frame_codec("bars").decode(value).input_offset for value in world.broker.values("bars", partition)]
    offsets = [offset for offset in offsets if offset >= 0]
    wanted = list(range(world.broker.end("trades", partition)))
    if offsets == wanted[: len(offsets)] and len(wanted) - len(offsets) <= 2:  # the newest ones are under way
        return []
    odd = next(
        (place for place, (have, want) in enumerate(zip(offsets, wanted, strict=False)) if have != want), min(len(offsets), len(wanted))
    )
    return [
        f"bars frames are not one to one: partition {partition} has {len(offsets)} for {len(wanted)} trades records, first odd at {odd}: "
        f"{offsets[odd : odd + 3]}"
    ]


def _ledger(world: World, symbol: str) -> list[str]:
    """Every gap of the ledger is closed, as filled: the venue had all of it. The newest row of a gap is valid."""
    key = _key(symbol)
    newest: dict[int, tuple[int, int, int]] = {}
    for value in world.broker.values("gaps", partition_of(key, world.broker.partitions)):
        frame = frame_codec("gaps").decode(value)
        if key in frame.symbols:
            columns = frame.columns
            mine = columns["symbol_code"] == frame.symbols.index(key)
            names = ("gap_id", "state", "first_missing_id", "last_missing_id")
            for gap_id, *row in zip(*(columns[name][mine].tolist() for name in names), strict=True):
                newest[gap_id] = (row[0], row[1], row[2])
    return [
        f"ledger: gap {gap_id} of {symbol}, trades {first}..{last}, ended in state {state}"
        for gap_id, (state, first, last) in newest.items()
        if state in (GAP_OPEN, GAP_UNFILLABLE)
    ]


def _complete(world: World, symbol: str) -> list[str]:
    """After the repair every bar is complete that begins after the symbol's first trade: nothing is missing any more."""
    first = truth(world, symbol)["exchange_time_us"][:1]
    if not len(first):
        return []
    found = []
    for timeframe in world.scenario.tuning.timeframes:
        bars = newest_bars(world, symbol, timeframe)
        wrong = (bars["complete"] == 0) & (bars["open_time_us"] >= first[0]) & (bars["close_time_us"] <= world.end_us)
        if wrong.any():
            opens = bars["open_time_us"][wrong]
            found.append(f"bars not complete: {symbol} {timeframe} {len(opens)} of {len(wrong)}, first {opens[:3].tolist()}")
    return found


def _topic_rows(world: World, channel: str, symbol: str, timeframe: str) -> tuple[list[tuple[int, int]], int]:
    """(key, revision) of what a subscriber gets: the topic's rows in order, each once; and how many of them it must have by now."""
    key = _key(symbol)
    found: dict[tuple[int, int], None] = {}
    due, partition = 0, partition_of(key, world.broker.partitions)
    for offset, value in enumerate(world.broker.values(channel, partition)):
        if offset < world.due.get((channel, partition), 0):
            due = len(found)
        frame = _decoded(channel, value)
        if frame is None or key not in frame.symbols or not frame.row_count:
            continue
        columns = frame.columns
        mine = columns["symbol_code"] == frame.symbols.index(key)
        if channel == "trades":
            for trade_id in columns["trade_id"][mine].tolist():
                found.setdefault((trade_id, 0))
            continue
        mine &= (columns["is_final"] == 1) & (columns["timeframe_s"] == timeframe_seconds(timeframe))
        for open_time_us, revision in zip(columns["open_time_us"][mine].tolist(), columns["revision"][mine].tolist(), strict=True):
            found.setdefault((open_time_us, revision))
    return list(found), due


def _client(world: World) -> list[str]:
    """The subscriber got every row once, in the order of the topic, over all its reconnects."""
    found = []
    for (channel, exchange, symbol, timeframe), state in world.subscriber.received.items():
        name = f"{channel} {exchange}:{symbol} {timeframe}".strip()
        found += [f"client: {name} was reset: {reason}" for reason in state.resets]
        found += [f"client: {name} was refused: {reason}" for reason in state.errors]
        (wanted, due), got = _topic_rows(world, channel, symbol, timeframe), state.rows
        if got == wanted[: len(got)] and len(got) >= due:
            continue
        if len(set(got)) != len(got):
            found.append(f"client: {name} got {len(got) - len(set(got))} rows twice")
        elif missing := [row for row in wanted[:due] if row not in set(got)]:
            found.append(f"client: {name} lacks {len(missing)} of {len(wanted)} rows, first {missing[0]}")
        else:
            found.append(f"client: {name} got its rows in another order or too many")
    return found


def collected(world: World) -> Callable[[], bool]:
    """Whether everything the market traded is published, no gap is open, and the watermark lies beyond the last trade's bar."""
    newest = {symbol: int(max(truth(world, symbol)["trade_id"], default=-1)) for symbol in world.symbols()}
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


class Progress:
    """How far the topics have come, read record by record as they grow."""

    def __init__(self, broker: SimBroker) -> None:
        self.watermark_us = [0] * broker.partitions
        self.emitted = [-1] * broker.partitions
        """``input_offset`` of the newest bars record made from a trades record."""
        self._broker = broker
        self._read: dict[Place, int] = {}
        self._newest: dict[str, int] = {}

    def newest_id(self, symbol: str) -> int:
        """Newest trade id of a symbol in the topic, -1 for none."""
        return self._newest.get(_key(symbol), -1)

    def read(self) -> Progress:
        """Take in what is new; itself."""
        for partition in range(self._broker.partitions):
            for frame in self._frames("trades", partition):
                self.watermark_us[partition] = max(self.watermark_us[partition], frame.watermark_us)
                for code, key in enumerate(frame.symbols):
                    ids = frame.columns["trade_id"][frame.columns["symbol_code"] == code]
                    if len(ids):
                        self._newest[key] = max(self._newest.get(key, -1), int(ids.max()))
            for frame in self._frames("bars", partition):
                self.emitted[partition] = max(self.emitted[partition], frame.input_offset)
        return self

    def _frames(self, topic: str, partition: int) -> Iterator[Frame]:
        log = self._broker.logs[(topic, partition)]
        start = self._read.get((topic, partition), 0)
        self._read[(topic, partition)] = log.synced
        for record in log.records[start : log.synced]:
            frame = _decoded(topic, record.value)
            if frame is not None:
                yield frame


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
    before = {symbol: int(max(truth(world, symbol)["trade_id"], default=-1)) for symbol in world.symbols()}
    return lambda: all(world.progress.read().newest_id(symbol) >= newest for symbol, newest in before.items())


def table_hashes(world: World) -> dict[str, str]:
    """SHA-256 of each table's content: the same for a disturbed and an undisturbed world of one market."""
    found = {}
    digest = hashlib.sha256()
    for symbol in world.symbols():
        for name, column in stored_trades(world, symbol).items():
            digest.update(name.encode() + np.ascontiguousarray(column).tobytes())
    found["trades"] = digest.hexdigest()
    digest = hashlib.sha256()
    for symbol in world.symbols():
        for timeframe in world.scenario.tuning.timeframes:
            bars = newest_bars(world, symbol, timeframe)
            closed = bars["close_time_us"] <= world.end_us
            for name in _BAR:
                digest.update(name.encode() + np.ascontiguousarray(bars[name][closed]).tobytes())
    found["bars"] = digest.hexdigest()
    return found
