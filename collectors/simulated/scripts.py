"""Scripts: a timed sequence of faults, written by a person or drawn from a seed.

Comes in: JSON, a list of faults that each say when they begin::

    [{"at_s": 2.0, "fault": "drop", "symbol": "BTCUSDT", "count": 5}, {"at_s": 4.5, "fault": "close"}]

or what a random one is drawn from: ``{"seed": 7, "seconds": 60, "faults": 20, "symbols": ["BTCUSDT"], "kinds": ["drop", "close"]}``.
Goes out: a :class:`Script` that hands out the faults that are due. Pure: time is market time, so the same seed of the market and the same
script touch the same trade ids however slow the machine is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any, Final

from collectors.simulated.errors import SimulationConfigError, UnknownFaultError
from collectors.simulated.faults import MAX_SKEW_MS, FaultRequest, parse_fault

MAX_ENTRIES: Final = 10_000
MAX_SECONDS: Final = 86_400.0

RANDOM_KINDS: Final = (
    "drop", "hole", "duplicate", "reorder", "late", "malformed", "half_open", "close", "cut_24h", "rate_limit", "skew", "pause", "lose", "stall",
    "refuse", "slow_rest", "rest_error", "short_pages", "cut_pages",
)  # fmt: skip
"""What a random script draws from by default: everything but a restart with ids reset, which makes ids ambiguous."""


class Script:
    """Faults in the order they begin.

    Args:
        entries: (milliseconds after the start, fault as parsed), any order; equal times keep their order.
    """

    def __init__(self, entries: list[tuple[int, FaultRequest]]) -> None:
        self.entries = sorted(entries, key=lambda entry: entry[0])
        self.done = 0
        self.begun_ms = -1

    def due(self, time_ms: int) -> list[FaultRequest]:
        """The faults that begin now; the first call starts the script's time."""
        if self.begun_ms < 0:
            self.begun_ms = time_ms
        first = self.done
        while self.done < len(self.entries) and self.entries[self.done][0] <= time_ms - self.begun_ms:
            self.done += 1
        return [request for _, request in self.entries[first : self.done]]

    def describe(self) -> dict[str, Any]:
        """For ``/sim/status``."""
        upcoming = self.entries[self.done][0] / 1_000 if self.done < len(self.entries) else None
        return {"faults": len(self.entries), "begun": self.done, "begun_ms": self.begun_ms, "next_at_s": upcoming}


def parse_script(body: Any) -> Script:
    """The script a request or a file asks for.

    Raises:
        UnknownFaultError: it is no script; the sentence names the entry and what is wrong with it.
    """
    if isinstance(body, Mapping) and "seed" in body:
        return _random_script(body)
    if not isinstance(body, list) or not body:
        raise UnknownFaultError(
            'a script is a list such as [{"at_s": 2, "fault": "close"}], or {"seed": 7, "seconds": 60} for a random one'
        )
    if len(body) > MAX_ENTRIES:
        raise UnknownFaultError(f"a script has at most {MAX_ENTRIES:,} faults, this one has {len(body):,}")
    return Script([_entry(number, entry) for number, entry in enumerate(body)])


def read_script(path: Path) -> Script:
    """The script of a file.

    Raises:
        SimulationConfigError: the file cannot be read or is no script; the sentence names it.
    """
    try:
        return parse_script(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise SimulationConfigError(f"script {path} cannot be read: {error.strerror or error}") from error
    except UnknownFaultError as error:
        raise SimulationConfigError(f"script {path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise SimulationConfigError(f"script {path} is no JSON: {error}") from error


def _entry(number: int, entry: Any) -> tuple[int, FaultRequest]:
    if not isinstance(entry, Mapping):
        raise UnknownFaultError(f'script[{number}]={entry!r} must be an object such as {{"at_s": 2, "fault": "close"}}')
    at_s = entry.get("at_s")
    if isinstance(at_s, bool) or not isinstance(at_s, int | float) or not 0 <= at_s <= MAX_SECONDS:
        raise UnknownFaultError(f"script[{number}]: at_s={at_s!r} must be a number of seconds within 0..{MAX_SECONDS:g}")
    try:
        return round(at_s * 1_000), parse_fault({key: value for key, value in entry.items() if key != "at_s"})
    except UnknownFaultError as error:
        raise UnknownFaultError(f"script[{number}]: {error}") from error


def _random_script(body: Mapping[str, Any]) -> Script:
    seed, count = _whole(body, "seed", 0, 2**63), _whole(body, "faults", 20, MAX_ENTRIES)
    seconds = body.get("seconds", 60)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MAX_SECONDS:
        raise UnknownFaultError(f"random script: seconds={seconds!r} must be a number within 0..{MAX_SECONDS:g}")
    symbols, kinds = body.get("symbols", ["BTCUSDT"]), body.get("kinds", list(RANDOM_KINDS))
    for name, names in (("symbols", symbols), ("kinds", kinds)):
        if not isinstance(names, list) or not names or not all(isinstance(each, str) for each in names):
            raise UnknownFaultError(f"random script: {name}={names!r} must be a list of names")
    unknown = set(body) - {"seed", "faults", "seconds", "symbols", "kinds"}
    if unknown:
        raise UnknownFaultError(f"random script: argument {min(unknown)!r} is not known; arguments: seed, faults, seconds, symbols, kinds")
    random = Random(seed)
    return Script([(round(random.uniform(0, seconds) * 1_000), parse_fault(_draw(random, symbols, kinds))) for _ in range(count)])


def _whole(body: Mapping[str, Any], name: str, default: int, most: int) -> int:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise UnknownFaultError(f"random script: {name}={value!r} must be a whole number within 0..{most}")
    return value


def _draw(random: Random, symbols: list[str], kinds: list[str]) -> dict[str, Any]:
    kind = random.choice(kinds)
    fault: dict[str, Any] = {"fault": kind}
    if kind in ("drop", "hole", "duplicate", "reorder", "late", "lose"):
        return fault | {"symbol": random.choice(symbols), "count": random.choice((2, 3, 10, 50))}
    if kind == "pause":
        return fault | {"symbol": random.choice(symbols), "seconds": random.uniform(0.5, 3.0)}
    if kind == "skew":
        return fault | {"milliseconds": random.randint(-MAX_SKEW_MS, MAX_SKEW_MS)}
    if kind in ("stall", "refuse", "slow_rest", "rest_error", "short_pages", "rate_limit", "restart"):
        return fault | {"seconds": random.uniform(0.5, 5.0)}
    return fault
