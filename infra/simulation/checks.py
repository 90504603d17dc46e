"""What must hold at the end of every simulated world, and how far each component has come on the way.

The truth is what the market traded. Violations are sentences that name the invariant, the instrument and the first difference.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from infra.simulation.components import EXCHANGE, describe, row_codec
from infra.simulation.progress import newest_gap_rows
from processors.bars import build
from processors.gap_book import touches
from processors.quality import DISCARDED, HELD
from schemas.frames import GAP_OPEN, GAP_UNFILLABLE, HISTORY
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
    expected = {"undecodable_frame", "malformed_message"} if world.malformed else {"undecodable_frame"}
    found = [f"dead letter without reason: {describe(row)}" for row in letters if row["reason"] not in expected]
    told = {(row["partition"], row["offset"]) for row in letters if row["reason"] == "undecodable_frame" and row["topic"] == "trades"}
    spoilt = set()
    for partition in range(world.broker.partitions):
        frames = world.frames.of("trades", partition)
        spoilt |= {(partition, offset) for offset, frame in enumerate(frames) if frame is None}
    if told != spoilt:
        found.append(f"dead letters: told of {sorted(told)}, unreadable are {sorted(spoilt)}")
    return found


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
    wanted, stored = world.truth(symbol), stored_trades(world, symbol)
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
    found = [line for symbol in world.symbols() for line in _bars(world, symbol, past_us=_past_times(world, symbol))]
    found += [line for symbol in world.symbols() for line in _doubted(world, symbol)]
    return [f"live {line}" for line in found]


def _doubted(world: World, symbol: str) -> list[str]:
    """A bar that is not complete lies where the ledger says that something was missing or in doubt, or before the first trade."""
    first = world.truth(symbol)["exchange_time_us"][:1]
    gaps = [row for row in newest_gap_rows(world, symbol).values() if row.evidence]
    start, end = (np.array([getattr(row, name) for row in gaps], np.int64) for name in ("start_time_us", "end_time_us"))
    found = []
    for timeframe in world.scenario.tuning.timeframes if len(first) else ():
        bars = newest_bars(world, symbol, timeframe)
        opens, closes = bars["open_time_us"], bars["close_time_us"]
        known = touches(opens[:, None], closes[:, None], start, end).any(axis=1)
        wrong = (bars["complete"] == 0) & (opens >= first[0]) & (closes <= world.end_us) & ~known
        if wrong.any():
            found.append(f"bars doubted without reason: {symbol} {timeframe} {np.count_nonzero(wrong)}, first {opens[wrong][:3].tolist()}")
    return found


def held_back(world: World, symbol: str) -> npt.NDArray[np.int64]:
    """Ids of trades that the checks hold back from the bars: held in the topic, and nothing was decided on them; or discarded."""
    key = _key(symbol)
    states: dict[int, int] = {}
    for frame in world.frames.of("quarantine", partition_of(key, world.broker.partitions)):
        if frame is not None and key in frame.symbols:
            mine = frame.columns["symbol_code"] == frame.symbols.index(key)
            for trade_id, state in zip(frame.columns["trade_id"][mine].tolist(), frame.columns["state"][mine].tolist(), strict=True):
                if state != HELD or trade_id not in states:
                    states[trade_id] = state
    return np.array(sorted(trade_id for trade_id, state in states.items() if state in _OUT), np.int64)


def _past_times(world: World, symbol: str) -> npt.NDArray[np.int64]:
    """Times of the trades of a symbol that came as trades of the past."""
    key = _key(symbol)
    found = [
        frame.columns["exchange_time_us"][frame.columns["symbol_code"] == frame.symbols.index(key)]
        for frame in world.frames.of("trades", partition_of(key, world.broker.partitions))
        if frame is not None and frame.flags & HISTORY and key in frame.symbols
    ]
    return np.unique(np.concatenate([np.empty(0, np.int64), *found]))


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
    found = []
    for timeframe, wanted in true_bars(world, symbol).items():
        if past_us is not None:
            right = _right_without_repair(wanted, past_us)
            wanted = {name: column[right] for name, column in wanted.items()}
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


def true_bars(world: World, symbol: str) -> dict[str, Columns]:
    """Timeframe -> the bars of the truth that are closed, by the batch; without the trades that are held back."""
    held = held_back(world, symbol)
    place = (symbol, held.tobytes())
    known = world.true_bars.get(place)
    if known is not None:
        return known
    trades = world.available(symbol)
    kept = ~np.isin(trades["trade_id"], held)
    # the bar that is open at the end needs what comes after it; the rest of the time until now changes nothing before
    columns = {name: trades[name][kept] for name in _TRADE}
    found = world.true_bars[place] = {name: {} for name in world.scenario.tuning.timeframes}
    built = build(pl.DataFrame({"exchange": EXCHANGE, "symbol": symbol, **columns}), list(found)) if kept.any() else None
    for timeframe in found:
        if built is None:
            found[timeframe] = {name: np.empty(0, np.int64) for name in _BAR}
            continue
        bars = _columns(built.filter(pl.col("timeframe") == timeframe))
        closed = bars["close_time_us"] <= world.end_us
        found[timeframe] = {name: column[closed] for name, column in bars.items()}
    return found


def _columns(built: pl.DataFrame) -> Columns:
    times = {f"{name}_us": built[name].dt.epoch("us").to_numpy() for name in ("open_time", "close_time")}
    return times | {name: built[name].to_numpy() for name in _BAR if name not in times}


def _one_to_one(world: World, partition: int) -> list[str]:
    """Every trades record has exactly one bars record, in order."""
    offsets = [frame.input_offset for frame in world.frames.of("bars", partition) if frame is not None and frame.input_offset >= 0]
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
    """Every gap of the ledger is closed: filled where the venue has what was missed, unfillable with exactly the ids it has not."""
    rows = newest_gap_rows(world, symbol).values()
    found = [
        f"ledger: gap {row.gap_id} of {symbol}, trades {row.first_missing_id}..{row.last_missing_id}, ended open"
        for row in rows
        if row.state == GAP_OPEN
    ]
    lost = [row for row in rows if row.state == GAP_UNFILLABLE]
    forgotten = world.forgotten(symbol)
    named = {number for row in lost if row.first_missing_id >= 0 for number in range(row.first_missing_id, row.last_missing_id + 1)}
    never = world.never_were.get(symbol.replace("-", ""), [])
    wanted = {*world.lost_ids(symbol).tolist(), *never} - set(forgotten["trade_id"].tolist())
    newest = max(world.truth(symbol)["trade_id"].tolist(), default=-1)
    if world.numbering:
        # of the old numbering the venue cannot be asked, and what the new one began with is one stretch without ids
        begun = next((number for number in world.progress.ids(symbol).tolist() if number >= world.numbering), 0)
        wanted, named = ({number for number in ids if number >= begun} for ids in (wanted, named))
    if unnamed := sorted(number for number in wanted - named if number < newest):
        found.append(f"ledger: {symbol} lacks {len(unnamed)} lost ids, first {unnamed[:3]}")
    if wrong := sorted(number for number in named - wanted if number < newest):
        found.append(f"ledger: {symbol} calls {len(wrong)} ids lost that are not, first {wrong[:3]}")
    at_us = forgotten["exchange_time_us"]
    covered = [(at_us >= row.start_time_us) & (at_us <= row.end_time_us) for row in lost]
    if (silent := ~np.any([np.zeros(len(at_us), np.bool_), *covered], axis=0)).any():
        found.append(f"ledger: {symbol} lost {forgotten['trade_id'][silent][:3].tolist()} before its ids began anew, silently")
    if not (world.numbering or wanted) and lost:
        found.append(f"ledger: {symbol} calls gap {lost[0].gap_id} lost, and nothing was")
    return found


def _complete(world: World, symbol: str) -> list[str]:
    """After the repair every bar after the symbol's first trade is complete, but those that what is lost for good touches."""
    first = world.truth(symbol)["exchange_time_us"][:1]
    if not len(first):
        return []
    found = []
    lost = [row for row in newest_gap_rows(world, symbol).values() if row.state == GAP_UNFILLABLE]
    start, end = (np.array([getattr(row, name) for row in lost], np.int64) for name in ("start_time_us", "end_time_us"))
    for timeframe in world.scenario.tuning.timeframes:
        bars = newest_bars(world, symbol, timeframe)
        opens, closes = bars["open_time_us"], bars["close_time_us"]
        judged = (opens >= first[0]) & (closes <= world.end_us)
        touched = touches(opens[:, None], closes[:, None], start, end).any(axis=1)
        for what, wrong in (
            ("not complete", (bars["complete"] == 0) & ~touched),
            ("complete over a loss", (bars["complete"] == 1) & touched),
        ):
            if (wrong & judged).any():
                at = opens[wrong & judged]
                found.append(f"bars {what}: {symbol} {timeframe} {len(at)} of {len(wrong)}, first {at[:3].tolist()}")
    return found


def _topic_rows(world: World, channel: str, symbol: str, timeframe: str) -> tuple[list[tuple[int, int]], int]:
    """(key, revision) of what a subscriber gets: the topic's rows in order, each once; and how many of them it must have by now."""
    key = _key(symbol)
    found: dict[tuple[int, int], None] = {}
    due, partition = 0, partition_of(key, world.broker.partitions)
    for offset, frame in enumerate(world.frames.of(channel, partition)):
        if offset < world.due.get((channel, partition), 0):
            due = len(found)
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
            for name in (*_BAR, "complete", "held_count"):  # revisions tell how often a bar was made anew, which a disturbance may change
                digest.update(name.encode() + np.ascontiguousarray(bars[name][closed]).tobytes())
    found["bars"] = digest.hexdigest()
    return found
