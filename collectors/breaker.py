"""A circuit breaker: after too many failures in a row nothing is sent for a while. Pure: time is an argument.

closed --(failures in a row)--> open --(open_s)--> half-open --(successes)--> closed; a failure while half-open opens it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from collectors.errors import BreakerOpenError


class BreakerState(Enum):
    """What the breaker lets through; the value is the figure exported as ``circuit_breaker_state``."""

    CLOSED = 0.0
    """Everything passes."""
    HALF_OPEN = 0.5
    """One probe at a time passes."""
    OPEN = 1.0
    """Nothing passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakerConfig:
    """When to open and when to try again."""

    failures: int = 5
    """Failures in a row that open it."""
    open_s: float = 60.0
    """Seconds it stays open before a probe is allowed."""
    successes: int = 2
    """Successful probes that close it."""


class Breaker:
    """One breaker for one dependency.

    Args:
        name: what is protected, for messages and metrics.
        on_transition: called with (old, new) at every change; must not block.
    """

    def __init__(
        self, name: str, config: BreakerConfig | None = None, on_transition: Callable[[BreakerState, BreakerState], None] | None = None
    ) -> None:
        self.name = name
        self._config = config or BreakerConfig()
        self._on_transition = on_transition
        self._state = BreakerState.CLOSED
        self._opened_us = 0
        self._in_a_row = 0
        self._probing = False
        self.failures_total = 0
        self.transitions_total = 0

    @property
    def state(self) -> BreakerState:
        """The state as of the last call; an open breaker turns half-open when it is asked after its time."""
        return self._state

    def retry_after_s(self, mono_us: int) -> float:
        """Seconds until a call may pass; 0 when it may now."""
        if self._state is not BreakerState.OPEN:
            return 0.0
        return max(0.0, self._config.open_s - (mono_us - self._opened_us) / 1e6)

    def check(self, mono_us: int) -> None:
        """Ask to make a call. Raises BreakerOpenError when it may not be made; otherwise report its outcome."""
        if self._state is BreakerState.OPEN:
            wait_s = self.retry_after_s(mono_us)
            if wait_s > 0:
                raise BreakerOpenError(self.name, wait_s)
            self._become(BreakerState.HALF_OPEN)
        if self._state is BreakerState.HALF_OPEN:
            if self._probing:
                raise BreakerOpenError(self.name, 1.0)
            self._probing = True

    def succeeded(self, mono_us: int) -> None:
        """The call worked."""
        self._probing = False
        if self._state is BreakerState.HALF_OPEN:
            self._in_a_row += 1
            if self._in_a_row >= self._config.successes:
                self._become(BreakerState.CLOSED)
        elif self._state is BreakerState.CLOSED:
            self._in_a_row = 0

    def failed(self, mono_us: int) -> None:
        """The call failed in a way that says the dependency is ill (not: our request was wrong)."""
        self._probing = False
        self.failures_total += 1
        if self._state is BreakerState.HALF_OPEN:
            self._open(mono_us)
        elif self._state is BreakerState.CLOSED:
            self._in_a_row += 1
            if self._in_a_row >= self._config.failures:
                self._open(mono_us)

    def abandoned(self) -> None:
        """The call was cancelled: neither worked nor failed."""
        self._probing = False

    def _open(self, mono_us: int) -> None:
        self._opened_us = mono_us
        self._become(BreakerState.OPEN)

    def _become(self, state: BreakerState) -> None:
        old, self._state, self._in_a_row = self._state, state, 0
        self.transitions_total += 1
        if self._on_transition is not None:
            self._on_transition(old, state)
