"""Memory of a worker: bytes a symbol, from 1,000 to 10,000 symbols, and whether it stays flat over many trades.

``MARKETSTREAM_BENCH_TRADES`` says over how many: 10 million by default, 100 million for the published figure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.performance.stack import ROOT
from tests.performance.usage import load_average

TRADES = int(float(os.environ.get("MARKETSTREAM_BENCH_TRADES", "1e7")))
FEW, MANY = 1_000, 10_000
MOST_BYTES = 32 * 1024
_TIMEOUT_S = 3_600


def probe(symbols: int, trades: int) -> list[dict[str, Any]]:
    """Lines of ``tests.performance.memory_probe``."""
    with tempfile.TemporaryFile("w+b") as out, tempfile.NamedTemporaryFile("w+b", suffix=".err") as err:
        argv = [sys.executable, "-m", "tests.performance.memory_probe", "--symbols", str(symbols), "--trades", str(trades)]
        done = subprocess.run(argv, cwd=ROOT, stdout=out, stderr=err, timeout=_TIMEOUT_S, check=False)
        if done.returncode:
            raise RuntimeError(f"the probe ended with {done.returncode}: {Path(err.name).read_text()[-2000:]}")
        out.seek(0)
        return [json.loads(line) for line in out]


def run() -> dict[str, Any]:
    """Bytes, and shares of what is allowed."""
    # every symbol must have filled the rings of closed bars it keeps: some hundred trades each over a minute of market time
    few, many = probe(FEW, TRADES), probe(MANY, max(4_000_000, TRADES // 10))
    slope = (_grown(many[-1]) - _grown(few[-1])) / (MANY - FEW)
    growth = few[-2]["rss_bytes"] - few[2]["rss_bytes"]
    figures: dict[str, Any] = {
        "rss_bytes_a_symbol": round(slope),
        "snapshot_bytes_a_symbol": {str(last["symbols"]): round(last["snapshot_bytes"] / last["symbols"]) for last in (few[-1], many[-1])},
        "array_bytes_a_symbol": few[-1]["array_bytes"],
        "snapshot_ms": {str(last["symbols"]): round(last["snapshot_ms"], 1) for last in (few[-1], many[-1])},
        "rss_mb_at": {f"{line['trades']:,}": round(line["rss_bytes"] / 1e6, 1) for line in few[:-1]},
        "growth_mb_after_first_third": round(growth / 1e6, 2),
        "trades": few[-2]["trades"],
        "engine_trades_per_s": {str(last["symbols"]): round(last["trades_per_s"]) for last in (few[-1], many[-1])},
        "load_average": load_average(),
    }
    ratios = {
        "rss a symbol / allowed": round(slope / MOST_BYTES, 3),
        "snapshot a symbol / allowed": round(few[-1]["snapshot_bytes"] / few[-1]["symbols"] / MOST_BYTES, 3),
    }
    return {"name": "memory", "figures": figures, "ratios": ratios, "notes": []}


def _grown(last: dict[str, Any]) -> int:
    return int(last["rss_bytes"] - last["start_bytes"])


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
