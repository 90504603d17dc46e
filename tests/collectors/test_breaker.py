"""The circuit breaker's states."""

import pytest

from collectors.breaker import Breaker, BreakerState
from collectors.errors import BreakerOpenError

S = 1_000_000


def broken() -> Breaker:
    """A breaker that just opened at 0 s."""
    breaker = Breaker("venue")
    for _ in range(5):
        breaker.check(0)
        breaker.failed(0)
    return breaker


def test_five_failures_in_a_row_open_it_for_sixty_seconds() -> None:
    """Four do not; a success in between starts the count anew."""
    breaker = Breaker("venue")
    for _ in range(4):
        breaker.failed(0)
    breaker.succeeded(0)
    for _ in range(4):
        breaker.failed(0)
    assert breaker.state is BreakerState.CLOSED
    breaker.failed(0)
    assert breaker.state is BreakerState.OPEN
    with pytest.raises(BreakerOpenError, match="venue failed too often; the next attempt is allowed in 30 s"):
        breaker.check(30 * S)


def test_two_successful_probes_close_it() -> None:
    """Half-open lets one probe through at a time."""
    breaker = broken()
    breaker.check(60 * S)
    assert breaker.state is BreakerState.HALF_OPEN
    with pytest.raises(BreakerOpenError):
        breaker.check(60 * S)
    breaker.succeeded(61 * S)
    assert breaker.state is BreakerState.HALF_OPEN
    breaker.check(61 * S)
    breaker.succeeded(61 * S)
    assert breaker.state is BreakerState.CLOSED


def test_a_failed_probe_opens_it_again() -> None:
    """And the sixty seconds start anew."""
    breaker = broken()
    breaker.check(60 * S)
    breaker.failed(62 * S)
    assert breaker.state is BreakerState.OPEN
    assert breaker.retry_after_s(62 * S) == 60.0


def test_a_cancelled_probe_blocks_nobody() -> None:
    """A probe that neither worked nor failed lets the next one through."""
    breaker = broken()
    breaker.check(60 * S)
    breaker.abandoned()
    breaker.check(60 * S)


def test_transitions_are_told_and_counted() -> None:
    """Each change is reported once, with where it came from."""
    seen: list[tuple[BreakerState, BreakerState]] = []
    breaker = Breaker("venue", on_transition=lambda old, new: seen.append((old, new)))
    for _ in range(5):
        breaker.failed(0)
    breaker.check(60 * S)
    breaker.failed(60 * S)
    assert seen == [
        (BreakerState.CLOSED, BreakerState.OPEN),
        (BreakerState.OPEN, BreakerState.HALF_OPEN),
        (BreakerState.HALF_OPEN, BreakerState.OPEN),
    ]
    assert breaker.transitions_total == 3
    assert breaker.failures_total == 6
