"""What the stack takes when nothing happens, and how long its doors take to open.

``up --detach --source none`` on an empty folder, again on the folder it left, then CPU and memory of every process over half a minute without
a trade; and ``up --source sim`` on a new folder until the API serves the first bar.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from infra.settings import Settings, load_settings
from infra.stack.supervisor import down, read_state
from tests.integration.conftest import process_environ
from tests.performance.stack import ROOT, child_environ
from tests.performance.usage import SUPERVISOR, Meter, load_average

SETTLE_S = 20.0
OVER_S = float(os.environ.get("MARKETSTREAM_BENCH_IDLE_SECONDS", "30"))
MOST_CPU_PERCENT, MOST_MB, MOST_FIRST_BAR_S = 15.0, 1600.0, 15.0
_TIMEOUT_S = 180.0


@contextmanager
def up(settings: Settings, source: str, log: Path) -> Iterator[float]:
    """``marketstream up --detach``; gives the seconds it took, and stops everything at the end."""
    command = [sys.executable, "-m", "infra.cli.main", "up", "--detach", "--source", source, "--data-dir", str(settings.data_dir)]
    began = time.monotonic()
    try:
        with log.open("ab") as out:
            # not a pipe: the tree that stays behind would hold it open
            done = subprocess.run(
                command,
                env=child_environ(settings),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=_TIMEOUT_S,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"up ended with {done.returncode}: {log.read_text()[-2000:]}")
        yield time.monotonic() - began
    finally:
        down(settings.data_dir)


def idle() -> tuple[dict[str, Any], dict[str, Any]]:
    """Times of the first and the second ``up``, and what the idle stack takes."""
    with tempfile.TemporaryDirectory(prefix="marketstream-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        settings = load_settings(process_environ(folder / "data"))
        with up(settings, "none", folder / "up.log") as first_s:
            pass
        with up(settings, "none", folder / "up.log") as second_s:
            time.sleep(SETTLE_S)

            def pids() -> dict[str, int]:
                found = read_state(settings.data_dir)
                if found is None:
                    raise RuntimeError("the stack is gone")
                return {SUPERVISOR: found.pid} | {status.name: status.pid for status in found.processes if status.pid}

            with Meter(pids, interval_s=OVER_S) as meter:
                time.sleep(OVER_S)
        cpu, rss, pss = meter.cpu_percent(), meter.rss_mb(), meter.pss_mb()
        taken = {
            "cpu_percent": cpu | {"sum": round(sum(cpu.values()), 1)},
            "rss_mb": rss | {"sum": round(sum(rss.values()), 1)},
            "pss_mb": pss | {"sum": round(sum(pss.values()), 1)},
        }
        return {"up_first_s": round(first_s, 2), "up_second_s": round(second_s, 2)}, taken


def first_bar_s() -> float:
    """Seconds from ``up --source sim`` on an empty folder to the first bar the API serves."""
    with tempfile.TemporaryDirectory(prefix="marketstream-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        settings = load_settings(process_environ(folder / "data"))
        api = f"http://127.0.0.1:{settings.api.port}/api/v1"
        began = time.monotonic()
        with up(settings, "sim", folder / "up.log"):
            while time.monotonic() < began + _TIMEOUT_S:
                if _has_bar(api):
                    return time.monotonic() - began
                time.sleep(0.05)
        raise RuntimeError("no bar was served")


def _has_bar(api: str) -> bool:
    answer = httpx.get(f"{api}/bars/binance/BTC-USDT", params={"timeframe": "1s", "limit": 1}, timeout=10)
    return answer.is_success and bool(answer.json().get("bars"))


def run() -> dict[str, Any]:
    """Figures of one start each; ``ratios`` are shares of what is allowed."""
    times, taken = idle()
    times["first_bar_s"] = round(first_bar_s(), 2)
    figures = times | taken | {"load_average": load_average()}
    ratios = {
        "cpu / allowed": round(taken["cpu_percent"]["sum"] / MOST_CPU_PERCENT, 2),
        "rss / allowed": round(taken["rss_mb"]["sum"] / MOST_MB, 2),
        "pss / allowed": round(taken["pss_mb"]["sum"] / MOST_MB, 2),
        "first bar / allowed": round(times["first_bar_s"] / MOST_FIRST_BAR_S, 2),
    }
    return {"name": "idle", "figures": figures, "ratios": ratios, "notes": []}


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
