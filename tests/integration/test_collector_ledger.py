"""The coverage ledger on the real stack: exactly what was lost is named, fetched over crashes, and answered by the command line."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing
from pathlib import Path

import pytest

from infra.cli.coverage import coverage
from infra.cli.output import Output
from infra.clickhouse.client import apply_schema, connect
from infra.collector_resume import MAX_AGE_US, left_off
from infra.provision import provision
from infra.registry_client import RegistryClient
from infra.settings import Settings
from processors.coverage import LedgerRow, newest
from schemas.frames import GAP_FILLED, GAP_OPEN, HISTORY
from tests.integration.conftest import RunningStack
from tests.integration.test_collector_stack import (
    ask,
    assert_whole,
    collector,
    eventually,
    exchange,
    ids_by_symbol,
    published,
    settings_for,
)

KEY = "binance:BTC-USDT"
T = 1_700_000_000_000_000


def ledger(settings: Settings, key: str = KEY) -> list[LedgerRow]:
    """Rows of topic ``gaps`` of an instrument, as published."""
    found = []
    for _, frame in published(settings, "gaps"):
        mine = [row for row, code in enumerate(frame.columns["symbol_code"].tolist()) if frame.symbols[code] == key]
        found += [LedgerRow(*(int(frame.columns[name][row]) for name in LedgerRow._fields)) for row in mine]
    return found


async def test_a_long_gap_is_fetched_further_by_the_process_after_a_kill(stack: RunningStack, topic_prefix: str) -> None:
    """Eleven thousand ids are missing, the venue's pages are short; kill -9 in the middle: the next process goes on from there."""
    async with exchange(symbols=3, rate=6_000.0) as running:
        settings = settings_for(stack, topic_prefix, running, MARKETSTREAM_COLLECTOR_SYMBOLS="BTC-USDT,ETH-USDT")
        await asyncio.to_thread(provision, settings)
        with collector(settings) as process:
            await eventually(lambda: ask(settings, "/readyz")[0] == 200)
            # what is lost before a symbol's first trade is not missed: it is where its feed begins
            await eventually(lambda: any(KEY in frame.symbols and frame.row_count for _, frame in published(settings, "trades")))
            running.inject({"fault": "short_pages", "seconds": 600, "count": 100})
            running.inject({"fault": "slow_rest", "seconds": 600, "delay_s": 0.2})
            lost = running.inject({"fault": "drop", "symbol": "BTCUSDT", "count": 11_000})
            await eventually(lambda: not lost.remaining, 40.0)
            await eventually(lambda: any(row.state == GAP_OPEN and row.recovered >= 1_000 for row in ledger(settings)), 40.0)
            process.kill()
            await asyncio.to_thread(process.wait)
        (gap,) = [row for row in newest(ledger(settings)) if row.state == GAP_OPEN and row.recovered >= 1_000]
        running.inject({"fault": "clear"})
        with collector(settings) as process:
            await eventually(lambda: {row.gap_id: row for row in newest(ledger(settings))}[gap.gap_id].state == GAP_FILLED, 60.0)
            await eventually(lambda: not [row for row in newest(ledger(settings)) if row.state == GAP_OPEN])
            process.terminate()
            await asyncio.to_thread(process.wait, 10)
        frames = await asyncio.to_thread(published, settings)
        whole = {key: sorted(set(ids)) for key, ids in ids_by_symbol(frames).items()}
        assert_whole(whole)
        first = [row for row in ledger(settings) if row.gap_id == gap.gap_id][0]
        assert first.last_missing_id - first.first_missing_id + 1 == 11_000
        assert set(lost.touched) <= set(range(first.first_missing_id, first.last_missing_id + 1))
        again = len(ids_by_symbol(frames)[KEY]) - len(whole[KEY])
        assert again <= 3_000, "fetched from where the ledger said, not from the start"
        assert sum(frame.row_count for _, frame in frames if frame.flags & HISTORY) >= 8_000


def test_a_symbol_in_no_record_of_the_tail_continues_from_the_store(stack: RunningStack, topic_prefix: str) -> None:
    """Topics are empty; ClickHouse has its newest trade. A symbol that last traded a week ago starts anew."""
    name = "left_off_" + topic_prefix.strip(".").replace("-", "_")
    settings = stack.with_prefix(topic_prefix, MARKETSTREAM_CLICKHOUSE_DATABASE=name)
    provision(settings)
    with closing(connect(settings.clickhouse)) as client:
        for symbol, trade_id, time_us in (("BTC-USDT", 7, T), ("BTC-USDT", 9, T + 5), ("ETH-USDT", 3, T - MAX_AGE_US)):
            client.command(
                f"INSERT INTO trades (exchange, symbol, trade_id, exchange_time_us) VALUES ('binance', '{symbol}', {trade_id}, {time_us})"
            )
    with RegistryClient.from_settings(settings) as registry:
        found = left_off(settings, registry, "binance", consecutive=True, now_us=T + 60_000_000)
    assert (found["binance:BTC-USDT"].trade_id, found["binance:BTC-USDT"].exchange_time_us) == (9, T + 5)
    assert found["binance:ETH-USDT"].trade_id == -1


def test_the_command_names_the_gaps_of_a_feed(
    stack: RunningStack, topic_prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows as the sink stores them: --json has intervals and gaps, --html a page; the newest row of an id counts, rows of before ids all do."""
    settings = stack.with_prefix(topic_prefix, MARKETSTREAM_CLICKHOUSE_DATABASE="coverage_" + topic_prefix.strip(".").replace("-", "_"))
    apply_schema(settings.clickhouse)
    minute = 60_000_000
    rows = [  # gap id, state, from, to, evidence, id
        (5, 0, 0, minute, 0, -1),
        (6, 1, 10_000_000, -1, 1, 7),
        (6, 2, 10_000_000, 12_000_000, 1, 7),
        (7, 1, 70_000_000, 75_000_000, 4, -1),
        (5, 0, 0, 2 * minute, 0, -1),
        (-1, 3, 100_000_000, 100_000_000, 5, 50),
        (-1, 3, 110_000_000, 110_000_000, 5, 60),
    ]
    with closing(connect(settings.clickhouse)) as client:
        for offset, (gap_id, state, low, high, evidence, first) in enumerate(rows):
            client.command(
                "INSERT INTO gaps (exchange, symbol, gap_id, state, start_time_us, end_time_us, evidence, first_missing_id, last_missing_id,"
                f" channel, kafka_offset) VALUES ('binance', 'BTC-USDT', {gap_id}, {state}, {T + low}, {T + high if high >= 0 else -1},"
                f" {evidence}, {first}, {first}, 1, {offset})"
            )
    for name, value in settings.as_environ().items():
        monkeypatch.setenv(name, value)
    page = tmp_path / "coverage.html"
    coverage(
        Output(as_json=True),
        data_dir=None,
        exchange="binance",
        symbol="BTC-USDT",
        channel="trades",
        start=str(T),
        end=str(T + 2 * minute),
        html=page,
    )
    (feed,) = json.loads(capsys.readouterr().out)["feeds"]
    assert [gap["state"] for gap in feed["gaps"]] == ["filled", "open", "unfillable", "unfillable"]
    assert [gap["first_id"] for gap in feed["gaps"]] == [7, None, 50, 60]
    assert abs(feed["covered"] - 115 / 120) < 1e-6
    assert "filled (id jump)" in page.read_text("utf-8")
