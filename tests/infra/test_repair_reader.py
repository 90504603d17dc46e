"""What the repair reads of the real tables: which trades are in bars, and how far a job goes among trades that are held back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from infra.repair_jobs import Job
from infra.repair_reader import RepairReader
from infra.repair_run import SymbolRun
from infra.symbol_reader import Neighbour
from processors.quality import CONFIRMED, DISCARDED, HELD, RELEASED
from processors.reconcile import rebuild
from schemas.timeframes import TIMEFRAMES
from tests.tables import Tables, empty_tables

SECOND = 1_000_000
T0_US = 1_723_161_600_000_000
NOW_US = T0_US + 3_600 * SECOND
OF = {"exchange": "binance", "symbol": "BTC-USDT"}
TRADE = ("trade_id", "price", "size", "side", "exchange_time_us", "receive_time_us")


@pytest.fixture
def tables() -> Tables:
    """No row in any."""
    return empty_tables()


def reader(tables: Tables) -> RepairReader:
    """Of the one symbol."""
    return RepairReader(tables, "binance", "BTC-USDT", 100_000)


def trade(trade_id: int, price: float, second: int) -> dict[str, Any]:
    """A stored trade."""
    time_us = T0_US + second * SECOND
    return {
        **OF, "trade_id": trade_id, "price": price, "size": 1.0, "side": 1, "exchange_time_us": time_us, "receive_time_us": time_us,
        "kafka_offset": trade_id, "known_at_us": time_us,
    }  # fmt: skip


def word(trade_id: int, second: int, state: int, offset: int) -> dict[str, Any]:
    """What was said of a suspect."""
    return {**OF, "trade_id": trade_id, "exchange_time_us": T0_US + second * SECOND, "reason": 1, "state": state, "kafka_offset": offset}


def bars_of(trades: Iterable[dict[str, Any]], end_us: int) -> dict[str, np.ndarray]:
    """The bars of trades."""
    listed = list(trades)
    page = {name: np.array([one[name] for one in listed]) for name in TRADE}
    return rebuild([page | {"side": page["side"].astype(np.int8)}], TIMEFRAMES, end_us)


def store_bars(tables: Tables, bars: dict[str, np.ndarray], offset: int, input_offset: int) -> None:
    """Store them as one record."""
    known = {"input_offset": input_offset, "kafka_offset": offset, "known_at_us": T0_US}
    names = [name for name in bars if name != "symbol_code"]
    tables.insert("bars", ({**OF, **{name: bars[name][row].item() for name in names}, **known} for row in range(len(bars["open"]))))


# What was said of a suspect.


@pytest.mark.parametrize(
    ("states", "out"),
    [
        ((HELD,), True),
        ((HELD, CONFIRMED), False),
        ((HELD, RELEASED, HELD), False),  # its range was fetched again
        ((HELD, DISCARDED, HELD, CONFIRMED), True),  # fetched again, and the market agrees again
        ((HELD, CONFIRMED, HELD), False),
        ((HELD, RELEASED, DISCARDED), True),  # a person thought again
        ((HELD, DISCARDED, RELEASED, HELD), False),
    ],
)
def test_a_decision_stays_when_its_trade_is_fetched_again(tables: Tables, states: tuple[int, ...], out: bool) -> None:
    """Whatever is told of a suspect later: a person's word counts before the market's, and that before held."""
    tables.insert("trades", [trade(1, 100.0, 5), trade(2, 180.0, 15), trade(3, 100.0, 60)])
    tables.insert("quarantine", [word(2, 15, state, offset) for offset, state in enumerate(states)])
    found = reader(tables)
    assert found.held_back(T0_US, NOW_US)[0].tolist() == ([2] if out else [])
    assert found.before(T0_US + 60 * SECOND) == (Neighbour(1, T0_US + 5 * SECOND) if out else Neighbour(2, T0_US + 15 * SECOND))
    assert found.after_in_bars(T0_US + 6 * SECOND) == (Neighbour(3, T0_US + 60 * SECOND) if out else Neighbour(2, T0_US + 15 * SECOND))
    assert found.after(T0_US + 6 * SECOND) == Neighbour(2, T0_US + 15 * SECOND)


# How far a job goes.


def test_flat_bars_behind_a_trade_that_is_held_carry_the_released_price_on(tables: Tables) -> None:
    """A job goes on to the next trade that is in bars: the one that stays held does not end it."""
    trades = [trade(1, 100.0, 5), trade(2, 103.0, 15), trade(3, 180.0, 16), trade(4, 103.0, 60), trade(5, 103.0, 200)]
    end_us = T0_US + 200 * SECOND
    tables.insert("trades", trades)
    tables.insert("quarantine", [word(2, 15, HELD, 1), word(3, 16, HELD, 2), word(2, 15, RELEASED, 3)])
    store_bars(tables, bars_of((one for one in trades if one["trade_id"] not in (2, 3)), end_us), 1, 1)
    job = Job(
        id=1, exchange="binance", symbol="BTC-USDT", start_us=T0_US + 15 * SECOND, end_us=T0_US + 15 * SECOND + 1, reason="quarantine",
        trigger="t", state="pending", due_us=0, until_us=0, checked=0, revised=0, attempts=0, note="", created_us=NOW_US, updated_us=0,
    )  # fmt: skip
    run = SymbolRun(reader(tables), TIMEFRAMES, NOW_US)
    plan = run.plan([job])
    for offset, piece in enumerate(run.pieces(plan), 2):
        store_bars(tables, run.work(piece, patient=False).rows, offset, -1)
    wanted = bars_of((one for one in trades if one["trade_id"] != 3), end_us)
    stored = reader(tables).stored(T0_US, end_us, tuple(np.unique(wanted["timeframe_s"]).tolist()))
    closes = dict(zip(zip(stored["timeframe_s"], stored["open_time_us"], strict=True), stored["close"], strict=True))
    keys = zip(wanted["timeframe_s"], wanted["open_time_us"], strict=True)
    assert [closes[key] for key in keys] == wanted["close"].tolist()
