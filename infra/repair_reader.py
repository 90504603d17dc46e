"""What the repair reads of one symbol from ClickHouse: trades in pages of bounded size, stored bars, the ledger, what is held back.

Blocking; every method may raise ClickHouseError. Trades come as columns, a page at a time, in order of (time, id): the days of a busy
market do not fit in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from api.quality import BY_WEIGHT
from infra.symbol_reader import OUT_STATES, Neighbour, SymbolReader
from processors.coverage import extent
from processors.reconcile import STORED, Evidence, joined_runs
from schemas.frames import GAP_COMPLETE, GAP_FILLED
from schemas.timeframes import US_PER_SECOND

Array = npt.NDArray[Any]
Columns = dict[str, Array]

_TRADE: Final = ("trade_id", "price", "size", "side", "exchange_time_us", "receive_time_us")
_SLOT_US: Final = 600 * US_PER_SECOND
"""Trades are counted by ten minutes before they are read, so that a page never has many more rows than wanted."""


class Clock(NamedTuple):
    """How far the worker's bars of a symbol are."""

    close_us: int
    """End of the newest bar of the smallest timeframe; 0 without one."""
    known_at_us: int
    """When it was published."""


class RepairReader(SymbolReader):
    """Reads what a comparison of one symbol needs.

    Args:
        client: blocking ``clickhouse-connect`` client in the stack's database.
        exchange, symbol: whose rows.
        page_rows: trades of a page, about.
        known_at_us: as SymbolReader has it.
    """

    def __init__(self, client: Any, exchange: str, symbol: str, page_rows: int, known_at_us: int | None = None) -> None:
        super().__init__(client, exchange, symbol, known_at_us)
        self._page_rows = page_rows

    def clock(self, timeframe_s: int) -> Clock:
        """How far the worker's bars are; bars of the repair do not count."""
        rows = self._rows(
            "SELECT close_time_us, known_at_us FROM bars WHERE {of} AND timeframe_s = {f:Int32} AND input_offset >= 0"
            " ORDER BY open_time_us DESC, revision DESC LIMIT 1",
            f=timeframe_s,
        )
        return Clock(int(rows[0][0]), int(rows[0][1])) if rows else Clock(0, 0)

    def trades(self, start_us: int, end_us: int, seed: Neighbour | None, without: Array) -> Iterator[Columns]:
        """Pages of the trades in ``[start_us, end_us)``, before them the ``seed``; ids in ``without`` are left out.

        Args:
            seed: the last trade before, whose price flat bars go on with.
            without: int64, ascending.
        """
        if seed is not None:
            yield self._page("exchange_time_us = {t:Int64} AND trade_id = {i:Int64}", t=seed.time_us, i=seed.trade_id)
        low = start_us
        for high in self._cuts(start_us, end_us):
            page = self._page("exchange_time_us >= {a:Int64} AND exchange_time_us < {b:Int64}", a=low, b=high)
            low = high
            if len(without):
                keep = ~np.isin(page["trade_id"], without)
                page = {name: column[keep] for name, column in page.items()}
            if len(page["trade_id"]):
                yield page

    def stored(self, start_us: int, end_us: int, timeframes_s: tuple[int, ...]) -> Columns:
        """Newest revision of each bar that opens in ``[start_us, end_us)``: columns ``processors.reconcile.STORED`` and ``last_receive_time_us``."""
        names = ", ".join((*STORED, "last_receive_time_us"))
        return self._columns(
            f"SELECT {names} FROM bars WHERE {{of}} AND timeframe_s IN {{f:Array(Int32)}}"
            " AND open_time_us >= {a:Int64} AND open_time_us < {b:Int64}"
            " ORDER BY timeframe_s, open_time_us, revision DESC, kafka_offset DESC LIMIT 1 BY timeframe_s, open_time_us",
            a=start_us,
            b=end_us,
            f=list(timeframes_s),
        )

    def newest_bar(self, timeframe_s: int) -> Columns:
        """The newest bar of a timeframe in its newest revision, as columns of one row (none: of no row)."""
        return self._columns(
            f"SELECT {', '.join((*STORED, 'last_receive_time_us', 'is_final', 'input_offset'))} FROM bars"
            " WHERE {of} AND timeframe_s = {f:Int32} ORDER BY open_time_us DESC, revision DESC, kafka_offset DESC LIMIT 1",
            f=timeframe_s,
        )

    def held_back(self, start_us: int, end_us: int) -> tuple[Array, Array]:
        """(ids, times) of trades in the range whose valid word is held or discarded; ids ascending."""
        rows = self._rows(
            "SELECT trade_id, exchange_time_us FROM (SELECT trade_id, exchange_time_us, state FROM quarantine WHERE {of}"
            f" AND exchange_time_us >= {{a:Int64}} AND exchange_time_us < {{b:Int64}} ORDER BY trade_id, {BY_WEIGHT} LIMIT 1 BY trade_id)"
            f" WHERE state IN {OUT_STATES} ORDER BY trade_id",
            a=start_us,
            b=end_us,
        )
        found = np.array(rows, np.int64).reshape(-1, 2)
        return found[:, 0], found[:, 1]

    def evidence(self, start_us: int, end_us: int, seed: Neighbour | None, after: Neighbour | None, held_us: Array) -> Evidence:
        """What is known to be missing in ``[start_us, end_us)``, and what vouches that nothing is."""
        missing, covered = [], []
        for row in self.ledger(start_us, end_us):
            if row.state in (GAP_COMPLETE, GAP_FILLED):
                covered.append(extent(row))
            else:
                missing.append((row.start_time_us, row.end_time_us))
        return Evidence(
            missing=np.array(missing, np.int64).reshape(-1, 2),
            covered=np.array(covered, np.int64).reshape(-1, 2),
            dense=self._dense(start_us, end_us, seed, after),
            held_us=np.sort(held_us),
        )

    def _dense(self, start_us: int, end_us: int, seed: Neighbour | None, after: Neighbour | None) -> Array:
        """Runs of ids without a hole from the trade before to the trade after; one count where there is no hole at all."""
        first, last, count = self._rows(
            "SELECT min(trade_id), max(trade_id), count() FROM trades WHERE {of} AND exchange_time_us >= {a:Int64} AND exchange_time_us < {b:Int64}",
            a=start_us,
            b=end_us,
        )[0]
        ids = [int(first), int(last)] if count else []
        ids += [seed.trade_id] if seed is not None else []
        ids += [after.trade_id] if after is not None else []
        if len(ids) < 2:
            return np.zeros((0, 2), np.int64)
        low, high = min(ids), max(ids)
        times = self._rows(
            "SELECT count(), argMin(exchange_time_us, trade_id), argMax(exchange_time_us, trade_id) FROM trades WHERE {of}"
            " AND trade_id >= {l:Int64} AND trade_id <= {h:Int64}",
            l=low,
            h=high,
        )[0]
        if int(times[0]) == high - low + 1:
            return np.array([[int(times[1]), int(times[2])]], np.int64)
        return joined_runs(self._ids(low, high))

    def _ids(self, low: int, high: int) -> Iterator[tuple[Array, Array]]:
        while low <= high:
            page = self._columns(
                "SELECT trade_id, exchange_time_us FROM trades WHERE {of}"
                " AND trade_id >= {l:Int64} AND trade_id <= {h:Int64} ORDER BY trade_id LIMIT {n:UInt64}",
                l=low,
                h=high,
                n=self._page_rows,
            )
            if not len(page["trade_id"]):
                return
            yield page["trade_id"], page["exchange_time_us"]
            low = int(page["trade_id"][-1]) + 1

    def _cuts(self, start_us: int, end_us: int) -> Iterator[int]:
        """Ends of the pages, the last is ``end_us``."""
        rows = self._rows(
            "SELECT intDiv(exchange_time_us, {w:Int64}) AS slot, count() FROM trades WHERE {of}"
            " AND exchange_time_us >= {a:Int64} AND exchange_time_us < {b:Int64} GROUP BY slot ORDER BY slot",
            w=_SLOT_US,
            a=start_us,
            b=end_us,
        )
        waiting = 0
        for slot, count in rows:
            if waiting and waiting + count > self._page_rows:
                yield int(slot) * _SLOT_US
                waiting = 0
            waiting += count
        if waiting:
            yield end_us

    def _page(self, where: str, **parameters: int) -> Columns:
        return self._columns(
            f"SELECT {', '.join(_TRADE)} FROM trades WHERE {{of}} AND {where} ORDER BY exchange_time_us, trade_id", **parameters
        )

    def _columns(self, sql: str, **parameters: Any) -> Columns:
        table = self._client.query_arrow(sql.replace("{of}", self._of), parameters={**self._parameters, **parameters})
        return {name: table.column(place).to_numpy() for place, name in enumerate(table.column_names)}
