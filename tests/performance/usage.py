"""What processes take: pids in; CPU seconds and memory, children included, out."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

MB = 1_000_000
SUPERVISOR = "supervisor"
"""Its children are the other processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """One process and its children at one moment."""

    cpu_s: float
    """User and system time since the start."""
    rss_mb: float
    """Resident, pages shared with others counted in full."""
    pss_mb: float
    """Resident, shared pages divided among those who share them."""


def usage_of(pid: int, children: bool = True) -> Usage | None:
    """What ``pid`` (and its children) take; None when it is gone."""
    try:
        root = psutil.Process(pid)
        family = [root, *(root.children(recursive=True) if children else ())]
    except psutil.Error:
        return None
    cpu = rss = pss = 0.0
    for process in family:
        try:
            times = process.cpu_times()
            rss += process.memory_info().rss / MB
        except psutil.Error:
            continue
        cpu += times.user + times.system
        pss += _pss_mb(process.pid)
    return Usage(cpu_s=cpu, rss_mb=rss, pss_mb=pss)


def usages(pids: Mapping[str, int]) -> dict[str, Usage]:
    """By name, those that live; children are counted with a process unless they have a name of their own (the supervisor's)."""
    found = {name: usage_of(pid, children=name != SUPERVISOR) for name, pid in pids.items()}
    return {name: usage for name, usage in found.items() if usage is not None}


def _pss_mb(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024 / MB
    except OSError:
        pass  # another user's process (PostgreSQL): its memory is known by RSS only
    return 0.0


def load_average() -> float:
    """Of the last minute: what else the machine did beside a figure."""
    return round(os.getloadavg()[0], 2)


class Meter:
    """CPU share and greatest memory of named processes between ``with`` and its end.

    Args:
        pids: asked again at every look, as processes come and go.
        interval_s: between two looks at memory.
    """

    def __init__(self, pids: Callable[[], Mapping[str, int]], interval_s: float = 2.0) -> None:
        self._pids = pids
        self._interval_s = interval_s
        self._first: dict[str, Usage] = {}
        self._last: dict[str, Usage] = {}
        self._most_mb: dict[str, float] = {}
        self.looks: dict[str, list[tuple[float, float]]] = {}
        """By process: (seconds since the beginning, resident MB) of each look."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._began = 0.0
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self._first = usages(self._pids())
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.seconds = time.monotonic() - self._began
        self._look()
        self._stop.set()
        self._thread.join()

    def cpu_percent(self) -> dict[str, float]:
        """Share of one core by process, per cent."""
        shares = {name: self._last[name].cpu_s - first.cpu_s for name, first in self._first.items() if name in self._last}
        return {name: round(100 * seconds / self.seconds, 1) for name, seconds in shares.items()}

    def rss_mb(self) -> dict[str, float]:
        """Greatest resident memory by process."""
        return {name: round(value, 1) for name, value in self._most_mb.items()}

    def pss_mb(self) -> dict[str, float]:
        """Proportional memory by process at the end."""
        return {name: round(usage.pss_mb, 1) for name, usage in self._last.items()}

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._look()

    def _look(self) -> None:
        self._last |= usages(self._pids())
        seconds = time.monotonic() - self._began
        for name, usage in self._last.items():
            self._most_mb[name] = max(self._most_mb.get(name, 0.0), usage.rss_mb)
            self.looks.setdefault(name, []).append((seconds, usage.rss_mb))
