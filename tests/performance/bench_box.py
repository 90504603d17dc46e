"""The whole box on two cores: every process of the stack, a feed that goes as fast as the slowest stage, ClickHouse and a WebSocket client.

(a) ``recorded``: recorded Binance JSON frames, multiplied over 1,000 symbols, parsed by the real mapper. (b) ``sockets``: the simulated exchange
in a process of its own, through real WebSockets into the real collector. Both beside the 16,667 trades/s that were asked for. Each ends only
when ClickHouse holds every id that was published, once, and the client got every id of its symbols, in order.

``MARKETSTREAM_BENCH_SECONDS`` says how long each runs: 60 by default, 300 for the published figures.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import httpx

from infra.symbol_store import SymbolStore
from tests.performance.box import Box, Lag, Side, box, faults, row_count, side, stored_ids
from tests.performance.usage import Meter, load_average

SECONDS = float(os.environ.get("MARKETSTREAM_BENCH_SECONDS", "60"))
PARTS = os.environ.get("MARKETSTREAM_BENCH_PARTS", "recorded,sockets").split(",")
ASKED_PER_S = 16_667
SYMBOLS = 1_000
WATCHED = 10
"""Symbols the WebSocket client subscribes to: bars of 1 s and 1 m, and every trade."""
SOCKET_RATE = float(os.environ.get("MARKETSTREAM_BENCH_SOCKET_RATE", "150000"))
HISTORY = 1_000_000
"""Trades the exchange keeps: what a backfill could ask for."""
DRAIN_S = 120.0


def pids_of(here: Box, *sides: Side) -> dict[str, int]:
    """Pid by name of the stack's processes and of those beside it."""
    return here.pids() | {entry.name: entry.process.pid for entry in sides}


def _client(here: Box, symbols: list[str]) -> list[str]:
    return ["tests.performance.stream_client", here.stream_url, "--symbols", ",".join(symbols), "--timeframes", "1s,1m", "--trades"]


def _client_faults(seen: dict[str, Any], truth: dict[str, list[int]]) -> list[str]:
    """What the client missed: every id from its first to the last published, in order, is right."""
    found = []
    for symbol, (first, last, disorder) in seen["ids"].items():
        if disorder or last != truth[symbol][1]:
            found.append(f"client {symbol}: {first}..{last}, {disorder} out of order, published up to {truth[symbol][1]}")
    return found


def recorded(seconds: float = SECONDS) -> dict[str, Any]:
    """(a): figures of one run."""
    watched = [f"S{code:04d}-USDT" for code in range(WATCHED)]
    with box("none") as here:
        register(here, [f"S{code:04d}-USDT" for code in range(SYMBOLS)])
        argv = ["tests.performance.feeder", "--seconds", str(seconds), "--symbols", str(SYMBOLS)]
        with side(here, "client", _client(here, watched)) as client:
            client.wait_said("live", 60)
            with side(here, "feeder", argv) as feeder:
                feeder.wait_said("ready", 120)
                with Meter(lambda: pids_of(here, client, feeder)) as meter:
                    said = feeder.finish(seconds + 180)
                lags = [line for line in feeder.lines() if line["event"] == "lag"]
            drained_s = drain(here)
            seen = _finish(client)
        # what still waited at the end is part of the work: the time until it was stored counts
        return _figures(here, said["trades"], said["seconds"] + drained_s, lags, drained_s, meter, seen, said["truth"])


def sockets(seconds: float = SECONDS, rate: float = SOCKET_RATE) -> dict[str, Any]:
    """(b): figures of one run."""
    arguments = ["--step-ms", "10", "--history", str(HISTORY), "--warmup-s", "0"]
    variables = {"MARKETSTREAM_SIM_SYMBOLS": str(SYMBOLS), "MARKETSTREAM_SIM_TRADES_PER_S": "200"}
    with box("sim", sim_arguments=arguments, **variables) as here:
        url = f"http://127.0.0.1:{here.settings.sim.port}"
        names = busiest(here, WATCHED)
        with side(here, "client", _client(here, names)) as client:
            client.wait_said("live", 60)
            lag = Lag(here.settings)
            before = _made(url)
            httpx.post(f"{url}/sim/rate", json={"rate": rate, "market": "spot"}).raise_for_status()
            lags, began = [], time.monotonic()
            with Meter(lambda: pids_of(here, client)) as meter:
                while (now := time.monotonic()) < began + seconds:
                    lags.append({"seconds": round(now - began, 2), "trades": _made(url) - before, **lag.read()})
                    time.sleep(1.0)
            made, took_s = _made(url) - before, time.monotonic() - began
            httpx.post(f"{url}/sim/rate", json={"rate": 0, "market": "spot"}).raise_for_status()
            lag.close()
            time.sleep(2.0)
            drained_s = drain(here)
            truth = _truth(here, url)
            seen = _finish(client)
        figures = _figures(here, made, took_s, lags, drained_s, meter, seen, truth)
        figures["exchange_skipped_ms"] = httpx.get(f"{url}/sim/status").json()["skipped_ms"]
        return figures


def register(here: Box, symbols: list[str]) -> None:
    """Put the symbols into PostgreSQL, where the API looks for the instruments it knows."""
    import asyncio

    async def put() -> None:
        async with SymbolStore(here.settings.postgres) as store:
            await store.seed("binance", symbols)

    asyncio.run(put())


def _made(url: str) -> int:
    return int(httpx.get(f"{url}/sim/status").json()["markets"]["spot"]["trades"])


def busiest(here: Box, count: int) -> list[str]:
    """Symbols of which most trades are stored already."""
    until = time.monotonic() + 30
    while len(found := stored_ids(here.settings)) < count and time.monotonic() < until:
        time.sleep(0.5)
    return [name for name, _ in sorted(found.items(), key=lambda item: -item[1][0])][:count]


def _truth(here: Box, url: str) -> dict[str, list[int]]:
    """Symbol -> [first, last] id: from the first that was stored (when the collector subscribed) to the last the exchange made.

    Its ids are consecutive, so that everything between them was made.
    """
    rows = httpx.get(f"{url}/api/v3/ticker/24hr", timeout=60).raise_for_status().json()
    last = {str(row["symbol"]): int(row["lastId"]) for row in rows}
    return {symbol: [first, last[symbol.replace("-", "")]] for symbol, (_, _, first, _) in stored_ids(here.settings).items()}


def drain(here: Box) -> float:
    """Seconds until nothing was left to do."""
    lag, began = Lag(here.settings), time.monotonic()
    lag.wait_none(DRAIN_S)
    lag.close()
    return time.monotonic() - began


def _finish(client: Side) -> dict[str, Any]:
    time.sleep(1.0)
    client.process.terminate()
    return client.finish(30)


def _figures(
    here: Box,
    trades: int,
    seconds: float,
    lags: list[dict[str, Any]],
    drained_s: float,
    meter: Meter,
    seen: dict[str, Any],
    truth: dict[str, list[int]],
) -> dict[str, Any]:
    stored = stored_ids(here.settings)
    wrong = faults(stored, truth) + _client_faults(seen, truth)
    if len(stored) < SYMBOLS:
        wrong.append(f"{len(stored)} symbols are stored, {SYMBOLS} traded")
    rate = trades / seconds
    third = max(len(lags) // 3, 1)
    parts = {"start": lags[1:third], "middle": lags[third : 2 * third], "end": lags[2 * third :]}
    cpu = meter.cpu_percent()
    return {
        "trades_per_s": round(rate),
        "asked_per_s": ASKED_PER_S,
        "seconds": round(seconds, 1),
        "trades": trades,
        "lag_records": {
            name: {stage: _mean(part, stage) for stage in ("worker", "sink_trades", "sink_bars")} for name, part in parts.items() if part
        },
        "rate_by_third": [_rate(part) for part in parts.values() if len(part) > 1],
        "drained_s": round(drained_s, 2),
        "cpu_percent": cpu | {"sum": round(sum(cpu.values()), 1)},
        "rss_mb": meter.rss_mb(),
        "rows": {name: row_count(here.settings, name) for name in ("trades", "bars", "deadletter")},
        "client": {name: seen[name] for name in ("messages", "trades", "bar_updates", "final_bars", "resumes", "resets", "all")},
        "faults": wrong[:10],
        "fault_count": len(wrong),
        "load_average": load_average(),
    }


def _mean(part: list[dict[str, Any]], stage: str) -> float:
    return round(sum(float(line.get(stage, 0)) for line in part) / len(part), 1)


def _rate(part: list[dict[str, Any]]) -> int:
    trades, seconds = (float(part[-1][name] - part[0][name]) for name in ("trades", "seconds"))
    return round(trades / seconds)


def run() -> dict[str, Any]:
    """Both parts."""
    figures: dict[str, Any] = {}
    for name, measure in (("recorded", recorded), ("sockets", sockets)):
        if name in PARTS:
            figures[name] = measure()
            print(f"{name}: {figures[name]['trades_per_s']:,} trades/s, faults {figures[name]['fault_count']}", file=sys.stderr)
    ratios = {f"{name} / asked": round(found["trades_per_s"] / ASKED_PER_S, 2) for name, found in figures.items()}
    notes = [f"{name}: {entry}" for name, found in figures.items() for entry in found["faults"]]
    return {"name": "box", "figures": figures, "ratios": ratios, "notes": notes}


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
