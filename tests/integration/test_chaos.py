"""kill -9 of any process in the middle of a replay changes no table, and the next correct output comes soon.

``PROVE_KILLS`` kills of each component (default 2; 50 for the full proof), at seeded moments; the seed is printed.
"""

from __future__ import annotations

import asyncio
import csv
import gzip
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import polars as pl
import pytest

from infra.cli.processes import specs
from infra.errors import MarketstreamError
from infra.kafka import committed_offsets, end_offsets
from infra.progress import SINK_GROUP, worker_offsets
from infra.provision import provision
from infra.replay import replay_file
from infra.settings import Settings, load_settings
from infra.stack.supervisor import Stack
from tests.integration.conftest import process_environ
from tests.integration.fault_chain import clean_environ, figure, recovery, stored_trades
from tests.integration.fault_tables import BAR_KEY, TRADE_COLUMNS, batch_bars, difference, final_bars

pytestmark = pytest.mark.chaos

KILLS = int(os.environ.get("PROVE_KILLS", "2"))
SEED = int(os.environ.get("PROVE_SEED", "20241121"))
CAPTURE = Path(__file__).parents[3] / "shared" / "data" / "ws" / "binance" / "spot_btcusdt_20240808.ws.gz"
RECOVERY_LIMIT_S = 3.0
# The capture spans 346 s: at 60 it takes 6 s, long enough for two kills and their recovery in its middle.
SPEED = 60


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pl.DataFrame]:
    """The recorded trades as a dump CSV (so that each round can give them another symbol) and as a table."""
    if not CAPTURE.exists():
        pytest.skip(f"recorded data is not here: {CAPTURE.name}")
    rows = []
    with gzip.open(CAPTURE, "rb") as stream:
        for line in stream:
            if b"@trade" not in line:
                continue
            data = msgspec.json.decode(line.partition(b" ")[2])["data"]
            rows.append((data["t"], data["p"], data["q"], data["T"], data["m"]))
    path = tmp_path_factory.mktemp("chaos") / "trades.csv"
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        for identity, price, size, time_ms, maker in rows:
            writer.writerow([identity, price, size, float(price) * float(size), time_ms, str(maker), "True"])
    table = pl.DataFrame(
        {
            "trade_id": [row[0] for row in rows],
            "price": [float(row[1]) for row in rows],
            "size": [float(row[2]) for row in rows],
            "side": [-1 if row[4] else 1 for row in rows],
            "exchange_time_us": [row[3] * 1000 for row in rows],
            "receive_time_us": [row[3] * 1000 for row in rows],
        }
    )
    return path, table


@pytest.fixture(scope="module")
def chaos_stack() -> Iterator[tuple[Settings, Stack]]:
    """A whole stack of its own: its broker is killed too."""
    with tempfile.TemporaryDirectory(prefix="marketstream-chaos-", ignore_cleanup_errors=True) as folder:
        settings = load_settings({**process_environ(Path(folder) / "data"), "MARKETSTREAM_SOURCE": "none"})
        stack = Stack(settings, [spec for spec in specs(settings, "none") if spec.name != "api"])
        stack.up()
        try:
            provision(settings)
            yield settings, stack
        finally:
            stack.down()


def kill(stack: Stack, name: str) -> None:
    """SIGKILL to a process of the stack, by its pid."""
    found = {status.name: status for status in stack.status(check=False)}
    os.kill(found[name].pid, signal.SIGKILL)


def progress(settings: Settings, name: str) -> int:
    """A number that grows with each correct output of a component; -1 while its servers do not answer."""
    try:
        if name == "sink":
            return sum(committed_offsets(settings.kafka, SINK_GROUP, ["trades"])["trades"].values())
        if name == "kafka":
            return sum(end_offsets(settings.kafka, ["trades"])["trades"].values())
        return sum(max(offset, 0) for offset, _ in worker_offsets(settings).values())
    except MarketstreamError:
        return -1


async def recovery_s(settings: Settings, stack: Stack, name: str) -> float:
    """Seconds from the kill to the component's next output."""
    before = await asyncio.to_thread(progress, settings, name)
    started = time.monotonic()
    kill(stack, name)
    if name != "kafka":  # what was under way when it died still lands; only what comes after that counts
        await asyncio.sleep(0.2)
        before = await asyncio.to_thread(progress, settings, name)
    while time.monotonic() - started < 60:
        await asyncio.sleep(0.05)
        if await asyncio.to_thread(progress, settings, name) > before:
            return time.monotonic() - started
    raise AssertionError(f"{name} gave no output within 60 s of being killed")


def stored(settings: Settings, symbol: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Trades and newest bars of a symbol as ClickHouse holds them; every row must be there once."""
    return stored_trades(settings, symbol), final_bars(settings, symbol)


def check_tables(settings: Settings, symbol: str, recorded: pl.DataFrame) -> None:
    """ClickHouse holds the trades of the file and the bars of all timeframes that an undisturbed batch makes of them, bit by bit."""
    trades, bars = stored(settings, symbol)
    assert not (text := difference(trades, recorded.select(TRADE_COLUMNS).sort("trade_id"), ("trade_id",))), text
    assert not (text := difference(bars, batch_bars(recorded, symbol), BAR_KEY)), text
    assert bars["held_count"].sum() == 0
    assert bars["revision"].max() == 0, bars.filter(pl.col("revision") > 0).to_dicts()[:3]  # in order and without a hole: nothing to revise


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("component", ["worker-0", "sink", "kafka"])
async def test_killed_in_the_middle_of_a_replay(
    chaos_stack: tuple[Settings, Stack], recorded: tuple[Path, pl.DataFrame], component: str
) -> None:
    """Tables equal those of an undisturbed run, and output goes on within three seconds of a kill, as the median says."""
    settings, stack = chaos_stack
    path, table = recorded
    rng = random.Random(f"{SEED}/{component}")
    print(f"seed {SEED}, {KILLS} kills of {component}")
    took: list[float] = []
    number = 0
    while len(took) < KILLS:
        symbol = f"{component.replace('-', '').upper()}{number}-USDT"
        number += 1
        replay = asyncio.create_task(replay_file(settings, path, exchange="binance", symbol=symbol, speed=SPEED))
        await asyncio.sleep(rng.uniform(0.5, 3.0))
        took.append(await recovery_s(settings, stack, component))
        summary = await replay
        assert summary.published == len(table)
        check_tables(settings, symbol, table)
    times = recovery(took)
    figure("kills", component=f"{component} (replay)", kills=KILLS, seed=SEED, **times)
    if KILLS >= 20:  # a figure, not a gate, for a short run on a busy machine: each kill is bounded by recovery_s in any case
        assert times["recovery_median_s"] <= RECOVERY_LIMIT_S


@pytest.mark.timeout(1800)
async def test_replay_killed_and_started_again(chaos_stack: tuple[Settings, Stack], recorded: tuple[Path, pl.DataFrame]) -> None:
    """A source killed anywhere and run again from the start doubles nothing."""
    settings, _ = chaos_stack
    path, table = recorded
    rng = random.Random(f"{SEED}/replay")
    symbol = "REPLAY-USDT"
    command = [
        sys.executable,
        "-m",
        "infra.cli.main",
        "replay",
        str(path),
        "--exchange",
        "binance",
        "--symbol",
        symbol,
        "--speed",
        str(SPEED),
    ]
    for _ in range(KILLS):
        child = subprocess.Popen(command, env=clean_environ(settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        await asyncio.sleep(rng.uniform(1.5, 4.0))
        assert child.poll() is None, "the replay ended before it could be killed"
        child.kill()
        child.wait()
    await replay_file(settings, path, exchange="binance", symbol=symbol, speed="max")
    check_tables(settings, symbol, table)


async def test_a_second_replay_changes_nothing(chaos_stack: tuple[Settings, Stack], recorded: tuple[Path, pl.DataFrame]) -> None:
    """The same file again adds no trade and no bar."""
    settings, _ = chaos_stack
    path, table = recorded
    await replay_file(settings, path, exchange="binance", symbol="AGAIN-USDT", speed="max")
    check_tables(settings, "AGAIN-USDT", table)
    first = stored(settings, "AGAIN-USDT")
    await replay_file(settings, path, exchange="binance", symbol="AGAIN-USDT", speed="max")
    second = stored(settings, "AGAIN-USDT")
    assert first[0].equals(second[0])
    assert first[1].equals(second[1])
