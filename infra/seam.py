"""The real clock, sleep and randomness of a process; the only module that asks the operating system for them."""

from __future__ import annotations

import asyncio
import time
from random import Random, SystemRandom
from typing import Final


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

    def pause(self, seconds: float) -> None:
        """Block this thread for ``seconds``; for loops in threads of their own."""
        time.sleep(seconds)

    def monotonic_s(self) -> float:
        """:meth:`monotonic_us` in seconds, for deadlines."""
        return time.monotonic()


SYSTEM: Final = SystemClock()
"""The clock of this process, for the shells around the pure parts: those take it as an argument."""
