"""The token bucket and what the venue's answers do to it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.rate_limit import RateLimit, RateLimitConfig, retry_after_s

S = 1_000_000


def test_the_burst_passes_at_once_and_the_rest_at_the_rate() -> None:
    """600 weight a minute, a bucket of 50: the 51st waits 0.1 s."""
    limit = RateLimit(RateLimitConfig(weight_per_minute=600, burst=50, share=1.0))
    for _ in range(50):
        assert limit.wait_s(1, 0) == 0
        limit.take(1, 0)
    assert limit.wait_s(1, 0) == pytest.approx(0.1)
    assert limit.wait_s(1, S // 10) == 0


def test_a_request_heavier_than_the_bucket_waits_for_a_full_one_only() -> None:
    """Otherwise it would wait for ever."""
    limit = RateLimit(RateLimitConfig(weight_per_minute=600, burst=50, share=1.0))
    assert limit.wait_s(80, 0) == 0
    limit.take(80, 0)
    assert limit.wait_s(80, 0) == pytest.approx(8.0)


def test_a_ban_blocks_everything_for_its_time() -> None:
    """418 with Retry-After 120."""
    limit = RateLimit(RateLimitConfig())
    limit.block(120, 0)
    assert limit.wait_s(1, 20 * S) == pytest.approx(100.0)
    assert limit.wait_s(1, 120 * S) == 0


def test_what_the_venue_counted_lowers_what_is_left() -> None:
    """Another program behind the same address used the budget."""
    limit = RateLimit(RateLimitConfig(weight_per_minute=6000, burst=600, share=0.8))
    limit.observe({"x-mbx-used-weight-1m": "5000"}, 0)
    assert limit.used_weight == 5000
    assert limit.wait_s(1, 0) > 2.0


def test_retry_after_is_bounded_and_optional() -> None:
    """Missing, unreadable and absurd values."""
    assert retry_after_s({"retry-after": "7"}, 10) == 7
    assert retry_after_s({}, 10) == 10
    assert retry_after_s({"Retry-After": "soon"}, 10) == 10
    assert retry_after_s({"retry-after": "nan"}, 10) == 10
    assert retry_after_s({"retry-after": "1e30"}, 10) == 259_200


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5 * S)), max_size=60))
def test_no_minute_ever_exceeds_burst_plus_rate(requests: list[tuple[int, int]]) -> None:
    """Whoever waits as told spends at most bucket + rate * 60 s in any minute."""
    limit = RateLimit(RateLimitConfig(weight_per_minute=300, burst=100, share=1.0))
    now, spent = 0, []
    for weight, pause in requests:
        now += pause
        now += int(limit.wait_s(weight, now) * S) + 1
        limit.take(weight, now)
        spent.append((now, weight))
    for start, _ in spent:
        assert sum(weight for time, weight in spent if start <= time < start + 60 * S) <= 100 + 300 + 1
