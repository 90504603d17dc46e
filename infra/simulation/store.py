"""A simulated history store: tables in memory, inserts that are stored and yet not answered, crashes between the two.

Comes in: what the sink inserts (`streams.sink.Store`) and what the API's live tail asks (`api.live.knowledge.Knowledge`). It keeps what
ClickHouse promises as it is set up here: a batch is stored whole or not at all, an answered insert survives, a batch sent again under the
same token is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from api.errors import StoreUnavailableError
from api.live.filters import Shown
from api.live.series import Seed, SeriesKey
from api.rows import FIELDS, bar_row, row_json, trade_row
from infra.simulation.loop import PROCESS
from infra.simulation.trace import Trace
from schemas.partitions import partition_of
from schemas.seam import Clock
from streams.sink import Batch

DEDUPLICATION_WINDOW: Final = 1_000
"""Tokens remembered per table, as ``non_replicated_deduplication_window``."""


class SimStore:
    """The store.

    Args:
        random: of crashes and lost answers.
        trace: gets every insert.
    """

    def __init__(self, random: Random, trace: Trace, partitions: int) -> None:
        self.up = True
        self.lost_answers = 0.0
        """Share of inserts that are stored but answered with an error."""
        self.refused = 0.0
        """Share of inserts that fail and are not stored."""
        self.batches: dict[str, list[Batch]] = {}
        self._random = random
        self._trace = trace
        self._partitions = partitions
        self._tokens: dict[str, list[str]] = {}

    # -- streams.sink.Store

    def insert(self, batch: Batch) -> None:
        """See Store. Raises OSError when it is away, refuses, or the answer is lost."""
        self._touch()
        if not self.up or self._random.random() < self.refused:
            raise OSError("the store does not answer")
        tokens = self._tokens.setdefault(batch.table, [])
        if batch.token not in tokens:
            tokens.append(batch.token)
            del tokens[:-DEDUPLICATION_WINDOW]
            self.batches.setdefault(batch.table, []).append(batch)
            self._trace.note("insert", batch.table, batch.token, batch.row_count)
        self._touch()
        if self._random.random() < self.lost_answers:
            raise OSError("the connection to the store broke before it answered")

    def stored_positions(self, table: str, partition: int, since_offset: int) -> set[tuple[int, int]]:
        """See Store."""
        self._check()
        found: set[tuple[int, int]] = set()
        for batch in self.batches.get(table, ()):
            mine = batch.columns["kafka_partition"] == partition
            offsets = batch.columns["kafka_offset"][mine]
            found |= {(int(offset), batch.month) for offset in np.unique(offsets).tolist() if offset >= since_offset}
        return found

    def largest_ids(self) -> dict[str, int]:
        """See Store."""
        self._check()
        found: dict[str, int] = {}
        for batch in self.batches.get("trades", ()):
            for code, key in enumerate(batch.keys):
                ids = batch.columns["trade_id"][batch.columns["symbol_code"] == code]
                if len(ids):
                    found[key] = max(found.get(key, -1), int(ids.max()))
        return found

    def held_ids(self, key: str, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """See Store."""
        self._check()
        held = self.column("trades", key, "trade_id")
        return ids[np.isin(ids, held)]

    def newest_input_offset(self, table: str, partition: int, before_offset: int) -> int:
        """See Store."""
        self._check()
        newest = -1
        for batch in self.batches.get(table, ()):
            mine = (batch.columns["kafka_partition"] == partition) & (batch.columns["kafka_offset"] < before_offset)
            if mine.any():
                newest = max(newest, int(batch.columns["input_offset"][mine].max()))
        return newest

    def newest_trades(self) -> list[tuple[str, int, int]]:
        """(key, newest trade id, its time) of every instrument."""
        found: dict[str, tuple[int, int]] = {}
        for batch in self.batches.get("trades", ()):
            codes, ids, times = (batch.columns[name] for name in ("symbol_code", "trade_id", "exchange_time_us"))
            for code, key in enumerate(batch.keys):
                mine = np.flatnonzero(codes == code)
                if len(mine):
                    place = mine[int(ids[mine].argmax())]
                    found[key] = max(found.get(key, (-1, 0)), (int(ids[place]), int(times[place])))
        return [(key, trade_id, time_us) for key, (trade_id, time_us) in found.items()]

    # -- for checks

    def column(self, table: str, key: str, name: str) -> npt.NDArray[Any]:
        """One column of an instrument's rows, in the order they were stored."""
        return self.rows(table, key)[name]

    def rows(self, table: str, key: str) -> dict[str, npt.NDArray[Any]]:
        """All columns of an instrument's rows, in the order they were stored."""
        parts: list[dict[str, npt.NDArray[Any]]] = []
        for batch in self.batches.get(table, ()):
            if key in batch.keys:
                mine = batch.columns["symbol_code"] == batch.keys.index(key)
                parts.append({name: column[mine] for name, column in batch.columns.items()})
        if not parts:
            names = (*FIELDS.get(table, ()), "timeframe_s", "held_count", "kafka_partition", "kafka_offset", "input_offset", "known_at_us")
            return {name: np.empty(0, np.int64) for name in names}
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def row_count(self, table: str) -> int:
        """Rows of a table."""
        return sum(batch.row_count for batch in self.batches.get(table, ()))

    def _check(self) -> None:
        self._touch()
        if not self.up:
            raise OSError("the store does not answer")

    def _touch(self) -> None:
        process = PROCESS.get()
        if process is not None:
            process.touch()

    # -- api.live.knowledge

    def newest_offset(self, table: str, partition: int) -> int:
        """Offset of the newest record stored of a partition, -1 for none."""
        newest = -1
        for batch in self.batches.get(table, ()):
            mine = batch.columns["kafka_partition"] == partition
            if mine.any():
                newest = max(newest, int(batch.columns["kafka_offset"][mine].max()))
        return newest


class SimKnowledge:
    """`api.live.knowledge.Knowledge` over a simulated store; an answer takes some time.

    Args:
        store: what is asked.
        clock: of the asking process.
        partitions: of each topic.
    """

    def __init__(self, store: SimStore, clock: Clock, partitions: int) -> None:
        self._store = store
        self._clock = clock
        self._partitions = partitions

    async def seed(self, key: SeriesKey, before: int | None, rows: int) -> Seed:
        """See Knowledge."""
        await self._ask()
        stored = self._store.newest_offset(key.channel, partition_of(key.instrument, self._partitions)) + 1
        offset = stored if before is None else min(before, stored)
        found = self._newest(key, offset)
        keys = sorted(found)[-rows:] if rows else []
        return Seed(offset, [(one, found[one][0], found[one][1]) for one in keys], len(found) <= rows)

    async def known(self, key: SeriesKey, keys: Sequence[int], before: int) -> dict[int, Shown]:
        """See Knowledge."""
        await self._ask()
        found = self._newest(key, before)
        if not key.timeframe_s:
            return {one: Shown(0) for one in keys if one in found}
        rows = self._store.rows(key.channel, key.instrument)
        mine = (rows["kafka_offset"] < before) & (rows["timeframe_s"] == key.timeframe_s)
        opens, revisions, inputs = (rows[name][mine] for name in ("open_time_us", "revision", "input_offset"))
        made_of = {one: inputs[(opens == one) & (revisions == found[one][0])] for one in keys if one in found}
        return {one: Shown(found[one][0], int(made.max()), bool((made < 0).any())) for one, made in made_of.items()}

    async def after(self, key: SeriesKey, floor_key: int, until_us: int, before: int, limit: int) -> list[tuple[int, str]]:
        """See Knowledge."""
        await self._ask()
        found = self._newest(key, before)
        return [(one, found[one][1]) for one in sorted(found) if one > floor_key and found[one][2] >= until_us][:limit]

    async def _ask(self) -> None:
        await self._clock.sleep(0.002)
        if not self._store.up:
            raise StoreUnavailableError("clickhouse", "The simulated store is away.")

    def _newest(self, key: SeriesKey, before: int) -> dict[int, tuple[int, str, int]]:
        """Key -> (revision, JSON, time) of the newest revision among records before an offset."""
        rows = self._store.rows(key.channel, key.instrument)
        wanted = rows["kafka_offset"] < before
        if key.timeframe_s:
            wanted &= rows["timeframe_s"] == key.timeframe_s
        found: dict[int, tuple[int, str, int]] = {}
        names = FIELDS[key.channel]
        encode: Any = bar_row if key.timeframe_s else trade_row
        for values in zip(*(rows[name][wanted].tolist() for name in names), strict=True):
            revision = values[names.index("revision")] if key.timeframe_s else 0
            time_us = values[0] if key.timeframe_s else values[names.index("exchange_time_us")]
            before_this = found.get(values[0])
            if before_this is None or before_this[0] <= revision:
                found[values[0]] = (revision, row_json(encode(values)), time_us)
        return found
