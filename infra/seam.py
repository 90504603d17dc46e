"""The real clock, sleep and randomness of a process; the only module that asks the operating system for them."""

from __future__ import annotations

import asyncio
import time
from random import Random, SystemRandom


class SystemClock:
    """`schemas.seam.Clock` on the operating system's clocks."""

    def __init__(self) -> None:
        self._random = SystemRandom()

    @property
    def random(self) -> Random:
        """Randomness from the operating system."""
        return self._random

    def now_us(self) -> int:
        """Wall-clock microseconds since the epoch, UTC."""
        return time.time_ns() // 1000

    def monotonic_us(self) -> int:
        """Microseconds that never go back."""
        return time.monotonic_ns() // 1000

    async def sleep(self, seconds: float) -> None:
        """Wait ``seconds`` on the event loop."""
        await asyncio.sleep(seconds)
