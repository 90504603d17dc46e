"""The seam to the outside world: clock, sleep and randomness as one argument.

Everything that would otherwise read a clock, sleep or draw a random number takes a :class:`Clock`; the real one lives in
``infra.seam``, tests and simulations pass their own.
"""

from __future__ import annotations

from random import Random
from typing import Protocol


class Clock(Protocol):
    """Time, waiting and randomness for one process.

    Implementations must be cheap: collectors ask for the time once a message.
    """

    @property
    def random(self) -> Random:
        """The source of randomness; seeded in tests, from the system otherwise."""
        ...

    def now_us(self) -> int:
        """Wall-clock time, microseconds since the epoch, UTC. May jump when the system clock is set."""
        ...

    def monotonic_us(self) -> int:
        """Microseconds from an arbitrary start that never go back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait at least ``seconds``; cancellable."""
        ...
