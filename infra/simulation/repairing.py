"""The reconcile of a simulated world: what the repair process does for each gap and late trade, by the same pure parts, in one go at the end.

Comes in: a world that has settled. Goes out: frames of bars in its broker, one revision up, where a stored bar is not the bar of the stored
trades. Jobs, PostgreSQL and waiting for open bars are the process's own (``infra.repair``) and are tried on the real stack.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.repair_jobs import Wanted
from infra.repair_triggers import merge, of_gaps, of_letter, of_quarantine
from infra.simulation.checks import held_back
from infra.simulation.components import frame_codec, row_codec
from processors.bars import TRADE_DTYPES
from processors.coverage import LedgerRow, extent
from processors.coverage import newest as valid_rows
from processors.reconcile import STORED, Evidence, dense_runs, rebuild, reconcile
from schemas.frames import GAP_COMPLETE, GAP_FILLED, Frame
from schemas.partitions import partition_of
from schemas.timeframes import timeframe_seconds

if TYPE_CHECKING:
    from infra.simulation.world import World

SOURCE = "repair"


def repair(world: World) -> int:
    """Publish what differs; how many bars that were."""
    count = 0
    wanted = merge(_wanted(world))
    for key in sorted({f"{one.exchange}:{one.symbol}" for one in wanted}):
        ranges = [(one.start_us, one.end_us) for one in wanted if f"{one.exchange}:{one.symbol}" == key]
        count += _reconcile(world, key, ranges)
    return count


def _wanted(world: World) -> Iterator[Wanted]:
    """What the repair's own triggers make of the topics."""
    broker = world.broker
    for partition in range(broker.partitions):
        for offset, value in enumerate(broker.values("gaps", partition)):
            yield from of_gaps(frame_codec("gaps").decode(value), f"gaps/{partition}/{offset}")
        for offset, value in enumerate(broker.values("quarantine", partition)):
            yield from of_quarantine(frame_codec("quarantine").decode(value), f"quarantine/{partition}/{offset}")
    for offset, value in enumerate(broker.values("deadletter", 0)):
        yield from of_letter(row_codec("deadletter").decode(value), f"deadletter/0/{offset}")


def _told(world: World, key: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What the ledger's valid rows call complete or filled, ``[start, end)``, and what they call missing, as ``Evidence`` wants it."""
    rows = []
    for frame in world.frames.of("gaps", partition_of(key, world.broker.partitions)):
        if frame is not None and key in frame.symbols:
            mine = frame.columns["symbol_code"] == frame.symbols.index(key)
            names = ("gap_id", "start_time_us", "end_time_us", "state")
            rows += [LedgerRow(*row) for row in zip(*(frame.columns[name][mine].tolist() for name in names), strict=True)]
    valid = valid_rows(rows)
    held = [extent(row) for row in valid if row.state in (GAP_COMPLETE, GAP_FILLED)]
    missing = [(row.start_time_us, row.end_time_us) for row in valid if row.state not in (GAP_COMPLETE, GAP_FILLED)]
    return np.array(held, np.int64).reshape(-1, 2), np.array(missing, np.int64).reshape(-1, 2)


def _reconcile(world: World, key: str, ranges: list[tuple[int, int]]) -> int:
    broker, names = world.broker, world.scenario.tuning.timeframes
    trades = world.store.rows("trades", key)
    if not len(trades["trade_id"]):
        return 0
    order = np.lexsort((trades["trade_id"], trades["exchange_time_us"]))
    held = held_back(world, key.partition(":")[2])
    held_us = np.sort(trades["exchange_time_us"][np.isin(trades["trade_id"], held)])
    order = order[~np.isin(trades["trade_id"][order], held)]
    page = {name: trades[name][order] for name in TRADE_DTYPES if name != "symbol_code"}
    by_id = np.argsort(trades["trade_id"], kind="stable")
    dense = dense_runs(trades["trade_id"][by_id], trades["exchange_time_us"][by_id])
    # flat bars carry the last price on until the next trade: so far a job goes (``infra.repair_run``)
    times = page["exchange_time_us"]
    ranges = [(start, max(end, int(times[times >= end][0]) if (times >= end).any() else world.end_us)) for start, end in ranges]
    covered, missing = _told(world, key)
    evidence = Evidence(missing=missing, covered=covered, dense=dense, held_us=held_us)
    rebuilt = rebuild([page], names, world.end_us)
    bars = world.store.rows("bars", key)
    newest = np.lexsort((bars["revision"], bars["open_time_us"], bars["timeframe_s"]))
    keys = np.stack([bars["timeframe_s"][newest].astype(np.int64), bars["open_time_us"][newest]], axis=1)
    last = np.append((keys[1:] != keys[:-1]).any(axis=1), True) if len(keys) else np.empty(0, np.bool_)
    stored = {name: bars[name][newest][last] for name in STORED}
    rows = reconcile(stored, rebuilt, ranges, evidence).rows
    count = len(rows["open"])
    if count:
        assert {int(one) for one in np.unique(rows["timeframe_s"])} <= {timeframe_seconds(name) for name in names}
        columns = {"symbol_code": np.zeros(count, np.int32), **rows}
        frame = Frame(source=SOURCE, watermark_us=0, symbols=(key,), columns=columns)
        broker.inject(("bars", partition_of(key, broker.partitions)), frame_codec("bars").encode(frame))
    return count
