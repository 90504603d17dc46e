"""What is said of repaired bars that differ: later trades with a job are awaited, without one they are not, and what is gone is not judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from infra.parity_compare import LiveRecord
from infra.parity_repaired import KNOWN_LATER, NOT_RETAINED, TAKEN_AWAY, RepairedFindings
from infra.parity_repaired_store import Day, Look, RepairedDays, Stretch, check_days
from infra.parity_repairs import Job, answers
from infra.symbol_reader import Neighbour
from processors.reconcile import STORED, Evidence, rebuild, reconcile
from schemas.frames import Frame
from tests.infra.test_parity_repaired import DENSE, SECOND, TRADES, published
from tests.processors.test_reconcile import END_US, START_US, TIMEFRAMES, none_stored

DAY = Day(2, "binance:BTC-USDT", START_US // (86_400 * SECOND))
PUBLISHED_US = 1_000
NOTHING = np.zeros(0, np.int64)


@dataclass
class Store:
    """What ClickHouse holds: repaired bars, and trades (all but ``late`` were known when the bars were published)."""

    rows: dict[str, Any]
    late: Any = None
    late_evidence: Evidence = DENSE
    evidence: Evidence = DENSE
    held: Any = field(default_factory=NOTHING.copy)

    def reader(self, day: Day, known_at_us: int | None) -> Any:
        """A reader of this store."""
        assert day == DAY
        return Reader(self, known_at_us is not None and known_at_us <= PUBLISHED_US)


@dataclass
class Reader:
    """As RepairedReader, of trades in memory; ``then``: as of the time of publication."""

    store: Store
    then: bool

    @property
    def kept(self) -> dict[str, Any]:
        """Trades that are not held back."""
        keep = ~np.isin(TRADES["trade_id"], self.store.held)
        if self.then and self.store.late is not None:
            keep &= ~self.store.late
        return {name: column[keep] for name, column in TRADES.items()}

    def repaired(self, start_us: int, end_us: int, partition: int, stretch: Stretch) -> dict[str, Any]:
        """The bars."""
        assert (partition, stretch) == (2, Stretch(5, 9))
        return self.store.rows

    def before(self, time_us: int) -> Neighbour | None:
        """The last trade before a time."""
        times = self.kept["exchange_time_us"]
        place = int(np.searchsorted(times, time_us)) - 1
        return Neighbour(int(self.kept["trade_id"][place]), int(times[place])) if place >= 0 else None

    def after(self, time_us: int) -> None:
        """None."""
        return

    def held_back(self, start_us: int, end_us: int) -> tuple[Any, Any]:
        """(ids, times) of trades held back."""
        mine = np.isin(TRADES["trade_id"], self.store.held) & (TRADES["exchange_time_us"] < end_us)
        return TRADES["trade_id"][mine], TRADES["exchange_time_us"][mine]

    def trades(self, start_us: int, end_us: int, seed: Neighbour | None, without: Any) -> Iterator[dict[str, Any]]:
        """One page."""
        keep = self.kept["exchange_time_us"] < end_us
        if keep.any():
            yield {name: column[keep] for name, column in self.kept.items()}

    def evidence(self, *_: object) -> Evidence:
        """That of the store."""
        return self.store.late_evidence if self.then else self.store.evidence


def bars(**changes: Any) -> dict[str, Any]:
    """The bars of the trades, published by the repair at ``PUBLISHED_US``."""
    rows = published(**changes)
    rows["known_at_us"] = np.full(len(rows["open"]), PUBLISHED_US)
    return rows


def look(store: Store, *jobs: Job, kept_from_us: int = 0) -> RepairedFindings:
    """The findings of the day."""
    found = check_days(Look(reader=store.reader, answers=answers(jobs), stretches={2: Stretch(5, 9)}, kept_from_us=kept_from_us), {DAY})
    return found[DAY]


def job(until_us: int = 0, created_us: int = 500) -> Job:
    """A job over all of the trades."""
    return Job(DAY.instrument, START_US, END_US, "too_late", created_us=created_us, until_us=until_us)


DONE = job(2**62)


def test_bars_of_their_trades_are_equal() -> None:
    """All of them; a day without any is no day."""
    found = look(Store(bars()))
    assert found.bars == found.equal > 200
    assert (found.unexplained, found.pending, found.explained) == (0, 0, {})
    empty = {name: column[:0] for name, column in bars().items()}
    assert look(Store(empty)) == RepairedFindings()


@pytest.mark.parametrize("jobs", [(), (DONE,), (job(),)])
def test_a_bar_that_was_never_that_of_its_trades_is_wrong_whatever_job_there_is(jobs: tuple[Job, ...]) -> None:
    """Done, open or none; the difference names bar, place and column."""
    rows = bars()
    rows["volume"][9] *= 2
    rows["kafka_offset"][9] = 77
    found = look(Store(rows), *jobs)
    assert (found.bars - found.equal, found.unexplained, found.pending) == (1, 1, 0)
    [difference] = found.differences
    assert (difference.partition, difference.bars_offset, list(difference.columns)) == (2, 77, ["volume"])
    assert difference.key is not None
    assert difference.key.open_time_us == rows["open_time_us"][9]
    assert "is not the bar of its trades" in difference.text()


def test_later_trades_are_awaited_while_a_job_answers_for_them_and_not_otherwise() -> None:
    """The bar is the one of the trades of then."""
    store = Store(bars())
    store.late = TRADES["trade_id"] == TRADES["trade_id"][50]
    now = {name: column[~store.late] for name, column in TRADES.items()}
    then = reconcile(none_stored(), rebuild([now], TIMEFRAMES, END_US), [(START_US, END_US)], DENSE).rows
    store.rows |= {name: then[name] for name in STORED}
    waiting, lost = look(store, job()), look(store, DONE)
    assert waiting.pending == lost.unexplained > 0
    assert (waiting.unexplained, lost.pending) == (0, 0)
    assert all("no job answers for what changed them" in item.what for item in lost.differences)


def test_what_was_learned_of_the_trades_later_asks_for_no_repair() -> None:
    """Nobody vouched for the bars when the job was ordered nor when they were published; had somebody, they would be wrong."""
    rows = bars()
    rows["complete"][:] = 0
    found = look(Store(rows, late_evidence=Evidence()), DONE)
    assert found.unexplained == 0
    assert found.explained == {KNOWN_LATER: found.bars - found.equal}
    assert look(Store(rows), DONE).unexplained == found.explained[KNOWN_LATER] > 0
    assert look(Store(rows, late_evidence=Evidence()), job(2**62, created_us=PUBLISHED_US + 1)).unexplained > 0  # known, and done with


def test_bars_whose_trades_are_gone_are_not_judged() -> None:
    """By their age; or every trade up to them is held back, and the repair lets them stand."""
    rows = bars()
    rows["close"][:] += 1
    found = look(Store(rows), kept_from_us=END_US)
    assert found.explained == {NOT_RETAINED: found.bars}
    found = look(Store(bars(), held=TRADES["trade_id"]))
    assert (found.explained, found.unexplained) == ({TAKEN_AWAY: found.bars}, 0)
    rows = bars()
    rows["open_time_us"][:3] -= 3_600 * SECOND
    assert look(Store(rows)).unexplained == 3
    assert "no trade stored makes such a bar" in look(Store(rows)).differences[0].what


def test_only_the_days_of_the_repair_in_the_run_are_noted() -> None:
    """Not the worker's records, not those behind the run; rows the sink has not stored are counted."""
    days = RepairedDays()
    take = days.begin(2, 5, 9, 8)
    columns = {"symbol_code": np.array([0, 0], np.int32), "open_time_us": np.array([START_US, START_US + 1])}
    frame = Frame(source="repair", watermark_us=0, symbols=(DAY.instrument,), columns=columns, input_offset=-1)
    worker = Frame(source="worker", watermark_us=0, symbols=("a:B",), columns=columns, input_offset=3)
    for offset, one in ((5, frame), (6, worker), (7, Frame(source="repair", watermark_us=0)), (8, frame), (9, frame)):
        take(LiveRecord(offset, 1, b"", one))
    assert (days.days, days.unstored, days.stretches) == ({DAY}, 2, {2: Stretch(5, 8)})
