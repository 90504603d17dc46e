"""The soak on the real stack: trades through Kafka, worker, sink and ClickHouse, as many as asked, and what each process's memory does meanwhile.

``python -m tests.performance.soak_stack --trades 1000000000``. Recorded Binance frames over 1,000 symbols, as fast as the slowest stage. Exit
code 0: ClickHouse holds every id that was published, once; nothing waits at the end, as the broker says; and no process of ours grows by 1 MB
or more per 1e8 trades, by the straight line through its resident memory after the first fifth of the run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from infra.prove.figures import conclude
from infra.prove.soak import JUDGED_FROM, SLOPE_LIMIT_MB, WARM_SHARE, slope_mb
from tests.performance.bench_box import SYMBOLS, drain, pids_of, register
from tests.performance.box import Lag, box, faults, row_count, side, stored_ids
from tests.performance.usage import MB, Meter

OURS = ("worker-0", "sink", "api", "repair")
"""Judged; broker, engine and database have bounds of their own."""
SLOWEST_PER_S = 50_000
"""A box that does less is broken."""


def slopes(looks: Mapping[str, Sequence[tuple[float, float]]], trades_per_s: float) -> dict[str, float]:
    """MB per 1e8 trades by process, from (seconds, resident MB), without the time in which rings and buffers fill."""
    found = {}
    for name, points in looks.items():
        warm = [(round(seconds * trades_per_s), round(mb * MB)) for seconds, mb in points if seconds >= WARM_SHARE * points[-1][0]]
        found[name] = round(slope_mb(warm), 2)
    return found


def run(trades: int) -> dict[str, Any]:
    """One run; its figures."""
    seconds = 60 + trades / SLOWEST_PER_S
    with box("none") as here:
        register(here, [f"S{code:04d}-USDT" for code in range(SYMBOLS)])
        argv = ["tests.performance.feeder", "--trades", str(trades), "--seconds", str(seconds), "--symbols", str(SYMBOLS)]
        with side(here, "feeder", argv) as feeder:
            feeder.wait_said("ready", 120)
            with Meter(lambda: pids_of(here, feeder), interval_s=5.0) as meter:
                said = feeder.finish(seconds + 180)
        drained_s = drain(here)
        waiting = Lag(here.settings)
        lag = waiting.read()
        waiting.close()
        stored = stored_ids(here.settings)
        return {
            "trades": said["trades"],
            "trades_per_s": said["trades"] / said["seconds"],
            "stored": sum(rows for rows, *_ in stored.values()),
            "bars": row_count(here.settings, "bars"),
            "dead_letters": row_count(here.settings, "deadletter"),
            "faults": faults(stored, said["truth"])[:5],
            "lag": sum(lag.values()),
            "drained_s": drained_s,
            "rss_mb": {name: value for name, value in meter.rss_mb().items() if name != "feeder"},
            "slope_mb_per_1e8": {
                name: value for name, value in slopes(meter.looks, said["trades"] / said["seconds"]).items() if name in OURS
            },
        }


def problems(figures: Mapping[str, Any]) -> list[str]:
    """What does not hold; slopes only of a run long enough to have them."""
    found = list(figures["faults"])
    if figures["lag"]:
        found.append(f"{figures['lag']} records wait")
    if figures["dead_letters"]:
        found.append(f"{figures['dead_letters']} dead letters")
    if figures["trades"] >= JUDGED_FROM:
        grown = {name: value for name, value in figures["slope_mb_per_1e8"].items() if value >= SLOPE_LIMIT_MB}
        found += [f"{name} grows by {value} MB per 1e8 trades" for name, value in grown.items()]
    return found


def main() -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(description="Trades through the whole stack, for hours or seconds")
    parser.add_argument(
        "--trades", type=int, default=1_000_000_000, help="how many; a thousand million take about three quarters of an hour"
    )
    figures = run(parser.parse_args().trades)
    return conclude("soak", figures, problems(figures))


if __name__ == "__main__":
    sys.exit(main())
