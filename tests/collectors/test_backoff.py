"""Back-off: bounds, jitter, and when a series of failures ends."""

from random import Random

from collectors.backoff import Backoff, BackoffConfig


class HighRandom(Random):
    """Draws the upper bound always."""

    def uniform(self, a: float, b: float) -> float:
        """The upper bound."""
        return b


def test_ceilings_double_up_to_the_maximum() -> None:
    """1, 2, 4, ... 60 seconds, and 60 for ever."""
    backoff = Backoff(BackoffConfig(), HighRandom())
    assert [backoff.failed(0) for _ in range(9)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_waits_are_uniform_between_zero_and_the_ceiling() -> None:
    """Full jitter: the mean of many first waits is half the ceiling, and none is below the minimum."""
    random = Random(1)
    waits = [Backoff(BackoffConfig(), random).failed(0) for _ in range(4000)]
    assert 0.48 < sum(waits) / len(waits) < 0.53
    assert min(waits) >= 0.05
    assert max(waits) <= 1.0


def test_a_stable_connection_ends_the_series() -> None:
    """After 30 s up the next failure starts at the initial ceiling; after less it goes on."""
    backoff = Backoff(BackoffConfig(), HighRandom())
    for _ in range(4):
        backoff.failed(0)
    backoff.connected(1_000_000)
    assert backoff.failed(5_000_000) == 16
    backoff.connected(10_000_000)
    assert backoff.failed(41_000_000) == 1


def test_a_thousand_failures_do_not_overflow() -> None:
    """The exponent is bounded."""
    backoff = Backoff(BackoffConfig(), HighRandom())
    assert [backoff.failed(0) for _ in range(2000)][-1] == 60
