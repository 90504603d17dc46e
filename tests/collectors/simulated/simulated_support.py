"""Help for these tests: recorded Binance data, a clock that a test moves by hand, the config of a small exchange."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from collectors.simulated.config import ServerConfig
from collectors.simulated.exchange import ExchangeConfig
from collectors.simulated.regimes import MarketConfig

START_MS = 1_723_161_255_000


class ManualClock:
    """`schemas.seam.Clock` that stands still until `move` is called; sleepers wake when their time has come."""

    def __init__(self, start_ms: int = START_MS) -> None:
        self._now_us = start_ms * 1_000
        self._moved = asyncio.Event()
        self.random = Random(1)

    def now_us(self) -> int:
        """The time the test set."""
        return self._now_us

    def monotonic_us(self) -> int:
        """The same."""
        return self._now_us

    async def sleep(self, seconds: float) -> None:
        """Wait until the test has moved time far enough."""
        until = self._now_us + round(seconds * 1e6)
        while self._now_us < until:
            await self._moved.wait()
        await asyncio.sleep(0)

    async def move(self, seconds: float) -> None:
        """Let time pass in steps of at most a second, and let everybody who waits for it run."""
        left = round(seconds * 1e6)
        while left > 0:
            part = min(left, 1_000_000)
            left -= part
            self._now_us += part
            self._moved.set()
            self._moved.clear()
            for _ in range(60):
                await asyncio.sleep(0)


class Recordings:
    """The recorded Binance data, read on demand."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def frames(self, name: str, stream: str, limit: int = 200) -> list[dict[str, Any]]:
        """The first frames of a stream whose name ends in `stream`, of a capture file."""
        return list(self._frames(name, stream, limit))

    def _frames(self, name: str, stream: str, limit: int) -> Iterator[dict[str, Any]]:
        with gzip.open(self.root / name, "rt") as lines:
            for line in lines:
                start = line.find("{")
                if f'@{stream}",' in line and start >= 0:
                    yield json.loads(line[start:])
                    limit -= 1
                    if not limit:
                        return

    def rest(self, route: str) -> list[dict[str, Any]]:
        """The recorded replies of a route: `queryString` and `data`."""
        with gzip.open(self.root / "rest" / "binance_rest_public.json.gz", "rt") as file:
            routes: dict[str, list[dict[str, Any]]] = json.load(file)
        return routes[route]


def small_config(**changes: Any) -> ServerConfig:
    """Twenty spot symbols and five perpetuals, busy enough that a second holds a few thousand trades."""
    exchange = ExchangeConfig(
        spot=MarketConfig(symbols=20, rate=3_000.0, seed=7, step_ms=20),
        usdm=MarketConfig(kind="usdm", symbols=5, rate=1_000.0, seed=7, step_ms=20),
        history=200_000,
        warmup_s=2.0,
    )
    return ServerConfig(**({"exchange": exchange, "pace": False} | changes))
