"""The repair on the real stack: the bars stored are the bars of the trades stored, whatever came late, and every version is kept."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from infra import parity
from infra.cli.main import main
from infra.export import export
from infra.repair_jobs import RepairJobs, Wanted
from infra.replay import replay_file
from infra.runs import begin_run, find_run
from schemas.frames import END_OF_SOURCE, GAP_FILLED, GAP_UNFILLABLE, HISTORY
from tests.integration.conftest import RunningStack
from tests.integration.repair_chain import SECOND, START_US, Chain, Feed, market, no_fault, running, values

KEYS = ["timeframe_s", "open_time_us"]


@pytest.fixture(scope="module")
def chain(stack: RunningStack) -> Iterator[Chain]:
    """Worker, sink and repair."""
    with running(stack, "repair.", "worker", "sink", "repair") as made:
        yield made


async def test_a_hole_marks_its_bars_and_its_filling_makes_them_whole_again(chain: Chain, tmp_path: Path) -> None:
    """Unfillable: complete = 0, one revision up. Filled after all: bit for bit the bars without a fault; before that the old ones are known."""
    trades = market(150)
    hole = (trades["exchange_time_us"] >= START_US + 50 * SECOND) & (trades["exchange_time_us"] < START_US + 63 * SECOND)
    before, after = (
        trades.filter(~hole & (pl.col.exchange_time_us < START_US + 60 * SECOND)),
        trades.filter(~hole & (pl.col.exchange_time_us >= START_US + 60 * SECOND)),
    )
    start_us, end_us = int(before["exchange_time_us"][-1]), int(after["exchange_time_us"][0])
    feed = Feed(chain, "HOLE-USDT")
    await feed.send(before)
    await feed.send(after, flags=END_OF_SOURCE)
    first = chain.newest("HOLE-USDT")
    await feed.gap(1, start_us, end_us, GAP_UNFILLABLE)
    (job,) = await chain.until_reconciled("HOLE-USDT", 1)
    assert (job.reason, job.start_us, job.end_us) == ("gap_unfillable", start_us, end_us + 1)
    marked = chain.newest("HOLE-USDT")
    touched = (pl.col.close_time_us > start_us) & (pl.col.open_time_us <= end_us)
    due = marked.filter(touched & (pl.col.close_time_us <= START_US + 110 * SECOND))  # the others are looked at when they are due
    assert due["complete"].to_list() == [0] * due.height
    assert due.height > 14
    assert_frame_equal(values(marked), values(first))
    assert_frame_equal(marked.filter(~touched), first.filter(~touched))
    one_second = marked.filter(touched & (pl.col.timeframe_s == 1))
    assert one_second.height == (end_us - 1) // SECOND - start_us // SECOND + 1 + (end_us % SECOND == 0)
    assert set(one_second["revision"]) == {1}
    known_us = int(chain.bars("HOLE-USDT")["known_at_us"].max())

    await feed.send(trades.filter(hole), source="binance/ws/0/fill", flags=HISTORY)
    await feed.gap(1, start_us, end_us, GAP_FILLED)
    jobs = await chain.until_reconciled("HOLE-USDT", 2)
    assert jobs[0].reason == "gap_filled"
    whole = chain.newest("HOLE-USDT").filter(pl.col.close_time_us <= START_US + 110 * SECOND)
    truth = no_fault(trades, int(first["close_time_us"].max()))
    assert_frame_equal(values(whole), values(truth.join(whole.select(KEYS), on=KEYS, how="semi")), check_exact=True)
    inner = whole.filter((pl.col.timeframe_s == 1) & touched)
    assert set(inner["complete"]) == {1}
    versions = chain.bars("HOLE-USDT").filter((pl.col.timeframe_s == 1) & touched)
    assert versions.group_by(KEYS).len()["len"].to_list() == [3] * inner.height
    path = tmp_path / "then.parquet"
    export(
        chain.settings,
        "bars",
        exchange="binance",
        symbol="HOLE-USDT",
        timeframe="1s",
        output=path,
        file_format="parquet",
        known_at_us=known_us,
    )
    then = marked.filter(pl.col.timeframe_s == 1)
    assert_frame_equal(pl.read_parquet(path), then.select(pl.read_parquet(path).columns), check_exact=True)
    feed.close()


DIES_AFTER_PUBLISHING = """
import os, signal
from infra import repair

publish = repair.RepairProcess._publish

async def dying(*arguments):
    count = await publish(*arguments)
    if count and arguments[1] == "binance:KILL-USDT":
        os.kill(os.getpid(), signal.SIGKILL)
    return count

repair.RepairProcess._publish = dying
repair.main()
"""


async def test_killed_between_publishing_and_done_it_publishes_nothing_twice(chain: Chain) -> None:
    """The next process finds what was published stored, compares, and has nothing left to do."""
    trades = market(120, seed=2)
    lost = (trades["exchange_time_us"] >= START_US + 20 * SECOND) & (trades["exchange_time_us"] < START_US + 25 * SECOND)
    feed = Feed(chain, "KILL-USDT")
    chain.stop("repair")
    await feed.send(trades.filter(~lost), flags=END_OF_SOURCE)
    await feed.send(trades.filter(lost), source="binance/ws/0/fill", flags=HISTORY)
    await feed.gap(1, START_US + 20 * SECOND, START_US + 25 * SECOND, GAP_FILLED)
    environ = chain.settings.as_environ() | {"PATH": "/usr/bin:/bin"}
    dying = subprocess.Popen([sys.executable, "-c", DIES_AFTER_PUBLISHING], env=environ)
    assert await asyncio.to_thread(dying.wait, 60) == -signal.SIGKILL
    (job,) = await chain.jobs("KILL-USDT")
    assert job.state == "running"
    chain.start("repair")
    await chain.until_reconciled("KILL-USDT", 1, seconds=60)
    bars = chain.bars("KILL-USDT")
    newest = chain.newest("KILL-USDT").filter(pl.col.close_time_us <= START_US + 80 * SECOND)
    truth = no_fault(trades, int(newest["close_time_us"].max()))
    assert_frame_equal(values(newest), values(truth.join(newest.select(KEYS), on=KEYS, how="semi")), check_exact=True)
    repaired = bars.filter(pl.col.input_offset == -1)
    assert repaired.group_by([*KEYS, "revision"]).len()["len"].max() == 1
    changed = repaired.group_by(KEYS).len().filter(pl.col.timeframe_s == 1)
    assert set(changed["len"]) == {1}
    assert set(repaired.filter(pl.col.timeframe_s == 1)["revision"]) == {1}
    feed.close()


async def test_a_trade_too_late_for_the_worker_is_in_its_bar_in_the_end(chain: Chain) -> None:
    """It is dead-lettered and stored; the letter asks for the repair, the flat bars after it get its price."""
    trades = market(120, seed=3)
    silent_us = START_US + 17 * SECOND  # the market has no trade for three seconds from here
    late = trades.filter((pl.col.exchange_time_us < silent_us) & (pl.col.exchange_time_us >= silent_us - 2 * SECOND)).tail(1)
    feed = Feed(chain, "LATE-USDT")
    await feed.send(trades.filter(pl.col.trade_id != late["trade_id"][0]))
    await feed.send(late)
    found = await chain.until_reconciled("LATE-USDT", 1)
    assert [job.reason for job in found] == ["too_late"]
    newest = chain.newest("LATE-USDT").filter(pl.col.close_time_us <= START_US + 60 * SECOND)
    assert_frame_equal(values(newest), values(no_fault(trades, START_US + 60 * SECOND)), check_exact=True)
    revised = newest.filter((pl.col.timeframe_s == 1) & (pl.col.revision > 0))
    assert revised["open_time_us"].to_list() == [
        late["exchange_time_us"][0] // SECOND * SECOND,
        silent_us,
        silent_us + SECOND,
        silent_us + 2 * SECOND,
    ]
    feed.close()


async def test_files_that_meet_in_a_bar_leave_it_whole(chain: Chain, tmp_path: Path) -> None:
    """The evening's file, the morning's after it, and one that fills the hole between: no bar remembers how they were cut."""
    trades = market(180, seed=4)
    cuts = [START_US, START_US + 70 * SECOND + 123, START_US + 95 * SECOND + 456, START_US + 200 * SECOND]
    parts = [
        trades.filter((pl.col.exchange_time_us >= low) & (pl.col.exchange_time_us < high))
        for low, high in zip(cuts, cuts[1:], strict=False)
    ]
    for place in (0, 2, 1):
        path = tmp_path / f"{place}.csv"
        rows = parts[place].with_columns(maker=pl.col.side == -1, best=True, ms=pl.col.exchange_time_us // 1000, quote=1.0)
        rows.select("trade_id", "price", "size", "quote", "ms", "maker", "best").write_csv(path, include_header=False)
        await replay_file(chain.settings, path, exchange="binance", symbol="FILE-USDT")
    await chain.until_stored()
    newest = chain.newest("FILE-USDT").filter(pl.col.close_time_us <= cuts[3])
    truth = no_fault(trades, cuts[3])
    assert_frame_equal(values(newest), values(truth.join(newest.select(KEYS), on=KEYS, how="semi")), check_exact=True)
    inner = newest.filter(
        (pl.col.timeframe_s == 1)
        & (pl.col.open_time_us > trades["exchange_time_us"][0])
        & (pl.col.close_time_us <= trades["exchange_time_us"][-1])
    )
    assert set(inner["complete"]) == {1}
    assert newest.filter((pl.col.timeframe_s == 60) & (pl.col.open_time_us == START_US + 60 * SECOND))["complete"].to_list() == [1]


async def test_a_trade_that_is_taken_out_or_let_in_revises_its_bar_and_commands_show_it(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Discarded: the bar is made without it and says so; released: as it was before, two revisions up."""
    trades = market(120, seed=5)
    feed = Feed(chain, "HELD-USDT")
    await feed.send(trades, flags=END_OF_SOURCE)
    first = chain.newest("HELD-USDT")
    row = trades.filter(pl.col.exchange_time_us >= START_US + 30 * SECOND)[0]
    open_us = row["exchange_time_us"][0] // SECOND * SECOND
    its_bar = (pl.col.timeframe_s == 1) & (pl.col.open_time_us == open_us)
    for state, count, revision in ((4, 1, 1), (3, 2, 2)):
        await feed.suspect(row, state)
        await chain.until_reconciled("HELD-USDT", count)
        bar = chain.newest("HELD-USDT").filter(its_bar)
        left = trades.filter(pl.col.trade_id != row["trade_id"][0]) if state == 4 else trades
        truth = no_fault(left, START_US + 60 * SECOND).filter(its_bar)
        assert_frame_equal(values(bar), values(truth), check_exact=True)
        assert (bar["revision"].to_list(), bar["held_count"].to_list()) == ([revision], [int(state == 4)])
    newest = chain.newest("HELD-USDT")
    small = pl.col.timeframe_s <= 60
    assert_frame_equal(values(newest.filter(small)), values(first.filter(small)), check_exact=True)

    for name, text in chain.settings.as_environ().items():
        monkeypatch.setenv(name, text)
    ask = ["--exchange", "binance", "--symbol", "HELD-USDT", "--json"]
    order = ["repair", "run", *ask, "--start", str(START_US + 10 * SECOND), "--end", str(START_US + 20 * SECOND)]
    assert await asyncio.to_thread(main, order) == 0
    ordered = json.loads(capsys.readouterr().out)
    assert (ordered["reason"], ordered["revised"]) == ("request", 0)
    assert ordered["checked"] >= 10
    assert await asyncio.to_thread(main, ["repair", "show", str(ordered["id"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == ordered["id"]
    assert await asyncio.to_thread(main, ["repair", "list", "--json", "--limit", "100"]) == 0
    listed = json.loads(capsys.readouterr().out)["jobs"]
    assert [one["reason"] for one in listed if one["symbol"] == "HELD-USDT"] == ["request", "quarantine", "quarantine"]
    for wrong, word in (
        (["repair", "show", "999999"], "There is no job 999999"),
        (["repair", "list", "--state", "dome"], "did you mean 'done'"),
        (["repair", "run", *ask, "--start", "2024-01-02", "--end", "2024-01-01"], "is not before the end"),
        (["repair", "run", *ask, "--start", "soon", "--end", "2024-01-01"], "--start: 'soon' is not a time"),
    ):
        assert await asyncio.to_thread(main, wrong) == 2
        assert word in capsys.readouterr().err
    feed.close()


async def test_a_job_that_is_widened_while_it_is_worked_on_is_worked_on_again(stack: RunningStack, topic_prefix: str) -> None:
    """What is saved of the part that was read does not count for the whole: it is due from its start on, as if it were new."""
    narrow = Wanted(exchange="binance", symbol="WIDE-USDT", start_us=START_US, end_us=START_US + 1, reason="gap_filled", trigger="gaps/0/1")
    async with RepairJobs(stack.with_prefix(topic_prefix)) as jobs:
        await jobs.add([narrow])
        read = await jobs.due(START_US)
        await jobs.save(read, state="running", until_us=START_US, checked=3)
        assert await jobs.add([replace(narrow, end_us=START_US + SECOND)]) == [read[0].id]
        for state in ("running", "done"):
            await jobs.save(read, state=state, due_us=START_US + SECOND, until_us=START_US + SECOND, checked=1)
        (again,) = await jobs.due(START_US)
        assert (again.state, again.due_us, again.until_us, again.end_us, again.checked) == ("pending", 0, 0, START_US + SECOND, 5)
        assert again.created_us > read[0].created_us  # it waits for what was published since
        await jobs.save([again], state="done", until_us=START_US + SECOND)
        assert (await jobs.due(START_US), (await jobs.get(again.id) or again).state) == ([], "done")


async def test_every_bar_the_repair_published_is_certified(chain: Chain) -> None:
    """All of the above as one run: each repaired bar is that of its trades, in its values and in what was known of them."""
    await begin_run(chain.settings, "none", 0)
    report = await parity.check(chain.settings, await find_run(chain.settings, "last"))
    assert [item.text() for item in report.differences] == []
    assert report.unexplained == 0
    assert report.repaired.bars == report.repaired.equal > 40
    assert (
        sum(count for part in report.findings for reason, count in part.explained.items() if reason.startswith("repair"))
        >= report.repaired.bars
    )
