"""The whole chain of one topic prefix for fault tests: simulated exchange in this process; collector, worker, sink, repair as processes.

``Chain`` starts, kills, pauses and stops single processes by name; readers tell what Kafka and ClickHouse hold. ``figure`` hands a measured
number to whoever runs the test (``PROVE_FIGURES`` names a file of JSON lines).
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from infra.clickhouse.client import connect
from infra.prove.figures import note_figures
from infra.settings import Settings, load_settings
from infra.stack.kafka import free_ports
from tests.integration.conftest import RunningStack

ROOT = Path(__file__).resolve().parents[2]
HEALTH_PORTS = ("COLLECTOR", "WORKER", "SINK", "API", "REPAIR")
MODULES = {"collector": "infra.collector", "worker": "infra.worker", "sink": "infra.sink", "repair": "infra.repair", "api": "infra.api"}


def figure(line: str, **values: float | str) -> None:
    """Print measured values and hand them on; ``line`` names the line of the proof they belong to."""
    print(
        f"{line}: " + ", ".join(f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items())
    )
    note_figures({"line": line, **values})


def recovery(took_s: list[float]) -> dict[str, float]:
    """Figures of how long it took from each kill to the next output."""
    middle, most = np.percentile(took_s, (50, 90)).tolist()
    return {"recovery_median_s": middle, "recovery_p90_s": most, "recovery_slowest_s": max(took_s)}


def clean_environ(settings: Settings) -> dict[str, str]:
    """The environment of a child: ours without settings of the test run, and the settings of this stack."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MARKETSTREAM_")}
    return kept | settings.as_environ()


def isolated(stack: RunningStack, prefix: str, **variables: str) -> Settings:
    """Settings with topics, a database and health ports of their own."""
    ports = dict(zip(HEALTH_PORTS, free_ports(len(HEALTH_PORTS)), strict=True))
    named = {
        f"MARKETSTREAM_PORT_{name}": str(port) for name, port in ports.items() if f"MARKETSTREAM_PORT_{name}" in stack.settings.as_environ()
    }
    database = "fault_" + "".join(letter if letter.isalnum() else "_" for letter in prefix).strip("_")
    return stack.with_prefix(prefix, MARKETSTREAM_CLICKHOUSE_DATABASE=database, **named, **variables)


@dataclass
class Chain:
    """Processes of one prefix. Use as a context manager: what still runs at the end is killed."""

    settings: Settings
    log_dir: Path

    def __post_init__(self) -> None:
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._running):
            self.kill(name)

    def start(self, *names: str, prefix: tuple[str, ...] = (), arguments: tuple[str, ...] = (), alias: str = "", **variables: str) -> None:
        """Start processes. Returns at once.

        Args:
            names: of :data:`MODULES`.
            prefix: a module (and its arguments) that runs them.
            arguments: of the processes themselves.
            alias: another name for the one process.
            variables: added to their environment.
        """
        for name in names:
            if name == "repair" and importlib.util.find_spec("infra.repair") is None:
                continue
            with self.log(alias or name).open("ab") as log:
                self._running[alias or name] = subprocess.Popen(
                    [sys.executable, "-m", *prefix, MODULES[name], *arguments],
                    env=clean_environ(self.settings) | variables,
                    cwd=ROOT,
                    stdout=log,
                    stderr=log,
                )

    def log(self, name: str) -> Path:
        """Where a process writes."""
        return self.log_dir / f"{name}.log"

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to one process."""
        self._running[name].send_signal(number)

    def kill(self, name: str) -> None:
        """SIGKILL; also ends a stopped process."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def stop(self, name: str, timeout_s: float = 20.0) -> float:
        """SIGTERM; seconds until the process was gone, with exit code 0."""
        process = self._running.pop(name)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout_s)
        assert code == 0, f"{name} ended with {code}: {self.log(name).read_text()[-2000:]}"
        return time.monotonic() - begun

    def alive(self, name: str) -> bool:
        """Whether the process runs."""
        return self._running[name].poll() is None

    async def ended(self, name: str, timeout_s: float = 30.0) -> int:
        """Exit code of a process that is expected to end by itself."""
        return await asyncio.to_thread(self._running.pop(name).wait, timeout_s)

    def ask(self, name: str, path: str) -> tuple[int, str]:
        """Status and body of a process's health server; (0, "") while it does not listen."""
        port = getattr(self.settings, name).port if name == "api" else getattr(self.settings, name).health_port
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, exc.read().decode()
        except OSError:
            return 0, ""

    def metric(self, name: str, metric: str) -> float:
        """Sum of a metric over its labels; 0 while it is not there."""
        lines = self.ask(name, "/metrics")[1].splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((metric + "{", metric + " ")))

    async def ready(self, *names: str, timeout_s: float = 90.0) -> None:
        """Until ``/readyz`` of each is 200."""
        for name in names:
            await eventually(lambda name=name: self.ask(name, "/readyz")[0] == 200, timeout_s, f"{name} is not ready")


async def eventually(check: Callable[[], Any] | Callable[[], Awaitable[Any]], seconds: float = 30.0, what: str = "") -> float:
    """Until ``check()`` holds (called in a thread); seconds it took."""
    begun = time.monotonic()
    while not await asyncio.to_thread(check):
        assert time.monotonic() - begun < seconds, f"{what or 'condition'}: not within {seconds} s"
        await asyncio.sleep(0.05)
    return time.monotonic() - begun


def table(settings: Settings, query: str) -> pl.DataFrame:
    """A query of this prefix's database as a table."""
    client = connect(settings.clickhouse)
    try:
        found = pl.from_arrow(client.query_arrow(query))
    finally:
        client.close()
    assert isinstance(found, pl.DataFrame)
    return found


def ledger(settings: Settings) -> pl.DataFrame:
    """The newest row of every gap_id of a hole: state open, filled or unfillable."""
    return table(
        settings,
        "SELECT symbol, gap_id, first_missing_id, last_missing_id, start_time_us, end_time_us, evidence, state, recovered, receive_time_us"
        " FROM gaps ORDER BY symbol, gap_id, kafka_offset DESC LIMIT 1 BY symbol, gap_id",
    ).filter(pl.col("state") != 0)


def repair_times_s(settings: Settings) -> list[float]:
    """Seconds from the first row of each hole to its last."""
    rows = table(
        settings,
        "SELECT max(receive_time_us) - min(receive_time_us) AS took FROM gaps WHERE state != 0 GROUP BY symbol, gap_id HAVING count() > 1",
    )
    return [took / 1e6 for took in rows["took"].to_list()]


def ids_of(rows: pl.DataFrame) -> set[int]:
    """Every id the intervals of ledger rows name."""
    found: set[int] = set()
    for first, last in zip(rows["first_missing_id"].to_list(), rows["last_missing_id"].to_list(), strict=True):
        found.update(range(first, last + 1))
    return found


def stored_trades(settings: Settings, symbol: str) -> pl.DataFrame:
    """Trades of a symbol by id; each must be there once."""
    rows = table(settings, f"SELECT trade_id, price, size, side, exchange_time_us FROM trades WHERE symbol = '{symbol}' ORDER BY trade_id")
    assert rows["trade_id"].is_unique().all(), f"{symbol}: trades are stored twice"
    return rows


def newest_bars(settings: Settings, symbol: str) -> pl.DataFrame:
    """The newest revision of every bar of a symbol."""
    return table(
        settings,
        f"SELECT * FROM bars WHERE symbol = '{symbol}' ORDER BY timeframe_s, open_time_us, revision DESC LIMIT 1 BY timeframe_s, open_time_us",
    )


@contextmanager
def children(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Kill what still runs at the end."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def settings_from(base: Settings, **variables: str) -> Settings:
    """``base`` with further variables."""
    return load_settings({**base.as_environ(), **variables})
