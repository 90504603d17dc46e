"""A whole stack under live trades, for faults of single parts: everything is a process, links can be cut, and one call says whether all is well.

``rig.whole()`` waits until ClickHouse holds every trade the exchange made up to now, each once, and the bars have gone on; whatever was
done to any part before. No step of it is done by hand: the test only ends the fault. ``rig.equal()`` compares whole tables with the market's own
record of its trades and with the bars of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from infra.clickhouse.client import connect
from infra.provision import provision
from infra.settings import Settings, load_settings
from infra.stack.datadir import claim
from infra.stack.supervisor import Stack
from tests.integration.conftest import process_environ
from tests.integration.fault_chain import ROOT, Chain, stored_trades
from tests.integration.fault_tables import BAR_KEY, closed_bars, difference, sha256, undisturbed
from tests.integration.tcp_proxy import TcpProxy

SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "BNBUSDT")
RATE = 400
SmallDisk = Callable[[Path], AbstractContextManager[Path]]


@dataclass
class Rig:
    """The parts of the stack and what is known of the market."""

    settings: Settings
    stack: Stack
    chain: Chain
    exchange_url: str
    venue: TcpProxy
    clickhouse: TcpProxy
    postgres: TcpProxy
    first: dict[str, int] = field(default_factory=dict)
    log_dir: Path = Path()

    def sim(self, path: str, body: Any = None) -> Any:
        """Ask the exchange's own routes."""
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.exchange_url + path, data=data), timeout=10) as answer:
            return json.loads(answer.read())

    def fault(self, **fault: Any) -> None:
        """Begin a fault of the exchange."""
        self.sim("/sim/faults", fault)

    def truth(self, symbol: str) -> list[int]:
        """Ids the market made, ascending."""
        return list(self.sim(f"/sim/truth?symbol={symbol}&from={self.first.get(symbol, 0)}")["id"])

    def start(self, *names: str, prefix: tuple[str, ...] = ()) -> None:
        """Start processes of ours behind the proxies: sink and repair reach ClickHouse, collector and repair PostgreSQL, through them."""
        for name in names:
            variables = {}
            if name in ("sink", "repair"):
                variables["MARKETSTREAM_CLICKHOUSE_URL"] = f"http://127.0.0.1:{self.clickhouse.port}"
            if name in ("collector", "repair"):
                dsn = self.settings.postgres.dsn.replace(f":{self.settings.ports.postgres}/", f":{self.postgres.port}/")
                variables["MARKETSTREAM_POSTGRES_DSN"] = dsn
            self.chain.start(name, prefix=prefix, **variables)

    def server(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a server of the stack, by its pid."""
        found = {status.name: status for status in self.stack.status(check=False)}
        os.kill(found[name].pid, number)

    def counts(self) -> dict[str, tuple[int, int, int, int]]:
        """Symbol -> rows, distinct ids, lowest and highest id of the stored trades."""
        client = connect(self.settings.clickhouse, query_limit=0)
        try:
            rows = client.query(
                "SELECT symbol, count(), uniqExact(trade_id), min(trade_id), max(trade_id) FROM trades GROUP BY symbol"
            ).result_rows
        finally:
            client.close()
        return {row[0].replace("-", ""): (int(row[1]), int(row[2]), int(row[3]), int(row[4])) for row in rows}

    def bars_of(self, start_us: int) -> int:
        """Final one-second bars that open within the three seconds from ``start_us`` on."""
        client = connect(self.settings.clickhouse)
        try:
            within = f"open_time_us BETWEEN {start_us} AND {start_us + 3_000_000}"
            return int(client.query(f"SELECT count() FROM bars WHERE timeframe_s = 1 AND is_final = 1 AND {within}").result_rows[0][0])
        finally:
            client.close()

    def whole(self, timeout_s: float = 40.0) -> float:
        """Seconds until every trade made up to now is stored once and the bars of this moment are final."""
        begun = time.monotonic()
        marks = {symbol: self.truth(symbol)[-1] for symbol in SYMBOLS}
        status = self.sim("/sim/status")
        now_us = int(status["time_ms"] + status["skew_ms"]) * 1_000
        problem = "nothing was asked yet"
        while time.monotonic() - begun < timeout_s:
            try:
                problem = self._problem(marks, now_us)
            except Exception as exc:  # a server that is still coming up
                problem = str(exc)
            if not problem:
                return time.monotonic() - begun
            time.sleep(0.1)
        raise AssertionError(f"not whole after {timeout_s} s: {problem}; logs in {self.log_dir}")

    def _problem(self, marks: dict[str, int], now_us: int) -> str:
        found = self.counts()
        for symbol, mark in marks.items():
            rows, distinct, low, high = found.get(symbol, (0, 0, 0, 0))
            assert rows == distinct, f"{rows - distinct} trades of {symbol} are stored twice"
            if high < mark:
                return f"{symbol}: newest stored id {high}, the market was at {mark}"
            if distinct != high - low + 1:
                return f"{symbol}: {high - low + 1 - distinct} trades are missing"
        if not self.bars_of(now_us - 1_000_000):
            return "no final bar of this moment yet"
        status, body = self.chain.ask("api", "/api/v1/bars/binance/BTC-USDT?timeframe=1s&limit=1")
        return "" if status == 200 else f"the API answers {status}: {body[:200]}"

    def market_trades(self, symbol: str, until_us: int) -> pl.DataFrame:
        """What the market made of a symbol before ``until_us``, from the first trade on that was stored."""
        made = self.sim(f"/sim/truth?symbol={symbol}&from={self.first[symbol]}")
        rows = pl.DataFrame(
            {
                "trade_id": made["id"],
                "price": [float(price) for price in made["price"]],
                "size": [float(size) for size in made["qty"]],
                "side": pl.Series([-1 if maker else 1 for maker in made["isBuyerMaker"]], dtype=pl.Int8),
                "exchange_time_us": [time_ms * 1_000 for time_ms in made["time"]],
            }
        )
        return rows.filter(pl.col("exchange_time_us") < until_us)

    def equal(self, timeout_s: float = 60.0) -> dict[str, str | int]:
        """Wait until trades and bars are those of an undisturbed run: every column of every trade, every value of every closed bar.

        Bars of all timeframes that closed before this moment of the market; those that opened after the first trade are complete as well, which
        takes the repair its time. Returns how many were compared, and the SHA-256 that both sides have.
        """
        now_us = int(self.sim("/sim/status")["time_ms"]) * 1_000
        trades = {symbol: self.market_trades(symbol, now_us) for symbol in SYMBOLS}
        wanted = {symbol: (rows, undisturbed(rows, canonical(symbol), now_us)) for symbol, rows in trades.items()}
        begun, problem = time.monotonic(), ""
        while time.monotonic() - begun < timeout_s:
            found = {symbol: self._stored(symbol, now_us, rows) for symbol, rows in trades.items()}
            problems = [
                f"{symbol}: {text}"
                for symbol in SYMBOLS
                for mine, theirs, key in zip(found[symbol], wanted[symbol], (("trade_id",), BAR_KEY), strict=True)
                if (text := difference(mine, theirs, key))
            ]
            if not problems:
                mine, theirs = (_hashes(sides) for sides in (found, wanted))
                assert mine == theirs
                counts = {name: sum(len(tables[place]) for tables in wanted.values()) for place, name in enumerate(("trades", "bars"))}
                return {**counts, "trades_sha256": mine[0][:16], "bars_sha256": mine[1][:16]}
            problem = problems[0]
            time.sleep(0.5)
        raise AssertionError(f"not equal to an undisturbed run after {timeout_s} s: {problem}; logs in {self.log_dir}")

    def _stored(self, symbol: str, until_us: int, trades: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        name = canonical(symbol)
        stored = stored_trades(self.settings, name).filter(pl.col("exchange_time_us") < until_us)
        return stored, closed_bars(self.settings, name, until_us, trades)

    def deadletters(self) -> list[str]:
        """Reasons of the stored dead letters."""
        client = connect(self.settings.clickhouse)
        try:
            return [row[0] for row in client.query("SELECT reason FROM deadletter ORDER BY time_us").result_rows]
        finally:
            client.close()


@contextmanager
def exchange(*arguments: str, log_dir: Path) -> Iterator[str]:
    """A simulated exchange as a process; its address."""
    ready = log_dir / f"exchange-{time.monotonic_ns()}.json"
    command = [sys.executable, "-m", "infra.simulated_exchange", "--usdm-symbols", "0", "--symbols", str(len(SYMBOLS)), "--rate", str(RATE)]
    with (log_dir / "exchange.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--history", "2000000", *arguments, "--ready-file", str(ready)], cwd=ROOT, stdout=log, stderr=log
        )
    try:
        until = time.monotonic() + 30
        while not ready.exists() or not ready.read_text().endswith("\n"):
            assert time.monotonic() < until, "the exchange does not start"
            time.sleep(0.05)
        yield json.loads(ready.read_text())["rest_url"]
    finally:
        process.kill()
        process.wait()


@contextmanager
def rig(small_disk: tuple[str, SmallDisk] | None = None, **variables: str) -> Iterator[Rig]:
    """A stack of its own with exchange, collector, worker, sink, repair and API running, whole.

    ``small_disk``: a server's name, and what puts its folder on a file system of its own.
    """
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="marketstream-faults-", ignore_cleanup_errors=True)))
        url = held.enter_context(exchange(log_dir=folder))
        environ = process_environ(folder / "data")
        base = load_settings({**environ, **variables})
        venue = held.enter_context(TcpProxy(int(url.rpartition(":")[2])))
        clickhouse = held.enter_context(TcpProxy(base.ports.clickhouse))
        postgres = held.enter_context(TcpProxy(base.ports.postgres))
        settings = load_settings(
            {
                **base.as_environ(),
                "MARKETSTREAM_COLLECTOR_REST_URL": f"http://127.0.0.1:{venue.port}",
                "MARKETSTREAM_COLLECTOR_WS_URL": f"ws://127.0.0.1:{venue.port}",
                "MARKETSTREAM_COLLECTOR_SYMBOLS": ",".join(map(canonical, SYMBOLS)),
                "MARKETSTREAM_WORKER_SESSION_TIMEOUT_S": "6",
            }
        )
        stack = Stack(settings)
        if small_disk is not None:
            claim(settings.data_dir).close()  # lays the folder out, which would not be taken with something in it already
            held.enter_context(small_disk[1](settings.data_dir / small_disk[0]))
        held.callback(stack.down)
        stack.up()
        provision(settings)
        chain = held.enter_context(Chain(settings, folder))
        made = Rig(settings, stack, chain, url, venue, clickhouse, postgres, log_dir=folder)
        made.start("worker", "sink", "repair", "api", "collector")
        names = ("worker", "sink", "collector", "api")
        wait_for(lambda: all(chain.ask(name, "/readyz")[0] == 200 for name in names), 120, "the chain is not ready")
        made.whole()
        made.first = {symbol: counts[2] for symbol, counts in made.counts().items()}
        yield made


def canonical(symbol: str) -> str:
    """Our name of a symbol of the exchange."""
    return f"{symbol.removesuffix('USDT')}-USDT"


def _hashes(tables: dict[str, tuple[pl.DataFrame, pl.DataFrame]]) -> tuple[str, str]:
    """SHA-256 of the trades and of the bars of all symbols; columns have the same types on both sides once they are equal."""
    trades, bars = zip(*(tables[symbol] for symbol in SYMBOLS), strict=True)
    return sha256(trades), sha256(bars)


def wait_for(check: Callable[[], Any], seconds: float, what: str) -> float:
    """Until ``check()`` holds; seconds it took."""
    begun = time.monotonic()
    while not check():
        assert time.monotonic() - begun < seconds, f"{what}: not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - begun


__all__ = ["RATE", "SYMBOLS", "Rig", "canonical", "exchange", "rig", "wait_for"]
