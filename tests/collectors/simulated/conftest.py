"""Fixtures: recorded data, a clock moved by hand and a small exchange on it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from simulated_support import ManualClock, Recordings, small_config

from collectors.simulated.server import SimulatedExchange, serve


@pytest.fixture(scope="session")
def recordings() -> Recordings:
    """Recorded data, from MARKETSTREAM_TEST_DATA or `../shared/data` beside the checkout."""
    root = Path(os.environ.get("MARKETSTREAM_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
    if not (root / "ws" / "binance").is_dir():
        pytest.skip(f"no recorded data at {root}; set MARKETSTREAM_TEST_DATA")
    return Recordings(root)


@pytest.fixture
def clock() -> ManualClock:
    """A clock moved by the test."""
    return ManualClock()


@pytest.fixture
async def exchange(clock: ManualClock) -> AsyncIterator[SimulatedExchange]:
    """A small exchange whose time only the test moves (`advance`)."""
    async with serve(small_config(), clock) as running:
        yield running
